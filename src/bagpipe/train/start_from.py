"""`bagpipe train --from RUN`: a run that starts with the tables and the dense part of another one.

It has a folder and steps of its own, from 0 on. What it took, and from where, stands in `from.json`
of its folder, and in its log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bagpipe.checkpoint.checkpoints import (
    DENSE,
    SavedRun,
    read_checkpoint,
)
from bagpipe.checkpoint.dense import (
    check_model,
    dense_state_dict,
    put_fitting,
    put_fitting_optimizer,
    read_dense,
)
from bagpipe.checkpoint.files import FROM
from bagpipe.checkpoint.other_tables import (
    Move,
    differences,
    load_moved,
    moves_between,
)
from bagpipe.config.run import RunConfig
from bagpipe.data.base import BatchSource, FeatureSpec
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import BagpipeError, CheckpointError, ConfigError
from bagpipe.native.files import replaced
from bagpipe.train.build import Run
from bagpipe.train.report import Reporter
from bagpipe.train.saved import any_split, config_of, find_saved
from bagpipe.train.settings import data_content
from bagpipe.types import Group, TableConfig


def find_source(path: Path, config: RunConfig, trainers: Trainers, reporter: Reporter) -> SavedRun:
    """The checkpoint that a run starts from, with all its files compared. All ranks must call it.

    Args:
        path: The other run's folder, of which the newest valid checkpoint is taken, or one of its
            checkpoints.
        config: The run that starts.
        trainers: Its trainers.
        reporter: Told about checkpoints that are damaged.

    Raises:
        ConfigError: It is the run's own folder.
        CheckpointError: There is none, or all are damaged.
    """
    own = config.log.folder.resolve()
    if own in (path.resolve(), *path.resolve().parents):
        raise ConfigError(
            f"--from {path}: is in the run's own folder, log.folder = {str(config.log.folder)!r}: "
            "--resume goes on with it, and another log.folder starts a run from it"
        )

    def find() -> str | None:
        if not trainers.is_first:
            return None
        return str(find_saved(path, "last", reporter.say).path.resolve())

    chosen = Path(trainers.all_do("a checkpoint to start from", find)[0])
    saved: SavedRun = trainers.all_get("it to be read", lambda: read_checkpoint(chosen))
    return saved


@dataclass(kw_only=True)
class StartFrom:
    """Puts another run's checkpoint into a run that was built. All ranks must call what it offers.

    Making it refuses what can't be, and changes nothing.

    Raises:
        CheckpointError: Tables or the dense part do not fit; lists all that differs.
    """

    saved: SavedRun
    run: Run
    trainers: Trainers
    _config: RunConfig = field(init=False)
    """The configuration of the run to start from."""
    _moves: Sequence[Move] = field(init=False)
    _dense: dict[str, Any] = field(init=False)
    _has_more: bool = field(init=False)
    """Whether the run has features that the other one has not, so that its model is another one."""

    def __post_init__(self) -> None:
        self.trainers.all_do("the run to start from to be compared", self._compare)

    def load(self, folder: Path, reporter: Reporter) -> dict[str, Any]:
        """Loads it, says what was taken, and writes that into the run's folder.

        Raises:
            CheckpointError: A file can't be read, or the folder can't be written.
            StoreError: A store can't be written.
        """
        run, saved = self.run, self.saved

        def load_records() -> None:
            if self.trainers.is_first:
                stores = run.embeddings.stores
                load_moved(
                    saved,
                    self._moves,
                    stores,
                    source_seed=self._config.train.seed,
                    seed=run.config.train.seed,
                )

        self.trainers.all_do("all records of the run to start from", load_records)
        for group in run.embeddings.groups:
            counts = [
                saved.step - saved.num_skipped[move.source.index]
                for move in self._moves
                if move.target is group and move.keeps_state
            ]
            # The updates that its state has seen count on, though the run's steps begin anew.
            run.embeddings.num_skipped[group.index] = -max(counts, default=0)
        fresh = put_fitting(saved.path / DENSE, self._dense, run.model, is_other=self._has_more)
        is_kept = self._has_same_optimizer and put_fitting_optimizer(
            self._dense, run.model, run.optimizer
        )
        told = self._told(fresh, is_kept)
        self.trainers.all_do(FROM, lambda: self._save(folder, told))
        for line in _sentences(told):
            reporter.say(line)
        return told

    @property
    def _has_same_optimizer(self) -> bool:
        return self._config.dense_optimizer.kind == self.run.config.dense_optimizer.kind

    def _compare(self) -> None:
        saved, run = self.saved, self.run
        self._config = config_of(saved)
        there, here = _groups_of(saved, self._config), run.embeddings.groups
        different = list(differences(there, here))
        data = _data_of(saved, self._config)
        known = [table.name for group in there for table in group.tables]
        if data is not None:
            different += _feature_differences(_by_table(data.features), here)
            different += _label_differences(data.label_names, run.source.label_names)
        model = self._config.model.kind
        if model != run.config.model.kind:
            different.append(f"model.kind is {model!r} there and {run.config.model.kind!r} here")
        num_known = len(known if data is None else data.features)
        now = sum(len(group.features) for group in here)
        self._has_more = now > num_known
        self._moves = moves_between(there, here)
        self._dense = read_dense(saved.path / DENSE)
        if not self._has_more:
            try:
                check_model(saved.path / DENSE, self._dense["model"], dense_state_dict(run.model))
            except CheckpointError as error:
                different.append(str(error))
        if different:
            lines = [f"{saved.path}: a run can't start from it, since they differ:"]
            lines += [f"  {each}" for each in different]
            lines += ["Set these as they are there, or start without --from"]
            raise CheckpointError("\n".join(lines))

    def _told(self, fresh: Sequence[str], is_kept: bool) -> dict[str, Any]:
        """What was taken, as JSON values."""
        sizes = {
            table.name: table.num_embeddings
            for group in self.run.embeddings.groups
            for table in group.tables
        }
        tables = {
            move.table: {
                "num_rows": move.num_rows,
                "num_new_rows": sizes[move.table] - move.num_rows,
                "has_optimizer_state": move.keeps_state,
            }
            for move in self._moves
        }
        return {
            "checkpoint": str(self.saved.path),
            "from_step": self.saved.step,
            "tables": tables,
            "new_tables": {name: size for name, size in sizes.items() if name not in tables},
            "dense": {"fresh": list(fresh), "has_optimizer_state": is_kept},
        }

    def _save(self, folder: Path, told: Mapping[str, Any]) -> None:
        if self.trainers.is_first:
            with replaced(folder / FROM, CheckpointError) as temporary:
                temporary.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _sentences(told: Mapping[str, Any]) -> Iterator[str]:
    """What a person is told of a start."""
    yield f"starts from step {told['from_step']:,} of {told['checkpoint']}"
    tables = told["tables"]
    kept = [name for name, of in tables.items() if of["has_optimizer_state"]]
    weights = [name for name in tables if name not in kept]
    if kept:
        yield f"tables with their optimizer state: {_names(kept)}"
    if weights:
        yield f"tables with fresh optimizer state, as the optimizer is another: {_names(weights)}"
    grown = {name: of["num_new_rows"] for name, of in tables.items() if of["num_new_rows"]}
    if grown:
        yield f"new rows: {_names([f'{name} {count:,}' for name, count in grown.items()])}"
    if told["new_tables"]:
        new = [f"{name} {size:,}" for name, size in told["new_tables"].items()]
        yield f"new tables, with their rows: {_names(new)}"
    dense = told["dense"]
    state = "with its" if dense["has_optimizer_state"] else "with fresh"
    but = f", but for {_names(dense['fresh'])}, which are fresh" if dense["fresh"] else ""
    yield f"dense part {state} optimizer state{but}"


def _names(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _groups_of(saved: SavedRun, config: RunConfig) -> tuple[Group, ...]:
    """The groups of a checkpoint. Features are not known there, so tables have their own names."""
    init = config.table_init
    groups = tuple(
        Group(
            index=index,
            tables=tuple(
                TableConfig(
                    name=name,
                    num_embeddings=num_embeddings,
                    embedding_dim=described["embedding_dim"],
                    feature_names=[name],
                    data_type=described["data_type"],
                    init=None if init is None else init.build(),
                )
                for name, num_embeddings in described["tables"].items()
            ),
            optimizer=config.table_optimizer.build(),
        )
        for index, described in enumerate(saved.groups)
    )
    for group, described in zip(groups, saved.groups, strict=True):
        if group.record_width != described["record_width"]:
            raise CheckpointError(
                f"{saved.path}: its records have {described['record_width']} words, where this "
                f"version has {group.record_width} for {group.optimizer}: train with the version "
                "that wrote it"
            )
    return groups


def _data_of(saved: SavedRun, config: RunConfig) -> BatchSource | None:
    """Data of a run, for what they tell of it; None where they are not there."""
    data = config.data
    try:
        content = saved.config["data"].get("content")
        if data.kind == "prepared" and data_content(data.folder) != content:
            return None
        return any_split(config)
    except BagpipeError:
        return None


def _by_table(features: Iterable[FeatureSpec]) -> dict[str, list[str]]:
    """The names of each table's features."""
    found: dict[str, list[str]] = {}
    for spec in features:
        found.setdefault(spec.table, []).append(spec.name)
    return found


def _feature_differences(
    there: Mapping[str, Sequence[str]], groups: Sequence[Group]
) -> Iterator[str]:
    """Sentences on features that are gone, elsewhere, or in another order."""
    here = {table.name: list(table.feature_names) for group in groups for table in group.tables}
    for table, features in there.items():
        if table not in here:
            continue  # told already
        if [name for name in here[table] if name in features] != list(features):
            yield f"table {table!r} has the features {features} there and {here[table]} here"
    known = [name for features in there.values() for name in features]
    now = [name for group in groups for name in group.features if name in known]
    if sorted(now) == sorted(known) and now != known:
        yield f"features come in the order {known} there and {now} here"


def _label_differences(there: Sequence[str], here: Sequence[str]) -> Iterator[str]:
    """Tells where each logit would go on with another one's label."""
    if sorted(here) == sorted(there) and here != there:
        yield f"labels come in the order {list(there)} there and {list(here)} here"
