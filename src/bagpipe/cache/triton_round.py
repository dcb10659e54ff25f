"""Rounding by chance on CUDA: `bagpipe.store.half.by_chance`, bit for bit.

`bagpipe.cache.weights` says which random bits a weight gets.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import device_function
from bagpipe.cache.weights import COLUMNS_A_BLOCK, ROUNDING

_COLUMNS_A_BLOCK = tl.constexpr(COLUMNS_A_BLOCK)
_ROUNDING = tl.constexpr(ROUNDING - (1 << 32))  # as int32
_ROUNDS = tl.constexpr(10)


@device_function
def round_by_chance(
    values: tl.tensor,
    unique: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    IS_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """`values` (ROWS, COLUMNS) float32 rounded to 16 bits, as unsigned integers.

    `unique` (ROWS,) are the places of the tile's rows among the batch's unique rows.
    """
    chances = _chances(unique, step, seed_low, seed_high, ROWS, COLUMNS)
    bits = values.to(tl.uint32, bitcast=True)
    is_nan = values != values
    if IS_BF16:
        halves = tl.where(is_nan, bits >> 16 | 0x40, (bits + chances) >> 16)
    else:
        size = bits & 0x7FFFFFFF
        is_small = size < 0x38800000
        normal = tl.minimum((size - 0x38000000 + (chances >> 3)) >> 13, 0x7C00)
        steps = tl.where(is_small, tl.abs(values) * 16777216.0, 0.0)
        whole = steps.to(tl.int32)
        is_up = chances.to(tl.float32) * (1.0 / 65536.0) < steps - whole.to(tl.float32)
        small = (whole + is_up.to(tl.int32)).to(tl.uint32)
        halves = tl.where(is_nan, 0x7E00, tl.where(is_small, small, normal)) | (bits >> 16 & 0x8000)
    return halves.to(tl.uint16)


@device_function
def _chances(
    unique: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """16 random bits for each weight, (ROWS, COLUMNS) uint32."""
    BLOCKS: tl.constexpr = COLUMNS // _COLUMNS_A_BLOCK
    zero = tl.zeros((ROWS, BLOCKS), tl.int32)
    seed = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | seed_low.to(
        tl.uint32, bitcast=True
    ).to(tl.uint64)
    block = tl.arange(0, BLOCKS)[None, :]
    first, second, third, fourth = tl.philox(
        seed, zero + unique[:, None], zero + step, zero + block, zero + _ROUNDING, _ROUNDS
    )
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (ROWS, BLOCKS * 4))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))
