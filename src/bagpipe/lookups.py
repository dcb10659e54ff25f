"""Which lookups of a batch belong to a group, and which rows of its tables they are of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bagpipe.errors import DataError
from bagpipe.jagged import check_ids
from bagpipe.types import Float32Array, Group, Int32Array, Int64Array, Jagged


@dataclass(frozen=True, kw_only=True)
class GroupLookups:
    """Where the lookups of one group's features lie in a batch, and how they form bags."""

    feature_starts: Int64Array  # (F,) into the batch's values
    feature_lengths: Int64Array  # (F,)
    # (F * B + 1,) into the group's own lookups; None: one lookup in every bag
    bag_offsets: Int32Array | None
    # (B * F,) by output row: 1 / bag length for mean pooling; None: nothing to scale
    bag_scales: Float32Array | None
    weights: Float32Array | None  # (L,) per-sample weights, feature-major; None: 1

    @property
    def num_lookups(self) -> int:
        return int(self.feature_lengths.sum())


def group_lookups(group: Group, batch: Jagged) -> GroupLookups:
    """Finds the group's features in a batch.

    Raises:
        DataError: A feature is missing, the arrays are inconsistent, or a batch with per-sample
            weights pools by mean.
    """
    keys = _find_keys(group.name, group.features, tuple(batch.keys))
    check_ids(batch)
    if batch.offsets is None:
        lengths = np.full(len(keys), batch.batch_size, np.int64)
        starts = keys * batch.batch_size
        weights = _weights(group, batch, starts, lengths)
        return GroupLookups(
            feature_starts=starts,
            feature_lengths=lengths,
            bag_offsets=None,
            bag_scales=None,
            weights=weights,
        )
    starts = batch.offsets[keys * batch.batch_size].astype(np.int64)
    lengths = batch.offsets[(keys + 1) * batch.batch_size].astype(np.int64) - starts
    bag_offsets = _bag_offsets(batch, batch.offsets, keys)
    return GroupLookups(
        feature_starts=starts,
        feature_lengths=lengths,
        bag_offsets=bag_offsets,
        bag_scales=_bag_scales(group, bag_offsets),
        weights=_weights(group, batch, starts, lengths),
    )


@lru_cache(maxsize=64)
def _find_keys(group: str, features: tuple[str, ...], keys: tuple[str, ...]) -> Int64Array:
    """Where in `keys` each of a group's features is (F,).

    The result is kept, since all batches of a stream have the same keys.
    """
    position = {key: index for index, key in enumerate(keys)}
    missing = [feature for feature in features if feature not in position]
    if missing:
        raise DataError(
            f"the batch has no feature {missing[0]!r}, which {group} needs; it has "
            f"{', '.join(keys)}"
        )
    return np.array([position[feature] for feature in features], np.int64)


def check_features(
    groups: Sequence[Group], batch: Jagged, others: Collection[str] = frozenset()
) -> None:
    """Checks that every feature of a batch belongs to a table, lest its ids are dropped in silence.

    Args:
        groups: All groups.
        batch: The batch.
        others: Features that are somebody else's.

    Raises:
        DataError: One does not.
    """
    known = dict.fromkeys(feature for group in groups for feature in group.features)
    strangers = [key for key in batch.keys if key not in known and key not in others]
    if strangers:
        raise DataError(
            f"the batch has feature {strangers[0]!r}, which no table looks up; the tables' "
            f"features are {', '.join(known)}: add it to a table's feature_names or leave it out "
            "of the batch"
        )


def group_rows(group: Group, batch: Jagged, lookups: GroupLookups) -> Int64Array:
    """The row of each lookup of the group, feature-major (L,).

    Raises:
        DataError: An id lies outside its table.
    """
    rows = np.empty(lookups.num_lookups, np.int64)
    begin = 0
    for feature, table in enumerate(group.feature_tables):
        start, length = lookups.feature_starts[feature], int(lookups.feature_lengths[feature])
        ids = batch.values[start : start + length]
        outside = np.flatnonzero((ids < 0) | (ids >= group.tables[table].num_embeddings))
        if len(outside):
            raise id_outside_table(group, batch, lookups, feature, int(outside[0]))
        rows[begin : begin + length] = ids
        rows[begin : begin + length] += group.row_offsets[table]
        begin += length
    return rows


def id_outside_table(
    group: Group, batch: Jagged, lookups: GroupLookups, feature: int, lookup: int
) -> DataError:
    """The error for one lookup of one of the group's features."""
    table = group.tables[group.feature_tables[feature]]
    return DataError(
        f"feature {group.features[feature]!r}: id "
        f"{batch.values[lookups.feature_starts[feature] + lookup]} (lookup {lookup} of "
        f"this batch) lies outside table {table.name!r}, whose ids are 0 to "
        f"{table.num_embeddings - 1}"
    )


def _weights(
    group: Group, batch: Jagged, starts: Int64Array, lengths: Int64Array
) -> Float32Array | None:
    """The weights (L,) of the group's lookups, feature-major."""
    if batch.weights is None:
        return None
    means = [
        group.tables[table].name
        for table in group.feature_tables
        if group.tables[table].pooling == "mean"
    ]
    if means:
        raise DataError(
            f"the batch has per-sample weights, but table {means[0]!r} pools by mean: use pooling "
            "= 'sum' with weights"
        )
    parts = [
        batch.weights[start : start + length] for start, length in zip(starts, lengths, strict=True)
    ]
    result = np.concatenate(parts, dtype=np.float32, casting="same_kind")
    if not np.isfinite(result).all():
        lookup = int(np.argmin(np.isfinite(result)))
        feature = int(np.searchsorted(np.cumsum(lengths), lookup, side="right"))
        raise DataError(
            f"feature {group.features[feature]!r}: a per-sample weight is {result[lookup]}, must "
            "be finite"
        )
    return result


def _bag_offsets(batch: Jagged, offsets: npt.NDArray[np.integer], keys: Int64Array) -> Int32Array:
    """Where each bag of these features begins (F * B + 1,), of their own lookups."""
    if (np.diff(keys) == 1).all():  # a run, as of a group that has all features
        begin, end = keys[0] * batch.batch_size, (keys[-1] + 1) * batch.batch_size
        own: npt.NDArray[np.integer] = offsets[begin : end + 1] - offsets[begin]
        return own.astype(np.int32, copy=False)
    bag_lengths = np.diff(offsets).reshape(len(batch.keys), batch.batch_size)[keys]
    bag_offsets = np.zeros(bag_lengths.size + 1, np.int32)
    np.cumsum(bag_lengths, out=bag_offsets[1:])
    return bag_offsets


def _bag_scales(group: Group, bag_offsets: Int32Array) -> Float32Array | None:
    """What each bag's sum is multiplied by (B * F,), by output row.

    That is 1 / length for features that pool by mean, and 1 for others.
    """
    is_mean = np.array([group.tables[table].pooling == "mean" for table in group.feature_tables])
    if not is_mean.any():
        return None
    bag_lengths = np.diff(bag_offsets).reshape(len(is_mean), -1)
    scales = np.where(is_mean[:, None], 1.0 / np.maximum(bag_lengths, 1), 1.0)
    return np.ascontiguousarray(scales.T, dtype=np.float32).reshape(-1)
