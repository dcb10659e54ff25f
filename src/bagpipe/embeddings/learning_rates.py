"""The learning rates of tables, of which all of a group have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bagpipe.errors import ConfigError, UsageError
from bagpipe.types import Group


def common_rate(groups: Sequence[Group]) -> float:
    """The rate of all tables.

    Raises:
        UsageError: they have several.
    """
    rates = {group.optimizer.lr for group in groups}
    if len(rates) > 1:
        each = ", ".join(f"{group.optimizer.lr:g} of {_names(group)}" for group in groups)
        raise UsageError(
            f"the tables have several learning rates ({each}): ask each of `embeddings.groups` for "
            "its optimizer.lr"
        )
    return rates.pop()


def new_rates(
    groups: Sequence[Group], lr: float | Mapping[str, float]
) -> list[tuple[Group, float]]:
    """Which groups get which rate; all are checked before one is set.

    Raises:
        ConfigError: see `EmbeddingBagCollection.set_learning_rate`.
    """
    changes = (
        [(group, rate) for group in groups for rate in _asked_for(group, lr)]
        if isinstance(lr, Mapping)
        else [(group, lr) for group in groups]
    )
    known = {table.name for group in groups for table in group.tables}
    if isinstance(lr, Mapping) and (strangers := [name for name in lr if name not in known]):
        raise ConfigError(
            f"a learning rate is given for table {strangers[0]!r}; the tables are "
            f"{', '.join(sorted(known))}"
        )
    for group, rate in changes:
        replace(group.optimizer, lr=rate)  # which checks it
    return changes


def _asked_for(group: Group, rates: Mapping[str, float]) -> list[float]:
    """The rate of the group's tables; none where it is not to change."""
    given = [rates[table.name] for table in group.tables if table.name in rates]
    if given and (len(given) < len(group.tables) or any(rate != given[0] for rate in given)):
        raise ConfigError(
            f"the tables {_names(group)} have one optimizer and so one learning rate, but were "
            "given none or another for some: give all the same, or give them optimizers of their "
            "own when you make the embeddings"
        )
    return given[:1]


def _names(group: Group) -> str:
    return ", ".join(table.name for table in group.tables)
