"""What a checkpoint holds: one consistent cut of a run after a step.

The cut is taken between two steps: the cache is flushed, so that the stores hold every record as of
that step, and then nothing moves while dense state, records and the reader's position are written.
Dense state and embeddings therefore always belong to the same step, and a run that resumes from it
continues as if nothing had happened, bit for bit.

Rows that were never written are not stored: their initial record follows from the seed. The cost is
that of all rows touched since the run began.

With several trainers rank 0 writes the checkpoint. Any number of them can resume from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bagpipe.checkpoint.dense import Optimizers, dense_state, load_dense_state
from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.checkpoint.files import CheckpointWriter, list_checkpoints, prune
from bagpipe.config.compare import Difference, compare_configs
from bagpipe.data.base import Position
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import CheckpointError
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.store.base import EmbeddingStore
from bagpipe.store.manifest import (
    check_tables,
    describe,
    not_ours,
    read_manifest,
    record_files,
    verify_files,
)
from bagpipe.store.record_files import RecordFile, check_num_records, read_records
from bagpipe.types import Float32Array, Group, Int64Array

DENSE = "dense.pt"
_OTHERS = "train"
_ALONE = Trainers()


class Embeddings(Protocol):
    """What a checkpoint needs of an embedding collection."""

    step: int
    num_skipped: list[int]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its groups."""

    @property
    def stores(self) -> tuple[EmbeddingStore, ...]:
        """The store of each group."""

    def flush(self) -> None:
        """Writes every record that is newer in the cache to its store."""


class Stateful(Protocol):
    """What has a state and takes it back: a learning-rate schedule, a GradScaler, a loader."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Goes on from a state."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The parts of a run that training changes."""

    model: nn.Module
    optimizer: Optimizers
    embeddings: Embeddings
    own: Mapping[str, Any] | None = None
    """What an own loop adds."""
    others: Mapping[str, Stateful] = field(default_factory=dict)
    """What else `bagpipe train` changes, by name, such as learning rates."""

    def dense(self) -> memoryview:
        """All but the records, as a file."""
        own = self.own
        if self.others:
            # as text, since equal states pickled are not equal bytes
            states = {name: other.state_dict() for name, other in self.others.items()}
            own = {_OTHERS: json.dumps(states)}
        return dense_state(self.model, self.optimizer, own)

    def load_others(self, added: Mapping[str, Any]) -> None:
        """Puts back the states of `others` from what was added to the dense part."""
        saved = json.loads(added.get(_OTHERS, "{}"))
        for name, other in self.others.items():
            if name in saved:  # else it is new to the run, and starts here
                other.load_state_dict(saved[name])


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What a verified checkpoint says about itself."""

    path: Path
    step: int
    num_skipped: Sequence[int]
    """By group the steps without an update."""
    position: Position
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    record_files: Sequence[Sequence[RecordFile]]
    """By group, in order: if several files have a row, the last one counts."""
    files: Sequence[Mapping[str, Any]]
    """Name, size and checksum of each."""
    cut: str
    """Which cut of shard servers it is; empty where trainers wrote it."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a checkpoint holds beside records, as it was between two steps."""

    step: int
    dense: memoryview
    content: Mapping[str, Any]
    """What the manifest says."""


def take_moment(state: State, position: Position, config: Mapping[str, Any]) -> Moment:
    """Copies all of `state` but its records, so that training can go on."""
    content = _content(state, position, config)
    return Moment(
        step=state.embeddings.step,
        dense=state.dense(),
        content=content,
    )


def save_checkpoint(
    run: RunFolder,
    *,
    state: State,
    position: Position,
    config: Mapping[str, Any],
    keep: int,
    spared: int | None = None,
    trainers: Trainers = _ALONE,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the checkpoint of the step that `state` is at, and removes all but the last `keep`.

    All `trainers` must call it.

    Args:
        run: the run's folder.
        state: model, dense optimizer and embeddings, between two steps.
        position: the next batch to train.
        config: the run's configuration, as JSON values.
        keep: how many checkpoints to leave.
        spared: the step of one that is left, too.
        trainers: those of the run; rank 0 writes.
        say: told about an earlier one that can't be removed. The new one is whole.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or the folder can't be written, by any of them; earlier
            checkpoints and the run itself are as before.
        StoreError: a store can't be read.
    """
    state.embeddings.flush()
    writer = CheckpointWriter(run, state.embeddings.step)

    def write() -> None:
        if not trainers.is_first:
            return
        with writer:
            writer.write_bytes(DENSE, state.dense())
            described = [
                describe(
                    store.group,
                    [
                        writer.write_records(
                            f"group-{store.group.index}.arrow",
                            _blocks_ahead(store),
                            store.group.record_width,
                        )
                    ],
                )
                for store in state.embeddings.stores
            ]
            writer.write_manifest(_content(state, position, config) | {"groups": described})
        prune(run, newest=state.embeddings.step, keep=keep, say=say, spared=spared)

    trainers.all_do("a checkpoint", write)
    return writer.path


def _blocks_ahead(store: EmbeddingStore) -> Iterator[tuple[Int64Array, Float32Array]]:
    """A store's touched records; the next block is gathered while one is hashed and written."""
    with closing(BackgroundIterator(store.snapshot(), ahead=1, name="snapshot")) as blocks:
        yield from blocks


def find_checkpoint(
    folder: Path, *, on_damaged: Callable[[CheckpointError], None]
) -> SavedRun | None:
    """The newest valid checkpoint in `folder`, or None when there is no checkpoint at all.

    The checksum of every file is compared.

    Args:
        folder: where the run's checkpoints are.
        on_damaged: told about each newer checkpoint that is damaged.

    Raises:
        CheckpointError: there are checkpoints, but all of them are damaged.
    """
    damages: list[CheckpointError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            damages.append(error)
            on_damaged(error)
    if damages:
        raise CheckpointError(
            f"{folder}: none of its {len(damages)} checkpoints is valid; the newest: {damages[0]}"
        )
    return None


def open_checkpoint(path: Path) -> SavedRun:
    """Reads a checkpoint's manifest and compares every file's checksum.

    Raises:
        CheckpointError: a file is damaged; names it.
    """
    saved = read_checkpoint(path)
    verify_files(path, saved.files)
    return saved


def read_checkpoint(path: Path) -> SavedRun:
    """As `open_checkpoint`, for a checkpoint whose files have been compared.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    try:
        return _saved_run(path, read_manifest(path))
    except (KeyError, TypeError, ValueError) as error:  # with the right checksum of itself
        raise not_ours(path, error) from error


def _saved_run(path: Path, manifest: Mapping[str, Any]) -> SavedRun:
    groups = manifest["groups"]
    files = [entry | {"size_bytes": int(entry["size_bytes"])} for entry in manifest["files"]]
    by_group = record_files(manifest)
    found = sorted(entry["name"] for entry in files)
    named = sorted([DENSE, *(file.name for of_group in by_group for file in of_group)])
    if found != named:
        raise ValueError(f"it lists the files {found}, which are not its groups' and {DENSE}")
    return SavedRun(
        path=path,
        step=manifest["step"],
        # older versions did not count them
        num_skipped=manifest.get("num_skipped", [0] * len(groups)),
        position=Position(**manifest["position"]),
        config=manifest["config"],
        environment=manifest["environment"],
        groups=groups,
        record_files=by_group,
        files=files,
        cut=manifest.get("cut", ""),
    )


def check_resumable(saved: SavedRun, config: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The differences between a checkpoint's configuration and `config`, none of which matters.

    Raises:
        CheckpointError: some would change the numbers; lists every difference and which matter.
    """
    differences = compare_configs(saved.config, config)
    mattering = [difference for difference in differences if difference.matters]
    free = tuple(difference for difference in differences if not difference.matters)
    if mattering:
        lines = [
            f"{saved.path}: belongs to a run with another configuration, its numbers would be "
            "those of neither run"
        ]
        lines += [f"  {difference}" for difference in mattering]
        lines += [f"  {difference} (this one would not matter)" for difference in free]
        raise CheckpointError(
            "\n".join([*lines, "Set these as they were, or start a new run in another log.folder"])
        )
    return free


def load_checkpoint(saved: SavedRun, state: State, trainers: Trainers = _ALONE) -> None:
    """Puts a verified checkpoint's content into a freshly built state.

    With several `trainers` rank 0 loads the records, and the others must wait for it.

    Raises:
        CheckpointError: the state was built for other tables or another model.
        StoreError: a store can't be written.
    """
    load_moment(saved, state)
    load_records(saved, state.embeddings, trainers)


def load_records(saved: SavedRun, embeddings: Embeddings, trainers: Trainers = _ALONE) -> None:
    """Puts a verified checkpoint's records, and no others, into stores; of `trainers` the first.

    Raises:
        CheckpointError: a file is not what the manifest says.
        StoreError: a store can't be written.
    """
    if trainers.is_first:
        for store, files in zip(embeddings.stores, saved.record_files, strict=True):
            _load_records(saved.path, store, files)


def load_moment(saved: SavedRun, state: State) -> None:
    """As `load_checkpoint`, without records.

    Raises:
        CheckpointError: the state was built for other tables or another model.
    """
    check_tables(saved.path, saved.groups, state.embeddings.groups)
    state.load_others(load_dense_state(saved.path / DENSE, state.model, state.optimizer))
    state.embeddings.step = saved.step
    state.embeddings.num_skipped[:] = saved.num_skipped


def _content(state: State, position: Position, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest holds beside groups and files."""
    return {
        "step": state.embeddings.step,
        "num_skipped": list(state.embeddings.num_skipped),
        "position": asdict(position),
        "config": config,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """What, beside the configuration, decides the last bits of a result."""
    return {"torch": str(torch.__version__), "num_threads": torch.get_num_threads()}


def _load_records(checkpoint: Path, store: EmbeddingStore, files: Sequence[RecordFile]) -> None:
    store.clear()
    for file in files:
        num_read = 0
        for rows, records in read_records(checkpoint / file.name, store.group.record_width):
            num_read += len(rows)
            store.write(rows, records)
        check_num_records(checkpoint, file, num_read)
