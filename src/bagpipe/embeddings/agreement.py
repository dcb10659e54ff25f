"""Whether several trainers plan alike: their plans fit together only if made of the same things."""

from __future__ import annotations

import json

from bagpipe.distributed.alone import Peers
from bagpipe.errors import ConfigError
from bagpipe.feed.stream import StreamOptions


def check_same_settings(peers: Peers, options: StreamOptions, *, seed: int) -> None:
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
    texts = peers.gather_texts("the settings", json.dumps(own, default=int))  # of numpy, too
    first, *others = (json.loads(text) for text in texts)
    for rank, other in enumerate(others, 1):
        for key, value in first.items():
            if other[key] != value:
                raise ConfigError(
                    f"ranks plan with other settings: {key} is {value!r} on rank 0 and "
                    f"{other[key]!r} on rank {rank}; give all the same"
                )
