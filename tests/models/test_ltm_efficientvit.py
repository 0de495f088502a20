"""LTM on EfficientViT."""

from __future__ import annotations

from typing import ClassVar

from .contract import ModelContract
from .maps import MAP_MODES


class TestEfficientViT(ModelContract):
    name = "ltm_efficientvit_b0"
    plain = "efficientvit_b0"
    size = (128, 128)
    kwargs: ClassVar = {"num_classes": 10}
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1.0), "img_size": 128}
    dropout: ClassVar = {"drop_rate": 0.1}
    sweep: ClassVar = {
        **ModelContract.sweep, "mode": MAP_MODES, "pool": ["avg", "max"], "output_fmt": ["NCHW"], "carry": [{}],
        "other_size": [(96, 72), (75, 110)],
    }  # fmt: skip
    keeps_maps = False
    tolerance = 5e-4  # untrained, its linear attention divides by sums near zero
    resizes = False
