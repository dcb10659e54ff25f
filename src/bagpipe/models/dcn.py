"""DLRM with a cross network in place of the dot products, as MLPerf trains it.

The cross network is that of DCN-v2 (Wang et al., arXiv 2008.13535).

    dense (B, num_dense) -> dense_arch -> (B, D)     ┐
    sparse               -> embeddings -> (B, F * D) ┴-> inter_arch -> (B, (F + 1) * D)
                                                         -> over_arch -> logits (B,)

The cross network keeps the width of its input, so forward costs 2 * num_cross_layers * cross_rank *
(F + 1) * D multiplications a sample, and backward twice that: 10.6 million with 26 features of 128.
Submodules have the names of TorchRec's DLRM_DCN. The default sizes are those of MLPerf's
DLRM-DCNv2, except for the embedding dimension, which is 128 there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bagpipe.models.base import RankingModel, check_bottom, check_top
from bagpipe.models.layers import MLP, LowRankCrossNet


class DLRM_DCN(RankingModel):
    """DLRM with a low-rank cross network (DCN-v2).

    Args:
        embeddings: maps sparse features to pooled embeddings of `num_features` features, all of
            the embedding dimension D.
        num_dense: dense features a sample.
        num_features: sparse features a sample; by default those of `embeddings.groups`.
        bottom: layer sizes of the MLP over dense features; the last one is D.
        top: layer sizes of the MLP over the crossed features; the last one makes the
            logits.
        num_cross_layers: layers of the cross network, each of which raises the degree of the
            crosses by one.
        cross_rank: rank of each cross layer's matrix.
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
        top: Sequence[int] = (1024, 1024, 512, 256, 1),
        num_cross_layers: int = 3,
        cross_rank: int = 512,
        dropout: float = 0.0,
        batch_norm: bool = False,
        num_labels: int = 1,
    ) -> None:
        check_bottom("DLRM_DCN", bottom, num_dense)
        check_top("DLRM_DCN", top, num_labels)
        super().__init__(embeddings, num_features=num_features, embedding_dim=bottom[-1])
        width = (self.num_features + 1) * self.embedding_dim
        self.dense_arch = MLP(num_dense, bottom, dropout=dropout, batch_norm=batch_norm)
        self.inter_arch = LowRankCrossNet(width, num_layers=num_cross_layers, rank=cross_rank)
        self.over_arch = MLP(
            width, top, last_activation=False, dropout=dropout, batch_norm=batch_norm
        )

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """See `RankingModel.dense_part`."""
        embedded_dense = self.dense_arch(dense)  # (B, D)
        # In the type of the MLP's output: under autocast, cat would choose the wider one.
        columns = torch.cat([embedded_dense, pooled.to(embedded_dense.dtype)], dim=1)
        logits: Tensor = self.over_arch(self.inter_arch(columns))
        return logits.squeeze(1)
