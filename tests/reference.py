"""Slow and obvious twins of what the library does: an oracle, an eviction policy, a trainer.

They share only the value types with the code under test. Rows are plain integers in sets and dicts.
Floats are numpy float32 with one rounding for each operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from bagpipe.optimizers import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.linker import BatchUses, LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.plan import MAX_PIECE_LENGTH, Transfers
from bagpipe.types import Group, Jagged

NEVER = 10**9


def lookups(group: Group, batch: Jagged) -> list[tuple[int, int, int]]:
    """(row, feature, sample) of each lookup of the group, feature-major."""
    result = []
    for feature, name in enumerate(group.features):
        key = batch.keys.index(name)
        table = group.feature_tables[feature]
        first_row = sum(table.num_embeddings for table in group.tables[:table])
        for sample in range(batch.batch_size):
            bag = key * batch.batch_size + sample
            begin, end = (bag, bag + 1) if batch.offsets is None else batch.offsets[bag : bag + 2]
            result += [
                (first_row + int(identifier), feature, sample)
                for identifier in batch.values[begin:end]
            ]
    return result


def lookup_weights(group: Group, batch: Jagged) -> list[np.float32]:
    """The per-sample weight of each lookup, as `lookups` orders them."""
    one = np.float32(1.0)
    if batch.weights is None:
        return [one] * len(lookups(group, batch))
    found = []
    for name in group.features:
        key = batch.keys.index(name)
        for bag in range(key * batch.batch_size, (key + 1) * batch.batch_size):
            begin, end = (bag, bag + 1) if batch.offsets is None else batch.offsets[bag : bag + 2]
            found += [np.float32(weight) for weight in batch.weights[begin:end]]
    return found


def shard_of(row: int) -> int:
    """The shard of a cache that has the row."""
    return ((row // 16) * 0x9E3779B97F4A7C15 % 2**64) >> 61


def in_order(rows: Iterable[int]) -> list[int]:
    """Unique rows shard by shard, in each in first-use order."""
    return sorted(dict.fromkeys(rows), key=shard_of)


def unique_rows(group: Group, batch: Jagged) -> list[int]:
    """Unique rows of a batch."""
    return in_order(row for row, _, _ in lookups(group, batch))


def naive_oracle(
    batches: Sequence[list[int]], *, num_slots: int, lookahead: int, prefetch_depth: int
) -> list[tuple[list[int], set[int]]]:
    """Plans by scanning for the farthest next use.

    Returns:
        For each step the rows fetched, in batch order, and the set of rows evicted.
    """
    cached: set[int] = set()
    last_use: dict[int, int] = {}
    settled_at: dict[int, int] = {}  # by step: when its rows settled
    result = []
    for step, rows in enumerate(batches):
        window = batches[step : step + lookahead + 1]
        missing = [row for row in rows if row not in cached]
        num_evicted = max(0, len(cached) + len(missing) - num_slots)
        recent = batches[max(0, step - prefetch_depth) : step + 1]
        is_tight = sum(map(len, recent)) > num_slots
        for used in range(step if is_tight else step - prefetch_depth):
            settled_at.setdefault(used, step)

        def next_use(row: int, step: int = step, window: Sequence[list[int]] = window) -> int:
            return next(
                (step + ahead for ahead, used in enumerate(window) if row in used),
                NEVER,
            )

        def key(row: int, step: int = step) -> tuple[int, ...]:
            """Sorts rows into the order in which they leave."""
            used, due = last_use[row], next_use(row)
            if due == NEVER:
                return (0, used, batches[used].index(row))
            seen_at = max(0, due - lookahead)
            # It had no known next use until the batch that uses it next came into sight.
            if seen_at > settled_at[used]:
                return (1, -due, seen_at, 0, batches[due].index(row))
            return (1, -due, settled_at[used], 1, used, batches[used].index(row))

        may_leave = [row for row in cached if row not in rows and last_use[row] in settled_at]
        victims = sorted(may_leave, key=key)[:num_evicted]
        assert len(victims) == num_evicted
        cached = cached - set(victims) | set(missing)
        last_use.update(dict.fromkeys(rows, step))
        result.append((missing, set(victims)))
    return result


class LeastRecentlyUsed:
    """A second eviction policy, to which the future means nothing.

    All of its transfers are urgent.
    """

    evicted_blindly = False
    nbytes = 0

    def __init__(self, group: Group, *, num_slots: int, first_step: int, **_: int) -> None:
        self._num_slots, self._step = num_slots, first_step
        self._last_uses: dict[int, int] = {}
        self._num_linked = 0
        self._admitted: deque[LinkedGroup] = deque()
        self._before = BatchUses(step=-1, first=0, bounds=np.zeros(2, np.int64))
        self._slots: dict[int, int] = {}  # by row, the least recently used first
        self._evicted_at: dict[int, int] = {}

    @property
    def num_used_slots(self) -> int:
        return len(self._slots)

    def link(self, batch: MergedGroup) -> LinkedGroup:
        rows, first = batch.unique_rows.tolist(), self._num_linked
        previous = [self._last_uses.get(row, -1) for row in rows]
        self._last_uses.update((row, first + index) for index, row in enumerate(rows))
        self._num_linked += len(rows)
        return LinkedGroup(
            batch=batch,
            uses=BatchUses(step=-1, first=first, bounds=np.array([0, len(rows)])),
            previous=np.array(previous, np.int32),
        )

    def check_fits(self, linked: LinkedGroup) -> None:
        assert len(linked.batch.unique_rows) <= self._num_slots

    def admit(self, linked: LinkedGroup) -> None:
        self._admitted.append(linked)

    def plan(self) -> CachePlan:
        linked, step = self._admitted.popleft(), self._step
        rows = linked.batch.unique_rows.tolist()
        for row in rows:
            if row in self._slots:
                self._slots[row] = self._slots.pop(row)
        missing = [row for row in rows if row not in self._slots]
        evicted: list[int] = []
        evicted_slots: list[int] = []
        for row in missing:
            slot = len(self._slots)
            if slot == self._num_slots:
                evicted.append(next(iter(self._slots)))
                slot = self._slots.pop(evicted[-1])
                evicted_slots.append(slot)
            self._slots[row] = slot
        fence_tick = max([-1, *(self._evicted_at.get(row, -1) for row in missing)])
        self._evicted_at.update(dict.fromkeys(evicted, step))
        before, self._before = self._before, linked.uses
        self._step += 1
        return CachePlan(
            linked=linked,
            unique_slots=self._slots_of(rows),
            overlapped=transfers([], [], [], [], -1),
            urgent=transfers(evicted, evicted_slots, missing, self._slots_of(missing), fence_tick),
            before=before,
            after=self._admitted[0] if self._admitted else None,
        )

    def _slots_of(self, rows: Sequence[int]) -> np.ndarray:
        return np.array([self._slots[row] for row in rows], np.int32)


def transfers(
    evict_rows: Sequence[int],
    evict_slots: Sequence[int],
    fetch_rows: Sequence[int],
    fetch_slots: Sequence[int],
    fence_tick: int,
) -> Transfers:
    return Transfers(
        evict_rows=np.array(evict_rows, np.int64),
        evict_slots=np.array(evict_slots, np.int32),
        fetch_rows=np.array(fetch_rows, np.int64),
        fetch_slots=np.array(fetch_slots, np.int32),
        fence_tick=fence_tick,
    )


class InMemoryTables:
    """One group's tables, whole in memory, trained with the library's arithmetic.

    They are (num_rows, D) weights and (num_rows, S) optimizer state.
    """

    def __init__(self, group: Group, records: np.ndarray) -> None:
        """Copies `records` (num_rows, D + S)."""
        self.group = group
        self.weights = records[:, : group.embedding_dim].astype(np.float32).copy()
        self.state = records[:, group.embedding_dim :].astype(np.float32).copy()
        self.step = 0

    def lookup(self, batch: Jagged) -> np.ndarray:
        """Returns pooled embeddings (B, F, D)."""
        pooled = np.zeros(
            (batch.batch_size, len(self.group.features), self.group.embedding_dim), np.float32
        )
        for (row, feature, sample), weight in zip(
            lookups(self.group, batch), lookup_weights(self.group, batch), strict=True
        ):
            pooled[sample, feature] += self.weights[row] * weight
        return pooled * self._scales(batch)

    def update(self, batch: Jagged, grads: np.ndarray) -> None:
        """Takes an optimizer step with the gradient (B, F, D) of what `lookup` returned."""
        grads = grads.astype(np.float32) * self._scales(batch)
        bags: dict[int, list[np.ndarray]] = {}
        for (row, feature, sample), weight in zip(
            lookups(self.group, batch), lookup_weights(self.group, batch), strict=True
        ):
            bags.setdefault(row, []).append(grads[sample, feature] * weight)
        for row, parts in bags.items():
            pieces = [
                _in_order(parts[begin : begin + MAX_PIECE_LENGTH])
                for begin in range(0, len(parts), MAX_PIECE_LENGTH)
            ]
            total = pieces[0] if len(pieces) == 1 else pieces[0] + _in_order(pieces[1:])
            self.weights[row], self.state[row] = self._apply(
                self.weights[row], self.state[row], total
            )
        self.step += 1

    def records(self) -> np.ndarray:
        return np.concatenate([self.weights, self.state], axis=1)

    def _scales(self, batch: Jagged) -> np.ndarray:
        """(B, F, 1): 1 / bag length where pooling is mean."""
        lengths = np.zeros((batch.batch_size, len(self.group.features), 1), np.float64)
        for _, feature, sample in lookups(self.group, batch):
            lengths[sample, feature] += 1
        is_mean = np.array(
            [self.group.tables[table].pooling == "mean" for table in self.group.feature_tables]
        )
        return np.where(is_mean[None, :, None], 1 / np.maximum(lengths, 1), 1.0).astype(np.float32)

    def _apply(
        self, weights: np.ndarray, state: np.ndarray, grad: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        optimizer, one = self.group.optimizer, np.float32
        lr = one(optimizer.lr)
        if optimizer.max_grad_norm is not None:
            norm = np.sqrt(_sum_of_squares(grad))
            if norm > one(optimizer.max_grad_norm):
                grad = grad * (one(optimizer.max_grad_norm) / norm)
        if optimizer.decays_apart:
            weights = weights - weights * one(optimizer.lr * optimizer.weight_decay)
        elif optimizer.weight_decay:
            grad = grad + weights * one(optimizer.weight_decay)
        mean_of_squares = _sum_of_squares(grad) / one(len(grad))
        match optimizer:
            case SGD():
                return weights - grad * lr, state
            case Adagrad():
                state = state + grad * grad
                return weights - grad / (np.sqrt(state) + one(optimizer.eps)) * lr, state
            case RowWiseAdagrad():
                state = state + mean_of_squares
                return weights - grad / (np.sqrt(state) + one(optimizer.eps)) * lr, state
            case Adam():
                beta1, beta2 = optimizer.betas
                first, second = np.split(state, [len(grad)])
                first = first + (grad - first) * one(1 - beta1)
                is_rowwise = isinstance(optimizer, PartialRowWiseAdam)
                square = mean_of_squares if is_rowwise else grad * grad
                second = second + (square - second) * one(1 - beta2)
                count = self.step + 1
                size = one(optimizer.lr * (1 - beta2**count) ** 0.5 / (1 - beta1**count))
                return weights - first / (
                    np.sqrt(second) + one(optimizer.eps)
                ) * size, np.concatenate([first, second])


def _in_order(parts: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def _sum_of_squares(grad: np.ndarray) -> np.float32:
    lanes = np.zeros(8, np.float32)
    for index, value in enumerate(grad):
        lanes[index % 8] += value * value
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
        (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
    )
