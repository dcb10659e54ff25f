"""DLRM: dense and sparse features, pairwise dot products, one logit.

After Naumov et al., arXiv 1906.00091.

    dense (B, num_dense) -> dense_arch ->  (B, D)    ┐
    sparse               -> embeddings ->  (B, F, D) ┴-> inter_arch -> (B, D + pairs)
                                                         -> over_arch -> logits (B,)

Submodules have the names of TorchRec's DLRM. The embeddings are any module that maps the sparse
features of a batch to pooled embeddings: `bagpipe.EmbeddingBagCollection`, or tables in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bagpipe.models.base import RankingModel, check_bottom, check_top
from bagpipe.models.layers import MLP, PairwiseDot


class DLRM(RankingModel):
    """Deep Learning Recommendation Model.

    Args:
        embeddings: maps sparse features to pooled embeddings of `num_features` features, all of
            the embedding dimension D.
        num_dense: dense features a sample.
        num_features: sparse features a sample; by default those of `embeddings.groups`.
        bottom: layer sizes of the MLP over dense features; the last one is D.
        top: layer sizes of the MLP over the interactions; the last one makes the
            logits.
        dropout: of the layers but the logit's; see `bagpipe.models.layers.MLP`.
        batch_norm: likewise.
        num_labels: how many logits a sample gets: one for each label.

    Raises:
        ConfigError: a table's dimension is not the last size of `bottom`; the last size of `top` is
            not `num_labels`; `bottom` is empty; or there are no dense features.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        num_dense: int,
        *,
        num_features: int | None = None,
        bottom: Sequence[int] = (512, 256, 64),
        top: Sequence[int] = (512, 256, 1),
        dropout: float = 0.0,
        batch_norm: bool = False,
        num_labels: int = 1,
    ) -> None:
        check_bottom("DLRM", bottom, num_dense)
        check_top("DLRM", top, num_labels)
        super().__init__(embeddings, num_features=num_features, embedding_dim=bottom[-1])
        self.dense_arch = MLP(num_dense, bottom, dropout=dropout, batch_norm=batch_norm)
        self.inter_arch = PairwiseDot(self.num_features + 1)
        self.over_arch = MLP(
            self.embedding_dim + self.inter_arch.num_pairs,
            top,
            last_activation=False,
            dropout=dropout,
            batch_norm=batch_norm,
        )

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """See `RankingModel.dense_part`."""
        embedded_sparse = self._vectors(pooled)
        embedded_dense = self.dense_arch(dense)  # (B, D)
        # In the type of the MLP's output: under autocast, cat would choose the wider one.
        vectors = torch.cat(  # (B, F + 1, D)
            [embedded_dense.unsqueeze(1), embedded_sparse.to(embedded_dense.dtype)], dim=1
        )
        concatenated = torch.cat([embedded_dense, self.inter_arch(vectors)], dim=1)
        logits: Tensor = self.over_arch(concatenated)
        return logits.squeeze(1)
