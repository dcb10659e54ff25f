"""The rules of the protocol, each of which a test can switch off: a planted mistake."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds where nothing is planted. See docs/protocol.md."""

    epoch_in_messages: bool = True
    checked_when_applied: bool = True  # not only when a write arrives
    one_write_stream: bool = True  # a rank and shard, claimed once; False: two
    fences: bool = True
    fences_of_all: bool = True  # not only of the ranks of the own host
    marks_forgotten: bool = True  # by begin
    committed_after_rename: bool = True
    old_values: bool = True  # while a cut is written
    unwritten_again: bool = True  # rows first written since the base, when put back
    failed_rows_kept: bool = True  # rows of a cut that failed are in the next one
    flush_answered: bool = True  # before the first barrier of a cut
    taken_first: bool = True  # by all servers, before rank 0 goes on
    fenced_folders: bool = True  # older epochs' cuts are renamed away
    own_number: bool = True  # an epoch's number is used once
    cuts_by_name: bool = True  # N.K; False: by the step


ALL = Rules()
