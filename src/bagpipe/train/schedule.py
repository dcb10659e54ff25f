"""Which batches a run trains, from any position on, over as many epochs as it takes.

Loads no torch: an oracle process reads the batches, and torch would take it seconds to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from bagpipe.data.base import Batch, BatchSource, Position, count_batches
from bagpipe.errors import ConfigError
from bagpipe.feed.stream import Deferred

if TYPE_CHECKING:
    from bagpipe.config.run import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which batches a run trains: `num_steps` of them, `num_batches` an epoch."""

    batch_size: int
    drop_last: bool
    num_batches: int
    num_steps: int

    def batch_size_of(self, step: int, num_samples: int) -> int:
        """Samples of the batch of step `step`, from 0, where an epoch has `num_samples`.

        An epoch's last batch may be smaller.
        """
        return min(self.batch_size, num_samples - step % self.num_batches * self.batch_size)

    def position_after(self, step: int) -> Position:
        """The next batch after `step` steps."""
        epoch, batch = divmod(step, self.num_batches)
        return Position(epoch=epoch, batch=batch)


def make_schedule(config: TrainConfig, num_samples: int) -> Schedule:
    """How many steps to train, of which batches.

    Raises:
        ConfigError: not one batch is left.
    """
    num_batches = count_batches(num_samples, config.batch_size, drop_last=config.drop_last)
    if num_batches == 0:
        raise ConfigError(
            f"train.batch_size = {config.batch_size:,} with drop_last leaves no batch of the "
            f"{num_samples:,} training samples: "
            "set drop_last = false or a smaller batch_size"
        )
    num_steps = config.steps if config.steps is not None else (config.epochs or 1) * num_batches
    return Schedule(
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        num_batches=num_batches,
        num_steps=num_steps,
    )


@dataclass(frozen=True, kw_only=True)
class RemainingBatches:
    """The batches of a run from `start` to its end, to be read where they are de-duplicated.

    They can be sent to another process.
    """

    source: BatchSource
    schedule: Schedule
    start: Position

    @property
    def batch_size(self) -> int:
        """Samples of most batches; the last one of an epoch may have fewer."""
        return self.schedule.batch_size

    def __iter__(self) -> Iterator[Deferred[Batch]]:
        schedule, epoch, first = self.schedule, self.start.epoch, self.start.batch
        left = schedule.num_steps - (epoch * schedule.num_batches + first)
        while left > 0:
            reads = self.source.reads(
                batch_size=schedule.batch_size,
                epoch=epoch,
                start=first,
                drop_last=schedule.drop_last,
            )
            for read in islice(reads, left):
                yield Deferred(read)
            left -= schedule.num_batches - first
            epoch, first = epoch + 1, 0
