"""The door to numba: what is compiled is what the sources say, whichever of them has changed."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any, cast, get_args, get_type_hints

import numba
import numpy as np
import pytest
from tests.soon import SOON_S, TIMEOUT_S

import bagpipe
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.native.jit import jit
from bagpipe.optimizers import SGD
from bagpipe.oracle import ranks
from bagpipe.oracle.eviction import loops
from bagpipe.topology import Topology
from bagpipe.types import Jagged, TableConfig, group_tables

NUMBERS = "from bagpipe.native.jit import jit, inline_jit\nLIMIT = {limit}\n"
INNER = (
    "from numbers_of import LIMIT\nfrom bagpipe.native.jit import jit\n"
    "@jit\ndef inner(x):\n    return x + {added} + LIMIT\n"
)
OUTER = """
from bagpipe.native.jit import jit
from inner_of import inner

@jit
def outer(x):
    return _helper(x)

@jit
def _helper(x):
    return inner(x)

if __name__ == "__main__":
    print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def run(folder: Path, *, added: int = 1, limit: int = 10) -> str:
    """What the program prints; its files always have the same size and age."""
    files = {
        "numbers_of.py": NUMBERS.format(limit=limit),
        "inner_of.py": INNER.format(added=added),
        "outer_of.py": OUTER,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
        os.utime(folder / name, (1_700_000_000, 1_700_000_000))
    return subprocess.run(
        [sys.executable, "outer_of.py"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(folder / "cache"),
        },
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("change", "expected"), [({"added": 2}, "13 0"), ({"limit": 20}, "22 0"), ({}, "12 1")]
)
def test_a_change_in_another_file_compiles_its_callers_anew(
    tmp_path: Path, change: dict[str, int], expected: str
) -> None:
    assert run(tmp_path) == "12 0"
    assert run(tmp_path, **change) == expected


def test_what_compiled_code_calls_is_compiled_once_and_for_python_when_python_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is read from disk compiles nothing that it calls
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @jit
    def add_one(number: int) -> int:
        return number + 1

    @jit
    def add_two(number: int) -> int:
        return add_one(number) + add_one(0)

    door = cast(Any, add_one)
    assert add_two(1) == 3
    assert len(door.get_overload.__self__.signatures) == 1
    assert door.signatures == []
    assert add_one(1) == 2
    assert len(door.signatures) == 1


COUNTED = """
import sys
from bagpipe.native import jit as _jit
from inner_of import inner
from numba.core import event

seen = []
class Spy(event.Listener):
    def on_start(self, happened):
        seen.append(_jit.is_compiling())
    def on_end(self, happened):
        pass
event.register("numba:compile", Spy())

total = _jit.count_compiled()[1]
before = _jit.count_compiled()[0]
inner(1)
after = _jit.count_compiled()
print(after[0] - before, after[1] == total, any(seen), _jit.is_compiling())
"""


def test_compilations_are_counted_whichever_process_made_them(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "outer_of.py").write_text(COUNTED)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "other")}
    told = [
        subprocess.run(
            [sys.executable, "outer_of.py"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert told == [["1", "True", "True", "False"], ["0", "True", "False", "False"]]


def test_a_function_is_not_read_between_the_writing_of_its_index_and_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes do that compile: an index may name the code of another signature."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def add_one(x: int) -> int:
        return x + 1

    writer, reader = (cast(Any, jit(add_one))._cache._cache_file for _ in range(2))
    os.makedirs(writer._cache_path, exist_ok=True)
    is_between, may_go_on = threading.Event(), threading.Event()
    save_data = writer._save_data

    def save_urgent(*arguments: object) -> None:
        is_between.set()
        may_go_on.wait(TIMEOUT_S)
        save_data(*arguments)

    writer._save_data = save_urgent
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(writer.save, "key", "code")
        assert is_between.wait(SOON_S)
        reading = pool.submit(reader.load, "key")
        with pytest.raises(TimeoutError):
            reading.result(0.2)
        may_go_on.set()
        writing.result(SOON_S)
        assert reading.result(SOON_S) == "code"


def compiled_of(function: Any) -> Any:
    """Without the door of `threaded`."""
    is_door = isinstance(function, FunctionType)
    return getattr(function, "__wrapped__", None) if is_door else function


def compiled_functions() -> Iterator[Any]:
    for module in pkgutil.walk_packages(bagpipe.__path__, "bagpipe."):
        if module.name.startswith("bagpipe.oracle.") or module.name.startswith("bagpipe.store."):
            for value in vars(importlib.import_module(module.name)).values():
                function = compiled_of(value)
                if hasattr(function, "py_func"):
                    yield function.py_func


def test_no_compiled_function_returns_a_named_tuple() -> None:
    found = {function.__qualname__: function for function in compiled_functions()}
    assert {"plan", "plan_exchanges", "_gather"} <= set(found)
    for name, function in found.items():
        pending = [get_type_hints(function)["return"]]
        while pending:
            kind = pending.pop()
            assert not hasattr(kind, "_fields"), f"{name} returns {kind}"
            pending += get_args(kind)


@pytest.mark.parametrize("num_trainers", [1, 2])
def test_a_compiled_call_runs_no_python_in_which_a_signal_could_raise(
    num_trainers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(function: Any) -> Any:
        compiled = compiled_of(function)

        def call(*arguments: Any) -> Any:
            sys.settrace(lambda frame, event, argument: seen.append(frame.f_code))
            try:
                return compiled(*arguments)
            finally:
                sys.settrace(None)

        return call

    topology = Topology(
        num_trainers=num_trainers,
        ranks=tuple(range(num_trainers)),
        num_replica_slots=(60,) * (num_trainers > 1),
    )
    batches = [
        Jagged(keys=("f",), values=np.arange(40) * number % 99, batch_size=40)
        for number in range(1, 8)
    ]
    groups = group_tables(
        [TableConfig(name="t", num_embeddings=99, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    options = StreamOptions(groups=groups, num_slots=(60,), lookahead=2, topology=topology)
    list(plan_stream(batches, options))  # compiles, which is Python
    monkeypatch.setattr(loops, "plan", watched(loops.plan))
    monkeypatch.setattr(ranks, "plan_exchanges", watched(ranks.plan_exchanges))
    assert len(list(plan_stream(batches, options))) == len(batches)
    assert seen == []
