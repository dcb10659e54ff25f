"""A model class of the user's own, that a configuration names."""

from __future__ import annotations

import difflib
import importlib
import inspect

from torch import nn

from bagpipe.config.model import OwnModelConfig
from bagpipe.errors import ConfigError
from bagpipe.models import RankingModel


def make_own_model(config: OwnModelConfig, embeddings: nn.Module, num_dense: int) -> RankingModel:
    """Imports the class that `config.kind` names, and calls it.

    Raises:
        ConfigError: it can't be imported, is no `RankingModel`, or takes other arguments.
    """
    what = f"model.kind = {config.kind!r}"
    module_name, _, name = config.kind.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{what}: {module_name} can't be imported: {error}: install it, or name its folder in "
            "PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, RankingModel)):
        near = difflib.get_close_matches(name, dir(module), n=1)
        raise ConfigError(
            f"{what}: {module_name} has no subclass of bagpipe.models.RankingModel of the name "
            f"{name!r}" + (f": did you mean {near[0]!r}?" if near and near[0] != name else "")
        )
    try:
        inspect.signature(found).bind(embeddings, num_dense, **config.arguments)
    except TypeError as error:
        raise ConfigError(
            f"{what}: it is called as {name}(embeddings, num_dense, **model.arguments), with "
            f"{sorted(config.arguments)}: {error}"
        ) from error
    return found(embeddings, num_dense, **config.arguments)  # type: ignore[call-arg]
