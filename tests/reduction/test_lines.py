"""Maps merged by straight lines, against a slow reference: columns as tokens of H K keys, then rows of W K keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.reduction import GridMask, Seen, Site, find_method, initial_tokens
from timm_ltm.reduction.masks import hard_mask, soft_mask
from timm_ltm.reduction.matching import bipartite_order, order_by_redundancy

D, G = 6, 4
METHODS = {"ltm": {"beta": 5.0, "num_clusters": 3}, "anchors": {"update": False}, "tome": {}}


def build(kind, grid, ratio, seed=0, parts=1):
    """A reducer in float64, its clusters as after a refresh."""
    cls, config = find_method("ltm" if kind == "anchors" else kind, METHODS[kind])
    torch.manual_seed(seed)
    reducer = cls(Site(D, grid, parts=parts), ratio, config).double().eval()
    if kind == "ltm":
        torch.nn.init.normal_(reducer.mlp.weight, std=0.5)
        c = reducer.clusters
        c.centroids.normal_()
        c.scores.normal_()
        c.temperature.fill_(c.centroids.shape[1] / 2)
    return reducer


def inputs(B, grid, seed=0, parts=1):
    g = torch.Generator().manual_seed(seed)
    z, keys = (torch.randn(B * parts, grid[0] * grid[1], n, generator=g, dtype=torch.float64) for n in (D, 3))
    return z, initial_tokens(z, 0, grid, is_map=True, parts=parts), Seen(keys)


def merged_line(reducer, kind, unit, size, cells, update, P):
    """One line of n tokens by the sequence's merge alone. (n, K), (n,), (n,), (n, g)."""
    if kind == "tome":
        return hard_mask(*bipartite_order(unit[None], P), size[None], P)
    half = len(unit) // 2
    order = order_by_redundancy(unit[None], P, size[None]) if half > P else bipartite_order(unit[None], P)[0]
    unit, cells, update = unit[order[0]], cells[order[0]], update[order[0]]
    similarity = unit[P:] @ unit[:P].t()
    if kind == "anchors":
        return hard_mask(order, similarity.argmax(dim=1)[None], size[None], P)
    own = torch.stack([update[p, cells[p]] for p in range(P)])
    rest = torch.stack([update[P:, cells[p]] for p in range(P)], dim=1)  # M P
    similarity = reducer.log_beta.exp() * similarity
    if reducer.training:
        return soft_mask(order, similarity[None], size[None], own[None], rest[None])
    slot = (similarity + rest).argmax(dim=1)
    return hard_mask(order, slot[None], size[None], P, own[None], rest.gather(1, slot[:, None]).t())


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grid", [(6, 7), (5, 8), (4, 4)])
def test_straight_lines_against_a_slow_reference(kind, train, grid):
    (H, W), B = grid, 2
    reducer = build(kind, grid, 0.5).train(train)
    H_, W_ = reducer.slots(grid)
    z, tokens, seen = inputs(B, grid)
    size = torch.rand(B, H, 1, dtype=torch.float64) + 0.5
    size = (size * (torch.rand(B, 1, W, dtype=torch.float64) + 0.5)).flatten(1)
    tokens = tokens._replace(size=size)
    merged, after = reducer(z, tokens, seen)
    assert after.grid == (H_, W_)
    update = reducer.advice(z, tokens) if kind == "ltm" else torch.zeros(B, H * W, G * G, dtype=torch.float64)
    unit, cells = F.normalize(seen.keys, dim=2).view(B, H, W, 3), tokens.cells(G).reshape(B, H, W)
    for b in range(B):
        u, sizes = update[b].view(H, W, G, G), size[b].view(H, W)
        of_columns = torch.stack([u[h, :, cells[b, h, 0] // G] for h in range(H)]).mean(dim=0)  # W g
        of_rows = torch.stack([u[:, w, :, cells[b, 0, w] % G] for w in range(W)]).mean(dim=0)  # H g
        wide = unit[b].transpose(0, 1).flatten(1) / H**0.5  # W (H K)
        rows = merged_line(reducer, kind, wide, sizes.sum(dim=0), cells[b, 0] % G, of_columns, W_)
        x = rows.merge(z[b].view(H, W, D).transpose(0, 1).flatten(1)[None])[0]  # W' (H D)
        wide = unit[b].flatten(1) / W**0.5  # H (W K)
        columns = merged_line(reducer, kind, wide, sizes.sum(dim=1), cells[b, :, 0] // G, of_rows, H_)
        x = columns.merge(x.view(W_, H, D).transpose(0, 1).flatten(1)[None])[0]  # H' (W' D)
        torch.testing.assert_close(merged[b], x.view(H_ * W_, D))
        torch.testing.assert_close(after.size[b].view(H_, W_), columns.size[0][:, None] * rows.size[0] / sizes.sum())
        places = columns.anchors()[0][:, None] * W + rows.anchors()[0]
        assert torch.equal(after.anchor[b], places.flatten())


@pytest.mark.parametrize("kind", METHODS)
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 0.99), st.booleans(), st.integers(0, 2**31))
def test_masks_of_maps(kind, H, W, ratio, train, seed):
    reducer = build(kind, (H, W), ratio, seed).train(train)
    z, tokens, seen = inputs(2, (H, W), seed)
    merged, after = reducer(z, tokens, seen)
    (mask,) = after.masks
    assert isinstance(mask, GridMask)
    H_, W_ = reducer.slots((H, W))
    assert merged.shape == (2, H_ * W_, D)
    weights, to = mask.dense(), mask.destinations()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))
    torch.testing.assert_close(merged, weights.transpose(1, 2) @ z)
    torch.testing.assert_close(to.sum(dim=1), after.size)
    torch.testing.assert_close(after.unmerge(merged), to @ merged)
    if (H_, W_) == (H, W):
        torch.testing.assert_close(merged, z)


@pytest.mark.parametrize("kind", METHODS)
def test_parts_are_merged_and_put_back_alike(kind):
    """MobileViT's pixels: one mask, from the mean of the parts, for every part."""
    N, parts, B = 24, 3, 2
    reducer = build(kind, N, 0.5, parts=parts)
    z, tokens, seen = inputs(B, (4, 6), parts=parts)
    merged, after = reducer(z, tokens._replace(grid=None, kept=()), seen)
    mean, mean_keys = (t.unflatten(0, (B, parts)).mean(dim=1) for t in (z, seen.keys))
    _, of_mean = build(kind, N, 0.5)(mean, initial_tokens(mean, 0, (4, 6)), Seen(mean_keys))
    for what in ("dense", "destinations"):
        torch.testing.assert_close(*(getattr(t.masks[0], what)() for t in (after, of_mean)))
    merging = after.masks[0].dense().repeat_interleave(parts, dim=0).transpose(1, 2) @ z
    torch.testing.assert_close(*(F.normalize(t, dim=2) for t in (merged, merging)))
    to = after.masks[0].destinations().repeat_interleave(parts, dim=0)
    gained = torch.randn_like(merged)
    torch.testing.assert_close(after.unmerge(gained, parts=parts), to @ gained)
    torch.testing.assert_close(after.put_back(merged + gained, parts=parts), z + to @ gained)


@pytest.mark.parametrize("kind", METHODS)
def test_rows_agree_with_the_sequence(kind):
    """A map of one row is a sequence, whose means LTM makes as long as the tokens they are of.

    But LTM's anchors are evenly spaced on lines, as far as ToMe's are: below half they are the sequence's.
    """
    ratio = 0.7 if kind == "tome" else 0.3
    line, sequence = build(kind, (1, 9), ratio**2), build(kind, 9, ratio)
    z, tokens, seen = inputs(2, (1, 9))
    of_map, after = line(z, tokens, seen)
    of_sequence, flat = sequence(z, tokens._replace(grid=None), seen)
    of_directions = torch.nn.functional.normalize(of_sequence, dim=2) * of_map.norm(dim=2, keepdim=True)
    torch.testing.assert_close(of_map, of_sequence if kind == "tome" else of_directions)
    torch.testing.assert_close(after.masks[0].dense(), flat.masks[0].dense())


def test_gradients_reach_both_passes():
    reducer = build("ltm", (5, 5), 0.5).train()
    z, tokens, seen = inputs(2, (5, 5))
    z.requires_grad_()
    reducer(z, tokens, seen)[0].square().sum().backward()
    assert z.grad.isfinite().all()
    for name in ("log_beta", "eta", "proj.weight", "mlp.weight"):
        assert reducer.get_parameter(name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["ltm", "anchors"])
def test_anchors_of_lines_are_tomes(kind, train):
    """As long as at most half of a side goes."""
    z, tokens, seen = inputs(2, (6, 8))
    for ratio, alike in ((0.5, True), (0.7, True), (0.1, False)):
        ours, tomes = (build(k, (6, 8), ratio).train(train)(z, tokens, seen)[1] for k in (kind, "tome"))
        assert (ours.anchor.shape == tomes.anchor.shape and torch.equal(ours.anchor, tomes.anchor)) == alike
