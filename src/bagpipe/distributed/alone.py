"""A trainer without others, asked the same as one of several: rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeAlias

from torch import Tensor

from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.machines import Hosts


class Alone:
    """What a `Communicator` would be among one: nothing is sent, and nobody is waited for."""

    rank, num_trainers, has_others = 0, 1, False
    hosts = Hosts(rank=0, of_ranks=(0,))
    timeout = timedelta(minutes=5)

    def tell(self, act: str, *, needed_at: int, note: str = "") -> None:
        """Nobody is told."""

    def tell_failed(self, error: BaseException) -> None:
        """Nobody is told."""

    def gather_texts(self, what: str, text: str) -> list[str]:
        """This rank's alone."""
        return [text]

    def share_text(self, what: str, text: str | None) -> str:
        """This rank's own, which is the first of its host."""
        assert text is not None
        return text

    def largest(self, value: float) -> float:
        """This rank's own."""
        return value

    def mean(self, value: float) -> float:
        """This rank's own."""
        return value

    def ask_for_largest(self, value: float) -> Callable[[], float]:
        """This rank's own."""
        return lambda: value

    def average(self, values: Tensor) -> None:
        """They are their own mean."""

    def gather(
        self, what: str, parts: Iterable[Tensor], sizes: Sequence[Sequence[int]]
    ) -> Sequence[Iterable[Tensor]]:
        """This rank's own, one after the other."""
        return [parts]

    def barrier(self, what: str) -> None:
        """Nobody is waited for."""

    def all_stop_before(self, step: int) -> bool:
        """This rank does."""
        return True


Peers: TypeAlias = Communicator | Alone
"""How a trainer talks to the others, of whom there may be none."""
ALONE = Alone()


def peers_of(communicator: Peers | None) -> Peers:
    """The others as users name them: None, or a communicator of one trainer, is nobody."""
    return communicator if communicator is not None and communicator.has_others else ALONE
