"""Merging models, one file for each timm family, registered with timm on import."""

from timm_ltm.models.base import MergeMasks, ReducedModel
from timm_ltm.models.registry import convert

__all__ = ["MergeMasks", "ReducedModel", "convert"]
