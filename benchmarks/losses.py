"""Whether arms compute the same: their losses, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LOSS_TOLERANCE = 1e-3
"""Relative, over the compared steps: sums in another order move some values over a bfloat16
boundary, and steps magnify that, from 1e-6 at the second step to 1e-4 at the tenth on a CPU. An arm
that drops its updates is off by 5e-2."""


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative differences step by step; of one that is not finite, infinite."""
    found = [abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True)]
    return [difference if difference < float("inf") else float("inf") for difference in found]


def disagreements(differences: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each arm whose losses differ from Bagpipe's by more than `LOSS_TOLERANCE`.

    A note, not an error at that step: what was measured stays, and whether later steps agree again
    tells a slip from wrong updates.
    """
    return [
        f"arm {name} does NOT compute the same: its loss differs from bagpipe's by more than "
        f"{LOSS_TOLERANCE:g} of it at {len(beyond)} of the first {len(found)} steps, first at step "
        f"{beyond[0]} by {found[beyond[0]]:.1e}, at most by {max(found):.1e}"
        for name, found in differences.items()
        if (
            beyond := [step for step, difference in enumerate(found) if difference > LOSS_TOLERANCE]
        )
    ]
