"""What a checkpoint of an own loop says of its tables, beside their shapes.

It stands where a run of `bagpipe train` has its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bagpipe.checkpoint.checkpoints import SavedRun
from bagpipe.errors import CheckpointError
from bagpipe.types import Group

_OWN_LOOP = "own_loop"


def described(groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """What decides numbers beside the tables' shapes, as JSON."""
    of_groups = [
        {
            "lr": group.optimizer.lr,
            "optimizer": _as_dict(group.optimizer),
            "init": {table.name: _as_dict(table.initializer) for table in group.tables},
        }
        for group in groups
    ]
    return {_OWN_LOOP: {"seed": seed, "groups": of_groups}}


def put_learning_rates(saved: SavedRun, groups: Sequence[Group]) -> None:
    """Sets the saved ones; those of `bagpipe train` follow from its configuration."""
    there = saved.config.get(_OWN_LOOP, {"groups": ()})
    for group, of_group in zip(groups, there["groups"], strict=False):
        group.set_learning_rate(of_group["lr"])


def _as_dict(value: Any) -> dict[str, Any]:
    return {"kind": type(value).__name__, **asdict(value)}


def check_described(saved: SavedRun, groups: Sequence[Group], seed: int) -> None:
    """Raises CheckpointError where tables were made or trained otherwise than these."""
    there = saved.config.get(_OWN_LOOP)
    if there is None:  # of `bagpipe train`
        there = {"seed": saved.config.get("train", {}).get("seed"), "groups": ()}
    if there["seed"] != seed:
        raise CheckpointError(
            f"{saved.path}: its tables have the seed {there['seed']}, these embeddings have "
            f"{seed}: rows that no batch has touched would differ"
        )
    for group, of_group in zip(groups, there["groups"], strict=False):
        _check_same(saved, f"{group.name}: optimizer", of_group["optimizer"], group.optimizer)
        for table in group.tables:
            init = of_group["init"][table.name]
            _check_same(saved, f"table {table.name!r}: init", init, table.initializer)


def _check_same(saved: SavedRun, what: str, there: Mapping[str, Any], here: Any) -> None:
    """Compares all but the learning rate; fields that were added since have their default."""
    values = {key: value for key, value in there.items() if key not in ("kind", "lr")}
    if hasattr(here, "lr"):
        values["lr"] = here.lr
    try:
        is_same = there["kind"] == type(here).__name__ and type(here)(**values) == here
    except TypeError:  # a field of a newer version
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{saved.path}: {what} is {dict(there)} there and {_as_dict(here)} here"
        )
