"""LTM on EfficientViT."""

from __future__ import annotations

from typing import ClassVar

from .contract import ModelContract
from .maps import MAP_MODES


class TestEfficientViT(ModelContract):
    name = "ltm_efficientvit_b0"
    plain = "efficientvit_b0"
    size = (96, 96)
    kwargs: ClassVar = {"num_classes": 10}
    ltm: ClassVar = {"compression_ratio": (0.6, 0.5, 0.4, 0.2), "img_size": 96}
    dropout: ClassVar = {"drop_rate": 0.1}
    sweep: ClassVar = {
        **ModelContract.sweep, "mode": MAP_MODES, "pool": ["avg", "max"], "output_fmt": ["NCHW"], "carry": [{}],
        "other_size": [(128, 72), (75, 110)],
    }  # fmt: skip
    keeps_maps = False
    resizes = False
