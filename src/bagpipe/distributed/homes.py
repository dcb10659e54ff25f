"""Reading rows whose records are divided among the stores of several hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bagpipe.store.base import EmbeddingStore
from bagpipe.topology import shards_of
from bagpipe.types import Float32Array, Int64Array

if TYPE_CHECKING:
    from bagpipe.distributed.communicator import Communicator


def fetch_from_homes(
    communicator: Communicator, store: EmbeddingStore, rows: Int64Array, out: Float32Array
) -> None:
    """As `store.fetch`, for rows (n,) of any host; see `Communicator.fetch_from_homes`.

    A rank asks the ranks in its own place on each host. It tells them first how many rows it wants,
    so this is for evaluation, not for training.
    """
    num_hosts, num_trainers = communicator.num_hosts, communicator.num_trainers
    if num_hosts == 1:
        store.fetch(rows, out)
        return
    homes = shards_of(rows, num_hosts)
    order = np.argsort(homes, kind="stable")
    num_ranks, once = len(communicator.ranks_of_host), [1] * num_trainers
    wanted = torch.zeros(num_trainers, dtype=torch.int64)
    wanted[communicator.rank % num_ranks :: num_ranks] = torch.from_numpy(
        np.bincount(homes, minlength=num_hosts)
    )
    name = store.group.name
    with communicator.naming(
        f"reading rows of {name} of all hosts, all ranks together (join_reading where one has "
        "none),"
    ):
        communicator.do_together(f"reads rows of {name} of all hosts")
        swap = communicator.swap
        wanted_from, wanted_by = wanted.tolist(), swap(wanted, once, once).tolist()
        asked = swap(torch.from_numpy(rows[order]), wanted_from, wanted_by).numpy()
        found = np.empty((len(asked), store.group.record_width), np.float32)
        store.fetch(asked, found)
        out[order] = swap(torch.from_numpy(found), wanted_by, wanted_from).numpy()
