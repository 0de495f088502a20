"""A small model, of 64 tokens, for what does not depend on the model."""

from __future__ import annotations

import timm
import torch

import timm_ltm  # noqa: F401  registers the models

SHAPE = dict(img_size=8, patch_size=1, in_chans=1, num_classes=10, num_clusters=8, compression_ratio=0.8)


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("ltm_vit_test", **{**SHAPE, **kwargs})
