"""The oracle on the device: from a batch's ids to plans, without the host's cores.

Only ids go to the device, `lookahead` batches ahead. Functions of fixed shapes run there:
`entering.enter` takes a batch into the window (de-duplication, gradient schedule, linking),
`planning.plan` plans a step (eviction by MIN, slots, transfers), and where what is kept of rows is
a map, `row_index.rebuild` forgets those that are far. They read and write the tensors of one
`State` at fixed addresses, so that CUDA graphs can replay them. All sizes that depend on ids are
numbers in that memory. `planner.Planner` calls them in a thread and on a stream of its own, and
tells the host which rows move. `source.DeviceSource` hands the plans to a trainer.

What decides training's arithmetic is that of `bagpipe.oracle` to the bit: unique rows and their
order, inverse, pieces, bags, weights, scales. Which row sits in which slot decides nothing, so here
one selection over all slots replaces the host's shards and queues.

A batch that can't enter (a bad id, more unique rows than there is room for) closes the window. The
device notes why (`alerts`), and no later batch enters until the host has looked; steps whose
batches have entered are still planned. So nothing is cut, and nothing that follows is wrong.

It is built of torch operations, which run on a CPU too, as tests do.
"""

from bagpipe.device_oracle.planner import Planner
from bagpipe.device_oracle.source import DeviceSource

__all__ = ["DeviceSource", "Planner"]
