"""Which slots a step takes: Belady's MIN as one selection by key over all slots. Torch operations.

The greater a slot's key, the sooner its row leaves (docs/design.md, "The policy"):

    0                               not settled, or used by the step itself: it stays
    1 .. longest lookahead          steps until its row's next use
    UNUSED + steps since last use   nobody knows a next use
    EMPTY                           it was never filled

Of equal keys the lower slots go first. A key has 22 bits. Two histograms of 2,048 bins, one of the
upper and one of the lower halves, tell the key down to which slots go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.device_oracle.masked import pick, scattered
from bagpipe.device_oracle.state import NEVER, State

HALF_BITS = 11
NUM_BINS = 1 << HALF_BITS
UNUSED = 1 << (2 * HALF_BITS - 1)
EMPTY = 2 * UNUSED - 1
MAX_AGE = UNUSED - 2


def choose_victims(state: State, number: Tensor) -> Tensor:
    """Chooses so many slots.

    Args:
        state: Rows that the step itself uses have it as their last use.
        number: () int64, no more than there are slots whose key is not 0.

    Returns:
        The slots, ascending, (max_uniques,) int64; what lies behind the last means nothing.
    """
    keys, room = slot_keys(state), state.capacity.max_uniques
    upper, num_above = _threshold(keys >> HALF_BITS, keys >= 0, number)
    lower, num_above_lower = _threshold(
        keys & (NUM_BINS - 1), keys >> HALF_BITS == upper, number - num_above
    )
    key = (upper << HALF_BITS) + lower
    is_equal = keys == key
    num_equal = number - num_above - num_above_lower
    is_taken = (keys > key) | (is_equal & (torch.cumsum(is_equal, 0) <= num_equal))
    place = torch.cumsum(is_taken, 0) - 1
    return scattered(room, is_taken, place, torch.arange(len(keys), device=keys.device))


def slot_keys(state: State) -> Tensor:
    """The key of each slot (num_slots,) int64."""
    step, slots = state.planned, state.window.num_slots
    last_uses, next_uses = state.last_uses[:slots].long(), state.next_uses[:slots].long()
    age = (step - last_uses).clamp(1, MAX_AGE)
    ahead = (next_uses - step).clamp(1, UNUSED - 1)
    keys = torch.where(next_uses == NEVER, UNUSED + age, ahead)
    keys = pick(last_uses < state.settled, keys, 0)
    return keys.masked_fill(state.rows_of_slots[:slots] == state.num_rows, EMPTY)


def _threshold(values: Tensor, counts: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the greatest bin down to which there are at least `number` values.

    Args:
        values: (n,) int64, from 0 to NUM_BINS.
        counts: (n,) bool, which of them count.
        number: () int64.

    Returns:
        The bin, and how many values lie above it: () int64 each.
    """
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=values.device)
    histogram.scatter_add_(0, values, counts.long())
    from_bin = histogram.flip(0).cumsum(0).flip(0)  # how many lie in a bin or above it
    found = ((from_bin >= number).sum() - 1).clamp(min=0)
    above = from_bin - histogram
    return found, above.index_select(0, found.view(1))[0]  # above[found] would wait for `found`
