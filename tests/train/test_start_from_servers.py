"""`bagpipe train --from RUN` over shard servers, by one trainer and by two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train.runs import Listener, small_config
from tests.train.test_servers import assert_same, over, servers_of, tables_of
from tests.train.test_torchrun import train as run_torchrun
from tests.train.test_torchrun import write_run

from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

GROWN: dict[str, Any] = {
    "data": {
        "kind": "synthetic",
        "num_samples": 500,
        "num_validation_samples": 200,
        "num_embeddings": [50, 300, 120, 30],
        "num_dense": 3,
    }
}


@pytest.fixture(scope="module")
def day1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("day1")
    train(small_config(folder, train={"steps": 6}), reporter=SilentReporter())
    return folder


@pytest.fixture(scope="module")
def day2(day1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is to come out, with all tables in memory."""
    folder = tmp_path_factory.mktemp("day2")
    config = small_config(folder, train={"steps": 8}, **GROWN)
    train(config, reporter=SilentReporter(), start_from=day1)
    return folder


def test_one_trainer_over_servers_trains_the_same_model_and_resumes(
    tmp_path: Path, day1: Path, day2: Path
) -> None:
    """The second start needs nothing of the other run: its rows are in this run's checkpoints."""
    with servers_of(small_config(tmp_path, **GROWN), 2) as addresses:
        for steps, listener in ((5, Listener()), (8, Listener())):
            config = over(addresses, tmp_path, train={"steps": steps}, **GROWN)
            train(config, reporter=listener, resume=True, start_from=day1)
            is_first = any(text.startswith("starts from step 6 of") for text in listener.said)
            assert is_first == (steps == 5)
    assert_same(tmp_path, day2)


@pytest.mark.soak
def test_two_trainers_with_their_server_train_the_same_but_for_the_order_of_sums(
    tmp_path: Path,
) -> None:
    file = write_run(tmp_path, steps=6)
    day1 = tmp_path / "run"
    run_torchrun(1, file)
    grown = "data.num_embeddings=[3000, 700, 40]"
    folders = {number: tmp_path / str(number) for number in (1, 2)}
    for number, folder in folders.items():
        options = ["--set", f"log.folder={folder}", "--set", grown, "--from", str(day1)]
        output = run_torchrun(number, file, *options)
        assert output.count("starts from step 6 of") == 1
    (one,), (two,) = map(tables_of, folders.values())
    assert one.keys() == two.keys()
    for row, record in one.items():
        np.testing.assert_allclose(
            np.frombuffer(two[row], np.float32), np.frombuffer(record, np.float32), rtol=1e-4
        )
