"""Calls of rank 0 to a shard server: JSON of a fixed form, checked on arrival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeAlias

import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bagpipe.errors import StoreError
from bagpipe.server import wire
from bagpipe.server.shard import Checkpoint, Shard
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Group

_MAX_CALL_BYTES = 16 << 20
_MAX_NAME = 4096
_Number: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]


class Message(BaseModel):
    """A call or an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def encode(self) -> bytes:
        """As it travels."""
        return self.model_dump_json().encode()


class Begin(Message):
    """Opens an epoch; answered by `Begun`."""

    epoch: _Number
    num_ranks: int
    checkpoint: Checkpoint | None
    run: str = Field(max_length=_MAX_NAME)


class Begun(Message):
    """An epoch is open."""

    instance: str


class Cut(Message):
    """Takes a cut into a folder; answered by `Taken` and, once it is on disk, by `Written`."""

    epoch: _Number
    number: _Number
    folder: Path
    is_whole: bool = False
    """Whether all rows are wanted, since the base's files are gone."""


class Taken(Message):
    """The cut has the records as they are: trainers may go on."""


class Written(Message):
    """The cut's files are on disk."""

    files: tuple[RecordFile, ...]
    """One of each group."""


class End(Message):
    """Ends the cut in hand, as committed or abandoned; answered by `Ended`."""

    epoch: _Number
    number: _Number


class Ended(Message):
    """A cut has ended."""

    was_in_hand: bool = True


class Clear(Message):
    """Forgets the records of a group; answered by `Ended`."""

    epoch: _Number
    instance: str = Field(pattern=r"^[0-9a-f]{32}$")
    group: _Number


class Ask(Message):
    """Asks who the server is; answered by `Identity`."""


class Identity(Message):
    """Which shard of which tables a server has, and whom it serves."""

    version: int
    shard: int
    num_shards: int
    tables: str
    """See `fingerprint`."""
    epoch: int | None
    instance: str
    run: str
    staging: str
    """Where trainers of its host reach it by shared memory; see `bagpipe.server.staging`."""


def fingerprint(groups: tuple[Group, ...], seed: int) -> str:
    """A hash of all that decides what records mean; servers and trainers must have the same."""
    meaning = [
        (
            [
                (table.name, table.num_embeddings, table.embedding_dim, table.data_type, table.init)
                for table in group.tables
            ],
            type(group.optimizer).__name__,
            getattr(group.optimizer, "initial_accumulator_value", 0.0),
        )
        for group in groups
    ]
    return xxhash.xxh3_128(repr((meaning, seed)).encode()).hexdigest()


def unexpected(error: Exception) -> str:
    """What a client is told of an error that is none of `bagpipe.errors`."""
    if isinstance(error, MemoryError):
        return (
            f"it is out of memory ({error}): give its host more, or divide the tables among more "
            "servers"
        )
    return f"{type(error).__name__}: {error}; see the server's log"


def answers(
    shard: Shard, kind: str, body: pa.Buffer, run_folder: Path | None = None
) -> Iterator[bytes]:
    """Does what a call asks for, and yields its answers.

    Args:
        shard: What is called.
        kind: The name of the call.
        body: Its JSON.
        run_folder: The run's, to which a call's paths are relative; files outside of it are
            neither read nor written. None: all may be.

    Raises:
        StoreError, CheckpointError: It is no such call, or fails.
    """
    if kind not in _CALLS:
        raise StoreError(
            f"{kind[:100]!r} is no call of a shard server: use the same version of Bagpipe"
        )
    if body.size > _MAX_CALL_BYTES:
        raise StoreError(f"call {kind} has {body.size:,} bytes, may have {_MAX_CALL_BYTES:,}")
    form, serve = _CALLS[kind]
    try:
        call = form.model_validate_json(body.to_pybytes())
    except ValidationError as error:
        raise StoreError(f"call {kind} has another form than {form.__name__}: {error}") from error
    for answer in serve(shard, call if run_folder is None else _placed(call, run_folder)):
        yield answer.encode()


def _placed(call: Message, run_folder: Path) -> Message:
    """The call with its folder as this host sees it."""
    if isinstance(call, Cut):
        return call.model_copy(update={"folder": _inside(call.folder, run_folder)})
    if isinstance(call, Begin) and call.checkpoint is not None:
        checkpoint = replace(call.checkpoint, folder=_inside(call.checkpoint.folder, run_folder))
        for file in (file for files in checkpoint.files for file in files):
            _inside(checkpoint.folder / file.name, run_folder)
        return call.model_copy(update={"checkpoint": checkpoint})
    return call


def _inside(path: Path, run_folder: Path) -> Path:
    """A path within the run's folder. StoreError for any other: a client's word is no path."""
    root = run_folder.resolve()
    try:
        found = (root / path).resolve()
    except (OSError, ValueError):  # too long, or with a zero byte
        found = Path("/")
    if found == root or not found.is_relative_to(root):
        raise StoreError(
            f"{str(path)[:200]!r} is not in log.folder = {str(root)!r} of this server: start "
            "servers and trainers with one log.folder, on a file system that all of them see"
        )
    return found


def _begin(shard: Shard, call: Begin) -> Iterator[Message]:
    yield Begun(instance=shard.begin(call.epoch, call.num_ranks, call.checkpoint, run=call.run))


def _cut(shard: Shard, call: Cut) -> Iterator[Message]:
    write = shard.cut(call.epoch, call.number, is_whole=call.is_whole)
    yield Taken()
    yield Written(files=write(call.folder))


def _commit(shard: Shard, call: End) -> Iterator[Message]:
    yield Ended(was_in_hand=shard.committed(call.epoch, call.number))


def _abandon(shard: Shard, call: End) -> Iterator[Message]:
    shard.abandon(call.epoch, call.number)
    yield Ended()


def _clear(shard: Shard, call: Clear) -> Iterator[Message]:
    what = wire.What.WRITE
    shard.clear(wire.Header(what=what, epoch=call.epoch, instance=call.instance, group=call.group))
    yield Ended()


def _identify(shard: Shard, call: Ask) -> Iterator[Message]:
    yield Identity(
        version=wire.VERSION,
        shard=shard.number,
        num_shards=shard.num_shards,
        tables=fingerprint(shard.groups, shard.seed),
        epoch=shard.epoch,
        instance=shard.instance,
        run=shard.serving.run,
        staging=shard.staging,
    )


_CALLS: dict[str, tuple[type[Message], Callable[..., Iterator[Message]]]] = {
    "begin": (Begin, _begin),
    "cut": (Cut, _cut),
    "committed": (End, _commit),
    "abandon": (End, _abandon),
    "clear": (Clear, _clear),
    "identify": (Ask, _identify),
}
