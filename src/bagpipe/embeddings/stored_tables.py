"""Embedding tables as stores hold them: read in evaluation, whole, and as a state dict."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bagpipe.cache.managed import memory_store_on
from bagpipe.distributed.alone import Peers, peers_of
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.fused_optimizer import FusedOptimizer
from bagpipe.embeddings.learning_rates import common_rate, new_rates
from bagpipe.embeddings.reading import read_pooled
from bagpipe.embeddings.table_file import open_table_file, weight_key
from bagpipe.embeddings.tables import (
    LazyTable,
    load_tables,
    save_tables,
    warn_of_optimizer_state,
)
from bagpipe.embeddings.torchrec_configs import as_table
from bagpipe.errors import ConfigError, StoreError, UsageError
from bagpipe.lookups import check_features
from bagpipe.optimizers import Optimizer
from bagpipe.store.base import EmbeddingStore, OrderedStore
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
        self._configs = list(tables)
        self.groups = group_tables([as_table(config) for config in self._configs], optimizer)
        self.device = torch.device(device)
        self.stores, self._let_go = self._open(store, seed)
        self.seed = seed
        self.other_features: set[str] = set()
        """Features of batches that other collections look up; an evaluation passes over them.

        `bagpipe.lookahead` adds those of the collections that it trains together.
        """

    @cached_property
    def fused_optimizer(self) -> FusedOptimizer:
        """The learning rates, for torch's schedulers; `set_learning_rate` sets them, too.

        Made once asked for: torch's first optimizer imports its compiler, a second that whoever
        only predicts does not need.
        """
        return FusedOptimizer(self.groups)

    @property
    def lr(self) -> float:
        """The embeddings' learning rate.

        Raises:
            UsageError: tables have several; each group's optimizer has its own.
        """
        return common_rate(self.groups)

    def set_learning_rate(self, lr: float | Mapping[str, float]) -> None:
        """Sets the embeddings' learning rate from the next backward on.

        Args:
            lr: of all tables, or of some by name. Tables of one group have one rate.

        Raises:
            ConfigError: it is no number from 0 to a million, or a table is not known, or tables of
                one group are given several. Nothing is changed then.
        """
        for group, rate in new_rates(self.groups, lr):
            self.fused_optimizer.param_groups[group.index]["lr"] = rate

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

    def _open(
        self, store: Callable[[Group, int], EmbeddingStore] | None, seed: int
    ) -> tuple[tuple[EmbeddingStore, ...], Callable[[], object]]:
        """The stores, by group, and what lets go of them, as the end of this object does too."""
        if store is None and isinstance(self.peers, Communicator):
            from bagpipe.distributed.served_tables import open_tables  # loads Flight

            shared = open_tables(self.peers, self.groups, seed)
            end = weakref.finalize(self, _in_background, shared.close)
            end.atexit = False  # a process that ends lets go of all

            def let_go() -> None:
                end.detach()
                shared.close()

            return tuple(shared.stores), let_go
        make = store or memory_store_on(self.device, self.groups)
        stores = tuple(make(group, seed) for group in self.groups)
        if self.peers.has_others and not all(isinstance(each, OrderedStore) for each in stores):
            raise ConfigError(
                f"store makes a {type(stores[0]).__name__}, which one trainer alone can use, not "
                f"{self.peers.num_trainers}: leave store out, and a shard server is started, or "
                "give stores that order what several write and read (bagpipe.store.OrderedStore)"
            )
        return stores, lambda: None

    @abstractmethod
    def flush(self) -> None:
        """Brings the stores up to date, as each read needs them."""

    @abstractmethod
    def _check_idle(self, what: str) -> None:
        """Raises UsageError where a write to the stores would be undone."""

    def tables(self) -> dict[str, LazyTable]:
        """Every table's weights by name, read block by block from the stores; flushed first.

        Raises:
            UsageError: rows were lost by an earlier failure.
        """
        self.flush()
        return self._tables()

    def _tables(self) -> dict[str, LazyTable]:
        """As `tables`, flushed when one is read."""
        return {
            table.name: LazyTable(store, index, self.flush, self._check_idle)
            for group, store in zip(self.groups, self.stores, strict=True)
            for index, table in enumerate(group.tables)
        }

    def save_tables(self, path: str | Path) -> None:
        """Writes all tables' weights to one safetensors file, in bounded memory.

        They stand under the keys of `state_dict`.

        Raises:
            StoreError: the file can't be written, as on a full disk; one that was there before is
                as it was.
        """
        save_tables({weight_key(name): table for name, table in self.tables().items()}, Path(path))

    def load_tables(self, path: str | Path) -> None:
        """Sets all tables' weights to those of a file that `save_tables` wrote, in bounded memory.

        Optimizer state stays as it is, and an `OptimizerStateWarning` says so: `bagpipe.save` and
        `bagpipe.restore` keep all of it. With several trainers all must call it. Weights of another
        data type are rounded to the nearest.

        Args:
            path: of a safetensors file with each table's weights (num_embeddings, embedding_dim)
                under its key, float32, bfloat16 or float16.

        Raises:
            StoreError: the file can't be read or is damaged, or it holds other tables or shapes;
                nothing was changed.
            UsageError: a `bagpipe.lookahead` is running.
        """
        self._check_idle("load_tables")
        tables = {weight_key(name): table for name, table in self.tables().items()}

        def load() -> None:
            found = open_table_file(Path(path), {key: table.shape for key, table in tables.items()})
            if self.peers.rank == 0:
                for key, table in tables.items():
                    table.load(found[key])

        Trainers(self.peers).all_do("the tables to be loaded", load, StoreError)
        self._warn_of_optimizer_state("load_tables", len(tables))

    def _warn_of_optimizer_state(self, what: str, num_loaded: int) -> None:
        if any(group.state_width for group in self.groups):
            warn_of_optimizer_state(what, num_loaded, type(self.groups[0].optimizer).__name__)

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
            {prefix + weight_key(name): table for name, table in self._tables().items()}
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
        known = {prefix + weight_key(name): table for name, table in self.tables().items()}
        num_loaded = load_tables(known, state_dict, missing_keys, error_msgs)
        if num_loaded:
            self._warn_of_optimizer_state("load_state_dict", num_loaded)
        unexpected_keys.extend(
            key for key in state_dict if key.startswith(prefix) and key not in known
        )

    def _read(self, batch: Jagged) -> list[Tensor]:
        """Pools rows straight from the stores."""
        check_features(self.groups, batch, self.other_features)
        self.flush()
        return [read_pooled(store, batch, self.device) for store in self.stores]


def _in_background(work: Callable[[], None]) -> None:
    """Does it on a thread of its own, whatever thread the garbage collector has come in."""
    threading.Thread(target=work, name="bagpipe-close", daemon=True).start()
