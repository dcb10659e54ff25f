"""The configuration of a run: one section for each part, checked one by one and then together.

Those of tables' optimizers and initial weights are in `bagpipe.config.optimizers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from bagpipe.config.base import (
    Batches,
    BatchSize,
    Count,
    MemorySize,
    Rate,
    RowShare,
    Seconds,
    Section,
    Seed,
    Steps,
    Threads,
    Width,
)
from bagpipe.config.data import DataConfig, Name, PrepareConfig
from bagpipe.config.metrics import DEFAULT_METRICS, Metric, Metrics
from bagpipe.config.model import DLRMConfig, ModelConfig
from bagpipe.config.optimizers import (
    EmbeddingOptimizerConfig,
    EmbeddingRowWiseAdagrad,
    NormalInit,
    UniformInit,
)
from bagpipe.config.rates import PlateauRate, RateConfig
from bagpipe.config.servers import ServersConfig
from bagpipe.types import DataType, OraclePlace, Pooling

Rows: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]


class MemoryStoreConfig(Section):
    """All rows are in memory."""

    kind: Literal["memory"] = "memory"


class FileStoreConfig(Section):
    """All rows are in memory-mapped files of a folder, for tables beyond RAM."""

    kind: Literal["file"]
    folder: Path


StoreConfig: TypeAlias = Annotated[MemoryStoreConfig | FileStoreConfig, Field(discriminator="kind")]


class EmbeddingsConfig(Section):
    """The embedding tables; the data say how many rows each has."""

    embedding_dim: Width = 64
    data_type: DataType = "fp32"
    """The data type of weights; see `bagpipe.TableConfig`."""
    pooling: Pooling = "sum"
    optimizer: EmbeddingOptimizerConfig | None = None
    """Left out: row-wise Adagrad at 0.02, for Wide & Deep at 0.005, for DeepFM at 0.01."""
    init: Annotated[UniformInit | NormalInit, Field(discriminator="kind")] | None = None
    """How rows start. Left out: uniform in +-1/sqrt(rows of the table), as with TorchRec and the
    DLRM reference; with Wide & Deep and DeepFM in +-0.0173."""
    lr_schedule: RateConfig | None = None
    """How the tables' learning rate goes over the run. Left out: as `train.lr_schedule`."""
    store: StoreConfig = MemoryStoreConfig()


class CacheConfig(Section):
    """The embedding cache and the oracle that plans for it. Nothing here changes a result."""

    size: Literal["auto"] | Rows | MemorySize | RowShare = "auto"
    """Rows, a share of all rows (e.g. "2%"), or memory for records (e.g. "4GiB")."""
    lookahead: Literal["auto"] | Batches = "auto"
    """How many batches the oracle sees ahead."""
    lookahead_memory: MemorySize = "1GiB"
    prefetch_depth: Batches = 2
    """How many steps before its use a row may be fetched."""
    threads: Threads | None = None
    """Threads that read and de-duplicate. Left out: as many as suit the machine."""
    oracle: Literal["auto", OraclePlace] = "auto"
    """Where batches are read and planned: in threads of the trainer ("thread"); in a process of its
    own, which serves all trainers of a host; or read in threads and planned on the trainer's GPU
    ("device", for one trainer). "auto": on the GPU where one trainer's dense part is a CUDA graph;
    else in the process on a GPU and with several trainers; else in threads."""
    check: bool = False
    """Whether every plan is checked against its invariants before it is used (slow)."""

    def oracle_of(self, best: OraclePlace) -> OraclePlace:
        """Where it is planned: `best` with "auto"."""
        return best if self.oracle == "auto" else self.oracle


class DenseOptimizerConfig(Section):
    """The torch optimizer of the dense part."""

    kind: Literal["sgd", "adagrad", "adam", "adamw"] = "adagrad"
    lr: Annotated[Rate, Field(gt=0.0)] = 0.02
    weight_decay: Rate = 0.0


class BestConfig(Section):
    """The best model by evaluations, whose checkpoint is kept beside the last ones."""

    metric: Metric = "log_loss"
    label: Name | None = None
    """The label whose metric counts, where there are several; the first when left out."""
    patience: Count | None = None
    """After how many evaluations in a row that are no better the run ends. Left out: it goes on."""
    min_gain: Rate = 0.0
    """By more than how much a metric must be better to count."""


class TrainConfig(Section):
    """The loop."""

    batch_size: BatchSize = 2048
    epochs: Count | None = None
    """How often to read the training split; once when neither this nor `steps` is given."""
    steps: Steps | None = None
    """Steps to train, over as many epochs as they take."""
    drop_last: bool = False
    """Whether the smaller batch at the end of an epoch is left out."""
    optimizer: DenseOptimizerConfig | None = None
    """The dense part's. Left out: Adagrad at 0.02, for DCN at 0.005."""
    lr_schedule: RateConfig | None = None
    """How the dense part's learning rate goes over the run, and the tables' where
    `embeddings.lr_schedule` is left out. Left out: it stays."""
    max_grad_norm: Annotated[Rate, Field(gt=0.0)] | None = None
    """The norm to which longer gradients of the dense part are scaled, all parameters taken
    together. Tables have one a row: `embeddings.optimizer.max_grad_norm`."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """The precision of the dense part. "tf32" rounds what its matrix products read (on a GPU).
    "bf16" is autocast, with pooled embeddings of that type. Records stay as they are."""
    dense: Literal["auto", "eager", "graph", "compile"] = "auto"
    """How the dense part runs: "eager" as written, "graph" replayed as a CUDA graph, "compile" so
    after torch.compile. "auto" is the graph on a GPU; with several trainers only where `batch_size`
    is a multiple of their number."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every_steps: Steps | None = None
    """Steps between evaluations on the validation split. There is always one at the end."""
    eval_batch_size: BatchSize = 8192
    label_weights: dict[Name, Annotated[Rate, Field(gt=0.0)]] = Field(default_factory=dict)
    """By label, what its loss is multiplied by before the losses of all labels are added up; 1 for
    those left out."""
    metrics: Metrics = DEFAULT_METRICS
    """What evaluations tell, in this order. What `best` or a plateau watches is told, too."""
    group_by: Name | None = None
    """The feature by which grouped_auc groups samples, such as a user's."""
    best: BestConfig | None = None
    """Keeps the best model. It needs `eval_every_steps`."""
    wait_timeout_s: Seconds = 1800.0
    """How long a trainer waits for another one, also while that saves or begins a start alone. One
    that dies is noticed at once, but one that is stopped only by this: then the others end, and
    torchrun starts all again."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"epochs = {self.epochs} and steps = {self.steps} are both given: give the one "
                "that ends the run"
            )
        return self


class CheckpointConfig(Section):
    """When to save. A signal always saves."""

    every_steps: Steps | None = None
    every_s: Seconds | None = None
    """Seconds from one checkpoint to the next, of any cause. With several trainers rank 0's clock
    counts."""
    keep: Count = 2
    """How many of the newest checkpoints to keep."""
    at_end: bool = True


class LogConfig(Section):
    """Where a run leaves its files: log.jsonl, tensorboard/ and checkpoints/."""

    folder: Path
    every_steps: Steps = 50
    tensorboard: bool = True


class RunConfig(Section):
    """All of a run."""

    data: DataConfig
    log: LogConfig
    model: ModelConfig = DLRMConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    cache: CacheConfig = CacheConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    servers: ServersConfig | None = None
    """Where the tables are, if not with the trainers."""
    prepare: PrepareConfig | None = None
    """What `bagpipe data prepare` does. Training does not look at it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.model.check(self.embeddings.embedding_dim)
        labels = ("label",) if self.data.kind == "synthetic" else self.data.labels
        if labels is not None:  # else the data say how many there are
            self.model.check_labels(len(labels))
        for key, schedule in (
            ("train.lr_schedule", self.train.lr_schedule),
            ("embeddings.lr_schedule", self.embeddings.lr_schedule),
        ):
            if isinstance(schedule, PlateauRate) and self.train.eval_every_steps is None:
                raise ValueError(
                    f"{key}.kind = 'plateau' goes by evaluations on the way, of which there are "
                    "none: give train.eval_every_steps"
                )
        if self.train.best is not None and self.train.eval_every_steps is None:
            raise ValueError(
                "train.best goes by evaluations on the way, of which there are none: give "
                "train.eval_every_steps"
            )
        if (self.train.group_by is None) == ("grouped_auc" in self.metrics):
            raise ValueError(
                "grouped_auc groups samples by a feature: give it as train.group_by"
                if self.train.group_by is None
                else f"train.group_by = {self.train.group_by!r} is for grouped_auc, which nothing "
                "asks for: add it to train.metrics, or leave group_by out"
            )
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What evaluations tell: `train.metrics`, and what is watched beside them."""
        schedules = self.train.lr_schedule, self.table_lr_schedule
        watched = [each.metric for each in schedules if isinstance(each, PlateauRate)]
        if self.train.best is not None:
            watched.append(self.train.best.metric)
        return tuple(dict.fromkeys([*self.train.metrics, *watched]))

    @property
    def table_lr_schedule(self) -> RateConfig | None:
        """How the tables' learning rate goes: as the file says, else as the dense part's."""
        return self.embeddings.lr_schedule or self.train.lr_schedule

    @property
    def table_init(self) -> UniformInit | NormalInit | None:
        """How tables start: as the file says, else as suits the model; None: by `TableConfig`."""
        bound = self.model.table_bound
        if self.embeddings.init is not None or bound is None:
            return self.embeddings.init
        return UniformInit(kind="uniform", low=-bound, high=bound)

    @property
    def table_optimizer(self) -> EmbeddingOptimizerConfig:
        """The tables' optimizer: as the file says, else as suits the model."""
        return self.embeddings.optimizer or EmbeddingRowWiseAdagrad(
            kind="rowwise_adagrad", lr=self.model.table_lr
        )

    @property
    def dense_optimizer(self) -> DenseOptimizerConfig:
        """The dense part's optimizer: as the file says, else as suits the model."""
        return self.train.optimizer or DenseOptimizerConfig(lr=self.model.dense_lr)


class DataFile(Section):
    """The part of a run's file that `bagpipe data inspect` reads."""

    data: DataConfig


class PrepareFile(Section):
    """The part of a run's file that `bagpipe data prepare` reads."""

    prepare: PrepareConfig
