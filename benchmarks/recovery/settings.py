"""What `recovery` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bagpipe.errors import ConfigError
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import Group, TableConfig, group_tables

VICTIMS = ("trainer", "oracle", "server", "launcher")
PARTS = ("noticed", "ended", "up", "met", "begin", "batch", "step")
"""noticed: until the first of the other trainers has ended. ended: until all have. up: until the
first new trainer has loaded its code. met: until rank 0 tells servers to begin; the launcher has
started all ranks, they have met, and there is a server. begin: until servers have the checkpoint's
rows. batch: until the first batch is handed out. step: until it is trained."""
NUM_TABLES = 26
QUICK: dict[str, Any] = {
    "table_gb": 0.001,
    "victims": ("trainer", "server"),
    "batch_size": 64,
    "cache_share": 0.2,
    "lookahead": 4,
    "every_steps": 30,
    "embedding_dim": 4,
    "bottom": (8,),
    "top": (8, 1),
}


@dataclass(frozen=True, kw_only=True)
class RecoveryBench:
    """A run under torchrun with one shard server, whose processes are killed one after the other.

    Every row of its tables is written before the first step.
    """

    table_gb: float = 8.0
    """Records in all, in GB."""
    embedding_dim: int = 48
    num_trainers: int = 2
    batch_size: int = 2_048
    """Of all trainers."""
    cache_share: float = 0.01
    lookahead: int = 100
    every_steps: int = 100
    """Steps from one checkpoint to the next."""
    victims: Sequence[str] = VICTIMS
    bottom: Sequence[int] = (64,)
    top: Sequence[int] = (128, 64, 1)
    timeout_s: float = 900.0
    """How long a recovery, or a checkpoint of all rows, may take."""

    def __post_init__(self) -> None:
        for victim in self.victims:
            if victim not in VICTIMS:
                raise ConfigError(f"--kill {victim}: is unknown; there are {', '.join(VICTIMS)}")
        if self.num_trainers < 2:
            raise ConfigError(f"--trainers {self.num_trainers}: give 2 or more")

    @property
    def group(self) -> Group:
        """Equal tables, of that size in all."""
        table = TableConfig(
            name="table",
            num_embeddings=1,
            embedding_dim=self.embedding_dim,
            feature_names=["id"],
        )
        record_bytes = group_tables([table], RowWiseAdagrad(lr=0.01))[0].record_bytes
        num_rows = max(1, int(self.table_gb * 1e9 / record_bytes / NUM_TABLES))
        tables = [
            TableConfig(
                name=f"C{number}",
                num_embeddings=num_rows,
                embedding_dim=self.embedding_dim,
                feature_names=[f"C{number}"],
            )
            for number in range(1, NUM_TABLES + 1)
        ]
        return group_tables(tables, RowWiseAdagrad(lr=0.01))[0]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a trainer told, and when by the host's monotonic clock."""

    name: str
    at_s: float
    pid: int
    rank: int
    step: int
