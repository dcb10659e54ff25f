"""Tables in a file: written whole or not at all, read back block by block, and looked at first."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.disks import files_of_at_most
from tests.embeddings.test_collection import BATCH, TABLES
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings import tables as tables_module
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import OptimizerStateWarning, StoreError, UsageError
from bagpipe.optimizers import SGD, Adagrad
from bagpipe.store import MemoryStore
from bagpipe.types import TableConfig


def make(seed: int = 1, **options: Any) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.5), seed=seed, **options)


def weights_of(embeddings: EmbeddingBagCollection) -> dict[str, torch.Tensor]:
    return {name: table[:] for name, table in embeddings.tables().items()}


def assert_same(one: EmbeddingBagCollection, other: EmbeddingBagCollection) -> None:
    found, expected = weights_of(one), weights_of(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the tables of seed 1."""
    make().save_tables(tmp_path / "tables.safetensors")
    return tmp_path / "tables.safetensors"


def test_saved_tables_are_loaded_in_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_BLOCK_ROWS", 3)
    other = make(2)
    other.load_tables(path)
    assert_same(other, make())
    loading = EmbeddingBagCollection(TABLES, optimizer=Adagrad(lr=0.5))
    with pytest.warns(OptimizerStateWarning, match=r"load_tables has .*3 tables.*bagpipe\.save"):
        loading.load_tables(str(path))


def test_what_safetensors_writes_is_loaded_and_rounded(path: Path) -> None:
    halves = [
        TableConfig(name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim,
                    feature_names=t.feature_names, data_type="bf16")
        for t in TABLES
    ]  # fmt: skip
    weights = {
        f"embedding_bags.{name}.weight": weights for name, weights in weights_of(make()).items()
    }
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    embeddings = EmbeddingBagCollection(halves, optimizer=SGD(lr=0.5))
    embeddings.load_tables(path)
    for name, table in embeddings.tables().items():
        assert torch.equal(table[:], weights[f"embedding_bags.{name}.weight"].bfloat16())


def with_header(path: Path, change: Any) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(change(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


USERS = "embedding_bags.users.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: {key: header[key] for key in header if key != USERS},
         r"other tables than these: embedding_bags.users.weight: None there and \(20, 4\) here"),
        (lambda header: header | {"more": header[USERS]}, r"more: \(20, 4\) there and None here"),
        (lambda header: header | {USERS: header[USERS] | {"dtype": "I8"}}, "KeyError.'I8'"),
        (lambda header: header | {USERS: header[USERS] | {"shape": [20, 5]}}, "of another size"),
        (lambda header: header | {USERS: header[USERS] | {"shape": [-20, -4]}}, "another size"),
        (lambda header: header | {USERS: {"dtype": "F32", "shape": [10, 4], "data_offsets":
                                  [0, 160]}}, r"\(10, 4\) there and \(20, 4\) here"),
        (lambda header: [header], "is not a safetensors file of tables"),
    ],
)  # fmt: skip
def test_another_file_is_refused_and_nothing_is_changed(
    path: Path, change: Any, message: str
) -> None:
    with_header(path, change)
    embeddings = make(2)
    with pytest.raises(StoreError, match=message) as caught:
        embeddings.load_tables(path)
    assert str(path) in str(caught.value)
    assert_same(embeddings, make(2))


def test_a_damaged_or_missing_file_is_refused(path: Path) -> None:
    embeddings, whole = make(2), path.read_bytes()
    for content, message in (
        (whole[:-1], f"has {len(whole) - 1:,} bytes, its header speaks of {len(whole):,}"),
        (b"", "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            embeddings.load_tables(path)
    with pytest.raises(StoreError, match=r"nowhere: can't be read: No such file"):
        embeddings.load_tables(path.with_name("nowhere"))
    assert_same(embeddings, make(2))


def test_tables_are_not_loaded_behind_a_stream(path: Path) -> None:
    embeddings = make(2)
    for _ in bagpipe.lookahead([BATCH], embeddings):
        with pytest.raises(UsageError, match=r"load_tables while bagpipe\.lookahead is running"):
            embeddings.load_tables(path)
    embeddings.load_tables(path)
    assert_same(embeddings, make())


def test_several_trainers_load_together(path: Path) -> None:
    def work(communicator: Communicator) -> None:
        embeddings = make(2, communicator=communicator)
        embeddings.load_tables(path)
        assert_same(embeddings, make())
        with pytest.raises(StoreError, match="nowhere: can't be read"):
            embeddings.load_tables(path.with_name("nowhere"))
        assert_same(embeddings, make())
        communicator.barrier("all to be done")

    run_ranks(2, work)


def test_saved_tables_are_a_safetensors_file(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(
            f"embedding_bags.{table.name}.weight" for table in TABLES
        )
        for name, table in weights_of(make()).items():
            assert torch.equal(file.get_tensor(f"embedding_bags.{name}.weight"), table)


def test_a_full_disk_leaves_older_tables_alone(path: Path) -> None:
    embeddings, before = make(), path.read_bytes()
    with files_of_at_most(300), pytest.raises(StoreError) as caught:
        embeddings.save_tables(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    message = str(caught.value)
    assert f"{path}: can't be written: File too large ({len(before):,} bytes are needed" in message
    assert "the file that was there is as it was. Make room" in message
    embeddings.save_tables(path)
    assert path.read_bytes() == before


def test_a_store_that_fails_is_not_taken_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("row 3 is gone")

    monkeypatch.setattr(MemoryStore, "fetch", fail)
    with pytest.raises(StoreError, match=r"^row 3 is gone$"):
        make().save_tables(tmp_path / "tables.safetensors")
    assert list(tmp_path.iterdir()) == []
