"""LTM models, registered with timm on import."""

from timm_ltm.models.ltm_vit import LTMBlock, LTMVisionTransformer, LTMVisionTransformerDistilled, MergeMasks

__all__ = ["LTMBlock", "LTMVisionTransformer", "LTMVisionTransformerDistilled", "MergeMasks"]
