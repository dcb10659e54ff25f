"""What every model is: embeddings, and a dense part over their pooled values.

The two are separate so that a training loop can run the embedding stages around the dense part,
which sees floats only and can be captured as a CUDA graph. `forward` does both at once, for
evaluation and for loops with autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bagpipe.errors import ConfigError
from bagpipe.models.layers import Pooled


class RankingModel(nn.Module, ABC):
    """A model that gives each sample one logit, or one for each of several labels.

    Args:
        embeddings: maps the sparse features of a batch to pooled embeddings:
            `bagpipe.EmbeddingBagCollection`, or tables in memory.
        num_features: sparse features a sample; by default those of `embeddings.groups`.
        embedding_dim: D, which all tables must have; by default that of `embeddings.groups`.

    Raises:
        ConfigError: a table's dimension is not `embedding_dim`; or `embeddings` has no `groups` and
            an argument is missing.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        *,
        num_features: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        groups: Sequence[Any] = getattr(embeddings, "groups", ())
        if not groups and (num_features is None or embedding_dim is None):
            raise ConfigError(
                f"{type(self).__name__}: its embeddings have no `groups` to tell sizes: give them "
                "as arguments"
            )
        if embedding_dim is None:
            embedding_dim = groups[0].embedding_dim
        for group in groups:
            if group.embedding_dim != embedding_dim:
                raise ConfigError(
                    f"{type(self).__name__}: table {group.tables[0].name!r} has embedding_dim "
                    f"{group.embedding_dim}, where {embedding_dim} is expected: give all tables "
                    "one dimension, and the last layer of bottom, where there is one"
                )
        self.num_features: int = (
            sum(len(group.features) for group in groups) if num_features is None else num_features
        )
        self.embedding_dim: int = embedding_dim
        self.embeddings = embeddings

    def forward(self, dense: Tensor, sparse: object) -> Tensor:
        """Computes the logits of a batch.

        Args:
            dense: dense features, (B, num_dense) float32.
            sparse: the batch's sparse features, as `embeddings` takes them.

        Returns:
            Logits, (B,), or (B, L) of a model of L labels.
        """
        pooled: Pooled = self.embeddings(sparse)
        return self.dense_part(dense, pooled.values())

    @abstractmethod
    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Computes the logits of a batch from its pooled embeddings: all but the lookup.

        Args:
            dense: dense features, (B, num_dense) float32.
            pooled: pooled embeddings, feature after feature, (B, F * D) float.

        Returns:
            Logits, (B,), or (B, L) of a model of L labels.
        """

    def _vectors(self, pooled: Tensor) -> Tensor:
        return pooled.view(-1, self.num_features, self.embedding_dim)  # (B, F, D)


def check_top(model: str, top: Sequence[int], num_labels: int) -> None:
    """Raises ConfigError unless the last layer makes one logit for each label."""
    if not top or top[-1] != num_labels:
        what = "the logit" if num_labels == 1 else f"the logits of {num_labels} labels"
        raise ConfigError(
            f"{model}(top={list(top)}): the last layer makes {what}, so its size must be "
            f"{num_labels}"
        )


def check_bottom(model: str, bottom: Sequence[int], num_dense: int) -> None:
    """Raises ConfigError where there is no layer, or no dense feature for it."""
    if not bottom:
        raise ConfigError(
            f"{model}(bottom=[]): needs at least one layer, of the embedding dimension"
        )
    if num_dense < 1:
        raise ConfigError(
            f"{model}: the data have no dense features, which its bottom layers need: use WideDeep "
            "or DeepFM (in a file model.kind = 'wide_deep' or 'deepfm', without model.bottom)"
        )
