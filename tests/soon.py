"""What tests hold of time: that something ends by itself, long before a timeout ends it.

They never measure it. A machine may stand still for a minute, and a busy one may compile for
three, so what ends at once is given `SOON_S`, and what would end it otherwise comes at `TIMEOUT_S`.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SOON_S = 200.0
TIMEOUT_S = 400.0
_SUSPECT_S = 20.0


@contextmanager
def ends_soon(limit_s: float = SOON_S) -> Iterator[None]:
    """Fails if what is inside takes `limit_s`; all threads' stacks tell what it waited for."""
    faulthandler.dump_traceback_later(_SUSPECT_S)
    started = time.monotonic()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - started < limit_s


def wait_until(is_so: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
    """Waits until `is_so()` holds; fails with `what()` where it does not come soon."""
    with ends_soon():
        deadline = time.monotonic() + SOON_S
        while not is_so():
            assert time.monotonic() < deadline, what()
            time.sleep(0.02)
