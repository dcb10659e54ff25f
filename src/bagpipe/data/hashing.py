"""Counter-based randomness, compiled; `bagpipe.data.transforms` hashes ids by the same mixer.

It is the finaliser of SplitMix64 with David Stafford's constants
(variant 13). Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA
2014). The mixer is a bijection of 64-bit numbers, so distinct keys collide only in the modulo.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bagpipe.native.jit import jit
from bagpipe.types import Int64Array

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_UNIT = 2.0**-53


@jit
def mix64(x: np.uint64) -> np.uint64:
    """Scrambles 64 bits, one to one."""
    x = (x ^ (x >> _S30)) * _FIRST
    x = (x ^ (x >> _S27)) * _SECOND
    return x ^ (x >> _S31)


@jit
def stream(seed: np.uint64, number: np.uint64) -> np.uint64:
    """The state of the `number`-th independent stream of `seed`."""
    return mix64(seed + (number + np.uint64(1)) * GOLDEN)


@jit
def unit(state: np.uint64) -> float:
    """A float64 in [0, 1) from the upper 53 bits."""
    return float(state >> _S11) * _UNIT


@jit
def hashed_units(numbers: Int64Array, seed: int) -> npt.NDArray[np.float64]:
    """A float64 in [0, 1) for each number (n,), from it and the seed alone."""
    units = np.empty(len(numbers), np.float64)
    base = mix64(np.uint64(seed) + GOLDEN)
    for i in range(len(numbers)):
        units[i] = unit(stream(base, np.uint64(numbers[i])))
    return units
