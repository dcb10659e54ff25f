"""torch's optimizers without torch's compiler, which they import when the first one is made.

torch wraps some of an optimizer's methods, so that its compiler leaves them alone. The wrappers
import it: 1.2 s and a million objects, for a run that compiles nothing. Here the methods are the
same ones without these wrappers, which `functools` keeps as `__wrapped__`. Where torch has no such
wrapper, the method is taken as it is.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)

_LEFT_ALONE = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def without_compiler(kind: type[OptimizerT]) -> type[OptimizerT]:
    """A class like `kind`, with the same numbers, that does not import `torch._dynamo`.

    Its steps can't be differentiated: they record no gradients, as torch's don't by default. Nor
    can a function that steps it be given to torch.compile.
    """
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in _LEFT_ALONE}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, **methods})
