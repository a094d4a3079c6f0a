"""How a checkpoint is published: written aside, every file fsynced, the manifest last, then one rename.

After a crash at any instant, of the process or of the machine, a folder named step-NUMBER is there whole or not at
all. tests/checkpoints/test_writer.py tries them. `checkpoints/resume.py` reads what is written here.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_lightning.checkpoints.folder import MANIFEST, PLAIN_NAME, set_aside, verify

At = Callable[[str], None]  # is called with the name of each point that a fault can be injected at


class Disk:
    """What is done to the disk, one call each, so that a test can record it and crash between any two."""

    def mkdir(self, folder: Path) -> None:
        """Make a folder; its parent is there."""
        folder.mkdir(exist_ok=True)

    def open(self, file: Path) -> BinaryIO:
        """Create a file to write to."""
        return file.open("xb")

    def write(self, stream: BinaryIO, data: Any) -> None:
        """Append anything that holds bytes."""
        stream.write(data)

    def fsync(self, stream: BinaryIO) -> None:
        """Return when what was written is on the disk."""
        stream.flush()
        os.fsync(stream.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Rename within a folder, at once for whoever looks."""
        os.rename(old, new)

    def unlink(self, file: Path) -> None:
        """Remove a file, or a symlink and not where it leads."""
        file.unlink()

    def rmdir(self, folder: Path) -> None:
        """Remove an empty folder."""
        folder.rmdir()

    def fsync_dir(self, folder: Path) -> None:
        """Return when the names in a folder are on the disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network file system that does not know of it
                raise
        finally:
            os.close(descriptor)


REAL = Disk()


def nowhere(point: str) -> None:
    """Inject no fault."""


def publish(
    folder: Path,
    write: Mapping[str, Callable[[BinaryIO], object]],
    facts: Mapping[str, Any],
    disk: Disk = REAL,
    at: At = nowhere,
) -> None:
    """Write a checkpoint's files and publish them as `folder`; one that is there whole is left as it is.

    Args:
        folder: RUN_DIR/checkpoints/step-NUMBER; the folders above it are made.
        write: for each file's name what writes it to a stream, in order and without going back.
        facts: what else the manifest says; "step" must be the folder's, "run" the run's id.
        disk: what is done is done through it.
        at: called at save.begin, save.after_file (each), save.before_manifest, save.before_rename, save.after_rename.

    Raises OSError where the disk fails, and whatever a writer raises; what was written so far is removed, and no
    other checkpoint is touched. One that is there and broken is set aside, and so is a symlink.

    """
    if os.path.lexists(folder):
        if not folder.is_symlink() and verify(folder) is None:
            return
        set_aside(folder)
    at("save.begin")
    scratch = aside(folder)
    make_folder(folder.parent, disk)
    try:
        remove(scratch, disk)  # of a process that died with the same id
        disk.mkdir(scratch)
        _fill(scratch, write, facts, disk, at)
        at("save.before_rename")
        disk.rename(scratch, folder)
        at("save.after_rename")
        disk.fsync_dir(folder.parent)
    except BaseException:
        with suppress(OSError):
            remove(scratch, disk)
        raise


def _fill(
    scratch: Path, write: Mapping[str, Callable[[BinaryIO], object]], facts: Mapping[str, Any], disk: Disk, at: At
) -> None:
    files = {}
    for name, write_to in write.items():
        assert PLAIN_NAME.fullmatch(name) and name != MANIFEST, name
        files[name] = _write(scratch / name, write_to, disk)
        at("save.after_file")
    at("save.before_manifest")
    manifest = json.dumps({**facts, "files": files}, indent=2).encode()
    _write(scratch / MANIFEST, lambda stream: stream.write(manifest), disk)
    disk.fsync_dir(scratch)


def _write(file: Path, write_to: Callable[[BinaryIO], object], disk: Disk) -> dict[str, Any]:
    """Write a file down to the disk; return what the manifest says of it."""
    with disk.open(file) as stream, _Hashed(stream, disk) as hashed:
        try:
            write_to(cast(BinaryIO, hashed))
        except Exception:
            if hashed.error is not None:  # torch.save makes another kind of error of a full disk
                raise hashed.error from None
            raise
        disk.fsync(stream)
    return {"bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest()}


class _Hashed(io.RawIOBase):
    """A stream that hashes what passes through it, so that no file is read again. It cannot go back."""

    def __init__(self, stream: BinaryIO, disk: Disk):
        self.stream, self.disk = stream, disk
        self.sha256, self.bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            self.disk.write(self.stream, data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.bytes += size
        return size

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.stream.flush()


def make_folder(folder: Path, disk: Disk = REAL) -> None:
    """Make a folder and those above it, so that a crash of the machine does not lose their names."""
    if not folder.is_dir():
        make_folder(folder.parent, disk)
        disk.mkdir(folder)
        disk.fsync_dir(folder.parent)


def aside(folder: Path, end: str = "") -> Path:
    """Return the name, beside a checkpoint, that this process writes or deletes it under: never one of a checkpoint."""
    return folder.with_name(f".{folder.name}-{os.getpid()}{end}")


def remove(folder: Path, disk: Disk = REAL) -> None:
    """Delete a folder with all that is in it, following no symlink; do nothing where there is none.

    Raises OSError where something cannot be deleted.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            remove(path, disk)
        else:
            disk.unlink(path)
    disk.rmdir(folder)


def sweep(checkpoints: Path, disk: Disk = REAL) -> None:
    """Delete what processes that died left half written or half deleted. Call it before the first save.

    What cannot be deleted stays; no checkpoint is looked for under such a name.
    """
    for path in sorted(checkpoints.glob(".step-*")):
        found = re.fullmatch(r"\.step-[0-9]+-([0-9]+)(-deleted)?", path.name)
        if found and not _lives(int(found[1])):
            with suppress(OSError):
                remove(path, disk)


def _lives(process: int) -> bool:
    """Return whether another process of this machine has the id; where ours has it, its bearer before us is dead."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
