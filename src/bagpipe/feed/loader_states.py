"""Where a loader is after the batches that were trained, while it is read ahead of them.

A loader that can be resumed (torchdata's `StatefulDataLoader`, or any with `state_dict` and
`load_state_dict`) tells where it is now: a window of batches beyond the one that is trained. So its
state is asked for behind each batch that it yields, where it is read, and kept until that batch has
been trained.

An oracle process reads a copy of the loader. Its states come with the plans, and at the end that of
the copy is put into the loader here, which so is where it would be had it been read here.
"""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from bagpipe.errors import UsageError

BatchT = TypeVar("BatchT")


class LoaderStates(Generic[BatchT]):
    """Iterates a loader once, and keeps its state behind each batch."""

    def __init__(self, loader: Iterable[BatchT], first_step: int) -> None:
        self._loader: Any = loader
        self._first_step = first_step
        self.has_state = all(
            callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
        )
        self.batch_size = getattr(loader, "batch_size", None)
        """The loader's, if it says so."""
        self._kept: deque[tuple[int, Any]] = deque()  # the reader's thread adds to its end

    def __iter__(self) -> Iterator[BatchT]:
        batches = iter(self._loader)
        self._keep(self._first_step)
        for step, batch in enumerate(batches, self._first_step):
            self._keep(step + 1)
            yield batch

    def _keep(self, step: int) -> None:
        # a copy: the loader may go on in what it returns
        self._kept.append((step, copy.deepcopy(self._loader.state_dict())))

    def before(self, step: int) -> Any:
        """The loader's state where it yields the batch of `step` next, which only grows.

        None: it has none, or none is known of the loader that is read elsewhere.

        Raises:
            UsageError: the loader has not been read yet.
        """
        if not self.has_state:
            return None
        while len(self._kept) > 1 and self._kept[0][0] < step:
            self._kept.popleft()
        if not self._kept:
            if step > self._first_step:  # another rank has read its own loader, which has no state
                return None
            raise UsageError(
                "the loader has not been asked for a batch yet: save before bagpipe.lookahead "
                "begins, or once it has handed out a batch"
            )
        found, state = self._kept[0]
        assert found == step
        return state

    def packed(self, step: int) -> bytes:
        """In the process that reads: those up to behind the batch of `step`, to be sent with it."""
        found = []
        while self._kept and self._kept[0][0] <= step + 1:
            found.append(self._kept.popleft())
        return pickle.dumps(found)

    def packed_end(self) -> bytes:
        """In the process that reads: where the loader is once all is read."""
        return pickle.dumps(self._loader.state_dict())

    def take(self, packed: bytes) -> None:
        """Keeps states that came with a batch from the process that reads."""
        if packed and self.has_state:
            self._kept.extend(pickle.loads(packed))

    def take_end(self, packed: bytes) -> None:
        """Puts the loader where its copy in the process that reads has ended."""
        if packed and self.has_state:
            self._loader.load_state_dict(pickle.loads(packed))
