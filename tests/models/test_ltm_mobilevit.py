"""LTM on MobileViT."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch

from timm_ltm.merging import slots_of
from timm_ltm.models.ltm_vit import LTMBlock

from .maps import MAP_MODES, MapContract


class TestMobileViT(MapContract):
    name = "ltm_mobilevit_xxs"
    plain = "mobilevit_xxs"
    size = (128, 128)
    kwargs: ClassVar = {"num_classes": 10, "img_size": 128}
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1, 1, 1, 1, 1, 1)}
    ltm_stages = (2, 4, 3)
    dropout: ClassVar = {"drop_rate": 0.1, "drop_path_rate": 0.2}
    sweep: ClassVar = {
        **MapContract.sweep, "mode": MAP_MODES, "pool": ["avg", "max"], "output_fmt": ["NCHW"], "carry": [{}],
        "other_size": [(96, 72), (75, 110)],
    }  # fmt: skip
    resizes = False
    any_size = True

    def map_sizes(self, height, width):
        def half(grid):
            return tuple(-(-n // 2) for n in grid)

        grid = half((height, width))
        sizes = [grid, half(grid)]
        grid, ratios = sizes[-1], iter(self.ltm["compression_ratio"])
        for depth in self.ltm_stages:
            grid = half(grid)
            before = patches = half(grid)
            for _ in range(depth):
                patches = slots_of(patches, next(ratios))
            grid = grid if patches == before else tuple(2 * n for n in patches)
            sizes.append(grid)
        return sizes

    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_output_stride(self, output_stride):
        model, plain = self.pair(output_stride=output_stride)
        x = self.images()
        merged = model.forward_features(x)
        assert merged.isfinite().all()
        assert model.feature_info[-1]["reduction"] == 128 / merged.shape[-1] > output_stride
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_the_shortcut_is_merged_as_the_patches_are(self):
        """Where attention, MLP and norms pass tokens through, both halves of the concatenation are merged maps."""
        model = self.build(compression_ratio=(0.5,) + (1.0,) * 8)
        block = model.stages[2][1]
        for layer in block.transformer:
            layer.attn.proj.weight.data.zero_()
            layer.attn.proj.bias.data.zero_()
            layer.mlp.fc2.weight.data.zero_()
            layer.mlp.fc2.bias.data.zero_()
        block.norm = torch.nn.Identity()
        block.conv_kxk = block.conv_proj = torch.nn.Identity()
        block.conv_1x1.weight = torch.nn.Parameter(torch.eye(64, 48)[:, :, None, None])
        seen = []
        block.conv_fusion = torch.nn.Identity()
        block.register_forward_hook(lambda *a: seen.append(a[2]))
        block(torch.randn(2, 48, 16, 16))
        shortcut, merged = seen[0][:, :48], seen[0][:, 48:]
        assert shortcut.shape == (2, 48, 12, 12)
        torch.testing.assert_close(merged[:, :48], shortcut)


def test_attention_is_proportional_behind_the_first_merge_of_a_stage():
    model = timm.create_model("ltm_mobilevit_xs")  # merges in the 2nd and the 3rd of 2 + 4 + 3 blocks
    blocks = [m for m in model.modules() if isinstance(m, LTMBlock)]
    assert [b.weighs for b in blocks] == [False] * 3 + [True] * 3 + [False] * 3
    assert all(b.parts == 4 for b in blocks)
