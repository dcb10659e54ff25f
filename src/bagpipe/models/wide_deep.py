"""Wide & Deep: a linear model and an MLP over the same features, added up.

After Cheng et al., arXiv 1606.07792.

    sparse -> embeddings -> (B, F, D) -> first-order weights (B, F), vectors (B, F, D - 1)
    dense, weights -> wide                 -> (B,) ┐
    dense, vectors -> cat -> over_arch     -> (B,) ┴-> sum: logits (B,)

**Where the linear weights live.** The last column of each table holds its rows' first-order
weights; the other D - 1 are the vectors that the MLP sees. A feature belongs to one table, and a
record moves as a whole anyway, so one lookup, one group, one cache and one plan serve both. With
separate tables of dimension 1 every row would be planned, fetched and written back twice. The price
is that both share the embeddings' optimizer (with row-wise Adagrad even its one number a row),
where the paper has FTRL for the wide part.

Crossed features must come with the data: a cross is a sparse feature like any other. Data without
dense features will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bagpipe.errors import ConfigError
from bagpipe.models.base import RankingModel, check_top
from bagpipe.models.layers import MLP, FirstOrder


class WideDeep(RankingModel):
    """Wide & Deep, with the linear weights as the last column of each table.

    Args:
        embeddings: maps sparse features to pooled embeddings of `num_features` features, all of
            `embedding_dim`.
        num_dense: dense features a sample.
        num_features: sparse features a sample; by default those of `embeddings.groups`.
        embedding_dim: D, at least 2, the column of linear weights included; by default that of
            `embeddings.groups`.
        top: layer sizes of the MLP over dense features and vectors; the last one makes the
            logits.
        dropout: of the layers but the logit's; see `bagpipe.models.layers.MLP`.
        batch_norm: likewise.
        num_labels: how many logits a sample gets: one for each label.

    Raises:
        ConfigError: the last size of `top` is not `num_labels`, tables have several dimensions, or
            theirs is below 2.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        num_dense: int,
        *,
        num_features: int | None = None,
        embedding_dim: int | None = None,
        top: Sequence[int] = (1024, 512, 256, 1),
        dropout: float = 0.0,
        batch_norm: bool = False,
        num_labels: int = 1,
    ) -> None:
        name = type(self).__name__
        check_top(name, top, num_labels)
        super().__init__(embeddings, num_features=num_features, embedding_dim=embedding_dim)
        if self.embedding_dim < 2:
            raise ConfigError(
                f"{name}: embedding_dim is {self.embedding_dim}, must be at least 2: a column of "
                "first-order weights, and vectors"
            )
        self.wide = FirstOrder(num_dense)
        self.over_arch = MLP(
            num_dense + self.num_features * (self.embedding_dim - 1),
            top,
            last_activation=False,
            dropout=dropout,
            batch_norm=batch_norm,
        )

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """See `RankingModel.dense_part`."""
        vectors, first_order = self._split(pooled)
        wide: Tensor = self.wide(dense, first_order)
        return self._with_deep(wide, dense, vectors)

    def _split(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, F, D - 1) and first-order weights (B, F)."""
        columns = self._vectors(pooled)
        return columns[:, :, :-1], columns[:, :, -1]

    def _with_deep(self, wide: Tensor, dense: Tensor, vectors: Tensor) -> Tensor:
        """The sum of a term (B,), which all labels share, and the MLP's logits."""
        deep: Tensor = self.over_arch(
            torch.cat([dense, vectors.flatten(1).to(dense.dtype)], dim=1)
        ).squeeze(1)
        return wide + deep if deep.dim() == 1 else wide.unsqueeze(1) + deep
