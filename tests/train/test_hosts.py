"""Trainers on several hosts, however many are on each, give what one trainer gives, and agree on
what is a host's own. Ranks are threads and every host is this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.checkpoint.older import make_format_1
from tests.checkpoint.test_checkpoints import CONFIG
from tests.disks import files_of_at_most
from tests.ordered import view_of
from tests.train.ranks import run_ranks
from tests.train.test_trainers import (
    Loop,
    Trainer,
    all_records,
    assert_equal,
    linear_loss,
    make_batches,
    make_tables,
    plain,
    train,
)

import bagpipe
from bagpipe.checkpoint.checkpoints import State, load_checkpoint, open_checkpoint, save_checkpoint
from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.checkpoint.run_folder import check_seen_by_all
from bagpipe.data.base import Position
from bagpipe.distributed.alone import peers_of
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import CheckpointError, ConfigError, DataError
from bagpipe.optimizers import SGD, Adam, Optimizer
from bagpipe.store import MemoryStore
from bagpipe.train.settings import check_same_run
from bagpipe.types import Jagged, group_tables

Stores = list[MemoryStore]
SIZES: dict[str, Any] = {"cache": [400, 150], "replicas": [400, 150]}


def make_stores(optimizer: Optimizer) -> Stores:
    return [MemoryStore(group, 11) for group in group_tables(make_tables(), optimizer)]


def embeddings_on(
    stores: Stores, communicator: Communicator | None, optimizer: Optimizer
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        make_tables(),
        optimizer=optimizer,
        store=lambda group, _: view_of(stores[group.index], communicator),
        communicator=communicator,
    )


def records_of(stores: Stores) -> list[np.ndarray]:
    return [all_records(store.group, store) for store in stores]


def train_on_hosts(
    num_trainers: int,
    num_hosts: int,
    batches: Sequence[Jagged],
    *,
    loop: Loop = plain,
    **options: Any,
) -> list[np.ndarray]:
    """All records at the end, by group."""
    stores = make_stores(SGD(lr=0.5))

    def work(communicator: Communicator) -> None:
        loop(
            Trainer(
                embeddings=embeddings_on(stores, communicator, SGD(lr=0.5)),
                loss=linear_loss,
                num_trainers=num_trainers,
                options=SIZES | {"cache": [60, 40], "lookahead": 3} | options,
            ),
            batches,
        )

    run_ranks(num_trainers, work, num_hosts=num_hosts)
    return records_of(stores)


@pytest.mark.parametrize(
    ("num_trainers", "num_hosts", "oracle"), [(5, 3, "thread"), (3, 2, "process")]
)
def test_uneven_hosts_equal_one_trainer_to_the_bit_where_sums_are_exact(
    num_trainers: int, num_hosts: int, oracle: str
) -> None:
    """In processes one oracle a host plans for its own ranks."""
    batches = make_batches(14)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 14)], lookahead=3)
    options = {"oracle": oracle, "check": True}
    assert_equal(train_on_hosts(num_trainers, num_hosts, batches, **options), expected)


def saved_by(run: RunFolder, num_trainers: int) -> list[np.ndarray]:
    """What the stores hold of trainers that have trained ten steps and saved them."""
    stores = make_stores(Adam(lr=0.05))

    def work(communicator: Communicator) -> None:
        embeddings = embeddings_on(stores, communicator, Adam(lr=0.05))
        plain(
            Trainer(
                embeddings=embeddings, loss=linear_loss, num_trainers=num_trainers, options=SIZES
            ),
            make_batches(10),
        )
        save(run, embeddings, communicator)

    run_ranks(num_trainers, work)
    return records_of(stores)


def save(run: RunFolder, embeddings: EmbeddingBagCollection, communicator: Communicator) -> None:
    save_checkpoint(
        run,
        state=state_of(embeddings),
        position=Position(epoch=0, batch=10),
        config=CONFIG,
        keep=2,
        trainers=Trainers(communicator),
    )


def state_of(embeddings: EmbeddingBagCollection) -> State:
    model = torch.nn.Linear(2, 1)
    return State(model=model, optimizer=torch.optim.SGD(model.parameters()), embeddings=embeddings)


@pytest.mark.parametrize(("num_trainers", "is_old"), [(1, False), (1, True), (3, False)])
def test_a_checkpoint_of_two_trainers_is_loaded_by_any_number(
    tmp_path: Path, num_trainers: int, is_old: bool
) -> None:
    expected = saved_by(claim_epoch(tmp_path), 2)
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    if is_old:
        make_format_1(path)
    saved, stores = open_checkpoint(path), make_stores(Adam(lr=0.05))

    def load(communicator: Communicator | None) -> None:
        embeddings = embeddings_on(stores, communicator, Adam(lr=0.05))
        load_checkpoint(saved, state_of(embeddings), Trainers(peers_of(communicator)))
        assert embeddings.step == 10

    if num_trainers == 1:
        load(None)
    else:
        run_ranks(num_trainers, load)
    assert_equal(records_of(stores), expected)


def test_what_rank_0_can_not_write_is_an_error_on_all_and_no_checkpoint(tmp_path: Path) -> None:
    run, stores = claim_epoch(tmp_path), make_stores(SGD(lr=0.5))
    seen: list[str] = []

    def work(communicator: Communicator) -> None:
        embeddings = embeddings_on(stores, communicator, SGD(lr=0.5))
        communicator.barrier("waiting for all to have their memory")
        limit = files_of_at_most(400) if communicator.rank == 0 else nullcontext()
        with limit, pytest.raises(CheckpointError) as caught:
            save(run, embeddings, communicator)
        seen.append(f"{communicator.rank}: {caught.value}")
        communicator.barrier("waiting for the disk to be mended")
        save(run, embeddings, communicator)

    run_ranks(2, work, num_hosts=2)
    first, second = sorted(seen)
    assert "can't be written: File too large" in first
    assert second == f"1: on rank 0: {first.removeprefix('0: ')}"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-0000000000"]


def test_each_rank_reads_whole_tables_and_any_may_save_them(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> None:
        embeddings = embeddings_on(stores, communicator, SGD(lr=0.5))
        plain(
            Trainer(embeddings=embeddings, loss=linear_loss, num_trainers=3, options=SIZES),
            make_batches(10),
        )
        embeddings.save_tables(tmp_path / f"{communicator.rank}.safetensors")

    stores = make_stores(SGD(lr=0.5))
    run_ranks(3, work, num_hosts=2)
    expected = train(make_tables(), SGD(lr=0.5), make_batches(10), [(1, 10)])
    for rank in range(3):
        found = safetensors.torch.load_file(tmp_path / f"{rank}.safetensors")
        for name, group, dim in (("wide", 0, 4), ("narrow", 1, 3)):
            np.testing.assert_array_equal(
                found[f"embedding_bags.{name}.weight"].numpy(), expected[group][:, :dim]
            )


def test_a_store_for_one_trainer_is_refused_where_there_are_several() -> None:
    def work(communicator: Communicator) -> None:
        told = r"store makes a MemoryStore, which one trainer alone can use, not 2: leave store out"
        with pytest.raises(ConfigError, match=told):
            EmbeddingBagCollection(
                make_tables(), optimizer=SGD(lr=0.5), store=MemoryStore, communicator=communicator
            )

    run_ranks(2, work)


def test_hosts_that_read_other_batches_are_told_before_they_train_them() -> None:
    """Batches whose samples stand in another order make plans that fit together and train something
    else.
    """

    def work(communicator: Communicator) -> int:
        batches = [
            Jagged(keys=("a", "b", "c"), values=np.arange(24) % 40 + step, batch_size=8)
            for step in range(12)
        ]
        if communicator.rank == 1:
            values = batches[6].values.reshape(3, 2, 4)[:, :, ::-1].copy()  # within each share
            batches[6] = replace(batches[6], values=values.ravel())
        num_steps = 0
        embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=SGD(lr=0.5), communicator=communicator
        )
        stream = bagpipe.lookahead(batches, embeddings, cache=[400, 50], replicas=[400, 50])
        for batch in itertools.islice(stream, 5):
            num_steps += 1
            (linear_loss(embeddings(batch).groups) * 2).backward()
        # the step before needs the plan of the one after, too
        with pytest.raises(DataError, match=r"the ids of step 6 on rank 1 are not those on rank 0"):
            next(stream)
        return num_steps

    assert run_ranks(2, work, num_hosts=2) == [5, 5]


def test_a_second_flush_needs_no_other_rank_and_changes_nothing() -> None:
    num_flushes = [0, 0]

    def flush_twice_on_rank_0(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        with trainer.stream(batches) as stream:
            for step, loss in trainer.losses(stream):
                loss.backward()
                for _ in range(2 - trainer.embeddings.peers.rank if step % 4 == 3 else 0):
                    stream.flush()
                    num_flushes[trainer.embeddings.peers.rank] += 1

    batches = make_batches(14)
    found = train_on_hosts(2, 2, batches, loop=flush_twice_on_rank_0)
    assert num_flushes == [6, 3]
    assert_equal(found, train(make_tables(), SGD(lr=0.5), batches, [(1, 14)], lookahead=3))


def test_a_failure_of_the_system_on_one_rank_is_one_on_all() -> None:
    def work(communicator: Communicator) -> None:
        def fail() -> None:
            if communicator.rank == 1:
                raise OSError(28, "No space left on device")

        with pytest.raises(ConfigError, match="No space left on device"):
            Trainers(communicator).all_do("a file", fail, ConfigError)
        assert Trainers(communicator).all_do("numbers", lambda: communicator.rank) == [0, 1]

    run_ranks(2, work)


def test_runs_of_other_settings_are_refused_but_for_what_is_a_hosts_own() -> None:
    def work(communicator: Communicator) -> None:
        own = {
            "train": {"seed": 1},
            "log": {"folder": f"/host-{communicator.rank}"},
            "data": {"folder": str(communicator.rank)},
        }
        check_same_run(communicator, own)
        own["train"]["lr"] = 0.1 + communicator.rank
        with pytest.raises(
            ConfigError,
            match=r"train\.lr is 0\.1 on rank 0 and 1\.1 on rank 1; start all with the same",
        ):
            check_same_run(communicator, own)

    run_ranks(2, work)


def test_a_folder_that_a_host_does_not_see_is_refused_on_all(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> None:
        trainers = Trainers(communicator)
        check_seen_by_all(tmp_path, trainers)
        elsewhere = tmp_path / str(communicator.hosts.own)
        elsewhere.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="this host does not see what rank 0 writes there"):
            check_seen_by_all(elsewhere, trainers)

    run_ranks(4, work, num_hosts=2)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
