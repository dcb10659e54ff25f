"""The values that every part of Bagpipe speaks: tables, groups and jagged ids.

They have no behaviour and need numpy only, so that the control plane (reader, oracle, stores) never
loads torch. Arrays in these values are never changed after construction.

Sizes in the shape comments are those of one group in one batch: F features, B samples, L lookups, U
unique rows. A *bag* is one feature of one sample. Lookups and ``bag_offsets`` are feature-major as
in TorchRec's KeyedJaggedTensor (bag ``f * B + b``). Pooled output and its gradient are sample-major
(output row ``b * F + f``), as a dense layer reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from bagpipe.bags import as_array, join, offsets_of
from bagpipe.errors import ConfigError, DataError
from bagpipe.limits import (
    MAX_EMBEDDING_DIM,
    MAX_NUM_EMBEDDINGS,
    MAX_RATE,
    as_count,
    check_number,
)
from bagpipe.optimizers import Optimizer

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
UInt32Array: TypeAlias = npt.NDArray[np.uint32]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Pooling: TypeAlias = Literal["sum", "mean"]
DataType: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""How weights are kept; optimizer state is float32 whatever it is."""
OraclePlace: TypeAlias = Literal["thread", "process", "device"]
"""Where plans are made: in threads of the trainer, in another process, or on the device."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Initial weights drawn uniformly from [low, high)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_number(self, "low", least=-MAX_RATE)
        check_number(self, "high", least=-MAX_RATE)
        if not self.low <= self.high:
            raise ConfigError(
                f"Uniform(low={self.low}, high={self.high}): low must not be above high"
            )


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Initial weights drawn from a normal distribution."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "mean", least=-MAX_RATE)
        check_number(self, "std")


Initializer: TypeAlias = Uniform | Normal


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One embedding table; the fields are those of TorchRec's ``EmbeddingBagConfig``.

    With a ``data_type`` of 16 bits, ``"bf16"`` or ``"fp16"``, weights take half the space
    everywhere. An update computes in float32 and rounds its result up or down by chance (stochastic
    rounding), so that steps too small for 16 bits count on average. ``init`` defaults to
    ``Uniform(-1/sqrt(n), 1/sqrt(n))`` with n = num_embeddings, as in TorchRec and the DLRM
    reference.

    Raises:
        ConfigError: A field is of the wrong type or out of its range.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: Sequence[str]
    pooling: Pooling = "sum"
    init: Initializer | None = None
    data_type: DataType = "fp32"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"table {self.name!r}: its name must be a string, not an empty one")
        for field, most in (
            ("num_embeddings", MAX_NUM_EMBEDDINGS),
            ("embedding_dim", MAX_EMBEDDING_DIM),
        ):
            count = as_count(f"table {self.name!r}: {field}", getattr(self, field), most)
            object.__setattr__(self, field, count)
        names = self.feature_names
        if (
            not isinstance(names, Sequence)
            or isinstance(names, str)
            or not names
            or not all(isinstance(name, str) for name in names)
        ):
            raise ConfigError(
                f"table {self.name!r}: feature_names must be a non-empty list of names, is "
                f"{names!r}"
            )
        if self.init is not None and not isinstance(self.init, Uniform | Normal):
            raise ConfigError(
                f"table {self.name!r}: init is {self.init!r}, must be a Uniform, a Normal or None"
            )
        if self.pooling not in ("sum", "mean"):
            raise ConfigError(
                f"table {self.name!r}: pooling is {self.pooling!r}, must be 'sum' or 'mean'"
            )
        if self.data_type not in ("fp32", "bf16", "fp16"):
            raise ConfigError(
                f"table {self.name!r}: data_type is {self.data_type!r}, must be 'fp32', 'bf16' or "
                "'fp16'"
            )
        object.__setattr__(self, "feature_names", tuple(self.feature_names))

    @property
    def initializer(self) -> Initializer:
        """``init``, or the default when it is None."""
        bound = 1.0 / float(np.sqrt(self.num_embeddings))
        return self.init if self.init is not None else Uniform(low=-bound, high=bound)


@dataclass(kw_only=True)
class Group:
    """Tables of one dimension, one data type and one optimizer.

    They share a row space, a cache and a store. Tables keep the order in which they were given, and
    features go table by table. ``row = row_offsets[table] + id``. The learning rate is that of
    ``optimizer``, nowhere else, and all that `set_learning_rate` changes.
    """

    index: int
    tables: tuple[TableConfig, ...]
    optimizer: Optimizer

    def set_learning_rate(self, lr: float) -> None:
        """Sets the rate of the updates that follow.

        Raises:
            ConfigError: It is no number from 0 to a million.
        """
        replace(self.optimizer, lr=lr)  # which checks it
        self.optimizer = replace(self.optimizer, lr=float(lr))

    @property
    def name(self) -> str:
        """What error messages and reports call it."""
        data_type = "" if self.data_type == "fp32" else f", {self.data_type}"
        return f"group {self.index} (dim {self.embedding_dim}{data_type})"

    @property
    def embedding_dim(self) -> int:
        return self.tables[0].embedding_dim

    @property
    def data_type(self) -> DataType:
        return self.tables[0].data_type

    @property
    def weight_words(self) -> int:
        """Number of 4-byte words that a record's weights take.

        Weights of 16 bits lie two to a word, the lower half first.
        """
        return self.embedding_dim if self.data_type == "fp32" else -(-self.embedding_dim // 2)

    @property
    def state_width(self) -> int:
        return self.optimizer.state_width(self.embedding_dim)

    @property
    def record_width(self) -> int:
        """Number of 4-byte words in a record: the weights, then the optimizer state."""
        return self.weight_words + self.state_width

    @property
    def record_bytes(self) -> int:
        return 4 * self.record_width

    @cached_property
    def row_offsets(self) -> Int64Array:
        """First row of each table, then the number of rows: (num_tables + 1,)."""
        return np.concatenate(
            [[0], np.cumsum([table.num_embeddings for table in self.tables])]
        ).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.row_offsets[-1])

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Feature names in the order of the lookups and of the pooled output."""
        return tuple(feature for table in self.tables for feature in table.feature_names)

    @cached_property
    def feature_tables(self) -> tuple[int, ...]:
        """The index of each feature's table."""
        return tuple(index for index, table in enumerate(self.tables) for _ in table.feature_names)


def group_tables(
    tables: Sequence[TableConfig], optimizer: Optimizer | Mapping[str, Optimizer]
) -> tuple[Group, ...]:
    """Groups tables by dimension, data type and optimizer, in order of first appearance.

    Args:
        tables: The tables.
        optimizer: Of all tables, or of each table by name.

    Raises:
        ConfigError: There are no tables, two have one name, or two look up the same feature; or a
            table has no optimizer, or something else as one.
    """
    names = [table.name for table in tables]
    features = [feature for table in tables for feature in table.feature_names]
    for what, items in (("table name", names), ("feature", features)):
        repeated = sorted({item for item in items if items.count(item) > 1})
        if repeated:
            raise ConfigError(f"{what} {repeated[0]!r} is given more than once")
    if not tables:
        raise ConfigError("no tables are given: at least one is needed")
    optimizers = _optimizers_of(names, optimizer)
    members: dict[tuple[int, DataType, Optimizer], list[TableConfig]] = {}
    for table in tables:
        kind = table.embedding_dim, table.data_type, optimizers[table.name]
        members.setdefault(kind, []).append(table)
    return tuple(
        Group(index=index, tables=tuple(of_group), optimizer=of_each)
        for index, ((_, _, of_each), of_group) in enumerate(members.items())
    )


def _optimizers_of(
    tables: Sequence[str], optimizer: Optimizer | Mapping[str, Optimizer]
) -> Mapping[str, Optimizer]:
    """Each table's optimizer."""
    optimizers = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(tables, optimizer)
    if optimizers.keys() != set(tables):
        raise ConfigError(
            f"optimizers are given for the tables {', '.join(map(str, optimizers)) or 'none'}; the "
            f"tables are {', '.join(tables)}: give one for each, or a single one for all"
        )
    for table, given in optimizers.items():
        if not isinstance(given, Optimizer):
            raise ConfigError(
                f"table {table!r}: its optimizer is {given!r}, must be a bagpipe.SGD, Adagrad, "
                "RowWiseAdagrad, Adam, AdamW or PartialRowWiseAdam"
            )
    return optimizers


@dataclass(frozen=True, kw_only=True)
class Jagged:
    """Multi-hot ids of one batch, feature-major: a KeyedJaggedTensor in numpy.

    Lists and torch tensors are made arrays, without a copy where a tensor is on the CPU. Without
    ``offsets`` every bag holds one id.
    """

    keys: tuple[str, ...]
    values: npt.NDArray[np.integer]  # (num_lookups,) ids, each within its table
    batch_size: int
    offsets: npt.NDArray[np.integer] | None = None  # (F * B + 1,), bag f * B + b
    # (num_lookups,) per-sample weights, by which rows are multiplied; None: 1
    weights: npt.NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.keys, tuple):
            object.__setattr__(self, "keys", _names(self.keys))
        for name, what, of_empty in _ARRAYS:
            array = getattr(self, name)
            if array is not None and not isinstance(array, np.ndarray):
                object.__setattr__(self, name, as_array(what, array, of_empty=of_empty))

    @classmethod
    def from_dict(
        cls, features: Mapping[str, Any], *, weights: Mapping[str, Any] | None = None
    ) -> Self:
        """Makes a batch of each feature's bags.

        Args:
            features: For each feature a list with, for each sample, an id, a list of ids or None;
                or an array or tensor of ids (B,) or (B, L); or a TorchRec JaggedTensor.
            weights: Per-sample weights in the same form.

        Raises:
            DataError: A value is something else, or the features' numbers of samples differ.
        """
        return cls(**join(features, weights))

    @classmethod
    def from_lists(
        cls, keys: Sequence[str], lists: Sequence[Any], *, weights: Sequence[Any] | None = None
    ) -> Self:
        """Makes a batch of the bags of each of `keys`, in their order; see `from_dict`.

        Raises:
            DataError: As there, or there are not as many lists as keys.
        """
        names = _names(keys)
        for what, given in (("lists", lists), ("weights", weights)):
            if given is not None and len(given) != len(names):
                raise DataError(
                    f"from_lists was given {len(given)} {what} for {len(names)} keys: give one "
                    "for each"
                )
        return cls.from_dict(
            dict(zip(names, lists, strict=True)),
            weights=None if weights is None else dict(zip(names, weights, strict=True)),
        )

    @classmethod
    def from_tensors(
        cls,
        keys: Sequence[str],
        values: Any,
        *,
        lengths: Any = None,
        offsets: Any = None,
        weights: Any = None,
    ) -> Self:
        """Makes a batch of what TorchRec's ``KeyedJaggedTensor`` is made of.

        Args:
            keys: The features.
            values: Ids, feature-major: (num_lookups,).
            lengths: Of the bags (F * B,). Without it and `offsets` every bag holds one id.
            offsets: Instead of `lengths`: (F * B + 1,).
            weights: Per-sample weights (num_lookups,).

        Raises:
            DataError: They are no arrays, or both `lengths` and `offsets` are given, or the number
                of bags is no multiple of the number of keys.
        """
        names, ids = _names(keys), as_array("a batch's ids", values)
        if lengths is not None and offsets is not None:
            raise DataError("from_tensors was given lengths and offsets: give one of them")
        if lengths is not None:
            lengths = as_array("a batch's lengths", lengths)
            if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
                raise DataError(
                    "a batch's lengths must be a 1-D array of integers, are "
                    f"{lengths.ndim}-D {lengths.dtype}"
                )
            num_bags, offsets = len(lengths), offsets_of(lengths)
        elif offsets is not None:
            offsets = as_array("a batch's offsets", offsets)
            num_bags = offsets.size - 1
        else:
            num_bags = ids.size
        if not names or num_bags % len(names):
            raise DataError(
                f"from_tensors was given {num_bags:,} bags for {len(names)} keys: give each key as "
                "many"
            )
        return cls(
            keys=names,
            values=ids,
            batch_size=num_bags // len(names),
            offsets=offsets,
            weights=weights,
        )


_ARRAYS = (
    ("values", "a batch's ids", np.int64),
    ("offsets", "a batch's offsets", np.int64),
    ("weights", "a batch's per-sample weights", np.float32),
)


def _names(keys: Sequence[str]) -> tuple[str, ...]:
    if isinstance(keys, str):
        raise DataError(f"a batch's keys must be a list of feature names, are {keys!r}")
    return tuple(keys)
