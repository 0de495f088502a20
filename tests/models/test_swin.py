"""Swin Transformer, merging."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from torch import nn
from torch.testing import assert_close

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.models.swin import ReducedSwinBlock, fit_window

from .contract import ModelContract


class TestSwin(ModelContract):
    name = "swin_tiny_patch4_window7_224"
    others: ClassVar = ("tofu",)
    resized: ClassVar = {"img_size": (96, 48)}
    kwargs: ClassVar = {
        "img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 4,
        "num_classes": 10, "drop_path_rate": 0.0,
    }  # fmt: skip
    kinds: ClassVar = {
        "plain": {},
        "always_partition": {"always_partition": True},
        "other windows": {"window_size": (4, 2), "head_dim": 6, "qkv_bias": False},
        "any size": {"strict_img_size": False},
    }
    merging: ClassVar = {"compression_ratio": (0.6, 0.6, 0.5, 1.0, 0.4, 1.0)}
    formats: ClassVar = ("NCHW",)
    shallow: ClassVar = {"depths": (1, 1, 2), "compression_ratio": (1.0, 0.5, 0.4, 1.0)}
    shallowest: ClassVar = {"depths": (1, 1), "num_heads": (1, 2), "compression_ratio": (0.5, 1.0)}

    def test_blocks_in_front_of_the_first_merge_are_timms(self, x):
        ratios = (1.0, 1.0, 1.0, 0.5, 1.0, 1.0)
        (model, plain), seen = self.pair(compression_ratio=ratios, always_partition=True), []
        for m in (model, plain):
            m.layers[1].blocks[0].register_forward_hook(
                lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
            m(x)
        assert torch.equal(*seen)

    @pytest.mark.parametrize("size", [(75, 110), (64, 128)])
    def test_any_size(self, method, size):
        """Maps of sizes that windows do not divide; a plain model takes no image that patches do not divide."""
        features, x = self.build(method, features_only=True, strict_img_size=False), self.images(size=size)
        grid = [-(-n // 4) for n in size]
        for i, y in enumerate(features(x)):
            assert y.shape == (3, *(-(-n // 2**i) for n in grid), 16 * 2**i)
            assert y.isfinite().all()
        model = self.build(method, strict_img_size=False)
        assert_close(model(x), model.forward_head(model.forward_features(x)), rtol=1e-4, atol=self.tolerance)

    def test_resized_it_is_what_it_would_have_been_built_as(self, method):
        """What follows a merge is decided by where it is, not by a size at which the merge was of nothing."""
        with pytest.warns(UserWarning, match="merges nothing"):
            small = self.build(method, img_size=16, compression_ratio=(1.0, 1.0, 1.0, 0.8, 1.0, 1.0))
        small.set_input_size(img_size=256, window_size=4)
        large = self.build(method, img_size=256, compression_ratio=(1.0, 1.0, 1.0, 0.8, 1.0, 1.0))
        large.load_state_dict(small.state_dict())
        x = self.images(1, size=(256, 256))
        merged = large(x)
        assert torch.equal(small(x), merged)
        large.set_merging(False)
        assert not torch.allclose(large(x), merged, atol=1e-5), "it merges"

    @pytest.mark.parametrize("window", [5, (6, 3)])
    def test_set_window_size(self, window):
        (model, plain), x = self.pair(), self.images(size=(96, 80))
        for m in (model, plain):
            m.set_input_size(img_size=(96, 80), window_size=window)
        assert model(x).isfinite().all()
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_channels_last_intermediates(self, x):
        model = self.build()
        for merging in (True, False):
            model.set_merging(merging)
            expected = model.forward_intermediates(x, intermediates_only=True)
            maps = model.forward_intermediates(x, output_fmt="NHWC")[1]
            assert_close([m.movedim(3, 1) for m in maps], expected)
        with pytest.raises(ValueError, match="output_fmt: got 'NLC'"):
            model.forward_intermediates(x, output_fmt="NLC")

    @pytest.mark.parametrize("given", [{}, {"feature_cls": "getter"}])
    def test_features_are_laid_out_as_timms(self, given, x):
        """Bit for bit with merging off. Of other wrappers, which hook any module, there are none."""
        model, plain = (build(features_only=True, **given) for build in (self.build, self.build_plain))
        model.model.set_merging(False)
        assert all(torch.equal(*maps) for maps in zip(model(x), plain(x), strict=True))
        with pytest.raises(ValueError, match="feature_cls: got 'hook', expected 'getter'"):
            self.build(features_only=True, feature_cls="hook")

    def test_keys(self, method, x):
        """The mean over heads of what timm's projection calls keys, back on the map, of one projection."""
        model, seen, runs = self.build(method, compression_ratio=(1.0, 1.0, 1.0, 0.5, 1.0, 1.0)), [], []
        block = model.layers[1].blocks[1]  # of shifted windows
        assert any(block.shift_size)
        block.reducer.register_forward_pre_hook(lambda module, args: seen.append(args[2].keys))
        block.norm1.register_forward_hook(lambda module, args, output: runs.append(output))
        block.attn.qkv.register_forward_hook(lambda module, args, output: runs.append(output))
        model(x)
        assert len(runs) == 2
        keys = block.attn.qkv(runs[0]).unflatten(3, (3, block.attn.num_heads, -1))[:, :, :, 1].mean(dim=3)
        assert_close(seen[0], keys.flatten(1, 2))
        assert not seen[0].requires_grad

    @pytest.mark.filterwarnings("ignore")
    def test_dynamic_quantisation(self, x):
        """A quantised projection has no weight to read."""
        model = self.build("tome")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert not isinstance(quantised.layers[0].blocks[0].attn.qkv, nn.Linear)
        assert_close(quantised(x), model(x), rtol=0, atol=0.5 * float(model(x).abs().max()))

    def test_compilers_take_sizes_for_constants(self):
        """With symbols instead, a second size took more than ten minutes."""
        model, graphs = self.build(strict_img_size=False, **self.shallowest), []

        def backend(graph, inputs):
            values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
            graphs.append([v.shape[2:] for v in values if isinstance(v, torch.Tensor) and v.ndim == 4])
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        x = self.images(size=(96, 48))
        assert_close(compiled(x), model(x), rtol=1e-4, atol=self.tolerance)
        assert [str(sides[0][-2:]) for sides in graphs] == ["torch.Size([96, 48])"]

    def test_export_of_any_height_and_width_is_refused(self):
        """At once; plain timm's is refused too, after a minute."""
        model = self.build(strict_img_size=False, **self.shallowest)
        shapes = ({2: torch.export.Dim("height", max=256), 3: torch.export.Dim("width", max=256)},)
        with pytest.raises(Exception, match=r"marked height as dynamic but your code specialized it to be a constant"):
            torch.export.export(model, (self.images(2),), dynamic_shapes=shapes)


def test_a_dense_mask_is_refused():
    with pytest.raises(ValueError, match="windows of a map"):
        timm.create_model("ltm_swin_tiny", preset="paper", device="meta")


def test_blocks_of_another_kind_are_refused():
    class Other(SwinTransformerBlock):
        pass

    model = SwinTransformer(img_size=32, embed_dim=8, depths=(1,), num_heads=(1,), num_classes=0)
    model.layers[0].blocks[0].__class__ = Other
    with pytest.raises(ValueError, match=r"layers.0.blocks.0: got Other, expected timm's SwinTransformerBlock"):
        timm_ltm.convert(model, "ltm")


def test_converted_it_leaves_the_given_model_as_it_is():
    plain = SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), strict_img_size=False).eval()
    model = timm_ltm.convert(plain, "tome", compression_ratio=0.5)
    assert not plain.patch_embed.dynamic_img_pad
    assert type(plain.layers[0]) is SwinTransformerStage
    x = torch.randn(1, 3, 40, 32)
    assert model(x).shape == plain(x).shape
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))


def reduced(block):
    """A block of timm's as one behind a merge."""
    block.__class__, block.reducer, block.behind = ReducedSwinBlock, None, True
    return block


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
    x = torch.randn(2, *grid, 16)
    assert_close(reduced(block).attend_map(x, fitted=True)[0], expected._attn(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [9, 11, 12, 13, 17])
def test_opposite_edges_do_not_see_each_other(length, fused):
    """A row of a map, padded or not, sees rows of its shifted window alone."""
    block = reduced(SwinTransformerBlock(16, (28, 28), num_heads=2, window_size=7, shift_size=3))
    block.attn.fused_attn = fused
    window = fit_window(length, 7)
    x = torch.randn(1, length, 7, 16, requires_grad=True)
    for row in range(length):
        (gradient,) = torch.autograd.grad(block.attend_map(x, fitted=True)[0][0, row].sum(), x)
        seen = (gradient.abs().amax(dim=(0, 2, 3)) > 1e-9).nonzero().flatten().tolist()
        start = (row - window // 2) // window * window + window // 2
        assert seen == [i for i in range(start, start + window) if 0 <= i < length]


def test_windows_that_fit():
    assert [fit_window(n, 7) for n in (3, 7, 10, 12, 13, 14, 16, 18, 24, 25, 48, 49)] == [
        3, 7, 6, 6, 7, 7, 8, 6, 6, 7, 6, 7,
    ]  # fmt: skip
    for length in range(1, 200):
        assert -length % fit_window(length, 7) <= -length % 7, "never more padding than timm's window"


@pytest.mark.parametrize(
    ("name", "ratio", "budget", "grids"),
    [
        ("swin_tiny", 0.73, 3.69, [(48, 48), (24, 24), (12, 12)]),
        pytest.param("swin_base", 0.73, 12.0, [(48, 48), (24, 24), (12, 12)], marks=pytest.mark.slow),
        pytest.param(
            "swin_base_patch4_window12_384", 0.69, 36.0, [(80, 80), (40, 40), (20, 20)], marks=pytest.mark.slow
        ),
    ],
)
def test_default_schedules(name, ratio, budget, grids):
    """In the first block of each stage but the last, to sides that divide into windows without padding."""
    model = timm.create_model(f"ltm_{name}", device="meta").eval()
    firsts = [0, 2, 4]
    assert [i for i, amount in enumerate(model.block_amounts) if amount != 1] == firsts
    assert {model.block_amounts[i] for i in firsts} == {ratio}
    assert gmacs(model) < budget
    assert [reducer.slots(reducer.site.tokens) for _, reducer in model.reducers()] == grids
    for (side, _), (_, reducer) in zip(grids, model.reducers(), strict=True):
        assert side % fit_window(side, max(model.layers[0].blocks[0].window_size)) == 0
        assert reducer.site.first
