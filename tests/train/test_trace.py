"""A profile of some steps of a run: the right ones, with every stage, and never worth the run."""

from __future__ import annotations

import gzip
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.disks import files_of_at_most
from tests.train.runs import NUM_STEPS, Listener, small_config

from bagpipe.errors import ConfigError
from bagpipe.train.report import SilentReporter
from bagpipe.train.trace import TraceOptions
from bagpipe.train.trainer import train


def test_a_trace_names_the_stages_of_all_threads(tmp_path: Path) -> None:
    train(
        small_config(tmp_path, train={"steps": 40}),
        reporter=SilentReporter(),
        trace=TraceOptions(path=tmp_path / "traces" / "trace.json"),
    )
    events = json.loads((tmp_path / "traces" / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("bagpipe.")}
    assert names == {
        f"bagpipe.{stage}"
        for stage in (
            *("lookup", "dense", "update", "evict", "gather", "fetch", "plan", "write_back"),
            *("oracle.read", "oracle.dedup", "oracle.link", "oracle.plan"),
        )
    }
    threads = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    where = {event["name"]: threads[event["tid"]] for event in events if event["name"] in names}
    assert where["bagpipe.lookup"] == "MainThread"
    assert where["bagpipe.oracle.link"] == "bagpipe-reader"
    assert where["bagpipe.oracle.plan"] == "bagpipe-oracle"
    assert where["bagpipe.oracle.dedup"].startswith("bagpipe-")
    with pytest.raises(ConfigError, match="can't be written"):
        train(
            small_config(tmp_path),
            reporter=SilentReporter(),
            overwrite=True,
            trace=TraceOptions(path=tmp_path),
        )


def test_a_trace_has_the_stages_of_an_oracle_process(tmp_path: Path) -> None:
    train(
        small_config(tmp_path, train={"steps": 120}, cache={"oracle": "process"}),
        reporter=SilentReporter(),
        trace=TraceOptions(path=tmp_path / "trace.json", num_steps=40),
    )
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (oracle,) = {
        event["pid"]
        for event in events
        if event["name"] == "process_name" and event["args"]["name"] == "oracle"
    }
    threads = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name" and event["pid"] == oracle
    }
    spans = [event for event in events if event["pid"] == oracle and event["ph"] == "X"]
    where = {event["name"]: threads[event["tid"]] for event in spans}
    assert set(where) == {f"bagpipe.oracle.{stage}" for stage in ("read", "dedup", "link", "plan")}
    assert where["bagpipe.oracle.link"] == "bagpipe-reader"
    assert where["bagpipe.oracle.plan"] == "bagpipe-planner"
    assert where["bagpipe.oracle.dedup"].startswith("bagpipe-dedup")
    (whole,) = [event for event in events if event.get("cat") == "Trace"]
    for event in spans:
        assert event["dur"] > 0
        assert whole["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"]
    assert not [
        event
        for event in events
        if event["name"].startswith("bagpipe.oracle") and event["pid"] != oracle
    ]


class ShortOfDisk(Listener):
    """Lets no file grow beyond 2,000 bytes from a step on to another."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self._first, self._last, self._stack = first, last, ExitStack()

    def advance(self, step: int) -> None:
        if step == self._first:
            self._stack.enter_context(files_of_at_most(2_000))
        if step == self._last:
            self._stack.close()


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / "traces" / name
    path.parent.mkdir()
    path.write_bytes(b"older")
    listener = ShortOfDisk(9, 13)
    result = train(
        small_config(tmp_path / "run", checkpoint={"at_end": False}),
        reporter=listener,
        trace=TraceOptions(path=path, num_steps=3, after=8),
    )
    assert result.step == NUM_STEPS
    (told,) = [text for text in listener.said if text.startswith("no trace")]
    assert told.startswith(f"no trace, the run goes on without it: {path}: can't be written: ")
    assert path.read_bytes() == b"older"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("num_steps", "name"), [(1, "trace.json"), (7, "trace.json.gz")])
def test_a_short_run_is_traced_too(tmp_path: Path, num_steps: int, name: str) -> None:
    train(
        small_config(tmp_path, train={"steps": num_steps}),
        reporter=SilentReporter(),
        trace=TraceOptions(path=tmp_path / name),
    )
    content = (tmp_path / name).read_bytes()
    text = gzip.decompress(content) if name.endswith(".gz") else content
    events = json.loads(text)["traceEvents"]
    assert "bagpipe.dense" in {event["name"] for event in events}


def test_the_traced_steps_are_the_ones_asked_for(tmp_path: Path) -> None:
    options = TraceOptions(path=tmp_path / "trace.json", num_steps=3, after=1)
    train(small_config(tmp_path), reporter=SilentReporter(), trace=options)
    events = json.loads(options.path.read_text())["traceEvents"]
    # before and after rows are updated
    assert [event["name"] for event in events].count("bagpipe.dense") == 2 * 3
    with pytest.raises(ConfigError, match="0 steps after 20: must be at least 1"):
        TraceOptions(path=tmp_path / "trace.json", num_steps=0)
