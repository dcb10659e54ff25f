"""Sizes of the 26 categorical columns of Criteo's two public data sets.

They are the numbers of unique values that the DLRM reference counts.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

DatasetName: TypeAlias = Literal["kaggle", "terabyte"]

# fmt: off
CARDINALITIES: Final[dict[DatasetName, tuple[int, ...]]] = {
    "kaggle": (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
        27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    ),
    # MLPerf's, over days 0 to 23.
    "terabyte": (
        45833188, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, 29275261, 1572176, 345138, 10,
        2209, 11267, 128, 4, 974, 14, 48937457, 11316796, 40094537, 452104, 12606, 104, 35,
    ),
}
# fmt: on
