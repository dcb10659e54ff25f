"""The values that every part of Bagpipe speaks: tables, groups, jagged ids, optimizers, plans. No
behaviour.

Numpy only, so that the control plane (reader, oracle, stores) never loads torch. Arrays in these
values are never changed after construction.

Sizes in the shape comments: F features, B samples, L lookups, U unique rows of one batch, all of
one group. A *bag* is one feature of one sample. Lookups and ``bag_offsets`` are feature-major as in
TorchRec's KeyedJaggedTensor (bag ``f * B + b``); pooled output and its gradient are sample-major
(output row ``b * F + f``), as a dense layer reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from bagpipe._limits import (
    MAX_EMBEDDING_DIM,
    MAX_NUM_EMBEDDINGS,
    MAX_RATE,
    as_count,
    check_number,
    is_number,
)
from bagpipe.errors import ConfigError

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
UInt32Array: TypeAlias = npt.NDArray[np.uint32]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Pooling: TypeAlias = Literal["sum", "mean"]
DataType: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""How weights are kept; optimizer state is float32 whatever it is."""

MAX_PIECE_LENGTH = 128
"""Longest run of bags that one piece of a gradient schedule sums; bounds a kernel's work whatever
the skew."""


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

    With a ``data_type`` of 16 bits, ``"bf16"`` or ``"fp16"``, weights take half the space,
    everywhere. An update computes in float32 and rounds its result up or down by chance (stochastic
    rounding), so that steps too small for 16 bits count on average. ``init`` defaults to
    ``Uniform(-1/sqrt(n), 1/sqrt(n))`` with n = num_embeddings, as TorchRec and the DLRM reference
    do.
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


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``w -= lr * g``; equals ``torch.optim.SGD``. Momentum is refused: it would move rows that no
    batch touches.
    """

    lr: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "lr")
        check_number(self, "momentum", least=-MAX_RATE)
        if self.momentum != 0.0:
            raise ConfigError(
                f"SGD(momentum={self.momentum}): momentum moves every row at every step, touched "
                "or not, so it can't be "
                "exact for rows outside the cache: use momentum=0, Adagrad, RowWiseAdagrad or Adam"
            )

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """``s += g * g; w -= lr * g / (sqrt(s) + eps)``; equals ``torch.optim.Adagrad`` on sparse
    gradients.
    """

    lr: float
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "initial_accumulator_value"):
            check_number(self, name)

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row."""
        return embedding_dim


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad:
    """``s += mean(g * g); w -= lr * g / (sqrt(s) + eps)`` with one s a row; equals
    ``torchrec.optim.RowWiseAdagrad``.
    """

    lr: float
    eps: float = 1e-8
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "initial_accumulator_value"):
            check_number(self, name)

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Lazy Adam: a row's moments move only when it is touched; bias correction by the number of
    updates, each group of tables counting its own. A batch without backward is none.

    Equals ``torch.optim.SparseAdam``.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number(self, "lr")
        check_number(self, "eps")
        betas = self.betas
        if (
            not isinstance(betas, Sequence)
            or len(betas) != 2
            or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas)
        ):
            raise ConfigError(f"Adam: betas is {betas!r}, must be two numbers, each in [0, 1)")
        object.__setattr__(self, "betas", tuple(betas))

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: the first moments, then the second."""
        return 2 * embedding_dim

    def step_size(self, lr: float, number: int) -> float:
        """The learning rate with both bias corrections of the `number`th update, from 1."""
        beta1, beta2 = self.betas
        return lr * math.sqrt(1.0 - beta2**number) / (1.0 - beta1**number)


Optimizer: TypeAlias = SGD | Adagrad | RowWiseAdagrad | Adam


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tables of one dimension, one data type and one optimizer, which share a row space, a cache
    and a store.

    Tables keep the order in which they were given; features are table by table. ``row`` =
    ``row_offsets[table] + id``.
    """

    index: int
    tables: tuple[TableConfig, ...]
    optimizer: Optimizer

    @property
    def name(self) -> str:
        """As error messages and reports call it."""
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
        """Words of 4 bytes that a record's weights take: weights of 16 bits lie two to a word, the
        lower half first.
        """
        return self.embedding_dim if self.data_type == "fp32" else -(-self.embedding_dim // 2)

    @property
    def state_width(self) -> int:
        return self.optimizer.state_width(self.embedding_dim)

    @property
    def record_width(self) -> int:
        """Words a record: the weights, then the optimizer state."""
        return self.weight_words + self.state_width

    @property
    def record_bytes(self) -> int:
        return 4 * self.record_width

    @cached_property
    def row_offsets(self) -> Int64Array:
        """First row of each table, then the number of rows."""  # (num_tables + 1,)
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
        """For each feature the index of its table."""
        return tuple(index for index, table in enumerate(self.tables) for _ in table.feature_names)


def group_tables(tables: Sequence[TableConfig], optimizer: Optimizer) -> tuple[Group, ...]:
    """Groups tables by dimension and data type, in order of first appearance.

    Refuses duplicate table names and features with two tables.
    """
    names = [table.name for table in tables]
    features = [feature for table in tables for feature in table.feature_names]
    for what, items in (("table name", names), ("feature", features)):
        repeated = sorted({item for item in items if items.count(item) > 1})
        if repeated:
            raise ConfigError(f"{what} {repeated[0]!r} is given more than once")
    if not tables:
        raise ConfigError("no tables are given: at least one is needed")
    members: dict[tuple[int, DataType], list[TableConfig]] = {}
    for table in tables:
        members.setdefault((table.embedding_dim, table.data_type), []).append(table)
    return tuple(
        Group(index=index, tables=tuple(of_group), optimizer=optimizer)
        for index, of_group in enumerate(members.values())
    )


@dataclass(frozen=True, kw_only=True)
class Jagged:
    """Multi-hot ids of one batch, feature-major: a KeyedJaggedTensor in numpy. ``offsets`` None:
    one id in every bag.
    """

    keys: tuple[str, ...]
    values: npt.NDArray[np.integer]  # (num_lookups,) ids, each within its table
    batch_size: int
    offsets: npt.NDArray[np.integer] | None = None  # (F * B + 1,), bag f * B + b
    weights: npt.NDArray[np.floating] | None = (
        None  # (num_lookups,) per-sample weights, by which rows are multiplied; None: 1
    )


@dataclass(frozen=True, kw_only=True)
class GradientSchedule:
    """The order and grouping of a batch's backward sums, decided from ids alone.

    Unique row u is in ``unique_slots[u]``. Piece p sums gradient rows
    ``bags[piece_offsets[p]:piece_offsets[p + 1]]`` one after the other, at most
    ``MAX_PIECE_LENGTH`` of them. Piece u < U is the first of unique row u; further pieces of rows
    with many lookups follow: those of row ``long_uniques[k]`` are ``U + long_offsets[k] .. U +
    long_offsets[k + 1]``, and its gradient is its first piece plus the sum of the further ones.
    """

    unique_slots: Int32Array  # (U,)
    bags: Int32Array  # (L,) output rows b * F + f, by unique row, in lookup order within a row
    piece_offsets: Int32Array  # (num_pieces + 1,) into bags
    long_uniques: Int32Array  # (num_long,) ascending
    long_offsets: Int32Array  # (num_long + 1,), 0 first
    bag_weights: Float32Array | None = (
        None  # (L,) by which the gradient rows of `bags` are multiplied; None: 1
    )

    @property
    def num_uniques(self) -> int:
        return len(self.unique_slots)


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Records to move at one moment: first read the evicted slots, then fill the fetched ones.

    A slot in ``fetch_slots`` was never filled before or stands in an ``evict_slots`` not later than
    this one. The fetch may read the store once every eviction of ticks up to ``fence_tick`` has
    been written (-1: nothing to wait for).
    """

    evict_rows: Int64Array  # (num_evicted,)
    evict_slots: Int32Array  # (num_evicted,)
    fetch_rows: Int64Array  # (num_fetched,)
    fetch_slots: Int32Array  # (num_fetched,)
    fence_tick: int


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """Rows of one group that one trainer sends to the others and gets from them at one moment,
    packed by rank.
    """

    send: Int32Array  # (num_sent,) which of its rows, those for rank 0 first
    send_counts: Int64Array  # (num_trainers,)
    receive_counts: Int64Array  # (num_trainers,)

    @property
    def num_received(self) -> int:
        return int(self.receive_counts.sum())


@dataclass(frozen=True, kw_only=True)
class GroupExchange:
    """What one trainer of several exchanges in one step for one group, and applies to the rows that
    it owns.

    Replicas arrive in the slots from ``first_replica`` on, first ``replicas_later``'s, then
    ``replicas_now``'s, each by rank. What is sent of them are own slots. ``sync_now`` and
    ``sync_later`` are gradients: what is sent are the sums of the trainer's own bags by distinct
    row, the u-th of its schedule. What is *now* is on the critical path, right before or after the
    step's compute; *later* replicas travel behind the compute of the step before, *later* gradients
    behind that of the step after.

    An ``apply`` schedule gives the rows to update once; its bags are places in the trainer's own
    sums (U,) followed by the sums received with the gradients of the same moment, so that a row's
    contributions are added in the order of ranks.
    """

    first_replica: int
    replicas_later: RowExchange
    replicas_now: RowExchange
    sync_now: RowExchange
    sync_later: RowExchange
    apply_now: GradientSchedule
    apply_later: GradientSchedule

    @property
    def num_room(self) -> int:
        """Places for the sums received, behind the trainer's own."""
        return max(self.sync_now.num_received, self.sync_later.num_received)


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What one trainer does in one step with one group. Tick t is the moment just before the
    compute of step t.

    ``early`` transfers are issued at the plan's ``early_tick``, behind the compute of earlier
    steps; ``late`` ones at tick ``step``, on the critical path, because their slot or their row is
    not free sooner. A plan's early ones come before its late ones; otherwise, at one tick, late
    ones come first.
    """

    # (L,) feature-major: for each lookup the index of its row in schedule.unique_slots
    inverse: Int32Array
    bag_offsets: Int32Array | None  # (F * B + 1,) into inverse; None: one lookup in every bag
    # (B * F,) by output row, 1 / bag length for mean pooling; None: all features are summed
    bag_scales: Float32Array | None
    schedule: GradientSchedule
    early: Transfers
    late: Transfers
    lookup_weights: Float32Array | None = (
        None  # (L,) by which looked up rows are multiplied; None: 1
    )
    exchange: GroupExchange | None = None
    """With the other trainers; None: there are none, and `schedule` says all about the update."""

    @property
    def lookup_slots(self) -> Int32Array:
        """The slot of each lookup (L,). The device makes its own from the same two arrays."""
        return self.schedule.unique_slots[self.inverse]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that a trainer must do with embeddings in one step."""

    step: int
    # when the early transfers are issued: prefetch_depth steps ahead, not before the stream's
    # first step
    early_tick: int
    batch_size: int
    groups: tuple[GroupPlan, ...]
    lookahead: int  # batches that the oracle had seen beyond this one when it planned it
    has_late: bool = False
    """Whether any trainer has late transfers: then no gradient of the step before may still be on
    its way when they are issued."""
    joint_hash: str | None = None
    """Of several trainers not all planned in one place: what the plan of all of them hashes to."""
    failure: str = ""
    """Why the last batch seen is the last one, unless the batches just end there."""
