"""timm_ltm: vision transformers of timm, smaller and faster by Learnable Token Merging.

Importing registers the models with timm: ``timm.create_model("ltm_vit_small_patch16_224")``.
"""

from timm_ltm import models
from timm_ltm.merging import PAPER, MergeConfig
from timm_ltm.training import ClusterRefresh

__all__ = ["PAPER", "ClusterRefresh", "MergeConfig", "models"]
__version__ = "0.1.0"
