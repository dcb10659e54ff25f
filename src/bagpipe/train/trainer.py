"""A run from a configuration: everything that the loop uses is made, then the loop trains."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bagpipe.checkpoint.checkpoints import (
    SavedRun,
    environment,
    load_checkpoint,
    load_moment,
)
from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.checkpoint.run_folder import told_before
from bagpipe.config.run import RunConfig
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.distributed.trainers import Launcher, Trainers
from bagpipe.train.build import Run, build_run, choose_device
from bagpipe.train.compile_ahead import compiled_ahead
from bagpipe.train.cuts import Cuts
from bagpipe.train.logs import NoLog, RunLog
from bagpipe.train.loop import Loop, Result
from bagpipe.train.report import LoggedReporter, Reporter
from bagpipe.train.saving import Saving
from bagpipe.train.servers import joined_servers
from bagpipe.train.settings import check_same_run, describe_start
from bagpipe.train.start import Start, Starting
from bagpipe.train.start_from import StartFrom, find_source
from bagpipe.train.trace import StepProfiler, TraceOptions


def train(
    config: RunConfig,
    *,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
    start_from: Path | None = None,
    trace: TraceOptions | None = None,
    stop: StopRequest | None = None,
    peers: Peers = ALONE,
    launcher: Launcher | None = None,
) -> Result:
    """Trains to the end of the configuration, or to the step at which SIGINT or SIGTERM comes.

    With several trainers rank 0 logs and traces. It also saves, on several hosts together with the
    first rank of each. All share each batch, also those of an evaluation, so that their number
    changes no more than the order of sums.

    Args:
        config: the run.
        reporter: told about progress; so is the logger "bagpipe.train", at level INFO.
        resume: whether to go on from the newest valid checkpoint in the run's folder; where there
            is none, the run starts afresh and says so.
        overwrite: whether a fresh run may remove the checkpoints of an earlier one.
        start_from: the folder of another run, or a checkpoint of it, with whose tables and dense
            part a fresh run starts. A run that has a checkpoint to resume from needs it no more.
        stop: asks it to end; by default SIGINT and SIGTERM do.
        trace: which steps to profile, and where to write that.
        peers: the other trainers; by default none.
        launcher: what has started them, if it starts them again when they fail. It does not once
            another start has taken the run over.

    Raises:
        ConfigError: a setting is wrong, or the folder holds an earlier run and neither `resume` nor
            `overwrite` is set.
        DataError: the data are wrong.
        CheckpointError: none can be resumed from, or the last one can't be written.
        LossError: the loss is not finite.
        TakenOverError: a newer start goes on with the run over its shard servers.
    """
    trainers, reporter = Trainers(peers), LoggedReporter(reporter)
    has_servers = config.servers is not None or peers.has_others
    starting = Starting(
        config=config,
        trainers=trainers,
        reporter=reporter,
        resume=resume,
        overwrite=overwrite,
        is_from_another=start_from is not None,
        takes_over=has_servers,
        launcher=launcher,
    )
    with ExitStack() as stack:
        trainers.wait("all ranks to start")  # no start takes the run over unless it is whole
        device = choose_device(config.train.device, peers)
        own = {
            "resume": resume,
            "from": None if start_from is None else str(start_from),
            "device": device.type,
            "torch": environment()["torch"],
        }
        check_same_run(peers, {**describe_start(config), **own})
        stack.enter_context(starting.takeover_told())
        source = None
        if start_from is not None and not (resume and starting.has_checkpoints()):
            source = find_source(start_from, config, trainers, reporter)

        def claim() -> Start:
            return stack.enter_context(starting.claimed())

        start, join = None, None
        if not has_servers:
            start = claim()
        else:
            starting.check()
            join = partial(joined_servers, config, claim=claim, trainers=trainers)
        ready = (lambda: None) if peers.has_others else stack.enter_context(compiled_ahead())
        run = stack.enter_context(build_run(config, peers=peers, join=join, say=reporter.say))
        if start is None:
            assert run.servers is not None
            start = run.servers.start
        folder, saved = start.folder, start.saved
        other = None
        if saved is not None:
            _restore(saved, run, reporter, trainers)
        elif source is not None:
            other = StartFrom(saved=source, run=run, trainers=trainers)
        if saved is None and overwrite:  # once nothing else can refuse the run
            starting.start_afresh(folder)
        taken = None if other is None else other.load(folder.path, reporter)
        log = _open_log(config, saved, reporter, trainers)
        stack.enter_context(log)
        if taken is not None:
            log.write("from", 0, **taken)
        stop = stack.enter_context(stop or StopRequest())
        profiler = StepProfiler(
            trace if trainers.is_first else None,
            run.device,
            run.schedule.num_steps - run.embeddings.step,
            on_failure=reporter.say,
        )
        saving = Saving(
            parts=run,
            folder=folder,
            trainers=trainers,
            log=log,
            reporter=reporter,
            cuts=_cuts(run, folder, saved, reporter, trainers),
        )
        stack.callback(saving.close)
        if saved is not None:
            saving.resumed_from(saved)
        loop = Loop(
            parts=run,
            saving=saving,
            trainers=trainers,
            log=log,
            reporter=reporter,
            profiler=stack.enter_context(profiler),
            stop_signal=lambda: stop.signal,
        )
        return loop.run(ready)


def _restore(saved: SavedRun, run: Run, reporter: Reporter, trainers: Trainers) -> None:
    """Puts a checkpoint into the run's parts; shard servers have its records already."""
    if run.servers is None:
        load_checkpoint(saved, run.state, trainers)
        trainers.wait("all records to be loaded")
    else:
        load_moment(saved, run.state)
    reporter.say(f"resumed from step {saved.step:,} ({saved.path})")
    if (told := told_before(run.config.log.folder)) is not None:
        reporter.say(told)


def _cuts(
    run: Run, folder: RunFolder, saved: SavedRun | None, reporter: Reporter, trainers: Trainers
) -> Cuts | None:
    if run.servers is None:
        return None
    return Cuts(
        folder,
        run.servers.control,
        saved,
        keep=run.config.checkpoint.keep,
        trainers=trainers,
        say=reporter.say,
    )


def _open_log(
    config: RunConfig, saved: SavedRun | None, reporter: Reporter, trainers: Trainers
) -> RunLog | NoLog:
    if not trainers.is_first:
        return NoLog()
    return RunLog(
        config.log.folder,
        step=None if saved is None else saved.step,
        tensorboard=config.log.tensorboard,
        on_failure=reporter.say,
    )


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether SIGINT or SIGTERM has come since the context was entered.

    The first signal asks, and the loop ends after the step that is running; the second one kills.
    Off the main thread it listens to nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
