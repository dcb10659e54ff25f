"""Every error that Bagpipe raises on purpose, in one tree.

    BagpipeError
    ├── ConfigError (ValueError)        a setting is wrong; nothing has started
    │   └── CacheTooSmallError          one batch alone needs more slots than the cache has
    ├── DataError (ValueError)          the input is wrong: says which file, line, column or feature
    ├── StoreError (OSError)            rows could not be read, written or saved
    ├── CheckpointError                 a checkpoint is missing, damaged or of another run
    ├── LossError (ArithmeticError)     the training loss is not finite
    ├── TakenOverError (RuntimeError)   a newer start has taken the run over
    ├── UsageError (RuntimeError)       the library was called in an order that it can't serve
    ├── PlanError (AssertionError)      a plan breaks an invariant: a defect, please report it
    └── BackgroundError (RuntimeError)  a background thread failed; see its ``__cause__``
        └── LostError                   the oracle process is gone, or a trainer that shares it

A message names what was wrong, where, the limit, and what to do.
"""

from __future__ import annotations

from typing import Any


class OptimizerStateWarning(UserWarning):
    """Weights were loaded without the optimizer's state."""


class BagpipeError(Exception):
    """Base of every error that Bagpipe raises on purpose."""


class ConfigError(BagpipeError, ValueError):
    """A setting is wrong, on its own or together with another one."""


class CacheTooSmallError(ConfigError):
    """One batch alone needs more slots than the cache has."""

    def __init__(
        self,
        *,
        step: int,
        group: str,
        num_uniques: int,
        num_needed: int,
        num_slots: int,
        num_trainers: int = 1,
        cache_rows: int | None = None,
        last_step: int | None = None,
    ) -> None:
        """Says which batch doesn't fit, and how large a cache would do.

        Args:
            step: The step of the batch.
            group: The group whose cache is too small.
            num_uniques: Unique rows of the batch, over all trainers.
            num_needed: Slots that would do, over all trainers. They are more than `num_uniques` if
                the rows are spread unevenly over the cache's shards.
            num_slots: Slots that the cache has, over all trainers.
            num_trainers: How many trainers share the batch.
            cache_rows: Rows per trainer, over all groups, that hold any of the batches seen. By
                default the refused batch is the only one, and its group too.
            last_step: Step of the last batch seen; by default `step`.
        """
        cache_rows = -(-num_needed // num_trainers) if cache_rows is None else cache_rows
        last_step = step if last_step is None else last_step
        self._values: dict[str, Any] = {
            "step": step,
            "group": group,
            "num_uniques": num_uniques,
            "num_needed": num_needed,
            "num_slots": num_slots,
            "num_trainers": num_trainers,
            "cache_rows": cache_rows,
            "last_step": last_step,
        }
        self.step, self.group, self.num_slots = step, group, num_slots
        self.num_uniques, self.num_needed = num_uniques, num_needed
        self.cache_rows, self.last_step = cache_rows, last_step
        in_shards = " in shards, of which one would overflow" if num_uniques <= num_slots else ""
        of_each = f" of each of the {num_trainers} trainers" if num_trainers > 1 else ""
        super().__init__(
            f"step {step} uses {num_uniques:,} unique rows of {group}, but its cache has "
            f"{num_slots:,} slots{in_shards}: give the cache{of_each} at least "
            f"{cache_rows:,} rows, which all batches seen, up to step "
            f"{last_step}, fit into (`bagpipe plan` names the largest batch of a run), or train "
            "with smaller batches"
        )

    def after_seeing(self, *, cache_rows: int, last_step: int) -> CacheTooSmallError:
        """The same error, once more batches have been looked at."""
        return CacheTooSmallError(
            **{**self._values, "cache_rows": cache_rows, "last_step": last_step}
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_cache_too_small, (self._values,)


def _rebuild_cache_too_small(values: dict[str, Any]) -> CacheTooSmallError:
    return CacheTooSmallError(**values)


class DataError(BagpipeError, ValueError):
    """The input data are wrong; the message says which file, line, column or feature."""


class StoreError(BagpipeError, OSError):
    """An embedding store could not read or write its rows, or tables could not be saved."""


class CheckpointError(BagpipeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class LossError(BagpipeError, ArithmeticError):
    """The training loss is not finite; the message names the step."""


class TakenOverError(BagpipeError, RuntimeError):
    """A newer start of the run has taken it over; the message says which."""


class UsageError(BagpipeError, RuntimeError):
    """The library was called in an order that it cannot serve."""


class PlanError(BagpipeError, AssertionError):
    """A plan breaks one of the invariants of docs/design.md."""


class BackgroundError(BagpipeError, RuntimeError):
    """A background thread failed; the failure itself is the ``__cause__``."""


class LostError(BackgroundError):
    """The oracle process is gone, or one of several trainers, as far as can be told from here.

    The trainers may have come to different steps.
    """
