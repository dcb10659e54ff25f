"""`bagpipe.save` and `bagpipe.restore`: a resumed loop equals one that nothing happened to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.own_loop import BATCHES, NUM_STEPS, Loop, assert_equal, save_at
from tests.train.ranks import run_ranks
from tests.train.test_trainers import linear_loss, make_batches, make_tables

import bagpipe
from bagpipe.checkpoint.checkpoints import State, save_checkpoint
from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.data.base import Position
from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import CheckpointError, UsageError
from bagpipe.optimizers import Adam
from bagpipe.store import MemoryStore
from bagpipe.types import Jagged


@pytest.fixture(scope="module")
def undisturbed() -> Loop:
    loop = Loop()
    loop.train(BATCHES)
    return loop


def test_a_resumed_loop_equals_an_undisturbed_one_to_the_bit(
    tmp_path: Path, undisturbed: Loop
) -> None:
    loop = Loop()
    loop.train(BATCHES, save_at(loop, tmp_path, 5, 11, 13, extra={"best": 0.5, "ids": [1, 2]}))
    assert_equal(loop, undisturbed)  # to be saved changes nothing
    assert [path.name[-2:] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["11", "13"]
    for options in ({"cache": 350}, {"cache": 40, "lookahead": 1, "prefetch_depth": 0}):
        resumed = Loop(store=MemoryStore)
        resumed.train(BATCHES[:3])  # is forgotten
        resumed.losses.clear()
        restored = resumed.restore(tmp_path)
        assert (restored.step, restored.extra) == (13, {"best": 0.5, "ids": [1, 2]})
        assert restored.path == tmp_path / "checkpoints" / "step-0000000013"
        assert resumed.embeddings.lr == 0.05 / 4
        resumed.train(itertools.islice(BATCHES, restored.step, None), **options)
        assert_equal(resumed, undisturbed)


def test_a_loop_may_save_before_it_uses_a_batch(tmp_path: Path, undisturbed: Loop) -> None:
    """That batch is still to come, here and in a loop that is restored."""
    loop = Loop()
    with bagpipe.lookahead(BATCHES, loop.embeddings, cache=60, lookahead=4) as stream:
        for number, batch in enumerate(stream):
            if number == 6:
                loop.save(tmp_path)
            loop.step(batch)
    assert_equal(loop, undisturbed)
    resumed = Loop()
    assert resumed.restore(tmp_path).step == 6
    resumed.train(BATCHES[6:])
    assert_equal(resumed, undisturbed)


def test_a_step_without_backward_counts(tmp_path: Path) -> None:
    """A loop may skip a batch; that it was asked for, or that rows are frozen, is no reason not to
    count it.
    """
    loop = Loop()
    for batch in bagpipe.lookahead(BATCHES[:2], loop.embeddings):
        loop.embeddings(batch)
        loop.save(tmp_path)
    loop.embeddings.requires_grad_(False)
    for batch in bagpipe.lookahead(BATCHES[2:3], loop.embeddings):
        loop.embeddings(batch)
        loop.save(tmp_path)
    resumed = Loop()
    assert resumed.restore(tmp_path).step == 3
    assert resumed.embeddings.num_skipped == [3]


def test_backward_behind_a_save_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    for batch in bagpipe.lookahead(BATCHES[:1], loop.embeddings):
        pooled = loop.embeddings(batch).values()
        loop.save(tmp_path)
        with pytest.raises(UsageError, match="step 0"):
            pooled.sum().backward()


@dataclass
class StatefulLoader:
    """As torchdata's StatefulDataLoader: one epoch after the other, each in an order of its own."""

    epoch: int = 0
    next: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Jagged]:
        order = np.random.default_rng(self.epoch).permutation(NUM_STEPS)
        while self.next < NUM_STEPS:
            self.next += 1
            yield BATCHES[order[self.next - 1]]
        self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        self.state |= {"epoch": self.epoch, "next": self.next}
        return self.state  # the same each time, which goes on

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


def test_a_loader_with_a_state_goes_on_behind_what_was_trained(tmp_path: Path) -> None:
    expected, loop = Loop(), Loop()
    whole, loader = StatefulLoader(), StatefulLoader()
    for number in range(3):
        expected.train(whole)
        if number < 2:
            loop.train(loader, save_at(loop, tmp_path, 27))
    resumed, again = Loop(), StatefulLoader()
    restored = resumed.restore(tmp_path, loader=again)
    assert (restored.step, again.epoch, again.next) == (27, 1, 7)
    resumed.train(again)
    resumed.train(again)
    assert_equal(resumed, expected)


def test_an_epoch_may_be_saved_at_its_ends(tmp_path: Path) -> None:
    loader, loop = StatefulLoader(), Loop()
    loop.save(tmp_path)  # nothing is read yet
    with pytest.raises(CheckpointError, match=r"holds no state of a loader.*leave `loader` out"):
        Loop().restore(tmp_path, loader=loader)
    loop.train(loader)
    loop.save(tmp_path)
    again = StatefulLoader()
    Loop().restore(tmp_path, loader=again)
    assert list(again) == []  # of this epoch
    assert again.epoch == 1
    loop.train(BATCHES[:1])
    loop.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no state of a loader"):
        Loop().restore(tmp_path, loader=again)


def test_a_loader_that_another_process_reads_goes_on_as_one_read_here(tmp_path: Path) -> None:
    loader, loop = StatefulLoader(), Loop()
    steps = (2, NUM_STEPS)
    loop.train(
        loader, lambda step: loop.save(tmp_path) if step in steps else None, oracle="process"
    )
    assert (loader.epoch, loader.next) == (1, 0)  # so that the next epoch is another one
    begun, ended, resumed = StatefulLoader(), StatefulLoader(), Loop()
    resumed.restore(tmp_path / "checkpoints" / "step-0000000002", loader=begun)
    assert (begun.epoch, begun.next) == (0, 2)
    resumed.train(begun)
    assert_equal(resumed, loop)
    Loop().restore(tmp_path, loader=ended)
    assert list(ended) == []  # of this epoch


def test_random_state_is_put_back_where_asked(tmp_path: Path) -> None:
    loop = Loop()
    loop.save(tmp_path)
    noise = torch.rand(3)
    Loop(0).restore(tmp_path)
    assert torch.equal(torch.rand(3), noise)
    fresh = Loop(0)
    expected = torch.get_rng_state()
    fresh.restore(tmp_path, random=False)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_dense_part_is_saved_by_torch(tmp_path: Path) -> None:
    loop, other = Loop(), Loop(seed=1)
    loop.train(BATCHES[:2])
    compiled = torch.nn.Module()
    compiled._orig_mod = loop.model  # as torch.compile wraps it
    torch.save(bagpipe.dense_state_dict(compiled), tmp_path / "dense.pt")
    state = torch.load(tmp_path / "dense.pt")
    assert sorted(state) == ["hidden.bias", "hidden.weight", "last.bias", "last.weight"]
    other.model.load_state_dict(state, strict=False)
    assert torch.equal(other.model["last"].weight, loop.model["last"].weight)


@pytest.mark.parametrize("num_after", [1, 3])
def test_another_number_of_trainers_goes_on(tmp_path: Path, num_after: int) -> None:
    """Gradients are integers here, so their sums are the same in any order."""
    batches = make_batches(12)

    def train(communicator: Communicator | None, begin: int, end: int) -> list[Any]:
        embeddings = bagpipe.EmbeddingBagCollection(
            make_tables(), optimizer=Adam(lr=0.05), communicator=communicator
        )
        num_trainers = 1 if communicator is None else communicator.num_trainers
        if begin:
            restored = bagpipe.restore(tmp_path, embeddings, random=False)
            assert restored is not None
            assert restored.step == begin
        options: dict[str, Any] = {"cache": [300, 50], "replicas": [400, 50]}
        with bagpipe.lookahead(batches[begin:], embeddings, **options) as stream:
            for batch in stream:
                (linear_loss(embeddings(batch).groups) * num_trainers).backward()
                if embeddings.step + 1 == end:
                    bagpipe.save(tmp_path, embeddings, extra={"end": end})
        return [list(store.snapshot()) for store in embeddings.stores]

    expected = train(None, 0, 0)
    by_two = run_ranks(2, lambda communicator: train(communicator, 0, 5))
    np.testing.assert_equal(by_two, [expected] * 2)
    if num_after == 1:
        np.testing.assert_equal(train(None, 5, 0), expected)
    else:
        after = run_ranks(num_after, lambda communicator: train(communicator, 5, 9))
        np.testing.assert_equal(after, [expected] * num_after)


def test_a_run_of_bagpipe_train_is_restored(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(BATCHES[:3])
    state = State(model=loop.model, optimizer=loop.optimizers[0], embeddings=loop.embeddings)
    save_checkpoint(
        claim_epoch(tmp_path),
        state=state,
        position=Position(batch=3),
        config={"train": {"seed": 0}},
        keep=1,
    )
    other = Loop()
    restored = bagpipe.restore(
        tmp_path, other.embeddings, model=other.model, optimizer=other.optimizers[0]
    )
    assert restored is not None
    assert (restored.step, restored.extra) == (3, {})
    assert_equal(other, loop)
    with pytest.raises(CheckpointError, match="the seed 0, these embeddings have 1"):
        bagpipe.restore(tmp_path, Loop(1).embeddings)


def test_the_page_on_own_loops_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "own-loops.md"
    code = "".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})
    saved = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert saved == ["step-0000000040", "step-0000000060"]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("oracle", ["thread", "process"])
def test_torchdata_s_loader_goes_on_behind_what_was_trained(tmp_path: Path, oracle: str) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def loader() -> Any:  # as the page has it
        generator = torch.Generator().manual_seed(3)
        sampler = stateful.sampler.RandomSampler(BATCHES, generator=generator)
        return stateful.StatefulDataLoader(BATCHES, batch_size=None, sampler=sampler)

    expected, loop, whole, stopped = Loop(), Loop(), loader(), loader()
    for epoch in range(3):
        expected.train(whole)
        if epoch < 2:
            loop.train(stopped, save_at(loop, tmp_path, 27), oracle=oracle)
    resumed, again = Loop(), loader()
    assert resumed.restore(tmp_path, loader=again).step == 27
    for _ in range(2):  # the rest of an epoch, and the next one
        resumed.train(again, oracle=oracle)
    assert_equal(resumed, expected)
    assert resumed.embeddings.step == 60
