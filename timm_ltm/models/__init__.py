"""LTM models, registered with timm on import."""

from timm_ltm.models._common import MergeMasks
from timm_ltm.models.ltm_efficientvit import LTMEfficientVit
from timm_ltm.models.ltm_mobilevit import LTMMobileVit
from timm_ltm.models.ltm_swin import LTMSwinTransformer
from timm_ltm.models.ltm_vit import LTMBlock, LTMVisionTransformer, LTMVisionTransformerDistilled

__all__ = [
    "LTMBlock",
    "LTMEfficientVit",
    "LTMMobileVit",
    "LTMSwinTransformer",
    "LTMVisionTransformer",
    "LTMVisionTransformerDistilled",
    "MergeMasks",
]
