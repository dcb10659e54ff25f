"""The workloads of `gpu` and `trainers`: tables, stream, dense part, cache, and what is measured.

    W1       26 tables of the Criteo Terabyte cardinalities cut to 20 M rows x 64, single-hot, Zipf
             1.1, batch 16,384, DLRM
    W2       the same x 128, Zipf 1.05
    W3       the shape of MLPerf's DLRM-DCNv2: 1 to 100 ids a bag, x 128, batch 8,192, dense part
             with low-rank cross layers
    W4       W1 with the cache cut to 0.3 % of the rows
    W4-file  W4 with Bagpipe's tables in a file
    small    26 tables of the Criteo Kaggle cardinalities cut to 200,000 rows x 32, batch 1,024, a
             small DLRM: for two cores

Weights are float32, the optimizer is row-wise Adagrad. W3 is cut to 20 M rows a table as well: so
two copies of the tables, ours and that of an arm which keeps its own in host memory, fit a machine
of 128 GB together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from bagpipe.data.criteo import CARDINALITIES, DatasetName
from bagpipe.errors import ConfigError
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import Group, OraclePlace, TableConfig, group_tables

NUM_DENSE: Final = 13
EMBEDDING_LR: Final = 0.01
_MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, and how long it is measured."""

    name: str
    cardinalities: DatasetName = "terabyte"
    embedding_dim: int = 64
    skew: float = 1.1
    batch_size: int = 16_384
    max_rows: int = 20_000_000
    cache_rows: int = 3_000_000
    lookahead: int = 50
    multi_hot: bool = False
    dense_part: Literal["dlrm", "dcn"] = "dlrm"
    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (1024, 1024, 512, 256, 1)
    store: Literal["memory", "file"] = "memory"
    dedup_threads: int | None = None
    prefetch_depth: int = 4
    oracle: OraclePlace | None = None
    """Where Bagpipe plans; None: in a process of its own on CUDA, else in threads."""
    warmup_steps: int = 350
    """Steps that every arm trains before it is measured, the compared ones included: enough to fill
    the caches, or nearly so."""
    num_compared: int = 20
    """First steps whose losses are compared."""
    rounds: int = 4
    settle_steps: int = 16
    """Steps at the beginning of a turn that are not measured: Bagpipe's queues hold plans from the
    time when other arms ran."""
    turn_steps: int = 50
    """Steps measured in one turn."""
    slow_steps: int = 3
    """The same for the arm whose tables are on the CPU."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ids in a bag of each feature."""
        return _MULTI_HOT if self.multi_hot else (1,) * len(_MULTI_HOT)

    @property
    def group(self) -> Group:
        """The tables, as one group."""
        tables = [
            TableConfig(
                name=f"C{index}",
                num_embeddings=min(size, self.max_rows),
                embedding_dim=self.embedding_dim,
                feature_names=[f"C{index}"],
            )
            for index, size in enumerate(CARDINALITIES[self.cardinalities], start=1)
        ]
        return group_tables(tables, RowWiseAdagrad(lr=EMBEDDING_LR))[0]

    @property
    def turn_and_settle_steps(self) -> int:
        """Steps of a turn, measured or not."""
        return self.settle_steps + self.turn_steps


_W1: Final = Workload(name="W1")
_WIDE: Final = replace(_W1, name="W2", embedding_dim=128, skew=1.05, bottom=(512, 256, 128))
_SMALL_CACHE: Final = replace(_W1, name="W4", cache_rows=281_000, prefetch_depth=2)
WORKLOADS: Final[Mapping[str, Workload]] = {
    "W1": _W1,
    "W2": _WIDE,
    "W3": replace(
        _WIDE,
        name="W3",
        skew=1.1,
        batch_size=8_192,
        multi_hot=True,
        dense_part="dcn",
        dedup_threads=10,
        warmup_steps=200,
        rounds=3,
    ),
    "W4": _SMALL_CACHE,
    "W4-file": replace(_SMALL_CACHE, name="W4-file", store="file"),
    "small": Workload(
        name="small",
        cardinalities="kaggle",
        embedding_dim=32,
        batch_size=1_024,
        max_rows=200_000,
        cache_rows=30_000,
        lookahead=20,
        bottom=(64, 32),
        top=(128, 64, 1),
        dedup_threads=1,
        prefetch_depth=2,
        warmup_steps=60,
        rounds=6,
        settle_steps=6,
        turn_steps=25,
    ),
}
_QUICK: Final[Mapping[str, Any]] = {
    "embedding_dim": 8,
    "batch_size": 32,
    "max_rows": 300,
    "cache_rows": 3_000,
    "lookahead": 3,
    "bottom": (16, 8),
    "top": (16, 1),
    "warmup_steps": 12,
    "num_compared": 8,
    "rounds": 2,
    "turn_steps": 4,
    "settle_steps": 1,
    "slow_steps": 2,
    "dedup_threads": 1,
}


def make_workload(name: str, options: Mapping[str, Any], *, quick: bool) -> Workload:
    """Looks up a workload and adapts it.

    Args:
        name: one of `WORKLOADS`.
        options: values that replace the workload's own.
        quick: whether it is cut to the tiny sizes that tests use, before `options` are applied.

    Raises:
        ConfigError: there is no workload of this name.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"--workload {name}: is unknown; there are {', '.join(WORKLOADS)}")
    workload = replace(WORKLOADS[name], **(_QUICK if quick else {}))
    return replace(workload, **options)
