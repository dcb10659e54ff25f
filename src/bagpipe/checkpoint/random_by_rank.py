"""torch's random state of each rank, which trainers of an own loop draw from on their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bagpipe.checkpoint.dense import put_random
from bagpipe.distributed.trainers import Trainers


def random_by_rank(trainers: Trainers) -> list[list[torch.Tensor]]:
    """Each rank's random states, the CPU's first; none where one trainer has no others."""
    if not trainers.peers.has_others:
        return []
    states = [torch.get_rng_state()]
    states += torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    told = json.dumps([state.numpy().tobytes().hex() for state in states])
    return [
        [torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for text in json.loads(texts)]
        for texts in trainers.peers.gather_texts("the random state", told)
    ]


def put_random_of_rank(
    content: Mapping[str, Any], by_rank: Sequence[Sequence[torch.Tensor]], trainers: Trainers
) -> None:
    """Sets this rank's random state; after a change of their number it stays as it is.

    Args:
        content: a checkpoint's dense part, which has that of a single trainer.
        by_rank: what `random_by_rank` gave when it was saved.
        trainers: those that go on.
    """
    if not by_rank and not trainers.peers.has_others:
        put_random(content["random"], content["random_cuda"])
    elif len(by_rank) == trainers.peers.num_trainers:
        state, *of_cuda = by_rank[trainers.peers.rank]
        put_random(state, of_cuda)
