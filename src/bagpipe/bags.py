"""Bags of ids as users write them, in lists, arrays and tensors, made flat arrays for `Jagged`.

Tensors are known by their methods, so that torch is not loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bagpipe.errors import DataError

Array: TypeAlias = npt.NDArray[Any]


def as_array(what: str, values: Any, *, of_empty: type[np.generic] = np.int64) -> Array:
    """Makes an array of a list or a tensor; nothing is copied if it is a tensor on the CPU.

    Args:
        what: What the message of an error calls the values.
        values: An array, or something to make one of.
        of_empty: The type that an empty list gets.

    Raises:
        DataError: They can't be one, or want a gradient.
    """
    if getattr(values, "requires_grad", False):
        raise DataError(f"{what} want a gradient, which is not computed: detach them")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16; every one of them is a float32
        values = (values.float() if values.dtype.is_floating_point else values).numpy()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} can't be made an array: {error}") from error
    return array.astype(of_empty) if array.shape == (0,) and isinstance(values, list) else array


def flatten(what: str, bags: Any) -> tuple[Array, npt.NDArray[np.int64]]:
    """Returns the bags' items in a row (n,) and how many each bag has (B,).

    Args:
        what: What the message of an error calls them.
        bags: A list that has for each sample an item, a list of items, or None; an array or tensor
            (B,) or (B, L); or a TorchRec JaggedTensor.

    Raises:
        DataError: They are something else.
    """
    if callable(getattr(bags, "values", None)) and callable(getattr(bags, "lengths", None)):
        return as_array(what, bags.values()), as_array(what, bags.lengths()).astype(np.int64)
    if isinstance(bags, list | tuple) and any(_is_bag(bag) for bag in bags):
        arrays = [np.atleast_1d(as_array(what, [] if bag is None else bag)) for bag in bags]
        deep = [array.ndim for array in arrays if array.ndim > 1]
        if deep:
            raise DataError(f"{what}: a sample has a {deep[0]}-D array, must have a 1-D one")
        lengths = np.array([len(array) for array in arrays], np.int64)
        # an empty bag has no type of its own
        full = [array for array in arrays if len(array)] or [np.empty(0, np.int64)]
        return np.concatenate(full), lengths
    array = as_array(what, list(bags) if isinstance(bags, tuple) else bags)
    if array.ndim not in (1, 2):
        raise DataError(
            f"{what} are {array.ndim}-D, must be one for each sample, or (samples, ids of each)"
        )
    per_bag = 1 if array.ndim == 1 else array.shape[1]
    return array.reshape(-1), np.full(len(array), per_bag, np.int64)


def join(features: Mapping[str, Any], weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the fields of the `Jagged` that has these bags by feature.

    Raises:
        DataError: A feature's bags are none, features have different numbers of samples, or the
            weights are of other features or bags.
    """
    parts = {name: flatten(f"feature {name!r}: its ids", bags) for name, bags in features.items()}
    if not parts:
        raise DataError("a batch without features was given: name at least one")
    first, batch_size = next((name, len(lengths)) for name, (_, lengths) in parts.items())
    for name, (_, lengths) in parts.items():
        if len(lengths) != batch_size:
            raise DataError(
                f"feature {name!r} has {len(lengths):,} samples and {first!r} has "
                f"{batch_size:,}: give each sample a bag of every feature, an empty one too"
            )
    lengths = np.concatenate([lengths for _, lengths in parts.values()])
    return {
        "keys": tuple(parts),
        "values": np.concatenate([values for values, _ in parts.values() if len(values)])
        if lengths.any()
        else np.empty(0, np.int64),
        "batch_size": batch_size,
        "offsets": offsets_of(lengths),
        "weights": None if weights is None else _join_weights(weights, parts),
    }


def offsets_of(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Where each bag begins, and the end of the last; None where each bag has one item."""
    if bool((lengths == 1).all()):
        return None
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _join_weights(
    weights: Mapping[str, Any], parts: Mapping[str, tuple[Array, npt.NDArray[np.int64]]]
) -> Array:
    if set(weights) != set(parts):
        raise DataError(
            f"per-sample weights are given for the features {', '.join(weights) or 'none'}, ids "
            f"for {', '.join(parts)}: give both for the same"
        )
    joined: list[Array] = []
    for name, (_, lengths) in parts.items():
        values, of_bags = flatten(f"feature {name!r}: its per-sample weights", weights[name])
        if not np.array_equal(of_bags, lengths):
            raise DataError(f"feature {name!r}: give each of its ids one per-sample weight")
        joined.append(values.astype(np.float32, copy=False))
    return np.concatenate(joined)


def _is_bag(item: Any) -> bool:
    return item is None or isinstance(item, list | tuple) or getattr(item, "ndim", 0) > 0
