"""Refuses a batch that would train on nonsense.

That is a batch with numbers that are not finite, ids outside their table or offsets that don't fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bagpipe.data.base import Batch, FeatureSpec
from bagpipe.errors import DataError
from bagpipe.jagged import check_offsets
from bagpipe.native.jit import jit
from bagpipe.types import Float32Array, Int64Array, Jagged

_EXPONENT = np.int32(0x7F800000)
"""All its bits are set in float32 infinities and NaNs, and in nothing else."""


def check_batch(
    batch: Batch,
    features: Sequence[FeatureSpec],
    *,
    where: str,
    dense_names: Sequence[str] = (),
    label_names: Sequence[str] = (),
) -> None:
    """Raises DataError for the first fault of a batch.

    Labels, dense features and weights must be finite, and weights 0 or more. Every key must have a
    table, and ``0 <= id < num_embeddings``. Offsets must start at 0, never fall and end at the
    number of ids. The check costs one pass over the batch.

    Args:
        batch: The batch as it was read.
        features: The features that the tables know.
        where: Which batch it is, for the message, e.g. ``"batch 7 of train"``.
        dense_names: Names of the dense features, as far as they are known.
        label_names: Names of the labels, where there are several.

    Raises:
        DataError: The batch has a fault; the message says where.
    """
    _check_finite(batch, where, dense_names, label_names)
    check_jagged(batch.sparse, features, where=where)


def check_jagged(sparse: Jagged, features: Sequence[FeatureSpec], *, where: str) -> None:
    """Checks the ids and offsets of a batch as `check_batch` does."""
    offsets = _feature_offsets(sparse, where)
    by_name = {feature.name: feature for feature in features}
    sizes = np.empty(len(sparse.keys), np.int64)
    for index, key in enumerate(sparse.keys):
        spec = by_name.get(key)
        if spec is None:
            raise DataError(
                f"{where}: feature {key!r} has no table; tables exist for "
                f"{', '.join(by_name) or 'no feature'}"
            )
        sizes[index] = spec.num_embeddings
    # One compiled call, and no look at the ids here: batches are read by threads that would take
    # turns for the GIL.
    bad = _first_bad_feature(sparse.values, offsets, sizes)
    if bad >= 0:
        ids = sparse.values[offsets[bad] : offsets[bad + 1]]
        _refuse_id(sparse, bad, by_name[sparse.keys[bad]], ids, where)


def _check_finite(
    batch: Batch, where: str, dense_names: Sequence[str], label_names: Sequence[str]
) -> None:
    if not _are_finite(batch.labels.reshape(-1)):
        labels = batch.labels.reshape(batch.batch_size, -1)
        sample, column = (int(part) for part in np.argwhere(~np.isfinite(labels))[0])
        name = f" {label_names[column]!r}" if batch.labels.ndim > 1 else ""
        raise DataError(
            f"{where}: the label{name} of sample {sample} is {labels[sample, column]}, must be "
            "finite"
        )
    weights = batch.weights
    if weights is not None and (not _are_finite(weights) or (weights < 0).any()):
        sample = int(np.argmin(np.isfinite(weights) & (weights >= 0)))
        raise DataError(
            f"{where}: the weight of sample {sample} is {weights[sample]}, must be finite and 0 or "
            "more"
        )
    if not _are_finite(batch.dense.reshape(-1)):
        sample, column = (int(part) for part in np.argwhere(~np.isfinite(batch.dense))[0])
        name = repr(dense_names[column]) if column < len(dense_names) else str(column)
        raise DataError(
            f"{where}: dense feature {name} of sample {sample} is {batch.dense[sample, column]}, "
            "must be finite: replace or drop such values before training"
        )


@jit
def _are_finite(numbers: Float32Array) -> bool:
    """Whether all numbers (n,) are finite, judged by their exponents."""
    most = np.int32(0)
    for bits in numbers.view(np.int32):
        most = max(most, bits & _EXPONENT)
    return bool(most < _EXPONENT)


@jit
def _first_bad_feature(
    ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], sizes: Int64Array
) -> int:
    """The first feature with an id that is negative or not below its size, or -1."""
    for feature in range(len(sizes)):
        part = ids[offsets[feature] : offsets[feature + 1]]
        if len(part) > 0:
            least = most = part[0]
            for index in range(len(part)):
                least, most = min(least, part[index]), max(most, part[index])
            if least < 0 or most >= sizes[feature]:
                return feature
    return -1


def _feature_offsets(sparse: Jagged, where: str) -> npt.NDArray[np.integer]:
    """Where the ids of each feature begin, (F + 1,)."""
    try:
        check_offsets(sparse)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if sparse.offsets is None:
        return np.arange(len(sparse.keys) + 1) * sparse.batch_size
    offsets = sparse.offsets
    return (
        offsets[:: sparse.batch_size]
        if sparse.batch_size
        else np.zeros(len(sparse.keys) + 1, np.int64)
    )


def _refuse_id(
    sparse: Jagged, index: int, spec: FeatureSpec, ids: npt.NDArray[np.integer], where: str
) -> None:
    position = int(np.argmax((ids < 0) | (ids >= spec.num_embeddings)))
    sample = position
    if sparse.offsets is not None:
        bags = sparse.offsets[index * sparse.batch_size : (index + 1) * sparse.batch_size + 1]
        sample = int(np.searchsorted(bags - bags[0], position, side="right")) - 1
    raise DataError(
        f"{where}: feature {spec.name!r} of sample {sample} has id {int(ids[position])}, but table "
        f"{spec.table!r} holds ids 0 to {spec.num_embeddings - 1}: raise its num_embeddings or map "
        "the ids into it"
    )
