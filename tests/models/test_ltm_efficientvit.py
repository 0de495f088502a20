"""LTM on EfficientViT."""

from __future__ import annotations

from typing import ClassVar

import timm
import torch

from timm_ltm.merging import slots_of

from .maps import MAP_MODES, MapContract


class TestEfficientViT(MapContract):
    name = "ltm_efficientvit_b0"
    plain = "efficientvit_b0"
    size = (128, 128)
    kwargs: ClassVar = {"num_classes": 10}
    ltm: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1.0), "img_size": 128}
    ltm_stages = (2, 2)
    dropout: ClassVar = {"drop_rate": 0.1}
    sweep: ClassVar = {
        **MapContract.sweep, "mode": MAP_MODES, "pool": ["avg", "max"], "output_fmt": ["NCHW"], "carry": [{}],
        "other_size": [(96, 72), (75, 110)],
    }  # fmt: skip
    resizes = False
    any_size = True
    tolerance = 5e-4  # untrained, its linear attention divides by sums near zero

    def map_sizes(self, height, width):
        grid, sizes, ratios = (-(-height // 2), -(-width // 2)), [], iter(self.ltm["compression_ratio"])
        for stage in range(4):
            grid = tuple(-(-n // 2) for n in grid)
            for _ in range(2 if stage >= 2 else 0):
                grid = slots_of(grid, next(ratios))
            sizes.append(grid)
        return sizes

    def test_merging_the_sum_is_merging_both(self):
        """Shortcut and attention output are merged by one mask: by linearity, their sum is."""
        model, x = self.build(), self.images()
        stage, seen = model.stages[2], []
        stage.blocks[1].local_module.register_forward_hook(lambda *a: seen.append(a[1][0]))
        masks = model.forward_masks(x).masks
        x = stage.blocks[0](model.stages[1](model.stages[0](model.stem(x))))
        attended = stage.blocks[1].context_module.main(x)
        G = masks[0].transpose(1, 2)
        merged = G @ x.flatten(2).transpose(1, 2) + G @ attended.flatten(2).transpose(1, 2)
        torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), merged, rtol=1e-4, atol=1e-5)


def test_the_weights_size_is_the_planned_one():
    """Of r288 weights, reductions are those of 288 pixels."""
    for size, last in ((224, 224 / 6), (288, 288 / 7)):
        model = timm.create_model(f"ltm_efficientvit_b1.r{size}_in1k", features_only=True)
        assert model.feature_info.reduction()[-1] == last
