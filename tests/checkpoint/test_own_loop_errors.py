"""`bagpipe.save` and `bagpipe.restore`: what is refused, and that nothing is lost then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.own_loop import BATCHES, TABLES, Loop, assert_equal, save_at
from tests.disks import files_of_at_most
from tests.store_contract import touched_rows

import bagpipe
from bagpipe.errors import CheckpointError, ConfigError, StoreError, UsageError
from bagpipe.optimizers import SGD, Adam
from bagpipe.store import MemoryStore
from bagpipe.store.manifest import checksum_of
from bagpipe.types import TableConfig


@pytest.fixture(scope="module")
def undisturbed() -> Loop:
    loop = Loop()
    loop.train(BATCHES)
    return loop


def changed(path: Path, **change: Any) -> None:
    """Changes a manifest as somebody who knows its checksum."""
    manifest = json.loads((path / "manifest.json").read_text()) | change
    manifest.pop("xxh3_128")
    manifest["xxh3_128"] = checksum_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def other_tables(**change: Any) -> bagpipe.EmbeddingBagCollection:
    first = {"name": "a", "num_embeddings": 300, "embedding_dim": 4, "feature_names": ["f"]}
    optimizer = change.pop("optimizer", Adam(lr=0.05))
    tables = [TableConfig(**{**first, **change}), TABLES[1]]
    return bagpipe.EmbeddingBagCollection(tables, optimizer=optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embeddings": 301}, "holds other tables than"),
        ({"embedding_dim": 8}, "holds other tables than"),
        ({"data_type": "bf16"}, "holds other tables than"),
        ({"optimizer": SGD(lr=0.1)}, "holds other tables than"),
        ({"optimizer": Adam(lr=0.1, eps=1e-3)}, r"group 0 \(dim 4\): optimizer is .*1e-08.*0.001"),
        ({"init": bagpipe.Normal(std=0.1)}, "table 'a': init is .*Uniform.* there and .*Normal"),
    ],
)
def test_other_tables_are_refused_and_left_alone(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    loop = Loop()
    loop.train(BATCHES[:2])
    loop.save(tmp_path)
    embeddings = other_tables(**change)
    with pytest.raises(CheckpointError, match=message) as caught:
        bagpipe.restore(tmp_path, embeddings, model=loop.model, optimizer=loop.optimizers)
    assert str(tmp_path) in str(caught.value)
    assert touched_rows(embeddings.stores[0]) == []
    assert embeddings.step == 0


def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(BATCHES[:2])
    loop.save(tmp_path)
    other = Loop(seed=1)
    before = [part.clone() for part in other.state()]

    def refused(message: str, **parts: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            bagpipe.restore(tmp_path, **{**others, **parts})
        assert all(map(torch.equal, other.state(), before))

    others: dict[str, Any] = {"embeddings": other.embeddings, **other.parts}
    refused("the seed 0, these embeddings have 1: rows that no batch has touched would differ")
    others["embeddings"] = Loop().embeddings
    refused(r"holds another model: .*'hidden.bias', 'hidden.weight'", model=torch.nn.Linear(2, 2))
    for last, message in (
        (torch.nn.Linear(5, 1), r"last.weight is .*shape \(1, 4\) there and .*\(1, 5\) here"),
        (torch.nn.Linear(4, 1).half(), "last.weight is torch.float32 .*there and torch.float16"),
    ):
        refused(message, model=torch.nn.ModuleDict({**other.model, "last": last}))
    refused(
        r"other dense optimizers: .*\[\[2\], \[2\]\] .* \[\[2\]\]", optimizer=loop.optimizers[0]
    )
    refused(r"no state of \['scaler'\], only of \['schedule'\]", stateful={"scaler": loop.schedule})
    with pytest.raises(UsageError, match="embeddings are a ModuleDict, must be a"):
        bagpipe.restore(tmp_path, other.model)  # type: ignore[arg-type]
    stream = bagpipe.lookahead(BATCHES, others["embeddings"])
    with pytest.raises(UsageError, match=r"restore while bagpipe.lookahead is running"):
        bagpipe.restore(tmp_path, **others)
    stream.close()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    loop = Loop()
    for folder, message in (
        (tmp_path / "nothing", "holds no checkpoint, there is no such folder: give a folder that"),
        (tmp_path, "holds no checkpoint: give a folder that was saved to, or missing_ok=True"),
    ):
        with pytest.raises(CheckpointError, match=message):
            loop.restore(folder)
        assert bagpipe.restore(folder, loop.embeddings, missing_ok=True) is None


def test_damage_is_found_and_an_older_checkpoint_taken(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(BATCHES[:4], save_at(loop, tmp_path, 2, 4))
    older, newer = sorted((tmp_path / "checkpoints").iterdir())
    records = newer / "group-0.arrow"
    records.write_bytes(records.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"skipped a checkpoint.*group-0.arrow: is damaged"):
        assert Loop().restore(tmp_path).path == older
    with pytest.raises(CheckpointError, match=r"group-0.arrow: is damaged"):
        Loop().restore(newer)
    (newer / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="this is not a complete checkpoint"):
        Loop().restore(newer)
    changed(older, format=3)
    with pytest.raises(CheckpointError, match="has format 3, this version reads formats 1 and 2"):
        Loop().restore(older)


def test_two_runs_do_not_mix_in_a_folder(tmp_path: Path) -> None:
    first, second = Loop(), Loop()
    first.train(BATCHES[:4], save_at(first, tmp_path, 2, 4))
    second.train(BATCHES[:3])
    with pytest.raises(ConfigError, match=r"another run, up to step 4, which .* overwrite=True"):
        second.save(tmp_path)
    older = Loop()
    older.restore(tmp_path / "checkpoints" / "step-0000000002")
    with pytest.raises(ConfigError, match="another run, up to step 4"):
        older.save(tmp_path)
    saved = second.save(tmp_path, overwrite=True)
    assert list((tmp_path / "checkpoints").iterdir()) == [saved]
    first.train(BATCHES[4:6])
    with pytest.raises(CheckpointError, match="a newer start of the run has taken it over"):
        first.save(tmp_path)
    shutil.rmtree(tmp_path)
    assert second.save(tmp_path) == saved  # a folder that was removed is made again


def test_a_full_disk_leaves_older_checkpoints_and_training_goes_on(
    tmp_path: Path, undisturbed: Loop
) -> None:
    loop = Loop()

    def between(step: int) -> None:
        if step == 3:
            loop.save(tmp_path)
        elif step == 5:
            with files_of_at_most(2000), pytest.raises(CheckpointError, match="File too large"):
                loop.save(tmp_path)

    loop.train(BATCHES, between)
    assert_equal(loop, undisturbed)
    assert Loop().restore(tmp_path).step == 3
    assert list((tmp_path / "epochs" / "1" / "cuts").iterdir()) == []


def test_tables_that_were_half_restored_refuse_all_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    loop.train(BATCHES[:2])
    loop.save(tmp_path)
    resumed = Loop()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "write", raising)
        with pytest.raises(StoreError, match="the disk is full"):
            resumed.restore(tmp_path)
    with pytest.raises(UsageError, match=r"rows were lost.*the disk is full"):
        resumed.train(BATCHES[:1])
    assert resumed.restore(tmp_path).step == 2
    assert_equal(resumed, loop)


def raising(*_: object) -> None:
    raise StoreError("the disk is full")


def test_what_torch_does_not_read_back_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(UsageError, match=r"extra\['path'\] can't be saved: torch.load"):
        loop.save(tmp_path, extra={"ok": np.arange(3), "path": tmp_path})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="keep is 0, must be at least 1"):
        loop.save(tmp_path, keep=0)
    loop.save(tmp_path, extra={"array": np.arange(3), "number": np.float64(0.5)})
    assert loop.restore(tmp_path).extra["array"].tolist() == [0, 1, 2]
