"""Turns raw files into prepared ones: the work behind `bagpipe data prepare`.

It passes over the input up to four times, each time in bounded memory (a block, a record batch per
split, the dictionaries):
1. Only for a split by time: the time column is read, or the rows are counted.
2. Only for a dictionary: the keys of the training rows are counted.
3. Rows are turned into ids and written, split by split, and then the dictionaries, with the values
   that were met. `manifest.json` comes last, so that an interrupted preparation leaves nothing that
   a reader would take for whole data.
4. The validation files are read again, to count the lookups of values that training does not have.

One process at a time prepares into a folder, and it removes only what a preparation has made there
(`bagpipe.data.output_folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bagpipe.data.base import Split
from bagpipe.data.criteo import CARDINALITIES, SPARSE_NAMES, CriteoSource
from bagpipe.data.dictionaries import TableValues, write_dictionary
from bagpipe.data.earlier import Earlier
from bagpipe.data.manifest import FileEntry, LabelEntry, PreparedManifest, SkippedEntry, SourceEntry
from bagpipe.data.output_folder import OutputFolder
from bagpipe.data.parquet import ParquetSource
from bagpipe.data.raw import Problems, Progress, RawFeature, RawSource, find_files
from bagpipe.data.splitting import SPLITS, Splitter, make_splitter
from bagpipe.data.values import GatheredTexts, TableKind, has_texts, table_kind
from bagpipe.data.vocabulary import DictionaryVocabulary, HashVocabulary, KeyCounter, Vocabulary
from bagpipe.data.writer import Encoder, SplitWriter
from bagpipe.errors import DataError

if TYPE_CHECKING:
    from bagpipe.config.data import CriteoFiles, PrepareConfig

ProgressCallback = Callable[[Progress], None]
COUNT_STAGE: Final = "counting values"
WRITE_STAGE: Final = "writing"


def prepare(config: PrepareConfig, progress: ProgressCallback = lambda _: None) -> PreparedManifest:
    """Prepares the data that the configuration names, and returns their manifest.

    Args:
        config: What to prepare, how, and into which folder.
        progress: Is called after every block.

    Raises:
        DataError: A file is missing, empty or damaged; a column is missing or of a type that can't
            be used; a row can't be read and `on_error` is "raise"; no row is left to train on; the
            folder holds prepared data and `overwrite` is not set, or somebody else's files with the
            names of prepared ones; another process prepares into it; or it can't be written.
    """
    try:
        return _prepare(config, progress)
    except OSError as error:
        raise DataError(
            f"preparing into {config.output} failed: {error}; there is no manifest, so start again"
        ) from error


def _prepare(config: PrepareConfig, progress: ProgressCallback) -> PreparedManifest:
    source = open_raw(config)
    earlier = Earlier.open(config, source.features)
    features = source.features if earlier is None else earlier.merged(source.features)
    with OutputFolder(config.output, overwrite=config.overwrite) as folder:
        splitter = make_splitter(config.split, source)
        vocabularies = _make_vocabularies(config, source, splitter, earlier, progress)
        with _gathered_texts(config.output, features, vocabularies) as texts:
            encoder = Encoder(
                features,
                source.dense_names,
                vocabularies,
                config.transform,
                texts=texts,
                further_labels=[label.name for label in _labels_of(config)[1:]],
                has_weights=_weight_of(config) is not None,
            )
            splits, problems = _write_splits(config, folder, source, splitter, encoder, progress)
            dictionaries = _save_dictionaries(folder, features, vocabularies, texts, earlier)
        manifest = _describe(
            config, source, vocabularies, dictionaries, splits, problems, encoder, earlier
        )
        if not manifest.num_rows("train"):
            raise DataError(
                f"no training rows are left of {manifest.source.num_rows_read:,}: "
                f"{_why_none(manifest)}"
            )
        if not encoder.has_weighty_rows:
            raise DataError(
                f"all {manifest.num_rows('train'):,} rows to train on have the weight 0 (column "
                f"{manifest.weight!r}), so nothing would be learned: give some a weight above 0, "
                "or leave source.weight out"
            )
        folder.save(manifest)
    return manifest


def open_raw(config: PrepareConfig) -> RawSource:
    """Opens the raw source that the configuration names.

    Raises:
        DataError: A file or a mapped column is missing, or a file is empty or can't be read.
    """
    files = find_files(config.source.files)
    if config.source.kind == "parquet":
        return ParquetSource(files, config.source)
    return CriteoSource(files, _criteo_sizes(config.source))


def _labels_of(config: PrepareConfig) -> tuple[LabelEntry, ...]:
    if config.source.kind != "parquet":
        return (LabelEntry(name="label", column="label"),)
    return tuple(
        LabelEntry(name=label.label, column=label.column, at_least=label.at_least)
        for label in config.source.all_labels
    )


def _weight_of(config: PrepareConfig) -> str | None:
    return config.source.weight if config.source.kind == "parquet" else None


def _criteo_sizes(source: CriteoFiles) -> tuple[int | None, ...]:
    sizes = source.num_embeddings
    if isinstance(sizes, str):
        return CARDINALITIES[sizes]
    return sizes if isinstance(sizes, tuple) else (sizes,) * len(SPARSE_NAMES)


def _make_vocabularies(
    config: PrepareConfig,
    source: RawSource,
    splitter: Splitter,
    earlier: Earlier | None,
    progress: ProgressCallback,
) -> dict[str, Vocabulary]:
    """The vocabulary of each table."""
    sizes = {feature.table: feature.num_embeddings for feature in source.features}
    if config.vocabulary.kind == "hash":
        return {table: HashVocabulary(_required(size, table)) for table, size in sizes.items()}
    counters = {table: KeyCounter() for table in sizes}
    for block in source.blocks(Problems(on_error=config.on_error), progress, COUNT_STAGE):
        training = block.take(np.flatnonzero(splitter.split_of(block) == 0))
        for feature, keys in zip(source.features, training.keys, strict=True):
            counters[feature.table].add(keys.values)
    min_count = config.vocabulary.min_count
    known = {} if earlier is None else {table: earlier.known(table) for table in sizes}
    return {
        table: DictionaryVocabulary(
            *counters.pop(table).counts(),
            min_count=min_count,
            max_embeddings=size,
            known=known.get(table),
        )
        for table, size in sizes.items()
    }


def _required(size: int | None, table: str) -> int:
    if size is None:
        raise DataError(f"table {table!r} has no num_embeddings, which hashing needs")
    return size


def _kinds(features: Sequence[RawFeature]) -> dict[str, TableKind]:
    tables = dict.fromkeys(feature.table for feature in features)
    return {
        table: table_kind(feature.kind for feature in features if feature.table == table)
        for table in tables
    }


def _gathered_texts(
    folder: Path, features: Sequence[RawFeature], vocabularies: dict[str, Vocabulary]
) -> GatheredTexts:
    """Takes the texts of the new ids of all tables that have texts and a dictionary."""
    kinds = _kinds(features)
    dictionaries = {
        table: vocabulary
        for table, vocabulary in vocabularies.items()
        if isinstance(vocabulary, DictionaryVocabulary) and has_texts(kinds[table])
    }
    return GatheredTexts(
        folder,
        {table: each.num_known for table, each in dictionaries.items()},
        {table: each.num_embeddings for table, each in dictionaries.items()},
    )


def _save_dictionaries(
    folder: OutputFolder,
    features: Sequence[RawFeature],
    vocabularies: dict[str, Vocabulary],
    texts: GatheredTexts,
    earlier: Earlier | None,
) -> dict[str, FileEntry]:
    entries, kinds = {}, _kinds(features)
    for number, (table, vocabulary) in enumerate(vocabularies.items()):
        if isinstance(vocabulary, DictionaryVocabulary):
            values = TableValues(
                table=table,
                kind=kinds[table],
                keys=vocabulary.keys,
                texts=texts,
                known=None if earlier is None else earlier.dictionary(table),
            )
            path = folder.claim(f"dictionary-{number:05d}.arrow")
            file = write_dictionary(path, values, vocabulary.counts)
            entries[table] = FileEntry(
                name=file.path.name,
                num_bytes=file.num_bytes,
                checksum=file.checksum,
                num_rows=vocabulary.num_embeddings - 1,
            )
    return entries


def _write_splits(
    config: PrepareConfig,
    folder: OutputFolder,
    source: RawSource,
    splitter: Splitter,
    encoder: Encoder,
    progress: ProgressCallback,
) -> tuple[dict[Split, tuple[FileEntry, ...]], Problems]:
    problems = Problems(on_error=config.on_error)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(_split_writer(config, folder, split, encoder.schema))
            for split in SPLITS
        }
        for block in source.blocks(problems, progress, WRITE_STAGE):
            places = splitter.split_of(block)
            for place, split in enumerate(SPLITS):
                chosen = places == place
                if chosen.any():
                    part = block if chosen.all() else block.take(np.flatnonzero(chosen))
                    writers[split].write(encoder.encode(part, split))
    return {
        split: tuple(writer.entries)
        for split, writer in writers.items()
        if writer.entries or split != "test"
    }, problems


def _split_writer(
    config: PrepareConfig, folder: OutputFolder, split: Split, schema: Any
) -> SplitWriter:
    return SplitWriter(
        folder.claim,
        split,
        schema,
        rows_per_batch=config.rows_per_batch,
        batches_per_file=config.batches_per_file,
    )


def _describe(
    config: PrepareConfig,
    source: RawSource,
    vocabularies: dict[str, Vocabulary],
    dictionaries: dict[str, FileEntry],
    splits: dict[Split, tuple[FileEntry, ...]],
    problems: Problems,
    encoder: Encoder,
    earlier: Earlier | None,
) -> PreparedManifest:
    skipped = {
        reason: SkippedEntry(count=rows.count, first=rows.first)
        for reason, rows in problems.skipped.items()
    }
    num_kept = sum(file.num_rows for files in splits.values() for file in files)
    labels = _labels_of(config)
    return PreparedManifest(
        label=labels[0].column,
        label_at_least=labels[0].at_least,
        labels=labels if len(labels) > 1 or labels[0].name != labels[0].column else (),
        weight=_weight_of(config),
        dense_names=source.dense_names,
        dense_transform=config.transform,
        features=encoder.features,
        num_embeddings={
            table: vocabulary.num_embeddings for table, vocabulary in vocabularies.items()
        },
        vocabulary=config.vocabulary.kind,
        dictionaries=dictionaries,
        min_count=getattr(config.vocabulary, "min_count", None),
        vocabulary_from=None if earlier is None else earlier.entry,
        rows_per_batch=config.rows_per_batch,
        splits=splits,
        source=SourceEntry(
            kind=config.source.kind,
            files=config.source.files,
            num_rows_read=num_kept + sum(entry.count for entry in skipped.values()),
            skipped=skipped,
        ),
        num_clipped=encoder.num_clipped,
        unseen=encoder.used.count_unseen(
            [config.output / file.name for file in splits["validation"]], encoder.features
        ),
        label_clustering=encoder.clustering.share,
    )


def _why_none(manifest: PreparedManifest) -> str:
    if manifest.num_rows("validation"):
        return (
            "all that can be read went to validation, so lower split.validation_share or "
            "split by share"
        )
    reasons = [
        f"{entry.count:,} because of {reason}, first {entry.first}"
        for reason, entry in manifest.source.skipped.items()
    ]
    return "all were skipped: " + "; ".join(reasons)
