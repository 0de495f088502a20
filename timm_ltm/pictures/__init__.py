"""Pictures of what was merged over photographs (Figure 5 of the paper) and charts (Figures 2 to 4). Need matplotlib."""

from timm_ltm.pictures.charts import curves_figure, information_figure, tradeoff_figure
from timm_ltm.pictures.masks import blocks_figure, mask_figure
from timm_ltm.pictures.overlays import heat_over, rebuilt, sources_over
from timm_ltm.pictures.photos import load_photo

__all__ = [
    "blocks_figure",
    "curves_figure",
    "heat_over",
    "information_figure",
    "load_photo",
    "mask_figure",
    "rebuilt",
    "sources_over",
    "tradeoff_figure",
]
