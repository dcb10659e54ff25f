"""Rank 0's part of a cut of shard servers: what they wrote becomes a checkpoint.

    with CheckpointWriter(run, step, name=str(number)) as writer:
        ..                   # tell servers to cut into writer.folder, take the moment, go on
        add_cut(writer, ..)  # beside training, once all servers have written
    ..                       # in place: tell servers that it is committed

A failure within removes the folder, and the cut is to be abandoned. See docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from bagpipe.checkpoint.checkpoints import DENSE, Moment, SavedRun
from bagpipe.checkpoint.files import CheckpointWriter
from bagpipe.store.manifest import describe
from bagpipe.store.record_files import RecordFile, next_files
from bagpipe.types import Group


def add_cut(
    writer: CheckpointWriter,
    name: str,
    moment: Moment,
    groups: Sequence[Group],
    written: Sequence[Sequence[RecordFile]],
    base: SavedRun | None,
) -> None:
    """Adds to a checkpoint all that belongs to a cut but what servers have written there.

    That is the dense state, links to the base's files that are still needed, and the manifest.

    Args:
        writer: writes the checkpoint.
        name: the cut's, "N.K".
        moment: everything but records, as of the cut.
        groups: all groups.
        written: for each server the file of each group.
        base: the checkpoint before, which servers were told was committed; None: none was.

    Raises:
        CheckpointError: the disk is full, the folder can't be written, a server's file is not
            there, or a newer start of the run has taken it over.
    """
    writer.write_bytes(DENSE, moment.dense)
    by_group = []
    for index in range(len(groups)):
        new = [of_shard[index] for of_shard in written]
        by_group.append(next_files(base.record_files[index] if base else (), new))
        for file in by_group[-1]:
            if file in new:
                writer.add(file)
            else:
                assert base is not None
                writer.link(base.path, file)
    described = [describe(*each) for each in zip(groups, by_group, strict=True)]
    writer.write_manifest({**moment.content, "cut": name, "groups": described})
