"""Dense halves of recommendation models: torch only, over any module that pools embeddings."""

from __future__ import annotations

from bagpipe.models.base import RankingModel
from bagpipe.models.dcn import DLRM_DCN
from bagpipe.models.deepfm import DeepFM
from bagpipe.models.dlrm import DLRM
from bagpipe.models.wide_deep import WideDeep

__all__ = ["DLRM", "DLRM_DCN", "DeepFM", "RankingModel", "WideDeep"]
