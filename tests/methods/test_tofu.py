"""ToFu against a slow reference: one image, one token after another, written from its paper."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import Eva, VisionTransformer
from torch.testing import assert_close

import timm_ltm
from timm_ltm.reduction import GridMask, HardMask, Seen, Site, find_method, initial_tokens
from timm_ltm.reduction.masks import LengthMask, hard_mask

D = 4


def build(amount, tokens=9, prune=False, parts=1, **kwargs):
    cls, config = find_method("tofu", kwargs)
    return cls(Site(D, tokens, index=0 if prune else 1, depth=2, parts=parts), amount, config)


def nearest(keys, r):
    """Who goes to whom: of even tokens the r that are most like an odd one."""
    edges = []
    for i in range(0, len(keys), 2):
        likeness = [(float(F.cosine_similarity(keys[i], keys[j], dim=0)), -j) for j in range(1, len(keys), 2)]
        if likeness:
            best, j = max(likeness)
            edges.append((-best, i, -j))
    return {i: j for _, i, j in sorted(edges)[: min(r, len(keys) // 2)]}


def fused(group, sizes, prune):
    """What becomes of the tokens of a slot, the one that stays first."""
    if prune:
        return group[0]
    mean = sum(s * z for s, z in zip(sizes, group, strict=True)) / sum(sizes)
    return mean / mean.norm() * max(z.norm() for z in group)


def slow_tofu(z, size, into, prune):
    """Tokens (N, D) of these sizes, by who goes to whom."""
    kept, sizes = [], []
    for j in range(len(z)):
        if j not in into:
            group = [j, *(i for i, to in into.items() if to == j)]
            kept.append(fused([z[i] for i in group], [size[i] for i in group], prune))
            sizes.append(sum(size[i] for i in group))
    return torch.stack(kept), torch.stack(sizes)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("r", [1, 3, 20])
@pytest.mark.parametrize(("num_prefix", "parts"), [(0, 1), (2, 1), (0, 3)])
def test_tofu_against_a_slow_reference(N, r, num_prefix, parts, prune):
    z, keys = torch.randn(2 * parts, num_prefix + N, D).double(), torch.randn(2 * parts, N, 5).double()
    size = torch.randint(1, 4, (2, N)).double()
    tokens = initial_tokens(z, num_prefix, (N, 1), parts=parts)._replace(size=size)
    y, after = build(-float(r), N, prune, parts)(z, tokens, Seen(keys), num_prefix)
    assert torch.equal(y[:, :num_prefix], z[:, :num_prefix])
    for b in range(2):
        into = nearest(keys.unflatten(0, (2, parts))[b].mean(dim=0), r)
        for p in range(b * parts, (b + 1) * parts):
            expected, sizes = slow_tofu(z[p, num_prefix:], size[b], into, prune)
            assert_close(y[p, num_prefix:], expected, rtol=1e-5, atol=1e-9)
            assert_close(after.size[b], sizes)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("grid", [(6, 7), (5, 4), (1, 6), (5, 1)])
def test_maps_against_a_slow_reference(grid, prune):
    """Columns are merged, then rows, token by token: norms are of tokens, not of lines."""
    (H, W), B = grid, 2
    z, keys = (torch.randn(B, H * W, n).double() for n in (D, 3))
    height, width = torch.rand(B, H).double() + 0.5, torch.rand(B, W).double() + 0.5
    size = height[:, :, None] * width[:, None]
    tokens = initial_tokens(z, 0, grid, is_map=True)._replace(size=size.flatten(1))
    reducer = build(0.49, grid, prune)
    (H_, W_), (y, after) = reducer.slots(grid), reducer(z, tokens, Seen(keys))
    assert isinstance(after.masks[0], GridMask)
    for b in range(B):
        unit = F.normalize(keys[b], dim=1).view(H, W, 3)
        across = nearest(unit.transpose(0, 1).flatten(1), W - W_)
        down = nearest(unit.flatten(1), H - H_)
        rows = [slow_tofu(row, size[b].sum(dim=0), across, prune) for row in z[b].view(H, W, D)]
        columns = [
            slow_tofu(torch.stack([row[w] for row, _ in rows]), size[b].sum(dim=1), down, prune) for w in range(W_)
        ]
        assert_close(y[b].view(H_, W_, D), torch.stack([c for c, _ in columns], dim=1), rtol=1e-5, atol=1e-9)
        assert_close(after.size[b].view(H_, W_), columns[0][1][:, None] * rows[0][1] / size[b].sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 11), st.floats(0.5, 1.0), st.integers(0, 2**31))
def test_slots_are_as_long_as_their_longest_token(N, ratio, seed):
    g = torch.Generator().manual_seed(seed)
    z, keys = (torch.randn(2, N, n, generator=g).double() for n in (D, 3))
    y, after = build(ratio, N)(z, initial_tokens(z, 0, (N, 1)), Seen(keys))
    to = after.masks[0].destinations()
    assert_close(y.norm(dim=2), (to * z.norm(dim=2, keepdim=True)).amax(dim=1))
    mean = after.masks[0].dense().transpose(1, 2) @ z
    assert_close(F.cosine_similarity(y, mean, dim=2), torch.ones(2, y.shape[1]).double())
    assert_close(after.unmerge(y), to @ y)
    assert_close(after.mean(y)[:, 0], after.unmerge(y).mean(dim=1))


@pytest.mark.parametrize("prune", [False, True])
def test_equal_tokens_stay_what_they_are(prune):
    z = torch.randn(2, 1, D).expand(-1, 7, -1)
    y, after = build(-3.0, 7, prune)(z, initial_tokens(z, 0, (7, 1)), Seen(torch.ones(2, 7, 3)))
    assert_close(y, z[:, :4])
    assert torch.equal(after.size.sum(dim=1), torch.full((2,), 7.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_tokens_that_cancel(dtype):
    """They have no direction: what comes out and its gradients are finite all the same."""
    z = torch.zeros(1, 6, D)
    z[0, 2], z[0, 3] = 300.0, -300.0  # whose squares half precision has no number for
    z[0, 4], z[0, 5] = torch.tensor([200.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    z = z.to(dtype).requires_grad_()
    mask = LengthMask(
        hard_mask(torch.tensor([[1, 3, 5, 0, 2, 4]]), torch.tensor([[0, 1, 2]]), torch.ones(1, 6), 3), True
    )
    y = mask.merge(z)
    expected = torch.zeros(1, 3, D)
    expected[0, 2, 0], expected[0, 2, 2] = 200.0, 1.0
    assert_close(y.detach().float(), expected, rtol=1e-2, atol=1e-4)
    y.float().sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad[0, 4].any()


def test_gradients():
    z, keys = torch.randn(2, 7, D).double().requires_grad_(), torch.randn(2, 7, 3).double()
    reducer = build(-3.0, 7)
    assert torch.autograd.gradcheck(lambda z: reducer(z, initial_tokens(z, 0, (7, 1)), Seen(keys))[0], (z,))


@pytest.mark.parametrize(("settings", "pruned"), [({}, 3), ({"prune_blocks": 0}, 0), ({"prune_blocks": 5}, 5)])
def test_early_blocks_prune(settings, pruned):
    """Of six blocks the first half, also where none of these merges."""
    model = timm_ltm.convert(timm.create_model("test_vit").eval(), "tofu", r=4, **settings)
    _, tokens = model.forward_merged(torch.randn(1, 3, 160, 160))
    assert [isinstance(mask, HardMask) and mask.rest is None for mask in tokens.masks] == [i < pruned for i in range(6)]
    late = timm_ltm.convert(timm.create_model("test_vit").eval(), "tofu", r=[0, 0, 0, 4, 0, 4], **settings)
    _, tokens = late.forward_merged(torch.randn(1, 3, 160, 160))
    assert [isinstance(mask, HardMask) for mask in tokens.masks] == [pruned > 3, pruned > 5]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3"])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=r"prune_blocks: got .*, expected a whole number, 0 or more"):
        build(0.5, prune_blocks=wrong)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PLAIN = {
    "plain": (VisionTransformer, {}),
    "layer_scale": (VisionTransformer, {"init_values": 0.1}),
    "qk_norm": (VisionTransformer, {"qk_norm": True}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "rope": (Eva, {"use_rot_pos_emb": True}),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_without_merging_it_is_the_plain_model(kind):
    cls, kwargs = PLAIN[kind]
    plain, x = cls(**SMALL, **kwargs).eval(), torch.randn(2, 3, 32, 32)
    for nothing in ({"r": 0}, {"compression_ratio": 1.0}):
        assert torch.equal(timm_ltm.convert(plain, "tofu", **nothing)(x), plain(x))
    merging = timm_ltm.convert(plain, "tofu", r=4)(x)
    assert merging.isfinite().all()
    assert not torch.equal(merging, plain(x))
