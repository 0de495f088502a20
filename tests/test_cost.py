"""The counter of GMACs against a count by hand, and budgets in place of ratios."""

from __future__ import annotations

import pytest
import timm
import torch

import timm_ltm
from timm_ltm.cost import gmacs, input_size_of

SHAPE = dict(img_size=96, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=10)  # 144 tokens

on_meta = pytest.mark.skipif(
    timm.__version__ == "1.0.29", reason="EfficientViT of timm before 1.0.30 does not run on torch's meta device"
)


def plain(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **{**SHAPE, **kwargs}).eval()


def by_hand(tokens_in, tokens_out, merges):
    """10^9 multiply-adds of SHAPE with ToMe: linear layers, attention's two products, the merge's, the head."""
    D, total = 32, 144 * 8 * 8 * 3 * 32 + 32 * 10
    for N, P, goes in zip(tokens_in, tokens_out, merges, strict=True):
        total += 4 * (N + 1) * D * D + 2 * (N + 1) ** 2 * D  # qkv and the projection, q k^T and the average of v
        total += 2 * 4 * (P + 1) * D * D  # the MLP
        if goes:
            K, M = 16, N - P
            total += -(-N // 2) * (N // 2) * K  # even keys with odd ones
            total += M * P  # sizes
            total += M * (P + 1) * D  # what goes onto what stays, the class token among the slots
    return total / 1e9


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fused", [False, True])
def test_counts_by_hand(device, fused):
    model = plain(device=device)
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert gmacs(model) == pytest.approx(by_hand([144] * 6, [144] * 6, [False] * 6), rel=1e-12)
    merging = timm_ltm.convert(model, "tome", r=[0, 20, 0, 20, 0, 0])
    expected = by_hand(
        [144, 144, 124, 124, 104, 104], [144, 124, 124, 104, 104, 104], [False, True, False, True] + [False] * 2
    )
    assert gmacs(merging) == pytest.approx(expected, rel=1e-12)


def test_the_size_is_the_models_own():
    model = timm.create_model("test_vit", img_size=48, in_chans=1)
    assert input_size_of(model) == (1, 48, 48)
    assert gmacs(model) < gmacs(model, (1, 64, 64))


def test_attention_pooling_is_counted():
    assert gmacs(plain(global_pool="map", class_token=False)) > gmacs(plain(global_pool="avg", class_token=False))


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("method", ["ltm", "tome", "tofu", "patch_merger"])
def test_a_budget_is_met_from_below(method, share):
    model = plain(device="meta")
    merging = timm_ltm.convert(model, method, gmacs=share)
    assert share - 0.01 <= gmacs(merging) / gmacs(model) <= share
    told = timm_ltm.convert(model, method, compression_ratio=merging.block_amounts)
    assert gmacs(told) == gmacs(merging), "what it chose can be read back"


def test_what_a_budget_chose_is_saved_as_ratios():
    merging = timm_ltm.convert(plain(), "tome", gmacs=0.7)
    other = timm_ltm.convert(plain(), "tome")
    other.load_state_dict(merging.state_dict())
    assert other.block_amounts == merging.block_amounts
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(other(x), merging(x))


@on_meta
def test_budgets_of_maps():
    model = timm.create_model("efficientvit_b0", device="meta").eval()
    merging = timm_ltm.convert(model, "ltm", gmacs=0.8)
    assert 0.7 < gmacs(merging) / gmacs(model) <= 0.8  # a map loses whole rows and columns


@on_meta
def test_a_budget_is_of_the_size_that_merging_is_planned_for():
    model = timm.create_model("ltm_efficientvit_b0", img_size=320, gmacs=0.8, device="meta").eval()
    assert input_size_of(model) == (3, 320, 320)
    share = gmacs(model) / gmacs(timm.create_model("efficientvit_b0", device="meta").eval(), (3, 320, 320))
    assert 0.7 < share <= 0.8


@pytest.mark.parametrize("wrong", ["0.5", 0, 1.5, True, float("nan")])
def test_budgets_of_the_wrong_kind(wrong):
    with pytest.raises(ValueError, match=r"gmacs: got .*, expected a number"):
        timm_ltm.convert(plain(device="meta"), "ltm", gmacs=wrong)


def test_a_budget_beside_ratios():
    with pytest.raises(ValueError, match="got one beside"):
        timm_ltm.convert(plain(device="meta"), "ltm", gmacs=0.5, compression_ratio=0.9)
    with pytest.raises(ValueError, match="got one beside"):
        timm_ltm.convert(plain(device="meta"), "tome", gmacs=0.5, r=3)


@pytest.mark.parametrize(("method", "settings"), [("ltm", {}), ("tome", {}), ("tome", {"schedule": "flat"})])
def test_a_budget_out_of_reach_is_told(method, settings):
    """With the least that is found; ToMe, which halves at most, costs more where it merges all at once."""
    with pytest.raises(ValueError, match=r"gmacs: got 0\.01, expected at least 0\.\d+") as caught:
        timm_ltm.convert(plain(device="meta"), method, gmacs=0.01, **settings)
    least = float(str(caught.value).split("at least ")[1].split(" ")[0])
    assert least < 0.4
    timm_ltm.convert(plain(device="meta"), method, gmacs=least + 0.01, **settings)
