"""What dropout and batch norm need of a run: random numbers by step and rank, and whole batches."""

from __future__ import annotations

import torch
import xxhash
from torch import nn

# every module that normalizes over a batch, which torch has no public name for
from torch.nn.modules.batchnorm import _BatchNorm

from bagpipe.config.model import OwnModelConfig
from bagpipe.config.run import RunConfig
from bagpipe.distributed.alone import Peers
from bagpipe.errors import ConfigError
from bagpipe.train.schedule import Schedule


class Noise:
    """The random numbers of a model that may draw some: those of each step are its own.

    They follow from the run's seed, the step and the rank, so they are the same after a resume, and
    different on each rank. Nothing else of a run draws any. A captured dense part draws the same.
    """

    def __init__(self, config: RunConfig, peers: Peers, device: torch.device) -> None:
        """Makes the noise of a run's model on this rank and device."""
        model = config.model
        self._draws = isinstance(model, OwnModelConfig) or model.dropout > 0.0
        self._seed, self._rank, self._device = config.train.seed, peers.rank, device

    def begin(self, step: int) -> None:
        """Begins the random numbers of a step, from 0."""
        if not self._draws:
            return
        seed = xxhash.xxh3_64_intdigest(f"{self._seed} {step} {self._rank}".encode()) >> 1
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)


def check_batch_norm(
    model: nn.Module, schedule: Schedule, num_samples: int, num_trainers: int
) -> None:
    """Raises ConfigError where a model has batch norm and can't be trained with it."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if num_trainers > 1:
        raise ConfigError(
            f"the model has batch norm, by which each of {num_trainers} trainers would normalize "
            "its own share of a batch: train with one trainer, or without (model.batch_norm)"
        )
    last = min(schedule.num_steps, schedule.num_batches) - 1
    for step in (0, last):
        if schedule.batch_size_of(step, num_samples) == 1:
            raise ConfigError(
                f"the model has batch norm, which needs two samples, and batch {step:,} of each "
                "epoch has one: set train.drop_last = true, or another train.batch_size"
            )
