"""Learnable Token Merging (LTM; Wang & Yang, TPAMI 2025): anchors, the information-bottleneck update, clusters."""

from timm_ltm.methods.ltm.anchors import LTM, LTMConfig
from timm_ltm.methods.ltm.clusters import Clusters
from timm_ltm.methods.ltm.running import RunningClusters

__all__ = ["LTM", "Clusters", "LTMConfig", "RunningClusters"]
