"""Files that are whole or absent: written beside their place first, then named in one step.

A full disk or a killed process leaves the old file as it was.
"""

import contextlib
import os
import re
from pathlib import Path

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")  # what a killed writer leaves behind


@contextlib.contextmanager
def replacing(path, lasting=True):
    """Yields the path of a temporary file; when the block ends well it takes the place of `path`, else it is removed.

    The new content is on disk before the name points to it; `lasting` waits for the name to be on disk too, which thousands of
    tiles need not. A link is followed, so the file behind it is replaced.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    temporary = target.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        if lasting:
            _sync(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, f"{error.strerror}; nothing was written there", str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic(path, mode="wb", lasting=True):
    """An open file whose content appears under `path` at the end of the block, or not at all; text is UTF-8."""
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic writes whole files, mode 'w' or 'wb', got {mode!r}")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    with replacing(path, lasting) as temporary, open(temporary, mode, **text) as file:
        yield file


def _sync(path):
    """Asks the disk to hold the file or folder; file systems that cannot do it for folders are let off."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if not Path(path).is_dir():
            raise
        return
    try:
        os.fsync(handle)
    except OSError:
        if not Path(path).is_dir():
            raise
    finally:
        os.close(handle)


def sweep(folder):
    """Removes what killed writers left below `folder`; only for a folder no one else writes into."""
    for path in Path(folder).rglob(".*.tmp"):
        if TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def write_bytes(path, content):
    with atomic(path) as file:
        file.write(content)
    return Path(path)


def write_text(path, text):
    return write_bytes(path, text.encode("utf-8"))
