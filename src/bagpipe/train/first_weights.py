"""What the dense part of several trainers begins with: the same on all."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from bagpipe.distributed.alone import Alone, Peers
from bagpipe.errors import ConfigError


def share_first_weights(model: nn.Module, peers: Peers) -> None:
    """Gives all trainers rank 0's parameters and buffers.

    A model of the user's own may draw its first numbers from elsewhere than torch's generator,
    whose seed is the same on all ranks. Gradients alone are averaged, so a difference would stay.

    Raises:
        ConfigError: a rank's model has other parameters.
    """
    if isinstance(peers, Alone):
        return
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    shapes = [[name, str(each.dtype), *each.shape] for name, each in tensors.items()]
    told = peers.gather_texts("the dense part's shapes", json.dumps(shapes))
    for rank, text in enumerate(told):
        if text != told[0]:
            raise ConfigError(
                f"{type(model).__name__} has other parameters on rank {rank} than on rank 0: make "
                "the same model on all ranks"
            )
    if not tensors:
        return
    whole, num_trainers = torch.cat([_bytes_of(each) for each in tensors.values()]), len(told)
    num_bytes, is_first = len(whole), peers.rank == 0
    with peers.naming("sharing the dense part's first weights"):
        firsts = peers.swap(
            whole.repeat(num_trainers if is_first else 0),
            [num_bytes * is_first] * num_trainers,
            [num_bytes] + [0] * (num_trainers - 1),
        )
    sizes = [each.numel() * each.element_size() for each in tensors.values()]
    with torch.no_grad():
        for each, first in zip(tensors.values(), firsts.split(sizes), strict=True):
            # `clone`, since a part may begin at any byte
            each.copy_(first.clone().view(each.dtype).view(each.shape))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
