"""Tables that do not fit in memory: read, loaded and saved block by block through their store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from bagpipe.cache.weights import TORCH_DTYPES, weights_in
from bagpipe.embeddings.row_index import rows_asked_for
from bagpipe.embeddings.table_file import header_of
from bagpipe.errors import OptimizerStateWarning, StoreError, UsageError
from bagpipe.native.files import replaced
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Float32Array, Int64Array

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ROWS = 65_536


class LazyTable:
    """One table's weights, read from its store when asked for.

    Its shape is (num_embeddings, embedding_dim), in the table's data type. Indexing gives tensors:
    ``table[10:20]`` and ``table[[1, 2]]`` rows, ``table[3]`` one row. ``np.asarray(table)`` reads
    all of it. `state_dict` holds this, since the whole table may not fit in memory.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        index: int,
        flush: Callable[[], None],
        check_idle: Callable[[str], None],
    ) -> None:
        """One table of a store's group.

        Args:
            store: of the group.
            index: of the table in the group.
            flush: brings the store up to date before each read.
            check_idle: raises where a write, which is named to it, would be undone.
        """
        self._flush, self._check_idle = flush, check_idle
        group = store.group
        self._store, self._first_row = store, int(group.row_offsets[index])
        self.shape, self.dtype = (
            (group.tables[index].num_embeddings, group.embedding_dim),
            TORCH_DTYPES[group.data_type],
        )
        self.name = group.tables[index].name

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<table {self.name!r}: {self.shape[0]:,} x {self.shape[1]}, {self.dtype}>"

    def __getitem__(self, rows: Any) -> Tensor:
        """One row (D,) of a number; rows (n, D) of a slice, or of numbers or truth values (n,).

        Raises:
            IndexError: the table has no such row, or `rows` is something else.
        """
        ids = rows_asked_for(rows, self.name, len(self))
        weights = self._weights(self._records(np.atleast_1d(ids)))
        return (weights if ids.ndim else weights[0]).clone(memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[Tensor]:
        return (row for block in self.blocks() for row in block)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The whole table; bfloat16, which numpy has not, as float32."""
        if copy is False:
            raise ValueError(f"table {self.name!r} lies in a store: an array of it is a copy")
        weights = self[:]
        array = (weights.float() if weights.dtype == torch.bfloat16 else weights).numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def blocks(self, block_rows: int = _BLOCK_ROWS) -> Iterator[Tensor]:
        """The table from top to bottom in blocks of at most `block_rows` rows."""
        for begin in range(0, len(self), block_rows):
            yield self[begin : begin + block_rows]

    def load(self, weights: Any) -> None:
        """Overwrites the table with `weights`; optimizer state is kept.

        Args:
            weights: anything of the table's shape whose slices are tensors. Those of another type
                are rounded to the nearest.

        Raises:
            UsageError: a stream is running, or the shape is another; nothing is written then.
        """
        self._check_idle(f"table {self.name!r}: load")
        if tuple(weights.shape) != self.shape:
            raise UsageError(
                f"table {self.name!r}: load was given the shape {tuple(weights.shape)}, the "
                f"table's is {self.shape}"
            )
        for begin in range(0, len(self), _BLOCK_ROWS):
            ids = np.arange(begin, min(begin + _BLOCK_ROWS, len(self)))
            records = self._records(ids)
            self._weights(records).copy_(weights[begin : begin + _BLOCK_ROWS].detach())
            self._store.write(ids + self._first_row, records)

    def _weights(self, records: Float32Array) -> Tensor:
        return weights_in(torch.from_numpy(records), self._store.group)

    def _records(self, ids: Int64Array) -> Float32Array:
        self._flush()
        records = np.empty((len(ids), self._store.group.record_width), np.float32)
        self._store.fetch(ids + self._first_row, records)
        return records

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"table {self.name!r} is not pickled whole, it may not fit in memory: save the tables "
            "with embeddings.save_tables(path), and the rest of a model with "
            "torch.save(bagpipe.dense_state_dict(model), path)"
        )


def save_tables(tables: Mapping[str, LazyTable], path: Path) -> None:
    """Writes the tables to a safetensors file, block by block.

    Raises:
        StoreError: the file can't be written, and is as it was before; or a store can't be read.
    """
    beginning, size_bytes = header_of(
        {key: (table.dtype, table.shape) for key, table in tables.items()}
    )
    with (
        replaced(path, StoreError, needs_bytes=size_bytes) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(beginning)
        for block in (block for table in tables.values() for block in table.blocks()):
            # little-endian, as all machines are that torch runs on
            file.write(block.view(torch.uint8).numpy().tobytes())


def load_tables(
    tables: Mapping[str, LazyTable],
    state_dict: Mapping[str, Any],
    missing_keys: list[str],
    error_msgs: list[str],
) -> int:
    """Loads the tables, by key, that a state dict has; returns how many.

    What is missing or does not fit is added to the lists, as `nn.Module` wants it.
    """
    num_loaded = 0
    for key, table in tables.items():
        if key not in state_dict:
            missing_keys.append(key)
        elif tuple(state_dict[key].shape) != table.shape:
            error_msgs.append(
                f"{key}: shape {tuple(state_dict[key].shape)} does not fit the table's "
                f"{table.shape}"
            )
        else:
            table.load(state_dict[key])
            num_loaded += 1
    return num_loaded


def warn_of_optimizer_state(what: str, num_loaded: int, optimizer: str) -> None:
    """Says what loading the weights of `num_loaded` tables by a method leaves out."""
    warnings.warn(
        f"{what} has set the weights of {num_loaded} tables, but was given no optimizer state: "
        f"that of {optimizer}, and the count of steps, stay as they are here. A run that goes on "
        "from here differs from one that was never stopped; bagpipe.save keeps all of it",
        OptimizerStateWarning,
        stacklevel=3,
    )
