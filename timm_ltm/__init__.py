"""timm_ltm: vision transformers of timm, smaller and faster by merging tokens.

Importing registers the models with timm: ``timm.create_model("ltm_vit_small_patch16_224")``. A model in hand:
``timm_ltm.convert(model, "ltm")``.
"""

from timm_ltm import (
    methods,  # noqa: F401  registers the methods, which models.registry reads
    models,
    tasks,  # noqa: F401  attaches a refresh to timm's tasks
)
from timm_ltm.models import convert
from timm_ltm.reduction import METHODS
from timm_ltm.search import search_schedule
from timm_ltm.training import ClusterRefresh

__all__ = ["METHODS", "ClusterRefresh", "convert", "models", "search_schedule"]
__version__ = "0.1.0"
