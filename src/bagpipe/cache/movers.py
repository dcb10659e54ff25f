"""What moves records between stores and caches: the device itself, or threads of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.managed import ManagedStore
from bagpipe.cache.marks import Marks
from bagpipe.cache.overlap import Streams
from bagpipe.cache.transfers import RecordMover
from bagpipe.store.base import EmbeddingStore

if TYPE_CHECKING:
    from bagpipe.cache.direct import DirectMover


def mover_for(
    caches: Sequence[DeviceCache],
    stores: Sequence[EmbeddingStore],
    streams: Streams | None,
    marks: Marks | None,
) -> RecordMover | DirectMover:
    """The mover for these stores; arguments as for `RecordMover`."""
    managed = [store for store in stores if isinstance(store, ManagedStore)]
    if streams is None or len(managed) < len(stores):
        return RecordMover(caches, stores, streams, marks)
    from bagpipe.cache.direct import DirectMover  # loads Triton

    return DirectMover(caches, managed, streams)
