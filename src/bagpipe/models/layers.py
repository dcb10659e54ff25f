"""Layers that recommendation models share: an MLP, and what combines the features of a sample.

| layer                | combines                                | after           |
|----------------------|-----------------------------------------|-----------------|
| PairwiseDot          | vectors, by all dot products            | DLRM (1)        |
| LowRankCrossNet      | columns, by crosses of bounded degree   | DCN-v2 (2)      |
| FirstOrder           | features, by a weighted sum             | Wide & Deep (3) |
| FactorizationMachine | vectors, by the sum of all dot products | Rendle (4)      |

(1) Naumov et al., arXiv 1906.00091. (2) Wang et al., arXiv 2008.13535. (3) Cheng et al., arXiv
1606.07792. (4) Rendle, "Factorization Machines", ICDM 2010.

The pairwise dot has a backward of its own. It puts the gradient of the products back as one
symmetric matrix and multiplies once, where autograd would scatter it and multiply twice. This is
two to three times as fast on a CPU, and without atomics on a GPU the result is the same from run to
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Pooled(Protocol):
    """What an embeddings module returns: the parts of TorchRec's KeyedTensor that a model reads."""

    def keys(self) -> Sequence[str]:
        """Feature names in the order of `values`."""

    def values(self) -> Tensor:
        """Pooled embeddings of all features side by side, (B, sum of embedding_dim) float32."""

    def __getitem__(self, key: str, /) -> Tensor:
        """Pooled embeddings of one feature, (B, embedding_dim) float32."""


class MLP(nn.Sequential):
    """Linear layers with a ReLU after each, the last one too unless `last_activation` is False.

    Before a ReLU comes batch norm, and after it dropout, where they are asked for.

    Weights start as the DLRM reference's do: normal with variance 2 / (fan in + fan out), biases
    with 1 / fan out.

    Args:
        in_features: columns of the input, (B, in_features) float32.
        layer_sizes: columns of each layer's output; the output is (B, layer_sizes[-1]) float32.
        last_activation: whether a ReLU follows the last layer.
        dropout: the share of values that become 0 in training, from 0 to below 1.
        batch_norm: whether values are normalized over a batch, in training one of 2 or more.

    Raises:
        ValueError: a size is below 1, `layer_sizes` is empty, or `dropout` is no such share.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        *,
        last_activation: bool = True,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        sizes = [in_features, *layer_sizes]
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"MLP({in_features}, {list(layer_sizes)}): needs at least one layer, and every "
                "size at least 1"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"MLP(dropout={dropout}): must be a share from 0 to below 1")
        layers: list[nn.Module] = []
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=(2.0 / (fan_in + fan_out)) ** 0.5)
            nn.init.normal_(linear.bias, std=(1.0 / fan_out) ** 0.5)
            layers.append(linear)
            if number < len(sizes) - 1 or last_activation:
                layers += [nn.BatchNorm1d(fan_out)] * batch_norm + [nn.ReLU()]
                layers += [nn.Dropout(dropout)] * (dropout > 0.0)
        super().__init__(*layers)


class PairwiseDot(nn.Module):
    """Dot products of all pairs of different vectors of a sample.

    Maps (B, num_vectors, D) to (B, num_vectors * (num_vectors - 1) / 2): the pairs (i, j) with
    j < i, ordered by i and then j.

    Args:
        num_vectors: vectors a sample.
    """

    lower: Tensor
    symmetric: Tensor

    def __init__(self, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        rows, columns = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        lower = rows * num_vectors + columns  # (num_pairs,)
        pairs = torch.arange(len(rows))
        # The diagonal reads the zero that backward appends behind the last pair.
        symmetric = torch.full((num_vectors, num_vectors), len(rows))
        symmetric[rows, columns] = pairs
        symmetric[columns, rows] = pairs
        # They follow from the size, so checkpoints need not hold them.
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("symmetric", symmetric.view(-1), persistent=False)

    @property
    def num_pairs(self) -> int:
        """Columns of the output."""
        return self.num_vectors * (self.num_vectors - 1) // 2

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, num_vectors, D) float to (B, num_pairs) of the same type."""
        products: Tensor = _PairwiseDotFunction.apply(  # type: ignore[no-untyped-call]
            vectors, self.lower, self.symmetric
        )
        return products


class _PairwiseDotFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, vectors: Tensor, lower: Tensor, symmetric: Tensor
    ) -> Tensor:
        ctx.save_for_backward(vectors, symmetric)
        products = torch.bmm(vectors, vectors.transpose(1, 2))  # (B, V, V)
        return products.flatten(1).index_select(1, lower)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        vectors, symmetric = ctx.saved_tensors  # type: ignore[attr-defined]
        (by_pair,) = gradients  # (B, num_pairs)
        by_pair = torch.nn.functional.pad(by_pair, (0, 1))  # (B, num_pairs + 1), zero last
        batch_size, num_vectors, _ = vectors.shape
        matrix = by_pair.index_select(1, symmetric).view(batch_size, num_vectors, num_vectors)
        return torch.bmm(matrix, vectors), None, None


class LowRankCrossNet(nn.Module):
    """DCN-v2's cross network, with matrices of low rank.

    Each layer l computes ``x[l + 1] = x[0] * (W[l] (V[l] x[l]) + b[l]) + x[l]``. Parameters start
    as those of TorchRec's LowRankCrossNet: matrices Xavier normal, biases zero.

    Args:
        in_features: columns of input and output, (B, in_features) float.
        num_layers: layers; the output has crosses of up to num_layers + 1 input columns.
        rank: columns between V and W.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, in_features: int, *, num_layers: int, rank: int) -> None:
        super().__init__()
        if min(in_features, num_layers, rank) < 1:
            raise ValueError(
                f"LowRankCrossNet({in_features}, num_layers={num_layers}, rank={rank}): all must "
                "be at least 1"
            )
        downs = [nn.Linear(in_features, rank, bias=False) for _ in range(num_layers)]
        ups = [nn.Linear(rank, in_features) for _ in range(num_layers)]
        for linear in downs + ups:
            nn.init.xavier_normal_(linear.weight)
        for up in ups:
            nn.init.zeros_(up.bias)
        self.down, self.up = nn.ModuleList(downs), nn.ModuleList(ups)  # V; W and b

    def forward(self, columns: Tensor) -> Tensor:
        """(B, in_features) float to the same shape and type."""
        crossed = columns
        for down, up in zip(self.down, self.up, strict=True):
            crossed = torch.addcmul(crossed, columns, up(down(crossed)))
        return crossed


class FirstOrder(nn.Module):
    """The linear part of a model: weighted dense features plus the weights of the sparse ones.

    The weights of dense features are parameters, which start at zero.

    Args:
        num_dense: dense features a sample.
    """

    def __init__(self, num_dense: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_dense))

    def forward(self, dense: Tensor, weights: Tensor) -> Tensor:
        """Adds up a sample's first-order terms.

        Args:
            dense: dense features, (B, num_dense) float32.
            weights: the weights of the sparse features' rows, (B, F) float.

        Returns:
            (B,) float32.
        """
        return (dense * self.weight).sum(1) + weights.float().sum(1)


class FactorizationMachine(nn.Module):
    """Second-order terms: the sum of the dot products of all pairs of a sample's vectors.

    It is computed as ((sum v)^2 - sum v^2) / 2, which is linear in the number of vectors.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, V, D) float to (B,) float32."""
        vectors = vectors.float()  # the small difference of two large sums needs the places
        return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
