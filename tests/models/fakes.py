"""Tables held in plain torch modules, behind the interface that models read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bagpipe.optimizers import SGD
from bagpipe.types import Group, Jagged, TableConfig, group_tables


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
        self.bags = nn.ModuleDict(
            {
                t.name: nn.Embedding(t.num_embeddings, t.embedding_dim)
                for g in groups
                for t in g.tables
            }
        )

    def forward(self, sparse: Jagged) -> Pooled:
        ids = torch.as_tensor(sparse.values).view(len(sparse.keys), sparse.batch_size)
        return Pooled(
            list(sparse.keys), [self.bags[key](ids[i]) for i, key in enumerate(sparse.keys)]
        )


def embeddings_of(*dims: int) -> InMemoryEmbeddings:
    """A table `C<i>` and a feature of the same name for each dimension."""
    tables = [
        TableConfig(name=f"C{i}", num_embeddings=10 + i, embedding_dim=dim, feature_names=[f"C{i}"])
        for i, dim in enumerate(dims)
    ]
    return InMemoryEmbeddings(group_tables(tables, SGD(lr=0.1)))


def make_sparse(num_features: int, batch_size: int) -> Jagged:
    values = torch.randint(0, 10, (num_features * batch_size,)).numpy()
    return Jagged(
        keys=tuple(f"C{i}" for i in range(num_features)), values=values, batch_size=batch_size
    )
