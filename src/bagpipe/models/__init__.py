"""Dense halves of recommendation models: torch only, over any module that pools embeddings."""

from __future__ import annotations

from bagpipe.models.dlrm import DLRM

__all__ = ["DLRM"]
