"""What a checkpoint holds: one consistent cut of a run after a step.

The cut is taken between two steps: the cache is flushed, so that the stores hold every record as of that step, and then
nothing moves while dense state, records and the reader's position are written. Dense state and embeddings therefore always
belong to the same step, and a run that resumes from it continues as if nothing had happened, bit for bit.

Rows that were never written are not stored: their initial record follows from the seed. The cost is that of all rows
touched since the run began.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bagpipe.config.compare import Difference, compare_configs
from bagpipe.errors import CheckpointError
from bagpipe.store.base import EmbeddingStore
from bagpipe.train.checkpoint_files import (
    CheckpointWriter,
    list_checkpoints,
    prune,
    read_manifest,
    read_records,
    verify_files,
)
from bagpipe.train.schedule import Position
from bagpipe.types import Group

_DENSE = "dense.pt"


class Embeddings(Protocol):
    """What a checkpoint needs of an embedding collection."""

    step: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its groups."""

    @property
    def stores(self) -> tuple[EmbeddingStore, ...]:
        """The store of each group."""

    def flush(self) -> None:
        """Writes every record that is newer in the cache to its store."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The parts of a run that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    embeddings: Embeddings


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What a verified checkpoint says about itself."""

    path: Path
    step: int
    position: Position
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]


def save_checkpoint(folder: Path, *, state: State, position: Position, config: Mapping[str, Any], keep: int) -> Path:
    """Writes the checkpoint of the step that `state` is at, and removes all but the last `keep`.

    Args:
        folder: where the run's checkpoints are.
        state: model, dense optimizer and embeddings, between two steps.
        position: the next batch to train.
        config: the run's configuration, as JSON values.
        keep: how many checkpoints to leave.

    Raises:
        CheckpointError: the disk is full or the folder can't be written; earlier checkpoints and the run itself are as before.
        StoreError: a store can't be read.
    """
    state.embeddings.flush()
    step = state.embeddings.step
    with CheckpointWriter(folder, step) as writer:
        writer.write_bytes(_DENSE, _dense_state(state))
        groups = [
            _describe(group) | {"num_records": writer.write_records(_records_name(group), store.snapshot(), group.record_width)}
            for group, store in zip(state.embeddings.groups, state.embeddings.stores, strict=True)
        ]
        writer.write_manifest(
            {
                "step": step,
                "position": asdict(position),
                "config": config,
                "environment": environment(),
                "groups": groups,
            }
        )
    prune(folder, newest=step, keep=keep)
    return writer.path


def find_checkpoint(folder: Path, *, on_damaged: Callable[[CheckpointError], None]) -> SavedRun | None:
    """The newest valid checkpoint in `folder`, every checksum compared; None when there is no checkpoint at all.

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
        raise CheckpointError(f"{folder}: none of its {len(damages)} checkpoints is valid; the newest: {damages[0]}")
    return None


def open_checkpoint(path: Path) -> SavedRun:
    """Reads a checkpoint's manifest and compares every file's checksum. CheckpointError: names the file that is damaged."""
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return SavedRun(
        path=path,
        step=manifest["step"],
        position=Position(**manifest["position"]),
        config=manifest["config"],
        environment=manifest["environment"],
        groups=manifest["groups"],
    )


def check_resumable(saved: SavedRun, config: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The differences between a checkpoint's configuration and `config` that leave the numbers alone.

    CheckpointError: others exist; lists every difference and which of them matter.
    """
    differences = compare_configs(saved.config, config)
    mattering = [difference for difference in differences if difference.matters]
    free = tuple(difference for difference in differences if not difference.matters)
    if mattering:
        lines = [f"{saved.path}: belongs to a run with another configuration, its numbers would be those of neither run"]
        lines += [f"  {difference}" for difference in mattering]
        lines += [f"  {difference} (this one would not matter)" for difference in free]
        raise CheckpointError("\n".join([*lines, "Set these as they were, or start a new run in another log.folder"]))
    return free


def load_checkpoint(saved: SavedRun, state: State, *, with_records: bool = True) -> None:
    """Puts a verified checkpoint's content into a freshly built state, without records where another trainer loads them.

    Raises:
        CheckpointError: the state was built for other tables or another model.
        StoreError: a store can't be written.
    """
    expected = [_describe(group) for group in state.embeddings.groups]
    found = [{key: value for key, value in group.items() if key != "num_records"} for group in saved.groups]
    if found != expected:
        raise CheckpointError(f"{saved.path}: holds other tables than this run has:\n  {found}\n  {expected}")
    _load_dense_state(saved.path / _DENSE, state)
    for group, store, entry in zip(state.embeddings.groups, state.embeddings.stores, saved.groups, strict=True):
        if with_records:
            _load_records(saved.path / _records_name(group), group, store, entry["num_records"])
    state.embeddings.step = saved.step


def environment() -> dict[str, Any]:
    """What, beside the configuration, decides the last bits of a result."""
    return {"torch": str(torch.__version__), "num_threads": torch.get_num_threads()}


def _records_name(group: Group) -> str:
    return f"group-{group.index}.arrow"


def _describe(group: Group) -> dict[str, Any]:
    return {
        "tables": {table.name: table.num_embeddings for table in group.tables},
        "embedding_dim": group.embedding_dim,
        "data_type": group.data_type,
        "record_width": group.record_width,
    }


def _dense_state(state: State) -> memoryview:
    buffer = io.BytesIO()
    content = {
        "model": {name: value for name, value in state.model.state_dict().items() if isinstance(value, Tensor)},
        "optimizer": state.optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(content, buffer)
    return buffer.getbuffer()


def _load_dense_state(path: Path, state: State) -> None:
    content = torch.load(path, map_location="cpu", weights_only=True)
    expected = {name for name, value in state.model.state_dict().items() if isinstance(value, Tensor)}
    if expected != content["model"].keys():
        raise CheckpointError(f"{path}: holds another model: {sorted(expected ^ content['model'].keys())} are in only one of them")
    try:
        state.model.load_state_dict(content["model"], strict=False)  # embeddings are loaded from their records
    except RuntimeError as error:
        raise CheckpointError(f"{path}: holds another model: {error}") from error
    load_optimizer(state.optimizer, content["optimizer"])
    torch.set_rng_state(content["random"])
    if len(content["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["random_cuda"])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a state that may have been saved on another kind of device: where Adam counts its steps is this run's to say."""
    capturable = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, is_capturable in zip(optimizer.param_groups, capturable, strict=True):
        if is_capturable is None:
            continue
        group["capturable"] = is_capturable
        for parameter in group["params"]:
            values = optimizer.state.get(parameter, {})
            if "step" in values:
                values["step"] = values["step"].to(parameter.device if is_capturable else "cpu")


def _load_records(path: Path, group: Group, store: EmbeddingStore, num_records: int) -> None:
    store.clear()
    num_read = 0
    for rows, records in read_records(path, group.record_width):
        store.write(rows, records)
        num_read += len(rows)
    if num_read != num_records:
        raise CheckpointError(f"{path}: holds {num_read:,} records, its manifest says {num_records:,}")
