"""LTM on Swin Transformer."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformerBlock
from torch.testing import assert_close

from timm_ltm.merging import slots_of
from timm_ltm.models._maps import adopt
from timm_ltm.models.ltm_swin import LTMWindowAttention, fit_window

from .maps import MAP_MODES, MODES, MapContract


class TestSwin(MapContract):
    name = "ltm_swin_tiny_patch4_window7_224"
    plain = "swin_tiny_patch4_window7_224"
    kwargs: ClassVar = {
        "img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 4,
        "num_classes": 10, "drop_path_rate": 0.0,
    }  # fmt: skip
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.5, 1.0, 0.4, 1.0), "cluster_dim": 16}
    ltm_stages = (2, 2, 2)
    shallow: ClassVar = {"depths": (1, 1, 2), "compression_ratio": (0.6, 0.5, 0.4, 1.0)}
    sweep: ClassVar = {
        **MapContract.sweep,
        "mode": [m for m in MAP_MODES if "dense" not in str(MODES[m]) and MODES[m].get("preset") != "paper"],
        "output_fmt": ["NCHW"],
        "carry": [{}],
        "trained": ["plain", "default", "true_labels"],
    }
    extra: ClassVar = {"strict_img_size": False}

    def map_sizes(self, height, width):
        grid, sizes, ratios = (-(-height // 4), -(-width // 4)), [], iter(self.ltm["compression_ratio"])
        for stage in range(3):
            grid = tuple(-(-n // 2) for n in grid) if stage else grid
            for _ in range(2):
                grid = slots_of(grid, next(ratios))
            sizes.append(grid)
        return sizes

    @pytest.mark.parametrize("kwargs", [{"preset": "paper"}, {"mask_form": "dense"}])
    def test_no_dense_masks(self, kwargs):
        with pytest.raises(ValueError, match=r"mask_form: got 'dense', .* preset is not for Swin"):
            self.build(**kwargs)

    @pytest.mark.parametrize(
        "kwargs", [{"always_partition": True}, {"head_dim": 6}, {"window_size": (4, 5)}, {"qkv_bias": False}], ids=str
    )
    def test_variants(self, kwargs):
        model, plain = self.pair(**kwargs)
        x = self.images()
        assert model(x).isfinite().all()
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    @pytest.mark.parametrize("window", [5, (6, 3)])
    def test_set_window_size(self, window):
        model, plain = self.pair()
        x = self.images(size=(96, 80))
        for m in (model, plain):
            m.set_input_size(img_size=(96, 80), window_size=window)
        assert model(x).isfinite().all()
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_features_in_nhwc(self):
        model, x = self.build(), self.images()
        expected = [m.permute(0, 2, 3, 1) for m in model.forward_intermediates(x, intermediates_only=True)]
        assert_close(model.forward_intermediates(x, output_fmt="NHWC")[1], expected)
        with pytest.raises(ValueError, match="output_fmt: got 'NLC'"):
            model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("grid", [(12, 12), (12, 6), (24, 18)])
def test_fitted_windows_are_timms_of_that_size(grid, shift):
    """A block in windows of 6 with its bias table resized is timm's block made for windows of 6."""
    torch.manual_seed(0)
    window = tuple(fit_window(n, 7) for n in grid)
    assert window == (6, 6)
    block = SwinTransformerBlock(16, (28, 28), num_heads=2, window_size=7, shift_size=3 if shift else 0)
    expected = SwinTransformerBlock(16, grid, num_heads=2, window_size=6, shift_size=shift)
    state = dict(block.state_dict())
    table = state["attn.relative_position_bias_table"].normal_()
    state["attn.relative_position_bias_table"] = resize_rel_pos_bias_table_simple(table, (6, 6), (121, 2))
    expected.load_state_dict(state)
    attn = adopt(LTMWindowAttention, block.attn, shifts=shift > 0)
    x = torch.randn(2, *grid, 16)
    assert_close(attn(x), expected._attn(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [9, 11, 12, 13, 17])
def test_opposite_edges_do_not_see_each_other(length, fused):
    """A row of a map, padded or not, sees rows of its shifted window alone."""
    block = SwinTransformerBlock(16, (28, 28), num_heads=2, window_size=7, shift_size=3)
    attn = adopt(LTMWindowAttention, block.attn, shifts=True, fused_attn=fused)
    window = fit_window(length, 7)
    x = torch.randn(1, length, 7, 16, requires_grad=True)
    for row in range(length):
        (gradient,) = torch.autograd.grad(attn(x)[0, row].sum(), x)
        seen = (gradient.abs().amax(dim=(0, 2, 3)) > 1e-9).nonzero().flatten().tolist()
        start = (row - window // 2) // window * window + window // 2
        assert seen == [i for i in range(start, start + window) if 0 <= i < length]


def test_windows_that_fit():
    assert [fit_window(n, 7) for n in (3, 7, 10, 12, 13, 14, 16, 18, 24, 25, 48, 49)] == [
        3, 7, 6, 6, 7, 7, 8, 6, 6, 7, 6, 7,
    ]  # fmt: skip
    for length in range(1, 200):
        assert -length % fit_window(length, 7) <= -length % 7, "never more padding than timm's window"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_short_names(size):
    long = f"ltm_swin_{size}_patch4_window7_224"
    model = timm.create_model(f"ltm_swin_{size}", device="meta")
    assert model.pretrained_cfg["architecture"] == long
    assert model.block_ratios == timm.create_model(long, device="meta").block_ratios
