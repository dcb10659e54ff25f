"""The log of a run, and that a resumed run's reads as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.disks import files_of_at_most

from bagpipe.errors import ConfigError
from bagpipe.train.logs import LOG_NAME, RunLog


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG_NAME).read_text().splitlines()]


def write_steps(folder: Path, *steps: int, after: int | None = None) -> None:
    with RunLog(folder, step=after, tensorboard=False) as log:
        for step in steps:
            log.write("train", step, loss=0.5)


def test_a_resumed_run_drops_the_steps_that_it_trains_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"kind": "train", "st')  # a process was killed here
    write_steps(tmp_path, 3, 4, after=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1)
    write_steps(tmp_path, 0)
    assert steps_in(tmp_path) == [0]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = {"train": {"batch_size": 8, "lr": 0.5}, "model": {"top": [8, 1], "bottom": None}}
    with RunLog(tmp_path, step=None, tensorboard=True) as log:
        log.write("start", 0, config=config, device="cpu")
        log.write("train", 3, loss=0.25, note="text", auc=None)
        log.write("checkpoint", 4, num_bytes=7)
        log.write("end", 4, elapsed_s=2.5)
    folder = tmp_path / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.25)]
    assert events.Tags()["scalars"] == ["train/loss"]  # no chart has a point that stays alone
    assert [path.is_file() for path in folder.iterdir()] == [True]  # nor is there a second run
    started = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(started).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in hparams.items()} == {
        "train.batch_size": 8,
        "train.lr": 0.5,
        "model.top": "[8, 1]",
    }
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    with RunLog(tmp_path, step=None, tensorboard=False, on_failure=told.append) as log:
        log._file.close()
        log._file = open("/dev/full", "w", buffering=1)
        log.write("train", 1, loss=0.5)
        log.write("train", 2, loss=0.5)
    assert len(told) == 1
    assert "/dev/full: can't be written: No space left on device; the run goes on" in told[0]


def test_a_full_disk_leaves_the_log_of_an_earlier_run_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, *range(100))
    before = (tmp_path / LOG_NAME).read_bytes()
    with files_of_at_most(1_000), pytest.raises(ConfigError) as caught:
        RunLog(tmp_path, step=90, tensorboard=False)
    assert f"{tmp_path / LOG_NAME}: can't be written: File too large" in str(caught.value)
    assert (tmp_path / LOG_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LOG_NAME]


@pytest.mark.parametrize("name", [LOG_NAME, "tensorboard"])
def test_a_place_that_is_taken_is_named(tmp_path: Path, name: str) -> None:
    taken = tmp_path / name
    taken.mkdir() if name == LOG_NAME else taken.touch()
    with pytest.raises(ConfigError, match=rf"{name}: can't be written: .*another log.folder"):
        RunLog(tmp_path, step=None, tensorboard=True)
