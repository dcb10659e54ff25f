"""The folder that is prepared into, which one process holds at a time.

It is cleared of what an earlier preparation has left in it, and of nothing else. While a
preparation is under way, `bagpipe-prepare.lock` in the folder is locked and lists the files that
were begun. The lock ends with the process, however that ends. So the next preparation knows what a
killed one left behind. A finished one has a manifest that lists its files, and no lock file any
more.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bagpipe.data.manifest import MANIFEST_NAME, PreparedManifest
from bagpipe.errors import DataError
from bagpipe.native.files import sync_folder

LOCK_NAME: Final = "bagpipe-prepare.lock"
_IS_OWN_NAME: Final = re.compile(
    rf"(train|validation|test|dictionary)-\d{{5,}}\.arrow|{re.escape(MANIFEST_NAME)}\.tmp"
)


class OutputFolder:
    """A context manager that holds the folder; when its body fails, what it made is removed.

    Args:
        folder: The folder; it is made if it doesn't exist.
        overwrite: Whether prepared data in it may be replaced.

    Raises:
        DataError: The folder is a file; another process prepares into it; it holds prepared data
            and `overwrite` is not set; or it holds files with names of prepared ones that no
            preparation has made.
        OSError: The folder can't be written.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.path, self._overwrite = folder, overwrite

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(
                f"output {self.path} is, or lies under, a file; it must be a folder"
            ) from error
        self._lock = _lock(self.path)
        listed = os.pread(self._lock, os.fstat(self._lock).st_size, 0)
        self._own = set(listed.decode("utf-8", "replace").split())
        try:
            self._clear()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._own.clear()
            else:
                with suppress(OSError):  # what stays is listed, so that the next one removes it
                    self._remove_own()
        finally:
            self._let_go()

    def claim(self, name: str) -> Path:
        """Makes an empty file and returns its path.

        Raises:
            OSError: There already is a file of that name.
        """
        path = self.path / name
        path.open("xb").close()
        self._list({name})
        return path

    def save(self, manifest: PreparedManifest) -> None:
        """Makes the files' names durable, then writes the manifest that completes them."""
        sync_folder(self.path)
        self.claim(MANIFEST_NAME + ".tmp")
        manifest.save(self.path)

    def _clear(self) -> None:
        own = self._own | self._prepared_before()
        found = {path.name for path in self.path.iterdir() if _IS_OWN_NAME.fullmatch(path.name)}
        if foreign := sorted(found - own):
            raise DataError(
                f"{self.path} holds {foreign[0]}"
                + (f" and {len(foreign) - 1:,} more such files" if len(foreign) > 1 else "")
                + ", which no preparation that is known here has made: choose another output, or "
                "move or remove them"
            )
        self._list(found - self._own)
        self._remove_own()

    def _prepared_before(self) -> set[str]:
        """The files of the prepared data that may be overwritten."""
        if not (self.path / MANIFEST_NAME).exists():
            return set()
        if not self._overwrite:
            raise DataError(
                f"{self.path} already holds prepared data: choose another output, or set "
                "overwrite = true"
            )
        try:
            manifest = PreparedManifest.load(self.path)
        except DataError as error:
            raise DataError(
                f"{error}. What it says is not known, so nothing is overwritten: choose another "
                f"output, or remove {self.path}"
            ) from error
        files = [*manifest.dictionaries.values(), *chain(*manifest.splits.values())]
        return {file.name for file in files}

    def _list(self, names: set[str]) -> None:
        self._own |= names
        lines = "".join(f"{name}\n" for name in sorted(names)).encode()
        os.pwrite(self._lock, lines, os.fstat(self._lock).st_size)
        os.fsync(self._lock)

    def _remove_own(self) -> None:
        """Removes what a preparation has made.

        The manifest goes first, so that nothing is ever taken for whole data that is not.
        """
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        sync_folder(self.path)
        for name in sorted(self._own):
            if _IS_OWN_NAME.fullmatch(name):
                (self.path / name).unlink(missing_ok=True)
        self._own.clear()
        os.ftruncate(self._lock, 0)

    def _let_go(self) -> None:
        """Gives up the lock.

        Its file goes only when its list is empty, and before the lock is given up.
        """
        with suppress(OSError):
            if not self._own:
                (self.path / LOCK_NAME).unlink(missing_ok=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked."""
    path = folder / LOCK_NAME
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(
                f"another process prepares into {folder}: wait for it, or choose another output"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder had it removed meanwhile
