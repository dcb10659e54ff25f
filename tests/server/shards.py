"""Shards over memory stores."""

from __future__ import annotations

import numpy as np
from tests.soon import TIMEOUT_S
from tests.store_contract import SEED, make_group

from bagpipe.server.shard import Shard
from bagpipe.server.wire import Header, What
from bagpipe.store import NO_STEPS, MemoryStore, Steps
from bagpipe.store.cuts import CutStore
from bagpipe.topology import shards_of
from bagpipe.types import Float32Array, Int64Array


def make_store(number: int = 0, num_shards: int = 1) -> CutStore:
    """The contract's group in memory."""
    return CutStore(MemoryStore(make_group(), SEED, shard=number, num_shards=num_shards))


def make_shard(
    number: int = 0,
    num_shards: int = 1,
    *,
    store: CutStore | None = None,
    wait_timeout_s: float = TIMEOUT_S,
    apply_timeout_s: float = TIMEOUT_S,
) -> Shard:
    """A shard of the contract's group, which is its number 0."""
    store = store or make_store(number, num_shards)
    return Shard(
        [store.group],
        SEED,
        number,
        num_shards,
        [store],
        wait_timeout_s=wait_timeout_s,
        apply_timeout_s=apply_timeout_s,
    )


def header_of(
    shard: Shard,
    epoch: int = 1,
    *,
    what: What = What.WRITE,
    rank: int = 0,
    group: int = 0,
    steps: Steps = NO_STEPS,
) -> Header:
    """A header for the shard as it lives now."""
    return Header(
        what=what, epoch=epoch, instance=shard.instance, rank=rank, group=group, steps=steps
    )


def own_rows(shard: Shard, *, of: int = 1_300) -> Int64Array:
    """The rows below `of` that are the shard's."""
    rows = np.arange(of)
    return rows[shards_of(rows, shard.num_shards) == shard.number]


def fetched(shard: Shard, header: Header, rows: Int64Array) -> Float32Array:
    """What a fetch gives."""
    out = np.full((len(rows), shard.groups[header.group].record_width), np.nan, np.float32)
    shard.fetch(header, rows, out)
    return out
