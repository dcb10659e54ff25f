"""A loader that fills the same buffers again is found, whatever it yields, before its batches can
be trained with another one's content; one that yields the same batches again is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.soon import SOON_S, ends_soon
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.distributed import communicator as communicator_module
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BagpipeError, DataError
from bagpipe.jagged import share_bounds, share_of
from bagpipe.optimizers import SGD
from bagpipe.types import Jagged, TableConfig

TABLES = [TableConfig(name="t", num_embeddings=1000, embedding_dim=4, feature_names=["f"])]
SIZE, NUM_BATCHES = 16, 12
WHERE = ["ids", "dense", "labels"]


@dataclass
class Batch:
    """A user's batch, which may be changed."""

    sparse: Jagged
    dense: Any
    labels: Any

    def share(self, rank: int, num_trainers: int) -> Batch:
        begin, end = share_bounds(self.sparse.batch_size, rank, num_trainers)
        return Batch(
            share_of(self.sparse, rank, num_trainers), self.dense[begin:end], self.labels[begin:end]
        )


def jagged(ids: npt.NDArray[np.int64]) -> Jagged:
    return Jagged(keys=("f",), values=ids, batch_size=len(ids))


def draw(rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    return {
        "ids": rng.integers(0, 1000, SIZE),
        "dense": rng.random((SIZE, 3), np.float32),
        "labels": rng.integers(0, 2, SIZE).astype(np.float32),
    }


class Ring:
    """Yields batches of which the parts named by `reused` lie in one of `num_buffers` buffers, in
    turn.
    """

    def __init__(self, *reused: str, num_buffers: int = 1, tensors: bool = False) -> None:
        self._reused, self._num_buffers, self._tensors = reused, num_buffers, tensors

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        buffers = [draw(np.random.default_rng(1)) for _ in range(self._num_buffers)]
        for number in range(NUM_BATCHES):
            content, buffer = draw(rng), buffers[number % self._num_buffers]
            for name in self._reused:
                buffer[name][:] = content[name]
                content[name] = buffer[name]
            dense, labels = content["dense"], content["labels"]
            yield Batch(
                jagged(content["ids"]),
                torch.from_numpy(dense) if self._tensors else dense,
                torch.from_numpy(labels) if self._tensors else labels,
            )


class OneBatch:
    """Yields one batch, whose parts are new arrays each time."""

    def __iter__(self) -> Iterator[Batch]:
        rng, batch = np.random.default_rng(0), Batch(jagged(np.zeros(SIZE, np.int64)), None, None)
        for _ in range(NUM_BATCHES):
            content = draw(rng)
            batch.sparse = jagged(content["ids"])
            batch.dense, batch.labels = content["dense"], content["labels"]
            yield batch


class Copies:
    """A loader of new batches: what the others would be if they copied."""

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(NUM_BATCHES):
            content = draw(rng)
            yield Batch(jagged(content["ids"]), content["dense"], content["labels"])


def train(
    loader: Any, communicator: Communicator | None = None, lookahead: int = 3, **options: Any
) -> list[int]:
    """The steps that were trained before the error, if there was one, and its message."""
    embeddings = EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.1), communicator=communicator)
    trained: list[int] = []
    with bagpipe.lookahead(
        loader, embeddings, cache=300, lookahead=lookahead, **options
    ) as batches:
        for batch in batches:
            embeddings(batch.sparse).values().sum().backward()
            trained.append(embeddings.step)
    return trained


def check_found(loader: Any, path: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        train(loader, **options)
    text = str(caught.value)
    assert text.startswith(f"step 0: {path} holds something else than when the loader yielded it")
    assert "yield new arrays, or copies (array.copy(), tensor.clone())" in text


PATHS = {"ids": "batch.sparse.values", "dense": "batch.dense", "labels": "batch.labels"}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("num_buffers", [1, 3])
def test_buffers_that_are_filled_again_are_found(
    where: str, tensors: bool, num_buffers: int
) -> None:
    check_found(Ring(where, num_buffers=num_buffers, tensors=tensors), PATHS[where])


@pytest.mark.parametrize("where", WHERE)
def test_an_oracle_process_finds_them_too(where: str) -> None:
    check_found(Ring(where, tensors=where == "dense"), PATHS[where], oracle="process")


def test_one_batch_that_is_yielded_again_and_again_is_found() -> None:
    check_found(OneBatch(), "batch.sparse.values")


def moved(batch: Batch) -> Any:
    return [batch.dense], lambda tensors: Batch(batch.sparse, tensors[0], batch.labels)


@pytest.mark.parametrize("where", WHERE)
def test_what_moves_to_the_device_is_found(where: str) -> None:
    check_found(Ring(where, num_buffers=2), PATHS[where], move=moved)


def views(batch: Batch) -> Batch:
    return Batch(batch.sparse, batch.dense[:], batch.labels[:])


def copies(batch: Batch) -> Batch:
    return Batch(jagged(batch.sparse.values.copy()), batch.dense.copy(), batch.labels.copy())


def changes(batch: Batch) -> Batch:
    batch.dense = batch.dense + 0
    return batch


@pytest.mark.parametrize("hand_out", [views, copies, changes])
@pytest.mark.parametrize("where", WHERE)
def test_what_is_handed_out_is_right_or_an_error(
    where: str, hand_out: Callable[[Batch], Batch]
) -> None:
    """Copies that were made in time are good."""
    embeddings = EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.1))
    loader, expected = Ring(where, num_buffers=2), iter(list(Copies()))
    try:
        for batch in bagpipe.lookahead(loader, embeddings, cache=300, hand_out=hand_out):
            right = next(expected)
            np.testing.assert_array_equal(batch.sparse.values, right.sparse.values)
            np.testing.assert_array_equal(batch.dense, right.dense)
            np.testing.assert_array_equal(batch.labels, right.labels)
            embeddings(batch.sparse).values().sum().backward()
    except DataError as error:
        assert PATHS[where] in str(error)  # noqa: PT017
    else:
        assert hand_out is not views


@pytest.mark.parametrize("where", WHERE)
def test_of_several_trainers_one_finds_them_and_none_goes_on(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(communicator_module, "_STOPS_WITHIN", timedelta(seconds=1))  # none comes

    def work(communicator: Communicator) -> BagpipeError:
        with pytest.raises(BagpipeError) as caught:
            train(Ring(where), communicator=communicator)
        return caught.value

    with ends_soon():
        errors = run_ranks(2, work)
    assert any(isinstance(error, DataError) and PATHS[where] in str(error) for error in errors)


def overwrite(batch: Batch) -> Batch:
    batch.labels[:] = 2
    return batch


def replace(batch: Batch) -> Batch:
    batch.labels = batch.labels + 2
    return batch


@pytest.mark.parametrize("use_again", [overwrite, replace])
def test_a_batch_that_changes_while_it_is_trained_is_found(
    use_again: Callable[[Batch], Batch],
) -> None:
    """What is handed out is right here; the loader changes it while the step is computed."""
    in_step, was_read = threading.Event(), threading.Event()

    def loader() -> Iterator[Batch]:
        first, *others = Copies()
        yield first
        yield from others[:5]
        assert in_step.wait(SOON_S)
        yield use_again(first)
        was_read.set()
        yield from others[6:]

    embeddings = EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.1))
    stream = bagpipe.lookahead(loader(), embeddings, cache=300, lookahead=1, dedup_threads=1)
    batch = next(stream)
    embeddings(batch.sparse).values().sum().backward()
    in_step.set()
    assert was_read.wait(SOON_S)
    with pytest.raises(DataError, match=r"^step 0: batch\.labels holds something else than when"):
        next(stream)


@pytest.mark.parametrize("oracle", ["thread", "process", "device"])
def test_the_same_batches_may_come_again(oracle: Literal["thread", "process"]) -> None:
    once = list(Copies())[:3]
    assert train(once * 4, oracle=oracle) == list(range(NUM_BATCHES))


def test_batches_may_be_views_of_one_array() -> None:
    view = np.arange(40) % 7
    overlapping = [Batch(jagged(view[n : n + 16]), view[n:], view) for n in range(NUM_BATCHES)]
    assert train(overlapping) == list(range(NUM_BATCHES))


def test_a_loop_may_change_what_it_was_handed() -> None:
    embeddings = EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.1))
    for batch in bagpipe.lookahead(Copies(), embeddings, cache=300, lookahead=3):
        batch.dense += 1
        batch.labels[:] = 0
        embeddings(batch.sparse).values().sum().backward()
    assert embeddings.step == NUM_BATCHES


def test_buffers_may_be_used_again_once_their_steps_are_over() -> None:
    assert len(train(Ring(*WHERE, num_buffers=NUM_BATCHES))) == NUM_BATCHES
