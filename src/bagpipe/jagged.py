"""What the sparse part of a batch may be, and which of its lookups belong to a group.

Only numpy is needed: TorchRec's KeyedJaggedTensor, and anything with its methods, is recognised by
these methods, so TorchRec need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from bagpipe.errors import DataError
from bagpipe.types import Float32Array, Group, Int32Array, Int64Array, Jagged

_SPARSE_NAMES = ("sparse", "sparse_features")
_METHODS = ("keys", "values", "lengths", "offsets", "stride")


def as_jagged(sparse: Any) -> Jagged:
    """Makes the sparse part of a batch a `Jagged`; nothing is copied if its tensors are on the CPU.

    Args:
        sparse: A `Jagged`, or anything with the methods of TorchRec's KeyedJaggedTensor.

    Raises:
        DataError: It is something else, its per-sample weights want a gradient, or its keys have
            different batch sizes.
    """
    if isinstance(sparse, Jagged):
        return sparse
    missing = _missing_methods(sparse)
    if missing:
        raise DataError(
            "the sparse part of a batch must be a bagpipe.types.Jagged or a KeyedJaggedTensor, is "
            f"{type(sparse).__name__}, which has no method {missing[0]}()"
        )
    weights = (
        sparse.weights_or_none() if callable(getattr(sparse, "weights_or_none", None)) else None
    )
    if getattr(weights, "requires_grad", False):
        raise DataError(
            "the KeyedJaggedTensor's per-sample weights want a gradient, which is not computed: "
            "detach them"
        )
    if (
        callable(getattr(sparse, "variable_stride_per_key", None))
        and sparse.variable_stride_per_key()
    ):
        raise DataError(
            "the KeyedJaggedTensor has another batch size for each key: give every key the same "
            "number of samples"
        )
    values, offsets = _to_numpy(sparse.values()), _to_numpy(sparse.offsets())
    keys, batch_size = tuple(sparse.keys()), int(sparse.stride())
    is_single_hot = len(values) == len(keys) * batch_size == len(offsets) - 1 and bool(
        (np.diff(offsets) == 1).all()
    )
    return Jagged(
        keys=keys,
        values=values,
        batch_size=batch_size,
        offsets=None if is_single_hot else offsets,
        weights=None
        if weights is None
        else _to_numpy(weights.float() if hasattr(weights, "float") else weights),
    )


def is_keyed(value: Any) -> bool:
    """Whether it has the methods of a KeyedJaggedTensor."""
    return not _missing_methods(value)


def _missing_methods(value: Any) -> list[str]:
    return [name for name in _METHODS if not callable(getattr(value, name, None))]


def find_sparse(batch: Any) -> Any:
    """The jagged part of a batch.

    It is the batch itself, or its attribute or key `sparse` or `sparse_features`.

    Raises:
        DataError: The batch has none.
    """
    if isinstance(batch, Jagged) or callable(getattr(batch, "offsets", None)):
        return batch
    for name in _SPARSE_NAMES:
        if isinstance(batch, dict) and name in batch:
            return batch[name]
        if hasattr(batch, name):
            return getattr(batch, name)
    raise DataError(
        f"a batch of type {type(batch).__name__} has no attribute or key "
        f"{' or '.join(_SPARSE_NAMES)}: tell bagpipe.lookahead where its jagged ids are, for "
        "example sparse=lambda batch: batch[1]"
    )


def same_ids(one: Jagged, other: Jagged) -> bool:
    """Whether two batches hold the same features, ids and weights."""
    pairs = (one.values, other.values), (one.weights, other.weights)
    same = one.keys == other.keys and all(
        mine is its or np.array_equal(mine, its)  # type: ignore[arg-type]
        for mine, its in pairs
    )
    return same and (one.offsets is other.offsets or np.array_equal(_offsets(one), _offsets(other)))


def _offsets(ids: Jagged) -> npt.NDArray[Any]:
    """The offsets, which bags of one id each may leave out."""
    return np.arange(len(ids.values) + 1) if ids.offsets is None else ids.offsets


def is_share(ids: Jagged, batch: Jagged, rank: int, num_trainers: int) -> bool:
    """Whether `ids` are one rank's samples of a global batch, as `share_of` takes them.

    Bags of one id are compared without a copy.

    Raises:
        DataError: The arrays are inconsistent.
    """
    if batch.offsets is not None or ids.offsets is not None:
        return same_ids(ids, share_of(batch, rank, num_trainers))
    check_ids(batch)
    check_ids(ids)
    begin, end = share_bounds(batch.batch_size, rank, num_trainers)
    shape = len(batch.keys), batch.batch_size
    pairs = (ids.values, batch.values), (ids.weights, batch.weights)
    return ids.keys == batch.keys and all(
        mine is its
        if mine is None or its is None
        else _is_span(mine, its.reshape(shape)[:, begin:end])
        for mine, its in pairs
    )


def _is_span(array: npt.NDArray[Any], span: npt.NDArray[Any]) -> bool:
    return array.size == span.size and np.array_equal(array.reshape(span.shape), span)


def hash_ids(batch: Jagged) -> str:
    """A hash of a batch's features, ids and weights."""
    hasher = xxhash.xxh3_128(repr((batch.keys, batch.batch_size)).encode())
    for array in (batch.values, batch.offsets, batch.weights):
        if array is not None:
            hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def check_ids(batch: Jagged) -> None:
    """Checks that the arrays of a batch fit together.

    Raises:
        DataError: They don't.
    """
    _check_arrays(batch)
    _check_offsets(batch)


def share_bounds(batch_size: int, rank: int, num_trainers: int) -> tuple[int, int]:
    """The first sample of a rank's share of a global batch, and the end of it.

    Shares differ by at most one sample.
    """
    return rank * batch_size // num_trainers, (rank + 1) * batch_size // num_trainers


def share_of(batch: Jagged, rank: int, num_trainers: int) -> Jagged:
    """One rank's samples of a global batch.

    Raises:
        DataError: The arrays are inconsistent.
    """
    check_ids(batch)
    begin, end = share_bounds(batch.batch_size, rank, num_trainers)
    if batch.offsets is None:
        shape = len(batch.keys), batch.batch_size
        return Jagged(
            keys=batch.keys,
            values=batch.values.reshape(shape)[:, begin:end].ravel(),
            batch_size=end - begin,
            weights=None
            if batch.weights is None
            else batch.weights.reshape(shape)[:, begin:end].ravel(),
        )
    firsts = (
        batch.offsets[begin : -1 : batch.batch_size]
        if batch.batch_size
        else np.zeros(len(batch.keys), np.int64)
    )
    lasts = (
        batch.offsets[end :: batch.batch_size][: len(batch.keys)] if batch.batch_size else firsts
    )
    lengths = np.diff(batch.offsets).reshape(len(batch.keys), batch.batch_size)[:, begin:end]
    spans = list(zip(firsts.tolist(), lasts.tolist(), strict=True))
    return Jagged(
        keys=batch.keys,
        values=np.concatenate([batch.values[first:last] for first, last in spans]),
        batch_size=end - begin,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        weights=None
        if batch.weights is None
        else np.concatenate([batch.weights[first:last] for first, last in spans]),
    )


def share_batch(batch: Any, rank: int, num_trainers: int) -> Any:
    """One rank's samples of a global batch.

    Args:
        batch: Jagged ids, or anything with a method ``share(rank, num_trainers)``.
        rank: The rank of the trainer.
        num_trainers: How many trainers share the batch.

    Raises:
        DataError: The batch is something else.
    """
    if isinstance(batch, Jagged):
        return share_of(batch, rank, num_trainers)
    if hasattr(batch, "share"):
        return batch.share(rank, num_trainers)
    raise DataError(
        f"a batch of type {type(batch).__name__} has no method share(rank, num_trainers): tell "
        "bagpipe.lookahead how to take a trainer's samples from a global batch, "
        "share=lambda batch, rank, num_trainers: ..."
    )


def _to_numpy(tensor: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.asarray(
        tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else tensor
    )
    return array


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
    bag_lengths = np.diff(batch.offsets).reshape(len(batch.keys), batch.batch_size)[keys]  # (F, B)
    bag_offsets = np.zeros(bag_lengths.size + 1, np.int32)
    np.cumsum(bag_lengths, out=bag_offsets[1:])
    return GroupLookups(
        feature_starts=starts,
        feature_lengths=lengths,
        bag_offsets=bag_offsets,
        bag_scales=_bag_scales(group, bag_lengths),
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


def check_features(groups: Sequence[Group], batch: Jagged) -> None:
    """Checks that every feature of a batch belongs to a table, lest its ids are dropped in silence.

    Raises:
        DataError: One does not.
    """
    known = dict.fromkeys(feature for group in groups for feature in group.features)
    strangers = [key for key in batch.keys if key not in known]
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


def _check_arrays(batch: Jagged) -> None:
    """Refuses arrays that the compiled loops would misread."""
    for name, array in (("ids", batch.values), ("offsets", batch.offsets)):
        if array is None and name == "offsets":
            continue
        if (
            not isinstance(array, np.ndarray)
            or array.dtype.kind not in "iu"
            or not array.dtype.isnative
            or array.ndim != 1
        ):
            found = (
                f"{array.ndim}-D {array.dtype}"
                if isinstance(array, np.ndarray)
                else type(array).__name__
            )
            raise DataError(f"a batch's {name} must be a 1-D array of integers, are {found}")
    weights, is_array = batch.weights, isinstance(batch.weights, np.ndarray)
    if weights is not None and not (
        is_array and weights.dtype.kind == "f" and weights.shape == batch.values.shape
    ):
        found = f"{weights.dtype} of shape {weights.shape}" if is_array else type(weights).__name__
        raise DataError(
            "a batch's per-sample weights must be floats, one for each of its "
            f"{len(batch.values):,} ids, are {found}"
        )
    if len(set(batch.keys)) != len(batch.keys):
        raise DataError(f"the batch names a feature twice: {', '.join(batch.keys)}")


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


def _check_offsets(batch: Jagged) -> None:
    num_bags, num_lookups = batch.batch_size * len(batch.keys), len(batch.values)
    offsets = batch.offsets
    if offsets is None:
        if num_lookups != num_bags:
            raise DataError(
                f"the batch has {num_lookups:,} ids for {len(batch.keys)} features x "
                f"{batch.batch_size:,} samples: without offsets each bag holds exactly one id"
            )
    elif (
        len(offsets) != num_bags + 1
        or offsets[0] != 0
        or offsets[-1] != num_lookups
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise DataError(
            f"the batch's offsets must be {num_bags + 1:,} non-decreasing numbers from 0 to "
            f"{num_lookups:,}, are {len(offsets):,} from {offsets[:1].tolist()} to "
            f"{offsets[-1:].tolist()}"
        )


def _bag_scales(group: Group, bag_lengths: npt.NDArray[np.integer]) -> Float32Array | None:
    """What each bag's sum is multiplied by (B * F,), by output row.

    That is 1 / length for features that pool by mean, and 1 for others. `bag_lengths` is (F, B).
    """
    is_mean = np.array([group.tables[table].pooling == "mean" for table in group.feature_tables])
    if not is_mean.any():
        return None
    scales = np.where(is_mean[:, None], 1.0 / np.maximum(bag_lengths, 1), 1.0)
    return np.ascontiguousarray(scales.T, dtype=np.float32).reshape(-1)
