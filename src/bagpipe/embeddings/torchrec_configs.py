"""TorchRec's `EmbeddingBagConfig` as a `TableConfig`; TorchRec need not be installed.

A config is known by its fields
(https://docs.pytorch.org/torchrec/modules-api-reference.html). What Bagpipe can't do it refuses,
lest a table silently becomes another one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.nn import init

from bagpipe.errors import ConfigError
from bagpipe.types import Initializer, Normal, TableConfig, Uniform

_FIELDS = ("name", "num_embeddings", "embedding_dim", "feature_names")
_UNSUPPORTED = (
    ("num_embeddings_post_pruning", None),
    ("need_pos", False),
    ("input_dim", None),
    ("total_num_buckets", None),
    ("use_virtual_table", False),
    ("virtual_table_eviction_policy", None),
)
"""Fields that change what a table is, and the value of each that changes nothing."""


def as_table(config: Any) -> TableConfig:
    """Makes a `TableConfig` of one, or of anything with the fields of an `EmbeddingBagConfig`.

    Raises:
        ConfigError: it is something else, or asks for what Bagpipe has not.
    """
    if isinstance(config, TableConfig):
        return config
    missing = [name for name in _FIELDS if not hasattr(config, name)]
    if missing:
        raise ConfigError(
            "a table must be a bagpipe.TableConfig or TorchRec's EmbeddingBagConfig, is a "
            f"{type(config).__name__}, which has no field {missing[0]}"
        )
    what = f"table {config.name!r}"
    if not hasattr(config, "pooling"):
        raise ConfigError(
            f"{what}: a {type(config).__name__} has no pooling: give an EmbeddingBagConfig, since "
            "only pooled lookups are supported"
        )
    for name, default in _UNSUPPORTED:
        if (value := getattr(config, name, default)) != default:
            raise ConfigError(f"{what}: {name}={value!r} is not supported: leave it {default!r}")
    return TableConfig(
        name=config.name,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=config.feature_names,
        pooling=_word(config.pooling),
        data_type=_word(getattr(config, "data_type", "fp32")),
        init=_initializer(what, config),
    )


def _word(member: Any) -> Any:
    """TorchRec's enumerations have the same words as Bagpipe, in capitals."""
    value = getattr(member, "value", member)
    return value.lower() if isinstance(value, str) else value


def _initializer(what: str, config: Any) -> Initializer | None:
    """`init_fn`, which TorchRec sets to a uniform one where the user gives none.

    Rows get their first values one by one, when they are first used, so it must be a distribution
    that is known here.
    """
    init_fn = getattr(config, "init_fn", None)
    low, high = getattr(config, "weight_init_min", None), getattr(config, "weight_init_max", None)
    if init_fn is None:
        if low is None and high is None:
            return None
        if low is None or high is None:
            raise ConfigError(f"{what}: give weight_init_min and weight_init_max, or neither")
        return Uniform(low=low, high=high)
    is_partial = isinstance(init_fn, partial) and not init_fn.args
    function, given = (init_fn.func, init_fn.keywords) if is_partial else (init_fn, {})
    if function is init.uniform_ and given.keys() <= {"a", "b"}:
        return Uniform(low=given.get("a", 0.0), high=given.get("b", 1.0))
    if function is init.normal_ and given.keys() <= {"mean", "std"}:
        return Normal(mean=given.get("mean", 0.0), std=given.get("std", 1.0))
    raise ConfigError(
        f"{what}: init_fn is {init_fn!r}, which can't be called for single rows: give "
        "functools.partial of torch.nn.init.uniform_ (a, b) or normal_ (mean, std), or a "
        "bagpipe.TableConfig with init="
    )
