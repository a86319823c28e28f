"""How long a test waits before it says that something hangs: no busy machine is so slow, and no test may fail because one is."""

import time

HANGS = 900  # seconds


def wait(for_what):
    """Return as soon as `for_what()` is true."""
    end = time.time() + HANGS
    while not for_what():
        assert time.time() < end, "it hangs"
        time.sleep(0.05)


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
