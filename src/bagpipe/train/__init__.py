"""Training: the lookahead around batches, the loop, checkpoints, metrics and logs. Joins the
control and the data plane.
"""

from __future__ import annotations
