"""Where all records live: one store a group, behind the protocol of `bagpipe.store.base`.

Numpy and numba only.
"""

from bagpipe.store.base import NO_STEPS, EmbeddingStore, OrderedStore, Steps
from bagpipe.store.file import FileStore
from bagpipe.store.init import RowInitializer
from bagpipe.store.memory import MemoryStore

__all__ = [
    "NO_STEPS",
    "EmbeddingStore",
    "FileStore",
    "MemoryStore",
    "OrderedStore",
    "RowInitializer",
    "Steps",
]
