"""A stream whose device plans: how it ends, and what it says of bad input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.device_oracle.test_device_oracle import keep
from tests.soon import SOON_S
from tests.train.ranks import run_ranks
from tests.train.runs import newest_files, small_config

import bagpipe
from bagpipe.device_oracle import source
from bagpipe.device_oracle.oracle import DeviceOracle
from bagpipe.device_oracle.planner import Planner
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, CacheTooSmallError, ConfigError, DataError
from bagpipe.optimizers import SGD
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train as run
from bagpipe.types import Jagged, TableConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = TableConfig(name="t", num_embeddings=100, embedding_dim=4, feature_names=["f"])


def make_embeddings(**options: Any) -> EmbeddingBagCollection:
    return EmbeddingBagCollection([TABLE], optimizer=SGD(lr=0.5), device=DEVICE, **options)


def batches(num_batches: int, batch_size: int = 8) -> Iterator[Jagged]:
    for step in range(num_batches):
        ids = (np.arange(batch_size) * 7 + step) % 100
        yield Jagged(keys=("f",), values=ids, batch_size=batch_size)


def train(embeddings: EmbeddingBagCollection, loader: Any, **options: Any) -> int:
    """How many steps were trained before the stream ended or failed is `embeddings.step`."""
    options = {"cache": 40, "lookahead": 3} | options
    for batch in bagpipe.lookahead(loader, embeddings, oracle="device", **options):
        embeddings(batch).values().sum().backward()
    return embeddings.step


def test_a_stream_may_be_left_and_its_threads_end() -> None:
    embeddings = make_embeddings()
    stream = bagpipe.lookahead(batches(50), embeddings, cache=40, lookahead=3, oracle="device")
    threads = {thread for thread in threading.enumerate() if thread.name == "bagpipe-oracle"}
    for batch in stream:
        embeddings(batch).values().sum().backward()
        if embeddings.step == 5:
            break
    stream.close()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
    assert train(embeddings, batches(4)) == 10
    embeddings.close()


class ResumableLoader:
    """As torchdata's `StatefulDataLoader`, whose first batch is what is left of an epoch."""

    batch_size = 64

    def __iter__(self) -> Iterator[Jagged]:
        yield from batches(1, batch_size=2)
        yield from batches(2, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_loader_tells_how_large_most_batches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[int | None]()

    class Noting(Planner):
        def __init__(self, options: Any, device: Any, batch_size: int | None = None) -> None:
            told.append(batch_size)
            super().__init__(options, device, batch_size)

    monkeypatch.setattr(source, "Planner", Noting)
    embeddings = make_embeddings()
    for loader in (ResumableLoader(), batches(3)):
        assert train(embeddings, loader, cache=100) in (3, 6)
    assert told == [64, None]


def bad_id() -> Iterator[Jagged]:
    yield from batches(6)
    yield Jagged(keys=("f",), values=np.array([1, 100, 3]), batch_size=3)


def large_batch() -> Iterator[Jagged]:
    yield from batches(6)
    yield Jagged(keys=("f",), values=np.arange(41), batch_size=41)


def failing() -> Iterator[Jagged]:
    yield from batches(6)
    raise OSError("the disk is gone")


def lacking() -> Iterator[Jagged]:
    yield from batches(6)
    yield Jagged(keys=("g",), values=np.arange(3), batch_size=3)


@pytest.mark.parametrize("lookahead", [1, 3, "auto"])
@pytest.mark.parametrize(
    ("loader", "kind", "says"),
    [
        (
            bad_id,
            DataError,
            r"^step 6: feature 'f': id 100 \(lookup 1 of this batch\) lies",
        ),
        (large_batch, CacheTooSmallError, "step 6 uses 41 unique"),
        (failing, BackgroundError, "the disk is gone"),
        (lacking, DataError, "^step 6: the batch has feature 'g', which no table looks up"),
    ],
)
def test_what_is_wrong_with_a_batch_is_told_after_all_before_it(
    loader: Any, kind: type[Exception], says: str, lookahead: Any
) -> None:
    embeddings = make_embeddings()
    with pytest.raises(kind, match=says):
        train(embeddings, loader(), lookahead=lookahead)
    assert embeddings.step == 6
    expected = make_embeddings()
    for batch in bagpipe.lookahead(batches(6), expected, cache=40):
        expected(batch).values().sum().backward()
    torch.testing.assert_close(
        embeddings.tables()["t"][:], expected.tables()["t"][:], rtol=0, atol=0
    )
    embeddings.close()
    expected.close()


@pytest.mark.parametrize("lookahead", [3, "auto"])
@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_so_it_is_of_a_batch_in_the_first_window(num_before: int, lookahead: Any) -> None:
    """Several batches enter between two steps there."""
    bad = Jagged(keys=("f",), values=np.array([1, 100, 3]), batch_size=3)
    embeddings = make_embeddings()
    with pytest.raises(DataError, match=rf"^step {num_before}: feature 'f': id 100"):
        train(embeddings, [*batches(num_before), bad, *batches(3)], lookahead=lookahead)
    assert embeddings.step == num_before
    embeddings.close()


@pytest.mark.parametrize("where", ["enter", "grow", "plan"])
def test_a_device_without_memory_left_says_what_to_lower(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(DeviceOracle, where)
    position = "planned" if where == "plan" else "entered"

    def fail_late(oracle: DeviceOracle, *arguments: Any) -> None:
        if int(getattr(oracle.state, position)) == 4:
            raise torch.OutOfMemoryError("no memory (of a test)")
        function(oracle, *arguments)

    monkeypatch.setattr(DeviceOracle, where, fail_late)
    embeddings = make_embeddings()
    with pytest.raises(ConfigError, match="shorter lookahead, a smaller cache or smaller batches"):
        train(embeddings, [*batches(4), *batches(1, batch_size=20)])
    assert embeddings.step == 4
    embeddings.close()


@pytest.mark.parametrize("index", ["array", "map"])
def test_a_run_whose_device_plans_ends_with_the_same_checkpoint(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(index, monkeypatch)
    for oracle in ("thread", "device"):
        config = small_config(tmp_path / oracle, cache={"oracle": oracle, "check": True})
        run(config, reporter=SilentReporter())
    assert newest_files(tmp_path / "device") == newest_files(tmp_path / "thread")


def test_several_trainers_are_refused() -> None:
    def work(communicator: Any) -> str:
        embeddings = make_embeddings(communicator=communicator)
        with pytest.raises(ConfigError) as caught:
            bagpipe.lookahead(batches(3), embeddings, oracle="device")
        return str(caught.value)

    for message in run_ranks(2, work):
        assert message.startswith("oracle is 'device' with 2 trainers")
