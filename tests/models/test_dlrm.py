"""DLRM over embeddings held in plain torch modules."""

from __future__ import annotations

import pytest
import torch
from tests.models.fakes import embeddings_of, make_sparse

from bagpipe.errors import ConfigError
from bagpipe.models import DLRM


def test_logits_are_those_of_the_formula() -> None:
    model = DLRM(embeddings_of(4, 4), 3, bottom=[8, 4], top=[6, 1])
    dense, sparse = torch.randn(5, 3), make_sparse(2, 5)
    logits = model(dense, sparse)
    assert logits.shape == (5,)

    pooled, bottom = model.embeddings(sparse), model.dense_arch(dense)
    first, second = pooled["C0"], pooled["C1"]
    dots = [(first * bottom).sum(1), (second * bottom).sum(1), (second * first).sum(1)]
    expected = model.over_arch(torch.cat([bottom, torch.stack(dots, dim=1)], dim=1)).squeeze(1)
    torch.testing.assert_close(logits, expected)


def test_a_table_of_another_dimension_is_refused_with_its_name_and_both_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"DLRM: table 'C1' has embedding_dim 8, where 4 is expected.*last layer of bottom",
    ):
        DLRM(embeddings_of(4, 8), 3, bottom=[4], top=[1])


def test_a_last_layer_that_is_no_logit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"top=\[6, 2\].*must be 1"):
        DLRM(embeddings_of(4), 3, bottom=[4], top=[6, 2])


def test_names_follow_torchrec() -> None:
    model = DLRM(embeddings_of(4), 3, bottom=[4], top=[1])
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"embeddings", "dense_arch", "over_arch"}
