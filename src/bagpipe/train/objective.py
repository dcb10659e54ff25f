"""From logits to a loss: binary cross-entropy.

The loss of a batch is the mean over its samples of each one's cross-entropy times its weight, as
that of torch's ``binary_cross_entropy_with_logits(weight=)``: the sum is divided by the number of
samples, not by the sum of weights. So a sample counts by its weight alone, whichever others are in
its batch, and a batch of weights that are all 0 has a loss and gradients of 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def mean_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss () of a batch of one sample or more.

    Args:
        logits: (B,) float.
        labels: (B,) float32, from 0 to 1.
        weights: of the samples (B,) float32, 0 or more; by default 1.
    """
    return binary_cross_entropy_with_logits(logits.float(), labels, weight=weights)
