"""Train recommendation models whose embedding tables do not fit the GPU, with the same result.

Importing this package loads no torch: names that need it are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bagpipe.errors import BagpipeError
from bagpipe.optimizers import SGD, Adagrad, Adam, AdamW, PartialRowWiseAdam, RowWiseAdagrad
from bagpipe.types import Jagged, Normal, TableConfig, Uniform
from bagpipe.version import __version__

if TYPE_CHECKING:
    from bagpipe import models, serving, store
    from bagpipe.checkpoint.dense import dense_state_dict
    from bagpipe.checkpoint.own_loops import restore, save
    from bagpipe.distributed.communicator import Communicator
    from bagpipe.embeddings.collate import collate
    from bagpipe.embeddings.collection import EmbeddingBagCollection
    from bagpipe.embeddings.lookahead import lookahead
    from bagpipe.exporting.own_loops import export

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BagpipeError",
    "Communicator",
    "EmbeddingBagCollection",
    "Jagged",
    "Normal",
    "PartialRowWiseAdam",
    "RowWiseAdagrad",
    "TableConfig",
    "Uniform",
    "__version__",
    "collate",
    "dense_state_dict",
    "export",
    "lookahead",
    "models",
    "restore",
    "save",
    "serving",
    "store",
]

_LAZY = {
    "Communicator": "bagpipe.distributed.communicator",
    "EmbeddingBagCollection": "bagpipe.embeddings.collection",
    "collate": "bagpipe.embeddings.collate",
    "dense_state_dict": "bagpipe.checkpoint.dense",
    "export": "bagpipe.exporting.own_loops",
    "lookahead": "bagpipe.embeddings.lookahead",
    "restore": "bagpipe.checkpoint.own_loops",
    "save": "bagpipe.checkpoint.own_loops",
}
_MODULES = ("models", "serving", "store")
"""Parts of the package that a user calls by name."""


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"bagpipe.{name}")
    raise AttributeError(f"module 'bagpipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
