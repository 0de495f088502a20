"""timm_ltm: vision transformers of timm, smaller and faster by Learnable Token Merging."""

from timm_ltm import models

__all__ = ["models"]
__version__ = "0.1.0"
