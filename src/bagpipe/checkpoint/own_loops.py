"""`bagpipe.save` and `bagpipe.restore`: checkpoints of a loop that is the user's own.

They are those of `bagpipe train`: the same folder, files and manifest, written and read by the same
code. What a run's configuration says there, an own loop says of its tables: their seed, initial
weights and optimizers. A restored loop must have the same, since untouched rows are not stored.

A process claims an epoch of the folder when it first saves there, so that an older process that
still runs can't write checkpoints between its own. Restoring claims nothing: whoever only reads
disturbs nobody.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from bagpipe.checkpoint.checkpoints import (
    DENSE,
    Embeddings,
    SavedRun,
    State,
    Stateful,
    load_records,
    read_checkpoint,
    save_checkpoint,
)
from bagpipe.checkpoint.dense import (
    Optimizers,
    check_dense,
    is_readable,
    own_part,
    put_dense,
    read_dense,
)
from bagpipe.checkpoint.own_folder import claim_own, find_own, note_restored, note_saved, warn
from bagpipe.checkpoint.own_tables import check_described, described, put_learning_rates
from bagpipe.checkpoint.random_by_rank import put_random_of_rank, random_by_rank
from bagpipe.data.base import Position
from bagpipe.distributed.alone import Peers
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import CheckpointError, ConfigError, UsageError
from bagpipe.store.manifest import check_tables

_NO_MODEL = nn.Module()


class _Stream(Protocol):
    def flush_between_steps(self) -> None: ...


class _LoaderStates(Protocol):
    def before(self, step: int) -> Any: ...


class OwnEmbeddings(Embeddings, Protocol):
    """What is needed of a `bagpipe.EmbeddingBagCollection`."""

    seed: int
    peers: Peers
    stream: Callable[[], _Stream | None]

    @property
    def loader_states(self) -> _LoaderStates | None:
        """What the newest stream keeps of its loader."""

    def being_restored(self) -> AbstractContextManager[None]:
        """While all records are replaced."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where a restored loop goes on."""

    path: Path
    """The checkpoint."""
    step: int
    """Batches trained so far: how many to skip of data that always come in the same order."""
    extra: Mapping[str, Any]
    """What was given to `save`."""


def save(
    folder: str | Path,
    embeddings: OwnEmbeddings,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizers | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    overwrite: bool = False,
) -> Path:
    """Saves all of a loop, so that `restore` goes on from here with the same bits.

    That is each record that was ever written, with its optimizer state; the count of steps; the
    tables' learning rates; the dense part; torch's random state on each rank; and, where the loader
    of a running `bagpipe.lookahead` has `state_dict` and `load_state_dict`, where it was behind the
    last batch that was trained. Tables pass in blocks, so memory does not grow with them.

    Within ``for batch in bagpipe.lookahead(..)`` call it at the end of a step, after
    ``optimizer.step()``, or at its beginning, before the batch is used. That batch then counts as
    still to come. The rows in the cache are written to the stores, and the iteration goes on. With
    several trainers all must call it.

    The checkpoint is in place whole or not at all, whatever happens.

    Args:
        folder: the run's, which no other run saves to; made where it is missing. Checkpoints lie in
            ``folder/checkpoints/step-N``.
        embeddings: the tables.
        model: the dense part, or a module around it and the embeddings.
        optimizer: that of the dense part, or several in a list, whose order counts.
        stateful: what else has `state_dict` and `load_state_dict`, by name: a learning-rate
            schedule, a GradScaler.
        extra: anything that torch reads with `weights_only`: numbers, strings, tensors, arrays, and
            lists and dicts of them.
        keep: how many of the newest checkpoints to leave.
        overwrite: whether checkpoints of another run in the folder are removed, once the new one is
            in place.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: the folder holds checkpoints of a run that these embeddings do not go on with.
        CheckpointError: the disk is full or the folder can't be written. Earlier checkpoints are as
            they were, and training may go on.
        StoreError: rows can't be read.
        UsageError: rows were lost, or a value can't be saved; it is named.
    """
    check_embeddings(embeddings)
    if keep < 1:
        raise ConfigError(f"keep is {keep}, must be at least 1")
    trainers = Trainers(embeddings.peers)
    flush_between_steps(embeddings)
    own = {
        "extra": dict(extra or {}),
        "stateful": {name: each.state_dict() for name, each in (stateful or {}).items()},
        "loader": _loader_state(embeddings),
        "random_by_rank": random_by_rank(trainers),
    }
    trainers.all_do("what to save to be looked at", lambda: _check_readable(own), UsageError)
    place = Path(folder).resolve()
    run, doomed = claim_own(place, embeddings, trainers, overwrite=overwrite)
    path = save_checkpoint(
        run,
        state=State(
            model=_NO_MODEL if model is None else model,
            optimizer=[] if optimizer is None else optimizer,
            embeddings=embeddings,
            own=own,
        ),
        position=Position(batch=embeddings.step),
        config=described(embeddings.groups, embeddings.seed),
        keep=keep,
        trainers=trainers,
        say=warn,
    )
    note_saved(run, embeddings, embeddings.step)
    if trainers.is_first:
        for other in doomed:
            if other != path and other.exists():
                shutil.rmtree(run.take_away(other), ignore_errors=True)
    return path


def restore(
    folder: str | Path,
    embeddings: OwnEmbeddings,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizers | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    loader: Stateful | None = None,
    random: bool = True,
    missing_ok: bool = False,
) -> Restored | None:
    """Puts what `save` saved into parts that were made in the same way.

    The cache, the device, the store and the number of trainers may be others. The tables' learning
    rates and those of the optimizers are the saved ones; set others afterwards. With several
    trainers all must call it, each with its own parts. Every file is compared with its checksum,
    and everything is checked before anything is changed.

    Args:
        folder: a run's, whose newest valid checkpoint is taken; or one checkpoint's. A run of
            `bagpipe train` will do, too.
        embeddings: with the same tables, seed and optimizer. No `bagpipe.lookahead` may be running.
        model: as in `save`.
        optimizer: as in `save`.
        stateful: takes back what was saved under the same names.
        loader: the loader that goes on where the saved one was, to be given to `bagpipe.lookahead`.
        random: whether each rank gets its random state of torch back. With another number of ranks
            it stays as it is.
        missing_ok: returns None where there is no checkpoint, so that a loop can start.

    Returns:
        Where to go on.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged or too new, or it belongs to other
            tables, another seed, optimizer or model; nothing was changed.
        UsageError: a stream is running.
        StoreError: rows can't be written. The tables then refuse all use until a restore succeeds.
    """
    check_embeddings(embeddings)
    place, trainers = Path(folder).resolve(), Trainers(embeddings.peers)
    path = trainers.all_do(
        "a checkpoint to restore", lambda: str(find_own(place) or "") if trainers.is_first else ""
    )[0]
    if not path:
        if missing_ok:
            return None
        raise CheckpointError(
            f"{place}: holds no checkpoint{'' if place.is_dir() else ', there is no such folder'}: "
            "give a folder that was saved to, or missing_ok=True to start afresh"
        )
    optimizers: Optimizers = [] if optimizer is None else optimizer
    model = _NO_MODEL if model is None else model
    checked: list[tuple[SavedRun, dict[str, Any]]] = []
    trainers.all_do(
        "a checkpoint to be checked",
        lambda: checked.append(
            _checked(Path(path), embeddings, model, optimizers, stateful or {}, loader)
        ),
    )
    saved, content = checked[0]
    own = own_part(content)
    with embeddings.being_restored():
        trainers.all_do("all records", lambda: load_records(saved, embeddings, trainers))
    embeddings.step = saved.step
    embeddings.num_skipped[:] = saved.num_skipped
    put_learning_rates(saved, embeddings.groups)
    put_dense(content, model, optimizers)
    for name, each in (stateful or {}).items():
        each.load_state_dict(own["stateful"][name])
    if loader is not None:
        loader.load_state_dict(own["loader"])
    if random:
        put_random_of_rank(content, own.get("random_by_rank", []), trainers)
    note_restored(saved.path, embeddings, of_run=place)
    return Restored(path=saved.path, step=saved.step, extra=own.get("extra", {}))


def flush_between_steps(embeddings: OwnEmbeddings) -> None:
    """Writes the cached rows to the stores; a running iteration goes on."""
    stream = embeddings.stream()
    if stream is None:
        embeddings.flush()
    else:
        stream.flush_between_steps()


def check_embeddings(embeddings: object) -> None:
    """Raises UsageError unless these are embeddings that `lookahead` trains."""
    if not hasattr(embeddings, "loader_states"):
        raise UsageError(
            f"embeddings are a {type(embeddings).__name__}, must be a "
            "bagpipe.EmbeddingBagCollection: a model around it goes to `model`"
        )


def _checked(
    path: Path,
    embeddings: OwnEmbeddings,
    model: nn.Module,
    optimizers: Optimizers,
    stateful: Mapping[str, Stateful],
    loader: Stateful | None,
) -> tuple[SavedRun, dict[str, Any]]:
    """A checkpoint and its dense part, which fit all that they are to be put into."""
    saved = read_checkpoint(path)
    check_tables(path, saved.groups, embeddings.groups)
    check_described(saved, embeddings.groups, embeddings.seed)
    content = read_dense(path / DENSE)
    check_dense(path / DENSE, content, model, optimizers)
    own = own_part(content)
    missing = sorted(stateful.keys() - own.get("stateful", {}).keys())
    if missing:
        raise CheckpointError(
            f"{path}: holds no state of {missing}, only of {sorted(own.get('stateful', {}))}: "
            "give restore what was given to save"
        )
    if loader is not None and own.get("loader") is None:
        raise CheckpointError(
            f"{path}: holds no state of a loader, since the one that was saved had no "
            "state_dict: leave `loader` out, and skip as many batches as `step` says"
        )
    return saved, content


def _loader_state(embeddings: OwnEmbeddings) -> Any:
    states = embeddings.loader_states
    return None if states is None else states.before(embeddings.step)


def _check_readable(own: Mapping[str, Any]) -> None:
    named = [(f"extra[{name!r}]", value) for name, value in own["extra"].items()]
    named += [(f"the state of {name!r}", value) for name, value in own["stateful"].items()]
    named.append(("the loader's state", own["loader"]))
    for what, value in named:
        if not is_readable(value):
            raise UsageError(
                f"{what} can't be saved: torch.load(weights_only=True) must read it back, which "
                "reads numbers, strings, tensors, arrays, and lists and dicts of them"
            )
