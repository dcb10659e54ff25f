"""Whether batches still hold what their loader yielded.

Batches are read ahead, so a loader that fills the same buffers again changes batches that wait for
their turn: they would be trained with another batch's labels, or with a plan for other ids. So a
batch is sealed when it is read, before the loader is asked for the next one: what its arrays hold
is hashed, and compared when the batch is handed out. A batch may also be changed later, in its
step; then the loader has yielded the same memory again before the step is over (`OpenBatches`).

Looked at are numpy arrays, tensors, buffers and lists of numbers, in mappings, sequences, named
tuples, KeyedJaggedTensors and the public attributes of objects. A hash takes 0.1 ms a MB.
"""

from __future__ import annotations

import array
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import xxhash

from bagpipe.errors import DataError
from bagpipe.jagged import is_keyed

_MAX_DEPTH = 6
_BUFFERS = (bytearray, memoryview, array.array)
_NO_DATA = (
    str,
    bytes,
    int,
    float,
    complex,
    np.generic,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
)


class Seal:
    """What a batch held when it was sealed."""

    def __init__(self, batch: Any, step: int) -> None:
        self.step = step
        self._batch = batch
        self._digests: dict[str, int] = {}
        self.addresses = [id(batch)]
        """Where the batch and its arrays begin in memory."""
        for path, leaf in _leaves(batch):
            digest = _digest(leaf)
            if digest is not None:
                self._digests[path] = digest
                self.addresses.append(_address(leaf))

    def change(self) -> str | None:
        """Says what of the batch has changed and what to do about it; None if nothing has."""
        for path, leaf in _leaves(self._batch):
            if path in self._digests and _digest(leaf) not in (None, self._digests[path]):
                return f"{path} {_CHANGED}"
        return None

    def check(self) -> None:
        """Raises DataError where the batch has changed."""
        change = self.change()
        if change is not None:
            raise DataError(f"step {self.step}: {change}")


_CHANGED = (
    "holds something else than when the loader yielded it. Batches are read ahead, and each must "
    "stay as it is until its step is over: yield new arrays, or copies (array.copy(), "
    "tensor.clone()), and not the same buffers again"
)


class OpenBatches:
    """The batches of a stream that are read and whose steps are not over.

    The loader must not use their memory again. `add` and `forget_ended` are called by the reader,
    `check` and `end` by whoever hands out, in threads of their own.
    """

    def __init__(self) -> None:
        self._first_open = 0
        self._seals: deque[Seal] = deque()
        self._by_address: dict[int, Seal] = {}
        self._changes: dict[int, str] = {}
        """By step: what has changed in open batches whose memory the loader has yielded again."""

    def check(self, step: int) -> None:
        """Raises DataError where the loader has changed the batch of `step` or one before."""
        for changed in sorted(self._changes.copy()):
            if changed <= step:
                raise DataError(f"step {changed}: {self._changes[changed]}")

    def end(self, step: int) -> None:
        """Checks as `check` does, and notes that the step is over."""
        self.check(step)
        self._first_open = step + 1

    def forget_ended(self) -> None:
        """Forgets batches whose steps are over, just before the loader is asked for more.

        It may use their memory again.
        """
        while self._seals and self._seals[0].step < self._first_open:
            seal = self._seals.popleft()
            for address in seal.addresses:
                if self._by_address.get(address) is seal:
                    del self._by_address[address]

    def add(self, seal: Seal) -> None:
        """Takes the batch that was read last; notes each open batch that it has overwritten.

        That two open batches share memory is the loader's doing, never chance: they are held here,
        so their memory can't have been freed.
        """
        for other in {self._by_address.get(address) for address in seal.addresses}:
            if other is not None and other.step not in self._changes:
                change = other.change()
                if change is not None:
                    self._changes[other.step] = change
        self._seals.append(seal)
        self._by_address |= dict.fromkeys(seal.addresses, seal)


def _leaves(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yields each array, tensor, buffer and sequence of numbers once, behind its path."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("batch", batch, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if value is None or isinstance(value, _NO_DATA) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (np.ndarray, *_BUFFERS)) or _is_tensor(value) or _is_numbers(value):
            yield path, value
        elif depth < _MAX_DEPTH:
            inner = [(path + place, part, depth + 1) for place, part in _parts(value)]
            waiting += reversed(inner)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """The parts of a container or an object, each behind how Python names it."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in list(value.items())]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if is_keyed(value):  # whose attributes are filled as they are asked for
        names = ("values", "offsets", "weights_or_none")
        methods = [(name, getattr(value, name, None)) for name in names]
        return [(f".{name}()", method()) for name, method in methods if callable(method)]
    slots = [
        name
        for kind in type(value).__mro__
        for name in _names(kind.__dict__.get("__slots__", ()))
        if hasattr(value, name)
    ]
    names_here = [*getattr(value, "__dict__", ()), *slots]
    return [(f".{name}", getattr(value, name)) for name in names_here if not name.startswith("_")]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and isinstance(value[0], (int, float, complex, np.generic))
    )


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # where it is not loaded there is none
    return torch is not None and isinstance(value, torch.Tensor)


def _digest(leaf: Any) -> int | None:
    """A hash of what a leaf holds; None where that can't be seen."""
    if isinstance(leaf, (list, tuple)):
        try:
            return hash(tuple(leaf))
        except TypeError:
            return None
    if _is_tensor(leaf):
        return _digest_of_tensor(leaf)
    values = np.ascontiguousarray(leaf)
    if values.dtype.hasobject or values.dtype.kind == "T":  # addresses, not what is there
        return None
    return xxhash.xxh3_64_intdigest(values.reshape(-1).view(np.uint8).data)


def _digest_of_tensor(tensor: Any) -> int | None:
    torch: Any = sys.modules["torch"]
    if not tensor.is_cpu or tensor.layout != torch.strided:
        # torch counts writes, and reading it would make the host wait for the device
        return None if tensor.is_inference() else int(tensor._version)
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return xxhash.xxh3_64_intdigest(plain.view(-1).view(torch.uint8).numpy())


def _address(leaf: Any) -> int:
    """Where a leaf's memory begins; for a list, and for what is not on the CPU, its `id`."""
    if isinstance(leaf, np.ndarray):
        return int(leaf.__array_interface__["data"][0])
    if _is_tensor(leaf) and leaf.is_cpu and leaf.layout == sys.modules["torch"].strided:
        return int(leaf.data_ptr())
    return id(leaf)
