"""Any timm model in hand."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import timm
import torch
from small import fill
from timm.models.beit import Beit
from torch.testing import assert_close

import timm_ltm

from .contract import is_ours, shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*trains without a refresh")
SMALL = {"img_size": 64, "num_classes": 10}
BEIT = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 2, "num_classes": 10}
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["ltm", "tome"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_the_given_model_stays_as_it_is(method, name):
    plain = timm.create_model(name, **SMALL).eval()
    before, outputs, hooks = copy.deepcopy(plain.state_dict()), plain(X), len(plain._load_state_dict_pre_hooks)
    model = timm_ltm.convert(plain, method, compression_ratio=0.75)
    assert not model.training
    assert type(plain).__module__.startswith("timm.")
    assert [type(block).__module__.partition(".")[0] for block in plain.blocks] == ["timm"] * len(plain.blocks)
    assert plain.state_dict().keys() == before.keys()
    assert len(plain._load_state_dict_pre_hooks) == hooks
    own = dict(model.named_parameters())
    assert all(own[key] is p for key, p in plain.named_parameters()), "parameters are shared"
    assert {key for key in model.state_dict() if not is_ours(key)} == before.keys()
    merged = model(X)
    assert not torch.allclose(merged, outputs)
    model.train()
    assert not plain.training
    fill(model)(X).sum().backward()
    model.eval()
    with torch.no_grad():
        plain.head.bias.add_(1.0)
    assert_close(timm_ltm.convert(plain, "tome", compression_ratio=1.0)(X), plain(X))
    plain.reset_classifier(3)
    assert model(X).shape == (3, 10)
    with torch.no_grad():
        plain.head.bias.zero_()
    assert timm_ltm.convert(plain.train(), method).training


def test_buffers_are_copied():
    plain = timm.create_model("efficientvit_b0", num_classes=10)
    model = timm_ltm.convert(plain)
    ours = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours[name], buffer)
        assert ours[name].data_ptr() != buffer.data_ptr() or not buffer.numel(), name
    means = {name: b.clone() for name, b in plain.named_buffers()}
    fill(model).train()(X)
    assert all(torch.equal(b, means[name]) for name, b in plain.named_buffers())


def test_models_as_they_come():
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", **SMALL).eval()
    plain.reset_classifier(7, "avg")
    plain.set_input_size(img_size=(96, 32))
    x = torch.randn(2, 3, 96, 32)
    model = timm_ltm.convert(plain, compression_ratio=0.75)
    assert shapes(model(x)) == (2, 7)
    assert shapes(model.forward_features(x)) == shapes(plain.forward_features(x))
    assert next(model.reducers())[1].site.tokens == 12
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))
    half = timm_ltm.convert(plain.to(torch.bfloat16), compression_ratio=0.75)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(x.bfloat16()).dtype == torch.bfloat16
    frozen = timm.create_model("test_vit", **SMALL).requires_grad_(False)
    learns = {name for name, p in timm_ltm.convert(frozen).named_parameters() if p.requires_grad}
    assert learns
    assert all(".reducer." in name for name in learns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("test_resnet"), "model: got 'ResNet', expected one of timm's VisionTransformer"),
        (lambda: timm.create_model("test_vit", features_only=True), "Convert the model inside"),
        (lambda: torch.nn.DataParallel(timm.create_model("test_vit")), "Convert the model inside"),
        (lambda: timm.create_model("ltm_test_vit"), "model: got 'ReducedViT'"),
        (lambda: Beit(**BEIT, use_rel_pos_bias=True), "use_rel_pos_bias: got tables of relative positions"),
        (lambda: Beit(**BEIT, use_shared_rel_pos_bias=True), "use_rel_pos_bias: got tables of relative positions"),
    ],
)
def test_models_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        timm_ltm.convert(make())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("toome", {}, "method: got 'toome', expected one of .* Did you mean 'tome'"),
        ("ltm", {"compression_ratio": "0.9"}, "compression_ratio: got '0.9'"),
        ("ltm", {"img_size": 64}, "img_size: ltm has no such setting"),
        ("tome", {"r": 4, "compression_ratio": 0.9}, "r: got one beside compression_ratio"),
    ],
)
def test_settings_that_do_not_fit(method, settings, message):
    with pytest.raises(ValueError, match=message):
        timm_ltm.convert(timm.create_model("test_vit"), method, **settings)


class TestBeit:
    kinds: ClassVar = {
        "scaled": {"init_values": 0.1},
        "token": {"global_pool": "token", "swiglu_mlp": True, "scale_mlp": True},
        "all_tokens": {"global_pool": "", "qkv_bias": False, "use_abs_pos_emb": False},
    }
    methods: ClassVar = ("ltm", "tome", "tofu", "patch_merger")

    def test_beit_without_tables(self, kind, method):
        torch.manual_seed(0)
        plain = Beit(**BEIT, **self.kinds[kind], drop_path_rate=0.1, attn_drop_rate=0.1).eval()
        with torch.no_grad():
            for p in plain.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model = fill(timm_ltm.convert(plain, method, compression_ratio=0.75))
        features = model.forward_features(X)
        assert shapes([features, model.forward_intermediates(X)]) == shapes(
            [plain.forward_features(X), plain.forward_intermediates(X)]
        )
        assert not torch.allclose(model(X), plain(X))
        assert_close(model.forward_head(features), model(X), rtol=1e-4, atol=1e-5)
        model.train()(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.set_merging(False)
        for training in (True, False):
            outputs = []
            for m in (model, plain):
                torch.manual_seed(3)
                outputs.append(m.train(training)(X))
            assert torch.equal(*outputs)
        with pytest.warns(UserWarning, match="merges nothing"):
            nothing = timm_ltm.convert(plain, "tome", compression_ratio=0.99)
        for fused in (True, False):
            for m in (plain, nothing):
                for block in m.blocks:
                    block.attn.fused_attn = fused
            assert_close(nothing(X), plain(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ltm", "tofu", "patch_merger"])
def test_a_converted_model_is_saved_as_what_it_is(method, tmp_path):
    torch.manual_seed(0)
    model = timm_ltm.convert(timm.create_model("test_vit", num_classes=5), method, compression_ratio=0.8).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"num_classes": 5}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded(x), model(x))


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match="expected a timm model, not its name"):
        timm_ltm.convert("test_vit")
