"""Reads a batch's rows straight from the stores, as evaluation does, and changes nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.moved import to_device
from bagpipe.lookups import group_lookups, group_rows
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Jagged


def read_pooled(store: EmbeddingStore, batch: Jagged, device: torch.device) -> Tensor:
    """The pooled embeddings of the store's group, (B, F, D), on `device`."""
    group = store.group
    lookups = group_lookups(group, batch)
    rows, inverse = np.unique(group_rows(group, batch, lookups), return_inverse=True)
    records = np.empty((len(rows), group.record_width), np.float32)
    store.fetch(rows, records)
    cache = DeviceCache(group=group, num_slots=len(rows), device=device)
    cache.fill(
        to_device(np.arange(len(rows), dtype=np.int32), device),
        torch.from_numpy(records).to(device),
    )
    plan = DevicePlan.of_lookups(
        lookups,
        inverse.astype(np.int32),
        batch_size=batch.batch_size,
        num_features=len(group.features),
        device=device,
    )
    return cache.lookup(plan)
