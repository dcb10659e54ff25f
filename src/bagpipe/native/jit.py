"""One typed door to numba: compiled on first call, cached on disk, run without the GIL.

`parallel_jit` compiles loops over `prange`, which numba's own threads share; Python calls them
through `threaded`. A call costs microseconds, where parts handed to Python threads wait for the
GIL, up to 2 ms of a 3 ms step (docs/results.md). Where numba finds neither TBB nor OpenMP its calls
take turns, since its own threading layer must not be entered twice. Threads start at the first
call, not at import: with OpenMP a process that is forked after that can't use them (numba ends it
and says so), so a fork server may import this package but not train with it.

What a compiled function returns to Python is arrays, numbers and plain tuples of them. A named
tuple is made by Python code, where the handler of a signal may raise in the main thread, which
numba does not expect: the process would end by a segmentation fault. For arrays see below.

numba's cache knows a function by its own file. Compiled functions of other files are part of its
machine code, too: where one of those changes, the old code would run, and plan something else than
the source says. So functions are told apart by what their file holds and all that it has imported
(`_noted`). Processes that compile at the same time share the folder of compiled code, so its files
are read and written under a lock: numba saves a function's index before the code that it names.
"""

from __future__ import annotations

import fcntl
import hashlib
import marshal
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from numba.core import event, serialize, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu_options import ParallelOptions

# For each array that it returns a compiled function asks this for the array's type, and takes no
# error for an answer. It is Python code, where the handler of a signal may raise; once the answer
# is remembered it is not, unless something compiled has returned an array before this import.
serialize._numba_unpickle = lru_cache(maxsize=None)(serialize._numba_unpickle)

# A child that has half of what another thread was compiling is ended by LLVM when it frees it.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)

P = ParamSpec("P")
R = TypeVar("R")

prange = numba.prange
NUM_PARTS = 32
"""Into how many parts a parallel loop is cut: enough that a slow one does not matter."""
_NUM_CORES = os.cpu_count() or 1
NUM_THREADS = max(1, min(4, _NUM_CORES // 16))
"""How many threads share a loop.

Few: several loops run at a time, and threads that wait for their next one spin on a core each.
"""
NUM_STAGE_THREADS = max(2, min(4, _NUM_CORES // 8))
"""How many threads share a loop of a stage that would set the pace with fewer."""
NUM_MANY_THREADS = max(2, min(8, _NUM_CORES // 4))
"""How many threads share a loop that would not keep up otherwise."""
NUM_CRITICAL_THREADS = max(2, min(4, _NUM_CORES // 4))
"""How many threads share a loop of the stage that sets the pace."""
# a dict would be emptied by the first compilation
_ONLY_PRANGE: Any = ParallelOptions(
    dict.fromkeys(
        ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"),
        False,
    )
    | {"prange": True}
)
"""Has numba share nothing between threads but `prange` loops.

By itself it makes a parallel loop of every sum of 32 numbers, and each costs a meeting of threads.
"""
_STAMP = "_bagpipe_sources"
"""Where a compiled function keeps a hash of all sources that can be part of its machine code."""
_OF_THE_MACHINE = ("_THREADS", "_CORES")
"""How names of numbers end that depend on the machine's cores and are no part of machine code."""
_LOCK_NAME = "bagpipe.lock"
_cache_files: list[tuple[Any, ...]] = []
_found_on_disk: set[Any] = set()
_thread = threading.local()
_one_at_a_time = threading.Lock()
_waits_for_others = False
_may_overlap = False  # whether calls may run at a time: known after the first one


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles `function` with numba in nopython mode.

    Without fast-math, so that results are the same on every machine.
    """
    return _compiled(function)


def inline_jit(function: Callable[P, R]) -> Callable[P, R]:
    """As `jit`, for a few operations within a loop.

    They become part of the caller: a call in a loop would keep it from running over vectors.
    """
    compiled: Callable[P, R] = numba.njit(nogil=True, inline="always")(function)
    return _noted(compiled, function)


def parallel_jit(function: Callable[P, R]) -> Callable[P, R]:
    """As `jit`, with `prange` loops shared by threads; results must not depend on how.

    Only `threaded` functions may call it.
    """
    return _compiled(function, parallel=_ONLY_PRANGE)


def threaded(compiled: Callable[P, R], num_threads: int = NUM_THREADS) -> Callable[P, R]:
    """The door from Python to a compiled function that is, or calls, a `parallel_jit` one."""
    num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

    @wraps(compiled)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        global _may_overlap
        # numba keeps the number for each calling thread, and setting it costs more than asking here
        if getattr(_thread, "num_threads", None) != num_threads:
            numba.set_num_threads(num_threads)
            _thread.num_threads = num_threads
        if _may_overlap:
            return compiled(*args, **kwargs)
        with _one_at_a_time:
            result = compiled(*args, **kwargs)
            _may_overlap = numba.threading_layer() != "workqueue"  # type: ignore[attr-defined]
        return result

    return call


def _compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Compiles a function for calls from Python, and by itself for those from compiled functions.

    Most functions have callers of one kind only. Without code that unpacks Python's objects and
    packs them again, compiling takes a fifth less.
    """
    options |= {"nogil": True, "cache": True, "no_cfunc_wrapper": True}
    njit: Any = numba.njit  # its types know nothing of wrappers
    door, inner = njit(**options)(function), njit(**options, no_cpython_wrapper=True)(function)
    # numba asks the door of a function that compiled code calls: the inner one answers, for numbers
    # that are constants as for others, where numba would compile once for each
    plain: Any = types.unliteral
    door.get_call_template = lambda args, kws: inner.get_call_template(
        tuple(map(plain, args)), {name: plain(kind) for name, kind in kws.items()}
    )
    door.get_overload = inner.get_overload
    inner_file = inner._cache._cache_file
    inner_file._index_name = f"inner.{inner_file._index_name}"
    inner_file._index_path = os.path.join(inner_file._cache_path, inner_file._index_name)
    inner_file._data_name_pattern = f"inner.{inner_file._data_name_pattern}"
    files = inner_file, door._cache._cache_file
    for file in files:
        file.save = _locked(file.save, file, fcntl.LOCK_EX)
        file.load = _locked(file.load, file, fcntl.LOCK_SH)
    _cache_files.append(files)
    compiled: Callable[P, R] = door
    return _noted(compiled, function, *files)


def _noted(compiled: Callable[P, R], function: Callable[P, R], *files: Any) -> Callable[P, R]:
    """Has a function's files of code ask what the function depends on, not how old its own file is.

    It depends on its file, and on all compiled functions and numbers that the file has imported,
    used or not: imports come first, so they are known by now.
    """
    values = (
        (name, _content(value))
        for name, value in function.__globals__.items()
        if not name.endswith(_OF_THE_MACHINE)
    )
    imported = sorted(f"{name}={content}" for name, content in values if content is not None)
    source = "\n".join([_source_hash(function.__code__), *imported])
    stamp = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    setattr(compiled, _STAMP, stamp)
    for file in files:
        file._source_stamp = stamp
    return compiled


def _locked(call: Callable[P, R], cache_file: Any, kind: int) -> Callable[P, R]:
    """`call` under the lock of the folder of compiled code."""

    @wraps(call)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock(Path(cache_file._cache_path) / _LOCK_NAME, kind):
            return call(*args, **kwargs)

    return locked


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    """Holds a file's lock, shared or exclusive as `kind` says."""
    try:
        file = path.open("a")
    except OSError:  # there is no such folder yet, or it is read only: then nobody writes there
        yield
        return
    with file:
        fcntl.flock(file, kind)
        yield


class _Listener(event.Listener):
    """Counts compilations in hand; one within another, too. numba holds its lock meanwhile."""

    num_in_hand = 0

    def on_start(self, _: object) -> None:
        self.num_in_hand += 1

    def on_end(self, _: object) -> None:
        self.num_in_hand -= 1


_listener = _Listener()
event.register("numba:compile", _listener)


def is_compiling() -> bool:
    """Whether a thread of this process compiles now, or waits for a process that does.

    Reading code from disk does not count.
    """
    return _listener.num_in_hand > 0 or _waits_for_others


@contextmanager
def compiling_elsewhere() -> Iterator[None]:
    """Marks that this process waits for others that compile for it; for one thread at a time."""
    global _waits_for_others
    _waits_for_others = True
    try:
        yield
    finally:
        _waits_for_others = False


def is_on_disk(compiled: Callable[..., object]) -> bool:
    """Whether machine code of a compiled function is on disk, for any argument types.

    True, too, for functions whose code numba never keeps.
    """
    dispatcher: Any = (
        compiled if hasattr(compiled, "_cache") else getattr(compiled, "__wrapped__", compiled)
    )
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    return cache_file is None or bool(cache_file._load_index())


def count_compiled() -> tuple[int, int]:
    """How many imported compiled functions have machine code on disk, and how many there are.

    Any process may have put it there. A run needs most of them, seldom all.
    """
    for files in [each for each in _cache_files if each not in _found_on_disk]:
        if any(file._load_index() for file in files):
            _found_on_disk.add(files)
    return len(_found_on_disk), len(_cache_files)


def _content(value: object) -> str | None:
    """What of a global value goes into machine code; None for what does not."""
    if isinstance(value, int | float | np.generic):
        return repr(value)
    generator = getattr(value, "_defn", None)  # of one of numba's intrinsics
    stamp: str | None = getattr(value, _STAMP, None)
    return stamp if generator is None else _source_hash(generator.__code__)


@lru_cache
def _source_hash(code: CodeType) -> str:
    """A hash of the file that holds `code`; of `code` where it can't be read, as in an archive."""
    try:
        source = Path(code.co_filename).read_bytes()
    except OSError:
        source = marshal.dumps(code)
    return hashlib.blake2b(source, digest_size=16).hexdigest()


@jit
def part_bounds(part: int, num_items: int) -> tuple[int, int]:
    """Where one of `NUM_PARTS` parts of a loop begins and ends."""
    return part * num_items // NUM_PARTS, (part + 1) * num_items // NUM_PARTS
