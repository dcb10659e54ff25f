"""A profile of some steps of a run, as a file that Perfetto and chrome://tracing open: every stage by name, in every thread."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from bagpipe.cache.spans import tracing
from bagpipe.errors import ConfigError

FIRST_STEP, NUM_STEPS = 20, 10
"""Steps of the run, counted from its start or resumption, that are traced: late enough to be steady. Short runs start halfway."""


class Trace:
    """A context manager around the loop, told of each step's end. Writes the file after the last traced step, or at the end."""

    def __init__(self, path: Path | None, device: torch.device, num_steps: int) -> None:
        """Does nothing without a `path`. `num_steps` are still to come. ConfigError: the file can't be written."""
        self._path, self._device = path, device
        self._first_step = min(FIRST_STEP, num_steps // 2)
        self._steps_done = 0
        self._stack = ExitStack()
        self._profile: profile | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("ab").close()
            except OSError as error:
                raise ConfigError(f"the trace {path} can't be written: {error}") from error

    def step_done(self) -> None:
        """Starts or ends tracing where it is time to."""
        self._steps_done += 1
        if self._steps_done == self._first_step:
            self._start()
        elif self._steps_done == self._first_step + NUM_STEPS:
            self._end()

    def __enter__(self) -> Self:
        if self._first_step == 0:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _start(self) -> None:
        if self._path is None:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._stack.enter_context(tracing())
        self._profile = self._stack.enter_context(profile(activities=activities, experimental_config=all_threads))

    def _end(self) -> None:
        if self._profile is None or self._path is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._stack.close()
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
