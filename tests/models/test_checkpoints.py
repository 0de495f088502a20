"""A checkpoint carries method, schedule, settings and epoch; what a model was told stays as told."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import fill

import timm_ltm  # noqa: F401  registers the models

X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
RATIOS = [1.0, 0.5, 1.0, 1.0, 0.75, 1.0]


def make(method="ltm", **settings):
    torch.manual_seed(0)
    model = fill(timm.create_model(f"{method}_test_vit", img_size=64, num_classes=10, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(autouse=True)
def _loud():
    """Loading says nothing, where a test does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ltm", {"compression_ratio": RATIOS}),
        ("ltm", {"compression_ratio": 0.8, "num_clusters": 8, "cluster_dim": 4, "proportional_attention": False}),
        ("ltm", {"compression_ratio": 0.7, "update": False}),
        ("ltm", {"compression_ratio": 0.6, "preset": "paper"}),
        ("ltm", {"compression_ratio": 0.6, "ib_loss_weight": 0.1, "ib_loss_start_epoch": 1}),
        ("ltm", {"merge_warmup_epochs": 3}),
        ("tome", {"r": 3}),
        ("tome", {"compression_ratio": RATIOS}),
        ("tofu", {"r": 3, "prune_blocks": 1}),
        ("patch_merger", {}),
        ("patch_merger", {"num_slots": [0, 7, 0, 3, 0, 0]}),
        ("patch_merger", {"compression_ratio": RATIOS}),
        ("patch_merger", {"gmacs": 0.8}),
        ("ltmp", {"gmacs": 0.6, "budget_weight": 1.0, "merge_warmup_epochs": 1}),
    ],
    ids=str,
)
def test_a_model_not_told_otherwise_takes_over(method, settings, tmp_path):
    model = make(method, **settings)
    model.reduction.epoch.fill_(5)
    model.eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    path = str(tmp_path / "model.pth.tar")
    loaded = timm.create_model(f"{method}_test_vit", img_size=64, num_classes=10, checkpoint_path=path).eval()
    assert torch.equal(loaded(X), model(X))
    assert (loaded.epoch, loaded.merging, loaded.block_amounts) == (5, True, model.block_amounts)
    assert loaded.config.merge_warmup_epochs == settings.get("merge_warmup_epochs", 0)
    again = make(method)
    again.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(again(X), model(X))
    told = make(method, **settings)  # the same
    told.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(told(X), model(X))


def test_what_was_told_is_kept_and_said_once():
    state = make(compression_ratio=RATIOS, beta=500.0).state_dict()
    other = [1.0, 0.625, 1.0, 1.0, 0.75, 1.0]
    model = make(compression_ratio=other)
    with pytest.warns(UserWarning, match=r"compression_ratio \[1.0, 0.625, .* here, \[1.0, 0.5, .* there"):
        model.load_state_dict(state)
    model.load_state_dict(state)  # not again
    assert model.block_amounts == tuple(other)
    assert model.config.beta == 500.0
    model = make(proportional_attention=False)
    with pytest.warns(UserWarning, match="proportional_attention False here, True there"):
        model.load_state_dict(state)
    assert model.block_amounts == tuple(RATIOS)
    with pytest.warns(UserWarning, match="update False here, True there"):
        make(update=False).load_state_dict(state, strict=True)
    with pytest.warns(UserWarning, match=r"compression_ratio \[1.0, 1.0, .* here"):
        make(compression_ratio=1.0).load_state_dict(state, strict=True)


def test_ratios_are_told_as_long_as_they_have_to_be():
    state = make("tome", compression_ratio=[0.8765432] * 6).state_dict()
    with pytest.warns(UserWarning, match=r"\[0.75, .* here, \[0.877, .* there"):
        make("tome", compression_ratio=[0.75] * 6).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"\[0.8766, .* here, \[0.8765432, .* there"):
        make("tome", compression_ratio=[0.8766] * 6).load_state_dict(state)


def test_a_load_that_fails_leaves_the_model_as_it_was():
    state, model = make(compression_ratio=RATIOS, num_clusters=8).state_dict(), make(num_clusters=16)
    before = model.block_amounts
    with pytest.raises(ValueError, match="num_clusters"), pytest.warns(UserWarning, match="num_clusters 16 here"):
        model.load_state_dict(state)
    assert model.block_amounts == before != tuple(RATIOS)


def test_one_of_two_schedules_was_told():
    state, model = make("tome", r=3).state_dict(), make("tome", compression_ratio=0.9)
    with pytest.warns(UserWarning, match=r"compression_ratio .* here, None there, r None here, \[3, 3"):
        model.load_state_dict(state)
    assert model.block_amounts == (0.9,) * 6


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"compression_ratio": [0.5, *[1.0] * 5]}, r"compression_ratio: .*\['blocks.0'\], expected \['blocks.1'"),
        ({"compression_ratio": 0.9}, r"compression_ratio: got one that merges in \['blocks.0', 'blocks.1'"),
        ({"num_clusters": 5}, "num_clusters: with what this model was told"),
        ({"cluster_dim": 5}, "cluster_dim: with what this model was told"),
    ],
    ids=str,
)
def test_learned_masks_that_do_not_fit(told, message):
    state = make(compression_ratio=RATIOS, num_clusters=8, cluster_dim=4).state_dict()
    model = make(**told)
    warnings.simplefilter("ignore")  # as what was told is said, too
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)


def test_other_method():
    ltm, tome = make(compression_ratio=RATIOS), make("tome", compression_ratio=0.9)
    with pytest.warns(UserWarning, match="saved with method 'ltm', this model merges by 'tome'"):
        tome.load_state_dict(ltm.state_dict(), strict=True)
    assert torch.equal(tome.head.weight, ltm.head.weight)
    assert tome.block_amounts == (0.9,) * 6
    with pytest.warns(UserWarning, match="saved with method 'tome', this model merges by 'ltm'"):
        ltm.load_state_dict(make("tome", r=2).state_dict(), strict=True)


def test_plain_checkpoints():
    plain = timm.create_model("test_vit", img_size=64, num_classes=10).eval()
    model = make(merge_warmup_epochs=2)
    model.reduction.epoch.fill_(1)
    before = {name: p.clone() for name, p in model.named_parameters() if ".reducer." in name}
    model.load_state_dict(plain.state_dict(), strict=True)
    assert model.epoch == 1
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    assert torch.equal(model.eval()(X), plain(X))
    state = plain.state_dict()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.bias"'):
        model.load_state_dict(state, strict=True)
    assert list(model.load_state_dict({}, strict=False).missing_keys) == [*plain.state_dict()]


def test_into_a_model_without_a_head_or_with_another():
    model = make(compression_ratio=RATIOS)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    for classes in (0, 3):
        other = timm.create_model("ltm_test_vit", img_size=64, num_classes=classes).eval()
        other.load_state_dict(state, strict=False)
        assert torch.equal(other.forward_features(X), model.forward_features(X))


def test_clusters_of_other_classes(tmp_path):
    """The printed form has as many clusters as classes: for another head they are new, and the rest is loaded."""
    model = make(compression_ratio=0.75, preset="paper")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    overlay = {"file": str(tmp_path / "model.pth"), "num_classes": 10}
    for classes in (4, 0):
        other = timm.create_model(
            "ltm_test_vit", img_size=64, num_classes=classes, pretrained=True, pretrained_cfg_overlay=overlay
        )
        reducers = [dict(m.reducers())["blocks.1.reducer"] for m in (other, model)]
        assert torch.equal(*(reducer.mlp_fc1.weight for reducer in reducers))
        assert reducers[0].clusters.log_q.shape[1] == (classes or 10)


def test_wrapped_models():
    model = make(compression_ratio=RATIOS)
    wrapped = torch.nn.DataParallel(make())
    wrapped.load_state_dict({f"module.{name}": value for name, value in model.state_dict().items()}, strict=True)
    assert torch.equal(wrapped.module(X), model(X))
    features = timm.create_model(
        "ltm_test_vit", img_size=64, num_classes=0, features_only=True, out_indices=[1, 3]
    ).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert not features.load_state_dict(state, strict=False).missing_keys
    expected = model.forward_intermediates(X, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features(X), expected, strict=True))


@pytest.mark.parametrize("given", ["pruned", "whole"])
def test_pruned_models(given):
    model, pruned = make(compression_ratio=RATIOS), make()
    pruned.prune_intermediate_layers([0, 1])
    expected = model.forward_intermediates(X, indices=[0, 1], intermediates_only=True)
    source = copy.deepcopy(model)
    if given == "pruned":
        source.prune_intermediate_layers([0, 1])
    assert not pruned.load_state_dict(source.state_dict(), strict=given == "pruned").missing_keys
    maps = pruned.forward_intermediates(X, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))


def test_safetensors_and_averages(tmp_path):
    model = make(compression_ratio=RATIOS)
    model.reduction.epoch.fill_(4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = make()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(loaded(X), model(X))
    # as timm's avg_checkpoints.py and running averages leave it
    average = {
        name: (value.double() * 0.3 + value.double() * 0.7).float() for name, value in model.state_dict().items()
    }
    averaged = make()
    averaged.load_state_dict(average, strict=True)
    assert averaged.block_amounts == tuple(RATIOS)
    assert averaged.epoch in (3, 4)
    other = make(compression_ratio=0.8, num_clusters=9, beta=3.0).state_dict()["reduction.settings"].float()
    mixed = {"reduction.settings": torch.cat((other[:9], 255 - other[9:]))}
    with pytest.raises(ValueError, match=r"reduction.settings: got what is no settings"):
        make().load_state_dict(mixed, strict=False)


def test_optimizers_made_before_loading_train_what_was_loaded():
    """timm's train.py resumes into a model whose optimizer it has made."""
    model = make().train()
    known = {id(p) for p in model.parameters()}
    other = [1.0 if amount == 1 else 0.5 for amount in model.block_amounts]
    model.load_state_dict(make(compression_ratio=other).state_dict())
    assert model.block_amounts == tuple(other)
    assert {id(p) for p in model.parameters()} == known


def test_built_without_memory():
    model = make(compression_ratio=RATIOS)
    empty = timm.create_model("ltm_test_vit", img_size=64, num_classes=10, device="meta").eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(empty(X), model(X))
    again = make()
    again.load_state_dict(empty.state_dict(), strict=True)
    assert torch.equal(again(X), model(X))
