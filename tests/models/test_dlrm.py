"""DLRM over embeddings held in plain torch modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bagpipe.errors import ConfigError
from bagpipe.models import DLRM
from bagpipe.types import SGD, Group, Jagged, TableConfig, group_tables


class Pooled:
    def __init__(self, keys: list[str], values: list[Tensor]) -> None:
        self._keys, self._values = keys, values

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return torch.cat(self._values, dim=1)

    def __getitem__(self, key: str) -> Tensor:
        return self._values[self._keys.index(key)]


class InMemoryEmbeddings(nn.Module):
    """One id a feature, one `nn.Embedding` a table."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        super().__init__()
        self.groups = groups
        self.bags = nn.ModuleDict({t.name: nn.Embedding(t.num_embeddings, t.embedding_dim) for g in groups for t in g.tables})

    def forward(self, sparse: Jagged) -> Pooled:
        ids = torch.as_tensor(sparse.values).view(len(sparse.keys), sparse.batch_size)
        return Pooled(list(sparse.keys), [self.bags[key](ids[i]) for i, key in enumerate(sparse.keys)])


def groups_of(*dims: int) -> tuple[Group, ...]:
    tables = [
        TableConfig(name=f"C{i}", num_embeddings=10 + i, embedding_dim=dim, feature_names=[f"C{i}"]) for i, dim in enumerate(dims)
    ]
    return group_tables(tables, SGD(lr=0.1))


def make_sparse(num_features: int, batch_size: int) -> Jagged:
    values = torch.randint(0, 10, (num_features * batch_size,)).numpy()
    return Jagged(keys=tuple(f"C{i}" for i in range(num_features)), values=values, batch_size=batch_size)


def test_logits_are_those_of_the_formula() -> None:
    model = DLRM(InMemoryEmbeddings(groups_of(4, 4)), 3, bottom=[8, 4], top=[6, 1])
    dense, sparse = torch.randn(5, 3), make_sparse(2, 5)
    logits = model(dense, sparse)
    assert logits.shape == (5,)

    pooled, bottom = model.embeddings(sparse), model.dense_arch(dense)
    first, second = pooled["C0"], pooled["C1"]
    dots = [(first * bottom).sum(1), (second * bottom).sum(1), (second * first).sum(1)]
    expected = model.over_arch(torch.cat([bottom, torch.stack(dots, dim=1)], dim=1)).squeeze(1)
    torch.testing.assert_close(logits, expected)


def test_gradients_reach_every_parameter() -> None:
    model = DLRM(InMemoryEmbeddings(groups_of(4, 4)), 3, bottom=[8, 4], top=[6, 1])
    model(torch.randn(50, 3), make_sparse(2, 50)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_table_of_another_dimension_is_refused_with_its_name_and_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"bottom=\[..., 4\].*'C1' has embedding_dim 8"):
        DLRM(InMemoryEmbeddings(groups_of(4, 8)), 3, bottom=[4], top=[1])


def test_a_last_layer_that_is_no_logit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"top=\[6, 2\].*must be 1"):
        DLRM(InMemoryEmbeddings(groups_of(4)), 3, bottom=[4], top=[6, 2])


def test_names_follow_torchrec() -> None:
    model = DLRM(InMemoryEmbeddings(groups_of(4)), 3, bottom=[4], top=[1])
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"embeddings", "dense_arch", "over_arch"}
