"""What a module of torch's can be told, the embeddings do or refuse; what they are given has the
shape and the type that they need, or is refused; and nobody writes to stores behind a cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.embeddings.test_collection import BATCH, TABLES
from torch import Tensor

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import ConfigError, OptimizerStateWarning, UsageError
from bagpipe.optimizers import SGD, Adagrad


@pytest.fixture
def embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.5), seed=1)


@pytest.mark.parametrize(
    "lr", [float("nan"), float("inf"), -0.1, None, "0.1", 1e39, True, [0.1]], ids=str
)
def test_what_is_no_learning_rate_is_refused(embeddings: EmbeddingBagCollection, lr: Any) -> None:
    with pytest.raises(ConfigError, match=r"SGD: lr is .*, must be a number from 0 to 1,000,000"):
        embeddings.set_learning_rate(lr)
    with pytest.raises(ConfigError, match=r"SGD: lr is .*, must be a number from 0 to 1,000,000"):
        SGD(lr=lr)
    assert embeddings.lr == 0.5


@pytest.mark.parametrize("lr", [0, 1, np.float32(0.25), np.float64(0.1), np.int64(2)], ids=repr)
def test_what_is_one_is_taken(embeddings: EmbeddingBagCollection, lr: Any) -> None:
    embeddings.set_learning_rate(lr)
    assert type(embeddings.lr) is float
    assert embeddings.lr == float(lr)


def test_a_new_learning_rate_is_that_of_every_group_cache_and_store(
    embeddings: EmbeddingBagCollection,
) -> None:
    given = embeddings.groups[0].optimizer  # the user's own
    for batch in bagpipe.lookahead([BATCH] * 2, embeddings):
        embeddings.set_learning_rate(0.125)
        embeddings(batch).values().sum().backward()
        executor = embeddings.executor
        assert executor is not None
        held = [*embeddings.groups, *(each.group for each in [*executor.caches, *executor.stores])]
        assert len(held) > 3
        assert {group.optimizer.lr for group in held} == {embeddings.lr} == {0.125}
    assert given.lr == 0.5


def test_frozen_embeddings_are_looked_up_and_not_updated(
    embeddings: EmbeddingBagCollection,
) -> None:
    before = embeddings.tables()["users"][:]
    assert embeddings.requires_grad_(False) is embeddings
    weight = torch.ones((), requires_grad=True)
    for batch in bagpipe.lookahead([BATCH] * 2, embeddings):
        pooled = embeddings(batch).values()
        assert not pooled.requires_grad
        (pooled * weight).sum().backward()
        embeddings.lookup(batch)
        with pytest.raises(UsageError, match=r"requires_grad_\(False\) has frozen"):
            embeddings.update([torch.ones(2, 2, 4), torch.ones(2, 1, 2)])
    assert torch.equal(embeddings.tables()["users"][:], before)
    embeddings.requires_grad_()
    for batch in bagpipe.lookahead([BATCH], embeddings):
        embeddings(batch).values().sum().backward()
    assert not torch.equal(embeddings.tables()["users"][:], before)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda module: module.half(), r"converted to torch.float16: .*TableConfig\(data_type="),
        (lambda module: module.bfloat16(), "converted to torch.bfloat16: .*torch.autocast"),
        (lambda module: module.double(), "converted to torch.float64"),
        (lambda module: module.to(torch.bfloat16), "converted to torch.bfloat16"),
        (lambda module: module.to("meta"), r"on cpu can't be moved to meta: make them there, Emb"),
        (lambda module: module.to_empty(device="meta"), "on cpu can't be moved to meta"),
    ],
)
@pytest.mark.parametrize("is_inner", [False, True])
def test_moves_and_conversions_are_refused(
    embeddings: EmbeddingBagCollection,
    convert: Callable[[torch.nn.Module], Any],
    message: str,
    is_inner: bool,
) -> None:
    module = torch.nn.ModuleList([embeddings]) if is_inner else embeddings
    with pytest.raises(UsageError, match=message):
        convert(module)


def test_what_changes_nothing_is_taken(embeddings: EmbeddingBagCollection) -> None:
    module = torch.nn.ModuleList([embeddings, torch.nn.Linear(2, 2)])
    module.to("cpu").cpu().float().to(torch.float32).share_memory()
    assert embeddings.eval()(BATCH).values().dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:1], r"of group 0 \(dim 4\) have the shape \(1, 2, 4\), must have "),
        (lambda tensor: tensor.flatten(1), r"have the shape \(2, 8\), must have \(2, 2, 4\)"),
        (lambda tensor: tensor.double(), "are torch.float64, must be float32 or bfloat16"),
        (lambda tensor: tensor.half(), "are torch.float16, must be float32 or bfloat16"),
        (lambda tensor: tensor.numpy(), "are a ndarray, must be a tensor"),
    ],
)
def test_wrong_tensors_are_refused_and_nothing_is_lost(
    embeddings: EmbeddingBagCollection, change: Callable[[Tensor], Any], message: str
) -> None:
    stream = bagpipe.lookahead([BATCH], embeddings)
    batch = next(stream)
    good = [torch.ones(2, 2, 4), torch.ones(2, 1, 2)]
    bad = [change(good[0]), good[1]]
    with pytest.raises(UsageError, match=f"step 0: lookup's out .*{message}"):
        embeddings.lookup(batch, out=bad)
    embeddings.lookup(batch, out=good)
    with pytest.raises(UsageError, match=f"step 0: update's gradients .*{message}"):
        embeddings.update(bad)
    embeddings.update(good)


def test_other_numbers_strides_and_types_are_refused(embeddings: EmbeddingBagCollection) -> None:
    before = embeddings.tables()["users"][:]
    stream = bagpipe.lookahead([BATCH], embeddings)
    batch = next(stream)
    strided = [torch.ones(2, 4, 2).mT, torch.ones(2, 1, 2)]
    with pytest.raises(UsageError, match=r"has the strides \(8, 1, 2\), must be contiguous"):
        embeddings.lookup(batch, out=strided)
    with pytest.raises(UsageError, match="lookup's out are 1 tensors for 2 groups"):
        embeddings.lookup(batch, out=strided[:1])
    with pytest.raises(UsageError, match=r"lookup's dtype is torch\.float16"):
        embeddings.lookup(batch, dtype=torch.float16)
    embeddings.lookup(batch)
    with pytest.raises(UsageError, match="update's gradients are 1 tensors for 2 groups"):
        embeddings.update(strided[:1])
    embeddings.update(strided)  # gradients may have any strides
    stream.close()
    assert not torch.equal(embeddings.tables()["users"][:], before)


def test_nobody_writes_to_a_table_behind_the_cache(embeddings: EmbeddingBagCollection) -> None:
    table = embeddings.tables()["users"]
    before, new = table[:], torch.zeros(20, 4)
    for _ in bagpipe.lookahead([BATCH], embeddings):
        for now in (table, embeddings.tables()["users"]):
            with pytest.raises(UsageError, match=r"table 'users': load while bagpipe\.lookahead"):
                now.load(new)
        with pytest.raises(UsageError, match=r"load_state_dict while bagpipe\.lookahead is"):
            embeddings.load_state_dict({"embedding_bags.users.weight": new}, strict=False)
    assert torch.equal(table[:], before)
    with pytest.raises(UsageError, match=r"load was given the shape \(1, 4\), the table's is \(20"):
        table.load(new[:1])
    assert torch.equal(table[:], before)
    table.load(new)
    assert torch.equal(embeddings.tables()["users"][:], new)


def test_loading_weights_tells_that_optimizer_state_is_none_of_them(
    embeddings: EmbeddingBagCollection,
) -> None:
    trained = EmbeddingBagCollection(TABLES, optimizer=Adagrad(lr=0.5), seed=1)
    state, other = trained.state_dict(), EmbeddingBagCollection(TABLES, optimizer=Adagrad(lr=0.5))
    with pytest.warns(
        OptimizerStateWarning, match=r"weights of 3 tables.*no optimizer state: that of Adagrad"
    ):
        other.load_state_dict(state)
    embeddings.load_state_dict(state)  # SGD has none
    with torch.no_grad():
        dense = torch.nn.ModuleDict({"embeddings": other, "dense": torch.nn.Linear(2, 2)})
        dense.load_state_dict({"dense.bias": torch.zeros(2)}, strict=False)  # no table


def test_who_only_looks_rows_up_does_not_import_torchs_compiler() -> None:
    code = (
        "import sys, numpy as np, bagpipe\n"
        "table = bagpipe.TableConfig(\n"
        "    name='f', num_embeddings=8, embedding_dim=2, feature_names=['f'])\n"
        "tables = bagpipe.EmbeddingBagCollection([table], optimizer=bagpipe.SGD(lr=0.5)).eval()\n"
        "tables(bagpipe.Jagged(keys=('f',), values=np.array([1, 2]), batch_size=2))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
