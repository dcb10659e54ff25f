"""The dense part of `gpu` and `trainers`: one `DenseStep` for all arms.

On CUDA it is one captured graph in bfloat16. Each arm has dense parameters of its own, which are
put where the graph reads them at the beginning of its turn. So all arms start alike, and their
losses can be compared whatever ran between their turns. Plain SGD has no further state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bagpipe.distributed.communicator import Communicator
from bagpipe.models import DLRM, DLRM_DCN
from bagpipe.train.dense_step import DenseStep
from benchmarks.workloads import NUM_DENSE, Workload

_DENSE_LR = 0.01


class SharedDense:
    """The step, and the parameters that arms load and save around their turns."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        *,
        graph: bool = True,
        communicator: Communicator | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Builds the step and, on CUDA, captures it.

        Args:
            workload: what is trained.
            device: where.
            graph: whether CUDA replays a captured graph; it runs eagerly without.
            communicator: averages gradients over its ranks; None: there is one trainer.
            say: is told what does not work.
        """
        torch.manual_seed(0)
        num_features, on_cuda = len(workload.lengths), device.type == "cuda"
        graph = graph and on_cuda
        kind = DLRM if workload.dense_part == "dlrm" else DLRM_DCN
        model = kind(
            nn.Module(),
            NUM_DENSE,
            num_features=num_features,
            bottom=workload.bottom,
            top=workload.top,
        ).to(device)
        self._parameters = list(model.parameters())
        self.step = DenseStep(
            model.dense_part,
            torch.optim.SGD(self._parameters, lr=_DENSE_LR),
            groups=[(num_features, workload.embedding_dim)],
            device=device,
            batch_size=workload.batch_size,
            precision="bf16" if on_cuda else "fp32",
            graph=graph,
            average=None if communicator is None else communicator.average,
            say=say,
        )
        self.pooled = self.step.pooled(workload.batch_size)[0]
        """Where every arm writes its embeddings: (B, F, D)."""
        # Numbers of about the size of embeddings, for the arm that has none.
        self.pooled.copy_(
            torch.randn(self.pooled.shape, generator=torch.Generator().manual_seed(1)) * 0.01
        )
        # The first call captures the graph, and trains: so the parameters are put back after it.
        initial = self.save()
        self.step(torch.zeros(workload.batch_size, NUM_DENSE), torch.zeros(workload.batch_size))
        self.load(initial)

    @property
    def num_parameters(self) -> int:
        """Numbers that it learns."""
        return sum(parameter.numel() for parameter in self._parameters)

    def save(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.detach().clone() for parameter in self._parameters]

    def load(self, parameters: Sequence[Tensor]) -> None:
        """Puts parameters where the step reads them."""
        with torch.no_grad():
            for own, given in zip(self._parameters, parameters, strict=True):
                own.copy_(given)
