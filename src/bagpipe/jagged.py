"""What the sparse part of a batch may be, and which of its samples are a rank's.

Only numpy is needed: TorchRec's KeyedJaggedTensor, and anything with its methods, is recognised by
these methods, so TorchRec need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from bagpipe.bags import as_array
from bagpipe.errors import DataError
from bagpipe.types import Jagged

_SPARSE_NAMES = ("sparse", "sparse_features")
_METHODS = ("keys", "values", "lengths", "offsets", "stride")


def as_jagged(sparse: Any) -> Jagged:
    """Makes the sparse part of a batch a `Jagged`; nothing is copied if its tensors are on the CPU.

    Args:
        sparse: A `Jagged`, anything with the methods of TorchRec's KeyedJaggedTensor, or a dict as
            `Jagged.from_dict` takes it.

    Raises:
        DataError: It is something else, its per-sample weights want a gradient, or its keys have
            different batch sizes.
    """
    if isinstance(sparse, Jagged):
        return sparse
    if isinstance(sparse, Mapping):
        return Jagged.from_dict(sparse)
    missing = _missing_methods(sparse)
    if missing:
        raise DataError(
            "the sparse part of a batch must be a bagpipe.Jagged, a KeyedJaggedTensor or a dict, "
            f"is {type(sparse).__name__}, which has no method {missing[0]}()"
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
    values = as_array("a batch's ids", sparse.values())
    offsets = as_array("a batch's offsets", sparse.offsets())
    keys, batch_size = tuple(sparse.keys()), int(sparse.stride())
    is_single_hot = len(values) == len(keys) * batch_size == len(offsets) - 1 and bool(
        (np.diff(offsets) == 1).all()
    )
    return Jagged(
        keys=keys,
        values=values,
        batch_size=batch_size,
        offsets=None if is_single_hot else offsets,
        weights=None if weights is None else as_array("per-sample weights", weights),
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
    check_offsets(batch)


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


def _check_arrays(batch: Jagged) -> None:
    """Refuses arrays that the compiled loops would misread."""
    for name, array in (("ids", batch.values), ("offsets", batch.offsets)):
        if array is not None and (
            array.dtype.kind not in "iu" or not array.dtype.isnative or array.ndim != 1
        ):
            raise DataError(
                f"a batch's {name} must be a 1-D array of integers, are {array.ndim}-D "
                f"{array.dtype}"
            )
    weights = batch.weights
    if weights is not None and not (
        weights.dtype.kind == "f" and weights.shape == batch.values.shape
    ):
        raise DataError(
            "a batch's per-sample weights must be floats, one for each of its "
            f"{len(batch.values):,} ids, are {weights.dtype} of shape {weights.shape}"
        )
    if len(set(batch.keys)) != len(batch.keys):
        raise DataError(f"the batch names a feature twice: {', '.join(batch.keys)}")


def check_offsets(batch: Jagged) -> None:
    """Raises DataError if the offsets do not cut the ids into the batch's bags."""
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
