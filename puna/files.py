"""Writing so that a killed process, a power cut or a full disk leaves the old or the new, never a part.

Work in progress lies beside its target as `.NAME.tmp-PID`. What a killed process left there is swept by
whoever next holds the directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from puna.errors import InputError, ResourceError
from puna.progress import quantity

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, and the limit on a single file
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp-\d+|replaced)")


def temporary_beside(target: Path) -> Path:
    """Where this process prepares what will become `target`: beside it, so that a rename moves it."""
    return target.with_name(f".{target.name}.tmp-{os.getpid()}")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file's content: readers see the whole old or the whole new, and what they saw lasts.

    Raises:
        OSError: nothing changed, and nothing is left beside the file.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries (names created, renamed, removed) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Wait until everything below a directory is on the disk, leaves first."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))


def replace_directory(new: Path, target: Path) -> None:
    """Put the directory `new` in the place of `target`, which may exist; both have the same parent.

    `new` must be on the disk already. On Linux the two names are exchanged in one step. Elsewhere the old
    directory steps aside first; who is killed between the two renames leaves `.NAME.replaced`, and `sweep`
    moves it back.
    """
    old = new  # after an exchange the old content lies under the new one's name
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = aside(target)
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside(target: Path) -> Path:
    """Where a directory stands while another takes its place, if names cannot be exchanged."""
    return target.with_name(f".{target.name}.replaced")


def sweep(directory: Path) -> None:
    """Remove what killed processes left in a directory; only for who holds it, or live work is swept too."""
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        if found["kind"] == "replaced" and not path.with_name(found["name"]).exists():
            path.rename(path.with_name(found["name"]))
            sync_directory(directory)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(doing: str, path: Path, otherwise: type[InputError], advice: str) -> Iterator[None]:
    """Turn an OSError into one line: ResourceError where space ran out, else `otherwise`.

    `doing` and `advice` complete the sentence: "no space left while {doing} ({free}); {advice}".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EFAULT:  # the system could not read what was to be written
            reason = "a mapped file that is read became shorter"
        if error.errno in FULL:
            raise ResourceError(f"{reason} while {doing} ({_free(path)} free); {advice}") from error
        raise otherwise(f"{reason} while {doing}") from error


def _free(path: Path) -> str:
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return f"{quantity(shutil.disk_usage(existing).free)}B"


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it, such as musl
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
