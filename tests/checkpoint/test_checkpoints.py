"""What a checkpoint holds: all that training changes, and nothing of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.fakes import StoredEmbeddings

from bagpipe.checkpoint.checkpoints import (
    State,
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from bagpipe.checkpoint.files import CheckpointWriter, _checksum, read_manifest
from bagpipe.data.base import Position
from bagpipe.errors import CheckpointError

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
    return save_checkpoint(
        folder, state=state, position=Position(epoch=1, batch=2), config=config, keep=keep
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
    with CheckpointWriter(tmp_path / "older", saved.step) as writer:
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
        ({"files": []}, r"lists the files \[\], which are not those of 2 groups on 1 hosts"),
        ({"num_hosts": 10**12}, "not those of 2 groups on 1000000000000 hosts"),
        ({"num_hosts": None}, "TypeError"),
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
    manifest["xxh3_128"] = _checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{path}: its manifest is not one.*{message}"):
        open_checkpoint(path)


def test_the_cache_is_flushed_first(tmp_path: Path) -> None:
    state = trained_state()
    save(tmp_path, state)
    assert isinstance(state.embeddings, StoredEmbeddings)
    assert state.embeddings.num_flushes == 1


def test_the_newest_valid_checkpoint_is_found_and_damage_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, trained_state(step), keep=3)
    (tmp_path / "step-0000000003" / "dense.pt").write_bytes(b"")
    told: list[str] = []
    saved = find_checkpoint(tmp_path, on_damaged=lambda error: told.append(str(error)))
    assert saved is not None
    assert saved.step == 2
    assert len(told) == 1
    assert "step-0000000003/dense.pt: is damaged: has 0 bytes" in told[0]


def test_without_a_valid_one_among_them_nothing_is_resumed(tmp_path: Path) -> None:
    (save(tmp_path, trained_state()) / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"none of its 1 checkpoints is valid; the newest: .*manifest.json"
    ):
        find_checkpoint(tmp_path, on_damaged=lambda error: None)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, on_damaged=lambda error: None) is None


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
