"""Embedding tables as stores hold them: read in evaluation, whole, and as a state dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bagpipe.distributed.alone import Peers, peers_of
from bagpipe.distributed.homes import fetch_from_homes, num_homes, shared_store
from bagpipe.embeddings.reading import join_reading, read_pooled
from bagpipe.embeddings.tables import (
    LazyTable,
    load_tables,
    save_tables,
    save_tables_together,
    warn_of_optimizer_state,
)
from bagpipe.embeddings.torchrec_configs import as_table
from bagpipe.errors import UsageError
from bagpipe.lookups import check_features
from bagpipe.optimizers import Optimizer
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Group, Jagged, group_tables


class StoredTables(nn.Module, ABC):
    """The tables of one collection and what reads them; `EmbeddingBagCollection` trains them."""

    def __init__(
        self,
        tables: Sequence[Any],
        *,
        optimizer: Optimizer | Mapping[str, Optimizer],
        device: str | torch.device,
        seed: int,
        store: Callable[[Group, int], EmbeddingStore] | None,
        communicator: Peers | None,
    ) -> None:
        """See `EmbeddingBagCollection`."""
        super().__init__()
        self.peers = peers_of(communicator)
        """The other trainers, of whom there may be none."""
        store = store or partial(shared_store, self.peers)
        self._fetch = partial(fetch_from_homes, self.peers)
        self._configs = list(tables)
        self.groups = group_tables([as_table(config) for config in self._configs], optimizer)
        self.stores = tuple(store(group, seed) for group in self.groups)
        self.num_homes = num_homes(self.peers, self.stores)
        """Among how many hosts the records are divided."""
        self.device = torch.device(device)
        self.seed = seed
        self.other_features: set[str] = set()
        """Features of batches that other collections look up; an evaluation passes over them.

        `bagpipe.lookahead` adds those of the collections that it trains together.
        """

    def embedding_bag_configs(self) -> list[Any]:
        """The tables' configurations as they were given, as TorchRec's collection has them."""
        return list(self._configs)

    def extra_repr(self) -> str:
        """A line for each table, group by group, as `repr` of a module shows them."""
        return "".join(
            f"\n{table.name}: {table.num_embeddings:,} x {table.embedding_dim} {table.data_type}, "
            f"{table.pooling} of {', '.join(table.feature_names)}; {group.optimizer}"
            for group in self.groups
            for table in group.tables
        )[1:]

    @abstractmethod
    def flush(self) -> None:
        """Brings the stores up to date, as each read needs them."""

    @abstractmethod
    def _check_nothing_lost(self) -> None:
        """Raises UsageError where rows were lost by an earlier failure."""

    @abstractmethod
    def _check_idle(self, what: str) -> None:
        """Raises UsageError where a write to the stores would be undone."""

    def tables(self) -> dict[str, LazyTable]:
        """Every table's weights by name, read block by block from the stores; flushed first.

        Raises:
            UsageError: rows were lost by an earlier failure.
        """
        if self._has_hosts:
            # They can't be read here, and flushing would wait for ranks that do not ask.
            self._check_nothing_lost()
        else:
            self.flush()
        return self._tables(self._make_readable)

    def save_tables(self, path: str | Path) -> None:
        """Writes all tables' weights to one safetensors file, in bounded memory.

        They stand under the keys of `state_dict`. With several hosts all trainers must call it, and
        rank 0 writes.

        Raises:
            StoreError: the file can't be written, as on a full disk; one that was there before is
                as it was.
        """
        if not self._has_hosts:
            save_tables(
                {_weight_key(name): table for name, table in self.tables().items()}, Path(path)
            )
            return
        self.flush()
        tables = {_weight_key(name): table for name, table in self._tables(self.flush).items()}
        save_tables_together(tables, Path(path), self.peers)

    def join_reading(self) -> None:
        """With several hosts: helps the others to read a batch in evaluation.

        For a rank that has no batch for its own part.
        """
        for store in self.stores:
            join_reading(store, self._fetch)

    @property
    def _has_hosts(self) -> bool:
        return self.num_homes > 1

    def _tables(self, flush: Callable[[], None]) -> dict[str, LazyTable]:
        return {
            table.name: LazyTable(store, index, flush, self._fetch, self._check_idle)
            for group, store in zip(self.groups, self.stores, strict=True)
            for index, table in enumerate(group.tables)
        }

    def _make_readable(self) -> None:
        if self._has_hosts:
            raise UsageError(
                "the tables' rows are divided among several hosts, so one trainer can't read them: "
                "call save_tables(path) on all, and read the file that rank 0 writes"
            )
        self.flush()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "embedding tables are neither copied nor pickled whole, they may not fit in memory: "
            "use save_tables(path), or load state_dict() into another EmbeddingBagCollection"
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Adds each table as a `LazyTable` under TorchRec's key; nothing is read yet."""
        destination.update(
            {prefix + _weight_key(name): table for name, table in self.tables().items()}
        )

    def _load_from_state_dict(  # the signature is nn.Module's
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes each table's weights from a tensor or a `LazyTable`.

        Optimizer state is kept, and an `OptimizerStateWarning` says so.
        """
        self._check_idle("load_state_dict")
        known = {prefix + _weight_key(name): table for name, table in self.tables().items()}
        num_loaded = load_tables(known, state_dict, missing_keys, error_msgs)
        if num_loaded and any(group.state_width for group in self.groups):
            warn_of_optimizer_state(num_loaded, type(self.groups[0].optimizer).__name__)
        unexpected_keys.extend(
            key for key in state_dict if key.startswith(prefix) and key not in known
        )

    def _read(self, batch: Jagged) -> list[Tensor]:
        """Pools rows straight from the stores."""
        check_features(self.groups, batch, self.other_features)
        self.flush()
        return [read_pooled(store, batch, self.device, self._fetch) for store in self.stores]


def _weight_key(table: str) -> str:
    """Where TorchRec keeps a table's weights in a state dict."""
    return f"embedding_bags.{table}.weight"
