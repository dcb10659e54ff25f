"""DLRM_DCN, WideDeep and DeepFM against their formulas, and what all models have in common."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from tests.models.fakes import embeddings_of, make_sparse

from bagpipe.errors import ConfigError
from bagpipe.models import DLRM, DLRM_DCN, DeepFM, RankingModel, WideDeep

MAKERS: dict[str, Callable[[], RankingModel]] = {
    "dlrm": lambda: DLRM(embeddings_of(4, 4), 3, bottom=[8, 4], top=[6, 1]),
    "dcn": lambda: DLRM_DCN(
        embeddings_of(4, 4), 3, bottom=[8, 4], top=[6, 1], num_cross_layers=2, cross_rank=5
    ),
    "wide_deep": lambda: WideDeep(embeddings_of(4, 4), 3, top=[6, 1]),
    "deepfm": lambda: DeepFM(embeddings_of(4, 4), 3, top=[6, 1]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = MAKERS[kind]()
    model(torch.randn(50, 3), make_sparse(2, 50)).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.parameters()
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_the_dense_part_takes_bfloat16_under_autocast(kind: str) -> None:
    model, dense, pooled = MAKERS[kind](), torch.randn(50, 3), torch.randn(50, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.dense_part(dense, pooled.bfloat16())
    torch.testing.assert_close(logits.float(), model.dense_part(dense, pooled), rtol=0.05, atol=0.3)


def test_dcn_crosses_with_the_first_input_and_adds_the_last_one() -> None:
    model = DLRM_DCN(
        embeddings_of(4, 4), 3, bottom=[8, 4], top=[6, 1], num_cross_layers=2, cross_rank=5
    )
    dense, sparse = torch.randn(5, 3), make_sparse(2, 5)
    first = torch.cat([model.dense_arch(dense), model.embeddings(sparse).values()], dim=1)
    crossed = first
    for down, up in zip(model.inter_arch.down, model.inter_arch.up, strict=True):
        matrix = up.weight @ down.weight
        assert torch.linalg.matrix_rank(matrix) == 5
        crossed = first * (crossed @ matrix.T + up.bias) + crossed
    torch.testing.assert_close(model(dense, sparse), model.over_arch(crossed).squeeze(1))


def test_wide_deep_is_a_linear_model_plus_an_mlp() -> None:
    model = WideDeep(embeddings_of(4, 4), 3, top=[6, 1])
    torch.nn.init.normal_(model.wide.weight)
    dense, sparse = torch.randn(5, 3), make_sparse(2, 5)
    first, second = (model.embeddings(sparse)[key] for key in ("C0", "C1"))
    wide = dense @ model.wide.weight + first[:, 3] + second[:, 3]
    deep = model.over_arch(torch.cat([dense, first[:, :3], second[:, :3]], dim=1)).squeeze(1)
    torch.testing.assert_close(model(dense, sparse), wide + deep)


def test_deepfm_adds_the_dot_products_of_all_pairs() -> None:
    model = DeepFM(embeddings_of(4, 4), 3, top=[6, 1])
    dense, sparse = torch.randn(5, 3), make_sparse(2, 5)
    pooled = model.embeddings(sparse)
    vectors = [dense[:, i : i + 1] * model.dense_vectors[i] for i in range(3)] + [
        pooled[key][:, :3] for key in ("C0", "C1")
    ]
    second_order = sum((one * other).sum(1) for one, other in combinations(vectors, 2))
    torch.testing.assert_close(
        model(dense, sparse), WideDeep.dense_part(model, dense, pooled.values()) + second_order
    )


@pytest.mark.parametrize("make", [WideDeep, DeepFM])
def test_data_without_dense_features_will_do(make: type[WideDeep]) -> None:
    model = make(embeddings_of(4, 4), 0, top=[6, 1])
    optimizer = torch.optim.Adagrad(model.parameters())
    dense, sparse = torch.empty(5, 0), make_sparse(2, 5)
    logits = model(dense, sparse)
    assert logits.shape == (5,)
    logits.sum().backward()
    optimizer.step()
    assert bool((model(dense, sparse) < logits).all())


@pytest.mark.parametrize("make", [DLRM, DLRM_DCN])
def test_bottom_layers_without_dense_features_are_refused(
    make: type[DLRM] | type[DLRM_DCN],
) -> None:
    with pytest.raises(ConfigError, match=r"no dense features.*use WideDeep or DeepFM"):
        make(embeddings_of(4), 0, bottom=[4], top=[1])


def test_a_dimension_without_room_for_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match="DeepFM: embedding_dim is 1, must be at least 2"):
        DeepFM(embeddings_of(1, 1), 3, top=[1])


@pytest.mark.parametrize("kind", ["dcn", "wide_deep", "deepfm"])
def test_sizes_can_be_given_where_embeddings_do_not_tell_them(kind: str) -> None:
    embeddings = torch.nn.Identity()
    model: RankingModel = (
        DLRM_DCN(embeddings, 3, num_features=2, bottom=[4], top=[1])
        if kind == "dcn"
        else {"wide_deep": WideDeep, "deepfm": DeepFM}[kind](
            embeddings, 3, num_features=2, embedding_dim=4, top=[1]
        )
    )
    assert model.dense_part(torch.randn(5, 3), torch.randn(5, 8)).shape == (5,)


def test_unknown_sizes_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="DeepFM: its embeddings have no `groups` to tell sizes"):
        DeepFM(torch.nn.Identity(), 3, num_features=2, top=[1])
