"""A run from a configuration: restore, loop, evaluate, save.

Everything that the loop uses is built before it. One step is: forward, loss, backward (in which
embeddings are updated), dense optimizer. Between two steps, and only there, the run logs,
evaluates, saves and ends.

A checkpoint that can't be written, because the disk is full or the folder became read-only, does
not end the run: it goes on, says so, and tries again at the next interval; the checkpoints before
it stay good. One that is whole counts, even where an older one can't be removed. Only if the last
one, at the end or on a signal, can't be written, the run fails with its error.

An error between two steps, as of a batch that can't be read or that the cache is too small for,
comes after all batches before it have been trained: they are saved as on a signal, and a note of
the error says where. With several trainers that takes the same error on all. A loss that is not
finite ends the run before it can be saved.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bagpipe.checkpoint.checkpoints import (
    SavedRun,
    check_resumable,
    environment,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from bagpipe.checkpoint.run_folder import check_seen_by_all, claim_run_folder, start_afresh
from bagpipe.config.run import RunConfig
from bagpipe.data.base import Batch
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.lookahead import Lookahead, lookahead
from bagpipe.errors import BagpipeError, CheckpointError, LossError
from bagpipe.train.batches import TorchBatch
from bagpipe.train.build import Run, build_run, choose_device
from bagpipe.train.compile_ahead import compiled_ahead
from bagpipe.train.evaluate import evaluate
from bagpipe.train.logs import NoLog, RunLog
from bagpipe.train.meter import Meter
from bagpipe.train.metrics import Scores
from bagpipe.train.report import Reporter
from bagpipe.train.schedule import RemainingBatches
from bagpipe.train.settings import check_same_run, describe_run
from bagpipe.train.signals import StopRequest
from bagpipe.train.trace import Trace, TraceOptions


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    # on the validation split at the last step; None: there is none, or a signal ended the run
    scores: Scores | None
    checkpoint: Path | None  # the newest one
    stopped_by: signal.Signals | None


def train(
    config: RunConfig,
    *,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
    trace: TraceOptions | None = None,
    communicator: Communicator | None = None,
) -> Result:
    """Trains to the end of the configuration, or to the step at which SIGINT or SIGTERM comes.

    Args:
        config: the run.
        reporter: told about progress.
        resume: whether to go on from the newest valid checkpoint in the run's folder; where there
            is none, the run starts afresh and says so.
        overwrite: whether a fresh run may remove the checkpoints of an earlier one.
        trace: which steps to profile, and where to write that.
        communicator: with the other trainers, if there are any. Rank 0 logs and traces, and saves,
            of several hosts with the first rank of each; each batch is shared by all, so that their
            number changes no more than the order of sums, and so are the batches of an evaluation.

    Raises:
        ConfigError: a setting is wrong, or the folder holds an earlier run and neither `resume` nor
            `overwrite` is set.
        DataError: the data are wrong.
        CheckpointError: none can be resumed from, or the last one can't be written.
        LossError: the loss is not finite.
    """
    trainers = Trainers(communicator)
    with ExitStack() as stack:
        folder = config.log.folder
        checkpoints = (
            stack.enter_context(claim_run_folder(folder, reporter.say))
            if trainers.is_first
            else folder / "checkpoints"
        )
        trainers.wait("rank 0 to claim the run's folder")
        check_seen_by_all(folder, trainers)
        if communicator is not None:
            device = choose_device(config.train.device, communicator)
            own = {"resume": resume, "device": device.type, "torch": environment()["torch"]}
            check_same_run(communicator, {**describe_run(config), **own})
        ready = stack.enter_context(compiled_ahead()) if communicator is None else lambda: None
        run = stack.enter_context(build_run(config, communicator=communicator, say=reporter.say))
        saved = _resume(run, checkpoints, reporter, trainers) if resume else None
        if saved is None and trainers.is_first:
            start_afresh(checkpoints, overwrite=overwrite)
        step = None if saved is None else saved.step
        log_files = (
            RunLog(folder, step=step, tensorboard=config.log.tensorboard, on_failure=reporter.say)
            if trainers.is_first
            else NoLog()
        )
        with log_files as log, StopRequest() as stop:
            with Trace(
                trace if trainers.is_first else None,
                run.device,
                run.schedule.num_steps - run.embeddings.step,
                on_failure=reporter.say,
            ) as traced:
                loop = _Loop(run, checkpoints, log, reporter, stop, traced, trainers)
                return loop.run(saved, ready)


def _resume(run: Run, checkpoints: Path, reporter: Reporter, trainers: Trainers) -> SavedRun | None:
    def find() -> str | None:
        found = find_checkpoint(
            checkpoints, on_damaged=lambda error: reporter.say(f"skipped a checkpoint: {error}")
        )
        return None if found is None else found.path.name

    name = trainers.all_do(
        "a checkpoint to resume from", lambda: find() if trainers.is_first else None
    )[0]
    if name is None:
        reporter.say(f"{checkpoints} holds no checkpoint to resume from: starting afresh")
        return None
    saved = read_checkpoint(checkpoints / name)  # rank 0 has compared all files
    for difference in check_resumable(saved, run.settings):
        reporter.say(f"resuming with another {difference}")
    for name, value in environment().items():
        if (before := saved.environment.get(name)) != value:
            reporter.say(
                f"resuming with another {name}: {before!r} -> {value!r} (the last bits of the "
                "results may differ)"
            )
    load_checkpoint(saved, run.state, trainers)
    trainers.wait("all records to be loaded")
    reporter.say(f"resumed from step {saved.step:,} ({saved.path})")
    return saved


class _Loop:
    """The steps of a run and what happens between them."""

    def __init__(
        self,
        run: Run,
        checkpoints: Path,
        log: RunLog | NoLog,
        reporter: Reporter,
        stop: StopRequest,
        trace: Trace,
        trainers: Trainers,
    ) -> None:
        self._run, self._checkpoints, self._log = run, checkpoints, log
        self._reporter, self._stop, self._trace, self._trainers = reporter, stop, trace, trainers
        self._meter = Meter()
        self._step = self._started_at = run.embeddings.step
        self._in_step = False
        self._newest: Path | None = None
        self._saved_step = -1
        self._stopped_by: signal.Signals | None = None

    def run(self, saved: SavedRun | None, ready: Callable[[], None]) -> Result:
        """Trains what is left after `saved`, once `ready` returns."""
        run = self._run
        if saved is not None:
            self._newest, self._saved_step = saved.path, saved.step
        self._log.write(
            "start",
            self._step,
            config=run.settings,
            environment=environment(),
            device=str(run.device),
        )
        self._reporter.start(self._step, run.schedule.num_steps)
        ready()
        started = time.perf_counter()
        with self._open_stream() as stream:
            try:
                scores = self._train(stream)
            except Exception as error:
                self._save_after(error, stream)
                raise
            self._log.write(
                "end",
                self._step,
                elapsed_s=time.perf_counter() - started,
                **stream.report.as_dict(),
            )
            # By a signal a rank ends as one that failed, and then torchrun ends the others.
            self._trainers.wait("rank 0 to save and score")
        return Result(
            step=self._step, scores=scores, checkpoint=self._newest, stopped_by=self._stopped_by
        )

    def _train(self, stream: Lookahead[TorchBatch]) -> Scores | None:
        """Trains all that is left, up to the last checkpoint and evaluation."""
        config = self._run.config
        self._meter.restart(stream)
        for batch in stream:
            self._train_step(batch)
            self._trace.step_done()
            self._reporter.advance(self._step)
            if self._is_due(config.log.every_steps) or self._step == self._run.schedule.num_steps:
                # the last one here, too: outside of the loop the stream has been closed
                self._write_progress(stream)
            if self._is_due(config.train.eval_every_steps):
                self._pause(stream, self._evaluate)
            if self._is_due(config.checkpoint.every_steps):
                self._pause(stream, self._try_to_save)
            self._stopped_by = self._trainers.agree_on(self._stop.signal)
            if self._stopped_by is not None:
                break
        self._write_progress(stream)
        stream.flush()
        return self._finish()

    def _is_due(self, every_steps: int | None) -> bool:
        """The last step has its own evaluation and checkpoint, so nothing is due there."""
        return (
            every_steps is not None
            and self._step % every_steps == 0
            and self._step < self._run.schedule.num_steps
        )

    def _open_stream(self) -> Lookahead[TorchBatch]:
        run, cache = self._run, self._run.config.cache
        start = run.schedule.position_after(self._step)
        is_better_apart = run.device.type == "cuda" or run.embeddings.communicator is not None
        in_process = cache.oracle == "process" or (cache.oracle == "auto" and is_better_apart)
        return lookahead(
            RemainingBatches(source=run.source, schedule=run.schedule, start=start),
            run.embeddings,
            cache=cache.size,
            lookahead=cache.lookahead,
            lookahead_memory=cache.lookahead_memory,
            prefetch_depth=cache.prefetch_depth,
            dedup_threads=cache.threads,
            check=cache.check,
            oracle="process" if in_process else "thread",
            hand_out=Batch.without_ids,
            move=TorchBatch.moved,
        )

    def _train_step(self, batch: TorchBatch) -> None:
        run = self._run
        self._in_step = True
        run.embeddings.lookup(batch.sparse, out=run.dense_step.pooled(batch.batch_size))
        weight = self._trainers.weight(
            batch.batch_size, run.schedule.batch_size_of(self._step, run.source.num_samples)
        )
        with self._trainers.averaging(self._step):
            loss, grads = run.dense_step(batch.dense, batch.labels, weight)
        run.embeddings.update(grads)
        self._step += 1
        self._in_step = False
        self._meter.add(self._step, loss, batch.batch_size)

    def _write_progress(self, stream: Lookahead[TorchBatch]) -> None:
        progress = self._meter.take(stream)
        if progress is not None:
            trainers = self._trainers
            progress = replace(
                progress,
                loss=trainers.mean(progress.loss),
                examples_per_s=trainers.num_trainers * trainers.mean(progress.examples_per_s),
            )
            self._log.write("train", self._step, **asdict(progress))
            self._reporter.show(progress)

    def _pause(self, stream: Lookahead[TorchBatch], work: Callable[[], object]) -> None:
        """Does something between two steps that needs the whole truth in the stores and whose time
        is not the training's.
        """
        self._write_progress(stream)
        stream.flush()
        work()
        self._meter.restart(stream)

    def _evaluate(self) -> Scores | None:
        run = self._run
        if run.validation is None:
            return None
        scores = evaluate(
            run.model,
            run.validation,
            batch_size=run.config.train.eval_batch_size,
            device=run.device,
            precision=run.config.train.precision,
            communicator=run.embeddings.communicator,
            on_batch=self._reporter.evaluating,
            on_no_batch=run.embeddings.join_reading,
        )
        if scores is None:  # rank 0 has them
            return None
        self._log.write("evaluation", self._step, **asdict(scores))
        self._reporter.say(f"step {self._step:,}: {describe_scores(scores)}")
        return scores

    def _try_to_save(self) -> None:
        try:
            self._save()
        except CheckpointError as error:
            self._log.write("checkpoint_failed", self._step, reason=str(error))
            self._reporter.say(
                f"step {self._step:,}: no checkpoint, the run goes on without it: {error}"
            )

    def _save(self) -> None:
        run, step = self._run, self._step
        if step == self._saved_step:
            return
        started = time.perf_counter()
        run.dense_step.settle()
        self._newest = save_checkpoint(
            self._checkpoints,
            state=run.state,
            position=run.schedule.position_after(step),
            config=run.settings,
            keep=run.config.checkpoint.keep,
            trainers=self._trainers,
            say=self._reporter.say,
        )
        self._saved_step = step
        self._log.write(
            "checkpoint", step, path=str(self._newest), elapsed_s=time.perf_counter() - started
        )

    def _save_after(self, error: Exception, stream: Lookahead[TorchBatch]) -> None:
        """Saves what was trained before an error, if that is whole on all ranks, and notes with the
        error where it is.
        """
        is_whole = not self._in_step and (self._trainers.are_alone or stream.has_failed_alike)
        if not is_whole or isinstance(error, LossError | CheckpointError):
            return
        try:
            if self._step > self._started_at:
                self._write_progress(stream)
                stream.flush()
                self._save()
        except BagpipeError as failure:
            error.add_note(f"the {self._step:,} steps before can't be saved: {failure}")
        if self._newest is not None:
            error.add_note(
                f"{self._saved_step:,} steps are saved in {self._newest}: with the cause mended, "
                "--resume goes on from there"
            )

    def _finish(self) -> Scores | None:
        """The last checkpoint, then the last evaluation; a signal leaves out the evaluation."""
        if self._stopped_by is not None or self._run.config.checkpoint.at_end:
            self._save()
        return self._evaluate() if self._stopped_by is None else None


def describe_scores(scores: Scores) -> str:
    """One line for a person."""
    auc = "none (one class only)" if scores.auc is None else f"{scores.auc:.4f}"
    return f"validation AUC {auc}, log-loss {scores.log_loss:.4f} on {scores.num_samples:,} samples"
