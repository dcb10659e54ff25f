"""The prepared data whose ids a preparation goes on with: found, and refused where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bagpipe.data.dictionaries import Dictionary
from bagpipe.data.manifest import (
    MANIFEST_NAME,
    FeatureEntry,
    PreparedManifest,
    VocabularyEntry,
)
from bagpipe.data.raw import RawFeature, ValueKind
from bagpipe.errors import DataError
from bagpipe.types import Int64Array

if TYPE_CHECKING:
    from bagpipe.config.data import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Earlier prepared data. Their dictionaries are mapped, with their checksums compared."""

    folder: Path
    manifest: PreparedManifest
    _opened: dict[str, Dictionary] = field(default_factory=dict)

    @classmethod
    def open(cls, config: PrepareConfig, features: Sequence[RawFeature]) -> Self | None:
        """Those that `vocabulary_from` names, if it names any.

        Args:
            config: The preparation to come.
            features: Its features.

        Raises:
            DataError: There are none, they are altered, or their ids can't be kept. The message
                lists all that differs.
        """
        if config.vocabulary_from is None:
            return None
        folder = find_prepared(config.vocabulary_from)
        if folder.resolve() == config.output.resolve():
            raise DataError(
                f"vocabulary_from = {str(config.vocabulary_from)!r} has the data of {folder}, "
                "which is the output too, and would be gone before it is read: give another output"
            )
        found = cls(folder=folder, manifest=PreparedManifest.load(folder))
        different = list(_differences(config, features, found.manifest))
        if different:
            raise DataError(
                "\n".join(
                    [
                        f"vocabulary_from = {str(config.vocabulary_from)!r}: the ids of {folder} "
                        "can't be kept:",
                        *(f"  {each}" for each in different),
                        "Prepare both alike, or leave vocabulary_from out for ids of their own",
                    ]
                )
            )
        for table in found.manifest.dictionaries:
            found._opened[table] = opened = Dictionary.open(folder, table)
            opened.require_values()
        return found

    @property
    def entry(self) -> VocabularyEntry:
        """What a manifest says of them."""
        return VocabularyEntry(folder=str(self.folder), num_known=self.manifest.num_embeddings)

    def dictionary(self, table: str) -> Dictionary | None:
        """That of a table, unless the table is new, or ids are hashed."""
        return self._opened.get(table)

    def known(self, table: str) -> tuple[Int64Array, Int64Array] | None:
        """A table's keys by id, from id 1 on, and how often each came; None as there."""
        found = self.dictionary(table)
        return None if found is None else (found.keys, found.counts)

    def merged(self, features: Sequence[RawFeature]) -> tuple[RawFeature, ...]:
        """The features, each with the kind that holds its values of all data."""
        there = {entry.name: entry.kind for entry in self.manifest.features}
        return tuple(
            replace(feature, kind=there.get(feature.name) or feature.kind)
            if feature.kind in ("nothing", "integer")
            else feature
            for feature in features
        )


def find_prepared(path: Path) -> Path:
    """The folder of prepared data that `path` is, or that the run in it trains with.

    Raises:
        DataError: It is neither, or the run's data are not there any more.
    """
    if not (path / "checkpoints").is_dir():
        if not (path / MANIFEST_NAME).exists():
            raise DataError(
                f"vocabulary_from = {str(path)!r}: holds neither prepared data nor a run's "
                f"checkpoints, seen from {Path.cwd()}: give the folder of one of them"
            )
        return path
    data = _data_of_run(path)
    if data.get("kind") != "prepared":
        raise DataError(
            f"vocabulary_from = {str(path)!r}: that run trains with {data.get('kind')} data, which "
            "have no vocabulary: give a run with prepared data, or their folder"
        )
    folder = Path(data["folder"])
    if PreparedManifest.load(folder).content != data.get("content", ""):
        raise DataError(
            f"vocabulary_from = {str(path)!r}: {folder} has other data than that run was trained "
            f"with, seen from {Path.cwd()}: give the folder of its data"
        )
    return folder


def _data_of_run(run: Path) -> dict[str, Any]:
    """The data section of a run's newest checkpoint that can be read."""
    for path in sorted((run / "checkpoints").glob(f"step-*/{MANIFEST_NAME}"), reverse=True):
        try:
            return dict(json.loads(path.read_bytes())["config"]["data"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise DataError(
        f"vocabulary_from = {str(run)!r}: has no checkpoint of `bagpipe train` that says what data "
        "it trains with: give the folder of the prepared data"
    )


def _differences(
    config: PrepareConfig, features: Sequence[RawFeature], manifest: PreparedManifest
) -> Iterator[str]:
    """Sentences on all that would give a value another id than it has there."""
    here, there = config.vocabulary, manifest.vocabulary
    if here.kind != there:
        yield f"vocabulary.kind is {there!r} there and {here.kind!r} here"
    elif here.kind == "dictionary" and manifest.min_count not in (None, here.min_count):
        yield f"vocabulary.min_count is {manifest.min_count} there and {here.min_count} here"
    by_name = {feature.name: feature for feature in features}
    for entry in manifest.features:
        if entry.name not in by_name:
            yield f"feature {entry.name!r} is there, and not here"
        else:
            yield from _feature_differences(entry, by_name[entry.name])
    sizes = {feature.table: feature.num_embeddings for feature in features}
    for table, size in manifest.num_embeddings.items():
        most = sizes.get(table)
        if most is None:
            continue
        if here.kind == "hash" and most != size:
            yield f"table {table!r} hashes to {size:,} rows there and to {most:,} here"
        elif here.kind == "dictionary" and most < size:
            yield (
                f"table {table!r} has {size:,} ids there and num_embeddings = {most:,} here: give "
                f"at least {size:,}"
            )


def _feature_differences(there: FeatureEntry, here: RawFeature) -> Iterator[str]:
    if there.kind is None:
        yield (
            f"feature {there.name!r} is of an older version, which does not tell what its values "
            "are: prepare that data again, which gives the same ids"
        )
        return
    for what, old, new in (
        ("is read from column", there.column, here.column),
        ("has the table", there.table, here.table),
        ("has the separator", there.separator, here.separator),
        ("is multi-valued:", there.multi_hot, here.multi_hot),
    ):
        if old != new:
            yield f"feature {there.name!r} {what} {old!r} there and {new!r} here"
    if not _are_alike(there.kind, here.kind):
        yield f"feature {there.name!r} has values of kind {there.kind} there and {here.kind} here"


def _are_alike(one: ValueKind, other: ValueKind) -> bool:
    """Whether equal values of both have one key."""
    integers = {"integer", "unsigned"}
    return "nothing" in (one, other) or one == other or {one, other} <= integers
