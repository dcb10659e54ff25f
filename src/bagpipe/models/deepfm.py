"""DeepFM: a factorization machine and an MLP over the same embeddings, added up.

After Guo et al., arXiv 1703.04247.

    sparse -> embeddings -> (B, F, D) -> first-order weights (B, F), vectors (B, F, D - 1)
    dense, weights -> wide                          -> (B,) ┐
    dense, vectors -> factorization_machine         -> (B,) ┼-> sum: logits (B,)
    dense, vectors -> cat -> over_arch              -> (B,) ┘

It is `WideDeep`, whose last column of each table holds the first-order weights, plus the
second-order terms. Each dense feature has a vector of its own, a parameter. Scaled by the feature's
value, it takes part in these terms: the paper's way for continuous fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bagpipe.models.layers import FactorizationMachine
from bagpipe.models.wide_deep import WideDeep


class DeepFM(WideDeep):
    """Deep factorization machine.

    Takes the arguments of `WideDeep` and raises what it raises.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        num_dense: int,
        *,
        num_features: int | None = None,
        embedding_dim: int | None = None,
        top: Sequence[int] = (400, 400, 400, 1),
        dropout: float = 0.0,
        batch_norm: bool = False,
        num_labels: int = 1,
    ) -> None:
        super().__init__(
            embeddings,
            num_dense,
            num_features=num_features,
            embedding_dim=embedding_dim,
            top=top,
            dropout=dropout,
            batch_norm=batch_norm,
            num_labels=num_labels,
        )
        self.factorization_machine = FactorizationMachine()
        num_factors = self.embedding_dim - 1
        self.dense_vectors = nn.Parameter(
            torch.randn(num_dense, num_factors) / num_factors**0.5 * 0.1
        )

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """See `RankingModel.dense_part`."""
        vectors, first_order = self._split(pooled)
        of_dense = dense.unsqueeze(2) * self.dense_vectors  # (B, num_dense, D - 1)
        second_order: Tensor = self.factorization_machine(
            torch.cat([of_dense, vectors.to(of_dense.dtype)], dim=1)
        )
        wide: Tensor = self.wide(dense, first_order)
        return self._with_deep(wide + second_order, dense, vectors)
