"""One writer per run folder: a lock file with host and process, and a heartbeat that says it is still alive.

A lock is stale, and may be taken, when its process is gone from this host or when it has been silent for two minutes (another
host, a machine asleep). Whoever lost a lock that way finds out at its next beat and must stop writing.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from histokit.core import files

NAME = "run.lock"
BEAT, SILENT = 10, 120  # seconds between heartbeats, and after which a silent writer counts as dead
_held = {}  # folder -> Lock of this process


class Locked(RuntimeError):
    """Another process writes into this folder."""


class Lock:
    """A held lock; `lost` turns True when another process took it over."""

    def __init__(self, folder):
        self.path, self.lost = Path(folder) / NAME, False
        self.token = os.urandom(8).hex()
        self.pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="histokit-heartbeat", daemon=True)

    def _beat(self):
        while not self._stop.wait(BEAT):
            if not self.alive():
                return

    def alive(self):
        """Beats once; False, from then on, when the lock file is not ours any more."""
        if not self.lost:
            facts = read(self.path.parent)
            self.lost = facts is None or facts.get("token") != self.token
            if not self.lost:
                with contextlib.suppress(OSError):
                    os.utime(self.path)
        return not self.lost

    def release(self):
        """Ends the heartbeat and removes the lock file if it is ours; safe to call twice, and in a forked child does nothing."""
        if self.pid != os.getpid():
            return
        self._stop.set()
        _held.pop(str(self.path.parent), None)
        facts = read(self.path.parent)
        if facts and facts.get("token") == self.token:
            self.path.unlink(missing_ok=True)


def acquire(folder):
    """Takes the lock of an existing folder and starts its heartbeat; Locked, naming the holder, when someone alive has it.

    The same process may take its own lock again: a cell that is run twice starts over.
    """
    folder = Path(folder).resolve()
    mine = _held.get(str(folder))
    if mine:
        mine.release()
    holder = read(folder)
    if holder and not stale(holder):
        raise Locked(f"{folder} is being written by {describe(holder)}; wait for it, or stop that process and try again")
    if holder is not None:
        (folder / NAME).unlink(missing_ok=True)
    lock = Lock(folder)
    facts = {"host": socket.gethostname(), "pid": lock.pid, "born": _born(lock.pid), "time": time.time(), "token": lock.token}
    text = files.dumps(facts).encode()
    try:
        handle = os.open(lock.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise Locked(f"{folder} was taken by {describe(read(folder))} at this very moment; try again") from None
    try:
        with open(handle, "wb") as file:
            file.write(text)
    except BaseException:
        lock.path.unlink(missing_ok=True)
        raise
    _held[str(folder)] = lock
    lock._thread.start()
    return lock


def read(folder):
    """What the lock file of a folder says ({} when unreadable), with `age` in seconds since the last beat; None without one."""
    path = Path(folder) / NAME
    try:
        age = time.time() - path.stat().st_mtime
        return dict(files.read_json(path), age=max(age, 0.0))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # killed between making and filling it
        return {"age": max(age, 0.0)}


def stale(holder):
    """True when the holder's process is gone, or has not been heard of for two minutes."""
    if holder["age"] > SILENT:
        return True
    if "pid" not in holder:
        return holder["age"] > BEAT  # an empty lock: its writer has a moment to fill it
    if holder["host"] != socket.gethostname():
        return False
    if holder["pid"] == os.getpid():
        return not any(lock.token == holder["token"] for lock in _held.values())
    return not _running(holder["pid"]) or holder["born"] != _born(holder["pid"])


def describe(holder):
    """The holder in words: process 4711 on host xy, last seen 3 s ago."""
    holder = holder or {}
    return f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}, last seen {holder.get('age', 0):.0f} s ago"


def _running(pid):
    if os.name == "nt":  # no harmless signal there; silence decides
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's process
        return True
    with contextlib.suppress(OSError):  # a killed child that its parent has not yet collected is dead too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


def _born(pid):
    """When the process started, in the kernel's ticks, so that a reused process number is not taken for the old one; "" if unknown."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@contextlib.contextmanager
def alone(folder):
    """Only one process at a time is in this block for `folder`; where the file system cannot do it, the block just runs."""
    handle = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
