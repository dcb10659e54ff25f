"""Binary search for compiled code; numpy's takes ten times as long to compile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bagpipe.native.jit import jit


@jit
def first_at_least(values: npt.NDArray[np.integer], value: int) -> int:
    """Where in `values` (n,), which ascend, the first one is that is at least `value`, else n."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low
