"""What `network` measures, and what it tells the processes at both ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bagpipe.errors import ConfigError
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import Group, TableConfig, group_tables

ARMS = ("bare", "flight", "tls", "staging", "direct")
"""bare: messages of the same sizes by Flight, without records being gathered or put in place.
flight: a shard server. tls: the same with TLS and a token. staging: by shared memory, from which
records are copied to where they are wanted. direct: they are wanted in that memory."""
ALWAYS = ("bare",)
OVER_LINKS = ("bare", "flight")
QUICK: dict[str, Any] = {
    "table_rows": 5_000,
    "step_rows": 500,
    "gbits": (0.1,),
    "delays_ms": (2.0,),
    "in_flight": (1, 2),
    "measured_s": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class NetworkBench:
    """Fetches of one trainer from one shard server."""

    table_rows: int = 2_000_000
    embedding_dim: int = 48
    step_rows: int = 20_000
    """Rows that a step fetches."""
    gbits: Sequence[float] = (0.1, 1.0, 10.0)
    """Links, in Gbit/s."""
    delays_ms: Sequence[float] = (0.0, 2.0)
    """Each way."""
    in_flight: Sequence[int] = (1, 2, 4)
    """Steps that are under way at a time."""
    arms: Sequence[str] = ARMS
    measured_s: float = 2.0
    """How long each arm runs, after it has run a fifth of that unmeasured."""

    def __post_init__(self) -> None:
        if self.step_rows > self.table_rows:
            raise ConfigError(
                f"--rows {self.step_rows:,} of a table with {self.table_rows:,}: ask for fewer"
            )

    @property
    def group(self) -> Group:
        """The table, as a group."""
        table = TableConfig(
            name="table",
            num_embeddings=self.table_rows,
            embedding_dim=self.embedding_dim,
            feature_names=["id"],
        )
        return group_tables([table], RowWiseAdagrad(lr=0.01))[0]

    @property
    def step_bytes(self) -> int:
        """Bytes of a step's records."""
        return self.step_rows * self.group.record_bytes


@dataclass(frozen=True, kw_only=True)
class End:
    """What the process at one end is told, as JSON in its only argument."""

    arm: str
    table_rows: int
    embedding_dim: int
    step_rows: int
    measured_s: float
    folder: str = ""
    """Certificates and token, for `tls`."""
    host: str = ""
    """Where the server listens, or is reached."""
    port: int = 0
    in_flight: Sequence[int] = ()
    server_process: int = 0
    instance: str = ""

    def argument(self) -> str:
        """As it is told."""
        return json.dumps(asdict(self))

    @classmethod
    def told(cls, argument: str) -> End:
        """What an argument tells."""
        return cls(**json.loads(argument))

    @property
    def group(self) -> Group:
        """The table, as a group."""
        return NetworkBench(
            table_rows=self.table_rows, embedding_dim=self.embedding_dim, step_rows=1
        ).group


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a client measured with so many steps under way."""

    num_in_flight: int
    num_steps: int
    measured_s: float
    client_cpu_s: float
    server_cpu_s: float
