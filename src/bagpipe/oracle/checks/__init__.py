"""An optional run-time check that plans keep the invariants of docs/design.md.

It replays what the executors of all trainers do with each group, and knows nothing of how the
oracle decides. For each row it knows where the row is, and whether gradients of a computed step are
still on their way to it (`rows`). For each step it knows who uses which row, and checks that each
gradient reaches its row's owner once (`gradients`). `replay` has the order of moments.

What may happen at any of several moments happens at the worst one: overlapped gradients are applied
as late as they may be, and replicas that travel behind compute must be the same from the earliest
moment at which they may be sent to the latest.

A single trainer is a rank 0 of 1 that exchanges nothing: it updates all rows of a step at once,
with its own sums.

Cost: 26 bytes a row, 8 a slot of each trainer, and about as much time as planning.
"""

from bagpipe.oracle.checks.replay import checked

__all__ = ["checked"]
