"""Fidelity to the plain model, and schedules searched by it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.fidelity import errors, features_of
from timm_ltm.search import _Measure, _surely_less


def plain(name="test_vit", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "size", "kinds"),
    [("test_vit", 160, ["class", "mean", "every"]), ("mobilevit_xxs", 64, ["mean", "every"])],
)
def test_features_are_those_of_forward_features(name, size, kinds):
    model, x = plain(name), torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, whole = features_of(model, x), model.forward_features(x)
    assert list(found) == kinds
    prefix = getattr(model, "num_prefix_tokens", 0)
    tokens = whole.flatten(2).transpose(1, 2) if whole.ndim == 4 else whole[:, prefix:]
    torch.testing.assert_close(found["every"], tokens)
    torch.testing.assert_close(found["mean"], tokens.mean(dim=1))
    if "class" in kinds:
        torch.testing.assert_close(found["class"], whole[:, 0])


def test_errors_against_a_loop():
    a, b = (dict(mean=torch.randn(3, 5), every=torch.randn(3, 4, 5)) for _ in range(2))
    found = errors(a, b)
    for i in range(3):
        cos = torch.cosine_similarity(a["mean"][i], b["mean"][i], dim=0)
        assert found["mean"][i].item() == pytest.approx(1 - cos.item(), abs=1e-6)
        cos = [float(torch.cosine_similarity(a["every"][i, n], b["every"][i, n], dim=0)) for n in range(4)]
        assert found["every"][i].item() == pytest.approx(1 - sum(cos) / 4, abs=1e-6)
    assert all((error < 1e-12).all() for error in errors(a, a).values())


@pytest.mark.parametrize("method", ["ltm", "tome"])
def test_a_searched_schedule_is_within_the_budget_and_no_worse(method):
    model = plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = [(torch.randn(4, 3, 160, 160), torch.zeros(4)), torch.randn(4, 3, 160, 160)]
    found = timm_ltm.search_schedule(model, images, 0.75, method=method, images=6, tries=8, progress=False)
    assert found.tried == 8
    merging = timm_ltm.convert(model, method, compression_ratio=found.compression_ratio)
    meta = timm_ltm.convert(plain(device="meta"), method, compression_ratio=found.compression_ratio)
    assert 0.74 < gmacs(meta) / gmacs(model) <= 0.75  # with the update, that LTM leaves out before training
    assert gmacs(merging) <= gmacs(meta)
    assert found.gmacs == gmacs(meta) / gmacs(model)

    def score(of_kinds):
        return sum(of_kinds.values())

    assert score(found.error) <= 1.05 * score(found.default)  # of means of roots it is never more
    with torch.no_grad():
        x = torch.cat((images[0][0], images[1][:2]))
        error = errors(features_of(merging, x), features_of(model, x))
    for kind, value in found.error.items():
        assert value == pytest.approx(error[kind].mean().item(), rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("gain", "kept"), [([0.1], True), ([0.0], False), ([-0.1], False), ([0.3, 0.1], True), ([0.9, -0.1, -0.5], False)]
)
def test_what_is_kept_gains_more_than_its_standard_error(gain, kept):
    """0.3 and 0.1: 0.2, standard error 0.1. The last: 0.1, standard error 0.42."""
    scores = torch.rand(len(gain)).double()
    assert _surely_less(scores - torch.tensor(gain).double(), scores) is kept


def test_a_search_that_finds_nothing_for_sure_keeps_the_default(monkeypatch):
    """Every other schedule is better by less than its standard error."""

    def call(self, amounts):
        gain = torch.tensor([0.9, -0.1, -0.5]) if amounts != first.setdefault("amounts", amounts) else torch.zeros(3)
        return 1.0 - gain, {"every": 1.0}

    first = {}
    monkeypatch.setattr(_Measure, "__call__", call)
    images = [torch.randn(3, 3, 160, 160)]
    found = timm_ltm.search_schedule(plain(), images, 0.75, method="tome", tries=4, progress=False)
    assert found.tried == 4
    assert tuple(found.compression_ratio) == first["amounts"]


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="loader: got no image"):
        timm_ltm.search_schedule(plain(), [], 0.8, progress=False)
    with pytest.raises(ValueError, match=r"gmacs: got 0\.01, expected at least"):
        timm_ltm.search_schedule(plain(), [torch.randn(1, 3, 160, 160)], 0.01, progress=False)


def test_the_same_number_in_every_block():
    model = timm_ltm.convert(plain(), "tome", gmacs=0.8, schedule="flat")
    left = [100]
    for amount in model.block_amounts:
        left.append(round(left[-1] * amount))
    gone = [n - m for n, m in pairwise(left)]
    assert max(gone) - min(gone) <= 1
    assert 0.79 < gmacs(model) / gmacs(plain()) <= 0.8
    again = timm_ltm.convert(plain(), "tome", compression_ratio=list(model.block_amounts))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="schedule: got 'flat', expected none without gmacs"):
        timm_ltm.convert(plain(), "tome", schedule="flat")
    with pytest.raises(ValueError, match="schedule: got 'fast', expected one of"):
        timm_ltm.convert(plain(), "tome", gmacs=0.8, schedule="fast")
