"""A profile of some steps of a run: every stage by name, in every thread.

The stages of an oracle process are in it, as those of a process "oracle".

Perfetto and chrome://tracing open the file. By default it holds ten steps, from twenty after the
run's start or resumption on: late enough to be steady, few enough for a viewer. A run too short for
that is traced from its middle on. Steps are a little slower while traced, the first of them most.
"""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bagpipe.errors import ConfigError
from bagpipe.feed.noted import NotedSpan, OracleSpans
from bagpipe.native.files import replaced
from bagpipe.native.spans import named_by


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace, and where to."""

    path: Path
    num_steps: int = 10
    after: int = 20  # steps of this run, not traced, before

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.after < 0:
            raise ConfigError(
                f"a trace of {self.num_steps} steps after {self.after}: must be at least 1 step "
                "after at least 0"
            )


class StepProfiler:
    """A context manager around the loop, told of each step's end.

    It writes the file after the last traced step, or at the end.
    """

    def __init__(
        self,
        options: TraceOptions | None,
        device: torch.device,
        num_steps: int,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Checks that the file can be written.

        Args:
            options: what to trace; without them nothing is.
            device: where the run computes.
            num_steps: how many are still to come.
            on_failure: told why a trace can't be written once it is taken, as on a full disk; the
                run is worth more than its trace.

        Raises:
            ConfigError: the file can't be written from the beginning.
        """
        self._options, self._device, self._on_failure = options, device, on_failure
        self._steps_done = 0
        self._stack = ExitStack()
        self._profile: profile | None = None
        self._threads: dict[int, str] = {}  # also those that end while they are traced
        self._oracle: OracleSpans | None = None
        if options is None:
            return
        self._first_step = options.after if options.after < num_steps else num_steps // 2
        try:
            options.path.parent.mkdir(parents=True, exist_ok=True)
            options.path.open("ab").close()
        except OSError as error:
            raise ConfigError(f"the trace {options.path} can't be written: {error}") from error

    def follow(self, oracle: OracleSpans | None) -> None:
        """Traces an oracle process, too, if there is one."""
        self._oracle = oracle
        if self._oracle is not None and self._profile is not None:
            self._oracle.begin()

    def step_done(self) -> None:
        """Starts or ends tracing where it is time to."""
        self._steps_done += 1
        self._start_where_due()
        if (
            self._options is not None
            and self._steps_done == self._first_step + self._options.num_steps
        ):
            self._end()

    def __enter__(self) -> Self:
        self._start_where_due()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _start_where_due(self) -> None:
        if self._options is None or self._steps_done != self._first_step:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (
            self._device.type == "cuda"
        )
        self._threads = _thread_names()
        all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._stack.enter_context(named_by(record_function))
        self._profile = self._stack.enter_context(
            # torch 2.11 warns of a second cycle unless it is to keep what the first has seen
            profile(activities=activities, experimental_config=all_threads, acc_events=True)
        )
        if self._oracle is not None:
            self._oracle.begin()

    def _end(self) -> None:
        if self._profile is None or self._options is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        noted = [] if self._oracle is None else self._oracle.end()
        self._stack.close()
        taken, self._profile = self._profile, None
        try:
            _write(taken, self._options.path, self._threads | _thread_names(), noted)
        except ConfigError as error:
            self._on_failure(f"no trace, the run goes on without it: {error}")


def _thread_names() -> dict[int, str]:
    """By the number that the system gives each thread."""
    threads = {each.native_id: each.name for each in threading.enumerate()}
    return {number: name for number, name in threads.items() if number is not None}


def _write(
    taken: profile, path: Path, thread_names: Mapping[int, str], noted: Sequence[NotedSpan]
) -> None:
    """Writes a trace that is whole, names its threads and has the oracle, or raises ConfigError.

    The profiler itself does not say that a disk is full, but leaves half a file.
    """
    with (
        replaced(path) as temporary,
        TemporaryDirectory(dir=path.parent, prefix=".trace-") as folder,
    ):
        plain = Path(folder) / "trace.json"
        taken.export_chrome_trace(str(plain))
        if not plain.exists() or not _ends_like_json(plain):
            raise OSError(0, "it was cut short; the disk may be full")
        trace = json.loads(plain.read_text(encoding="utf-8"))
        trace["traceEvents"] = [
            *_named(trace["traceEvents"], thread_names),
            *_oracle_events(noted, trace.get("baseTimeNanoseconds", 0)),
        ]
        plain.write_text(json.dumps(trace), encoding="utf-8")
        if path.suffix == ".gz":
            with plain.open("rb") as source, gzip.open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
        else:
            plain.replace(temporary)


def _named(events: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Any]:
    """With the events by which viewers name threads; the profiler calls them all "python"."""
    others = [event for event in events if not _names_one_of(event, names)]
    traced = {event["tid"]: event["pid"] for event in others if event.get("tid") in names}
    return others + [
        _name_event("thread_name", pid, tid, names[tid]) for tid, pid in traced.items()
    ]


def _name_event(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _oracle_events(noted: Sequence[NotedSpan], base_ns: int) -> list[dict[str, Any]]:
    """The events of an oracle process; those of a trace are in µs since `base_ns` of Unix time."""
    processes = {span.process_id for span in noted}
    threads = {(span.process_id, span.thread_id): span.thread for span in noted}
    return [
        *(_name_event("process_name", pid, 0, "oracle") for pid in processes),
        *(_name_event("thread_name", *ids, name) for ids, name in threads.items()),
        *(
            {
                "name": span.name,
                "cat": "user_annotation",
                "ph": "X",
                "pid": span.process_id,
                "tid": span.thread_id,
                "ts": (span.begin_ns - base_ns) / 1e3,
                "dur": (span.end_ns - span.begin_ns) / 1e3,
            }
            for span in noted
        ),
    ]


def _names_one_of(event: Mapping[str, Any], threads: Mapping[int, str]) -> bool:
    return event["name"] == "thread_name" and event.get("tid") in threads


def _ends_like_json(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")
