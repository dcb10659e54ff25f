"""On a GPU: every way to run the dense part trains the same, one that fails gives way, and a steady
step waits for nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.clicks import click_columns, click_config, prepare_clicks
from tests.train.runs import NUM_STEPS, Listener, newest_files, small_config

from bagpipe.train.dense_step import DenseStep
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

pytestmark = pytest.mark.gpu

MODELS: dict[str, dict[str, Any]] = {
    "dlrm": {"kind": "dlrm", "bottom": [8, 4], "top": [8, 1]},
    "dcn": {"kind": "dcn", "bottom": [8, 4], "top": [8, 1], "num_cross_layers": 2, "cross_rank": 3},
    "wide_deep": {"kind": "wide_deep", "top": [8, 1]},
    "deepfm": {"kind": "deepfm", "top": [8, 1]},
}


@pytest.mark.parametrize("kind", ["dcn", "wide_deep", "deepfm"])
def test_a_graph_gives_what_eager_gives(tmp_path: Path, kind: str) -> None:
    listener = Listener()
    for dense in ("eager", "graph"):
        config = small_config(
            tmp_path / dense,
            model=MODELS[kind],
            train={"device": "cuda", "dense": dense, "precision": "bf16", "max_grad_norm": 0.1},
        )
        train(config, reporter=listener)
    assert not [text for text in listener.said if "failed" in text]
    assert newest_files(tmp_path / "graph") == newest_files(tmp_path / "eager")


def test_a_graph_takes_the_weights_and_labels_of_each_batch(tmp_path: Path) -> None:
    labels = [{"column": "clicked"}, {"column": "bought"}]
    prepare_clicks(tmp_path, click_columns(), labels=labels, weight="weight")
    for dense in ("eager", "graph"):
        options = {"device": "cuda", "dense": dense, "label_weights": {"bought": 0.5}}
        model = {"bottom": [8, 4], "top": [8, 2]}
        config = click_config(tmp_path, tmp_path / dense, model=model, train=options)
        train(config, reporter=SilentReporter())
    assert newest_files(tmp_path / "graph") == newest_files(tmp_path / "eager")


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("is_clipped", [False, True], ids=["", "clipped"])
def test_a_rate_that_changes_is_no_part_of_the_graph(
    tmp_path: Path, kind: str, is_clipped: bool
) -> None:
    listener = Listener()
    for dense in ("eager", "graph"):
        config = small_config(
            tmp_path / dense,
            train={
                "device": "cuda",
                "dense": dense,
                "optimizer": {"kind": kind, "lr": 0.01},
                "lr_schedule": {"kind": "cosine", "warmup_steps": 5},
                "max_grad_norm": 0.1 if is_clipped else None,
            },
        )
        train(config, reporter=listener)
    assert not [text for text in listener.said if "failed" in text]
    assert newest_files(tmp_path / "graph") == newest_files(tmp_path / "eager")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore:TensorFloat32 tensor cores:UserWarning"
)
@pytest.mark.parametrize("kind", MODELS)
def test_compiling_works_or_says_that_it_does_not(tmp_path: Path, kind: str) -> None:
    scores = []
    for dense in ("graph", "compile"):
        listener = Listener()
        config = small_config(
            tmp_path / dense,
            model=MODELS[kind],
            train={"device": "cuda", "dense": dense, "steps": NUM_STEPS},
        )
        result = train(config, reporter=listener)
        failed = [text for text in listener.said if "failed" in text]
        assert not [
            text
            for text in failed
            if not re.fullmatch(r"compiling the dense part failed .*as it is written", text)
        ]
        assert result.scores is not None
        scores.append(result.scores["log_loss"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_tf32_is_close_to_float32_and_the_setting_is_put_back(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    scores = []
    for precision in ("fp32", "tf32"):
        config = small_config(
            tmp_path / precision, train={"device": "cuda", "precision": precision}
        )
        result = train(config, reporter=SilentReporter())
        assert result.scores is not None
        scores.append(result.scores["log_loss"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_a_part_that_no_graph_holds_runs_eagerly_from_the_same_state(kind: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    results, said = [], list[str]()
    for graph in (False, True):
        torch.manual_seed(3)
        layer = torch.nn.Linear(8, 1, device=device)

        def part(
            dense: torch.Tensor, pooled: torch.Tensor, layer: torch.nn.Linear = layer
        ) -> torch.Tensor:
            # the host learns a value: no capture allows that
            if pooled.detach().sum().item() > 1e9:
                raise AssertionError
            logits: torch.Tensor = layer(pooled + torch.rand_like(pooled)).squeeze(1)
            return logits

        optimizer = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[kind](
            layer.parameters(), **({"capturable": True} if kind == "adam" else {})
        )
        step = DenseStep(
            part,
            optimizer,
            groups=[(2, 4)],
            device=device,
            batch_size=16,
            graph=graph,
            say=said.append,
        )
        step.pooled(16)[0].fill_(0.5)
        dense, labels = torch.ones(16, 3), torch.ones(16)
        losses = [float(step(dense, labels)[0]) for _ in range(3)]
        results.append(
            (
                losses,
                layer.weight.tolist(),
                torch.cuda.get_rng_state(device).tolist(),
                torch.get_rng_state().tolist(),
            )
        )
        assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    assert results[0] == results[1]
    assert len(said) == 1
    assert said[0].startswith("capturing the dense part as a CUDA graph failed (")
    assert memory_read_by_another_stream_is_used_again()


def memory_read_by_another_stream_is_used_again() -> bool:
    """What torch does not do inside of a capture, nor after one that it has not left: each step
    would take new memory then.
    """
    stream, size = torch.cuda.Stream(), 8 << 20
    addresses = set()
    for _ in range(4):
        with torch.cuda.stream(stream):
            read = torch.empty(size, dtype=torch.uint8, device="cuda")
        addresses.add(read.data_ptr())
        read.record_stream(torch.cuda.current_stream())
        del read
        torch.cuda.synchronize()
    return len(addresses) == 1


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_averaging_between_two_graphs_gives_what_eager_gives(kind: str) -> None:
    """A batch of another size in between runs eagerly and averages too."""
    device = torch.device("cuda", torch.cuda.current_device())
    results, said = [], list[str]()
    for graph in (False, True):
        torch.manual_seed(3)
        layer = torch.nn.Linear(8, 1, device=device)
        averaged: list[int] = []

        def average(gradients: torch.Tensor, averaged: list[int] = averaged) -> None:
            averaged.append(gradients.numel())
            gradients.mul_(0.5)

        step = DenseStep(
            lambda dense, pooled, layer=layer: layer(pooled).squeeze(1),
            {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[
                kind
            ](layer.parameters(), **({"capturable": True} if kind == "adam" else {})),
            groups=[(2, 4)],
            device=device,
            batch_size=16,
            graph=graph,
            average=average,
            say=said.append,
        )
        losses = []
        for size in (16, 16, 5, 16):
            step.pooled(size)[0].copy_(torch.arange(size * 8, device=device).view(size, 2, 4) / 50)
            losses.append(float(step(torch.ones(size, 3), torch.ones(size))[0]))
        assert averaged == [9] * 4
        results.append((losses, layer.weight.tolist(), layer.bias.tolist()))
    assert not said
    assert results[0] == results[1]


class SyncsAreErrors(Listener):
    """Makes torch raise, in any thread of this process, where the host waits for the device in
    steps 20 to 60.
    """

    def advance(self, step: int) -> None:
        if step in (20, 60):
            torch.cuda.set_sync_debug_mode("error" if step == 20 else "default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dense", ["graph", "eager"])
def test_a_steady_step_never_waits_for_the_device(tmp_path: Path, dense: str) -> None:
    config = small_config(
        tmp_path,
        data={"num_samples": 3200},
        train={"device": "cuda", "dense": dense, "steps": 80},
        cache={"size": 120, "lookahead": 5, "oracle": "process"},
        log={"every_steps": 1000},
    )
    try:
        assert train(config, reporter=SyncsAreErrors()).step == 80
    finally:
        torch.cuda.set_sync_debug_mode("default")
