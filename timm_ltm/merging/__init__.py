"""Learnable Token Merging itself: tensors and torch, no timm."""

from timm_ltm.merging.clusters import Clusters, RunningClusters
from timm_ltm.merging.config import PAPER, MergeConfig, num_slots
from timm_ltm.merging.merge import AnchoredMask, DenseMask, Mask, merge, unmerge
from timm_ltm.merging.merger import MergeState, TokenMerger, initial_state

__all__ = [
    "PAPER",
    "AnchoredMask",
    "Clusters",
    "DenseMask",
    "Mask",
    "MergeConfig",
    "MergeState",
    "RunningClusters",
    "TokenMerger",
    "initial_state",
    "merge",
    "num_slots",
    "unmerge",
]
