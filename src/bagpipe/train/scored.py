"""The data that a saved model is scored on: a part of its own, or others that fit it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bagpipe.config.data import DataConfig, LabelColumn, PreparedData
from bagpipe.data import has_split, open_source
from bagpipe.data.base import BatchSource, Split
from bagpipe.data.dictionaries import Dictionary
from bagpipe.data.known_ids import KnownIds
from bagpipe.data.manifest import MANIFEST_NAME, PreparedManifest
from bagpipe.data.raw import find_files
from bagpipe.errors import ConfigError, DataError
from bagpipe.train.raw_inputs import inputs_of
from bagpipe.train.raw_source import open_raw_rows
from bagpipe.train.saved import SavedModel, any_split

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ScoredData:
    """What is to be predicted."""

    source: BatchSource
    name: str
    """What a message calls it."""
    labels: tuple[str, ...]
    """What the data call the model's labels: their columns in raw files, else their names."""
    has_labels: bool = True
    """Whether the data have all of these."""
    weight: str | None = None
    """The column with the weights by which the run's scores count samples, if they do."""


def open_scored(of: SavedModel, data: Path | None, split: str | None) -> ScoredData:
    """Opens what a saved model is to predict.

    Args:
        of: the model.
        data: raw files, by their path or a pattern, or a folder of prepared data; None: the run's
            own data.
        split: which part of prepared data; by default the test part if there is one, else the
            validation part.

    Raises:
        ConfigError: there is no such part.
        DataError: the data can't be read, do not fit the model, or their ids mean other values.
    """
    config = of.config
    if data is None:
        own = config.data
        if isinstance(own, PreparedData):
            own = own.model_copy(update={"shuffle": False})
        return _part_of(own, split, of)
    if (data / MANIFEST_NAME).is_file():
        check_ids(of, data)
        features = any_split(config).features
        there = [label.name for label in PreparedManifest.load(data).all_labels]
        has_labels = len(of.label_names) == 1 == len(there) or set(of.label_names) <= set(there)
        other = PreparedData(
            kind="prepared",
            folder=data,
            features=tuple(spec.name for spec in features),
            labels=of.label_names if has_labels and len(there) > 1 else None,
            ignore_weights=weight_of(of) is None,
        )
        scored = replace(_part_of(other, split, of), has_labels=has_labels)
        if scored.source.features == features:
            return scored
        return replace(scored, source=KnownIds(source=scored.source, features=features))
    if data.is_dir():
        raise DataError(
            f"{data}: is no folder of prepared data (it has no {MANIFEST_NAME}): give raw files, "
            "as by a pattern in quotes, or a folder that `bagpipe data prepare` has written"
        )
    if split is not None:
        raise ConfigError(f"--split {split}: {data} are raw files, which have no parts")
    files = find_files([str(data)])
    labels, weight, is_criteo = [LabelColumn(column="label")], weight_of(of), False
    if isinstance(config.data, PreparedData):
        manifest = PreparedManifest.load(config.data.folder)
        entries = {label.name: label.model_dump() for label in manifest.all_labels}
        labels = [LabelColumn(**entries[name]) for name in of.label_names]
        is_criteo = manifest.source.kind == "criteo"
    rows = open_raw_rows(
        files,
        inputs_of(config, of.groups, of.num_dense),
        any_split(config).features,
        labels,
        weight,
        is_criteo=is_criteo,
    )
    return ScoredData(
        source=rows,
        name=str(data),
        labels=tuple(label.column for label in labels),
        has_labels=rows.has_labels,
        weight=weight,
    )


def weight_of(of: SavedModel) -> str | None:
    """The column with the weights of a run's samples; None: they count alike."""
    data = of.config.data
    if not isinstance(data, PreparedData) or data.ignore_weights:
        return None
    return PreparedManifest.load(data.folder).weight


def check_ids(of: SavedModel, folder: Path) -> None:
    """Raises DataError where prepared data have other columns, or a run's ids mean other values.

    They may have more ids than the run, as dictionaries have that extend the run's.
    """
    if not isinstance(of.config.data, PreparedData):
        raise DataError(
            f"{folder}: is prepared data, and {of.saved.path} was trained on ids that were made on "
            "the fly: give a Parquet file of ids"
        )
    own_folder = of.config.data.folder
    own, other = PreparedManifest.load(own_folder), PreparedManifest.load(folder)
    features = {spec.name: spec.table for spec in any_split(of.config).features}
    entries = {entry.name: entry for entry in other.features}
    missing = sorted(features.keys() - entries.keys())
    differing = [
        table
        for name, table in features.items()
        if not missing
        and (entries[name].table != table or not _keeps_ids(own_folder, own, folder, other, table))
    ]
    if missing:
        what = f"has no feature {missing[0]!r}"
    elif differing:
        what = f"has other ids for the values of table {differing[0]!r}"
    elif (own.dense_names, own.dense_transform) != (other.dense_names, other.dense_transform):
        what = (
            f"has the dense features {', '.join(other.dense_names)} (transform "
            f"{other.dense_transform}), not {', '.join(own.dense_names)} ({own.dense_transform})"
        )
    else:
        return
    raise DataError(
        f"{folder}: {what}, so it does not fit the model that was trained on {own_folder}: give "
        "the raw files, which are encoded as those were, or prepare them with "
        "prepare.vocabulary_from, which keeps the run's ids"
    )


def _keeps_ids(
    own_folder: Path, own: PreparedManifest, folder: Path, other: PreparedManifest, table: str
) -> bool:
    """Whether each id of a table stands for the same values in other prepared data."""
    if own.vocabulary != other.vocabulary or table not in other.num_embeddings:
        return False
    if table not in own.dictionaries:
        return own.num_embeddings[table] == other.num_embeddings[table]
    if own.dictionaries[table].checksum == other.dictionaries[table].checksum:
        return True
    known = Dictionary.open(own_folder, table).keys
    found = Dictionary.open(folder, table).keys
    return np.array_equal(known, found[: len(known)])


def _part_of(config: DataConfig, split: str | None, of: SavedModel) -> ScoredData:
    if split is not None and split not in _SPLITS:
        raise ConfigError(f"--split {split}: must be {', '.join(_SPLITS)}")
    chosen: Split = next(
        each for each in ("test", "validation") if each == "validation" or has_split(config, each)
    )
    for each in _SPLITS:
        chosen = each if each == split else chosen
    return ScoredData(
        source=open_source(config, chosen),
        name=chosen,
        labels=of.label_names,
        weight=weight_of(of),
    )
