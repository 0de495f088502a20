"""LTM on Swin Transformer."""

from __future__ import annotations

from typing import ClassVar

from .contract import MODES, ModelContract
from .maps import MAP_MODES


class TestSwin(ModelContract):
    name = "ltm_swin_tiny_patch4_window7_224"
    plain = "swin_tiny_patch4_window7_224"
    kwargs: ClassVar = {
        "img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 4,
        "num_classes": 10, "drop_path_rate": 0.0,
    }  # fmt: skip
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.5, 1.0, 0.4, 1.0), "cluster_dim": 16}
    shallow: ClassVar = {"depths": (1, 1, 2), "compression_ratio": (0.6, 0.5, 0.4, 1.0)}
    sweep: ClassVar = {
        **ModelContract.sweep,
        "mode": [m for m in MAP_MODES if "dense" not in str(MODES[m]) and MODES[m].get("preset") != "paper"],
        "output_fmt": ["NCHW"],
        "carry": [{}],
        "trained": ["plain", "default", "true_labels"],
    }
    keeps_maps = False
    extra: ClassVar = {"strict_img_size": False}
