"""What decides the numbers of a run, as JSON values, and whether all trainers start from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bagpipe.config.compare import compare_configs
from bagpipe.config.rates import CosineRate, PlateauRate, PolynomialRate, RateConfig
from bagpipe.config.run import RunConfig
from bagpipe.data.manifest import PreparedManifest
from bagpipe.distributed.alone import Peers
from bagpipe.errors import ConfigError
from bagpipe.train.schedule import make_schedule

_MAY_DIFFER = (
    "log.folder",
    "data.folder",
    "prepare",
    "embeddings.store",
    "cache.threads",
    "servers.token_file",
    "servers.token_variable",
    "servers.tls.root",
    "servers.tls.certificate",
    "servers.tls.key",
)
"""Keys of a run's configuration that belong to a host, so that each may have its own."""


def describe_run(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values, as a checkpoint remembers it.

    It includes what the configuration leaves to the model, and to the length of the run where that
    decides numbers. For prepared data it has a hash of the training split, so that another split is
    noticed wherever the folder lies.

    Raises:
        ConfigError: a learning rate's schedule does not fit the run.
    """
    # where the tables are decides no number: other servers, or none, may go on with a run
    settings = config.model_dump(mode="json", exclude={"servers"})
    if (init := config.table_init) is not None:
        settings["embeddings"]["init"] = init.model_dump(mode="json")
    settings["embeddings"]["optimizer"] = config.table_optimizer.model_dump(mode="json")
    settings["train"]["optimizer"] = config.dense_optimizer.model_dump(mode="json")
    for section, schedule in (
        ("train", config.train.lr_schedule),
        ("embeddings", config.table_lr_schedule),
    ):
        if schedule is not None:
            settings[section]["lr_schedule"] = _describe_schedule(schedule, config)
    if config.data.kind == "prepared":
        settings["data"]["content"] = data_content(config.data.folder)
    return settings


def data_content(folder: Path) -> str:
    """A hash of the training split in a folder of prepared data."""
    return PreparedManifest.load(folder).content


def describe_start(config: RunConfig) -> dict[str, Any]:
    """As `describe_run`, with what all ranks of a start must have alike beside that."""
    return describe_run(config) | config.model_dump(mode="json", include={"servers"})


def _describe_schedule(schedule: RateConfig, config: RunConfig) -> dict[str, Any]:
    """A schedule with what it leaves to the run."""
    described = schedule.model_dump(mode="json")
    if isinstance(schedule, PlateauRate):
        described["eval_every_steps"] = config.train.eval_every_steps
        if schedule.metric == "grouped_auc":
            described["group_by"] = config.train.group_by
    if isinstance(schedule, PolynomialRate | CosineRate):
        num_samples = (
            PreparedManifest.load(config.data.folder).num_rows("train")
            if config.data.kind == "prepared"
            else config.data.num_samples
        )
        num_steps = make_schedule(config.train, num_samples).num_steps
        try:
            described["start_step"], described["decay_steps"] = schedule.decay(num_steps)
        except ValueError as error:
            raise ConfigError(f"lr_schedule.kind = {schedule.kind!r}: {error}") from error
    return described


def check_same_run(peers: Peers, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError on every rank where one has another configuration.

    All ranks must call it. `settings` are nested mappings of JSON values.
    """
    texts = peers.gather_texts("the run's settings", json.dumps(settings))
    first, *others = (json.loads(text) for text in texts)
    for rank, other in enumerate(others, 1):
        for difference in compare_configs(first, other):
            if not difference.is_within(_MAY_DIFFER):
                raise ConfigError(
                    f"ranks train with other settings: {difference.key} is {difference.old!r} on "
                    f"rank 0 and {difference.new!r} on rank {rank}; start all with the same file "
                    "and options"
                )
