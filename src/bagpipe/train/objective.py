"""From logits to a loss: binary cross-entropy.

The loss of a label is the mean over the batch of each sample's cross-entropy times its weight, as
that of torch's ``binary_cross_entropy_with_logits(weight=)``: the sum is divided by the number of
samples, not by the sum of weights. So a sample counts by its weight alone, whichever others are in
its batch, and a batch of weights that are all 0 has a loss and gradients of 0. The losses of
several labels, each times its label's weight, are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.errors import ConfigError


class Objective:
    """The loss of a run's batches."""

    def __init__(
        self,
        label_names: Sequence[str] = ("label",),
        label_weights: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Makes the objective of these labels, whose weight is 1 unless `label_weights` has it."""
        self._names = label_names
        weights = [(label_weights or {}).get(name, 1.0) for name in label_names]
        is_plain = all(weight == 1.0 for weight in weights)
        self._weights = None if is_plain else torch.tensor(weights, device=device)  # (L,)

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B,), or (B, L) of L labels, float.
            labels: float32 of the same shape, from 0 to 1.
            weights: of the samples (B,) float32, 0 or more; by default 1.

        Returns:
            The loss () of one label. Of several (1 + L,): what is trained, and then each label's,
            before its weight. That of no sample is 0.

        Raises:
            ConfigError: There are other logits than labels.
        """
        num_labels = len(self._names)
        if len(labels) == 0:  # the mean of nothing would be NaN
            nothing = logits.sum()
            return nothing if num_labels == 1 else nothing.expand(1 + num_labels)
        check_logits(logits, labels, self._names)
        if num_labels == 1:
            loss = binary_cross_entropy_with_logits(logits.float(), labels, weight=weights)
            return loss if self._weights is None else loss * self._weights[0]
        if weights is not None:
            weights = weights.unsqueeze(1).expand_as(labels)
        each = binary_cross_entropy_with_logits(
            logits.float(), labels, weight=weights, reduction="none"
        ).mean(dim=0)
        total = each.sum() if self._weights is None else (each * self._weights).sum()
        return torch.cat([total.unsqueeze(0), each])


def check_logits(logits: Tensor, labels: Tensor, label_names: Sequence[str]) -> None:
    """Raises ConfigError unless a model makes a logit for each label of a batch."""
    if logits.shape != labels.shape:
        raise ConfigError(
            f"the model makes logits of shape {tuple(logits.shape)} for {len(labels)} samples with "
            f"{'the label' if len(label_names) == 1 else 'the labels'} {', '.join(label_names)}: "
            f"its dense part must return {tuple(labels.shape)}; data.labels chooses labels"
        )
