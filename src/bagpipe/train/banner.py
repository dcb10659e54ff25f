"""What a run says of itself before its first step: where it runs, what it trains, and its cache."""

from __future__ import annotations

import platform

import numpy as np
import torch

from bagpipe.oracle.dry_run_view import format_bytes, format_count
from bagpipe.train.build import Run
from bagpipe.version import __version__


def banner(run: Run) -> list[str]:
    """The lines, once the run's tables have their cache."""
    embeddings, cache = run.embeddings, run.config.cache
    groups, peers = embeddings.groups, embeddings.peers
    num_rows = sum(group.num_rows for group in groups)
    num_weights = sum(group.num_rows * group.embedding_dim for group in groups)
    num_bytes = sum(group.num_rows * group.record_bytes for group in groups)
    assert embeddings.executor is not None
    caches = embeddings.executor.caches
    cache_bytes = sum(each.num_slots * each.group.record_bytes for each in caches)
    num_slots = sum(each.num_slots for each in caches)
    of_each = f" of each of {peers.num_trainers} trainers" if peers.has_others else ""
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return [
        f"bagpipe {__version__} on {_device(run.device)}; torch {torch.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}",
        f"tables: {sum(len(group.tables) for group in groups)} with {num_rows:,} rows, "
        f"{format_count(num_weights)} weights, records of {format_bytes(num_bytes)}",
        f"model: {run.config.model.kind}, {num_parameters:,} parameters; "
        f"{run.schedule.num_steps:,} steps of {run.config.train.batch_size:,} samples",
        f"cache{of_each}: {num_slots:,} rows ({num_slots / num_rows:.2%}), "
        f"{format_bytes(cache_bytes)}{_chosen(cache.size)}; lookahead {cache.lookahead}, prefetch "
        f"depth {cache.prefetch_depth}",
    ]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _chosen(size: object) -> str:
    return ', chosen by "auto"' if size == "auto" else ""
