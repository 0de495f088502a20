"""LTM on MobileViT."""

from __future__ import annotations

from typing import ClassVar

from .contract import ModelContract
from .maps import MAP_MODES


class TestMobileViT(ModelContract):
    name = "ltm_mobilevit_xxs"
    plain = "mobilevit_xxs"
    size = (128, 128)
    kwargs: ClassVar = {"num_classes": 10, "img_size": 128}
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1, 1, 1, 1, 1, 1)}
    dropout: ClassVar = {"drop_rate": 0.1, "drop_path_rate": 0.2}
    sweep: ClassVar = {
        **ModelContract.sweep, "mode": MAP_MODES,
        "pool": ["avg", "max"], "output_fmt": ["NCHW"], "carry": [{}],
        "other_size": [(96, 72), (75, 110)],
    }  # fmt: skip
    keeps_maps = False
    resizes = False
