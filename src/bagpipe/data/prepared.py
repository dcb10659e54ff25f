"""Reads prepared data in batches of any size, across record batches and files.

The files are Arrow IPC files in mapped memory. A batch is copied out of them once, feature-major,
so it stays good when the source is closed. With only single-hot features there are no offsets; with
any multi-hot feature there are offsets for all. The ids and numbers of every batch are checked as
they are read (`bagpipe.data.check`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bagpipe.data.base import Batch, FeatureSpec, Split, count_batches
from bagpipe.data.check import check_batch
from bagpipe.data.manifest import PreparedManifest, check_file
from bagpipe.data.mapped import MappedFile, View
from bagpipe.data.reading_order import PARTS_PER_BATCH, WINDOW_BATCHES, FrontToBack, Piece, Shuffled
from bagpipe.data.writer import prepared_schema
from bagpipe.errors import ConfigError, DataError
from bagpipe.native.jit import jit
from bagpipe.native.memory import copy_run
from bagpipe.types import Float32Array, Int32Array, Int64Array, Jagged

_NUM_CACHED_VIEWS: Final = 2 * PARTS_PER_BATCH * WINDOW_BATCHES


class PreparedSource:
    """One split of a folder of prepared data, as a `BatchSource`.

    Args:
        folder: The folder of prepared data.
        split: Which split of them.
        features: The features to read, in this order; None reads all of them.
        labels: The labels to read, likewise.
        ignore_weights: Whether batches have no weights, though the data have.
        shuffle: Whether rows are read in another order in each epoch.
        seed: What that order depends on, besides the epoch.
        verify: Whether the checksums of the split's files are compared first. Sizes are always
            compared.

    Raises:
        DataError: A file is missing, truncated or altered, or the split is empty.
        ConfigError: A chosen feature or label does not exist, or is chosen twice.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        *,
        features: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        ignore_weights: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        self.manifest = PreparedManifest.load(folder)
        self._split, self._shuffle, self._seed = split, shuffle, seed
        feature_names = [feature.name for feature in self.manifest.features]
        label_names = [label.name for label in self.manifest.all_labels]
        self._columns = _chosen("feature", features, feature_names)
        self._labels = _chosen("label", labels, label_names)
        self.label_names = tuple(label_names[label] for label in self._labels)
        self.features: tuple[FeatureSpec, ...] = tuple(
            self.manifest.feature_specs[column] for column in self._columns
        )
        self._keys = tuple(feature.name for feature in self.features)
        entries = self.manifest.splits.get(split, ())
        if not entries:
            raise DataError(
                f"{folder} has no {split} rows: prepare it with "
                f"split.{'test' if split == 'test' else 'validation'}_share above 0"
            )
        stored, has_weights = self.manifest.features, self.manifest.weight is not None
        self.has_weights = has_weights and not ignore_weights
        schema = prepared_schema(
            stored, self.num_dense, further_labels=label_names[1:], has_weights=has_weights
        )
        self._files = [
            MappedFile(check_file(folder, entry, verify=verify), schema, len(stored))
            for entry in entries
        ]
        self._where, self._starts = _record_batches(
            self._files, [entry.num_rows for entry in entries], self.manifest, folder
        )
        self._views: OrderedDict[int, View] = OrderedDict()
        self._views_lock = threading.Lock()
        self._reopen = partial(
            PreparedSource,
            folder,
            split,
            features=features,
            labels=labels,
            ignore_weights=ignore_weights,
            shuffle=shuffle,
            seed=seed,
            verify=False,
        )

    def __reduce__(self) -> tuple[Callable[[], PreparedSource], tuple[()]]:
        """Lets another process open the files anew; their checksums were compared here."""
        return self._reopen, ()

    @property
    def num_dense(self) -> int:
        """Number of dense features per sample."""
        return len(self.manifest.dense_names)

    @property
    def num_samples(self) -> int:
        """Number of samples in one epoch."""
        return int(self._starts[-1])

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yields the batches of one epoch; see `BatchSource.batches`.

        Raises:
            DataError: A number is not finite, a weight is negative, or an id lies outside its
                table.
        """
        for read in self.reads(
            batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last
        ):
            yield read()

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        """See `BatchSource.reads`; the calls raise DataError as `batches` does."""
        order = (
            Shuffled(self._starts, seed=self._seed, epoch=epoch)
            if self._shuffle
            else FrontToBack(self._starts)
        )
        for number in range(
            start, count_batches(self.num_samples, batch_size, drop_last=drop_last)
        ):
            begin = number * batch_size
            size = min(batch_size, self.num_samples - begin)
            where = f"batch {number} of {self._split}, epoch {epoch}"
            yield partial(self._read, list(order.pieces(begin, begin + size)), size, where)

    def _read(self, pieces: list[Piece], size: int, where: str) -> Batch:
        batch = self._gather(pieces, size)
        check_batch(
            batch,
            self.features,
            where=where,
            dense_names=self.manifest.dense_names,
            label_names=self.label_names,
        )
        return batch

    def _gather(self, pieces: list[Piece], size: int) -> Batch:
        labels = np.empty(size, np.float32)
        dense = np.empty((size, self.num_dense), np.float32)
        views = [self._view(piece.record_batch) for piece in pieces]
        places = [
            (_numbers(piece.rows), _numbers(piece.positions), isinstance(piece.rows, slice))
            for piece in pieces
        ]
        for (rows, positions, is_run), view in zip(places, views, strict=True):
            _gather_numbers(view.labels, view.dense, rows, positions, is_run, labels, dense)

        def gathered(column: int) -> Float32Array:
            """One of the columns behind the features."""
            values = np.empty(size, np.float32)
            for (rows, positions, _), view in zip(places, views, strict=True):
                values[positions] = view.of_samples[column][rows]
            return values

        chosen = [labels if label == 0 else gathered(label - 1) for label in self._labels]
        return Batch(
            dense=dense,
            sparse=self._gather_ids(places, views, size),
            labels=chosen[0] if len(chosen) == 1 else np.stack(chosen, axis=1),
            weights=gathered(-1) if self.has_weights else None,
        )

    def _gather_ids(
        self, places: list[tuple[Int64Array, Int64Array, bool]], views: list[View], size: int
    ) -> Jagged:
        """The ids of a batch, in at most three compiled calls per piece.

        With a call per feature, threads that read batches would mostly wait for the GIL.
        """
        num_bags = len(self._columns) * size
        offsets: Int32Array | None = None
        if any(feature.multi_hot for feature in self.features):
            offsets = np.ones(num_bags + 1, np.int32)
            for (rows, positions, _), view in zip(places, views, strict=True):
                _gather_lengths(view.words, view.first_offsets, rows, positions, size, offsets)
            _add_up(offsets)
        values = np.empty(num_bags if offsets is None else offsets[-1], np.int32)
        for (rows, positions, is_run), view in zip(places, views, strict=True):
            if offsets is None:
                _gather_single(view.words, view.first_ids, rows, positions, is_run, size, values)
            else:
                _gather_bags(
                    view.words,
                    view.first_ids,
                    view.first_offsets,
                    rows,
                    positions,
                    is_run,
                    size,
                    offsets,
                    values,
                )
        return Jagged(keys=self._keys, values=values, batch_size=size, offsets=offsets)

    def _view(self, index: int) -> View:
        with self._views_lock:
            view = self._views.get(index)
            if view is None:
                file, number = self._where[index]
                num_rows = int(self._starts[index + 1] - self._starts[index])
                view = self._files[file].view(number, num_rows, self._columns)
                self._views[index] = view
                if len(self._views) > _NUM_CACHED_VIEWS:
                    self._views.popitem(last=False)
            return view


@jit
def _gather_numbers(
    labels: Float32Array,
    dense: Float32Array,
    rows: Int64Array,
    positions: Int64Array,
    is_run: bool,
    labels_out: Float32Array,
    dense_out: Float32Array,
) -> None:
    """Copies rows to positions. In a run (here and below) both are consecutive."""
    if is_run:
        first, position = rows[0], positions[0]
        copy_run(labels[first : first + len(rows)], labels_out[position:])
        copy_run(dense[first : first + len(rows)], dense_out[position:])
    else:
        for i in range(len(rows)):
            labels_out[positions[i]] = labels[rows[i]]
            for j in range(dense.shape[1]):
                dense_out[positions[i], j] = dense[rows[i], j]


@jit
def _gather_single(
    words: Int32Array,
    first_ids: Int64Array,
    rows: Int64Array,
    positions: Int64Array,
    is_run: bool,
    size: int,
    values: Int32Array,
) -> None:
    for feature in range(len(first_ids)):
        ids = words[first_ids[feature] :]
        into = values[feature * size : (feature + 1) * size]
        if is_run:
            copy_run(ids[rows[0] : rows[0] + len(rows)], into[positions[0] :])
        else:
            for i in range(len(rows)):
                into[positions[i]] = ids[rows[i]]


@jit
def _gather_lengths(
    words: Int32Array,
    first_offsets: Int64Array,
    rows: Int64Array,
    positions: Int64Array,
    size: int,
    lengths: Int32Array,
) -> None:
    """Writes bag b's length to ``lengths[b + 1]`` (F * size + 1,), for multi-hot bags."""
    for feature in range(len(first_offsets)):
        if first_offsets[feature] >= 0:
            bounds = words[first_offsets[feature] :]
            into = lengths[1 + feature * size : 1 + (feature + 1) * size]
            for i in range(len(rows)):
                into[positions[i]] = bounds[rows[i] + 1] - bounds[rows[i]]


@jit
def _add_up(lengths: Int32Array) -> None:
    """Turns what `_gather_lengths` has left into offsets."""
    lengths[0] = 0
    for bag in range(1, len(lengths)):
        lengths[bag] += lengths[bag - 1]


@jit
def _gather_bags(
    words: Int32Array,
    first_ids: Int64Array,
    first_offsets: Int64Array,
    rows: Int64Array,
    positions: Int64Array,
    is_run: bool,
    size: int,
    offsets: Int32Array,
    values: Int32Array,
) -> None:
    for feature in range(len(first_ids)):
        ids = words[first_ids[feature] :]
        begins = offsets[feature * size : (feature + 1) * size]
        bounds = words[max(first_offsets[feature], 0) :]
        is_multi_hot = first_offsets[feature] >= 0
        if is_run:
            first, last = rows[0], rows[0] + len(rows)
            if is_multi_hot:
                first, last = bounds[first], bounds[last]
            begin = begins[positions[0]]
            copy_run(ids[first:last], values[begin:])
        elif is_multi_hot:
            for i in range(len(rows)):
                begin = begins[positions[i]]
                first = bounds[rows[i]]
                for k in range(bounds[rows[i] + 1] - first):
                    values[begin + k] = ids[first + k]
        else:
            for i in range(len(rows)):
                values[begins[positions[i]]] = ids[rows[i]]


def _numbers(chosen: Int64Array | slice) -> Int64Array:
    return np.arange(chosen.start, chosen.stop) if isinstance(chosen, slice) else chosen


def _chosen(what: str, chosen: Sequence[str] | None, names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the chosen ones of `names`; all where None is given."""
    for name in chosen or ():
        if name not in names:
            raise ConfigError(
                f"{what} {name!r} is not in the prepared data, which has {', '.join(names)}"
            )
        if (chosen or ()).count(name) > 1:
            raise ConfigError(f"{what} {name!r} is chosen more than once")
    return tuple(range(len(names)) if chosen is None else (names.index(name) for name in chosen))


def _record_batches(
    files: list[MappedFile], num_rows: list[int], manifest: PreparedManifest, folder: Path
) -> tuple[list[tuple[int, int]], Int64Array]:
    """Where each record batch of the split lies, and which row is its first.

    Returns:
        (file, number) of each of the R record batches; and their first rows (R + 1,), of which the
        last is the number of rows.
    """
    where: list[tuple[int, int]] = []
    starts = [0]
    for index, (file, rows) in enumerate(zip(files, num_rows, strict=True)):
        for number in range(file.num_record_batches):
            where.append((index, number))
            starts.append(
                starts[-1] + min(manifest.rows_per_batch, rows - number * manifest.rows_per_batch)
            )
    if starts[-1] != sum(num_rows) or sorted(starts) != starts:
        raise DataError(
            f"{folder}: the files hold other rows than the manifest says: prepare the data again"
        )
    return where, np.array(starts, np.int64)
