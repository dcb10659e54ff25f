"""What a run has saved, opened for what comes after training: scores, predictions, an export.

Nothing of the run's folder is changed, so a run that still trains may be looked at, too.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bagpipe.checkpoint.checkpoints import (
    DENSE,
    SavedRun,
    find_checkpoint,
    load_records,
    open_checkpoint,
)
from bagpipe.checkpoint.dense import check_dense, put_dense, read_dense
from bagpipe.checkpoint.files import BEST
from bagpipe.config.load import apply_overrides, check_config
from bagpipe.config.run import RunConfig
from bagpipe.config.tables import make_tables
from bagpipe.data import open_source
from bagpipe.data.base import BatchSource
from bagpipe.distributed.alone import ALONE
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import CheckpointError, ConfigError
from bagpipe.models import RankingModel
from bagpipe.store import FileStore, MemoryStore
from bagpipe.store.base import EmbeddingStore
from bagpipe.store.manifest import MANIFEST, check_tables
from bagpipe.train.build import choose_device, make_model, matrix_products
from bagpipe.train.settings import data_content
from bagpipe.types import Group, TableConfig, group_tables

_WHICH = ("last", "best")
"""The newest valid checkpoint of a run, or that of its best model."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A run's configuration, and the sizes of what it has trained."""

    saved: SavedRun
    config: RunConfig
    tables: tuple[TableConfig, ...]
    groups: tuple[Group, ...]
    num_dense: int
    label_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A saved model with its records, ready to look up and compute."""

    of: SavedModel
    model: RankingModel
    """In evaluation mode, on `device`."""
    embeddings: EmbeddingBagCollection
    device: torch.device


def open_saved(
    run: Path,
    which: str = "last",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> SavedModel:
    """Reads what a run says of itself, and compares the checksums of one of its checkpoints.

    Args:
        run: its folder, or one checkpoint's.
        which: "last" or "best", of a run's checkpoints.
        overrides: settings to change, each `section.key=value`, as where the data lie now.
        say: told of damaged checkpoints that are passed over.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, of an own loop, or it belongs
            to other data than the configuration names.
        ConfigError: an override is wrong, or the checkpoint is of a newer version.
        DataError: the run's data are not where they were.
    """
    saved = find_saved(run, which, say)
    config = config_of(saved, overrides)
    content = saved.config["data"].get("content")
    if config.data.kind == "prepared" and content is not None:
        found = data_content(config.data.folder)
        if found != content:
            raise CheckpointError(
                f"{config.data.folder}: holds other data than {saved.path} was trained on (its "
                "training files have other checksums), so ids may mean other values: name the "
                "folder by --set data.folder=FOLDER"
            )
    if config.data.kind == "prepared":
        trained = saved.config["data"].get("labels")
        if config.data.model_dump(mode="json")["labels"] != trained:
            raise ConfigError(
                f"--set data.labels: the logits of {saved.path} are those of the labels that it "
                f"was trained on, in their order ({', '.join(trained or ()) or 'all of the data'}):"
                " leave the option out"
            )
    source = any_split(config)
    tables = tuple(make_tables(source.features, config))
    groups = group_tables(tables, config.table_optimizer.build())
    check_tables(saved.path, saved.groups, groups)
    return SavedModel(
        saved=saved,
        config=config,
        tables=tables,
        groups=groups,
        num_dense=source.num_dense,
        label_names=source.label_names,
    )


def find_saved(run: Path, which: str, say: Callable[[str], None] = lambda _: None) -> SavedRun:
    """A run's newest valid or best checkpoint; see `open_saved`."""
    if which not in _WHICH:
        raise ConfigError(f"--checkpoint {which}: must be last or best")
    if (run / MANIFEST).is_file():
        return open_checkpoint(run)
    if not run.is_dir():
        there = "is a file" if run.exists() else "there is no such folder"
        raise CheckpointError(
            f"{run}: {there}: give the folder of a run (log.folder of its file), or of one of its "
            "checkpoints"
        )
    if which == "best":
        if not (run / BEST).is_dir():
            raise CheckpointError(
                f"{run}: has no best checkpoint: train with train.best set, or take "
                "--checkpoint last"
            )
        return open_checkpoint((run / BEST).resolve())
    found = find_checkpoint(
        run / "checkpoints", on_damaged=lambda error: say(f"skipped a checkpoint: {error}")
    )
    if found is None:
        raise CheckpointError(
            f"{run}: holds no checkpoint: give the folder of a run of `bagpipe train` that has "
            "saved one (checkpoint.at_end, or checkpoint.every_steps)"
        )
    return found


def config_of(saved: SavedRun, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a checkpoint remembers, without schedules and shard servers.

    Raises:
        CheckpointError: the checkpoint is an own loop's.
        ConfigError: an override is wrong, or the configuration is of another version.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(saved.config))
    if "data" not in settings:
        raise CheckpointError(
            f"{saved.path}: is of an own loop, whose model only its own code can make: this "
            "command takes runs of `bagpipe train`. In the loop's code bagpipe.restore loads it, "
            "and bagpipe.export writes a folder that bagpipe.serving predicts from"
        )
    settings["data"].pop("content", None)
    # they have what follows from the length of the run beside what a file may say
    for section in ("train", "embeddings"):
        settings[section].pop("lr_schedule", None)
    watched = (settings["train"].get("best") or {}).get("metric")
    if "grouped_auc" not in (*settings["train"].get("metrics", ()), watched):
        settings["train"].pop("group_by", None)  # a schedule's
    apply_overrides(settings, overrides)
    return check_config(RunConfig, settings, source=str(saved.path))


def any_split(config: RunConfig) -> BatchSource:
    """The run's training data, which tell its features; nothing is read or compared yet."""
    data = config.data
    if data.kind == "prepared":
        data = data.model_copy(update={"verify": False})
    return open_source(data, "train")


@contextmanager
def load_model(of: SavedModel) -> Iterator[LoadedModel]:
    """Makes the model and its tables, and closes them at the end.

    Raises:
        CheckpointError: a file is not what the manifest says, or is of another model.
        ConfigError: the machine has no such device.
        StoreError: a store can't be made.
    """
    config, saved = of.config, of.saved
    device = choose_device(config.train.device, ALONE)
    with ExitStack() as stack:
        embeddings = EmbeddingBagCollection(
            of.tables,
            optimizer=config.table_optimizer.build(),
            device=device,
            seed=config.train.seed,
            store=stack.enter_context(_own_stores(config)),
        )
        stack.callback(embeddings.close)
        model = make_model(config.model, embeddings, of.num_dense, len(of.label_names))
        put_model(saved, model)
        load_records(saved, embeddings)
        stack.enter_context(matrix_products(config.train.precision, device))
        yield LoadedModel(
            of=of, model=model.to(device).eval(), embeddings=embeddings, device=device
        )


def put_model(saved: SavedRun, model: RankingModel) -> None:
    """Puts the saved dense part into a model, and leaves optimizers and random state alone."""
    content = read_dense(saved.path / DENSE) | {"optimizer": []}
    check_dense(saved.path / DENSE, content, model, [])
    put_dense(content, model, [])


@contextmanager
def _own_stores(config: RunConfig) -> Iterator[Callable[[Group, int], EmbeddingStore]]:
    """What makes stores like the run's, apart from those; plain memory, since nothing trains."""
    store = config.embeddings.store
    if store.kind == "memory":
        yield MemoryStore
        return
    parent = store.folder.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{store.folder.name}.read-", dir=parent))
    except OSError as error:
        raise ConfigError(
            f"embeddings.store.folder = {str(store.folder)!r}: no folder can be made beside it: "
            f"{error.strerror}: name one that can be written by --set "
            "embeddings.store.folder=FOLDER, or take memory by --set "
            "embeddings.store={kind='memory'}"
        ) from error
    try:
        yield lambda group, seed: FileStore(group, seed, folder / f"group-{group.index}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
