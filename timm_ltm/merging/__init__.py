"""Learnable Token Merging itself: tensors and torch, no timm."""

from timm_ltm.merging.clusters import Clusters, RunningClusters
from timm_ltm.merging.config import PAPER, MergeConfig, num_slots
from timm_ltm.merging.mask_module import MergeState, initial_state, slots_of
from timm_ltm.merging.merge import AnchoredMask, DenseMask, GridMask, Mask, merge, unmerge
from timm_ltm.merging.merger import TokenMerger

__all__ = [
    "PAPER",
    "AnchoredMask",
    "Clusters",
    "DenseMask",
    "GridMask",
    "Mask",
    "MergeConfig",
    "MergeState",
    "RunningClusters",
    "TokenMerger",
    "initial_state",
    "merge",
    "num_slots",
    "slots_of",
    "unmerge",
]
