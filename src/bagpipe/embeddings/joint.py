"""Several collections under one `bagpipe.lookahead`: one oracle, one cache, one executor.

Their groups stand side by side, first those of the first collection. What ends a step or the stream
for one of them ends it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from bagpipe.cache.executor import Executor
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.embeddings.batch_in_hand import Stream
from bagpipe.embeddings.capacity import make_caches
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.executor_part import ExecutorPart
from bagpipe.errors import ConfigError, UsageError
from bagpipe.feed.loader_states import LoaderStates


class JointCollections:
    """What `Lookahead` asks of an `EmbeddingBagCollection`, asked of several."""

    def __init__(self, members: Iterable[EmbeddingBagCollection]) -> None:
        """Ends the streams that the members had before.

        Raises:
            ConfigError: there are none, one is given twice, or they lie on several devices.
            UsageError: there are several trainers, or members have trained other numbers of steps.
        """
        self._members = members = _checked(members)
        if len({member.device for member in members}) > 1:
            devices = ", ".join(str(member.device) for member in members)
            raise ConfigError(
                f"the collections lie on {devices}: make those of one bagpipe.lookahead on one "
                "device"
            )
        if any(member.peers.has_others for member in members):
            raise UsageError(
                "with several trainers bagpipe.lookahead takes one collection: make one of all "
                "tables, which may have optimizers of their own"
            )
        self.stop()
        steps = [member.step for member in members]
        if len(set(steps)) > 1:
            raise UsageError(
                f"the collections have trained {', '.join(map(str, steps))} steps: those of one "
                "bagpipe.lookahead must have trained as many, since a step is one of all"
            )
        whole = [group for member in members for group in member.groups]
        self.groups = tuple(replace(group, index=index) for index, group in enumerate(whole))
        self.device, self.seed = members[0].device, members[0].seed
        self._ends = list(accumulate(len(member.groups) for member in members))
        self._num_skipped: list[int] = []
        self._executor: Executor | None = None
        features = {feature for group in self.groups for feature in group.features}
        for member in members:
            member.other_features |= features

    @property
    def peers(self) -> Peers:
        """Nobody."""
        return ALONE

    @property
    def step(self) -> int:
        """Steps trained so far."""
        return self._members[0].step

    @property
    def executor(self) -> Executor | None:
        """That of the stream, while all collections are in it."""
        return self._executor

    def start(
        self, num_slots: Sequence[int], num_replica_slots: Sequence[int] | None = None
    ) -> Executor:
        """As `EmbeddingBagCollection.start`; a single trainer has no replicas."""
        parts = [
            (member, slice(end - len(member.groups), end))
            for member, end in zip(self._members, self._ends, strict=True)
        ]
        caches = [
            cache
            for member, own in parts
            for cache in make_caches(
                member.groups, num_slots[own], None, device=member.device, seed=member.seed
            )
        ]
        stores = [store for member in self._members for store in member.stores]
        self._num_skipped = [count for member in self._members for count in member.num_skipped]
        executor = Executor(caches, stores, ALONE, self._num_skipped)
        for member, own in parts:
            member.serve(
                ExecutorPart(
                    executor,
                    own.start,
                    len(member.groups),
                    end_step=self._end_step,
                    close=self._close,
                )
            )
        self._executor = executor
        return executor

    def begin_step(self, sparse: object) -> None:
        """Makes the rows of the next submitted plan ready, for all collections."""
        assert self._executor is not None
        self._executor.begin_step()
        for member in self._members:
            member.expect(sparse)

    @property
    def is_batch_unused(self) -> bool:
        """Whether a batch has been handed out and no collection has looked it up yet."""
        return all(member.is_batch_unused for member in self._members)

    def note_stream(self, stream: Callable[[], Stream | None], states: LoaderStates[Any]) -> None:
        """Notes the `bagpipe.lookahead` that serves all collections."""
        for member in self._members:
            member.note_stream(stream, states)

    def end_step(self) -> None:
        """Closes the step that `begin_step` opened, if there is one."""
        if self._executor is not None:
            self._end_step()

    def flush(self) -> None:
        """Writes all resident rows to the stores."""
        for member in self._members:
            member.flush()

    def stop(self) -> None:
        """Closes an open step, flushes and gives the caches back."""
        for member in self._members:
            member.stop()

    def fail(self, error: BaseException) -> None:
        """Gives the caches back without flushing; all collections refuse all use from now on."""
        self._members[0].fail(error)

    def _end_step(self) -> None:
        assert self._executor is not None
        if self._executor.is_in_step:
            for member in self._members:
                member.note_step(self._executor.step + 1)
            self._executor.end_step()
        # also after an interrupt that came before this
        for member, end in zip(self._members, self._ends, strict=True):
            member.num_skipped[:] = self._num_skipped[end - len(member.groups) : end]

    def _close(self, has_failed: bool) -> None:
        if self._executor is not None:
            self._executor.close(has_failed=has_failed)
            self._executor = None
            failures = [member.failure for member in self._members if member.failure is not None]
            for member in self._members:
                member.leave(failures[0] if failures else None)


def _checked(members: object) -> tuple[EmbeddingBagCollection, ...]:
    """The collections, if they are some, each once."""
    found = tuple(members) if isinstance(members, Iterable) else (members,)
    for member in found:
        if not isinstance(member, EmbeddingBagCollection):
            raise ConfigError(
                "bagpipe.lookahead takes an EmbeddingBagCollection or a list of some as its "
                f"embeddings, was given a {type(member).__name__}: give the collections that are "
                "in it"
            )
    if not found:
        raise ConfigError("bagpipe.lookahead was given no collection: give at least one")
    if len(set(found)) < len(found):
        raise ConfigError(
            f"bagpipe.lookahead was given {len(found)} collections, of which one is there twice: "
            "give each once"
        )
    return found
