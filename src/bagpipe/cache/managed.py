"""Tables in host memory that a GPU reads and writes itself, row by row.

It is CUDA's managed memory, told to stay on the host and to be mapped on the device. The driver
maps it there with large pages. Pinned memory is mapped with small ones, and a GPU then reaches
random rows of a large table at a third of the speed, because most of them miss its TLB
(docs/lab/direct-rows.md). The whole memory is touched once, in order: what is touched in random
order gets small pages, too.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bagpipe.errors import StoreError
from bagpipe.native.fork import check_same_process
from bagpipe.store import MemoryStore
from bagpipe.types import Float32Array, Group, UInt8Array

_MAX_SHARE = 0.5
"""Share of the free memory that tables may take: they take it at once, while those of other stores
take pages as rows are written."""
_MEMORY_INFO = Path("/proc/meminfo")
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of Linux's control groups, version 2 and 1, as a container sees its own."""
_DRIVER = "libcuda.so.1"
_ATTACH_GLOBAL, _PREFERRED_LOCATION, _ACCESSED_BY, _HOST = 1, 3, 5, -1
"""CU_MEM_ATTACH_GLOBAL, CU_MEM_ADVISE_SET_PREFERRED_LOCATION and CU_MEM_ADVISE_SET_ACCESSED_BY,
and CU_DEVICE_CPU."""
_CONCURRENT_ACCESS = 89
"""CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS."""
_PAGE_BYTES = 4096
_MAX_THREADS = 16
_logger = logging.getLogger("bagpipe.lookahead")


class ManagedStore(MemoryStore):
    """A `MemoryStore` whose records a GPU reads and writes itself.

    A forked process does not have its memory.
    """

    def __init__(self, group: Group, seed: int, allocate: Callable[[int], UInt8Array]) -> None:
        """Makes a store in what `allocate` returns for a number of bytes: zeros."""
        self._pid = os.getpid()
        super().__init__(group, seed, allocate=allocate)

    @property
    def records(self) -> Float32Array:
        """All records (num_rows, record_width); other memory after `clear`.

        What lies there for a row that was neither written nor materialized means nothing.
        """
        return self._open_arrays()[0]

    def _open_arrays(self) -> tuple[Float32Array, UInt8Array]:
        check_same_process(self._pid, "tables in memory that a GPU reads")
        return super()._open_arrays()


def memory_store_on(
    device: torch.device, groups: Sequence[Group]
) -> Callable[[Group, int], MemoryStore]:
    """What makes the groups' stores in memory: where possible in memory that the device reads.

    A device that can't read one group's tables moves no rows of the others either.
    """
    if device.type != "cuda":
        return MemoryStore
    reason = _refusal(sum(group.num_rows * group.record_bytes for group in groups), device)
    if reason is not None:
        _logger.info("threads of the host move rows of all tables, since %s", reason)
        return MemoryStore

    def make(group: Group, seed: int) -> MemoryStore:
        try:
            return ManagedStore(group, seed, partial(_allocate, device))
        except StoreError as error:
            _logger.warning(
                "threads of the host move rows of all tables, since %s", error.__cause__
            )
            return MemoryStore(group, seed)

    return make


def _refusal(num_bytes: int, device: torch.device) -> str | None:
    """Why a device can't read so many bytes itself; None: it can."""
    available = _available_bytes()
    if num_bytes > _MAX_SHARE * available:
        return (
            f"they take {num_bytes / 2**30:.1f} GiB, more than {_MAX_SHARE:.0%} of the "
            f"{available / 2**30:.1f} GiB of memory that are free"
        )
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        return f"the CUDA driver can't be loaded: {error}"
    is_able = ctypes.c_int(0)
    _make_current(device)
    driver.cuDeviceGetAttribute(ctypes.byref(is_able), _CONCURRENT_ACCESS, _number_of(device))
    return None if is_able.value else f"{device} can't read managed memory beside the host"


def _allocate(device: torch.device, num_bytes: int) -> UInt8Array:
    """Managed memory (num_bytes,) on the host, zeros, all of it there."""
    driver, address = ctypes.CDLL(_DRIVER), ctypes.c_uint64(0)
    _make_current(device)
    size = ctypes.c_size_t(max(num_bytes, 1))
    error = driver.cuMemAllocManaged(ctypes.byref(address), size, _ATTACH_GLOBAL)
    if error == 0:
        memory = (ctypes.c_ubyte * num_bytes).from_address(address.value)
        weakref.finalize(memory, _free, device, address.value, os.getpid()).atexit = False
        for advice, place in ((_PREFERRED_LOCATION, _HOST), (_ACCESSED_BY, _number_of(device))):
            error = error or driver.cuMemAdvise(address, size, advice, place)
    if error != 0:
        raise OSError(f"CUDA's driver has error {error} for managed memory on {device}")
    array: UInt8Array = np.ctypeslib.as_array(memory)
    _touch(array)
    return array


def _touch(memory: UInt8Array) -> None:
    """Writes a zero to each page, as many threads as there are cores a part each."""
    num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
    pages = memory[::_PAGE_BYTES]
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(lambda part: part.fill(0), np.array_split(pages, num_threads)))


def _free(device: torch.device, address: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has neither the memory nor a way to the device
        _make_current(device)
        ctypes.CDLL(_DRIVER).cuMemFree_v2(ctypes.c_uint64(address))


def _make_current(device: torch.device) -> None:
    """Makes the device the one that the driver's calls of this thread are about."""
    with torch.cuda.device(device):
        torch.empty(1, device=device)


def _number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _available_bytes() -> int:
    """Bytes of memory that programs may still take, as Linux estimates them; 0: it does not tell.

    A container's limit is less than what its machine has.
    """
    available = 0
    with suppress(OSError):
        for line in _MEMORY_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                available = 1024 * int(value.split()[0])
    for limit in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            available = min(available, int(limit.read_text()))
    return available
