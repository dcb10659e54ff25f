"""What a checkpoint holds: all that training changes, and nothing of another run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.older import make_format_1
from tests.store_contract import fetch, rows_of
from tests.train.fakes import StoredEmbeddings

from bagpipe.checkpoint.checkpoints import (
    State,
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import CheckpointWriter
from bagpipe.data.base import Position
from bagpipe.errors import CheckpointError
from bagpipe.store.manifest import checksum_of, describe, read_manifest, verify_files
from bagpipe.store.record_files import new_file, next_files, write_records

CONFIG: dict[str, Any] = {"train": {"batch_size": 8, "seed": 0}, "cache": {"size": "auto"}}


def make_state(*dims: int, hidden: int = 4, num_embeddings: int = 100) -> State:
    model = torch.nn.Linear(3, hidden)
    optimizer = torch.optim.Adam(model.parameters())
    return State(
        model=model,
        optimizer=optimizer,
        embeddings=StoredEmbeddings(*dims, num_embeddings=num_embeddings),
    )


def trained_state(step: int = 3) -> State:
    state = make_state(2, 4)
    assert isinstance(state.embeddings, StoredEmbeddings)
    for _ in range(step):
        state.optimizer.zero_grad()
        state.model(torch.randn(5, 3)).sum().backward()
        state.optimizer.step()
    state.embeddings.touch(5, 1, 99)
    state.embeddings.step, state.embeddings.num_skipped = step, [0, 2]
    return state


def save(folder: Path, state: State, *, keep: int = 2, config: dict[str, Any] = CONFIG) -> Path:
    return save_in(claim_epoch(folder), state, keep=keep, config=config)


def save_in(
    run: RunFolder, state: State, *, keep: int = 2, config: dict[str, Any] = CONFIG
) -> Path:
    return save_checkpoint(
        run, state=state, position=Position(epoch=1, batch=2), config=config, keep=keep
    )


def test_all_that_training_changes_comes_back(tmp_path: Path) -> None:
    state = trained_state()
    saved = open_checkpoint(save(tmp_path, state))
    expected_noise = torch.rand(3)
    fresh = make_state(2, 4)
    assert isinstance(fresh.embeddings, StoredEmbeddings)
    fresh.embeddings.touch(7)  # what the stores held before is forgotten
    load_checkpoint(saved, fresh)

    assert (saved.step, saved.position, fresh.embeddings.step) == (3, Position(epoch=1, batch=2), 3)
    assert fresh.embeddings.num_skipped == [0, 2]
    torch.testing.assert_close(fresh.model.state_dict(), state.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        fresh.optimizer.state_dict(), state.optimizer.state_dict(), rtol=0, atol=0
    )
    assert torch.equal(torch.rand(3), expected_noise)
    for store, original in zip(fresh.embeddings.stores, state.embeddings.stores, strict=True):
        np.testing.assert_equal(list(store.snapshot()), list(original.snapshot()))


def test_a_checkpoint_that_does_not_count_skipped_steps_has_none(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, trained_state()))
    manifest = read_manifest(saved.path)
    del manifest["num_skipped"]
    content = {key: value for key, value in manifest.items() if key not in ("format", "files")}
    with CheckpointWriter(claim_epoch(tmp_path / "older"), saved.step) as writer:
        for entry in manifest["files"]:
            writer.write_bytes(entry["name"], memoryview((saved.path / entry["name"]).read_bytes()))
        writer.write_manifest(content)
    fresh = make_state(2, 4)
    fresh.embeddings.num_skipped = [4, 4]
    load_checkpoint(open_checkpoint(writer.path), fresh)
    assert fresh.embeddings.num_skipped == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, "KeyError: 'group-0.arrow'"),
        ({"format": 1, "num_hosts": 10**12}, "not those of 2 groups on 1000000000000 hosts"),
        ({"format": 1, "num_hosts": None}, "TypeError"),
        ({"position": {"time": 1}}, "TypeError.*time"),
        ({"position": 3}, "TypeError"),
        ({"groups": 3}, "TypeError"),
        ({"files": [{"name": "dense.pt", "size_bytes": "big"}]}, "ValueError.*big"),
        ({"files": [3]}, "TypeError"),
    ],
)
def test_a_manifest_that_somebody_else_has_written_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Its checksum of itself is right: anybody can make one."""
    path = save(tmp_path, trained_state())
    manifest = read_manifest(path) | change
    manifest["xxh3_128"] = checksum_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{path}: its manifest is not one.*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": 1}, "group-0.arrow is of shard 1 of 1"),
        ({"name": "group-1.arrow"}, "it names a file twice"),
        (
            {"name": "dense.pt"},
            r"it lists the files \[.*\], which are not its groups' and dense.pt",
        ),
        ({"name": "../group-0.arrow"}, "KeyError"),
        ({"shard": "0"}, "TypeError"),
        ({"host": 0}, "TypeError.*host"),
    ],
)
def test_a_record_file_that_can_not_be_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = save(tmp_path, trained_state())
    manifest = read_manifest(path)
    manifest["groups"][0]["files"][0] |= change
    manifest["xxh3_128"] = checksum_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{path}: its manifest is not one.*{message}"):
        open_checkpoint(path)


def test_a_checkpoint_of_format_1_comes_back(tmp_path: Path) -> None:
    state = trained_state()
    path = save(tmp_path, state)
    make_format_1(path)
    fresh = make_state(2, 4)
    load_checkpoint(open_checkpoint(path), fresh)
    for store, original in zip(fresh.embeddings.stores, state.embeddings.stores, strict=True):
        np.testing.assert_equal(list(store.snapshot()), list(original.snapshot()))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_file_with_fewer_records_than_the_manifest_says_is_refused(
    tmp_path: Path, is_old: bool
) -> None:
    path = save(tmp_path, trained_state())
    if is_old:
        make_format_1(path)
    manifest = read_manifest(path)
    entry = manifest["groups"][0] if is_old else manifest["groups"][0]["files"][0]
    entry["num_records"] += 1
    manifest["xxh3_128"] = checksum_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    message = r"group-0.arrow: is damaged: has 3 records, the manifest says 4"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(open_checkpoint(path), make_state(2, 4))


def test_a_folder_with_links_to_an_older_ones_files_is_complete_alone(tmp_path: Path) -> None:
    """As rank 0 makes it of what shard servers wrote: all rows, then those written since."""
    state = trained_state()
    old = open_checkpoint(save(tmp_path, state))
    group = state.embeddings.groups[0]
    with CheckpointWriter(claim_epoch(tmp_path), 4) as writer:
        writer.write_bytes("dense.pt", (old.path / "dense.pt").read_bytes())
        with new_file(writer.folder / "group-0.4.arrow") as file:
            rows, records = np.array([1, 50]), np.full((2, group.record_width), 7, np.float32)
            write_records(file, [(rows, records)], group.record_width)
        further = dataclasses.replace(
            old.record_files[0][0],
            name="group-0.4.arrow",
            size_bytes=file.size,
            xxh3_128=file.hash.hexdigest(),
            num_records=2,
            is_whole=False,
        )
        for of_group in old.record_files:
            writer.link(old.path, of_group[0])
        writer.add(further)
        manifest = read_manifest(old.path)
        by_group = [next_files(old.record_files[0], [further]), old.record_files[1]]
        described = zip(state.embeddings.groups, by_group, strict=True)
        writer.write_manifest(manifest | {"groups": [describe(*each) for each in described]})
    linked = [path / "group-0.arrow" for path in (old.path, writer.path)]
    assert os.path.samefile(*linked)
    shutil.rmtree(old.path)
    fresh = make_state(2, 4)
    load_checkpoint(open_checkpoint(writer.path), fresh)
    expected = dict(
        zip([5, 1, 99], fetch(state.embeddings.stores[0], rows_of(5, 1, 99)), strict=True)
    )
    expected |= {1: records[0], 50: records[1]}
    ((found_rows, found),) = fresh.embeddings.stores[0].snapshot()
    assert found_rows.tolist() == sorted(expected)
    np.testing.assert_array_equal(found, [expected[row] for row in found_rows.tolist()])


def test_where_links_are_not_known_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_checkpoint(save(tmp_path, trained_state()))

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with CheckpointWriter(claim_epoch(tmp_path), 4) as writer:
        writer.link(old.path, old.record_files[0][0])
    verify_files(writer.path, read_manifest(writer.path)["files"])
    assert not os.path.samefile(old.path / "group-0.arrow", writer.path / "group-0.arrow")


def test_a_linked_file_that_is_gone_is_named(tmp_path: Path) -> None:
    old = open_checkpoint(save(tmp_path, trained_state()))
    gone = old.path / "group-0.arrow"
    gone.unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"step-0000000004: can't be written, since {gone}, which it shares .* is gone; the",
    ):
        with CheckpointWriter(claim_epoch(tmp_path), 4) as writer:
            writer.link(old.path, old.record_files[0][0])


def test_the_cache_is_flushed_first(tmp_path: Path) -> None:
    state = trained_state()
    save(tmp_path, state)
    assert isinstance(state.embeddings, StoredEmbeddings)
    assert state.embeddings.num_flushes == 1


def test_the_newest_valid_checkpoint_is_found_and_damage_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, trained_state(step), keep=3)
    (tmp_path / "checkpoints" / "step-0000000003" / "dense.pt").write_bytes(b"")
    told: list[str] = []
    saved = find_checkpoint(
        tmp_path / "checkpoints", on_damaged=lambda error: told.append(str(error))
    )
    assert saved is not None
    assert saved.step == 2
    assert len(told) == 1
    assert "step-0000000003/dense.pt: is damaged: has 0 bytes" in told[0]


def test_without_a_valid_one_among_them_nothing_is_resumed(tmp_path: Path) -> None:
    (save(tmp_path, trained_state()) / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"none of its 1 checkpoints is valid; the newest: .*manifest.json"
    ):
        find_checkpoint(tmp_path / "checkpoints", on_damaged=lambda error: None)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "checkpoints", on_damaged=lambda error: None) is None


def test_other_tables_are_refused(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, trained_state()))
    with pytest.raises(CheckpointError, match="other tables than this run has"):
        load_checkpoint(saved, make_state(2, 4, num_embeddings=101))


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, trained_state()))
    with pytest.raises(CheckpointError, match=r"dense.pt: holds another model"):
        load_checkpoint(saved, make_state(2, 4, hidden=5))


def test_a_configuration_that_changes_the_numbers_is_refused_key_by_key(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, trained_state()))
    config = {"train": {"batch_size": 9, "seed": 1}, "cache": {"size": 50}}
    with pytest.raises(CheckpointError) as caught:
        check_resumable(saved, config)
    message = str(caught.value)
    assert "train.batch_size: 8 -> 9\n" in message
    assert "train.seed: 0 -> 1\n" in message
    assert "cache.size: 'auto' -> 50 (this one would not matter)" in message


def test_a_configuration_that_does_not_is_told(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, trained_state()))
    (difference,) = check_resumable(saved, CONFIG | {"cache": {"size": 50}})
    assert str(difference) == "cache.size: 'auto' -> 50"
