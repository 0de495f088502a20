"""The methods, registered on import. A method knows ``timm_ltm.reduction`` alone: no timm, no model."""

from timm_ltm.methods import ltm, ltmp, paper, patch_merger, tofu, tome  # noqa: F401  the registry orders them by these imports
