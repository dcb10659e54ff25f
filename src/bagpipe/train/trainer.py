"""A run from a configuration: everything that the loop uses is made, then the loop trains."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
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
from bagpipe.checkpoint.run_folder import told_before
from bagpipe.config.run import RunConfig
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.distributed.trainers import Launcher, Trainers
from bagpipe.server.told import StartedServer
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
    servers: Sequence[StartedServer] = (),
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
        servers: shard servers that the launcher has started, shard by shard, for a configuration
            that has no addresses; by default trainers start them.

    Raises:
        ConfigError: a setting is wrong, or the folder holds an earlier run and neither `resume` nor
            `overwrite` is set.
        DataError: the data are wrong.
        CheckpointError: none can be resumed from, or the last one can't be written.
        LossError: the loss is not finite.
        TakenOverError: a newer start goes on with the run over its shard servers.
    """
    trainers, reporter = Trainers(peers), LoggedReporter(reporter)
    starting = Starting(
        config=config,
        trainers=trainers,
        reporter=reporter,
        resume=resume,
        overwrite=overwrite,
        is_from_another=start_from is not None,
        takes_over=bool(servers) or config.servers is not None or peers.has_others,
        launcher=launcher,
    )
    with ExitStack() as stack:
        trainers.wait("all ranks to start")  # no start takes the run over unless it is whole
        _check_same_start(starting, start_from)
        stack.enter_context(starting.takeover_told())
        source = None
        if start_from is not None and not (resume and starting.has_checkpoints()):
            source = find_source(start_from, config, trainers, reporter)
        run, start, ready = _begin(starting, stack, servers)
        taken = _fill(run, start, source, starting)
        log = _open_log(config, start.saved, reporter, trainers)
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
        loop = Loop(
            parts=run,
            saving=stack.enter_context(closing(_saving(run, start, log, starting))),
            trainers=trainers,
            log=log,
            reporter=reporter,
            profiler=stack.enter_context(profiler),
            stop_signal=lambda: stop.signal,
        )
        return loop.run(ready)


def _check_same_start(starting: Starting, start_from: Path | None) -> None:
    """Refuses ranks that were started with different settings or options."""
    config, peers = starting.config, starting.trainers.peers
    own = {
        "resume": starting.resume,
        "from": None if start_from is None else str(start_from),
        "device": choose_device(config.train.device, peers).type,
        "torch": environment()["torch"],
    }
    check_same_run(peers, {**describe_start(config), **own})


def _begin(
    starting: Starting, stack: ExitStack, servers: Sequence[StartedServer]
) -> tuple[Run, Start, Callable[[], None]]:
    """Claims the run's folder and builds the run; `stack` closes both.

    With shard servers the claim comes once they are known to be this run's.

    Returns:
        The run, its start, and what waits until all loops are compiled.
    """
    config, trainers = starting.config, starting.trainers

    def claim() -> Start:
        return stack.enter_context(starting.claimed())

    join = start = None
    if starting.takes_over:
        starting.check()
        join = partial(joined_servers, config, claim=claim, trainers=trainers, started=servers)
    else:
        start = claim()
    peers, say = trainers.peers, starting.reporter.say
    ready = (lambda: None) if peers.has_others else stack.enter_context(compiled_ahead())
    run = stack.enter_context(build_run(config, peers=peers, join=join, say=say))
    if start is None:
        assert run.servers is not None
        start = run.servers.start
    return run, start, ready


def _fill(
    run: Run, start: Start, source: SavedRun | None, starting: Starting
) -> dict[str, Any] | None:
    """Puts what the run starts from into its parts; returns what it took from another run."""
    trainers, reporter = starting.trainers, starting.reporter
    if start.saved is not None:
        _restore(start.saved, run, reporter, trainers)
        return None
    other = None if source is None else StartFrom(saved=source, run=run, trainers=trainers)
    if starting.overwrite:  # once nothing else can refuse the run
        starting.start_afresh(start.folder)
    return None if other is None else other.load(start.folder.path, reporter)


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


def _saving(run: Run, start: Start, log: RunLog | NoLog, starting: Starting) -> Saving:
    """What saves the run: with shard servers by cuts, else while training waits."""
    trainers, reporter = starting.trainers, starting.reporter
    cuts = None
    if run.servers is not None:
        cuts = Cuts(
            start.folder,
            run.servers.control,
            start.saved,
            keep=run.config.checkpoint.keep,
            trainers=trainers,
            say=reporter.say,
        )
    saving = Saving(
        parts=run, folder=start.folder, trainers=trainers, log=log, reporter=reporter, cuts=cuts
    )
    if start.saved is not None:
        saving.resumed_from(start.saved)
    return saving


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
