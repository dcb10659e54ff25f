"""The dense part as one call: the same numbers as the plain training loop, and guards around lookup
and update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from tests.train.ranks import run_ranks
from tests.train.runs import small_config
from torch.nn.functional import binary_cross_entropy_with_logits

import bagpipe
from bagpipe.checkpoint.dense import load_optimizer
from bagpipe.config.run import TrainConfig
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import ConfigError, UsageError
from bagpipe.models import DLRM
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.train.build import has_graph, make_dense_step
from bagpipe.train.dense_step import DenseStep, Precision, _Captured
from bagpipe.train.objective import Objective
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train
from bagpipe.types import Jagged, TableConfig

TABLES = [
    TableConfig(name=name, num_embeddings=50, embedding_dim=4, feature_names=[name])
    for name in ("a", "b")
]
BATCH_SIZE = 8


def make() -> tuple[EmbeddingBagCollection, DLRM, torch.optim.Optimizer]:
    torch.manual_seed(3)
    embeddings = EmbeddingBagCollection(TABLES, optimizer=RowWiseAdagrad(lr=0.1))
    model = DLRM(embeddings, 3, bottom=[6, 4], top=[5, 1])
    return embeddings, model, torch.optim.Adagrad(model.parameters(), lr=0.1)


def make_batches(count: int) -> list[tuple[torch.Tensor, Jagged, torch.Tensor]]:
    rng = np.random.default_rng(0)
    sizes = [BATCH_SIZE] * (count - 1) + [5]
    return [
        (
            torch.from_numpy(rng.random((size, 3), np.float32)),
            Jagged(keys=("a", "b"), values=rng.integers(0, 50, 2 * size), batch_size=size),
            torch.from_numpy(rng.integers(0, 2, size).astype(np.float32)),
        )
        for size in sizes
    ]


def dense_step(model: DLRM, optimizer: torch.optim.Optimizer, **options: Any) -> DenseStep:
    return DenseStep(
        model.dense_part,
        optimizer,
        groups=[(2, 4)],
        device=torch.device("cpu"),
        batch_size=BATCH_SIZE,
        **options,
    )


def train_by_calls(**options: Any) -> tuple[list[float], list[torch.Tensor]]:
    embeddings, model, optimizer = make()
    step, losses = dense_step(model, optimizer, **options), []
    for dense, sparse, labels in bagpipe.lookahead(
        make_batches(9), embeddings, cache=40, sparse=lambda batch: batch[1]
    ):
        embeddings.lookup(sparse, out=step.pooled(len(labels)))
        loss, grads = step(dense, labels)
        embeddings.update(grads)
        losses.append(float(loss))
    return losses, [
        *(parameter.detach() for parameter in model.parameters()),
        embeddings.tables()["a"][:],
    ]


def train_by_autograd(
    precision: Precision = "fp32", max_grad_norm: float | None = None
) -> tuple[list[float], list[torch.Tensor]]:
    embeddings, model, optimizer = make()
    losses = []
    for dense, sparse, labels in bagpipe.lookahead(
        make_batches(9), embeddings, cache=40, sparse=lambda batch: batch[1]
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(dense, sparse)
        loss = binary_cross_entropy_with_logits(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [
        *(parameter.detach() for parameter in model.parameters()),
        embeddings.tables()["a"][:],
    ]


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calls_give_what_autograd_gives(precision: Precision) -> None:
    losses, tensors = train_by_calls(precision=precision)
    expected_losses, expected = train_by_autograd(precision)
    assert losses == expected_losses
    assert_same(tensors, expected)


def test_gradients_are_clipped_as_torch_does() -> None:
    losses, tensors = train_by_calls(max_grad_norm=0.2)
    expected_losses, expected = train_by_autograd(max_grad_norm=0.2)
    assert losses == expected_losses
    assert_same(tensors, expected)
    assert losses != train_by_autograd()[0]


def test_averaging_over_one_trainer_changes_nothing() -> None:
    losses, tensors = train_by_calls(average=lambda gradients: None)
    expected_losses, expected = train_by_calls()
    assert losses == expected_losses
    assert_same(tensors, expected)


@pytest.mark.parametrize("num_trainers", [2, 4])
def test_trainers_that_average_take_the_steps_of_one_with_all_samples(num_trainers: int) -> None:
    """Three steps with weights, the last of a batch that only the first ranks have samples of."""
    torch.manual_seed(0)
    sizes = (BATCH_SIZE, BATCH_SIZE, 2)
    inputs = [
        (
            torch.randn(size, 3),
            (torch.rand(size) < 0.5).float(),
            torch.randn(size, 2, 4),
            3 * torch.rand(size),
        )
        for size in sizes
    ]
    # here, since threads share torch's random numbers
    made = [make() for _ in range(num_trainers + 1)]

    def work(communicator: Communicator | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rank, count = (0, 1) if communicator is None else (communicator.rank, num_trainers)
        _, model, optimizer = made[-1 if communicator is None else rank]
        step = dense_step(
            model, optimizer, average=None if communicator is None else communicator.average
        )
        all_grads = []
        for dense, labels, embedded, weights in inputs:
            own = slice(rank, None, count)
            step.pooled(len(labels[own]))[0].copy_(embedded[own])
            factor = len(labels[own]) * count / len(labels)
            _, grads = step(dense[own], labels[own], factor, weights[own])
            all_grads.append(grads[0] / count)  # of the mean over all trainers
        return [parameter.detach() for parameter in model.parameters()], all_grads

    parameters, grads = work(None)
    of_ranks = run_ranks(num_trainers, work)
    for rank, (own_parameters, own_grads) in enumerate(of_ranks):
        assert_same(own_parameters, of_ranks[0][0])
        for one, other in zip(own_parameters, parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        for one, other in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(one, other[rank::num_trainers], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    losses, expected = train_by_calls(precision="bf16")[0], train_by_calls()[0]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)


def test_lookup_and_update_are_called_once_a_batch_and_in_this_order() -> None:
    embeddings, _, _ = make()
    grads = [torch.ones(BATCH_SIZE, 2, 4)]
    batches = make_batches(3)
    stream = bagpipe.lookahead(batches, embeddings, cache=40, sparse=lambda batch: batch[1])
    _, sparse, _ = next(stream)
    with pytest.raises(UsageError, match="step 0: update was called without a lookup"):
        embeddings.update(grads)
    embeddings.lookup(sparse)
    with pytest.raises(UsageError, match="forward was called twice"):
        embeddings.lookup(sparse)
    embeddings.update(grads)
    with pytest.raises(UsageError, match="or twice"):
        embeddings.update(grads)
    _, sparse, _ = next(stream)
    embeddings.lookup(sparse)
    next(stream)
    with pytest.raises(UsageError, match="step 2: update was called without"):
        embeddings.update(grads)
    stream.close()


def test_where_no_graph_holds_the_rows_that_of_the_dense_part_is_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda part, dynamic: part)
    _, model, optimizer = make()
    said, replayed, updated = list[str](), list[int](), list[Any]()
    step = dense_step(model, optimizer, graph=True, compile_part=True, say=said.append)
    dense, _, labels = make_batches(2)[0]
    graph: Any = SimpleNamespace(replay=lambda: replayed.append(1))
    rows: Any = SimpleNamespace(look_up_now=lambda pooled: updated.append)

    def capture(part: Any, inputs: Any, rows: Any) -> _Captured:
        if rows is not None:
            raise RuntimeError("no room\nfor two")
        return _Captured(
            graph=graph,
            optimizer_graph=None,
            inputs=[dense.clone(), labels.clone()],
            loss=torch.tensor(0.5),
            grads=[],
            parameter_grads=[],
            rows=None,
        )

    monkeypatch.setattr(step, "_capture", capture)
    step(dense, labels)
    for _ in range(2):
        assert step(dense, labels, rows=rows)[0] == 0.5
    assert (len(replayed), len(updated)) == (3, 2)
    assert said == [
        "compiling the dense part, with embeddings in it, failed (RuntimeError: no room): they are "
        "looked up and updated beside it"
    ]


def test_a_graph_wants_shares_of_one_size() -> None:
    config = TrainConfig(batch_size=1001, steps=1, dense="graph")
    embeddings: Any = SimpleNamespace(peers=SimpleNamespace(num_trainers=2))
    parts: Any = None
    with pytest.raises(
        ConfigError, match=r"batch_size = 1,001 is no multiple of 2 trainers: use 1,000, or 'eager'"
    ):
        make_dense_step(config, parts, parts, embeddings, torch.device("cuda"), Objective(), print)


@pytest.mark.parametrize(
    ("dense", "device", "num_trainers", "expected"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 2, True),
        ("auto", "cuda", 3, False),  # shares of more than one size
        ("auto", "cpu", 1, False),
        ("eager", "cuda", 2, False),
        ("compile", "cuda", 2, True),
    ],
)
def test_where_the_dense_part_is_a_graph(
    dense: Any, device: str, num_trainers: int, expected: bool
) -> None:
    assert (
        has_graph(
            TrainConfig(batch_size=1000, steps=1, dense=dense), torch.device(device), num_trainers
        )
        == expected
    )


@pytest.mark.parametrize(
    ("key", "value"), [("dense", "graph"), ("dense", "compile"), ("precision", "tf32")]
)
def test_what_only_a_gpu_does_is_refused_on_a_cpu(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key} = '{value}' needs a CUDA device"):
        train(
            small_config(tmp_path, train={key: value, "device": "cpu"}), reporter=SilentReporter()
        )


def spoil_capture(step: DenseStep, *args: object) -> NoReturn:
    """A warm-up that changes all there is, and a capture that fails."""
    torch.randn(5)
    optimizer = step._optimizer
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("make_optimizer", [torch.optim.Adagrad, torch.optim.Adam])
def test_a_capture_that_fails_changes_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, make_optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    monkeypatch.setattr(DenseStep, "_capture", spoil_capture)
    results, said = [], list[str]()
    for graph in (False, True):
        torch.manual_seed(3)
        layer = torch.nn.Linear(2 * 4, 1)
        step = DenseStep(
            lambda dense, pooled, layer=layer: layer(pooled + torch.rand_like(pooled)).squeeze(1),
            make_optimizer(layer.parameters()),
            groups=[(2, 4)],
            device=torch.device("cpu"),
            batch_size=BATCH_SIZE,
            graph=graph,
            say=said.append,
        )
        step.pooled(BATCH_SIZE)[0].fill_(0.5)
        losses = [
            float(step(torch.ones(BATCH_SIZE, 3), torch.ones(BATCH_SIZE))[0]) for _ in range(3)
        ]
        results.append(
            (
                losses,
                layer.weight.detach().numpy().tobytes(),
                torch.get_rng_state().numpy().tobytes(),
            )
        )
    assert results[0] == results[1]
    assert said == [
        "capturing the dense part as a CUDA graph failed (RuntimeError: operation not permitted "
        "when stream is capturing): "
        "it runs eagerly"
    ]


def test_what_can_not_be_compiled_nor_captured_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> NoReturn:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(DenseStep, "_capture", spoil_capture)
    layer, said = torch.nn.Linear(2 * 4, 1), list[str]()
    step = DenseStep(
        lambda dense, pooled: layer(pooled).squeeze(1),
        torch.optim.SGD(layer.parameters()),
        groups=[(2, 4)],
        device=torch.device("cpu"),
        batch_size=BATCH_SIZE,
        graph=True,
        compile_part=True,
        say=said.append,
    )
    step.pooled(BATCH_SIZE)[0].fill_(0.5)
    step(torch.ones(BATCH_SIZE, 3), torch.ones(BATCH_SIZE))
    assert said[0] == (
        "compiling the dense part failed (RuntimeError: no C compiler): "
        "it is captured as it is written"
    )
    assert said[1].startswith("capturing the dense part as a CUDA graph failed (")
    assert len(said) == 2


def test_adam_saved_on_another_kind_of_device_goes_on() -> None:
    layer = torch.nn.Linear(2, 1)
    saved = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    saved.step()
    state = saved.state_dict()
    state["param_groups"][0]["capturable"] = True  # as a run on a GPU leaves it
    optimizer = torch.optim.Adam(layer.parameters())
    load_optimizer(optimizer, state)
    optimizer.step()
    assert {float(values["step"]) for values in optimizer.state.values()} == {2.0}


def test_update_wants_one_gradient_a_group() -> None:
    embeddings, _, _ = make()
    stream = bagpipe.lookahead(make_batches(2), embeddings, cache=40, sparse=lambda batch: batch[1])
    embeddings.lookup(next(stream)[1])
    with pytest.raises(UsageError, match="gradients are 0 tensors for 1 groups"):
        embeddings.update([])
    stream.close()
