"""The steps of a run, and what happens between them.

One step is: forward, loss, backward, dense optimizer, update of the embeddings. Between two steps,
and only there, the run logs, evaluates, saves and ends.

A checkpoint that can't be written, because the disk is full or the folder became read-only, does
not end the run: it goes on, says so, and tries again at the next interval. The checkpoints before
it stay good. One that is whole counts, even where an older one can't be removed. Only if the last
one, at the end or on a signal, can't be written, the run fails with its error.

An error between two steps, as of a batch that can't be read or that the cache is too small for,
comes after all batches before it have been trained. They are saved as on a signal, and a note of
the error says where. With several trainers that takes the same error on all. A loss that is not
finite ends the run before it can be saved.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bagpipe.checkpoint.checkpoints import environment
from bagpipe.checkpoint.files import mark_best
from bagpipe.data.base import Batch, BatchSource
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.lookahead import lookahead
from bagpipe.errors import BagpipeError, CheckpointError, LossError, TakenOverError
from bagpipe.train.banner import banner
from bagpipe.train.build import Run
from bagpipe.train.evaluate import evaluate
from bagpipe.train.logs import NoLog, RunLog
from bagpipe.train.metrics import Scores
from bagpipe.train.report import Meter, Reporter
from bagpipe.train.saving import Saving
from bagpipe.train.schedule import RemainingBatches
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.train.trace import StepProfiler
from bagpipe.types import OraclePlace

LOOK_EVERY_S = 1.0
"""How often rank 0 looks whether a newer start has taken the run over, which no message tells it
where it makes no checkpoints."""
_SAVE, _END = 1, 1000
"""What ranks agree on beside the numbers of signals, above none and below all of those that ask a
run to end, or above all."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    scores: Scores | None
    """On the validation split at the last step; None: there is none, or a signal ended the run."""
    checkpoint: Path | None
    """The newest one."""
    best_step: int | None = None
    """The step of the checkpoint with the best model, where one is kept."""
    test_scores: Mapping[str, Any] | None = None
    """On the test split, if there is one: the best model's, or the last's if none is kept."""
    stopped_by: signal.Signals | None


@dataclass(kw_only=True)
class Loop:
    """Trains what is left of a run; used once."""

    parts: Run
    saving: Saving
    trainers: Trainers
    log: RunLog | NoLog
    reporter: Reporter
    profiler: StepProfiler
    stop_signal: Callable[[], signal.Signals | None]
    """The signal that has asked this trainer to end, if one has."""
    _meter: Meter = field(init=False, default_factory=Meter)
    _step: int = field(init=False)
    _started_at: int = field(init=False)
    _in_step: bool = field(init=False, default=False)
    _stopped_by: signal.Signals | None = field(init=False, default=None)
    _scores: Scores | None = field(init=False, default=None)  # of the last evaluation
    _test_scores: dict[str, Any] | None = field(init=False, default=None)
    _looked_s: float = field(init=False, default=-math.inf)

    def __post_init__(self) -> None:
        self._step = self._started_at = self.parts.embeddings.step

    def run(self, ready: Callable[[], None]) -> Result:
        """Trains what is left, once `ready` returns."""
        parts, labels = self.parts, self.parts.source.label_names
        self.log.write(
            "start",
            self._step,
            config=parts.settings,
            environment=environment(),
            device=str(parts.device),
            **({} if len(labels) == 1 else {"labels": labels}),
        )
        self.reporter.start(self._step, parts.schedule.num_steps)
        ready()
        started = time.perf_counter()
        with self._open_stream() as stream:
            self.profiler.follow(stream.oracle_spans)
            for line in banner(parts):
                self.reporter.say(line)
            try:
                scores = self._train(stream)
            except Exception as error:
                self._save_after(error, stream)
                raise
            elapsed_s = time.perf_counter() - started
            self.log.write("end", self._step, elapsed_s=elapsed_s, **stream.report.as_dict())
            # By a signal a rank ends as one that failed, and then torchrun ends the others.
            self.trainers.wait("rank 0 to save and score")
        return Result(
            step=self._step,
            scores=scores,
            checkpoint=self.saving.newest,
            best_step=self.parts.best.step,
            test_scores=self._test_scores,
            stopped_by=self._stopped_by,
        )

    def _train(self, stream: Lookahead[TorchBatch]) -> Scores | None:
        """Trains all that is left, up to the last checkpoint and evaluation."""
        best = self.parts.best
        self._meter.restart(stream)
        if not best.is_over:
            self._train_steps(stream)
        self._write_averages(stream)
        stream.flush()
        is_stopped = self._stopped_by is not None
        if best.is_kept and not is_stopped:
            # An early end comes right after an evaluation, or long after it by --resume.
            if not best.is_over:
                self._evaluate_on_the_way()
            self.reporter.say(str(best))
        if is_stopped or self.parts.config.checkpoint.at_end:
            self.saving.save()
        else:
            self.saving.finish()
        if is_stopped:
            return None
        if not best.is_kept:
            self._scores = self._evaluate()
        self._test()
        return self._scores

    def _train_steps(self, stream: Lookahead[TorchBatch]) -> None:
        """Trains until the data, a signal or the evaluations end the run."""
        config = self.parts.config
        for batch in stream:
            self._train_step(batch)
            self.saving.note_ended()
            self.profiler.step_done()
            self.reporter.advance(self._step)
            # the last one here, too: outside of the loop the stream has been closed
            if self._is_due(config.log.every_steps) or self._step == self.parts.schedule.num_steps:
                self._write_averages(stream)
            if self._is_due(config.train.eval_every_steps):
                self._pause(stream, self._evaluate_on_the_way)
                if self.parts.best.is_over:
                    break
            if self._is_due(config.checkpoint.every_steps):
                self._pause(stream, self.saving.try_to_save)
            if self._is_to_end(stream):
                break

    def _is_to_end(self, stream: Lookahead[TorchBatch]) -> bool:
        """Does what any rank has wished for after a step; returns whether that ends the run."""
        agreed = self.trainers.agree_on(self._wish())
        if agreed == _SAVE and self._step < self.parts.schedule.num_steps:
            self._pause(stream, self.saving.try_to_save)
        elif agreed == _END:
            self._end_taken_over()
        elif agreed > _SAVE:
            self._stopped_by = signal.Signals(agreed)
        return self._stopped_by is not None

    def _wish(self) -> int:
        """What this rank wants after this step: the number of a signal, `_SAVE`, `_END` or 0."""
        received = self.stop_signal() or 0
        if not self.trainers.is_first:
            return received
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            try:
                self.saving.folder.check_held()
            except TakenOverError:
                return _END
        return received or (_SAVE if self.saving.is_due() else 0)

    def _end_taken_over(self) -> None:
        """Raises TakenOverError on all ranks, once rank 0 has seen that it is so."""

        def look() -> None:
            if self.trainers.is_first:
                self.saving.folder.check_held()

        self.trainers.all_do("who has taken the run over", look, TakenOverError)

    def _is_due(self, every_steps: int | None) -> bool:
        """Whether an interval ends here; the last step has its own evaluation and checkpoint."""
        return (
            every_steps is not None
            and self._step % every_steps == 0
            and self._step < self.parts.schedule.num_steps
        )

    def _open_stream(self) -> Lookahead[TorchBatch]:
        parts, cache = self.parts, self.parts.config.cache
        start = parts.schedule.position_after(self._step)
        return lookahead(
            RemainingBatches(source=parts.source, schedule=parts.schedule, start=start),
            parts.embeddings,
            cache=cache.size,
            lookahead=cache.lookahead,
            lookahead_memory=cache.lookahead_memory,
            prefetch_depth=cache.prefetch_depth,
            dedup_threads=cache.threads,
            check=cache.check,
            oracle=cache.oracle_of(self._best_oracle()),
            hand_out=Batch.without_ids,
            move=TorchBatch.moved,
        )

    def _best_oracle(self) -> OraclePlace:
        """Where plans are best made.

        On the device the host has least to do, if a step is one graph. Else calls of the trainer's
        thread compete with the planner's for Python's lock.
        """
        parts, has_others = self.parts, self.trainers.peers.has_others
        if parts.device.type == "cpu" and not has_others:
            return "thread"
        is_one_graph = not has_others and parts.dense_step.can_replay(parts.config.train.batch_size)
        return "device" if is_one_graph else "process"

    def _train_step(self, batch: TorchBatch) -> None:
        parts, executor = self.parts, self.parts.embeddings.executor
        assert executor is not None
        self._in_step = True
        can_replay = parts.dense_step.can_replay(batch.batch_size)
        rows = parts.embeddings.rows_in_graph(batch.sparse) if can_replay else None
        if rows is None:
            parts.embeddings.lookup(batch.sparse, out=parts.dense_step.pooled(batch.batch_size))
        weight = self.trainers.weight(
            batch.batch_size, parts.schedule.batch_size_of(self._step, parts.source.num_samples)
        )
        parts.noise.begin(self._step)
        with self.trainers.averaging(self._step):
            loss, _ = parts.dense_step(
                batch.dense,
                batch.labels,
                weight,
                batch.weights,
                rows=rows,
                update=parts.embeddings.update,
                average=executor.dense_average,
            )
        self._step += 1
        parts.rates.after_step(self._step)
        self._in_step = False
        self._meter.add(self._step, loss, batch.batch_size)

    def _write_averages(self, stream: Lookahead[TorchBatch]) -> None:
        averages, trainers = self._meter.take(stream), self.trainers
        if averages is None:
            return
        averages = replace(
            averages,
            loss=trainers.mean(averages.loss),
            label_losses=tuple(map(trainers.mean, averages.label_losses)),
            examples_per_s=trainers.peers.num_trainers * trainers.mean(averages.examples_per_s),
        )
        rates = {
            "lr": self.parts.optimizer.param_groups[0]["lr"],
            "embeddings_lr": self.parts.embeddings.lr,
        }
        numbers = asdict(averages)
        names = [f"loss/{label}" for label in self.parts.source.label_names]
        of_labels = dict(zip(names, numbers.pop("label_losses"), strict=False))
        self.log.write("train", self._step, **numbers, **of_labels, **rates)
        self.reporter.show(averages)

    def _pause(self, stream: Lookahead[TorchBatch], work: Callable[[], object]) -> None:
        """Does something between two steps that needs all records in the stores.

        Its time does not count as the training's.
        """
        self._write_averages(stream)
        stream.flush()
        work()
        self._meter.restart(stream)

    def _evaluate_on_the_way(self) -> None:
        """Evaluates, lowers rates that wait for it, and keeps the best model; all ranks alike."""
        parts = self.parts
        self._scores = self._evaluate()
        if parts.rates.change or parts.best.is_kept:
            told = self._told(self._scores)
            if told is not None:
                parts.rates.after_evaluation(self._step, told)
            if parts.best.note(told):
                self._keep_best()

    def _keep_best(self) -> None:
        """Saves the best model so far, with its scores on the test split."""
        best, step = self.parts.best, self._step
        before = best.step, best.test
        best.step, best.test = step, self._told(self._score(self.parts.test))
        if not self.saving.try_to_save_now():
            best.step, best.test = before
        elif self.trainers.is_first:
            mark_best(self.saving.folder, step, self.reporter.say)

    def _test(self) -> None:
        """Tells how good the best model is, or the last where none is kept, on the test split."""
        best, step = self.parts.best, self._step
        if self.parts.test is None:
            return
        if best.step is None:
            self._test_scores = self._told(self._score(self.parts.test))
        else:
            self._test_scores, step = best.test, best.step
        if self._test_scores is not None:
            self.log.write("test", step, **self._test_scores)
            self.reporter.say(f"step {step:,}: test {Scores.of(self._test_scores)}")

    def _told(self, scores: Scores | None) -> dict[str, Any] | None:
        """Rank 0's scores, on all ranks."""
        told: dict[str, Any] | None = self.trainers.all_do(
            "an evaluation's scores", lambda: None if scores is None else scores.as_dict()
        )[0]
        return told

    def _evaluate(self) -> Scores | None:
        scores = self._score(self.parts.validation)
        if scores is not None:  # rank 0 has them
            self.log.write("evaluation", self._step, **scores.as_dict())
            self.reporter.say(f"step {self._step:,}: validation {scores}")
        return scores

    def _score(self, source: BatchSource | None) -> Scores | None:
        """Scores the model on a split, if there is one; rank 0 has the scores."""
        parts = self.parts
        if source is None:
            return None
        return evaluate(
            parts.model,
            source,
            batch_size=parts.config.train.eval_batch_size,
            device=parts.device,
            precision=parts.config.train.precision,
            metrics=parts.config.metrics,
            group_by=parts.config.train.group_by,
            peers=self.trainers.peers,
            on_batch=self.reporter.evaluating,
        )

    def _save_after(self, error: Exception, stream: Lookahead[TorchBatch]) -> None:
        """Saves what was trained before an error, if that is whole on all ranks.

        A note of the error says where it is.
        """
        is_whole = not self._in_step and (
            stream.has_failed_alike or not self.trainers.peers.has_others
        )
        if not is_whole or isinstance(error, LossError | CheckpointError | TakenOverError):
            return
        try:
            if self._step > self._started_at:
                self._write_averages(stream)
                stream.flush()
                self.saving.save()
        except BagpipeError as failure:
            error.add_note(f"the {self._step:,} steps before can't be saved: {failure}")
        if self.saving.newest is not None:
            error.add_note(
                f"{self.saving.newest_step:,} steps are saved in {self.saving.newest}: with the "
                "cause mended, --resume goes on from there"
            )
