"""A run on a GPU: resumed, or with another cache, it ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import NUM_STEPS, newest_files, small_config

from bagpipe.cache.graph_rows import GraphRows
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

pytestmark = pytest.mark.gpu


def test_a_resumed_run_on_a_gpu_ends_like_one_that_nothing_happened_to(tmp_path: Path) -> None:
    gpu = {"device": "cuda"}
    result = train(small_config(tmp_path / "undisturbed", train=gpu), reporter=SilentReporter())
    assert result.scores is not None
    train(small_config(tmp_path / "resumed", train=gpu | {"steps": 13}), reporter=SilentReporter())
    train(
        small_config(
            tmp_path / "resumed",
            train=gpu | {"steps": NUM_STEPS},
            cache={"size": 400, "lookahead": 2},
        ),
        reporter=SilentReporter(),
        resume=True,
    )
    assert newest_files(tmp_path / "resumed") == newest_files(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_a_graph_gives_what_eager_gives_also_resumed(tmp_path: Path, kind: str) -> None:
    optimizer = {"optimizer": {"kind": kind, "lr": 0.01}}
    for name, dense in (("eager", "eager"), ("graph", "graph"), ("resumed", "graph")):
        settings = {"device": "cuda", "dense": dense, "precision": "bf16"} | optimizer
        if name == "resumed":
            train(
                small_config(tmp_path / name, train=settings | {"steps": 13}),
                reporter=SilentReporter(),
            )
        train(
            small_config(tmp_path / name, train=settings | {"steps": NUM_STEPS}),
            reporter=SilentReporter(),
            resume=name == "resumed",
        )
    assert newest_files(tmp_path / "graph") == newest_files(tmp_path / "eager")
    assert newest_files(tmp_path / "resumed") == newest_files(tmp_path / "eager")


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam", "adamw"])
def test_a_graph_of_the_whole_step_gives_what_its_parts_give(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, replay = list[int](), GraphRows.replay

    def counted(self: GraphRows, graph: Any) -> None:
        replayed.append(1)
        replay(self, graph)

    monkeypatch.setattr(GraphRows, "replay", counted)
    schedule = {"kind": "cosine", "warmup_steps": 5}
    for name, train_settings, cache in (
        ("parts", {"dense": "eager"}, {"oracle": "process"}),
        ("whole", {"dense": "graph"}, {"oracle": "device"}),
    ):
        assert not replayed
        settings = {"device": "cuda", "precision": "bf16", "lr_schedule": schedule} | train_settings
        config = small_config(
            tmp_path / name,
            train=settings,
            embeddings={"optimizer": {"kind": kind, "lr": 0.01}, "lr_schedule": schedule},
            cache=cache,
        )
        train(config, reporter=SilentReporter())
    assert len(replayed) >= 5
    assert newest_files(tmp_path / "whole") == newest_files(tmp_path / "parts")
