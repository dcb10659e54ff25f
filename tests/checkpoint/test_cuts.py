"""Checkpoints that shard servers and rank 0 make together, whoever wrote and whoever resumes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.cut_runs import NUM_ROWS, Records, Run, make_servers, records_in
from tests.checkpoint.older import make_format_1
from tests.checkpoint.test_checkpoints import CONFIG, make_state
from tests.train.fakes import StoredEmbeddings

from bagpipe.checkpoint.checkpoints import save_checkpoint, take_moment
from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.checkpoint.files import CheckpointWriter, list_checkpoints
from bagpipe.data.base import Position
from bagpipe.errors import CheckpointError
from bagpipe.store.manifest import describe
from bagpipe.topology import shards_of


def test_each_folder_is_complete_alone_and_has_the_records_of_its_cut(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=9)
    run.start(make_servers(3))
    expected = {}
    run.write(range(90))
    for salt in range(5):
        run.write(range(salt * 10, salt * 10 + 2))
        path = run.cut(beside=[20]).path
        expected[path] = run.saved
    assert [len(files) for files in run.base.record_files] == [3 * 5] * 2
    for path, records in expected.items():
        assert records_in(path) == records
        shutil.rmtree(path)  # the others need nothing of it


def test_a_new_start_puts_back_what_was_written_since(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(servers := make_servers(2))
    run.write(range(50))
    run.cut()
    run.write(range(40, 60))
    run.start(servers, run.saved)  # checks all records
    assert [server.base for server in servers] == ["1.1"] * 2
    run.write([3, 70])
    run.cut()
    assert records_in(run.base.path) == run.saved
    # one server is new, and loads all
    run.write([4, 71])
    run.start([servers[0], make_servers(2)[1]], run.saved)


def test_servers_that_were_not_told_of_a_commit_stand_where_it_does(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(servers := make_servers(2))
    run.write(range(50))
    with pytest.MonkeyPatch.context() as patch:
        for server in servers:
            patch.setattr(server, "committed", lambda *_: True)  # rank 0 dies before that
        run.cut(beside=range(30, 70))
    run.start(servers, run.saved)
    # and where trainers of the same epoch go on, the next cut has the rows of both
    run.write(range(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers[0], "committed", lambda *_: True)
        run.cut()
    run.write(range(3, 9))
    run.cut()
    assert records_in(run.base.path) == run.saved
    run.write([50])
    run.start(servers, run.saved)


def save_by_hosts(run: Run, records: Records, num_hosts: int) -> Path:
    """What trainers of so many hosts have written that each had a part of the tables."""
    moment = take_moment(run.state, Position(epoch=0, batch=5), CONFIG)
    with CheckpointWriter(claim_epoch(run.path), 5) as writer:
        writer.write_bytes("dense.pt", moment.dense)
        described = []
        for index, group in enumerate(run.groups):
            files = []
            for host in range(num_hosts):
                rows = np.array(sorted(records), np.int64)
                rows = rows[shards_of(rows, num_hosts) == host]
                values = np.repeat(np.float32(rows)[:, None], group.record_width, axis=1)
                name = f"group-{index}.host-{host}.arrow" if host else f"group-{index}.arrow"
                files.append(
                    writer.write_records(
                        name,
                        [(rows, values)],
                        group.record_width,
                        shard=host,
                        num_shards=num_hosts,
                    )
                )
            described.append(describe(group, files))
        writer.write_manifest({**moment.content, "step": 5, "groups": described})
    return writer.path


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("num_hosts", "num_shards"), [(2, 1), (2, 2), (2, 3), (4, 2), (8, 5), (8, 8)]
)
def test_any_number_of_servers_resumes_what_several_hosts_have_saved(
    tmp_path: Path, num_hosts: int, num_shards: int, is_old: bool
) -> None:
    run = Run(tmp_path)
    path = save_by_hosts(run, {row: () for row in range(0, 100, 3)}, num_hosts)
    if is_old:
        make_format_1(path)
    saved = records_in(path)
    assert len(saved[0]) == 34
    run.start(make_servers(num_shards), saved)
    run.write([0, 1, 2, 50, 80])
    run.cut()
    assert records_in(run.base.path) == run.saved
    # who has the very rows of a host adds to its file
    assert all(
        (len(files) > num_shards) == (num_shards == num_hosts) for files in run.base.record_files
    )


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_any_number_of_servers_resumes_what_trainers_have_saved(
    tmp_path: Path, num_shards: int, is_old: bool
) -> None:
    state = make_state(2, 4)
    assert isinstance(state.embeddings, StoredEmbeddings)
    state.embeddings.touch(*range(0, 90, 3))
    state.embeddings.step = 5
    position = Position(epoch=0, batch=5)
    run = Run(tmp_path)
    folder = claim_epoch(tmp_path)
    path = save_checkpoint(folder, state=state, position=position, config=CONFIG, keep=2)
    if is_old:
        make_format_1(path)
    run.start(make_servers(num_shards), records_in(path))
    run.write([0, 1, 2])
    run.cut()
    assert records_in(run.base.path) == run.saved
    # one server has the very rows of one trainer's file, so it adds to that one
    assert len(run.base.record_files[0]) == (2 if num_shards == 1 else num_shards)


@settings(max_examples=15, deadline=None)
@given(
    starts=st.lists(
        st.tuples(
            st.integers(1, 5),
            st.booleans(),
            st.lists(
                st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=15),
                min_size=1,
                max_size=5,
            ),
        ),
        max_size=5,
    )
)
def test_any_number_of_servers_goes_on_from_any_others(
    starts: list[tuple[int, bool, list[list[int]]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # many files
        go_on_from_each_other(Run(tmp_path_factory.mktemp("run")), starts)


def go_on_from_each_other(run: Run, starts: list[tuple[int, bool, list[list[int]]]]) -> None:
    saved: list[Records] = [{}, {}]
    for num_shards, are_new, steps in [(3, True, [list(range(80))]), *starts]:
        is_same = not are_new and len(run.servers) == num_shards
        run.start(run.servers if is_same else make_servers(num_shards), saved)
        for rows in steps:
            run.write(rows)
            run.cut(beside=rows[:3])
            saved = run.saved
        assert records_in(run.base.path) == saved
        run.write([1, 2])  # is lost
    shards = {file.num_shards for files in run.base.record_files for file in files}
    assert shards == {len(run.servers)}
    assert len(list_checkpoints(run.checkpoints)) <= 2


def test_a_full_disk_on_one_server_leaves_the_rows_to_the_next_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.start(make_servers(3))
    run.write(range(60))
    run.cut()
    run.write(range(50, 70))
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the second group of the second server
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        run.cut(beside=range(3))
    monkeypatch.undo()
    for fact in (
        "epochs/1/cuts/2/group-1.shard-1-of-3.cut-1.2.arrow: the records of group 1 (dim 4), shard "
        "1 of 3, can't be written: No space left on device",
        "The run goes on, and the next checkpoint has these rows. Make room",
    ):
        assert fact in str(caught.value)
    assert list(run.folder.cuts.iterdir()) == []
    assert len(list_checkpoints(run.checkpoints)) == 1
    run.check()
    run.cut()
    assert records_in(run.base.path) == run.saved
    run.write([9])
    run.start(run.servers, run.saved)


def test_a_zombie_can_put_no_cut_in_place(tmp_path: Path) -> None:
    old = Run(tmp_path)
    old.start(make_servers(2))
    old.write(range(20))
    old.cut()
    new = Run(tmp_path)
    message = "can't be written, since a newer start of the run has taken it over: end this one"
    with pytest.raises(CheckpointError, match=message):
        with CheckpointWriter(old.folder, 20, "7"):
            new.start(make_servers(2), old.saved)
    with pytest.raises(CheckpointError, match=message):
        old.cut()
    new.write(range(5))
    new.cut()
    assert records_in(new.base.path) == new.saved


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"shard 1 of 2 has written it, but it can't be seen here"),
        (lambda path: path.write_bytes(b"x"), r"has 1 bytes here, the server of shard 1 of 2"),
    ],
)
def test_a_server_that_writes_to_another_disk_is_found_before_the_commit(
    tmp_path: Path, damage: object, message: str
) -> None:
    run = Run(tmp_path)
    run.start(make_servers(2))
    run.write(range(20))
    cut = run.servers[1].cut

    def elsewhere(epoch: int, number: int) -> object:
        write = cut(epoch, number)

        def write_and_lose(folder: Path) -> object:
            files = write(folder)
            damage(folder / files[0].name)  # type: ignore[operator]
            return files

        return write_and_lose

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.servers[1], "cut", elsewhere)
        with pytest.raises(CheckpointError, match=message):
            run.cut()
    assert list_checkpoints(run.checkpoints) == []
    run.cut()
    assert records_in(run.base.path) == run.saved


def test_a_server_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(make_servers(1))
    run.write(range(20))
    write = run.servers[0].cut(1, 1)
    message = (
        r"nowhere/group-0.*shard 0 of 1, can't be written: No such file .* folder is there, and"
    )
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "nowhere")


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(make_servers(2))
    run.write(range(20))
    path = run.cut().path
    (path / "dense.pt").write_bytes(b"")
    fresh = Run(tmp_path / "other")
    fresh.checkpoints.mkdir(parents=True)
    shutil.move(path, fresh.checkpoints / path.name)
    fresh.folder, fresh.servers = claim_epoch(fresh.path), make_servers(2)
    for server in fresh.servers:
        server.begin(fresh.folder.epoch, 1)
    fresh.write(range(30))
    assert fresh.cut().path.name == path.name
    assert records_in(fresh.base.path) == fresh.saved
    assert list(fresh.folder.cuts.iterdir()) == []
