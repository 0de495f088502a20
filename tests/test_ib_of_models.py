"""IB(G) and IBB(G) of models: brute force over images, the theorem, and every family, merging or not."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from small import fill, make

import timm_ltm
from timm_ltm.information import information
from timm_ltm.methods.ltm.clusters import kmeans
from timm_ltm.models.record import as_reduced, block_names, evaluating, record_merged


@pytest.fixture(scope="module")
def batches(digits):
    x, y = digits
    return [(x[i : i + 30], y[i : i + 30]) for i in range(0, 120, 30)]


def by_hand(x, x_input, labels, T=1.0):
    """(I(X~, X), I(X~, Y), IBB, C_0) by loops over the definitions of Section 3.2, of lists of floats."""

    def assigned(features, centroids):
        rows = []
        for f in features.double():
            s = [math.exp(-float((f - c).square().sum()) / T) for c in centroids.double()]
            rows.append([value / sum(s) for value in s])
        return rows

    C = int(labels.max()) + 1
    clusters = [kmeans(t, C, generator=torch.Generator().manual_seed(0)) for t in (x, x_input)]
    phi, phi_input = assigned(x, clusters[0]), assigned(x_input, clusters[1])
    n = len(phi)
    pr_a = [sum(p[a] for p in phi) / n for a in range(C)]
    pr_b = [sum(p[b] for p in phi_input) / n for b in range(C)]
    pr_y = [sum(int(y) == k for y in labels) / n for k in range(C)]
    of_inputs = of_labels = bound = constant = 0.0
    for a in range(C):
        for b in range(C):
            ab = sum(phi[i][a] * phi_input[i][b] for i in range(n)) / n
            of_inputs += ab * math.log(ab / (pr_a[a] * pr_b[b]))
            bound += sum(phi[i][a] * phi_input[i][b] * math.log(phi_input[i][b]) for i in range(n)) / n
        for k in range(C):
            ay = sum(phi[i][a] for i in range(n) if int(labels[i]) == k) / n
            of_labels += ay * math.log(ay / (pr_a[a] * pr_y[k]))
            bound -= ay * math.log(ay / pr_y[k])
    for b in range(C):
        constant += sum(p[b] * math.log(q[b]) for p in phi_input for q in phi_input) / n**2
    return of_inputs, of_labels, bound, constant


@pytest.mark.parametrize("normalize", [True, False])
def test_agrees_with_loops_over_the_definition(digits, normalize):
    """Whole tokens of the last block, as printed; neither batches nor groups of blocks by memory change anything."""
    x, y = digits[0][:40], digits[1][:40] % 4
    model = fill(make(compression_ratio=0.5, embed_dim=8, num_heads=1)).eval()
    seen = {}
    with torch.no_grad():
        record_merged(model, x, lambda m: seen.update({m.index: m.merged.flatten(1)}))
    features, images = seen[5], x.flatten(1)
    if normalize:
        features, images = F.normalize(features, dim=1), F.normalize(images, dim=1)
    T = 1.0 if normalize else 30.0
    expected = by_hand(features, images, y, T)
    loader = [(x[:7], y[:7]), (x[7:], y[7:])]
    setting = {"cells": None, "normalize": normalize, "temperature": T}
    found = information(model, loader, memory=1e-4, **setting)
    got = found[5]
    assert (got.of_inputs, got.of_labels, got.bound, got.constant) == pytest.approx(expected, abs=1e-5)
    assert got.loss == pytest.approx(expected[0] - expected[1], abs=1e-5)
    once = information(model, [(x, y)], **setting)
    for several, all_at_once in zip(found, once, strict=True):
        assert astuple(several)[:3] == astuple(all_at_once)[:3]
        assert astuple(several)[3:] == pytest.approx(astuple(all_at_once)[3:], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, "fit"])
@pytest.mark.parametrize("inputs", ["images", "block"])
def test_information_is_within_its_limits(batches, temperature, inputs):
    """I >= 0, I(X~, Y) <= H(Y), Theorem 3.1; T that is fitted tells far more of the labels than T = 1."""
    model = fill(make()).eval()
    found = information(model, batches, temperature=temperature, inputs=inputs)
    assert [f.layer for f in found] == [1, 2, 3, 4, 5, 6, None]
    assert [f.tokens for f in found[:-1]] == [52, 42, 34, 28, 23, 19]  # ceil(0.8 N), again and again
    for f in found:
        assert f.of_inputs >= -1e-9
        assert -1e-9 <= f.of_labels <= f.label_entropy + 1e-9
        assert f.loss <= f.bound - f.constant + 1e-9
    assert (found[-1].of_labels > 0.1) == (temperature == "fit")
    assert (len({f.constant for f in found}) == 1) == (inputs == "images")


def test_a_plain_model_is_one_that_does_not_merge(batches):
    """timm's own class, merging switched off, and a ratio of 1 are the same, and the given model stays as it was."""
    model = make().train()
    plain = timm.create_model("test_vit", img_size=8, patch_size=1, in_chans=1, num_classes=10)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    expected = information(plain, batches)
    assert [f.tokens for f in expected] == [64] * 7
    assert information(model, batches)[-1] != expected[-1]
    model.set_merging(False)
    assert information(model, batches) == expected
    assert information(make(compression_ratio=1.0), batches)[0].tokens == 64
    assert all(m.training for m in model.modules())
    assert type(plain) is timm.models.VisionTransformer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


FAMILIES = {
    "ltm_vit_test": dict(img_size=32, patch_size=4, in_chans=3),
    "ltm_eva02_tiny_patch14_224": dict(img_size=28, patch_size=4, embed_dim=24, depth=3, num_heads=2),
    "ltm_swin_tiny": dict(img_size=32, window_size=4, depths=(2, 2), embed_dim=8, num_heads=(1, 1), patch_size=2),
    "ltm_mobilevit_xxs": dict(img_size=64),
    "ltm_efficientvit_b0": dict(img_size=64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """What is seen is what the block's second half reads; the whole model's and the plain model's are timm's."""
    arguments = {"compression_ratio": 0.5, **FAMILIES[name]}
    model = timm.create_model(name, **arguments).eval()
    side = arguments["img_size"]
    x = torch.randn(2, 3, side, side)
    seen = []
    with torch.no_grad(), evaluating(model):
        output, grid = record_merged(model, x, seen.append)
        assert [s.index for s in seen] == list(range(len(block_names(model))))
        for s, (name_, block) in zip(seen, block_names(model).items(), strict=True):
            assert model.get_submodule(name_) is block
            assert s.merged.shape[0] == s.inputs.shape[0] == 2 * s.parts
            assert s.inputs.shape[1] == s.before.size.shape[1]
            assert s.merged.shape[1] == s.after.size.shape[1]
            left = s.before.grid or s.inputs.shape[1]
            left = left if block.reducer is None else block.reducer.slots(left)
            assert s.merged.shape[1] == np.prod(left)
            assert s.after.unmerge(s.merged[:: s.parts]).shape[1] == math.prod(s.after.start)
        if model.maps:
            features = model.forward_features(x)
            features = features if model.channels_last else features.permute(0, 2, 3, 1)
            assert features.shape[1:3] == grid
            features = features.flatten(1, 2)
        else:
            merged, tokens = model.forward_merged(x)
            features = tokens.unmerge(merged[:, model.num_prefix_tokens :])
        torch.testing.assert_close(output, features)

        model.set_merging(False)
        hidden = []
        block = list(block_names(model).values())[-1]
        hook = block.get_submodule(block.first_of_rest).register_forward_pre_hook(
            lambda _, args: hidden.append(args[0])
        )
        model.forward_features(x)  # timm's own
        hook.remove()
        seen.clear()
        record_merged(model, x, seen.append)
        plain = hidden[0].flatten(2).transpose(1, 2) if hidden[0].dim() == 4 else hidden[0]
        torch.testing.assert_close(seen[-1].merged, plain[:, getattr(model, "num_prefix_tokens", 0) :])


def test_mistakes_are_told(batches):
    model = make()
    for setting, message in (
        ({"inputs": "pixels"}, "inputs: got 'pixels', expected 'images' or 'block'"),
        ({"clusters": 121}, "loader: got 120 images for 121 clusters, expected at least as many"),
        ({"memory": 1e-7}, "memory: got 1e-07, expected more"),
        ({"memory": 1e-4, "cells": 8}, "memory: got 0.0001 for 120 images, expected at least"),
        ({"cells": 0}, "cells: got 0, expected a whole number, 1 or more"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            information(model, batches, **setting)
    with pytest.raises(ValueError, match="loader: got no images"):
        information(model, [])
    with pytest.raises(ValueError, match="expected the same every time"):
        information(model, iter_once(batches))
    with pytest.raises(ValueError, match="one of timm's"):
        as_reduced(timm.create_model("test_resnet"))
    with torch.no_grad():
        model.blocks[2].mlp.fc1.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"loader: blocks.3 gives features that are not finite"):
        information(model, batches)


class iter_once:
    """Loses its last batch when it is gone through a third time."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches[: -1 if self.times > 2 else None])


@pytest.mark.parametrize("method", list(timm_ltm.METHODS))
def test_every_method(batches, method):
    """The same code for all of them."""
    model = timm_ltm.convert(as_plain_vit(), method)
    found = information(model, batches)
    assert found[-1].tokens == 64
    assert min(f.tokens for f in found[:-1]) <= 64
    assert all(math.isfinite(value) for f in found for value in (f.loss, f.bound, f.constant))


def as_plain_vit():
    return timm.create_model("test_vit", img_size=8, patch_size=1, in_chans=1, num_classes=10)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_warm_up_every_block_is_seen_and_merges_nothing(name):
    model = timm.create_model(name, compression_ratio=0.5, merge_warmup_epochs=1, **FAMILIES[name]).train()
    model.set_collecting(True)
    x, seen = torch.randn(2, 3, FAMILIES[name]["img_size"], FAMILIES[name]["img_size"]), []
    with torch.no_grad(), evaluating(model):
        record_merged(model, x, seen.append)
    assert [s.index for s in seen] == list(range(len(block_names(model))))
    assert all(s.inputs.shape[:2] == s.merged.shape[:2] for s in seen)
    assert not any(getattr(module, "watched", False) for module in model.modules() if module is not model)
