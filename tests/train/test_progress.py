"""What a person is told during a run, with a terminal and without."""

from __future__ import annotations

import io
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.soon import wait_until
from tests.train.runs import NUM_STEPS, Listener, small_config

import bagpipe
from bagpipe.embeddings.batches import Lookahead
from bagpipe.native import jit
from bagpipe.train.progress import ConsoleReporter
from bagpipe.train.report import SilentReporter, StepAverages, line_of
from bagpipe.train.trainer import train

NUMBERS = StepAverages(
    loss=0.5,
    examples_per_s=1234.0,
    hit_rate=0.75,
    wait_plan_ms=1.5,
    wait_rows_ms=2.5,
    wait_slots_ms=3.5,
    wait_replicas_ms=4.5,
)


class Lines(io.StringIO):
    """A file that tells when so many lines with a word are in it."""

    def wait_for(self, word: str, count: int = 1) -> str:
        wait_until(
            lambda: sum(word in line for line in self.getvalue().splitlines()) >= count,
            self.getvalue,
        )
        return self.getvalue()


def test_without_a_terminal_a_plain_line_comes_by_itself() -> None:
    file = Lines()
    with ConsoleReporter(Console(file=file, width=200), line_every_s=0.02) as reporter:
        file.wait_for("preparing")
        reporter.start(0, 10)
        file.wait_for("0/10 -/s loss - hit - wait -", count=2)  # nothing is done, and it is told
        reporter.advance(3)
        reporter.show(NUMBERS)
        file.wait_for("3/10 1,234/s loss 0.5000 hit 75.0% wait 12.0 ms (replicas)")
        reporter.evaluating(1, 3)
        file.wait_for("1/3 batches evaluated")
    assert "\x1b" not in file.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "bagpipe-progress"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_line_fits_80_columns(is_terminal: bool) -> None:
    file = Lines()
    console = Console(file=file, force_terminal=is_terminal, width=80)
    with ConsoleReporter(console, line_every_s=0.02) as reporter:
        reporter.start(0, 100_000)
        reporter.show(replace(NUMBERS, examples_per_s=1_234_567.0))
        reporter.advance(12_345)
        text = file.wait_for("12345/100000")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    lines = [line.rstrip() for line in plain.splitlines() if "/100000" in line]
    assert any("1,235k/s loss 0.5000 hit 75.0% wait 12.0 ms (replicas)" in line for line in lines)
    assert max(map(len, plain.splitlines())) <= 80


def test_a_wait_that_is_none_has_no_reason() -> None:
    waits = dict.fromkeys(("wait_rows_ms", "wait_slots_ms", "wait_replicas_ms"), 0.0)
    assert line_of(replace(NUMBERS, **waits)).endswith("wait 1.5 ms (plan)")
    assert line_of(replace(NUMBERS, wait_plan_ms=0.01, **waits)).endswith("wait 0.0 ms")


def test_a_terminal_has_its_live_line_alone() -> None:
    file = Lines()
    console = Console(file=file, force_terminal=True, width=200)
    with ConsoleReporter(console, line_every_s=0.01) as reporter:
        reporter.start(0, 10)
        threading.Event().wait(0.1)
        assert "preparing" not in file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_compiling_is_told_and_how_far_it_is(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagpipe.train.progress._COMPILING_IS_TOLD_AFTER_S", 0.0)
    monkeypatch.setattr("bagpipe.train.progress.count_compiled", lambda: (12, 90))
    file = Lines()
    console = Console(file=file, force_terminal=is_terminal, width=200)
    with ConsoleReporter(console, line_every_s=0.02) as reporter:
        reporter.start(0, 10)
        monkeypatch.setattr(jit._listener, "num_in_hand", 1)
        file.wait_for("compiling loops, once: 12 of at most 90")
        file.wait_for("further runs on this machine start at once")
        monkeypatch.setattr(jit._listener, "num_in_hand", 0)
    assert file.getvalue().count("further runs") == 1
    assert "compiling" not in file.getvalue().splitlines()[-1]


def test_the_last_rate_is_taken_before_the_stream_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing writes all rows back, which is not training."""
    seen: list[str] = []
    close = Lookahead.close

    def noted_close(self: Lookahead[Any]) -> None:
        seen.append("closed")
        close(self)

    class Listener(SilentReporter):
        def show(self, averages: StepAverages) -> None:
            seen.append("shown")

    monkeypatch.setattr(Lookahead, "close", noted_close)
    config = small_config(tmp_path, log={"folder": str(tmp_path), "every_steps": 10})
    train(config, reporter=Listener())
    assert seen[: -(-NUM_STEPS // 10)] == ["shown"] * 3
    assert "shown" not in seen[seen.index("closed") :]


def test_a_run_says_what_it_is_and_logs_all_under_the_packages_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    config = small_config(
        tmp_path, cache={"size": "auto"}, train={"steps": 3}, checkpoint={"at_end": False}
    )
    with caplog.at_level(logging.INFO, logger="bagpipe"):
        train(config, reporter=listener)
    text = "\n".join(listener.said)
    num_rows = sum(config.data.num_embeddings)
    for fact in (
        f"bagpipe {bagpipe.__version__} on cpu ({torch.get_num_threads()} threads); torch ",
        f"tables: 3 with {num_rows:,} rows, ",
        f"model: {config.model.kind}, ",
        f" parameters; 3 steps of {config.train.batch_size:,} samples",
        f"cache: {num_rows:,} rows (100.00%), ",
        f'chosen by "auto"; lookahead {config.cache.lookahead}, prefetch depth 2',
    ):
        assert fact in text
    logged = [record.getMessage() for record in caplog.records if record.name == "bagpipe.train"]
    assert set(listener.said) < set(logged)
    assert any(re.match(r"step 3: [\d,]+/s loss \d\.\d{4} hit ", line) for line in logged)
