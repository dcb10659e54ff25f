"""What several trainers must agree on before they train: their plans fit together only if all make
them of the same things.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bagpipe.config.compare import compare_configs
from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import ConfigError
from bagpipe.feed.stream import StreamOptions

_OF_A_HOST = ("log.folder", "data.folder", "prepare", "embeddings.store", "cache.threads")
"""Keys of a run's configuration that may differ from host to host."""


def check_same_run(communicator: Communicator, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError on every rank where one has another configuration, as nested mappings; all
    must call it.
    """
    _check_same(
        communicator,
        "the run's settings",
        settings,
        otherwise="train",
        remedy="start all with the same file and options",
        but_for=_OF_A_HOST,
    )


def check_same_settings(communicator: Communicator, options: StreamOptions, *, seed: int) -> None:
    """Raises ConfigError on every rank where one plans with other settings; all must call it."""
    own = {
        "tables and optimizer": repr(options.groups),
        "cache (slots by group)": list(options.num_slots),
        "replicas (by group)": list(options.topology.num_replica_slots),
        "lookahead": options.lookahead,
        "lookahead_memory (bytes)": options.lookahead_bytes,
        "prefetch_depth": options.prefetch_depth,
        "step": options.first_step,
        "seed": seed,
    }
    _check_same(communicator, "the settings", own, otherwise="plan", remedy="give all the same")


def _check_same(
    communicator: Communicator,
    what: str,
    settings: Mapping[str, Any],
    *,
    otherwise: str,
    remedy: str,
    but_for: tuple[str, ...] = (),
) -> None:
    """Raises ConfigError on every rank where a key differs that is not within `but_for`."""
    first, *others = (
        json.loads(text) for text in communicator.gather_texts(what, json.dumps(settings))
    )
    for rank, other in enumerate(others, 1):
        for difference in compare_configs(first, other):
            if not difference.is_within(but_for):
                raise ConfigError(
                    f"ranks {otherwise} with other settings: {difference.key} is "
                    f"{difference.old!r} on rank 0 and {difference.new!r} on rank {rank}; {remedy}"
                )
