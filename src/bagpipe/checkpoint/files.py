"""A checkpoint as files: a folder that either is complete or is not there.

    checkpoints/
      step-0000001000/
        dense.pt            model, dense optimizer and random state, as torch.save writes them; read
                            with weights_only=True
        group-0.arrow       every touched record of one group; of shard servers each adds files of
                            its own
        manifest.json       step, position, configuration, each group's record files in order,
                            sizes and xxh3_128 checksums of all files; written last
    epochs/8/cuts/
      step-0000001500/      being written, or left behind by a process that was killed

A checkpoint is written into the folder of its epoch (`bagpipe.checkpoint.epochs`), each file
flushed to the disk, the manifest last, then the folder is renamed to its place and that is flushed.
A kill at any moment leaves the older checkpoints as they were and at most one folder of an ended
epoch, which the next run removes. Removal renames first for the same reason.

Shard servers write only the records of rows written since the checkpoint before. The files of that
one which are still needed are linked into the new folder, so that each folder is complete by itself
and can be removed alone, and takes the room of its own new files only.

Nothing here knows what is in a checkpoint; `bagpipe.checkpoint.checkpoints` does.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.errors import CheckpointError, StoreError
from bagpipe.native.files import make_folder, remedy, sync_folder
from bagpipe.store.manifest import FORMAT, MANIFEST, checksum_of
from bagpipe.store.record_files import HashingFile, RecordFile, new_file, write_records
from bagpipe.types import Float32Array, Int64Array

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
BEST = "best"
"""The name of the link to the checkpoint of the best model."""
FROM = "from.json"
"""The name of the file that says from which run a run has started."""
_NAME = re.compile(r"step-(\d{10})")


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


def prune(
    run: RunFolder, *, newest: int, keep: int, say: Callable[[str], None], spared: int | None = None
) -> None:
    """Removes all but the last `keep` checkpoints up to step `newest`, and that of step `spared`.

    Later ones belong to a run that was given up, and stay. `say` is told what can't be removed; the
    newer checkpoints are as good beside it.
    """
    with _removal(run.checkpoints, say):
        mine = [path for path in list_checkpoints(run.checkpoints) if step_of(path) <= newest]
        for path in mine[:-keep]:
            if step_of(path) == spared:
                continue
            with _removal(path, say):
                shutil.rmtree(run.take_away(path))


def mark_best(run: RunFolder, step: int, say: Callable[[str], None]) -> None:
    """Lets `best` in the run's folder lead to the best checkpoint, that of `step`.

    `say` is told of a failure.
    """
    link = run.cuts / BEST
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(run.checkpoints.relative_to(run.path) / checkpoint_name(step))
        link.rename(run.path / BEST)
    except OSError as error:
        say(
            f"{run.path / BEST}: can't be made to lead to step {step:,}, the best so far: "
            f"{error.strerror or error}; the run goes on"
        )


@contextmanager
def _removal(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        say(
            f"{path}: is no longer needed, but can't be removed: {error.strerror or error}; the "
            "run goes on"
        )


class CheckpointWriter:
    """Writes one checkpoint into a temporary folder.

    As a context manager it puts the checkpoint in place at the end, or removes it when the body
    fails.

    Raises:
        CheckpointError: the disk is full, the folder can't be written, or another failure of the
            operating system. What was written is removed and older checkpoints are as they were.
    """

    def __init__(self, run: RunFolder, step: int, name: str | None = None) -> None:
        """`name` is that of the temporary folder, by default the checkpoint's."""
        final = checkpoint_name(step)
        self.folder, self.path = run.cuts / (name or final), run.checkpoints / final
        self.files: list[dict[str, Any]] = []
        """Name, size and checksum of each, as the manifest has them."""
        self._run = run
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

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Adds a file."""
        with self._open(name) as file:
            file.write(content)

    def write_records(
        self,
        name: str,
        blocks: Iterable[tuple[Int64Array, Float32Array]],
        record_width: int,
        *,
        shard: int = 0,
        num_shards: int = 1,
    ) -> RecordFile:
        """Adds a file of all touched records of a shard.

        They come in blocks: rows (n,) int64, records (n, record_width) float32.
        """
        with self._open(name) as file:
            num_records = write_records(file, blocks, record_width)
        return RecordFile(
            **self.files[-1],
            shard=shard,
            num_shards=num_shards,
            num_records=num_records,
            is_whole=True,
        )

    def add(self, file: RecordFile) -> None:
        """Adds a file that another process has written into the folder."""
        path = self.folder / file.name
        server = f"the server of shard {file.shard} of {file.num_shards}"
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: {server} has written it, but it can't be seen here ({error.strerror}): "
                "give the run a folder on a file system that trainers and servers share"
            ) from error
        if size_bytes != file.size_bytes:
            raise CheckpointError(
                f"{path}: has {size_bytes:,} bytes here, {server} has written "
                f"{file.size_bytes:,}: see to the file system of {self.path.parent.parent}"
            )
        self.files.append(
            {"name": file.name, "size_bytes": file.size_bytes, "xxh3_128": file.xxh3_128}
        )

    def link(self, checkpoint: Path, file: RecordFile) -> None:
        """Adds a file of an earlier checkpoint; where the disk knows no links, a copy of it."""
        old, new = checkpoint / file.name, self.folder / file.name
        with self._failures_named():
            try:
                os.link(old, new)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    self._check_linked(old, error)
                    raise
                shutil.copyfile(old, new)
                with new.open("rb") as copy:
                    os.fsync(copy.fileno())
        self.add(file)

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        """Says what the manifest holds beside the list of files.

        It is written when the writer leaves its context.
        """
        self._content = dict(content)

    def _put_in_place(self) -> None:
        body = {"format": FORMAT, **self._content, "files": self.files}
        text = json.dumps({**body, "xxh3_128": checksum_of(body)}, indent=1)
        with self._open(MANIFEST) as file:
            file.write(text.encode())
        sync_folder(self.folder)
        replaced = self._run.take_away(self.path) if self.path.exists() else None
        self.folder.rename(self.path)
        sync_folder(self.path.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)  # the next run tries again, and says so

    def _check_linked(self, old: Path, error: OSError) -> None:
        """Raises CheckpointError where a file to be linked is gone."""
        if self.folder.is_dir() and not old.exists():
            raise CheckpointError(
                f"{self.path}: can't be written, since {old}, which it shares with the checkpoint "
                "before, is gone; the next checkpoint has all rows. Remove no files of the newest "
                "checkpoint while a run goes on"
            ) from error

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
            if isinstance(error, FileNotFoundError) and not self.folder.parent.is_dir():
                raise CheckpointError(
                    f"{self.path}: can't be written, since a newer start of the run has taken it "
                    "over: end this one"
                ) from error
            raise CheckpointError(
                f"{self.path}: can't be written: {error.strerror or error}; earlier checkpoints "
                f"are as they were. {remedy(error)}, or give the run another folder"
            ) from error
