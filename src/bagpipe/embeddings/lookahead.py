"""`bagpipe.lookahead`: wraps batches so that each one's rows are in the cache when it comes.

    with bagpipe.lookahead(loader, embeddings, cache="4GiB") as batches:
        for batch in batches:
            loss = criterion(model(batch.dense, batch.sparse), batch.labels)
            loss.backward()            # embeddings are updated here
            optimizer.step(); optimizer.zero_grad()

What it returns is `bagpipe.embeddings.batches.Lookahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args, overload

from bagpipe.device_oracle.oracle import bytes_beside_slots
from bagpipe.embeddings.agreement import check_same_settings
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.capacity import slots_for
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.embeddings.joint import JointCollections
from bagpipe.embeddings.move import Move
from bagpipe.errors import ConfigError
from bagpipe.feed.stream import BatchAdapter, Deferred, StreamOptions
from bagpipe.jagged import find_sparse, share_batch
from bagpipe.oracle.sizes import parse_bytes
from bagpipe.topology import ONE_TRAINER, Topology
from bagpipe.types import OraclePlace

BatchT = TypeVar("BatchT")
_MAX_THREADS = 256
_MIN_REPLICAS = 4096


class _Options(TypedDict, total=False):
    """What does not change the type of the batches."""

    cache: int | str | Sequence[int]
    lookahead: int | Literal["auto"]
    lookahead_memory: int | str
    prefetch_depth: int
    dedup_threads: int | None
    check: bool
    sparse: Callable[[Any], Any] | None
    oracle: OraclePlace
    replicas: int | Sequence[int] | None
    share: Callable[[Any, int, int], Any]
    overlap: bool


@overload
def lookahead(
    batches: Iterable[BatchT | Deferred[BatchT]],
    embeddings: EmbeddingBagCollection | Sequence[EmbeddingBagCollection],
    *,
    hand_out: None = None,
    move: None = None,
    **options: Unpack[_Options],
) -> Lookahead[BatchT]: ...


@overload
def lookahead(
    batches: Iterable[BatchT | Deferred[BatchT]],
    embeddings: EmbeddingBagCollection | Sequence[EmbeddingBagCollection],
    *,
    hand_out: Callable[[BatchT], Any] | None = None,
    move: Move | None = None,
    **options: Unpack[_Options],
) -> Lookahead[Any]: ...


def lookahead(
    batches: Iterable[BatchT | Deferred[BatchT]],
    embeddings: EmbeddingBagCollection | Sequence[EmbeddingBagCollection],
    *,
    cache: int | str | Sequence[int] = "auto",
    lookahead: int | Literal["auto"] = "auto",
    lookahead_memory: int | str = "1GiB",
    prefetch_depth: int = 2,
    dedup_threads: int | None = None,
    check: bool = False,
    sparse: Callable[[BatchT], Any] | None = None,
    oracle: OraclePlace = "thread",
    hand_out: Callable[[BatchT], Any] | None = None,
    move: Move | None = None,
    replicas: int | Sequence[int] | None = None,
    share: Callable[[BatchT, int, int], BatchT] = share_batch,
    overlap: bool = True,
) -> Lookahead[Any]:
    """Iterates `batches` with `embeddings` prepared for each.

    Batches pass through unchanged and in order. The loop must leave a batch as it came until its
    step is over, and a loader that fills the same buffers again must yield copies of them. A hash
    of each batch's contents is compared between reading and handing out (0.1 ms a MB each). It
    covers arrays, tensors and lists of numbers in containers, KeyedJaggedTensors and objects'
    public attributes; of tensors on a GPU, torch's count of writes is compared. The same batches
    may come again.

    With several trainers, where the embeddings have a communicator, `batches` are the global
    batches, the same on every rank, and each rank is handed its share. All ranks must do the same
    with every batch, in the same order: run backward or not, set the same learning rate, flush,
    evaluate and leave the loop. They compare what they did before each step. Where each rank reads
    for itself they also compare batches and plans. If one differs, all raise an error that names
    the rank, the step and the difference.

    A single trainer may give a list of collections, each with its device cache's part. Call each
    with the whole sparse part of the batch, from then on in evaluation too; it looks up its own
    features. One step trains all.

    Only `backward` reaches the tables. What clips gradients after it does not. Backward refuses the
    loss of a `torch.amp.GradScaler` of which `embeddings.set_grad_scaler` was not told.

    Args:
        batches: any iterable, a torch DataLoader too. A thread of its own reads it, `lookahead`
            batches ahead.
        cache: the device cache over all tables: rows, a share of them ("2%"), memory ("4GiB"), rows
            for each group of tables of one dimension, or "auto" (half of the free memory).
        lookahead: in batches. "auto" grows the window while more of it saves fetches and it fits
            `lookahead_memory`.
        prefetch_depth: how many steps before its use a row may be fetched.
        dedup_threads: by default a quarter of the cores, with several trainers three eighths.
        check: replays every plan against the invariants before it is used.
        sparse: finds a batch's jagged ids; by default the batch itself or its `sparse` or
            `sparse_features` attribute or key.
        oracle: "thread" reads and plans batches in threads of this process; each rank does so for
            itself. "process" does it in a process of its own (Linux), which keeps it away from
            steps of a few milliseconds. A host's first trainer starts it, and it reads `batches`
            once for all of that host. `batches` and `sparse` must be picklable then, and as with a
            DataLoader's workers a script needs ``if __name__ == "__main__":``. "device" reads in
            threads and plans on the device of `embeddings`, for a single trainer; the host then
            only reads and moves rows. With it lookahead="auto" is how many batches fit
            `lookahead_memory`, at most 256, and the window grows to that by one batch a step. They
            are counted as of the loader's `batch_size`, as a DataLoader has it, or of the first
            one's size where that is larger. Where later ones are larger, the memory grows with
            them.
        hand_out: makes of each batch, where it is read and planned, what goes on from there. Leave
            out here what training does not need, above all the ids
            (`bagpipe.data.base.Batch.without_ids`): an oracle process would copy them. The
            embeddings are then called with what `sparse` finds in the result.
        move: takes a batch, or what `hand_out` made of it, up to `prefetch_depth` steps ahead in
            the training loop's thread, so conversions belong in `hand_out`; with oracle="device" as
            soon as it is read, in a thread that reads. An error in it ends the iteration at once,
            or before that batch. It returns C-contiguous float32 or int32 arrays, which go to the
            device of `embeddings` along with the plan, and a function that makes of their tensors
            what the iteration yields::

                def move(batch):
                    return [batch.dense, batch.labels], lambda tensors: (
                        tensors[0], batch.sparse, tensors[1])

            All arrays of a step share one piece of the device's memory: keep a `clone()` of what
            must outlive the step. Other arrays of an oracle process's batch are good until the step
            after the batch's; so are its tensors without a GPU, since they share the arrays'
            memory.
        replicas: how many rows of other ranks one step may need, or so many for each group; by
            default half the cache's rows, and at least 4,096.
        share: makes a rank's batch of (global batch, rank, number of trainers).
        overlap: False puts all that travels between trainers on the critical path, with the same
            result. The benchmark `trainers` measures what overlapping saves.

    Returns:
        An iterator and context manager; see `Lookahead` for what else it tells.

    Raises:
        ConfigError: a value is out of range.

    Iterating raises CacheTooSmallError, DataError (also for a batch that was changed, and where
    ranks read different batches), UsageError (also where ranks do different things) and what the
    loader raised, as the cause of a BackgroundError. All batches before the bad one come first.
    """
    if dedup_threads is not None and not 1 <= dedup_threads <= _MAX_THREADS:
        raise ConfigError(f"dedup_threads is {dedup_threads}, must be from 1 to {_MAX_THREADS}")
    if oracle not in get_args(OraclePlace):
        raise ConfigError(f"oracle is {oracle!r}, must be 'thread', 'process' or 'device'")
    whole = (
        embeddings
        if isinstance(embeddings, EmbeddingBagCollection)
        else JointCollections(embeddings)
    )
    # An earlier stream's cache must be free before this one is sized, and its last step closed.
    whole.stop()
    peers = whole.peers
    if oracle == "device" and peers.has_others:
        raise ConfigError(
            f"oracle is 'device' with {peers.num_trainers} trainers: the device plans for one "
            "trainer alone, so take 'process' or 'thread'"
        )
    beside = bytes_beside_slots(whole.groups, whole.device) if oracle == "device" else ()
    num_slots = slots_for(cache, whole.groups, whole.device, peers, beside)
    options = StreamOptions(
        groups=whole.groups,
        num_slots=tuple(num_slots),
        topology=_topology(whole, num_slots, replicas, overlap),
        lookahead=lookahead,
        lookahead_bytes=parse_bytes(lookahead_memory, "lookahead_memory"),
        prefetch_depth=prefetch_depth,
        first_step=whole.step,
        dedup_threads=dedup_threads,
        check=check,
    )
    check_same_settings(peers, options, seed=whole.seed)
    adapter = BatchAdapter(sparse=sparse or find_sparse, share=share, hand_out=hand_out)
    return Lookahead(batches, whole, options, adapter, move, oracle=oracle)


def _topology(
    embeddings: EmbeddingBagCollection | JointCollections,
    num_slots: Sequence[int],
    replicas: int | Sequence[int] | None,
    overlap: bool,
) -> Topology:
    peers = embeddings.peers
    if not peers.has_others:  # who needs no rows of others
        return ONE_TRAINER
    if replicas is None:
        replicas = [max(slots // 2, _MIN_REPLICAS) for slots in num_slots]
    elif isinstance(replicas, int):
        replicas = [replicas] * len(num_slots)
    return Topology(
        num_trainers=peers.num_trainers,
        ranks=(peers.rank,),
        ranks_of_host=peers.hosts.own_ranks,
        num_replica_slots=tuple(replicas),
        overlap=overlap,
    )
