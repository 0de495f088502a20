"""Masks: what merges, and what puts back, against loops and against their own dense form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.reduction import DenseMask, GridMask
from timm_ltm.reduction.masks import hard_mask, soft_mask
from timm_ltm.reduction.tokens import grid_cells, initial_tokens, one_hot, take

D = 5
shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.floats(0.1, 1.0), st.integers(0, 2**31))


def inputs(B, N, P, seed=0, dtype=torch.float64):
    """An order with anchors in front, in token order; sizes, logits (B, M, P), updates."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(N, generator=g) for _ in range(B)])
    order = torch.cat((order[:, :P].sort(dim=1).values, order[:, P:]), dim=1)
    size = 1 + torch.randint(4, (B, N), generator=g).to(dtype)
    logits, own, rest = (torch.randn(shape, generator=g).to(dtype) for shape in ((B, N - P, P), (B, P), (B, N - P, P)))
    return order, size, 5 * logits, own, rest


def build(kind, B, N, P, seed=0, dtype=torch.float64, update=True):
    """A mask of one of the kinds over N tokens (of a map, N x (N + 1)), and the sizes put in."""
    order, size, logits, own, rest = inputs(B, N, P, seed, dtype)
    if kind == "hard":
        slot = logits.argmax(dim=2)
        rest = rest.gather(2, slot.unsqueeze(2)).squeeze(2)
        return hard_mask(order, slot, size, P, *((own, rest) if update else ())), size
    if kind == "dropped":
        return hard_mask(order, logits.argmax(dim=2), size, P)._replace(own=torch.ones_like(own), rest=None), size
    if kind == "soft":
        return soft_mask(order, logits, size, *((own, rest) if update else ())), size
    if kind == "dense":
        weights = torch.randn(B, N, P).to(dtype).softmax(dim=1)
        to = weights / weights.sum(dim=2, keepdim=True)
        return DenseMask(weights, to, torch.arange(P), (to * size.unsqueeze(2)).sum(dim=1)), size
    rows, width = build("soft", B, N + 1, P, seed, dtype, update)
    columns, height = build("hard", B, N, P, seed + 1, dtype, update)
    merged = (columns.size.unsqueeze(2) * rows.size.unsqueeze(1)).flatten(1)
    return GridMask(rows, columns, (N, N + 1), (P, P), merged), (height.unsqueeze(2) * width.unsqueeze(1)).flatten(1)


KINDS = ["hard", "dropped", "soft", "dense", "grid"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(shape=shapes)
def test_a_mask_is_its_dense_form(kind, shape):
    B, N, ratio, seed = shape
    mask, size = build(kind, B, N, max(1, round(ratio * N)), seed)
    G, to = mask.dense(), mask.destinations()
    torch.testing.assert_close(G.sum(dim=1), torch.ones_like(G[:, 0]))
    torch.testing.assert_close(to.sum(dim=2), torch.ones_like(to[..., 0]))
    assert (G >= 0).all()
    assert (to >= 0).all()
    torch.testing.assert_close(mask.size, (to * size.unsqueeze(2)).sum(dim=1))  # so sizes add up to those put in
    x = torch.randn(B, G.shape[1], D, dtype=torch.float64)
    merged = mask.merge(x)
    torch.testing.assert_close(merged, G.transpose(1, 2) @ x)
    torch.testing.assert_close(mask.unmerge(merged), to @ merged)
    anchors = mask.anchors()
    assert anchors.shape == mask.size.shape
    if kind != "dense":  # a slot is one of the tokens, goes to itself, and slots are in token order
        own = to.gather(1, anchors.unsqueeze(2).expand(-1, -1, to.shape[2])).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(own, torch.ones_like(own))
        assert (anchors.diff(dim=1) > 0).all()


@settings(deadline=None, max_examples=25)
@given(shapes, st.booleans())
def test_soft_masks_against_loops(shape, update):
    B, N, ratio, seed = shape
    P = max(1, round(ratio * N))
    order, size, logits, own, rest = inputs(B, N, P, seed)
    mask = soft_mask(order, logits, size, *((own, rest) if update else ()))
    G, merged = torch.zeros(B, N, P, dtype=torch.float64), torch.zeros(B, P, dtype=torch.float64)
    for b in range(B):
        for p in range(P):
            i = order[b, p]
            G[b, i, p] = size[b, i] * (own[b, p].exp() if update else 1.0)
            merged[b, p] += size[b, i]
        for m in range(N - P):
            i = order[b, P + m]
            share = (logits[b, m] + (rest[b, m] if update else 0.0)).softmax(dim=0)
            merged[b] += size[b, i] * share
            G[b, i] = size[b, i] * share * (rest[b, m].exp() if update else 1.0)
    torch.testing.assert_close(mask.dense(), G / G.sum(dim=1, keepdim=True))
    torch.testing.assert_close(mask.size, merged)


@pytest.mark.parametrize("update", [False, True])
def test_a_soft_mask_nears_the_hard_one(update):
    order, size, logits, own, rest = inputs(3, 12, 5)
    own, rest = (own, rest) if update else (None, None)
    errors = []
    for beta in (1.0, 1e1, 1e2, 1e6):
        soft = soft_mask(order, beta * logits, size, own, rest)
        slot = (beta * logits + (0.0 if rest is None else rest)).argmax(dim=2)
        of_slot = None if rest is None else rest.gather(2, slot.unsqueeze(2)).squeeze(2)
        hard = hard_mask(order, slot, size, 5, own, of_slot)
        errors.append((soft.dense() - hard.dense()).abs().max().item())
        assert (soft.size - hard.size).abs().max() <= 12 * 4 * (soft.to - one_hot(slot, 5, size.dtype)).abs().max()
    assert errors[0] > 1e-2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("kind", ["hard", "soft", "dense"])
@pytest.mark.parametrize("num_prefix", [1, 3])
@pytest.mark.parametrize("P", [4, 9])
def test_prefix_tokens_pass_through(kind, num_prefix, P):
    mask, _ = build(kind, 2, 9, P)
    x = torch.randn(2, num_prefix + 9, D, dtype=torch.float64)
    merged = mask.merge(x, num_prefix)
    assert torch.equal(merged[:, :num_prefix], x[:, :num_prefix])
    torch.testing.assert_close(merged[:, num_prefix:], mask.merge(x[:, num_prefix:]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grid"])
def test_parts_are_merged_alike(kind):
    mask, size = build(kind, 2, 6, 4)
    x = torch.randn(2 * 3, size.shape[1], D, dtype=torch.float64)
    merged = mask.merge(x, 0, 3)
    torch.testing.assert_close(merged, mask.dense().repeat_interleave(3, dim=0).transpose(1, 2) @ x)
    torch.testing.assert_close(mask.unmerge(merged, 3), mask.destinations().repeat_interleave(3, dim=0) @ merged)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(kind, dtype):
    """Tokens of half precision by a float32 mask stay of half precision, and near."""
    mask, size = build(kind, 2, 9, 5, dtype=torch.float32)
    x = torch.randn(2, size.shape[1], D)
    half = mask.merge(x.to(dtype))
    assert half.dtype == mask.unmerge(half).dtype == dtype
    near = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(half.float(), mask.merge(x), **near)
    torch.testing.assert_close(mask.unmerge(half).float(), mask.unmerge(mask.merge(x)), **near)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = mask.merge(x)
        back = mask.unmerge(merged)
    torch.testing.assert_close(merged.float(), mask.merge(x), **near)
    torch.testing.assert_close(back.float(), mask.unmerge(mask.merge(x)), **near)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("P", [4, 9])
def test_any_update_gives_finite_weights_and_gradients(kind, P):
    order, size, logits, own, rest = inputs(2, 9, P, dtype=torch.float32)
    own, rest = (1e4 * own).requires_grad_(), (1e4 * rest).requires_grad_()
    if kind == "hard":
        slot = logits.argmax(dim=2) if P < 9 else torch.zeros(2, 0, dtype=torch.long)
        mask = hard_mask(order, slot, size, P, own, rest.gather(2, slot.unsqueeze(2)).squeeze(2))
    else:
        mask = soft_mask(order, 1e6 * logits, size, own, rest)
    merged = mask.merge(torch.randn(2, 9, D))
    merged.square().sum().backward()
    assert merged.isfinite().all()
    assert own.grad is not None  # also where nothing merges: DistributedDataParallel waits for it
    assert own.grad.isfinite().all()
    assert rest.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_updates_get_gradients_as_of_finite_differences(kind):
    order, size, logits, own, rest = inputs(1, 5, 3)
    x, slot = torch.randn(1, 5, 2, dtype=torch.float64), logits.argmax(dim=2)

    def merged(own, rest):
        if kind == "soft":
            return soft_mask(order, logits, size, own, rest).merge(x)
        return hard_mask(order, slot, size, 3, own, rest.gather(2, slot.unsqueeze(2)).squeeze(2)).merge(x)

    assert torch.autograd.gradcheck(merged, (own.requires_grad_(), rest.requires_grad_()))


def test_tokens_put_back_through_several_masks():
    first, _ = build("hard", 2, 12, 8, seed=1)
    second, _ = build("soft", 2, 8, 5, seed=2)
    x = torch.randn(2, 1 + 5, D, dtype=torch.float64)
    tokens = initial_tokens(torch.randn(2, 13, D, dtype=torch.float64), 1, (3, 4))
    assert tokens.unmerge(x, 1) is x
    to = first.destinations() @ second.destinations()
    tokens = tokens._replace(size=to.sum(dim=1), masks=(first, second))
    back = tokens.unmerge(x, 1)
    assert torch.equal(back[:, :1], x[:, :1])
    torch.testing.assert_close(back[:, 1:], to @ x[:, 1:])
    torch.testing.assert_close(tokens.mean(x, 1), back[:, 1:].mean(dim=1, keepdim=True))
    bias = tokens.log_sizes(1, parts=2)
    assert bias.shape == (4, 1, 1, 6)
    torch.testing.assert_close(bias[::2, 0, 0, 1:].exp(), tokens.size)
    assert (bias[..., 0] == 0).all()


@pytest.mark.parametrize("kinds", [("hard", "soft"), ("soft", "hard")])
def test_tokens_are_put_back_with_what_was_their_own(kinds):
    """In front of the first merge plus what is gained by slots between and behind, by explicit sums."""
    masks = [build(kinds[0], 2, 12, 8, seed=1)[0], build(kinds[1], 2, 8, 5, seed=2)[0]]
    start = torch.randn(2, 1 + 12, D, dtype=torch.float64)
    tokens, x, stages = initial_tokens(start, 1, (3, 4))._replace(kept=()), start, []
    for mask in masks:
        merged = mask.merge(x, 1)
        tokens = tokens._replace(masks=(*tokens.masks, mask), kept=(*tokens.kept, (x[:, 1:], merged[:, 1:])))
        x = merged + torch.randn_like(merged)
        stages.append((x - merged)[:, 1:])
    back = tokens.put_back(x, 1)
    assert torch.equal(back[:, :1], x[:, :1])
    first, second = (mask.destinations() for mask in masks)
    expected = start[:, 1:] + first @ stages[0] + first @ second @ stages[1]
    torch.testing.assert_close(back[:, 1:], expected)
    copies = tokens._replace(kept=None).put_back(x, 1)
    assert torch.equal(copies, tokens.unmerge(x, 1))


def test_cells_and_lookups():
    assert grid_cells(3, 5, 2).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    tokens = initial_tokens(torch.zeros(1, 3, D), 0, (2, 2), kept=torch.tensor([[0, 1, 3]]))
    assert tokens.cells(2).tolist() == [[0, 1, 3]]
    x, index = torch.randn(3, 5, 4), torch.randint(5, (3, 2))
    assert torch.equal(take(x, index), x.gather(1, index.unsqueeze(2).expand(-1, -1, 4)))
