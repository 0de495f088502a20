"""What every method and every model shares: tokens, masks, matching, lines, and the reducer's interface. No timm."""

from timm_ltm.reduction.lines import GridMask, LineReducer
from timm_ltm.reduction.masks import DenseMask, HardMask, Mask, SoftMask
from timm_ltm.reduction.reducer import (
    METHODS,
    Config,
    Observer,
    Reducer,
    Seen,
    Site,
    find_method,
    form_of,
    register_method,
)
from timm_ltm.reduction.tokens import Tokens, initial_tokens

__all__ = [
    "METHODS",
    "Config",
    "DenseMask",
    "GridMask",
    "HardMask",
    "LineReducer",
    "Mask",
    "Observer",
    "Reducer",
    "Seen",
    "Site",
    "SoftMask",
    "Tokens",
    "find_method",
    "form_of",
    "initial_tokens",
    "register_method",
]
