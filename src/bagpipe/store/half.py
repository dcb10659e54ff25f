"""Weights of 16 bits: from and to float32, in integers, so that every machine gives the same bits.

A 16-bit number is the lower half of a `np.uint32`. To round "by chance" is to add random bits below
the last place that is kept, so that a value a third of the way between two neighbours becomes the
upper one in a third of all cases. There are 16 such bits, 13 with fp16's normal numbers; what a
value has below them is lost. A value too large for fp16 becomes infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.types import DataType

CODES: Final[Mapping[DataType, int]] = {"fp32": 0, "bf16": 1, "fp16": 2}
"""What compiled loops call a data type."""
FP32, BF16 = CODES["fp32"], CODES["bf16"]

_INFINITY = 0x7F800000
_SMALLEST_NORMAL = 0x38800000  # 2**-14: fp16's steps do not get smaller below it
_FP16_INFINITY, _FP16_NAN = 0x7C00, 0x7E00


@jit
def widen(half: np.uint32, code: int) -> np.float32:
    """The float32 with the value of a 16-bit number of the data type `code`."""
    bits = np.int64(half) & 0xFFFF
    if code == BF16:
        return np.uint32(bits << 16).view(np.float32)
    sign, exponent, mantissa = (bits & 0x8000) << 16, (bits >> 10) & 31, bits & 1023
    if exponent == 0:
        # Subnormal or zero: a whole number of fp16's smallest steps, which float32 holds exactly.
        size = np.int64(np.float32(mantissa * 2.0**-24).view(np.uint32))
    else:
        # 112 is the difference of the exponents' biases, 127 - 15.
        size = (_INFINITY if exponent == 31 else (exponent + 112) << 23) | mantissa << 13
    return np.uint32(sign | size).view(np.float32)


@jit
def nearest(value: np.float32, code: int) -> np.uint32:
    """`value` rounded to the nearest 16-bit number, halfway cases to the even one."""
    bits = np.int64(np.float32(value).view(np.uint32))
    if code == BF16:
        return _cut(bits, 0x7FFF + (bits >> 16 & 1), code)
    if bits & 0x7FFFFFFF < _SMALLEST_NORMAL:
        return np.uint32(bits >> 16 & 0x8000 | np.int64(np.rint(_in_smallest_steps(value))))
    return _cut(bits, 0xFFF + (bits >> 13 & 1), code)


@jit
def by_chance(value: np.float32, chance: np.int64, code: int) -> np.uint32:
    """`value` rounded up or down by `chance`, an integer of 16 random bits."""
    bits = np.int64(np.float32(value).view(np.uint32))
    if code == BF16:
        return _cut(bits, chance, code)
    if bits & 0x7FFFFFFF < _SMALLEST_NORMAL:
        steps = _in_smallest_steps(value)
        whole = np.int64(steps)
        return np.uint32(
            bits >> 16 & 0x8000
            | whole + (np.float32(chance) / np.float32(65536.0) < steps - np.float32(whole))
        )
    return _cut(bits, chance >> 3, code)


@jit
def _in_smallest_steps(value: np.float32) -> np.float32:
    """The size of `value` in fp16's smallest steps, of 2**-24."""
    return np.float32(abs(value)) * np.float32(16777216.0)


@jit
def _cut(bits: np.int64, addend: np.int64 | int, code: int) -> np.uint32:
    """What 16 bits keep of a float32's `bits`, after `addend` is added to what they drop."""
    size = bits & 0x7FFFFFFF
    is_nan = size > _INFINITY
    if code == BF16:
        return np.uint32(bits >> 16 | 0x40 if is_nan else bits + addend >> 16)
    sign, half = bits >> 16 & 0x8000, size - 0x38000000 + addend >> 13
    if is_nan:
        return np.uint32(sign | _FP16_NAN)
    return np.uint32(sign | (half if half < _FP16_INFINITY else _FP16_INFINITY))
