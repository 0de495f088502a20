"""LTM models, registered with timm on import."""

from timm_ltm.models._common import MergeMasks
from timm_ltm.models.ltm_swin import LTMSwinBlock, LTMSwinTransformer
from timm_ltm.models.ltm_vit import LTMBlock, LTMVisionTransformer, LTMVisionTransformerDistilled

__all__ = [
    "LTMBlock",
    "LTMSwinBlock",
    "LTMSwinTransformer",
    "LTMVisionTransformer",
    "LTMVisionTransformerDistilled",
    "MergeMasks",
]
