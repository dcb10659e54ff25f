"""Learning-rate schedules: their formulas, and runs that stop in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tests.train.runs import NUM_STEPS, newest_files, small_config

from bagpipe import SGD, EmbeddingBagCollection, TableConfig
from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.config.rates import RateConfig
from bagpipe.errors import CheckpointError, ConfigError
from bagpipe.train.rates import Rates
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

LR = 0.5


def embeddings() -> EmbeddingBagCollection:
    table = TableConfig(name="a", num_embeddings=4, embedding_dim=2, feature_names=["a"])
    return EmbeddingBagCollection([table], optimizer=SGD(lr=LR))


def make_rates(optimizer: torch.optim.Optimizer, **settings: Any) -> Rates:
    config: Any = TypeAdapter(RateConfig).validate_python(settings)
    return Rates([(optimizer, config)], num_steps=20)


def polynomial(step: int) -> float:
    """Two steps of warm-up, full up to step 4, then half a parabola over 8 steps."""
    return min((step + 1) / 3, 1.0) * (1.0 - min(max(step - 4, 0), 8) / 8) ** 2


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"kind": "constant", "warmup_steps": 4}, lambda t: min((t + 1) / 5, 1.0)),
        ({"kind": "step", "every_steps": 6, "factor": 0.5}, lambda t: 0.5 ** (t // 6)),
        ({"kind": "polynomial"}, lambda t: 1 - t / 20),
        (
            {
                "kind": "polynomial",
                "power": 2,
                "warmup_steps": 2,
                "start_step": 4,
                "decay_steps": 8,
            },
            polynomial,
        ),
        ({"kind": "cosine", "decay_steps": 10}, lambda t: (1 + cos(pi * min(t, 10) / 10)) / 2),
        (
            {"kind": "cosine", "warmup_steps": 3},
            lambda t: (t + 1) / 4 if t < 3 else (1 + cos(pi * (t - 3) / 17)) / 2,
        ),
    ],
)
def test_tables_follow_a_schedule_and_go_on_in_the_middle_of_it(
    settings: dict[str, Any], factor: Callable[[int], float]
) -> None:
    tables = embeddings()
    rates = make_rates(tables.fused_optimizer, **settings)
    saved, found = [], []
    for step in range(20):
        found.append(tables.lr)
        saved.append(json.dumps(rates.state_dict()))
        rates.after_step(step + 1)
    assert found == pytest.approx([LR * factor(step) for step in range(20)], abs=1e-12)

    for start in (1, 3, 7):
        tables = embeddings()
        rates = make_rates(tables.fused_optimizer, **settings)
        rates.load_state_dict(json.loads(saved[start]))
        for step in range(start, 20):
            assert tables.lr == found[step]  # to the bit
            rates.after_step(step + 1)


def test_a_rate_falls_on_a_plateau() -> None:
    tables = embeddings()
    rates = make_rates(
        tables.fused_optimizer, kind="plateau", metric="auc", factor=0.5, warmup_steps=1
    )
    found = []
    for step, auc in enumerate([0.9, 0.7, 0.8, 0.75, 0.8, 0.8, None, 0.8], 1):
        rates.after_step(step)
        rates.after_evaluation(step, {"auc": auc})
        found.append(tables.lr)
    # the first one falls into the warm-up; then two in a row are no better than 0.8, twice
    assert found == [0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_a_run_goes_on_in_mid_schedule(tmp_path: Path) -> None:
    def run(folder: str, steps: int, *, resume: bool = False) -> None:
        schedule = {"kind": "cosine", "warmup_steps": 5, "decay_steps": NUM_STEPS - 5}
        config = small_config(
            tmp_path / folder,
            train={"steps": steps, "lr_schedule": schedule, "device": "cpu", "batch_size": 32},
        )
        train(config, reporter=SilentReporter(), resume=resume)

    run("whole", NUM_STEPS)
    run("halves", 11)
    run("halves", NUM_STEPS, resume=True)
    assert newest_files(tmp_path / "halves") == newest_files(tmp_path / "whole")
    logs = [
        [
            (record["step"], record["lr"], record["embeddings_lr"])
            for record in map(
                json.loads, (tmp_path / folder / "log.jsonl").read_text().splitlines()
            )
            if record["kind"] == "train" and record["step"] % 4 == 0
        ]
        for folder in ("whole", "halves")
    ]
    assert logs[0] == logs[1]
    assert logs[0][-1] == (NUM_STEPS, pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))


def test_a_decay_to_the_end_is_not_resumed_with_another_end(tmp_path: Path) -> None:
    def run(steps: int, *, resume: bool = False) -> None:
        sections: dict[str, Any] = {"train": {"steps": steps, "lr_schedule": {"kind": "cosine"}}}
        train(small_config(tmp_path, **sections), reporter=SilentReporter(), resume=resume)

    run(2)
    assert list_checkpoints(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"train\.lr_schedule\.decay_steps: 2 -> 4"):
        run(4, resume=True)


def test_what_does_not_fit_the_run_is_refused(tmp_path: Path) -> None:
    late = {"kind": "polynomial", "warmup_steps": 30}
    config = small_config(tmp_path, train={"lr_schedule": late})
    with pytest.raises(ConfigError, match=r"starts at step 30 .* 24 steps: give decay_steps"):
        train(config, reporter=SilentReporter())
    early = {"kind": "cosine", "warmup_steps": 9, "start_step": 3}
    config = small_config(tmp_path, embeddings={"lr_schedule": early})
    with pytest.raises(ConfigError, match=r"start_step = 3 is before .* warmup_steps = 9"):
        train(config, reporter=SilentReporter())
    with pytest.raises(ConfigError, match=r"embeddings.lr_schedule.kind = 'plateau'.*eval_every"):
        small_config(tmp_path, embeddings={"lr_schedule": {"kind": "plateau"}})


def test_torchs_schedulers_hold_the_tables_rate() -> None:
    tables = embeddings()
    optimizer = tables.fused_optimizer
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler.step()
    assert tables.lr == 0.25
    tables.set_learning_rate(1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0
    saved = optimizer.state_dict()
    tables.set_learning_rate(0.125)
    optimizer.load_state_dict(saved)
    assert tables.lr == 1.0
    with pytest.raises(ConfigError, match="number from 0 to"):
        optimizer.param_groups[0]["lr"] = float("nan")
    assert tables.lr == 1.0
