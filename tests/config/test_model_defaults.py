"""What a configuration leaves out is chosen by the model."""

from __future__ import annotations

from typing import Any

import pytest

from bagpipe.config.optimizers import EmbeddingRowWiseAdagrad, EmbeddingSGD
from bagpipe.config.run import DenseOptimizerConfig, NormalInit, RunConfig, UniformInit
from bagpipe.config.tables import make_tables
from bagpipe.data.base import FeatureSpec
from bagpipe.train.settings import describe_run
from bagpipe.types import Normal, Uniform

FEATURE = FeatureSpec(name="a", table="a", num_embeddings=4)
BOTTOM = {"dlrm": {"bottom": [8]}, "dcn": {"bottom": [8]}}


def config_of(kind: str, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"kind": "synthetic"},
            "log": {"folder": "runs/x"},
            "model": {"kind": kind, **BOTTOM.get(kind, {})},
            **sections,
            "embeddings": {"embedding_dim": 8, **sections.get("embeddings", {})},
        }
    )


@pytest.mark.parametrize("kind", ["dlrm", "dcn"])
def test_tables_start_as_by_hand(kind: str) -> None:
    config = config_of(kind)
    assert config.table_init is None
    (table,) = make_tables([FEATURE], config)
    assert table.initializer == Uniform(low=-0.5, high=0.5)


@pytest.mark.parametrize("kind", ["wide_deep", "deepfm"])
def test_tables_with_linear_weights_start_narrow_whatever_their_size(kind: str) -> None:
    (table,) = make_tables([FEATURE], config_of(kind))
    assert table.initializer == Uniform(low=-0.0173, high=0.0173)


@pytest.mark.parametrize("kind", ["dlrm", "wide_deep"])
def test_what_the_file_says_goes_before_the_model(kind: str) -> None:
    init = {"kind": "normal", "std": 0.5}
    optimizer = {"kind": "sgd", "lr": 0.5}
    config = config_of(
        kind, embeddings={"init": init, "optimizer": optimizer}, train={"optimizer": optimizer}
    )
    assert config.table_optimizer == EmbeddingSGD(kind="sgd", lr=0.5)
    assert config.table_init == NormalInit(kind="normal", std=0.5)
    assert config.dense_optimizer == DenseOptimizerConfig(kind="sgd", lr=0.5)
    (table,) = make_tables([FEATURE], config)
    assert table.init == Normal(mean=0.0, std=0.5)


def test_a_bound_is_written_as_the_section_that_would_say_it() -> None:
    assert config_of("deepfm").table_init == UniformInit(kind="uniform", low=-0.0173, high=0.0173)


@pytest.mark.parametrize(
    ("kind", "lr"), [("dlrm", 0.02), ("dcn", 0.005), ("wide_deep", 0.02), ("deepfm", 0.02)]
)
def test_the_dense_part_has_a_rate_of_its_model(kind: str, lr: float) -> None:
    assert config_of(kind).dense_optimizer == DenseOptimizerConfig(kind="adagrad", lr=lr)


@pytest.mark.parametrize(
    ("kind", "lr"), [("dlrm", 0.02), ("dcn", 0.02), ("wide_deep", 0.005), ("deepfm", 0.01)]
)
def test_tables_have_a_rate_of_their_model_which_checkpoints_remember(kind: str, lr: float) -> None:
    config = config_of(kind)
    assert config.table_optimizer == EmbeddingRowWiseAdagrad(kind="rowwise_adagrad", lr=lr)
    assert describe_run(config)["embeddings"]["optimizer"]["lr"] == lr
