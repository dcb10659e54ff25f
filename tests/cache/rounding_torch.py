"""Rounding by chance in plain torch, operation for operation what the kernels do."""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.cache.weights import COLUMNS_A_BLOCK, ROUNDING

_MASK = 0xFFFFFFFF


def round_by_chance(weights: Tensor, dtype: torch.dtype, *, seed: int, step: int) -> Tensor:
    """`weights` (U, D) float32 of the batch's unique rows, in bfloat16 or float16."""
    num_uniques, dim = weights.shape
    chances = _chances(num_uniques, dim, seed, step).to(weights.device)
    bits = weights.view(torch.int32).long() & _MASK
    if dtype == torch.bfloat16:
        halves = torch.where(weights.isnan(), bits >> 16 | 0x40, (bits + chances) >> 16)
    else:
        size = bits & 0x7FFFFFFF
        normal = ((size - 0x38000000 + (chances >> 3)) >> 13).clamp(max=0x7C00)
        steps = torch.where(size < 0x38800000, weights.abs() * 2.0**24, 0.0)
        whole = steps.long()
        small = whole + (chances.float() / 65536.0 < steps - whole.float())
        halves = torch.where(size < 0x38800000, small, normal)
        halves = torch.where(weights.isnan(), 0x7E00, halves) | (bits >> 16 & 0x8000)
    return (halves - (halves >> 15 << 16)).to(torch.int16).view(dtype)


def _chances(num_uniques: int, dim: int, seed: int, step: int) -> Tensor:
    """16 random bits for each weight, (num_uniques, dim) int64.

    `bagpipe.cache.weights.COLUMNS_A_BLOCK` says which.
    """
    unique = torch.arange(num_uniques)[:, None]
    block = torch.arange(-(-dim // COLUMNS_A_BLOCK))[None, :]
    zero = torch.zeros(num_uniques, block.shape[1], dtype=torch.int64)
    words = torch.stack(
        _philox(seed, zero + unique, zero + step, zero + block, zero + ROUNDING), dim=2
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=3)  # (num_uniques, blocks, 4, 2)
    return halves.flatten(1)[:, :dim]


def _philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Philox4x32-10, as `bagpipe.store.init.philox`; int64, whose products wrap around."""
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = product0 >> 32 & _MASK, product1 >> 32 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]
