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
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

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
    oracle: Literal["thread", "process"]
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
    oracle: Literal["thread", "process"] = "thread",
    hand_out: Callable[[BatchT], Any] | None = None,
    move: Move | None = None,
    replicas: int | Sequence[int] | None = None,
    share: Callable[[BatchT, int, int], BatchT] = share_batch,
    overlap: bool = True,
) -> Lookahead[Any]:
    """Iterates `batches` with `embeddings` prepared for each.

    Batches pass through unchanged and in order. The loop must leave a batch as it came until its
    step is over, and a loader that fills the same buffers again must yield copies of them. What a
    batch's arrays, tensors and lists of numbers hold, in containers, KeyedJaggedTensors and
    objects' public attributes, is hashed when it is read and compared when it is handed out (0.1 ms
    a MB each; for tensors on a GPU torch's count of writes is compared). The same batches may come
    again and again.

    With several trainers, where the embeddings have a communicator, `batches` are the global
    batches, the same on every rank, and each rank is handed its share. All ranks must do the same
    with every batch, in the same order: run backward or not, set the same learning rate, flush,
    evaluate and leave the loop. Before each step they compare what they did, and where each reads
    for itself also the batches and plans. Where one parts, all raise an error that says which rank,
    at which step, and what.

    `embeddings` may be a list of collections, each with its device cache's part, for a single
    trainer. Each is called with the whole sparse part of the batch and looks up its own features;
    a step is one of all. From then on each also takes such batches in evaluation.

    Only `backward` reaches the tables. Tell them of a `torch.amp.GradScaler` by
    `embeddings.set_grad_scaler`, or backward refuses a scaled loss. What clips gradients after
    backward does not reach them.

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
        oracle: where batches are read and planned: in threads of this process, or in a process of
            its own (Linux), which keeps steps of a few milliseconds free of it. `batches` and
            `sparse` must be picklable then, and as with a DataLoader's workers a script needs
            ``if __name__ == "__main__":``. The trainers of a host share such a process: their first
            one starts it, and it reads `batches` once for all. In threads each rank reads and plans
            the global batches for itself.
        hand_out: makes of each batch, where it is read and planned, what goes on from there. Leave
            out here what training does not need, above all the ids, which would be copied to this
            process (`bagpipe.data.base.Batch.without_ids`). The embeddings are then called with
            what `sparse` finds in the result.
        move: says what of a batch goes to the device of `embeddings` ahead, along with the plan;
            see below.
        replicas: how many rows of other ranks one step may need, or so many for each group; by
            default half the cache's rows, and at least 4,096.
        share: makes a rank's batch of (global batch, rank, number of trainers).
        overlap: False puts all that travels between trainers on the critical path, with the same
            result. The benchmark `trainers` measures what overlapping saves.

    `move` is called with the batch, or with what `hand_out` made of it. It returns numpy arrays,
    C-contiguous and of float32 or int32, and a function that makes of their tensors what the
    iteration yields::

        def move(batch):
            return [batch.dense, batch.labels], lambda tensors: (
                tensors[0], batch.sparse, tensors[1])

    It runs in the training loop's thread, up to `prefetch_depth` steps ahead, so conversions belong
    in `hand_out`; an error in it ends the iteration at once. All arrays of a step share one piece
    of the device's memory: keep a `clone()` of what must outlive the step. With an oracle process a
    batch's other arrays are good until the step after the batch's. Without a GPU so are the
    tensors, which share the arrays' memory.

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
    if oracle not in ("thread", "process"):
        raise ConfigError(f"oracle is {oracle!r}, must be 'thread' or 'process'")
    whole = (
        embeddings
        if isinstance(embeddings, EmbeddingBagCollection)
        else JointCollections(embeddings)
    )
    # An earlier stream's cache must be free before this one is sized, and its last step closed.
    whole.stop()
    peers = whole.peers
    num_slots = slots_for(cache, whole.groups, whole.device, peers)
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
    return Lookahead(batches, whole, options, adapter, move, in_process=oracle == "process")


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
        ranks_of_host=tuple(peers.ranks_of_host),
        num_replica_slots=tuple(replicas),
        overlap=overlap,
    )
