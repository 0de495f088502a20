"""Vision Transformer and DeiT, merging."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import Attention, DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch.testing import assert_close

import timm_ltm
from timm_ltm import ClusterRefresh
from timm_ltm.cost import gmacs
from timm_ltm.reduction import matching

from .contract import ModelContract, shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*trains without a refresh")
TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 5}


def put_back_in_front_of_mlp(model, x, block):
    """Tokens (B, N, D) behind a block's merge and in front of its MLP, put back: as if the MLP added nothing."""
    last = model.blocks[block].mlp.fc2
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
        (found,) = model.forward_intermediates(x, [block], output_fmt="NLC", intermediates_only=True)
        last.weight.copy_(weight), last.bias.copy_(bias)
    return found


class TestViT(ModelContract):
    name = "test_vit"
    others: ClassVar = ("tofu", "patch_merger")
    any_size: ClassVar = {"dynamic_img_size": True}
    shallow: ClassVar = {"depth": 2}
    dropout: ClassVar = {**ModelContract.dropout, "pos_drop_rate": 0.1}
    pools: ClassVar = ("", "avg", "avgmax", "max", "token", "map")
    kinds: ClassVar = {
        "plain": {},
        "layer_scale": {"init_values": 0.1},
        "registers": {"reg_tokens": 4},
        "qk_norm": {"qk_norm": True},
        "no_class_token": {"class_token": False, "global_pool": "avg"},
        "map": {"name": "test_vit3", "compression_ratio": [0.75, 0.75] + [1.0] * 6 + [0.75]},
        "diff_attention": {"attn_layer": "diff"},
        "pre_norm_no_bias": {"pre_norm": True, "qkv_bias": False, "no_embed_class": True},
    }

    def test_prefix_tokens_of_intermediates(self):
        model, plain = self.pair(reg_tokens=4)
        x, options = self.images(), {"indices": [2, 5], "norm": True, "return_prefix_tokens": True}
        final, pairs = model.forward_intermediates(x, **options)
        assert shapes(pairs) == shapes(plain.forward_intermediates(x, **options)[1])
        assert_close(pairs[-1][1], final[:, :5])
        result = model.forward_intermediates(x, output_dict=True, **options)
        assert_close(result["image_intermediates_prefix"], [prefix for _, prefix in pairs])
        assert_close(result["image_intermediates"], [one_map for one_map, _ in pairs])
        assert_close(result["image_features"], final)
        only = model.forward_intermediates(x, indices=[5], output_dict=True, intermediates_only=True)
        assert set(only) == {"image_intermediates"}
        layers = model.get_intermediate_layers(x, n=[2, 5], norm=True, reshape=True, return_prefix_tokens=True)
        assert_close([list(pair) for pair in layers], [list(pair) for pair in pairs])
        with pytest.raises(ValueError, match="output_fmt: got 'NHWC'"):
            model.forward_intermediates(x, output_fmt="NHWC")

    def test_intermediates_lie_where_their_tokens_came_from(self):
        """Behind each block: of hard masks, the tokens of a slot have gained the same since they merged."""
        model, x = self.build(compression_ratio=[1.0, 0.5, 1.0, 0.5, 1.0, 0.5]), self.images()
        maps = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        masks, gains, before = model.forward_masks(x), [], 16
        for block, accumulated in zip(masks.blocks, masks.accumulated, strict=True):
            hook = model.blocks[block].mlp.register_forward_hook(lambda _, args, y: gains.append(y[:, 1:]))  # B P D
            model(x)
            hook.remove()
            slot_gain = gains.pop()
            (behind,) = model.forward_intermediates(x, [block], output_fmt="NLC", intermediates_only=True)
            assert_close(behind, maps[block])
            in_front = put_back_in_front_of_mlp(model, x, block)
            slots = accumulated.argmax(dim=2)  # B N, each token in one slot
            gain = behind - in_front
            assert_close(gain, torch.stack([g[s] for g, s in zip(slot_gain, slots, strict=True)]))
            assert accumulated.shape[2] < before
            before = accumulated.shape[2]

    def test_merged_tokens_are_the_masks_means_as_long_as_tokens(self):
        model, x = self.build(depth=1), self.images()
        embedded, block = model.embed(x)[0], model.blocks[0]
        (mask,) = model.forward_masks(x).masks
        z = embedded + block.attn(block.norm1(embedded))
        mean, length = (mask.transpose(1, 2) @ t for t in (z[:, 1:], z[:, 1:].norm(dim=2, keepdim=True)))
        merged = torch.cat((z[:, :1], mean * length / mean.norm(dim=2, keepdim=True)), dim=1)
        assert_close(model.forward_merged(x)[0], model.norm(merged + block.mlp(block.norm2(merged))))

    def test_masks_of_a_non_square_grid(self):
        masks = self.build().forward_masks(self.images(size=(32, 96)))
        assert masks.grids == [(2, 6)] * 6
        assert [m.shape[2] for m in masks.masks] == [9, 7, 6, 5, 4, 3]
        for image in range(3):
            assert_close(masks.accumulated[-1][image], torch.linalg.multi_dot([m[image] for m in masks.masks]))

    def test_attention_masks(self):
        """timm's, where nothing merges; refused where something does."""
        model, plain = self.pair()
        x, mask = self.images(), torch.ones(17, 17, dtype=torch.bool).tril()
        for call in (model, model.forward_features, model.forward_intermediates):
            for masked in ({"attn_mask": mask}, {"is_causal": True}):
                with pytest.raises(ValueError, match="attn_mask or is_causal"):
                    call(x, **masked)
        model.set_merging(False)
        for masked in ({"attn_mask": mask}, {"is_causal": True}):
            assert torch.equal(model(x, **masked), plain(x, **masked))
        warming, plain = self.pair(merge_warmup_epochs=1)
        refresh = ClusterRefresh(warming)
        assert torch.equal(warming.train()(x, attn_mask=mask), plain.train()(x, attn_mask=mask))
        assert refresh.owns

    def test_patch_dropout(self):
        model, plain = self.pair(patch_drop_rate=0.5)
        x = self.images()
        features = model.train().forward_features(x)
        assert shapes(features) == shapes(plain.train().forward_features(x)) == (3, 1 + 8, 64)
        features.sum().backward()
        torch.manual_seed(3)
        tokens = model.forward_merged(x)[1]
        assert tokens.size.sum(dim=1).tolist() == [8, 8, 8]
        assert tokens.anchor.max() > 8, "places on the whole grid"
        model.set_merging(False)
        outputs = []
        for m in (model, plain):
            torch.manual_seed(3)
            outputs.append(m(x))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("size", [16, 32, (16, 160)])
    def test_few_tokens(self, method, size):
        model, plain = self.pair(method)
        x = self.images(size=(size, size) if isinstance(size, int) else size)
        assert shapes(model.forward_features(x)) == shapes(plain.forward_features(x))
        assert model(x).isfinite().all()

    def test_padded_size(self):
        model, plain = self.pair(dynamic_img_pad=True)
        x = self.images(size=(70, 50))
        assert shapes(model.forward_intermediates(x)) == shapes(plain.forward_intermediates(x))

    @pytest.mark.parametrize(
        ("settings", "got"),
        [
            ({"compression_ratio": 0}, "compression_ratio: got 0,"),
            ({"compression_ratio": float("nan")}, "compression_ratio: got nan,"),
            ({"compression_ratio": True}, "compression_ratio: got True,"),
            ({"compression_ratio": "0.9"}, "compression_ratio: got '0.9',"),
            ({"compression_ratio": [0.9, 0.8]}, "compression_ratio: got '2 numbers', expected one number or 6"),
            ({"num_clusters": 1}, "num_clusters: got 1,"),
            ({"beta": float("inf")}, "beta: got inf,"),
            ({"update": "False"}, "update: got 'False', expected True or False"),
            ({"preset": "nature"}, "preset: got 'nature'"),
            ({"preset": "paper", "beta": 2.0}, "beta: ltm with preset='paper' has no such setting"),
            ({"merge_warmup_epochs": -1}, "merge_warmup_epochs: got -1"),
        ],
        ids=str,
    )
    def test_bad_settings(self, settings, got):
        with pytest.raises(ValueError, match=got):
            self.build(**settings)


class TestPaper(ModelContract):
    """ViT by the printed form: dense masks, at the one input size it is tied to."""

    test_a_merge_of_nothing_is_the_plain_model = test_set_input_size = None
    test_merging_and_the_update_change_the_output = None
    test_every_parameter_learns = None  # a tiny model rounds their gradients to zero
    name = "test_vit"
    methods: ClassVar = ("ltm",)
    merging: ClassVar = {"compression_ratio": 0.75, "preset": "paper"}
    pools: ClassVar = ("avg",)
    shallow: ClassVar = {"depth": 2}


def test_distillation():
    """DeiT's two prefix tokens pass through unmerged, in front of two heads."""
    torch.manual_seed(0)
    plain = VisionTransformerDistilled(**TINY).eval()
    model = timm_ltm.convert(plain, compression_ratio=0.5)
    x = torch.randn(2, 3, 64, 64)
    assert [mask.shape for mask in model.forward_masks(x).masks] == [(2, 16, 8), (2, 8, 4), (2, 4, 2)]
    assert shapes(model.forward_features(x)) == (2, 2 + 16, 48)
    assert_close(model.forward_head(model.forward_features(x)), model(x))
    for distilled in (False, True):
        for m in (model, plain):
            m.set_distilled_training(distilled)
            m.train()
        assert shapes(model(x)) == shapes(plain(x))
        model.set_merging(False)
        assert_close(model(x), plain(x), rtol=0, atol=0)
        model.set_merging(None)
    model.reset_classifier(7)
    assert model.eval()(x).shape == (2, 7)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock, ResPostBlock])
def test_blocks_without_a_place_to_merge(block):
    with pytest.raises(ValueError, match=f"blocks.0: got {block.__name__}"):
        timm_ltm.convert(VisionTransformer(**TINY, block_fn=block))


def test_gated_attention():
    torch.manual_seed(0)
    plain = VisionTransformer(**TINY).eval()
    for block in plain.blocks:
        block.attn = Attention(48, num_heads=2, gated=True, norm_layer=torch.nn.LayerNorm, scale_norm=True).eval()
    with pytest.warns(UserWarning, match="merges nothing"):
        model = timm_ltm.convert(plain, "tome", compression_ratio=0.99)
    x = torch.randn(2, 3, 64, 64)
    assert_close(model(x), plain(x))


@pytest.mark.parametrize("attention", [Attention, DiffAttention])
@pytest.mark.parametrize("fused", [False, True])
def test_a_token_of_size_s_is_s_tokens(attention, fused):
    """Attention in proportion to sizes is attention to repeated tokens, the prefix counted once."""
    torch.manual_seed(0)
    plain = VisionTransformer(**{**TINY, "depth": 2}, attn_layer=attention).eval()
    model, x = timm_ltm.convert(plain, "tome", r=[4, 0]), torch.randn(2, 3, 64, 64)
    for m in (model, plain):
        for block in m.blocks:
            block.attn.fused_attn = fused
    (mask,) = model.forward_masks(x).masks
    merged, tokens = model.forward_merged(x)
    embedded, first, second = model.embed(x)[0], *plain.blocks
    z = embedded + first.attn(first.norm1(embedded))
    z = torch.cat((z[:, :1], mask.transpose(1, 2) @ z[:, 1:]), dim=1)
    z = z + first.mlp(first.norm2(z))
    for i in range(2):
        repeats = torch.cat((torch.ones(1), tokens.size[i])).long()
        repeated = second(z[i].repeat_interleave(repeats, dim=0).unsqueeze(0))
        assert_close(merged[i], plain.norm(repeated)[0, repeats.cumsum(0) - repeats], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "weighs"), [({}, True), ({"proportional_attention": False}, False)])
def test_attention_is_proportional_behind_the_first_merge(settings, weighs):
    """Without it, tokens merged of equal ones get as much attention as one of them."""
    torch.manual_seed(0)
    plain = VisionTransformer(**{**TINY, "pos_embed": "none"}).eval()
    model = timm_ltm.convert(plain, "ltm", compression_ratio=[0.25, 1.0, 1.0], **settings)
    x = torch.randn(1, 3, 16, 16).repeat(1, 1, 4, 4)
    x[:, :, :16, :16] = torch.randn(3, 16, 16)  # fifteen equal patches and another one
    assert torch.allclose(model(x), plain(x), atol=1e-5) == weighs


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model("ltm_vit_test", img_size=64)
        assert model(torch.randn(2, 3, 64, 64)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


SMALL = dict(img_size=112, embed_dim=48, num_heads=3)


def first_of(amounts):
    return next(i for i, amount in enumerate(amounts) if amount < 1)


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("vit_small_patch14_dinov2", True),
        ("vit_small_patch16_224.dino", True),
        ("vit_small_patch16_dinov3", True),
        ("vit_small_patch16_224", False),
        ("vit_base_patch16_clip_224.openai", False),
        ("vit_base_patch16_224.orig_in21k", False),  # supervised, without its head
    ],
)
def test_weights_without_classes_merge_late(name, late):
    """By their configuration in timm, whatever head they get, and only where the budget allows."""
    model = timm.create_model(f"ltm_{name}", **SMALL, num_classes=3)
    assert first_of(model.block_amounts) == (4 if late else 2)
    firsts = [
        ((0.8, None), 4 if late else 2),
        ((0.8, "late"), 4),
        ((0.75, None), 2),
        ((0.65, None), 1),
        ((0.8, "flat"), 0),
    ]
    for (share, schedule), first in firsts:
        assert first_of(model.path_for(share, schedule)(0.4)) == first
    plain = timm.create_model(name, **SMALL)
    plain.reset_classifier(5)
    assert first_of(timm_ltm.convert(plain).block_amounts) == (4 if late else 2)


@pytest.mark.parametrize("schedule", [None, "late"])
@pytest.mark.parametrize("share", [0.5, 0.4, 0.3, 0.2])
def test_small_budgets_leave_more_than_one_token(share, schedule):
    """A twentieth in front of the last block, and half of it behind, however much merges; more of it earlier."""
    model = timm.create_model("ltm_vit_small_patch16_224", **SMALL)
    path, tokens = model.path_for(share, schedule), model.input_tokens
    assert (first_of(path(0.5)) == 0) == (share <= 0.4 or schedule == "late")
    for strength in (0.5, 0.9, 1.5, 4.0, 64.0):
        left = [math.prod(path(strength)[: i + 1]) * tokens for i in range(12)]
        assert left[10] >= 0.05 * tokens - 1e-6
        assert left[11] >= 0.5 * left[10] - 1e-6
        assert sum(left) <= sum(math.prod(path(0.9 * strength)[: i + 1]) * tokens for i in range(12)) + 1e-6


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_224"])
def test_what_is_saved_with_a_head_and_a_budget_loads(name, tmp_path):
    """The head's classes are written into the configuration; the schedule stays the name's."""
    torch.manual_seed(0)
    size = {**SMALL, "depth": 6}
    model = timm.create_model(f"ltm_{name}", **size, num_classes=10, gmacs=0.8).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={**size, "gmacs": 0.8}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 112, 112)
    assert_close(again(x), model(x))
    # as train.py --pretrained-path has it; timm 1.0.29 reads such a file as an archive of JAX's where weights are one
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=-1, custom_load=False)
    settings = dict(num_classes=10, gmacs=0.8, pretrained_cfg_overlay=overlay)
    given = timm.create_model(f"ltm_{name}", pretrained=True, **size, **settings)
    assert_close(given.eval().forward_features(x), model.forward_features(x))  # timm leaves such a head out


def test_a_model_without_a_configuration_merges_as_with_classes():
    model = timm_ltm.convert(VisionTransformer(num_classes=0, patch_size=16, **SMALL))
    assert model.block_amounts == timm.create_model("ltm_vit_small_patch16_224", **SMALL).block_amounts


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch14_dinov2"])
def test_what_weights_without_classes_cost_by_default(name):
    with torch.device("meta"):
        model = timm.create_model(f"ltm_{name}", img_size=224)
        share = gmacs(model) / gmacs(timm.create_model(name, img_size=224))
    assert 0.79 < share < 0.81


@pytest.mark.filterwarnings("ignore")
def test_tokens_in_strips_are_exported(monkeypatch, tmp_path):
    """More tokens than are compared at once: 16 in six strips, the last one short, then 12 in four."""
    monkeypatch.setattr(matching, "_STRIP", 3)
    contract = TestViT()
    contract.check_export("ltm")
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    contract.check_onnx(contract.build(**contract.shallow), tmp_path, dynamic_axes=axes)
