"""EfficientViT (MIT), merging."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from timm.models.efficientvit_mit import EfficientVitLarge
from torch import nn
from torch.testing import assert_close

import timm_ltm

from .contract import ModelContract


class TestEfficientViT(ModelContract):
    name = "efficientvit_b0"
    others: ClassVar = ("tofu",)
    size = (128, 128)
    resized: ClassVar = {}
    kwargs: ClassVar = {"num_classes": 10, "depths": (1, 1, 1, 2, 2), "head_widths": (32, 32)}
    gains: ClassVar = ("context_module.main.proj.norm", "local_module.main.point_conv.norm")
    merging: ClassVar = {"compression_ratio": (0.6, 0.6, 0.4, 1.0)}
    pools: ClassVar = ("avg", "max")
    formats: ClassVar = ("NCHW",)
    dropout: ClassVar = {"drop_rate": 0.1}
    tolerance = 5e-4  # untrained, its linear attention divides by sums near zero

    any_size: ClassVar = {}

    def build(self, method="ltm", **kwargs):
        return self.calibrated(super().build(method, **kwargs), kwargs)

    def build_plain(self, **kwargs):
        return self.calibrated(super().build_plain(**kwargs), kwargs)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_grad_checkpointing(self, reentrant, x):
        if timm.__version__ == "1.0.29":
            pytest.skip("its forward_intermediates runs all stages for each when activations are checkpointed")
        super().test_grad_checkpointing(reentrant, x)

    def calibrated(self, model, kwargs):
        """With norms that know their means: before, all keys are alike to seven digits, and rounding decides merges."""
        merging = [m for m in model.modules() if hasattr(m, "set_merging")]
        for m in merging:
            m.set_merging(False)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model.train()(self.images(8, kwargs.get("in_chans", 3)))
        for norm in norms:
            norm.momentum = 0.1
        for m in merging:
            m.set_merging(None)
        return model.eval()

    def resized_images(self):
        return self.images(2, size=(75, 110))

    def test_export_any_size(self, method):
        """Refused: how many tokens are left has no simple form in symbols."""
        height, width = torch.export.Dim("height", max=512), torch.export.Dim("width", max=512)
        with pytest.raises(Exception, match=r"marked height as dynamic but your code specialized it to be a constant"):
            torch.export.export(self.build(method), (self.images(2),), dynamic_shapes=({2: height, 3: width},))

    def test_merging_the_sum_is_merging_both(self, x):
        """Shortcut and attention output are merged by one mask: by linearity, their sum is."""
        model, seen = self.build(), []
        stage = model.stages[2]
        stage.blocks[1].local_module.register_forward_hook(lambda *a: seen.append(a[1][0]))
        G = model.forward_masks(x).masks[0].transpose(1, 2)
        x = stage.blocks[0](model.stages[1](model.stages[0](model.stem(x))))
        attended = stage.blocks[1].context_module.main(x)
        merged = G @ x.flatten(2).transpose(1, 2) + G @ attended.flatten(2).transpose(1, 2)
        assert_close(seen[0].flatten(2).transpose(1, 2), merged, rtol=1e-4, atol=1e-5)

    def test_keys(self, method, x):
        """The mean over heads of what timm's projection calls keys, of a projection that runs once."""
        model, seen, runs = self.build(method), [], []
        block = model.stages[2].blocks[1]
        block.reducer.register_forward_pre_hook(lambda module, args: seen.append(args[2].keys))
        attn = block.context_module.main
        attn.qkv.register_forward_hook(lambda module, args, output: runs.append(output))
        model(x)
        assert len(runs) == 1
        keys = runs[0].reshape(3, 4, 3, 16, 64)[:, :, 1].mean(dim=1)  # B h 3 K N
        assert_close(seen[0], keys.transpose(1, 2))
        assert not seen[0].requires_grad

    def test_a_projection_that_is_no_plain_convolution(self, method, x):
        """Keys come from what the module computes, not from its weight."""
        model, x = self.build(method).double(), x.double()
        expected = model(x)
        nn.utils.parametrizations.weight_norm(model.stages[2].blocks[1].context_module.main.qkv.conv)
        assert_close(model(x), expected)


def large():
    torch.manual_seed(0)
    widths, depths = (8, 16, 16, 32, 32), (1, 1, 1, 1, 3)
    return EfficientVitLarge(widths=widths, depths=depths, head_dim=16, head_widths=(32, 32), num_classes=10).eval()


@pytest.mark.filterwarnings("ignore:.*trains without a refresh")
@pytest.mark.parametrize("size", [(128, 128), (150, 110)])
def test_large(size):
    """A class of its own, of the same blocks."""
    plain, x = large(), torch.randn(2, 3, *size)
    model = timm_ltm.convert(plain, "ltm", compression_ratio=(0.5, 1.0, 0.5))
    assert isinstance(model, EfficientVitLarge)
    features, expected = model.forward_features(x), plain.forward_features(x)
    assert features.shape == expected.shape
    assert not torch.allclose(features, expected)
    assert_close(model(x), model.forward_head(features))
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))
    model.train().set_merging(True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_default_schedules():
    """In the first block of both stages that have attention."""
    for name in ("b0", "b1", "b2", "b3", "l1", "l2", "l3"):
        model = timm.create_model(f"ltm_efficientvit_{name}", device="meta")
        merging = {i: amount for i, amount in enumerate(model.block_amounts) if amount != 1}
        firsts = [0, model.depths()[0]] if len(model.depths()) > 1 else [0]
        assert list(merging) == firsts
        assert list(merging.values()) == ([0.51, 0.604] if name == "b1" else [0.69, 0.69])[: len(firsts)]


def test_without_attention_it_is_refused():
    model = timm.create_model("efficientvit_b0")
    model.prune_intermediate_layers([0, 1], prune_head=False)  # older versions of timm fail at the head
    with pytest.raises(ValueError, match="without an EfficientVitBlock"):
        timm_ltm.convert(model, "ltm")
