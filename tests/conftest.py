"""Test-wide rules: GPU tests are skipped where there is no GPU, no example has a deadline, threads
that wait leave the cores to others, and oracle processes start quickly.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# OpenMP reads this when it is loaded. Its threads would spin for milliseconds after each loop
# otherwise, on cores that other tests need, and the very threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# An example that compiles a loop, or runs beside other work, takes long once and is right.
settings.register_profile("bagpipe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "soak", settings.get_profile("bagpipe"), max_examples=1000
)  # see `strategies.examples`
settings.load_profile("bagpipe")


# On a new machine the first file compiles most loops: a minute. Another process that begins with
# what needs none finds them compiled then, where it would compile them a second time.
_COMPILES_MOST = "tests/benchmarks/test_bench.py"
_NEEDS_NONE = (
    *("tests/cli/test_serve.py", "tests/config/", "tests/launch/", "tests/server/test_local.py"),
    *("tests/test_architecture.py", "tests/test_docs.py", "tests/test_packaging.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith(_COMPILES_MOST),
            not item.nodeid.startswith(_NEEDS_NONE),
        )
    )
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only now, so that collecting the control plane's tests does not load it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def forked_oracles() -> Iterator[None]:
    """Oracle processes are forked from one that has imported everything, and has no threads.

    A new program, as users have it, takes seconds to import torch, and as long again for
    `torch._dynamo`, which torch imports with the first optimizer: `tests/feed/test_process.py` and
    runs by torchrun start those.
    """
    from bagpipe.feed import process

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bagpipe.train.trainer", "bagpipe.feed.child", "torch._dynamo", "hypothesis", "pytest"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_CONTEXT", context)
        yield
