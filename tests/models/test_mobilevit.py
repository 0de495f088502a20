"""MobileViT, merging."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.byobnet import ByoBlockCfg
from timm.models.mobilevit import MobileVitBlock
from torch.testing import assert_close

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.models.vit import ReducedViTBlock

from .contract import ModelContract, shapes


def layer(c, s):
    return ByoBlockCfg("bottle", d=1, c=c, s=s, gs=1, br=2, block_kwargs={"bottle_in": True, "linear_out": True})


def attention(c):
    transformer = {"transformer_dim": 32, "transformer_depth": 2, "patch_size": 2}
    return layer(c, 2), ByoBlockCfg("mobilevit", d=1, c=c, s=1, block_kwargs=transformer)


BLOCKS = (layer(8, 1), layer(8, 2), attention(16), attention(16), layer(16, 2))


class TestMobileViT(ModelContract):
    name = "mobilevit_xxs"
    others: ClassVar = ("tofu",)
    size = (128, 128)
    resized: ClassVar = {}
    kwargs: ClassVar = {"num_classes": 10, "num_features": 48, "blocks": BLOCKS}
    kinds: ClassVar = {"plain": {}, "output_stride": {"output_stride": 8}}
    merging: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1.0)}
    pools: ClassVar = ("avg", "avgmax", "max")
    formats: ClassVar = ("NCHW",)
    dropout: ClassVar = {"drop_rate": 0.1, "drop_path_rate": 0.2}
    any_size: ClassVar = {}

    def resized_images(self):
        return self.images(2, size=(75, 110))  # neither patches nor strides divide it

    def test_export_any_size(self, method):
        """Refused: how many tokens are left has no simple form in symbols."""
        height, width = torch.export.Dim("height", max=512), torch.export.Dim("width", max=512)
        with pytest.raises(Exception, match=r"marked height as dynamic but your code specialized it to be a constant"):
            torch.export.export(self.build(method), (self.images(2),), dynamic_shapes=({2: height, 3: width},))

    @pytest.mark.parametrize("exclude", [False, True])
    def test_final_conv(self, exclude, x):
        """timm's option; however far it runs, what is behind the last stage runs once."""
        model, plain = self.pair()
        for indices in ([4], [0, 2]):
            options = {"indices": indices, "stop_early": True, "exclude_final_conv": exclude}
            got, expected = (m.forward_intermediates(x, **options) for m in (model, plain))
            assert shapes(got) == shapes(expected)
        counted = model.train().final_conv.bn.num_batches_tracked.clone()
        model.forward_intermediates(x)
        assert model.final_conv.bn.num_batches_tracked == counted + 1

    def test_patches_merge_and_are_put_back_pixel_by_pixel(self, x):
        """A block with one merge, by the dense mask and what tokens gain behind it."""
        model = self.build(compression_ratio=(0.6, 1.0, 1.0, 1.0))
        block = model.stages[2][1]
        seen = {}
        block.transformer[0].reducer.register_forward_hook(lambda m, args, out: seen.update(z=args[0], merged=out[0]))
        block.transformer[1].register_forward_hook(lambda m, args, out: seen.update(end=out[0]))
        block.norm.register_forward_pre_hook(lambda m, args: seen.update(back=args[0]))
        masks = model.forward_masks(x)
        assert masks.grids[0] == (8, 8)
        G, parts = masks.masks[0].repeat_interleave(4, dim=0), 4  # B N P
        z, merged, gained = seen["z"], seen["merged"], seen["end"] - seen["merged"]
        assert z.shape == (3 * parts, 64, 32)
        mean = G.transpose(1, 2) @ z
        assert_close(F.normalize(merged, dim=2), F.normalize(mean, dim=2))  # LTM's means are as long as their tokens
        assert_close(seen["back"], z + (G > 0).float() @ gained, rtol=1e-4, atol=1e-5)


def test_attention_is_in_proportion_to_sizes_behind_a_merge():
    model = timm.create_model("ltm_mobilevit_xs", compression_ratio=[1, 0.5, 0.5, 1, 1, 0.5, 1, 1, 1])  # 2 + 4 + 3
    blocks = [m for m in model.modules() if isinstance(m, ReducedViTBlock)]
    assert [b.behind for b in blocks] == [False] * 3 + [True] * 3 + [False] * 3
    assert all(b.parts == 4 and b.weighs for b in blocks)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("resnet51q", "without attention over all patches"), ("mobilevitv2_050", "linear attention")],
)
def test_other_byobnets_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        timm_ltm.convert(timm.create_model(name), "ltm")


def test_other_blocks_are_refused():
    class Other(MobileVitBlock):
        pass

    model = timm.create_model("mobilevit_xxs")
    model.stages[3][1].__class__ = Other
    with pytest.raises(ValueError, match=r"stages\.3\.1: got Other"):
        timm_ltm.convert(model, "ltm")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ltm", "tome"])
def test_dynamic_int8(method):
    """Keys and clusters come from what quantised modules compute: they have no weight to look at."""
    model = timm.create_model(f"{method}_mobilevit_xxs", num_classes=10, blocks=BLOCKS, num_features=48).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 3, 64, 64)
    assert quantised(x).isfinite().all()
    assert not torch.equal(quantised(x), model(x))


@pytest.mark.parametrize(("name", "share"), [("mobilevit_xxs", 0.764), ("mobilevit_xs", 0.742), ("mobilevit_s", 0.79)])
def test_default_schedules(name, share):
    with torch.device("meta"):
        model, plain = timm.create_model(f"ltm_{name}").eval(), timm.create_model(name).eval()
    merging = [i for i, amount in enumerate(model.block_amounts) if amount != 1]
    assert merging == [0, 2, 6], "the first block of each stage"
    assert gmacs(model) / gmacs(plain) == pytest.approx(share, abs=0.005)


def test_a_budget_that_few_merges_cannot_reach():
    """ToMe halves at most: it then merges in every block."""
    with torch.device("meta"):
        models = [timm.create_model(f"{method}_mobilevit_xxs", gmacs=0.79).eval() for method in ("ltm", "tome")]
        plain = timm.create_model("mobilevit_xxs").eval()
    assert [sum(amount != 1 for amount in model.block_amounts) for model in models] == [3, 9]
    for model in models:
        assert 0.785 < gmacs(model) / gmacs(plain) <= 0.79


@pytest.mark.parametrize("method", ["ltm", "tome", "tofu"])
def test_a_stage_with_one_patch_left(method):
    """Of small images the last stage has a patch, of four pixels, and nothing to merge."""
    model = timm.create_model(f"{method}_mobilevit_xxs", num_classes=5)
    assert model.train()(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_converted_for_another_size():
    """timm's model has none; a budget is met at the one that is given."""
    plain = timm.create_model("mobilevit_xxs", device="meta")
    named = timm.create_model("ltm_mobilevit_xxs", device="meta", gmacs=0.8, img_size=128)
    converted = timm_ltm.convert(plain, "ltm", gmacs=0.8, img_size=128)
    assert converted.block_amounts == named.block_amounts != timm_ltm.convert(plain, "ltm", gmacs=0.8).block_amounts
    with pytest.raises(ValueError, match="img_size: ltm has no such setting"):
        timm_ltm.convert(timm.create_model("test_vit"), "ltm", img_size=128)
