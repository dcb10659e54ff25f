"""The oracle: from ids to plans. Numpy and numba; never imports torch."""

from bagpipe.oracle.checks import checked
from bagpipe.oracle.dedup import DedupedGroup, dedup
from bagpipe.oracle.eviction.cacher import Cacher
from bagpipe.oracle.oracle import DedupedBatch, Oracle
from bagpipe.oracle.report import OracleReport

__all__ = [
    "Cacher",
    "DedupedBatch",
    "DedupedGroup",
    "Oracle",
    "OracleReport",
    "checked",
    "dedup",
]
