"""Which batches a run trains, from any position on, over as many epochs as it takes.

Loads no torch: an oracle process reads the batches, and torch would take it seconds to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from bagpipe.data.base import Batch, BatchSource, Position
from bagpipe.feed.stream import Deferred


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


@dataclass(frozen=True, kw_only=True)
class RemainingBatches:
    """The batches of a run from `start` to its end, to be read where they are de-duplicated.

    They can be sent to another process.
    """

    source: BatchSource
    schedule: Schedule
    start: Position

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
