"""PatchMerger against a slow reference: one image, one slot after another, written from its formula."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch.testing import assert_close

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.reduction import Seen, Site, find_method, initial_tokens

D = 6
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def build(amount=-3.0, N=9, **kwargs):
    """With weights that are not initial ones: with those all slots are nearly the mean."""
    cls, config = find_method("patch_merger", kwargs)
    reducer = cls(Site(D, N), amount, config).double()
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return reducer


def slow_patch_merger(x, size, W, gain, shift):
    """Y of tokens (N, D), what each token gets back of each slot, and the slots' sizes."""
    N, M = len(x), len(W)
    asked = torch.zeros(N, M, dtype=x.dtype)
    for i in range(N):
        mean = sum(x[i]) / D
        deviation = math.sqrt(float(sum((x[i] - mean) ** 2)) / D + 1e-6)
        normal = (x[i] - mean) / deviation * gain + shift
        for m in range(M):
            asked[i, m] = sum(W[m] * normal)
    y, weights = [], torch.zeros_like(asked)
    for m in range(M):
        total = sum(math.exp(a) for a in asked[:, m])
        for i in range(N):
            weights[i, m] = math.exp(asked[i, m]) / total
        y.append(sum(weights[i, m] * x[i] for i in range(N)))
    back = torch.stack([row / row.sum() for row in weights])
    return torch.stack(y), back, sum(s * row for s, row in zip(size, back, strict=True))


@pytest.mark.parametrize("N", [4, 8, 9])
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_patch_merger_against_a_slow_reference(N, M, num_prefix):
    reducer, x = build(-float(M), N), torch.randn(2, num_prefix + N, D).double()
    tokens = initial_tokens(x, num_prefix, (N, 1))._replace(size=torch.rand(2, N).double() + 0.5)
    y, after = reducer(x, tokens, Seen(), num_prefix)
    assert torch.equal(y[:, :num_prefix], x[:, :num_prefix])
    of = [p.detach() for p in (reducer.queries.weight, reducer.norm.weight, reducer.norm.bias)]
    for b in range(2):
        expected, back, sizes = slow_patch_merger(x[b, num_prefix:], tokens.size[b], *of)
        assert_close(y[b, num_prefix:], expected, rtol=1e-5, atol=1e-9)
        assert_close(after.unmerge(y, num_prefix)[b, num_prefix:], back @ expected, rtol=1e-5, atol=1e-9)
        assert_close(after.size[b], sizes, rtol=1e-5, atol=1e-9)


def test_the_mean_of_what_is_put_back():
    """Weighted by size, over two merges too."""
    reducer, x = build(-5.0), torch.randn(2, 9, D).double()
    y, after = reducer(x, initial_tokens(x, 0, (3, 3)), Seen())
    y, after = build(-2.0, 5)(y, after, Seen())
    assert_close(after.size.sum(dim=1), torch.full((2,), 9.0).double())
    assert_close(after.mean(y)[:, 0], after.unmerge(y).mean(dim=1))
    assert after.anchor.shape == (2, 2)


@pytest.mark.parametrize("N", [1, 2, 3])
def test_no_more_tokens_than_slots_stay_as_they_are(N):
    reducer, x = build(-3.0, 9), torch.randn(2, 1 + N, D).double()
    y, after = reducer(x, initial_tokens(x, 1, (N, 1)), Seen(), 1)
    assert torch.equal(y, x)
    assert torch.equal(after.anchor, torch.arange(N).expand(2, -1))
    assert_close(after.size, torch.ones(2, N).double())
    y.sum().backward()
    for parameter in reducer.parameters():
        assert not parameter.grad.any(), "there is one, for DistributedDataParallel"
    assert build(-1.0, 1)(x[:, :1], initial_tokens(x[:, :1], 0, (1, 1)), Seen())[0].equal(x[:, :1])


def test_equal_tokens_are_all_asked_alike():
    x = torch.randn(2, 1, D).double().expand(-1, 9, -1)
    y, after = build()(x, initial_tokens(x, 0, (3, 3)), Seen())
    assert_close(y, x[:, :3])
    assert_close(after.size, torch.full((2, 3), 3.0).double())


def test_tokens_that_no_slot_asks_for():
    """In half precision and far apart: put back from all slots, nothing is lost or not a number."""
    reducer = build().float()
    with torch.no_grad():
        reducer.queries.weight.mul_(200.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 9, D, dtype=dtype, requires_grad=True)
        y, after = reducer.to(dtype)(x, initial_tokens(x, 0, (3, 3)), Seen())
        assert_close(after.size.sum(dim=1), torch.full((2,), 9.0))
        back = after.unmerge(y)
        assert back.isfinite().all()
        back.square().sum().backward()
        assert x.grad.isfinite().all()


def slots_of(model):
    return {reducer.site.index: reducer.queries.out_features for _, reducer in model.reducers()}


@pytest.mark.parametrize(
    ("depth", "settings", "slots"),
    [
        (12, {}, {5: 8}),  # behind block 6 of 12
        (5, {}, {1: 8}),
        (1, {}, {0: 8}),
        (4, {"num_slots": 3}, {1: 3}),
        (4, {"num_slots": [0, 5, 0, 2]}, {1: 5, 3: 2}),
        (4, {"compression_ratio": [1.0, 1.0, 0.3, 1.0]}, {2: 5}),
        (4, {"compression_ratio": 0.5}, {0: 8, 1: 4, 2: 2, 3: 1}),
        (4, {"num_slots": 8, "merge_warmup_epochs": 1}, {1: 8}),
    ],
)
def test_which_blocks(depth, settings, slots):
    model = timm_ltm.convert(VisionTransformer(**{**SMALL, "depth": depth}), "patch_merger", **settings)
    assert slots_of(model) == slots
    x = torch.randn(2, 3, 32, 32)
    assert model.eval().forward_merged(x)[0].shape == (2, 1 + list(slots.values())[-1], 32)
    assert model.forward_features(x).shape == (2, 17, 32)
    other = timm_ltm.convert(VisionTransformer(**{**SMALL, "depth": depth}), "patch_merger")
    other.load_state_dict(model.state_dict())
    assert slots_of(other) == slots
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"num_slots": 0}, "num_slots: got 0, expected a whole number, 1 or more"),
        ({"num_slots": [0, -1]}, "num_slots: got -1, expected a whole number, 0 or more"),
        ({"num_slots": True}, "num_slots: got True"),
        ({"num_slots": [8, 0]}, "num_slots: got '2 numbers', expected one number or 4, one per block"),
        ({"num_slots": 8, "compression_ratio": 0.5}, "num_slots: got one beside compression_ratio"),
        ({"num_slots": 8, "gmacs": 0.5}, "num_slots: got one beside gmacs"),
        ({"gmacs": 0.01}, r"gmacs: got 0.01, expected at least 0\.\d+"),
    ],
    ids=str,
)
def test_bad_settings(settings, got):
    with pytest.raises(ValueError, match=got):
        timm_ltm.convert(VisionTransformer(**SMALL), "patch_merger", **settings)


@pytest.mark.parametrize("share", [0.8, 0.65, 0.5, 0.2])
def test_a_budget_is_met_from_below(share):
    """By one block, the later the larger the share."""
    plain = timm.create_model("vit_small_patch16_224", device="meta").eval()
    model = timm_ltm.convert(plain, "patch_merger", gmacs=share)
    assert share - 0.01 <= gmacs(model) / gmacs(plain) <= share
    ((block, slots),) = slots_of(model).items()
    assert 8 <= slots < 100
    assert block == {0.8: 7, 0.65: 6, 0.5: 4, 0.2: 0}[share]


def test_a_checkpoint_of_another_input_size():
    """Its slots are what was learned: they are kept, whatever share of the tokens they are here."""
    ratios = {"compression_ratio": [1.0, 0.5, 1.0, 1.0]}
    model = timm_ltm.convert(VisionTransformer(**SMALL).eval(), "patch_merger", **ratios)
    larger = timm_ltm.convert(VisionTransformer(**{**SMALL, "img_size": 64}).eval(), "patch_merger", **ratios)
    assert (slots_of(model), slots_of(larger)) == ({1: 8}, {1: 32})
    state = model.state_dict()
    state["pos_embed"] = larger.state_dict()["pos_embed"]
    larger.load_state_dict(state)
    assert slots_of(larger) == {1: 8}
    assert torch.equal(larger.blocks[1].reducer.queries.weight, model.blocks[1].reducer.queries.weight)
    assert larger.forward_merged(torch.randn(1, 3, 64, 64))[0].shape == (1, 9, 32)
    assert copy.deepcopy(larger)(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_it_trains(pool):
    """From plain weights, also what asks for slots."""
    model = timm_ltm.convert(VisionTransformer(**SMALL, global_pool=pool), "patch_merger", num_slots=4).train()
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    before, losses = model.blocks[1].reducer.queries.weight.clone(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(8):
        losses.append(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model.blocks[1].reducer.queries.weight, before)


@pytest.mark.parametrize(
    "kind",
    [{}, {"init_values": 0.1}, {"qk_norm": True}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "map"}],
    ids=str,
)
def test_without_merging_it_is_the_plain_model(kind):
    plain, x = VisionTransformer(**SMALL, **kind).eval(), torch.randn(2, 3, 32, 32)
    for nothing in ({"num_slots": [0] * 4}, {"compression_ratio": 1.0}):
        assert torch.equal(timm_ltm.convert(plain, "patch_merger", **nothing)(x), plain(x))
    merging = timm_ltm.convert(plain, "patch_merger")(x)
    assert merging.isfinite().all()
    assert not torch.allclose(merging, plain(x), atol=1e-5)


def test_rotary_positions_are_refused():
    """Slots have no place. Neither do models of that kind have such names."""
    with pytest.raises(ValueError, match=r"method: got patch_merger .* rotary positions"):
        timm_ltm.convert(timm.create_model("eva02_tiny_patch14_224", device="meta"), "patch_merger")
    assert not timm.list_models("patch_merger_eva02*")
    assert timm.list_models("patch_merger_eva_giant*")
    assert not timm.list_models("patch_merger_swin*")
