"""Files that replace others whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bagpipe.errors import BagpipeError, ConfigError


@contextmanager
def replaced(
    path: Path, failure_is: type[BagpipeError] = ConfigError, *, needs_bytes: int | None = None
) -> Iterator[Path]:
    """Yields a path to write to, and puts that file at `path` when the body ends without an error.

    Until then, and after any error, `path` is as it was. The file yielded lies beside `path`, with
    the same ending. A link is followed: the file that it leads to is replaced. A device or a pipe
    can't be replaced, so it is written itself.

    Args:
        path: what to replace.
        failure_is: the kind of error to raise.
        needs_bytes: how much there is to write, where that is known; the error says it.

    Raises:
        failure_is: the operating system refuses: the disk is full, or the folder is missing or
            can't be written.
    """
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            if path.is_dir():
                raise IsADirectoryError(0, "Is a directory")
            yield path
            return
        temporary = path.with_name(f".{path.stem[:40]}.tmp-{os.getpid()}{path.suffix}")
        try:
            yield temporary
            _put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except BagpipeError:
        raise  # among them StoreError, which is an OSError
    except OSError as error:
        raise failure_is(_refusal(path, error, needs_bytes)) from error


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, durably; one that is there will do."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file_name(name: object) -> bool:
    """Whether `name` is that of a file in a manifest's own folder.

    A manifest gives it, and anybody may have written that: a path is refused, and so are the
    folder's names for itself and its parent.
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Makes the file durable, then renames it: a crash leaves the old file or the new one."""
    if path.exists():
        shutil.copymode(path, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def remedy(error: OSError) -> str:
    """What to do about an operating system's error of a file that is written, as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Let the user of this process write there"
    if error.errno == errno.ENOENT:
        return "See that its folder is there, and seen from this host"
    return "See to its file system"


def _refusal(path: Path, error: OSError, needs_bytes: int | None) -> str:
    """The message of an operating system's error."""
    text = f"{path}: can't be written: {error.strerror or error}"
    if needs_bytes is not None and path.parent.is_dir():
        text += (
            f" ({needs_bytes:,} bytes are needed, {shutil.disk_usage(path.parent).free:,} are free)"
        )
    kept = "; the file that was there is as it was" if path.is_file() else ""
    return f"{text}{kept}. {remedy(error)}, or give another path"
