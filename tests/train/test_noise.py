"""Dropout and batch norm in a run: exact on resume, and refused where they can't be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import NUM_STEPS, newest_files, small_config
from torch import nn

from bagpipe.errors import ConfigError
from bagpipe.train.dense_step import DenseStep
from bagpipe.train.noise import Noise, check_batch_norm
from bagpipe.train.report import SilentReporter
from bagpipe.train.schedule import Schedule
from bagpipe.train.trainer import train

CPU = torch.device("cpu")


def run(folder: Path, *, steps: int = NUM_STEPS, resume: bool = False, **model: Any) -> None:
    model = {"bottom": [8, 4], "top": [8, 1], **model}
    config = small_config(folder, model=model, train={"steps": steps, "eval_every_steps": 5})
    train(config, reporter=SilentReporter(), resume=resume)


def test_a_run_with_both_goes_on_to_the_bit(tmp_path: Path) -> None:
    both = {"dropout": 0.3, "batch_norm": True}
    run(tmp_path / "whole", **both)
    run(tmp_path / "halves", steps=11, **both)
    run(tmp_path / "halves", resume=True, **both)
    whole = newest_files(tmp_path / "whole")
    assert newest_files(tmp_path / "halves") == whole
    (dense,) = (tmp_path / "whole/checkpoints").glob(f"step-*{NUM_STEPS}/dense.pt")
    state = torch.load(dense)["model"]
    assert state["over_arch.1.num_batches_tracked"] == NUM_STEPS  # evaluations are none
    run(tmp_path / "without", batch_norm=True)
    assert newest_files(tmp_path / "without") != whole


def drawn(folder: Path, rank: int, step: int, **model: Any) -> list[float]:
    peers: Any = type("Rank", (), {"rank": rank})
    Noise(small_config(folder, model=model), peers, CPU).begin(step)
    return torch.rand(3).tolist()


def test_each_step_of_each_rank_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    noisy = {"dropout": 0.5}
    first = drawn(tmp_path, 0, 7, **noisy)
    assert drawn(tmp_path, 0, 7, **noisy) == first
    assert first not in (drawn(tmp_path, 1, 7, **noisy), drawn(tmp_path, 0, 8, **noisy))
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    assert drawn(tmp_path, 0, 7) == expected  # a model that draws none leaves them alone


def check(num_samples: int, batch_size: int, num_trainers: int = 1, num_steps: int = 9) -> None:
    schedule = Schedule(
        batch_size=batch_size,
        drop_last=False,
        num_batches=-(-num_samples // batch_size),
        num_steps=num_steps,
    )
    check_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), schedule, num_samples, num_trainers)


def test_batch_norm_is_refused_where_it_would_be_wrong(tmp_path: Path) -> None:
    check(num_samples=34, batch_size=8)
    check(num_samples=33, batch_size=8, num_steps=4)  # never gets there
    with pytest.raises(ConfigError, match=r"batch 4 of each epoch has one: .*drop_last = true"):
        check(num_samples=33, batch_size=8)
    with pytest.raises(ConfigError, match="batch 0 of each epoch has one"):
        check(num_samples=33, batch_size=1)
    with pytest.raises(ConfigError, match="each of 2 trainers would normalize its own share"):
        check(num_samples=34, batch_size=8, num_trainers=2)
    with pytest.raises(ConfigError, match=r"model\.dropout = 1\.0: .*less than 1"):
        small_config(tmp_path, model={"dropout": 1.0})
    config = small_config(tmp_path, model={"batch_norm": True}, data={"num_samples": 481})
    with pytest.raises(ConfigError, match=r"has batch norm.* batch 15 of each epoch has one"):
        train(config, reporter=SilentReporter())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dlrm", "wide_deep"])
def test_a_graph_draws_and_averages_as_eager_does(tmp_path: Path, kind: str) -> None:
    """Also where it is captured again in the middle of the run, by a resume."""
    bottom = {"bottom": [8, 4]} if kind == "dlrm" else {}
    model = {"kind": kind, "top": [8, 1], "dropout": 0.3, "batch_norm": True, **bottom}
    for dense, halves in (("eager", [NUM_STEPS]), ("graph", [11, NUM_STEPS])):
        for number, steps in enumerate(halves):
            options = {"device": "cuda", "dense": dense, "steps": steps}
            config = small_config(tmp_path / dense, model=model, train=options)
            train(config, reporter=SilentReporter(), resume=number > 0)
    assert newest_files(tmp_path / "graph") == newest_files(tmp_path / "eager")


@pytest.mark.gpu
def test_a_capture_leaves_batch_norms_averages_as_they_were() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    part = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(device)
    step = DenseStep(
        lambda dense, pooled: part(pooled).squeeze(1),
        torch.optim.SGD(part.parameters(), lr=0.1),
        groups=[(2, 4)],
        device=device,
        batch_size=16,
        graph=True,
        buffers=list(part.buffers()),
    )
    step.pooled(16)[0].copy_(torch.rand(16, 2, 4))
    step(torch.ones(16, 3), torch.ones(16))
    assert part[1].num_batches_tracked.item() == 1
