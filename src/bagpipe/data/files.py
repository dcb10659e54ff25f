"""Files that are whole or not there: hashed while written, synced to disk, and named last."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import xxhash

from bagpipe.native.files import sync_folder

_CHUNK_BYTES: Final = 4 << 20


class HashingFile:
    """A binary file open for writing that knows its size and its xxh3_128.

    Once it is closed without an error, its content is on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, 0
        self._hash = xxhash.xxh3_128()
        self._file = open(path, "wb")

    @property
    def checksum(self) -> str:
        """The xxh3_128 of what was written, in hexadecimal."""
        return self._hash.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether it is closed; Arrow asks a file for it."""
        return self._file.closed

    def write(self, data: Any) -> int:
        """Appends a bytes-like object and returns its length in bytes."""
        self._hash.update(data)
        num_bytes = self._file.write(data)
        self.num_bytes += num_bytes
        return num_bytes

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self.num_bytes

    def flush(self) -> None:
        """Hands buffered bytes to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Syncs and closes the file; may be called again."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def checksum_file(path: Path) -> str:
    """The xxh3_128 of a file's bytes, in hexadecimal."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by `content`.

    A reader, or what is left after a crash, sees all of the new content or nothing of it.
    """
    temporary = path.with_name(path.name + ".tmp")
    with HashingFile(temporary) as file:
        file.write(content)
    os.replace(temporary, path)
    sync_folder(path.parent)
