"""What turns raw values into numbers that a model reads, in numpy alone.

Preparing and serving share it, and serving loads no compiled loops.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from bagpipe.types import Float32Array, Int32Array, Int64Array

_FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND: Final = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def hash_ids(keys: Int64Array, num_embeddings: int | Int64Array) -> Int32Array:
    """The ids ``mix64(key) % num_embeddings`` of keys, of their shape; see `bagpipe.data.hashing`.

    `num_embeddings` is that of all keys, or of each in an array that fits theirs.
    """
    mixed = keys.astype(np.uint64)
    mixed = (mixed ^ (mixed >> _S30)) * _FIRST
    mixed = (mixed ^ (mixed >> _S27)) * _SECOND
    mixed ^= mixed >> _S31
    ids: Int32Array = (mixed % np.asarray(num_embeddings, np.uint64)).astype(np.int32)
    return ids


def log_transform(dense: Float32Array) -> Float32Array:
    """``log(max(x, 0) + 1)`` in float32, as the DLRM reference does.

    Source: facebookresearch/dlrm, data_utils.py.
    """
    transformed: Float32Array = np.log(np.maximum(dense, np.float32(0)) + np.float32(1))
    return transformed
