"""Every registered model."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_ltm  # noqa: F401  registers the models

SHORT = {"ltm_swin_tiny", "ltm_swin_small", "ltm_swin_base"}
NAMES = [name for name in timm.list_models("ltm_*") if name not in SHORT]
# GMACs and millions of parameters at most: the paper's ratios to the plain model (Tables 1 and 2), of timm's models
BUDGETS = {
    "ltm_vit_small_patch16_224": (3.70, 23.0),
    "ltm_vit_base_patch16_224": (12.85, 90.4),
    "ltm_swin_tiny_patch4_window7_224": (3.79, 30.5),
    "ltm_swin_base_patch4_window7_224": (12.0, 92.0),
    "ltm_mobilevit_xs": (0.762, 2.5),
    "ltm_mobilevit_s": (1.672, 5.9),
    "ltm_mobilevit_xxs": (0.33, 1.45),
    "ltm_efficientvit_b1.r224_in1k": (0.440, 9.5),
    "ltm_efficientvit_b1.r288_in1k": (0.700, 9.5),
}


def plain_name(name):
    return name.removeprefix("ltm_").replace("vit_test", "test_vit")


@pytest.mark.parametrize("name", timm.list_models("ltm_*", include_tags=True))
def test_they_are_those_of_timm(name):
    """Sizes and preprocessing are the plain model's, so its weights fit."""
    if name in SHORT:
        return  # tests of Swin
    ours, theirs = (timm.get_pretrained_cfg(n).to_dict() for n in (name, plain_name(name)))
    theirs.update(architecture=name.split(".")[0], custom_load=False)
    pool_size = ours["pool_size"]
    for cfg in (ours, theirs):
        cfg.pop("url", None)
        cfg.pop("pool_size")
    assert ours == theirs
    if pool_size is not None:  # the merged map's
        model = timm.create_model(name, device="meta").eval()
        features = model.forward_features(torch.empty(1, *ours["input_size"], device="meta"))
        assert pool_size == tuple(features.shape[1:3] if "swin" in name else features.shape[2:])
    model, counterpart = (timm.create_model(n, device="meta") for n in (name, plain_name(name)))
    shapes = {key: value.shape for key, value in model.state_dict().items() if ".merger." not in key}
    assert shapes == {key: value.shape for key, value in counterpart.state_dict().items()}
    assert list(model.mergers()), "it merges by default"


@pytest.mark.parametrize("name", NAMES)
def test_without_merging_they_are_timms(name):
    torch.manual_seed(0)
    plain = timm.create_model(plain_name(name)).eval()
    size = 224 if timm.get_pretrained_cfg(name).fixed_input_size else 96
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = plain(x)
        for settings in ({}, {"compression_ratio": 1.0}):
            model = timm.create_model(name, **settings).eval()
            model.load_state_dict(plain.state_dict())
            model.set_merging(False if not settings else None)
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(name):
    model = timm.create_model(name, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *timm.get_pretrained_cfg(name).input_size, device="meta"))
    gmacs, parameters = BUDGETS[name]
    assert counter.get_total_flops() / 2e9 <= gmacs
    assert sum(p.numel() for p in model.parameters()) / 1e6 <= parameters
