"""Whole runs: they learn, they resume bit for bit, and nothing that only watches changes them."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.checkpoint.test_files import busy
from tests.train.runs import NUM_STEPS, Listener, newest_files, small_config

from bagpipe.checkpoint.files import list_checkpoints, step_of
from bagpipe.errors import CheckpointError, ConfigError, LossError
from bagpipe.train.logs import LOG_NAME
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(small_config(folder), reporter=SilentReporter())
    return folder


def log_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def steps_saved(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


def test_a_run_logs_scores_and_saves(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        train={"steps": 150, "eval_every_steps": 60},
        checkpoint={"every_steps": 40, "keep": 2},
    )
    result = train(config, reporter=SilentReporter())
    assert (result.step, result.stopped_by) == (150, None)
    assert result.scores is not None
    assert result.scores["auc"] is not None
    assert result.scores["auc"] > 0.55
    assert steps_saved(tmp_path) == [120, 150]
    assert [record["step"] for record in log_of(tmp_path, "evaluation")] == [60, 120, 150]
    losses = [record["loss"] for record in log_of(tmp_path, "train")]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {
        "examples_per_s",
        "hit_rate",
        "wait_plan_ms",
        "wait_rows_ms",
        "wait_slots_ms",
        "wait_replicas_ms",
    } <= log_of(tmp_path, "train")[0].keys()


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"cache": {"size": 430, "lookahead": 1, "prefetch_depth": 1}},
        {"train": {"eval_every_steps": 5}, "checkpoint": {"every_steps": 3, "keep": 1}},
        {"cache": {"oracle": "process"}},
    ],
    ids=["same", "another cache", "evaluations and checkpoints", "oracle process"],
)
@pytest.mark.parametrize("stop_at", [1, 16, 17])
def test_a_resumed_run_ends_like_one_that_nothing_happened_to(
    tmp_path: Path, undisturbed: Path, stop_at: int, other: dict[str, dict[str, Any]]
) -> None:
    train(small_config(tmp_path, train={"steps": stop_at}), reporter=SilentReporter())
    overlaid = other | {"train": {"steps": NUM_STEPS} | other.get("train", {})}
    listener = Listener()
    train(small_config(tmp_path, **overlaid), reporter=listener, resume=True)
    assert newest_files(tmp_path) == newest_files(undisturbed)
    assert f"resuming with another train.steps: {stop_at} -> {NUM_STEPS}" in listener.said


def test_the_file_store_gives_the_same_run(tmp_path: Path, undisturbed: Path) -> None:
    store = {"store": {"kind": "file", "folder": str(tmp_path / "rows")}, "embedding_dim": 4}
    optimizer = {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.1}}
    train(
        small_config(tmp_path / "run", embeddings=store | optimizer, train={"steps": 9}),
        reporter=SilentReporter(),
    )
    train(
        small_config(tmp_path / "run", embeddings=store | optimizer),
        reporter=SilentReporter(),
        resume=True,
    )
    assert newest_files(tmp_path / "run") == newest_files(undisturbed)


class SignalAt(Listener):
    """Sends itself SIGTERM when a step is done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, step: int) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, undisturbed: Path
) -> None:
    result = train(small_config(tmp_path, checkpoint={"at_end": False}), reporter=SignalAt(7))
    assert (result.step, result.stopped_by, result.scores) == (7, signal.SIGTERM, None)
    assert steps_saved(tmp_path) == [7]
    train(small_config(tmp_path), reporter=SilentReporter(), resume=True)
    assert newest_files(tmp_path) == newest_files(undisturbed)


def test_checkpoints_come_by_the_clock_too(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven seconds after the last one of any cause, where a step takes a second."""
    now_s = 0.0

    class Clock(SilentReporter):
        def advance(self, step: int) -> None:
            nonlocal now_s
            now_s = float(step)

    clock = SimpleNamespace(monotonic=lambda: now_s, perf_counter=lambda: now_s)
    monkeypatch.setattr("bagpipe.train.saving.time", clock)
    checkpoint = {"every_s": 7, "every_steps": 10, "keep": 9}
    first = small_config(tmp_path, checkpoint=checkpoint, train={"steps": 18})
    train(first, reporter=Clock())
    assert steps_saved(tmp_path) == [7, 10, 17, 18]
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000000018")
    train(small_config(tmp_path, checkpoint=checkpoint), reporter=Clock(), resume=True)
    assert steps_saved(tmp_path) == [7, 10, 17, 20, 24]
    assert newest_files(tmp_path) == newest_files(undisturbed)


def test_a_finished_run_resumes_to_its_scores(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    first = train(config, reporter=SilentReporter())
    assert train(config, reporter=SilentReporter(), resume=True) == first


def test_a_checkpoint_that_fails_does_not_end_the_run(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full_at_step_10(descriptor: int) -> None:
        if list(tmp_path.glob("epochs/*/cuts/step-0000000010")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_step_10)
    listener = Listener()
    train(small_config(tmp_path, checkpoint={"every_steps": 5, "keep": 9}), reporter=listener)
    assert steps_saved(tmp_path) == [5, 15, 20, NUM_STEPS]
    assert newest_files(tmp_path) == newest_files(undisturbed)
    (told,) = [text for text in listener.said if "no checkpoint" in text]
    assert "step 10: no checkpoint, the run goes on without it" in told
    assert "No space left" in told
    assert [record["step"] for record in log_of(tmp_path, "checkpoint_failed")] == [10]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(monkeypatch, "step-0000000005")
    listener = Listener()
    config = small_config(tmp_path, checkpoint={"every_steps": 5, "keep": 1})
    result = train(config, reporter=listener)
    assert result.checkpoint == tmp_path / "checkpoints" / f"step-{NUM_STEPS:010d}"
    assert steps_saved(tmp_path) == [5, NUM_STEPS]
    assert newest_files(tmp_path) == newest_files(undisturbed)
    told = [text for text in listener.said if "checkpoint" in text]
    assert len(told) == 4  # at each one since: that it is still there
    assert all("step-0000000005: is no longer needed, but can't be removed: Dev" in t for t in told)
    assert log_of(tmp_path, "checkpoint_failed") == []


def test_a_last_checkpoint_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def read_only_at_the_end(descriptor: int) -> None:
        if list(tmp_path.glob("epochs/*/cuts/step-*")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", read_only_at_the_end)
    with pytest.raises(
        CheckpointError, match=r"step-0000000024: can't be written: Read-only file system"
    ):
        train(small_config(tmp_path), reporter=SilentReporter())
    assert steps_saved(tmp_path) == []


def test_a_diverging_run_names_the_step_and_saves_nothing_of_it(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        model={"top": [8] * 8 + [1]},
        train={"optimizer": {"kind": "sgd", "lr": 1e6}, "steps": NUM_STEPS},
        checkpoint={"every_steps": 1, "keep": 99},
    )
    with pytest.raises(LossError, match=r"step \d+: the loss is (nan|inf)") as caught:
        train(config, reporter=SilentReporter())
    failed = int(str(caught.value).split()[1].rstrip(":"))
    assert steps_saved(tmp_path) == list(range(1, failed))


def test_resuming_without_a_checkpoint_starts_afresh_and_says_so(
    tmp_path: Path, undisturbed: Path
) -> None:
    listener = Listener()
    train(small_config(tmp_path), reporter=listener, resume=True)
    assert any("no checkpoint to resume from: starting afresh" in text for text in listener.said)
    assert newest_files(tmp_path) == newest_files(undisturbed)


def test_resuming_falls_back_from_a_damaged_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    train(
        small_config(tmp_path, train={"steps": 9}, checkpoint={"every_steps": 4}),
        reporter=SilentReporter(),
    )
    (tmp_path / "checkpoints" / "step-0000000009" / "group-0.arrow").write_bytes(b"")
    listener = Listener()
    train(small_config(tmp_path), reporter=listener, resume=True)
    assert any(
        "skipped a checkpoint: " in text and "group-0.arrow: is damaged" in text
        for text in listener.said
    )
    assert newest_files(tmp_path) == newest_files(undisturbed)


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    train(small_config(tmp_path, train={"steps": 2}), reporter=SilentReporter())
    with pytest.raises(CheckpointError, match=r"data.skew: 1.1 -> 1.2"):
        train(small_config(tmp_path, data={"skew": 1.2}), reporter=SilentReporter(), resume=True)


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"steps": 2})
    train(config, reporter=SilentReporter())
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run, up to step 2"):
        train(config, reporter=SilentReporter())
    train(small_config(tmp_path, train={"steps": 1}), reporter=SilentReporter(), overwrite=True)
    assert steps_saved(tmp_path) == [1]
