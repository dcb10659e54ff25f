"""Trainers on several hosts, each of which has a store for its own rows, give what one trainer with
one store gives.

Ranks are threads and every host is this one, but nothing is shared between two hosts: their stores
are apart.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.checkpoint.older import make_format_1
from tests.checkpoint.test_checkpoints import CONFIG
from tests.disks import files_of_at_most
from tests.oracle.test_hosts import home_of, smallest_cache
from tests.store_contract import touched_rows
from tests.train.ranks import run_ranks
from tests.train.test_equality import OPTIMIZERS
from tests.train.test_trainers import (
    Loop,
    Trainer,
    all_records,
    assert_equal,
    exact_trace,
    linear_loss,
    make_batches,
    make_tables,
    plain,
    train,
)

import bagpipe
from bagpipe.checkpoint.checkpoints import State, load_checkpoint, open_checkpoint, save_checkpoint
from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.checkpoint.files import CheckpointFiles, list_checkpoints
from bagpipe.checkpoint.run_folder import check_seen_by_all
from bagpipe.data.base import Position
from bagpipe.distributed.alone import peers_of
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PlanError,
    StoreError,
    UsageError,
)
from bagpipe.optimizers import SGD, Adam, Optimizer
from bagpipe.oracle import shards
from bagpipe.oracle.policy import POLICIES
from bagpipe.store import MemoryStore
from bagpipe.store.record_files import RecordFile
from bagpipe.train.settings import check_same_run
from bagpipe.types import Group, Jagged, TableConfig, group_tables

Stores = dict[tuple[int, int], MemoryStore]  # by host and group


def train_on_hosts(
    tables: Sequence[TableConfig],
    optimizer: Optimizer,
    batches: Sequence[Jagged],
    num_trainers: int,
    num_hosts: int,
    *,
    loop: Loop = plain,
    extra_slots: int = 0,
    **options: Any,
) -> list[np.ndarray]:
    """All records at the end, by group, each from its home."""
    groups = group_tables(tables, optimizer)
    stores: Stores = {
        (host, group.index): MemoryStore(group, 11) for host in range(num_hosts) for group in groups
    }
    cache = [
        smallest_cache(group, batches, num_trainers, num_hosts) + extra_slots for group in groups
    ]
    sizes = {"cache": cache, "replicas": [group.num_rows for group in groups]}

    def work(communicator: Communicator) -> None:
        loop(
            Trainer(
                embeddings=embeddings_on(communicator, stores, tables, optimizer),
                loss=linear_loss,
                num_trainers=num_trainers,
                options=sizes | options,
            ),
            batches,
        )

    run_ranks(num_trainers, work, num_hosts=num_hosts)
    return [whole_table(group, stores, num_hosts) for group in groups]


def embeddings_on(
    communicator: Communicator, stores: Stores, tables: Sequence[TableConfig], optimizer: Optimizer
) -> EmbeddingBagCollection:
    host = communicator.host
    return EmbeddingBagCollection(
        tables,
        optimizer=optimizer,
        store=lambda group, _: stores[host, group.index],
        communicator=communicator,
    )


def whole_table(group: Group, stores: Stores, num_hosts: int) -> np.ndarray:
    """Records of all rows, each from its home; nobody else may have written them."""
    homes = np.array([home_of(row, num_hosts) for row in range(group.num_rows)])
    whole = np.empty((group.num_rows, group.record_width), np.float32)
    for host in range(num_hosts):
        store = stores[host, group.index]
        touched = [row for rows, _ in store.snapshot() for row in rows.tolist()]
        assert (homes[touched] == host).all(), "another host's row"
        whole[homes == host] = all_records(group, store)[homes == host]
    return whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize(("num_trainers", "num_hosts"), [(2, 2), (4, 2), (8, 8)])
def test_hosts_equal_one_trainer_to_the_bit_where_sums_are_exact(
    optimizer: Optimizer, num_trainers: int, num_hosts: int
) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), optimizer, batches, [(1, 14)], lookahead=3)
    assert_equal(
        train_on_hosts(make_tables(), optimizer, batches, num_trainers, num_hosts, lookahead=3),
        expected,
    )


@pytest.mark.parametrize("extra_slots", [0, 30])
def test_caches_cut_into_shards(extra_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 14)], lookahead=3)
    monkeypatch.setattr(shards, "MIN_SLOTS", 1)
    found = train_on_hosts(
        make_tables(), SGD(lr=0.5), batches, 4, 2, extra_slots=extra_slots, lookahead=3, check=True
    )
    assert_equal(found, expected)


@given(
    st.data(),
    st.sampled_from([(2, 2), (6, 2), (4, 4)]),
    st.integers(0, 20),
    st.integers(1, 12),
    st.integers(0, 4),
)
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_any_trace(
    data: st.DataObject, layout: tuple[int, int], extra: int, lookahead: int, depth: int
) -> None:
    tables, batches = exact_trace(data)
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    expected = train(tables, optimizer, batches, [(1, len(batches))])
    options = {"extra_slots": extra, "lookahead": lookahead, "prefetch_depth": depth, "check": True}
    assert_equal(train_on_hosts(tables, optimizer, batches, *layout, **options), expected)


Pooled = dict[tuple[int, int, int], list[torch.Tensor]]  # by number of trainers, step and part


@pytest.mark.parametrize(("num_trainers", "num_hosts"), [(2, 2), (4, 2)])
def test_lookups_of_all_ranks_are_those_of_one_trainer_to_the_bit(
    num_trainers: int, num_hosts: int
) -> None:
    found: Pooled = {}

    def look(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        with trainer.stream(batches) as stream:
            for step, batch in enumerate(stream):
                pooled = trainer.embeddings(batch).groups
                found[trainer.num_trainers, step, rank_of(trainer)] = [
                    group.detach().clone() for group in pooled
                ]
                (trainer.loss(pooled) * trainer.num_trainers).backward()

    train_both(num_trainers, num_hosts, look)
    for step in range(14):
        parts = [found[num_trainers, step, rank] for rank in range(num_trainers)]
        for one, several in zip(found[1, step, 0], zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(several), one, rtol=0, atol=0)


@pytest.mark.parametrize(("num_trainers", "num_hosts"), [(2, 2), (4, 2)])
def test_an_evaluation_reads_the_rows_of_all_hosts(num_trainers: int, num_hosts: int) -> None:
    """Between two steps and after the last one; one rank has a batch less than the others."""
    found: Pooled = {}
    wanted = make_batches(7, seed=5)

    def read_all(trainer: Trainer) -> None:
        embeddings, number = trainer.embeddings.eval(), trainer.num_trainers
        for index in range(rank_of(trainer), -(-len(wanted) // number) * number, number):
            if index < len(wanted):
                found[number, embeddings.step, index] = list(embeddings(wanted[index]).groups)
            else:
                embeddings.join_reading()
        embeddings.train()

    def evaluate(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        with trainer.stream(batches) as stream:
            for step, loss in trainer.losses(stream):
                loss.backward()
                if step == 6:
                    stream.flush()
                    read_all(trainer)
        read_all(trainer)

    train_both(num_trainers, num_hosts, evaluate)
    alone = {
        (step, index): pooled for (number, step, index), pooled in found.items() if number == 1
    }
    assert {step for step, _ in alone} == {7, 14}
    assert len(alone) == 2 * len(wanted)
    for place, expected in alone.items():
        for one, other in zip(expected, found[(num_trainers, *place)], strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)


def train_both(num_trainers: int, num_hosts: int, loop: Loop) -> None:
    batches = make_batches(14)
    train(make_tables(), Adam(lr=0.05), batches, [(1, 14)], loop=loop, lookahead=3)
    train_on_hosts(
        make_tables(), Adam(lr=0.05), batches, num_trainers, num_hosts, loop=loop, lookahead=3
    )


def rank_of(trainer: Trainer) -> int:
    return trainer.embeddings.peers.rank


def saved_by(folder: Path, num_trainers: int, num_hosts: int) -> list[np.ndarray]:
    """What hosts hold that have trained ten steps and saved them."""
    run = claim_epoch(folder)
    groups = group_tables(make_tables(), Adam(lr=0.05))
    stores: Stores = {
        (host, group.index): MemoryStore(group, 11) for host in range(num_hosts) for group in groups
    }

    def work(communicator: Communicator) -> None:
        embeddings = embeddings_on(communicator, stores, make_tables(), Adam(lr=0.05))
        sizes = {"cache": [400, 150], "replicas": [400, 150]}
        plain(
            Trainer(
                embeddings=embeddings, loss=linear_loss, num_trainers=num_trainers, options=sizes
            ),
            make_batches(10),
        )
        save_checkpoint(
            run,
            state=state_of(embeddings),
            position=Position(epoch=0, batch=10),
            config=CONFIG,
            keep=2,
            trainers=Trainers(communicator),
        )

    run_ranks(num_trainers, work, num_hosts=num_hosts)
    return [whole_table(group, stores, num_hosts) for group in groups]


def state_of(embeddings: EmbeddingBagCollection) -> State:
    model = torch.nn.Linear(2, 1)
    return State(model=model, optimizer=torch.optim.SGD(model.parameters()), embeddings=embeddings)


@pytest.mark.parametrize(
    ("num_trainers", "num_hosts", "is_old"),
    [(1, 1, False), (1, 1, True), (3, 1, False), (2, 2, False), (2, 2, True), (4, 4, False)],
)
def test_a_checkpoint_of_two_hosts_is_loaded_by_any_number(
    tmp_path: Path, num_trainers: int, num_hosts: int, is_old: bool
) -> None:
    expected = saved_by(tmp_path, 4, 2)
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    names = [
        "dense.pt",
        *(f"group-{group}{host}.arrow" for group in range(2) for host in ("", ".host-1")),
        "manifest.json",
    ]
    assert sorted(file.name for file in path.iterdir()) == sorted(names)
    if is_old:
        make_format_1(path)
    saved = open_checkpoint(path)
    groups = group_tables(make_tables(), Adam(lr=0.05))
    stores: Stores = {
        (host, group.index): MemoryStore(group, 11) for host in range(num_hosts) for group in groups
    }

    def load(communicator: Communicator | None) -> None:
        trainers = Trainers(peers_of(communicator))
        embeddings = EmbeddingBagCollection(
            make_tables(),
            optimizer=Adam(lr=0.05),
            store=lambda group, _: stores[trainers.peers.host, group.index],
            communicator=communicator,
        )
        load_checkpoint(saved, state_of(embeddings), trainers)
        assert embeddings.step == 10

    if num_trainers == 1:
        load(None)
    else:
        run_ranks(num_trainers, load, num_hosts=num_hosts)
    assert_equal([whole_table(group, stores, num_hosts) for group in groups], expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_host_can_not_write_is_an_error_on_all_and_no_checkpoint(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointFiles.write_records

    def full(files: CheckpointFiles, name: str, *arguments: Any, **shard: int) -> RecordFile:
        if ("host-1" in name) == (rank == 2):
            raise CheckpointError("the disk is full")
        return original(files, name, *arguments, **shard)

    monkeypatch.setattr(CheckpointFiles, "write_records", full)
    run = claim_epoch(tmp_path)
    seen: list[str] = []

    def work(communicator: Communicator) -> None:
        groups = group_tables(make_tables(), SGD(lr=0.5))
        stores: Stores = {
            (host, group.index): MemoryStore(group, 11) for host in range(2) for group in groups
        }
        embeddings = embeddings_on(communicator, stores, make_tables(), SGD(lr=0.5))
        state, position = state_of(embeddings), Position(epoch=0, batch=0)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(
                run,
                state=state,
                position=position,
                config=CONFIG,
                keep=2,
                trainers=Trainers(communicator),
            )
        seen.append(f"{communicator.rank}: {caught.value}")
        monkeypatch.undo()
        communicator.barrier("waiting for the disk to be mended")
        save_checkpoint(
            run,
            state=state,
            position=position,
            config=CONFIG,
            keep=2,
            trainers=Trainers(communicator),
        )

    run_ranks(4, work, num_hosts=2)
    others = {f"{other}: on rank {rank}: the disk is full" for other in range(4) if other != rank}
    assert set(seen) == {f"{rank}: the disk is full"} | others
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-0000000000"]


def test_a_host_that_can_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"this host can't see it: give a log\.folder on a file system that all",
    ):
        CheckpointFiles.join(tmp_path / "elsewhere", tmp_path / "step-0000000001")


def test_tables_are_not_read_where_only_a_part_of_them_is() -> None:
    def work(communicator: Communicator) -> None:
        with EmbeddingsOf(communicator) as embeddings:
            tables = embeddings.tables()
            with pytest.raises(
                UsageError, match=r"divided among several hosts, .* call save_tables"
            ):
                tables["wide"][:3]
            with pytest.raises(UsageError, match="divided among several hosts"):
                embeddings.load_state_dict(
                    {
                        "embedding_bags.wide.weight": torch.zeros(400, 4),
                        "embedding_bags.narrow.weight": torch.zeros(50, 3),
                    }
                )

    run_ranks(2, work, num_hosts=2)


class EmbeddingsOf:
    """Embeddings with the store that ranks of one host share."""

    def __init__(self, communicator: Communicator) -> None:
        self._embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=SGD(lr=0.5), seed=11, communicator=communicator
        )

    def __enter__(self) -> EmbeddingBagCollection:
        return self._embeddings

    def __exit__(self, *exception: object) -> None:
        self._embeddings.close()


def test_each_host_shares_a_store_of_its_own() -> None:
    def work(communicator: Communicator) -> bool:
        with EmbeddingsOf(communicator) as embeddings:
            store = embeddings.stores[0]
            width, host = store.group.record_width, communicator.host
            own, other = (
                [row for row in range(400) if home_of(row, 2) == home][:40]
                for home in (host, 1 - host)
            )
            if communicator.is_first_of_host:
                store.write(np.array(own), np.repeat(np.float32(own)[:, None], width, axis=1))
            communicator.barrier("waiting for all to have written")
            assert len(touched_rows(store)) == len(own)
            out = np.empty((len(own), width), np.float32)
            store.fetch(np.array(own), out)
            assert (out == np.float32(own)[:, None]).all()
            facts = f"is of shard {1 - host} of 2, this store has shard {host}"
            with pytest.raises(StoreError, match=rf"row {other[3]} of group 0 .* {facts}"):
                store.fetch(np.array([*own[:5], other[3]]), out[:6])
            with pytest.raises(StoreError, match="is of shard"):
                store.write(np.array(other[:1]), out[:1])
            communicator.barrier("waiting for all to have read")
            return [row for rows, _ in store.snapshot() for row in rows.tolist()] == own

    assert run_ranks(4, work, num_hosts=2) == [True] * 4


@pytest.mark.parametrize(
    ("nums_hosts", "machines", "message"),
    [
        ([1, 1, 2, 2], "aabb", r"told num_hosts=1, num_hosts=2, but run, host by host, on"),
        ([1, 1, 1, 1], "aabb", r"told num_hosts=1, .* on a and b: give .*num_hosts=2\)"),
        ([2, 2, 2, 2], "aaab", r"told num_hosts=2, .* on a; a and b: give"),
    ],
)
def test_hosts_that_are_not_as_told_are_refused_on_all_ranks(
    nums_hosts: list[int], machines: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(communicator: Communicator) -> bool:
        names[threading.get_ident()] = machines[communicator.rank]
        communicator.barrier("waiting for all names")
        with pytest.raises(ConfigError, match=message):
            replace(communicator, num_hosts=nums_hosts[communicator.rank], number=7)
        return True

    names: dict[int, str] = {}
    monkeypatch.setattr(
        "bagpipe.distributed.machines._machine", lambda: names.get(threading.get_ident(), "a")
    )
    assert run_ranks(4, work) == [True] * 4


def test_tables_are_saved_by_all_hosts_together(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> None:
        with EmbeddingsOf(communicator) as embeddings:
            sizes = {"cache": [400, 150], "replicas": [400, 150]}
            plain(
                Trainer(embeddings=embeddings, loss=linear_loss, num_trainers=4, options=sizes),
                make_batches(10),
            )
            embeddings.save_tables(tmp_path / f"{communicator.rank}.safetensors")

    run_ranks(4, work, num_hosts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    expected = train(make_tables(), SGD(lr=0.5), make_batches(10), [(1, 10)])
    found = safetensors.torch.load_file(tmp_path / "0.safetensors")
    for name, group, dim in (("wide", 0, 4), ("narrow", 1, 3)):
        np.testing.assert_array_equal(
            found[f"embedding_bags.{name}.weight"].numpy(), expected[group][:, :dim]
        )


def test_a_full_disk_of_rank_0_is_told_by_all_hosts_and_holds_none_up(tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    path.write_bytes(b"older")

    def work(communicator: Communicator) -> str:
        with EmbeddingsOf(communicator) as embeddings:
            communicator.barrier("waiting for all to have their memory")
            limit = files_of_at_most(400) if communicator.rank == 0 else nullcontext()
            with limit, pytest.raises(StoreError) as caught:
                embeddings.save_tables(path)
            communicator.barrier("waiting for all to have been told")
        return str(caught.value)

    first, *others = run_ranks(4, work, num_hosts=2)
    assert f"{path}: can't be written: File too large" in first
    assert others == [f"on rank 0: {first}"] * 3
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


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
        with EmbeddingsOf(communicator) as embeddings:
            stream = bagpipe.lookahead(batches, embeddings, cache=[400, 50], replicas=[400, 50])
            for batch in itertools.islice(stream, 5):
                num_steps += 1
                (linear_loss(embeddings(batch).groups) * 2).backward()
            # the step before needs the plan of the one after, too
            with pytest.raises(
                DataError, match=r"the ids of step 6 on rank 1 are not those on rank 0"
            ):
                next(stream)
        return num_steps

    assert run_ranks(2, work, num_hosts=2) == [5, 5]


def test_a_second_flush_needs_no_other_rank_and_changes_nothing() -> None:
    num_flushes = [0, 0]

    def flush_twice_on_rank_0(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        with trainer.stream(batches) as stream:
            for step, loss in trainer.losses(stream):
                loss.backward()
                for _ in range(2 - rank_of(trainer) if step % 4 == 3 else 0):
                    stream.flush()
                    num_flushes[rank_of(trainer)] += 1

    batches = make_batches(14)
    found = train_on_hosts(
        make_tables(), SGD(lr=0.5), batches, 2, 2, loop=flush_twice_on_rank_0, lookahead=3
    )
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
        elsewhere = tmp_path / str(communicator.host)
        elsewhere.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="this host does not see what rank 0 writes there"):
            check_seen_by_all(elsewhere, trainers)

    run_ranks(4, work, num_hosts=2)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (True, PlanError, "a row is fetched whose record another host has"),
        (False, AssertionError, "another host's row"),
    ],
    ids=["checked", "unchecked"],
)
def test_a_row_that_another_host_caches_is_seen(
    check: bool, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: plans as for one host, by which any rank may own any row."""
    original = POLICIES["min"]
    monkeypatch.setitem(
        POLICIES,
        "min",
        lambda group, *, num_hosts, **options: original(group, num_hosts=1, **options),
    )
    with pytest.raises(error, match=message):
        train_on_hosts(make_tables(), SGD(lr=0.5), make_batches(14), 2, 2, lookahead=3, check=check)
