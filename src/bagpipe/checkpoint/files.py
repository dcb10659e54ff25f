"""A checkpoint as files: a folder that either is complete or is not there.

    checkpoints/
      step-0000001000/
        dense.pt            model, dense optimizer and random state, as torch.save writes them; read
                            with weights_only=True
        group-0.arrow       every touched record of one group: Arrow IPC, rows int64 and records
                            fixed_size_list<float32>; with several hosts the first host's, those
                            of the others are in group-0.host-1.arrow and so on
        manifest.json       step, position, configuration, sizes and xxh3_128 checksums of the
                            files; written last
      step-0000001500.tmp-4711/     being written, or left behind by a process that was killed

A checkpoint is written under its temporary name, each file flushed to the disk, the manifest last,
then the folder is renamed and its parent flushed. A kill at any moment leaves the older checkpoints
as they were and at most one temporary folder, which the next run removes. Removal renames first for
the same reason. Records pass through in blocks, so memory is bounded by one block whatever the size
of the tables.

Nothing here knows what is in a checkpoint; `bagpipe.checkpoint.checkpoints` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from bagpipe.errors import CheckpointError, StoreError
from bagpipe.native.files import is_file_name, make_folder, sync_folder
from bagpipe.store.record_files import HashingFile, new_file, write_records
from bagpipe.types import Float32Array, Int64Array

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{10})")
_TEMPORARY = re.compile(r"step-\d{10}\.tmp-\d+(-old)?")
_READ_BYTES = 1 << 22


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:010d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, whether valid or not.

    There are none when there is no such folder.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name. CheckpointError: it is no checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(
            f"{checkpoint}: is not a checkpoint: its name must be like {checkpoint_name(1000)}"
        )
    return int(match[1])


def remove_temporary(folder: Path, say: Callable[[str], None]) -> None:
    """Removes what killed processes left behind. Only the run that owns the folder may call it.

    `say` is told what can't be removed; it is in nobody's way.
    """
    with _removal(folder, say):
        for path in folder.iterdir() if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                with _removal(path, say):
                    shutil.rmtree(path)


def prune(folder: Path, *, newest: int, keep: int, say: Callable[[str], None]) -> None:
    """Removes all but the last `keep` checkpoints up to step `newest`.

    Later ones belong to a run that was given up, and stay. `say` is told what can't be removed; the
    newer checkpoints are as good beside it.
    """
    with _removal(folder, say):
        mine = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
        for path in mine[:-keep]:
            with _removal(path, say):
                shutil.rmtree(_moved_aside(path))


@contextmanager
def _removal(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        say(
            f"{path}: is no longer needed, but can't be removed: {error.strerror or error}; the "
            "run goes on"
        )


class CheckpointFiles:
    """Writes files of a checkpoint into its temporary folder.

    Raises:
        CheckpointError: the disk is full, the folder can't be written, or another failure of the
            operating system.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        """`folder` is the temporary one, `path` the checkpoint to be."""
        self.folder, self.path = folder, path
        self.files: list[dict[str, Any]] = []
        """Name, size and checksum of each, as the manifest has them."""

    @classmethod
    def join(cls, folder: Path, path: Path) -> CheckpointFiles:
        """The files that another host adds to the folder of rank 0.

        Raises:
            CheckpointError: this host can't see the folder.
        """
        if not folder.is_dir():
            raise CheckpointError(
                f"{path}: rank 0 has made its folder, but this host can't see it: give a "
                "log.folder on a file system that all "
                "hosts share"
            )
        return cls(folder, path)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Adds a file."""
        with self._open(name) as file:
            file.write(content)

    def write_records(
        self, name: str, blocks: Iterable[tuple[Int64Array, Float32Array]], record_width: int
    ) -> int:
        """Adds a file of records and returns how many it holds.

        They come in blocks: rows (n,) int64, records (n, record_width) float32.
        """
        with self._open(name) as file:
            return write_records(file, blocks, record_width)

    @contextmanager
    def _open(self, name: str) -> Iterator[HashingFile]:
        with self._failures_named(), new_file(self.folder / name) as file:
            yield file
        self.files.append(
            {"name": name, "size_bytes": file.size, "xxh3_128": file.hash.hexdigest()}
        )

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: can't be written: {error.strerror or error}; earlier checkpoints "
                "are as they were. "
                "Make room or give another log.folder"
            ) from error


class CheckpointWriter(CheckpointFiles):
    """Writes one checkpoint.

    As a context manager it puts the checkpoint in place at the end, or removes it when the body
    fails.

    Raises:
        CheckpointError: as `CheckpointFiles`. What was written is removed and older checkpoints are
            as they were.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """`folder` is that of all checkpoints."""
        super().__init__(
            folder / f"{checkpoint_name(step)}.tmp-{os.getpid()}", folder / checkpoint_name(step)
        )
        self._content: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with self._failures_named():
            make_folder(self.path.parent)
            self.folder.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._failures_named():
                    self._put_in_place()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        """Says what the manifest holds beside the list of files.

        It is written when the writer leaves its context.
        """
        self._content = dict(content)

    def _put_in_place(self) -> None:
        body = {"format": FORMAT, **self._content, "files": self.files}
        text = json.dumps({**body, "xxh3_128": _checksum(body)}, indent=1)
        with self._open(MANIFEST) as file:
            file.write(text.encode())
        sync_folder(self.folder)
        replaced = _moved_aside(self.path) if self.path.exists() else None
        self.folder.rename(self.path)
        sync_folder(self.path.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)  # the next run tries again, and says so


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, compared with its own checksum.

    Raises:
        CheckpointError: it is missing, altered or too new.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read: {error.strerror}; this is not a complete checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("xxh3_128", None) != _checksum(manifest):
        raise CheckpointError(
            f"{path}: is damaged: its content does not have the checksum that it was written with"
        )
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest['format']}, this version reads format {FORMAT}"
        )
    for entry in manifest["files"]:
        if not is_file_name(entry["name"]):
            raise CheckpointError(
                f"{path}: names {entry['name']!r}, must be a file in its own folder: it is damaged "
                "or not of Bagpipe"
            )
    return manifest


def verify_files(checkpoint: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Compares files with what a manifest says of them.

    Raises:
        CheckpointError: one is missing, truncated or altered; names the first.
    """
    for entry in files:
        path = checkpoint / entry["name"]
        try:
            size_bytes = path.stat().st_size
            if size_bytes != entry["size_bytes"]:
                raise CheckpointError(
                    f"{path}: is damaged: has {size_bytes:,} bytes, was written with "
                    f"{entry['size_bytes']:,}"
                )
            if _hash_file(path) != entry["xxh3_128"]:
                raise CheckpointError(
                    f"{path}: is damaged: its content does not have the checksum that it was "
                    "written with"
                )
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _moved_aside(checkpoint: Path) -> Path:
    """Under the name of something temporary, so that nobody finds a half removed checkpoint."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.tmp-{os.getpid()}-old")
    checkpoint.rename(doomed)
    return doomed
