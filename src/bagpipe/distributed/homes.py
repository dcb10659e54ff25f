"""Stores that the trainers of a host share, and rows of which each host has its own.

With several hosts each has a store of its own, for the rows whose home it is (`bagpipe.topology`).
Only its ranks fetch these rows and write them back (`write_marks`), so nothing travels between
hosts but rows of the exchange, and what an evaluation reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bagpipe.distributed.alone import Alone, Peers
from bagpipe.store import MemoryStore
from bagpipe.store.base import EmbeddingStore, OrderedStore
from bagpipe.store.shared import SharedFiles, SharedMemoryStore
from bagpipe.topology import shards_of
from bagpipe.types import Float32Array, Group, Int64Array


def num_homes(peers: Peers, stores: Sequence[EmbeddingStore]) -> int:
    """Among how many hosts the records are divided, so that each has to read and save its own."""
    return 1 if isinstance(stores[0], OrderedStore) else peers.num_hosts


def shared_store(peers: Peers, group: Group, seed: int) -> EmbeddingStore:
    """A group's store in memory that all ranks of a host share; the first of them makes it."""
    if isinstance(peers, Alone):
        return MemoryStore(group, seed)
    name, files = f"the store of {group.name}", None
    if not peers.is_first_of_host:
        records, touched = peers.share_text(name, None).split()
        files = SharedFiles(records=records, touched=touched)
    store = SharedMemoryStore(group, seed, files, host=peers.host, num_hosts=peers.num_hosts)
    if peers.is_first_of_host:
        peers.share_text(name, f"{store.files.records} {store.files.touched}")
    return store


def fetch_from_homes(
    peers: Peers, store: EmbeddingStore, rows: Int64Array, out: Float32Array
) -> None:
    """As `store.fetch`, for rows (n,) of any host.

    With several hosts all ranks must call it, those without rows too.

    A rank asks the ranks in its own place on each host. It tells them first how many rows it wants,
    so this is for evaluation, not for training.
    """
    if isinstance(peers, Alone) or num_homes(peers, [store]) == 1:
        store.fetch(rows, out)
        return
    num_hosts, num_trainers = peers.num_hosts, peers.num_trainers
    homes = shards_of(rows, num_hosts)
    order = np.argsort(homes, kind="stable")
    num_ranks, once = len(peers.ranks_of_host), [1] * num_trainers
    wanted = torch.zeros(num_trainers, dtype=torch.int64)
    wanted[peers.rank % num_ranks :: num_ranks] = torch.from_numpy(
        np.bincount(homes, minlength=num_hosts)
    )
    name = store.group.name
    with peers.naming(
        f"reading rows of {name} of all hosts, all ranks together (join_reading where one has "
        "none),"
    ):
        peers.do_together(f"reads rows of {name} of all hosts")
        swap = peers.swap
        wanted_from, wanted_by = wanted.tolist(), swap(wanted, once, once).tolist()
        asked = swap(torch.from_numpy(rows[order]), wanted_from, wanted_by).numpy()
        found = np.empty((len(asked), store.group.record_width), np.float32)
        store.fetch(asked, found)
        out[order] = swap(torch.from_numpy(found), wanted_by, wanted_from).numpy()
