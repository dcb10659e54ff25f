"""Test-wide rules: GPU tests are skipped where there is no GPU, and no example has a deadline."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# An example that compiles a loop, or runs beside other work, takes long once and is right.
settings.register_profile("bagpipe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "soak", settings.get_profile("bagpipe"), max_examples=1000
)  # see `strategies.examples`
settings.load_profile("bagpipe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only now, so that collecting the control plane's tests does not load it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
