"""Layers against their definitions."""

from __future__ import annotations

import pytest
import torch

from bagpipe.models.layers import MLP, LowRankCrossNet, PairwiseDot


def plain_pairwise_dot(vectors: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.tril_indices(vectors.shape[1], vectors.shape[1], offset=-1)
    return torch.bmm(vectors, vectors.transpose(1, 2))[:, rows, columns]


@pytest.mark.parametrize("num_vectors", [1, 2, 27])
def test_pairwise_dot_and_its_gradient_are_those_of_autograd(num_vectors: int) -> None:
    vectors = torch.randn(5, num_vectors, 4, dtype=torch.float64, requires_grad=True)
    layer = PairwiseDot(num_vectors)
    products, expected = layer(vectors), plain_pairwise_dot(vectors)
    assert products.shape == (5, layer.num_pairs)
    torch.testing.assert_close(products, expected)

    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(products, vectors, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, vectors, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


def test_pairwise_dot_has_no_state_to_save() -> None:
    assert PairwiseDot(3).state_dict() == {}


def test_mlp_ends_with_or_without_an_activation() -> None:
    inputs = torch.randn(64, 3)
    assert bool((MLP(3, [8, 2])(inputs) >= 0).all())
    assert bool((MLP(3, [8, 2], last_activation=False)(inputs) < 0).any())


@pytest.mark.parametrize(("in_features", "sizes"), [(3, []), (0, [2]), (3, [0])])
def test_mlp_refuses_sizes_that_make_no_layer(in_features: int, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        MLP(in_features, sizes)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_cross_network_refuses_sizes_below_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LowRankCrossNet(sizes[0], num_layers=sizes[1], rank=sizes[2])
