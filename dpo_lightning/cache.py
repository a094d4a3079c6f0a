"""Where what is computed once lies, and what is told when it cannot be written. Imports nothing heavy."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_lightning.types import UserError

LOCKLESS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # what a file system without locks answers
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # a write, by the disk


def cache_dir() -> Path:
    """Return the folder for everything that is computed once: $DPO_LIGHTNING_CACHE, else under ~/.cache."""
    if own := os.environ.get("DPO_LIGHTNING_CACHE"):
        return Path(own).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # some accounts have no home
    return Path(caches, "dpo_lightning")


@contextmanager
def writes_cache() -> Iterator[None]:
    """Make one line of what hinders a write into `cache_dir`. Raises UserError."""
    try:
        yield
    except OSError as error:
        first = refused(error) or error  # `datasets` raises another in its place
        raise UserError(
            f"the cache {cache_dir()} cannot be written ({first.strerror or ' '.join(str(first).split())}); "
            "free space or set DPO_LIGHTNING_CACHE to another folder"
        ) from error


def refused(error: BaseException | None) -> OSError | None:
    """Return what a disk refused, out of the causes of an error; None where it was something else, as in reading."""
    while error is not None and not (isinstance(error, OSError) and error.errno in REFUSED):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def locked(file: Path) -> Iterator[int]:
    """Hold the lock of a file in the body, which gets it as a descriptor; wait for other processes that do.

    The file is made where it is not there. Where the file system has no locks, the body runs without.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
        yield descriptor
    finally:
        os.close(descriptor)  # gives the lock back
