"""What a lookup of all features of a batch gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PooledEmbeddings:
    """Pooled embeddings of one batch by feature, with the methods of TorchRec's KeyedTensor.

    Features are ordered table by table, tables of one dimension together. Tensors are views of one
    (B, F, D) a group.
    """

    def __init__(self, features: Sequence[tuple[str, ...]], groups: Sequence[Tensor]) -> None:
        """`features` and pooled tensors (B, F, D), by group."""
        self.groups = tuple(groups)
        self._places = {
            name: (group, index)
            for group, names in enumerate(features)
            for index, name in enumerate(names)
        }

    def keys(self) -> list[str]:
        """Feature names in the order of `values`."""
        return list(self._places)

    def values(self) -> Tensor:
        """All features side by side: (B, sum of D); not copied when there is one group."""
        flat = [group.flatten(1) for group in self.groups]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def __getitem__(self, feature: str) -> Tensor:
        """One feature's embeddings: (B, D)."""
        group, index = self._places[feature]
        return self.groups[group][:, index]

    def to_dict(self) -> dict[str, Tensor]:
        """Feature -> (B, D)."""
        return {name: self[name] for name in self._places}
