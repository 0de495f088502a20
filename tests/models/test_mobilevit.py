"""MobileViT, merging."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg
from timm.models.mobilevit import MobileVitBlock
from torch.testing import assert_close

import timm_ltm
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

    def test_the_shortcut_is_merged_as_the_patches_are(self, x):
        """Where attention, MLP and norms pass tokens through, both halves of the concatenation are merged maps."""
        model = self.build(compression_ratio=(0.6, 1.0, 1.0, 1.0))
        block = model.stages[2][1]
        for layer in block.transformer:
            for linear in (layer.attn.proj, layer.mlp.fc2):
                torch.nn.init.zeros_(linear.weight)
                torch.nn.init.zeros_(linear.bias)
        block.norm = block.conv_kxk = block.conv_proj = torch.nn.Identity()
        block.conv_1x1.weight = torch.nn.Parameter(torch.eye(32, 16)[:, :, None, None])
        seen = []
        block.conv_fusion = torch.nn.Identity()
        block.conv_fusion.register_forward_hook(lambda *a: seen.append(a[2]))
        model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
        shortcut, merged = seen[0][:, :16], seen[0][:, 16:32]
        assert shortcut.shape == (3, 16, 14, 14)
        assert_close(merged, shortcut)


def test_attention_is_in_proportion_to_sizes_behind_the_first_merge_of_a_block():
    model = timm.create_model("ltm_mobilevit_xs")  # merges in the 2nd and the 3rd of 2 + 4 + 3 blocks
    blocks = [m for m in model.modules() if isinstance(m, ReducedViTBlock)]
    assert [b.behind for b in blocks] == [False] * 3 + [True] * 3 + [False] * 3
    assert all(b.parts == 4 and b.weighs for b in blocks)
    assert model.block_amounts == (1.0, 0.39, 0.64) + (1.0,) * 6


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
