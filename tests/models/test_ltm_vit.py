"""LTM on Vision Transformer."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock
from torch.testing import assert_close

from timm_ltm import ClusterRefresh
from timm_ltm.merging import MergeState
from timm_ltm.models import LTMVisionTransformerDistilled
from timm_ltm.models.ltm_vit import LTMBlock

from .contract import MODES, ModelContract


class TestViT(ModelContract):
    name = "ltm_vit_test"
    plain = "test_vit"
    kwargs: ClassVar = {"img_size": 64, "num_classes": 10}
    shallow: ClassVar = {"depth": 2}
    any_size = True
    dropout: ClassVar = {**ModelContract.dropout, "pos_drop_rate": 0.1}
    sweep: ClassVar = {**ModelContract.sweep, "pool": ["", "avg", "avgmax", "max", "token"]}

    @pytest.mark.parametrize("kind", ["", "avg", "avgmax", "max", "token", "map", "prr"])
    def test_global_pool(self, kind):
        model, plain = self.pair(global_pool=kind)
        x = self.images()
        merged = model(x)
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))
        assert merged.shape[-1] == 10
        assert not torch.equal(merged, plain(x)) if kind else merged.shape[1] < plain(x).shape[1]

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"compression_ratio": 0.25},
            {"reg_tokens": 4},
            {"class_token": False, "global_pool": "avg"},
            {"class_token": False, "reg_tokens": 1, "global_pool": "avg"},
            {"init_values": 0.1},
            {"qk_norm": True},
            {"qkv_bias": False},
            {"pre_norm": True},
            {"no_embed_class": True},
            {"pos_embed": "none"},
            {"dynamic_img_size": False},
            {"patch_size": 8},
            {"attn_layer": "diff"},
            {"img_size": (48, 80)},
            {"weight_init": "jax"},
            {"fix_init": True},
        ],
        ids=str,
    )
    def test_variants(self, kwargs):
        model, plain = self.pair(**kwargs)
        x = self.images(size=kwargs.get("img_size"))
        tokens = plain.forward_features(x).shape[1]
        merged = model.forward_features(x)
        assert merged.isfinite().all()
        assert merged.shape[1] == model.num_prefix_tokens + list(model.mergers())[-1][1].num_slots < tokens
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))
        model.set_merging(True)
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_prefix_tokens_of_intermediates(self):
        model, x = self.build(reg_tokens=4), self.images()
        final, pairs = model.forward_intermediates(x, indices=[2, 5], norm=True, return_prefix_tokens=True)
        assert [(m.shape, p.shape) for m, p in pairs] == [((3, 64, 4, 4), (3, 5, 64))] * 2
        assert_close(pairs[-1][1], final[:, :5])
        result = model.forward_intermediates(x, indices=[2, 5], norm=True, return_prefix_tokens=True, output_dict=True)
        assert_close(result["image_intermediates_prefix"], [p for _, p in pairs])
        assert_close(result["image_intermediates"], [m for m, _ in pairs])
        only = model.forward_intermediates(x, indices=[5], output_dict=True, intermediates_only=True)
        assert set(only) == {"image_intermediates"}
        layers = model.get_intermediate_layers(x, n=[2, 5], norm=True, reshape=True, return_prefix_tokens=True)
        assert_close([list(pair) for pair in layers], [list(pair) for pair in pairs])
        with pytest.raises(ValueError, match="output_fmt: got 'NHWC'"):
            model.forward_intermediates(x, output_fmt="NHWC")

    def test_intermediates_lie_where_their_tokens_came_from(self):
        model, plain = self.pair(compression_ratio=[1.0, 1.0, 1.0, 1.0, 1.0, 0.5], beta=5.0)
        x = self.images()
        final, maps = model.forward_intermediates(x, norm=True, output_fmt="NLC")
        expected = plain.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
        assert_close(maps[:5], expected[:5])
        (mask,) = model.forward_masks(x).masks
        anchors = (mask > 0).sum(dim=2) == 1  # an anchor's weight is in its own slot alone
        for one_map, one_mask, slots, is_anchor in zip(maps[5], mask, final[:, 1:], anchors, strict=True):
            assert is_anchor.sum() == 8
            assert_close(one_map[is_anchor], slots[one_mask[is_anchor].argmax(dim=1)])
            low, high = slots.amin(dim=0) - 1e-5, slots.amax(dim=0) + 1e-5
            assert ((one_map >= low) & (one_map <= high)).all(), "a token that went away is a mean of slots"

    def test_intermediates_share_tokens_out_whole(self):
        model = self.build()
        model.norm.weight.data.zero_()
        model.norm.bias.data.fill_(2.0)  # every merged token is the same: so is every one put back, in all blocks
        maps = model.forward_intermediates(self.images(), norm=True, intermediates_only=True)
        assert len(maps) == 6
        assert_close(torch.stack(maps), torch.full((6, 3, 64, 4, 4), 2.0))

    def test_merged_tokens_are_the_masks_means(self):
        model, x = self.build(depth=1), self.images()
        embedded, _, _ = model._embed(x)
        block, (mask,) = model.blocks[0], model.forward_masks(x).masks
        z = embedded + block.attn(block.norm1(embedded))
        merged = torch.cat((z[:, :1], mask.transpose(1, 2) @ z[:, 1:]), dim=1)
        assert_close(model.forward_features(x), model.norm(merged + block.mlp(block.norm2(merged))))

    def test_masks_of_a_non_square_grid(self):
        masks = self.build().forward_masks(self.images(size=(32, 96)))
        assert masks.grids == [(2, 6)] * 6
        assert masks.blocks == [0, 1, 2, 3, 4, 5]
        assert [m.shape[2] for m in masks.masks] == [9, 7, 6, 5, 4, 3]
        assert [m.shape[1] for m in masks.masks] == [12, 9, 7, 6, 5, 4]
        for image in range(3):
            assert_close(masks.accumulated[-1][image], torch.linalg.multi_dot([m[image] for m in masks.masks]))

    def test_masks_in_warmup(self):
        model, x = self.build(merge_warmup_epochs=3), self.images()
        assert not model.merging
        masks = model.forward_masks(x).masks
        model.set_merging(True)
        assert_close(masks, model.forward_masks(x).masks, rtol=0, atol=0)

    def test_attention_mask(self):
        model, plain = self.pair()
        x, mask = self.images(), torch.ones(17, 17, dtype=torch.bool).tril()
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match="attn_mask"):
                call(x, attn_mask=mask)
            with pytest.raises(ValueError, match="is_causal"):
                call(x, is_causal=True)
        model.set_merging(False)
        assert torch.equal(model(x, attn_mask=mask), plain(x, attn_mask=mask))
        assert torch.equal(model(x, is_causal=True), plain(x, is_causal=True))

    def test_attention_mask_in_warmup(self):
        model, plain = self.pair(merge_warmup_epochs=1)
        ClusterRefresh(model)
        x, mask = self.images(), torch.ones(17, 17, dtype=torch.bool).tril()
        assert torch.equal(model.train()(x, attn_mask=mask), plain.train()(x, attn_mask=mask))

    def test_attention_mask_where_no_block_merges(self):
        model, plain = self.pair(compression_ratio=1.0)
        x, mask = self.images(), torch.ones(17, 17, dtype=torch.bool).tril()
        assert torch.equal(model(x, attn_mask=mask), plain(x, attn_mask=mask))

    def test_patch_dropout(self):
        model, plain = self.pair(patch_drop_rate=0.5)
        x = self.images()
        merged = model.train().forward_features(x)
        assert merged.shape[1] < plain.train().forward_features(x).shape[1] == 1 + 8
        merged.sum().backward()
        model.set_merging(False)
        outputs = []
        for m in (model, plain):
            torch.manual_seed(3)
            outputs.append(m(x))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("size", [16, 32, (16, 160)])
    def test_few_tokens(self, size):
        model = self.build()
        assert model(self.images(size=(size, size) if isinstance(size, int) else size)).isfinite().all()

    def test_padded_size(self):
        model, plain = self.pair(dynamic_img_pad=True)
        x = self.images(size=(70, 50))
        assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (3, 64, 5, 4)
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    @pytest.mark.parametrize("tied", ["paper", "learned", "batch", "slots"])
    def test_settings_tied_to_a_size(self, tied):
        model = self.build(**MODES[tied])
        with pytest.raises(ValueError, match="tie a model to one input size"):
            model(self.images(size=(96, 96)))
        with pytest.raises(ValueError, match="tie a model to one input size"):
            model.set_input_size(img_size=96)
        assert model(self.images()).isfinite().all(), "the model is as before"
        model.set_input_size(img_size=64)

    @pytest.mark.parametrize(("before", "after"), [(64, 160), (160, 64)])
    def test_hub_round_trip_of_another_size(self, before, after, tmp_path):
        # at 0.95, sixteen tokens are too few for a block to merge any
        model = self.build(img_size=before, compression_ratio=0.95)
        model.set_input_size(img_size=after)
        timm.models.save_for_hf(model, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = self.images(size=(after, after))
        assert torch.equal(loaded(x), model(x))

    def test_default_dtype(self):
        torch.set_default_dtype(torch.float64)
        try:
            assert self.build()(self.images().double()).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize(
        ("kwargs", "got"),
        [
            ({"compression_ratio": 0}, "compression_ratio: got 0,"),
            ({"compression_ratio": 1.5}, "compression_ratio: got 1.5,"),
            ({"compression_ratio": -1}, "compression_ratio: got -1,"),
            ({"compression_ratio": float("nan")}, "compression_ratio: got nan,"),
            ({"num_clusters": 1}, "num_clusters: got 1,"),
            ({"mask_mode": "pixel"}, "mask_mode: got 'pixel'"),
            ({"mask_form": "sparse"}, "mask_form: got 'sparse'"),
            ({"labels": "wrong"}, "labels: got 'wrong'"),
            ({"preset": "nature"}, "preset: got 'nature'"),
            ({"first_mask": "learned"}, "first_mask: got 'learned'"),
            ({"merge_warmup_epochs": -1}, "merge_warmup_epochs: got -1"),
        ],
    )
    def test_bad_settings(self, kwargs, got):
        with pytest.raises(ValueError, match=got):
            self.build(**kwargs)

    def test_block_of_another_kind(self):
        with pytest.raises(ValueError, match="block_fn: got ParallelScalingBlock"):
            self.build(block_fn=ParallelScalingBlock)


def test_distillation_token():
    """DeiT's two prefix tokens pass through unmerged; merging off, logits are timm's."""
    kwargs = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    plain = VisionTransformerDistilled(**kwargs).eval()
    model = LTMVisionTransformerDistilled(**kwargs, compression_ratio=0.5).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert model.forward_features(x).shape == (2, 2 + 2, 64)
    assert [mask.shape for mask in model.forward_masks(x).masks] == [(2, 16, 8), (2, 8, 4), (2, 4, 2)]
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))
    model.set_merging(None)
    model.set_distilled_training(True)
    assert [head.shape for head in model.train()(x)] == [(2, 5), (2, 5)]
    model.reset_classifier(7)
    assert model.eval()(x).shape == (2, 7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("num_prefix", "parts"), [(0, 1), (2, 1), (0, 3)])
def test_a_token_of_size_s_is_s_tokens(num_prefix, parts, fused):
    """Attention in proportion to sizes is attention to repeated tokens, for every image and every part of it."""
    torch.manual_seed(0)
    block = LTMBlock(16, num_heads=2)
    block.num_prefix_tokens, block.parts, block.weighs, block.attn.fused_attn = num_prefix, parts, True, fused
    x = torch.randn(2 * parts, num_prefix + 5, 16)
    sizes = torch.tensor([[1, 2, 3, 1, 1], [4, 1, 1, 2, 1]])
    merged, _ = block(x, state=MergeState(sizes.float(), None))
    weighed, keys = block.attn(x, attn_mask=block._log_sizes(x, MergeState(sizes.float(), None)), return_keys=True)
    for i in range(len(x)):
        repeats = torch.cat((torch.ones(num_prefix, dtype=torch.long), sizes[i // parts]))
        first = repeats.cumsum(0) - repeats
        repeated = x[i].repeat_interleave(repeats, dim=0).unsqueeze(0)
        assert_close(merged[i], block(repeated)[0, first])
        assert_close(weighed[i], block.attn(repeated)[0, first])
    assert keys.shape == (2 * parts, num_prefix + 5, 8)


@pytest.mark.parametrize("kwargs", [{}, {"proportional_attention": False}, {"preset": "paper"}], ids=str)
def test_attention_is_proportional_behind_the_first_merge(kwargs):
    ratios = (1.0, 0.8, 1.0, 0.8, 1.0, 1.0)
    model = timm.create_model(
        "ltm_vit_test", **{"compression_ratio": ratios, "img_size": 64, "num_classes": 10, **kwargs}
    )
    assert [block.weighs for block in model.blocks] == [not kwargs and i > 1 for i in range(6)]
    x, weighed = torch.randn(2, 3, 64, 64), []
    hooks = [b.attn.register_forward_pre_hook(lambda m, a, k: weighed.append(k.get("attn_mask")), with_kwargs=True)
             for b in model.blocks]  # fmt: skip
    model.eval()(x)
    assert [mask is not None for mask in weighed] == [block.weighs for block in model.blocks]
    for hook in hooks:
        hook.remove()


def test_scripting_with_patch_dropout():
    with set_scriptable(True):
        model = timm.create_model("ltm_vit_test", img_size=64, patch_drop_rate=0.5).train()
    torch.manual_seed(0)
    expected = model(torch.ones(2, 3, 64, 64))
    scripted = torch.jit.script(model)
    torch.manual_seed(0)
    assert_close(scripted(torch.ones(2, 3, 64, 64)), expected)
