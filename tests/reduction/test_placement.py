"""Where merged maps lie on the plain model's, against matrices of whole maps worked out token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from timm_ltm.reduction import DenseMask, GridMask, Placement
from timm_ltm.reduction.masks import hard_mask, soft_mask

B = 2


def line(n, slots, soft, g):
    """A mask of n tokens, in float64; None where none merges."""
    if n == slots:
        return None
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(B)])
    order = torch.cat((order[:, :slots].sort(dim=1).values, order[:, slots:]), dim=1)
    size = torch.rand(B, n, generator=g, dtype=torch.float64) + 0.5
    logits = torch.randn(B, n - slots, slots, generator=g, dtype=torch.float64)
    return soft_mask(order, logits, size) if soft else hard_mask(order, logits.argmax(dim=2), size, slots)


def straight(grid, merged, soft, seed=0):
    """A mask of a map's lines."""
    g = torch.Generator().manual_seed(seed)
    (H, W), (H_, W_) = grid, merged
    rows, columns = line(W, W_, soft, g), line(H, H_, soft, g)
    size = torch.full((B, H_ * W_), H * W / (H_ * W_), dtype=torch.float64)
    return GridMask(rows, columns, grid, merged, size)


def dense(grid, merged, soft, seed=0):
    """A mask of a whole map, in which every token goes to any slots."""
    g = torch.Generator().manual_seed(seed)
    N, P = grid[0] * grid[1], merged[0] * merged[1]
    to = torch.rand(B, N, P, generator=g, dtype=torch.float64)
    to = to.softmax(dim=2) if soft else F.one_hot(to.argmax(dim=2), P).double()
    weights = to + 1e-3
    size = to.sum(dim=1)
    return DenseMask(weights / weights.sum(dim=1, keepdim=True), to, torch.arange(P), size, merged)


def start(grid, seed=0):
    """The map that nothing has merged, in float64."""
    return Placement.identity(B, grid, torch.zeros(B, dtype=torch.float64))


def pixels(to, grid, merged, patch):
    """(H W, P) of patches as one of pixels: a pixel goes where its patch goes, to the same place in it."""
    (H, W), (H_, W_), (h, w) = grid, merged, patch
    out = torch.zeros(H * h * W * w, H_ * h * W_ * w, dtype=to.dtype)
    for i, j, a, b in itertools.product(range(H), range(W), range(h), range(w)):
        for u, v in itertools.product(range(H_), range(W_)):
            token, slot = (i * h + a) * W * w + j * w + b, (u * h + a) * W_ * w + v * w + b
            out[token, slot] = to[i * W + j, u * W_ + v]
    return out


def halves(to, grid, merged):
    """Pairs of tokens averaged, of pairs of slots: 2 x 2 of both, fewer at odd edges."""
    (H, W), (H_, W_) = grid, merged
    (h, w), (h_, w_) = ([-(-n // 2) for n in size] for size in (grid, merged))
    out = torch.zeros(h * w, h_ * w_, dtype=to.dtype)
    for i, j in itertools.product(range(H), range(W)):
        of = min(2, H - i // 2 * 2) * min(2, W - j // 2 * 2)  # tokens that become one
        for u, v in itertools.product(range(H_), range(W_)):
            out[i // 2 * w + j // 2, u // 2 * w_ + v // 2] += to[i * W + j, u * W_ + v] / of
    return out


def check(placement, expected, grid, merged):
    """``unmerge`` and ``mean`` by the whole matrices (B, H W, H' W')."""
    assert (tuple(placement.grid), tuple(placement.merged)) == (grid, merged)
    assert_close(expected.sum(dim=2), torch.ones_like(expected[:, :, 0]))
    x = torch.randn(B, *merged, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    back = (expected @ x.flatten(1, 2)).unflatten(1, grid)
    assert_close(placement.unmerge(x), back)
    assert_close(placement.mean(x), back.mean(dim=(1, 2)))
    assert placement.unmerge(x.bfloat16()).dtype == torch.bfloat16


KINDS = pytest.mark.parametrize("kind", [straight, dense])
SOFT = pytest.mark.parametrize("soft", [False, True])


@KINDS
@SOFT
@pytest.mark.parametrize("grid", [(5, 6), (4, 4)])
def test_two_merges(kind, soft, grid):
    masks = kind(grid, (4, 4), soft), kind((4, 4), (2, 3), soft, seed=1)
    placement, expected = start(grid), torch.eye(grid[0] * grid[1], dtype=torch.float64).expand(B, -1, -1)
    for mask in masks:
        placement, expected = placement.then(mask), expected @ mask.destinations()
    assert (placement.whole is None) == (kind is straight), "straight lines need a matrix per axis"
    check(placement, expected, grid, (2, 3))


@SOFT
def test_lines_then_whole_maps(soft):
    first, second = straight((4, 5), (3, 4), soft), dense((3, 4), (2, 2), soft)
    third = straight((2, 2), (2, 1), soft)
    placement = start((4, 5)).then(first).then(second).then(third)
    expected = first.destinations() @ second.destinations() @ third.destinations()
    check(placement, expected, (4, 5), (2, 1))


@KINDS
@SOFT
@pytest.mark.parametrize("patch", [(2, 2), (1, 3)])
def test_patches(kind, soft, patch):
    """Patches are merged, the map is of pixels."""
    (h, w), mask = patch, kind((3, 4), (2, 3), soft)
    placement = start((3 * h, 4 * w)).then(mask, patch)
    expected = torch.stack([pixels(to, (3, 4), (2, 3), patch) for to in mask.destinations()])
    check(placement, expected, (3 * h, 4 * w), (2 * h, 3 * w))


@KINDS
@SOFT
@pytest.mark.parametrize("grid", [(6, 8), (7, 5)])
@pytest.mark.parametrize("merged", [(4, 4), (5, 3)])
def test_halved(kind, soft, grid, merged):
    mask = kind(grid, merged, soft)
    placement = start(grid).then(mask).halved()
    expected = torch.stack([halves(to, grid, merged) for to in mask.destinations()])
    half, half_merged = (tuple(-(-n // 2) for n in size) for size in (grid, merged))
    check(placement, expected, half, half_merged)
    again = kind(half_merged, (1, 2), soft, seed=1)
    check(placement.then(again), expected @ again.destinations(), half, (1, 2))


@KINDS
@SOFT
@pytest.mark.parametrize("stretched", [(4, 6), (3, 4), (2, 5)])
def test_stretched(kind, soft, stretched):
    """The map that is stretched is put back as if it were stretched back first."""
    mask = kind((5, 6), (3, 4), soft)
    placement = start((5, 6)).then(mask).stretched(stretched)
    x = torch.randn(B, *stretched, 3, dtype=torch.float64)
    back = F.interpolate(x.movedim(3, 1), size=(3, 4), mode="bilinear", align_corners=False).movedim(1, 3)
    expected = (mask.destinations() @ back.flatten(1, 2)).unflatten(1, (5, 6))
    assert_close(placement.unmerge(x), expected)
    assert_close(placement.mean(x), expected.mean(dim=(1, 2)))


def test_nothing_merged_is_put_back_as_it_is():
    x = torch.randn(B, 3, 5, 4)
    placement = Placement.identity(B, (3, 5), x)
    assert torch.equal(placement.unmerge(x), x)
    assert torch.equal(placement.stretched((3, 5)).unmerge(x), x)
    assert_close(placement.mean(x), x.mean(dim=(1, 2)))
