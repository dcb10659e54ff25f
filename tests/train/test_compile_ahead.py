"""Processes that compile for a machine's first run: they compile what the run needs, and nothing
depends on them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.soon import SOON_S
from tests.train.runs import NUM_STEPS, Listener, small_config

from bagpipe.native import jit
from bagpipe.train import compile_ahead
from bagpipe.train.compile_ahead import compiled_ahead
from bagpipe.train.trainer import train

COVERED = """
import sys
from pathlib import Path
from tests.train.runs import Listener, small_config
from bagpipe.oracle import linker
from bagpipe.oracle.dedup import _dedup
from bagpipe.oracle.eviction import loops
from bagpipe.store import array
from bagpipe.train.compile_ahead import compile_planning, compile_the_rest
from bagpipe.train.trainer import train

functions = [
    *(loops.plan.__wrapped__, loops.admit, _dedup, linker._link.__wrapped__),
    *(linker._forget, linker._copy_ring, array._gather, array._scatter),
]
compile_planning()
compile_the_rest()
before = [list(function.signatures) for function in functions]
assert all(before)
train(small_config(Path(sys.argv[1])), reporter=Listener())
after = [list(function.signatures) for function in functions]
other = [set(new) - set(old) for old, new in zip(before, after)]
assert not any(other), other
"""


def test_the_parts_compile_for_the_types_of_a_run(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", COVERED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_only_what_is_not_on_disk_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ahead.compile_planning()
    compile_ahead.compile_the_rest()
    assert compile_ahead._parts_to_compile() == []
    monkeypatch.setattr("bagpipe.train.compile_ahead.is_on_disk", lambda _: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert compile_ahead._parts_to_compile() == ["planning", "rest"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert compile_ahead._parts_to_compile() == []


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import time; time.sleep(600)"])
def test_a_run_does_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(part: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", program]))
        return started[-1]

    monkeypatch.setattr("bagpipe.train.compile_ahead._parts_to_compile", lambda: ["planning"])
    monkeypatch.setattr("bagpipe.train.compile_ahead._start", start)
    monkeypatch.setattr("bagpipe.train.compile_ahead._LIMIT_S", 1.0)
    result = train(small_config(tmp_path), reporter=Listener())
    assert result.step == NUM_STEPS
    assert [process.poll() is not None for process in started] == [True]


def test_it_is_told_that_others_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Process:
        def wait(self, timeout: float | None = None) -> int:
            told.append(jit.is_compiling())
            return 0

        def kill(self) -> None:
            pass

    monkeypatch.setattr("bagpipe.train.compile_ahead._parts_to_compile", lambda: ["planning"])
    monkeypatch.setattr("bagpipe.train.compile_ahead._start", lambda _: Process())
    with compiled_ahead() as wait:
        assert not jit.is_compiling()
        wait()
        assert not jit.is_compiling()
    assert told[0]


def test_the_program_runs_a_part() -> None:
    process = compile_ahead._start("rest")
    assert process.wait(SOON_S) == 0
