"""What `remote` measures, and what it tells the processes at both ends of the link."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bagpipe.errors import ConfigError
from bagpipe.types import Group
from benchmarks.streams import SKEW, kaggle_group

ARMS = (
    "bagpipe",
    "device",
    "resident",
    "synchronous",
    "lru",
    "prefetch",
    "lru_prefetch",
)
"""bagpipe: Belady's MIN over the window, rows travel two steps ahead.
device: the device's part of a step alone, no rows at all.
resident: as `bagpipe`, of a few batches whose rows are all in the cache.
synchronous: no cache. The rows of the step before are written back, then all of this step's are
fetched, then it is computed.
lru: a cache as large as Bagpipe's, from which the least recently used row leaves. Missing rows are
fetched once the step is due. Rows are written back behind it.
prefetch: no cache but for the batches under way. The next batch's rows are fetched behind a step.
lru_prefetch: the cache of `lru`, the next batch's missing rows fetched behind a step."""
ALWAYS = ("bagpipe", "device")
NO_CACHE = "no_cache"
"""The name of the policy of `synchronous`."""
_ROOM_FOR_BATCHES = 2.2
"""Slots of `prefetch`, in largest batches: with two of them under way it need not wait for any."""
_FEW_BATCHES, _FEW_STEPS = 6, 12
QUICK: dict[str, Any] = {
    "max_rows": 300,
    "embedding_dim": 8,
    "batch_size": 32,
    "cache_share": 0.3,
    "lookahead": 4,
    "devices_ms": (1.0,),
    "gbits": (1.0,),
    "delays_ms": (0.0,),
    "num_rounds": 1,
    "warmup_steps": 4,
    "settle_steps": 1,
    "measured_steps": 4,
}


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """How an arm plans."""

    policy: str
    num_slots: int
    lookahead: int
    prefetch_depth: int
    warmup_steps: int
    num_batches: int | None = None
    """It trains so many, again and again; None: all."""


@dataclass(frozen=True, kw_only=True)
class RemoteBench:
    """One trainer, one server with all tables, and a link between them."""

    max_rows: int | None = None
    embedding_dim: int = 48
    batch_size: int = 4_096
    skew: float = SKEW
    cache_share: float = 0.01
    """Of the rows; the caches of `bagpipe`, `lru` and `lru_prefetch`."""
    lookahead: int = 200
    devices_ms: Sequence[float] = (10.0, 40.0)
    """What a step takes on the device."""
    gbits: Sequence[float] = (1.0,)
    """Links, in Gbit/s."""
    delays_ms: Sequence[float] = (0.0,)
    """Each way."""
    arms: Sequence[str] = ARMS
    num_rounds: int = 2
    """Turns of each arm, on each link."""
    warmup_steps: int = 100
    """Steps in which a cache fills, at the beginning of each turn; arms without one make few."""
    settle_steps: int = 4
    """Steps not measured after the device's time has changed."""
    measured_steps: int = 40
    measured_s: float = 6.0
    """After so long no more steps are measured, but never fewer than 5."""

    def __post_init__(self) -> None:
        if not self.devices_ms or min(self.devices_ms) <= 0.0:
            raise ConfigError(f"--device-ms {[*self.devices_ms]}: give times above 0")

    @property
    def group(self) -> Group:
        """The tables."""
        return kaggle_group(max_rows=self.max_rows, embedding_dim=self.embedding_dim)

    @property
    def num_batches(self) -> int:
        """Batches that a turn needs at most, with a full window beyond its end."""
        turn_steps = len(self.devices_ms) * (self.settle_steps + self.measured_steps)
        return self.warmup_steps + turn_steps + self.lookahead + 8

    def settings_of(self, arm: str, num_rows: int, most_uniques: int) -> ArmSettings:
        """How `arm` plans, where the largest batch has `most_uniques` rows of `num_rows`."""
        room = min(int(_ROOM_FOR_BATCHES * most_uniques) + 64, num_rows)
        cached = max(int(self.cache_share * num_rows), room)
        few = min(_FEW_STEPS, self.warmup_steps)
        match arm:
            case "bagpipe":
                return ArmSettings(
                    policy="min",
                    num_slots=cached,
                    lookahead=self.lookahead,
                    prefetch_depth=2,
                    warmup_steps=self.warmup_steps,
                )
            case "resident":
                return ArmSettings(
                    policy="min",
                    num_slots=min(_FEW_BATCHES * most_uniques + room, num_rows),
                    lookahead=self.lookahead,
                    prefetch_depth=2,
                    warmup_steps=few,
                    num_batches=_FEW_BATCHES,
                )
            case "synchronous":
                return ArmSettings(
                    policy=NO_CACHE,
                    num_slots=most_uniques,
                    lookahead=1,
                    prefetch_depth=0,
                    warmup_steps=few,
                )
            case "lru":
                return ArmSettings(
                    # in a window of one batch it is LRU, but that the next batch's rows stay
                    policy="min",
                    num_slots=cached,
                    lookahead=1,
                    prefetch_depth=0,
                    warmup_steps=self.warmup_steps,
                )
            case "prefetch":
                return ArmSettings(
                    policy="min", num_slots=room, lookahead=1, prefetch_depth=1, warmup_steps=few
                )
            case "lru_prefetch":
                return ArmSettings(
                    policy="min",
                    num_slots=cached,
                    lookahead=1,
                    prefetch_depth=1,
                    warmup_steps=self.warmup_steps,
                )
        raise AssertionError(arm)


@dataclass(frozen=True, kw_only=True)
class End:
    """What the process at one end is told, as JSON in its only argument."""

    bench: RemoteBench
    host: str
    """Where the server listens, or is reached."""
    port: int = 0
    instance: str = ""
    server_process: int = 0
    folder: str = ""
    """The run's, if it has one."""

    def argument(self) -> str:
        """As it is told."""
        return json.dumps(asdict(self))

    @classmethod
    def told(cls, argument: str) -> End:
        """What an argument tells."""
        values = json.loads(argument)
        return cls(**values | {"bench": RemoteBench(**values["bench"])})


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one arm measured with one device time in one turn."""

    arm: str
    device_ms: float
    step_s: list[float]
    lookup_s: float = 0.0
    """A step; the device's part computes lookup and update within its time."""
    update_s: float = 0.0
    uniques: float = 0.0
    """Rows a step."""
    fetched: float = 0.0
    written_back: float = 0.0
    waits_s: dict[str, float] = field(default_factory=dict)
    """A step, by what the trainer waited for."""
    trainer_cpu_s: float = 0.0
    """A step."""
    server_cpu_s: float = 0.0
    flush_s: float = 0.0
    """What the flush at the end of the turn took."""
    flushed: int = 0
    """Rows that it wrote; 0: not flushed yet."""
