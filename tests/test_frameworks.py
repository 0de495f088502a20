"""Frameworks that take a timm backbone take merging ones by name, with no edit anywhere."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import timm_ltm  # noqa: F401  registers the models

SIZE = 128
NAMES = {
    "swin_tiny_patch4_window7_224": dict(
        img_size=SIZE, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=4
    ),
    "mobilevit_s": {},
    "efficientvit_b1": {},
}
ALIAS = {"swin_tiny_patch4_window7_224": "ltm_swin_tiny"}


class Pyramid(nn.Module):
    """What one writes to put a timm backbone under torchvision's detectors: no word of merging."""

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
        self.out_channels = 16

    def forward(self, x):
        maps = self.body(x)
        last = str(getattr(self.body, "output_fmt", "NCHW"))
        maps = [m.permute(0, 3, 1, 2) if last.endswith("NHWC") else m for m in maps]
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def detector(kind, backbone):
    kwargs = dict(
        num_classes=3,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 3, 2),
    )
    if kind is MaskRCNN:
        kwargs["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 6, 2)
    return kind(backbone, **kwargs)


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN])
@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_detectors(name, kind):
    torch.manual_seed(0)
    plain, merging = (Pyramid(n, **NAMES[name]) for n in (name, ALIAS.get(name, f"ltm_{name}")))
    assert merging.body.feature_info.reduction() == plain.body.feature_info.reduction()
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        shapes = [{k: m.shape for k, m in model.eval()(x).items()} for model in (plain, merging)]
    assert shapes[0] == shapes[1]
    model = detector(kind, merging)
    model.eval()
    with torch.no_grad():
        assert len(model([*x])) == 2
    model.train()
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, SIZE, SIZE, dtype=torch.uint8),
    }
    losses = model([*x], [target, target])
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    body = [p.grad for p in merging.body.parameters() if p.grad is not None]
    assert body
    assert all(g.isfinite().all() for g in body)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_segmentation_models(name):
    """``tu-`` encoders of segmentation_models_pytorch, by name."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    x, made = torch.rand(2, 3, SIZE, SIZE), []
    for n in (name, ALIAS.get(name, f"ltm_{name}")):
        kwargs = NAMES[name] if "swin" in name else {}
        model = smp.Unet(f"tu-{n}", encoder_weights=None, classes=4, **kwargs).eval()
        with torch.no_grad():
            made.append((model.encoder.out_channels, [m.shape for m in model.encoder(x)], model(x).shape))
    assert made[0] == made[1]
