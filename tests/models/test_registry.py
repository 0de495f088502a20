"""Every variant of timm's that merges, those that cannot, and a family from elsewhere."""

from __future__ import annotations

import dataclasses
import fnmatch
import resource
import subprocess
import sys
from typing import ClassVar

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer, get_arch_pretrained_cfgs
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

import timm_ltm
from timm_ltm.models import registry
from timm_ltm.models.attention import attend
from timm_ltm.models.block import ReducedBlock
from timm_ltm.models.registry import ALIASES, FAMILIES, MODULES, REFUSED, refusal
from timm_ltm.models.sequence import SequenceModel
from timm_ltm.reduction import METHODS, initial_tokens

from .contract import is_ours

VARIANTS = [(module, name) for module in MODULES for name in timm.list_models(module=module)]
SMALL = {"img_size": 64, "num_classes": 10}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def fits(method, module, name):
    """A map stays one, windows stay windows, and rotary positions need slots with the place of a token."""
    cls, family = METHODS[method], MODULES[module]
    keeps = (cls.maps or not family.maps) and (cls.windows or not family.windows)
    return keeps and (cls.anchored or module != "eva" or name.startswith("eva_giant"))


def test_every_variant_is_registered_or_refused():
    registered = set(timm.list_models(module="registry"))
    for module, name in VARIANTS:
        for method in METHODS:
            expected = refusal(name) is None and fits(method, module, name)
            assert (f"{method}_{name}" in registered) == expected, name
    assert registered == {
        f"{method}_{name}"
        for method in METHODS
        for module, plain in VARIANTS
        for name in (plain, *(short for short, long in ALIASES.items() if long == plain))
        if refusal(plain) is None and fits(method, module, plain)
    }
    for pattern in REFUSED:
        assert any(fnmatch.fnmatch(name, pattern) for _, name in VARIANTS), f"{pattern} is of no variant"


@pytest.mark.parametrize("method", METHODS)
def test_tags_and_weights_are_timms(method):
    names = {plain: plain for module, plain in VARIANTS if refusal(plain) is None and fits(method, module, plain)}
    for name, plain in (names | {short: plain for short, plain in ALIASES.items() if plain in names}).items():
        ours, theirs = ([*get_arch_pretrained_cfgs(n).values()] for n in (f"{method}_{name}", plain))
        assert {cfg.tag: dataclasses.replace(cfg, architecture=plain) for cfg in ours} == {
            cfg.tag: cfg for cfg in theirs
        }
    cfg = timm.get_pretrained_cfg("ltm_vit_small_patch14_dinov2.lvd142m")
    assert cfg.hf_hub_id == "timm/vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("ltm_test_vit.none_such", pretrained=True)


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_refused_cannot_merge(pattern):
    name = next(name for _, name in VARIANTS if fnmatch.fnmatch(name, pattern))
    with pytest.raises(ValueError, match=r"(got|expected) "):
        timm_ltm.convert(timm.create_model(name, device="meta"))
    assert refusal(name) == REFUSED[pattern]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*merges nothing")
@pytest.mark.parametrize(("module", "name"), VARIANTS)
def test_every_variant(module, name):
    """Refused ones by ``convert`` too; of the others, the names in the state dict are timm's and ours."""
    plain = timm.create_model(name, device="meta")
    for method in METHODS:
        if not fits(method, module, name):
            continue
        if refusal(name) is not None:
            with pytest.raises(ValueError, match=r"(got|expected) "):
                timm_ltm.convert(plain, method)
            continue
        model = timm.create_model(f"{method}_{name}", device="meta")
        assert {key for key in model.state_dict() if not is_ours(key)} == set(plain.state_dict())
        assert list(model.reducers())


@pytest.mark.slow
def test_import_costs_little():
    """In seconds of CPU, which do not depend on who else is at work."""
    seconds = {"timm": [], "timm_ltm": []}
    for _ in range(5):
        for module, found in seconds.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            found.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(seconds["timm_ltm"]) - min(seconds["timm"]) < 0.3


@pytest.mark.parametrize("make", ["create_model", "convert"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compresion_ratio": 0.9}, "compresion_ratio: .*Did you mean 'compression_ratio'"),
        ({"num_cluster": 8}, "num_cluster: .*Did you mean 'num_clusters'"),
        ({"method": "ltm", "betas": 3.0}, "betas: .*Did you mean 'beta'"),
        ({"method": "tome", "preset": "paper"}, "preset: "),
    ],
    ids=str,
)
def test_unknown_settings(make, settings, message):
    settings = dict(settings)
    method = settings.pop("method", "ltm")
    if make == "convert":
        with pytest.raises(ValueError, match=message):
            timm_ltm.convert(timm.create_model("test_vit"), method, **settings)
    else:
        with pytest.raises(ValueError, match=message):
            timm.create_model(f"{method}_test_vit", **settings)


@pytest.mark.parametrize("name", ["swin_tiny", "efficientvit_b0"])
def test_settings_without_effect(name):
    with pytest.raises(ValueError, match="proportional_attention: got True for"):
        timm.create_model(f"ltm_{name}", proportional_attention=True, device="meta")


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_classes": 4},
        {"num_classes": 0},
        {"in_chans": 1},
        {"img_size": 96},
        {"features_only": True, "out_indices": [0, 2]},
    ],
    ids=str,
)
def test_pretrained(merging, kwargs, tmp_path):
    """A plain checkpoint and a merging one load like timm's: other heads, channels and sizes fit."""
    torch.manual_seed(0)
    source = timm.create_model(f"{'ltm_' * merging}test_vit", **SMALL)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10}
    load = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL, **kwargs}
    torch.manual_seed(0)
    model, plain = timm.create_model("ltm_test_vit", **load).eval(), None
    size = kwargs.get("img_size", 64)
    x = torch.randn(2, kwargs.get("in_chans", 3), size, size)
    if not merging:
        torch.manual_seed(0)
        plain = timm.create_model("test_vit", **load).eval()
        (model.model if kwargs.get("features_only") else model).set_merging(False)
        assert_close(model(x), plain(x), rtol=0, atol=0)
    elif not kwargs:
        assert torch.equal(model(x), source.eval()(x))
    elif kwargs.get("features_only"):
        whole = source.eval().forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert_close(model(x), whole)
    elif "num_classes" in kwargs:
        assert torch.equal(model.forward_features(x), source.eval().forward_features(x))
        assert model(x).shape[-1] == (kwargs["num_classes"] or 64)
    else:
        assert torch.equal(model.state_dict()["head.weight"], source.state_dict()["head.weight"])
        assert model(x).isfinite().all()


# A family from elsewhere: it names no method, and no method knows it


class ToyBlock(ReducedBlock, Block):
    def attend(self, x, tokens, bias, wanted):
        y, found = attend(self.attn, self.norm1(x), bias, None, 0, wanted, tokens)
        return x + y, found

    def rest(self, z, tokens):
        return z + self.mlp(self.norm2(z))


class Toy(VisionTransformer):
    """timm's ViT of eight tokens in one line, without a class token."""

    def __init__(self):
        nn.Module.__init__(self)
        self.num_classes, self.num_prefix_tokens, self.embed_dim, self.global_pool = 3, 0, 16, "avg"
        self.attn_pool, self.pool_include_prefix, self.grad_checkpointing = None, False, False
        self.stem = nn.Linear(4, 16)
        self.blocks = nn.Sequential(*(Block(16, num_heads=2) for _ in range(3)))
        self.norm, self.fc_norm, self.head_drop, self.head = nn.LayerNorm(16), *2 * (nn.Identity(),), nn.Linear(16, 3)

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.blocks(self.stem(x)))


class ReducedToy(SequenceModel, Toy):
    block_class, plain_block = ToyBlock, Block
    input_tokens = 8

    def plan(self, put):
        tokens = 8
        for block in self.blocks:
            tokens = put(block, 16, tokens)

    def embed(self, x):
        x = self.stem(x)
        return x, initial_tokens(x, 0, (1, 8)), [{}] * len(self.blocks)


@pytest.mark.parametrize("method", METHODS)
def test_a_family_from_elsewhere(method, monkeypatch):
    monkeypatch.setitem(FAMILIES, Toy, ReducedToy)
    torch.manual_seed(0)
    plain, x = Toy().eval(), torch.randn(2, 8, 4)
    if METHODS[method].by_image:
        model = timm_ltm.convert(plain, method)
        with torch.no_grad():
            for _, reducer in model.reducers():
                for threshold in reducer.parameters():
                    threshold.zero_()
        assert 1 <= model.forward_merged(x)[0].shape[1] < 8
    else:
        model = timm_ltm.convert(plain, method, compression_ratio=0.75)
        assert model.forward_merged(x)[0].shape == (2, 4, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 8, 16)
    assert_close(model.forward_head(features), model(x))
    assert not torch.allclose(model(x), plain(x))
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))


class TestAliases:
    aliases: ClassVar = ALIASES

    @pytest.mark.parametrize("short", ALIASES)
    def test_same_model(self, short):
        models = [timm.create_model(f"ltm_{name}", device="meta") for name in (short, ALIASES[short])]
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in models]
        assert shapes[0] == shapes[1]
        assert models[0].block_amounts == models[1].block_amounts
        assert registry.default_cfgs[f"ltm_{short}"].cfgs == registry.default_cfgs[f"ltm_{ALIASES[short]}"].cfgs
