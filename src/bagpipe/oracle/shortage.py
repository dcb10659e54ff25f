"""What to say when a batch needs more slots than the cache has: the size that would do.

The error names a cache that holds this batch and those behind it in the window, so that the next
attempt does not end a few batches further on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from bagpipe.errors import CacheTooSmallError
from bagpipe.oracle.linker import LinkedGroup
from bagpipe.oracle.shards import num_slots_needed
from bagpipe.oracle.sizes import rows_that_hold, slots_of
from bagpipe.types import Group


def with_needs_ahead(
    error: CacheTooSmallError,
    batches: Iterator[Sequence[LinkedGroup]],
    *,
    groups: Sequence[Group],
    num_slots: Sequence[int],
    num_trainers: int,
) -> CacheTooSmallError:
    """Returns the error with the cache size that all of these batches need.

    Args:
        error: What refused the first of the batches.
        batches: The refused batch and those behind it, by group.
        groups: The groups of the run.
        num_slots: For each group the slots of each trainer, into which all batches before fitted.
        num_trainers: How many trainers share the cache.
    """
    num_needed, num_seen = num_trainers * np.array(num_slots), 0
    # A batch behind the refused one that can't be read is no matter yet.
    with suppress(Exception):
        for batch in batches:
            needed = [
                num_slots_needed(linked.batch.unique_rows, group.num_rows)
                for group, linked in zip(groups, batch, strict=True)
            ]
            num_needed, num_seen = np.maximum(num_needed, needed), num_seen + 1
    cache_rows = rows_that_hold(
        -(-num_needed // num_trainers), groups, lambda rows: slots_of(rows, groups)
    )
    return error.after_seeing(cache_rows=cache_rows, last_step=error.step + max(0, num_seen - 1))
