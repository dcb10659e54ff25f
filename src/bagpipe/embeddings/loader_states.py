"""Where a loader is after the batches that were trained, while it is read ahead of them.

A loader that can be resumed (torchdata's `StatefulDataLoader`, or any with `state_dict` and
`load_state_dict`) tells where it is now: a window of batches beyond the one that is trained. So its
state is asked for behind each batch that it yields, in the thread that reads it, and kept until
that batch has been trained.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from bagpipe.errors import UsageError

BatchT = TypeVar("BatchT")


class LoaderStates(Generic[BatchT]):
    """Iterates a loader once, and keeps its state behind each batch."""

    def __init__(self, loader: Iterable[BatchT], first_step: int, *, is_elsewhere: bool) -> None:
        """`is_elsewhere`: another process iterates a copy of the loader."""
        self._loader: Any = loader
        self._first_step, self._is_elsewhere = first_step, is_elsewhere
        self.has_state = all(
            callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
        )
        self._kept: deque[tuple[int, Any]] = deque()  # the reader's thread adds to its end

    def __iter__(self) -> Iterator[BatchT]:
        batches = iter(self._loader)
        for step in itertools.count(self._first_step):
            if self.has_state:
                # a copy: the loader may go on in what it returns
                self._kept.append((step, copy.deepcopy(self._loader.state_dict())))
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def before(self, step: int) -> Any:
        """The loader's state where it yields the batch of `step` next, which only grows.

        None: it has none, or that is not known here.

        Raises:
            UsageError: the loader has not been read yet.
        """
        if not self.has_state:
            return None
        if self._is_elsewhere:
            warnings.warn(
                "the loader has a state_dict, but an oracle process reads it, so its state is not "
                "saved: resume by the number of steps, or use oracle='thread'",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        while len(self._kept) > 1 and self._kept[0][0] < step:
            self._kept.popleft()
        if not self._kept:
            raise UsageError(
                "the loader has not been asked for a batch yet: save before bagpipe.lookahead "
                "begins, or once it has handed out a batch"
            )
        found, state = self._kept[0]
        assert found == step
        return state
