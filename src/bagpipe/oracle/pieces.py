"""The layout of a gradient schedule: which bags feed each unique row, in pieces of bounded length.

Each row has a first piece, and these stand in the order of the rows, so that a row's index finds
its own. The further pieces of long rows come behind all first ones, row by row.
"""

from __future__ import annotations

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.types import Float32Array, Int32Array


@jit
def cut_pieces(
    counts: Int32Array, max_length: int
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """Lays out the pieces of all rows.

    Args:
        counts: (U,) how many lookups feed each row's gradient.
        max_length: The most bags in a piece.

    Returns:
        piece_offsets, long_uniques and long_offsets of `GradientSchedule`, and `cursors` (U, 3):
        where in the bags a row's first piece begins, where that piece ends (-1 for a row with only
        one), and where its further pieces begin.
    """
    num_uniques = len(counts)
    num_long = 0
    num_pieces = num_uniques
    for unique in range(num_uniques):
        if counts[unique] > max_length:
            num_long += 1
            num_pieces += (counts[unique] - 1) // max_length
    piece_offsets = np.empty(num_pieces + 1, np.int32)
    long_uniques = np.empty(num_long, np.int32)
    long_offsets = np.empty(num_long + 1, np.int32)
    cursors = np.empty((num_uniques, 3), np.int32)
    end = 0
    for unique in range(num_uniques):
        piece_offsets[unique] = end
        cursors[unique, 0] = end
        end += min(counts[unique], max_length)
        cursors[unique, 1] = -1
    long_offsets[0] = 0
    long = 0
    piece = num_uniques
    for unique in range(num_uniques):
        rest = counts[unique] - max_length
        if rest > 0:
            cursors[unique, 1], cursors[unique, 2] = piece_offsets[unique] + max_length, end
            long_uniques[long] = unique
            while rest > 0:
                piece_offsets[piece] = end
                end += min(rest, max_length)
                rest -= max_length
                piece += 1
            long += 1
            long_offsets[long] = piece - num_uniques
    piece_offsets[num_pieces] = end
    return piece_offsets, long_uniques, long_offsets, cursors


@jit
def group_bags(
    inverse: Int32Array,
    bag_offsets: Int32Array,
    batch_size: int,
    num_features: int,
    weights: Float32Array,
    cursors: Int32Array,
    bags: Int32Array,
    bag_weights: Float32Array,
) -> None:
    """Fills `bags` (L,): the output rows grouped by unique row, in lookup order within a row.

    Fills `bag_weights` (L,) in the same order where there are weights. Moves the `cursors` of
    `cut_pieces` on.
    """
    lookup = 0
    for feature in range(num_features):
        bag = feature
        for sample in range(batch_size):
            end = lookup + 1
            if len(bag_offsets) > 0:
                end = bag_offsets[feature * batch_size + sample + 1]
            while lookup < end:
                unique = np.uint32(inverse[lookup])
                place = cursors[unique, 0]
                bags[np.uint32(place)] = bag
                if len(weights) > 0:
                    bag_weights[np.uint32(place)] = weights[lookup]
                place += 1
                # Past its first piece a row goes on with its further ones, which lie in one run.
                # The CPU predicts a branch as rare as this one. A choice without a branch would
                # make each lookup of a row wait for the one before.
                if place == cursors[unique, 1]:
                    place = cursors[unique, 2]
                cursors[unique, 0] = place
                lookup += 1
            bag += num_features
