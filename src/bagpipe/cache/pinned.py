"""Memory of others that a GPU may copy with directly: registered once, and let go before it goes.

CUDA refuses to register a page twice, and a refusal stays behind as the thread's last error, which
the next call of torch would raise as its own. So ranges are kept, and an error is cleared at once.
What is registered is held: it can't be unmapped before it is unregistered.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Protocol

import torch

from bagpipe.types import Float32Array, UInt8Array

_log = logging.getLogger(__name__)


class Registrar(Protocol):
    """What registers memory with a device."""

    def register(self, address: int, num_bytes: int) -> str | None:
        """Registers a range; returns why it was refused, and leaves no error behind."""

    def unregister(self, address: int) -> None:
        """Lets a range go that begins there; the device must be done with it."""


class CudaRegistrar:
    """A CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> str | None:
        """See `Registrar.register`."""
        with torch.cuda.device(self._device):  # each thread has one, 0 by default
            error = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
            if int(error) == 0:
                return None
            self._clear_error()
        return str(torch.cuda.CudaError(int(error)))

    def unregister(self, address: int) -> None:
        """See `Registrar.unregister`."""
        with torch.cuda.device(self._device):
            error = torch.cuda.cudart().cudaHostUnregister(address)
            if int(error) != 0:
                self._clear_error()

    def _clear_error(self) -> None:
        # torch looks for an error behind each kernel; who raises it takes it away
        with suppress(RuntimeError):
            torch.empty(1, device=self._device).fill_(0.0)


class PinnedMemory:
    """Ranges of memory that are registered. Any thread may call it."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._lock = threading.Lock()
        self._held: dict[int, UInt8Array | Float32Array] = {}  # by address
        self._was_told = False

    def pin(self, memory: UInt8Array | Float32Array) -> bool:
        """Registers a contiguous array, unless it lies in one that is registered.

        Returns:
            Whether the device may copy with it. Where not, it goes through pinned memory of
            torch's, at one copy more; the first reason is logged.
        """
        begin, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        with self._lock:
            for known, held in self._held.items():
                if known <= begin and end <= known + held.nbytes:
                    return True
            reason = self._registrar.register(begin, memory.nbytes)
            if reason is None:
                self._held[begin] = memory
                return True
            was_told, self._was_told = self._was_told, True
        if not was_told:
            _log.warning(
                "the system pins no %d bytes of shared memory (%s): records and plans are copied "
                "once more on their way to the GPU; raise the limit of locked memory (ulimit -l)",
                memory.nbytes,
                reason,
            )
        return False

    def unpin(self) -> None:
        """Lets all ranges go; the device must be done with them."""
        with self._lock:
            for address in list(self._held):
                self._registrar.unregister(address)
                del self._held[address]
