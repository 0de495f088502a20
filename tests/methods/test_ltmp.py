"""LTMP against a slow reference: one image, explicit loops, written from its paper; padded batches."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import timm_ltm
from timm_ltm.methods import ltmp
from timm_ltm.methods.ltmp import flops_ratio
from timm_ltm.reduction import Seen, Site, find_method, initial_tokens

TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 5}
KINDS = {
    "plain": ("vit_tiny_patch16_224", TINY),
    "layer_scale": ("vit_tiny_patch16_224", {**TINY, "init_values": 0.1}),
    "qk_norm": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}),
    "registers": ("vit_tiny_patch16_224", {**TINY, "reg_tokens": 4}),
    "deit": ("deit_tiny_distilled_patch16_224", TINY),
    "rope": ("vit_small_patch16_dinov3", TINY),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
}


def build(N, merge, prune, D=4):
    cls, config = find_method("ltmp", {})
    reducer = cls(Site(D, N), 0.8, config).double().eval()
    return set_thresholds(reducer, merge, prune)


def set_thresholds(model, merge, prune):
    with torch.no_grad():
        for reducer in model.modules():
            if isinstance(reducer, ltmp.LTMP):
                reducer.merge_threshold.fill_(merge)
                reducer.prune_thousandths.fill_(1000 * prune)
    return model


def plain(kind):
    """Of weights that are not the initial ones: keys of some tokens are alike, of others not."""
    name, kwargs = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch=4):
    """Of more and less noise, so that different numbers of tokens go."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 64, 64, generator=g)
    return x * torch.linspace(1.0, 0.3, batch).view(-1, 1, 1, 1) + torch.randn(batch, 3, 1, 1, generator=g)


def merging(kind="plain", merge=0.9, prune=0.045, **settings):
    return set_thresholds(timm_ltm.convert(plain(kind), "ltmp", **settings), merge, prune)


def slow_ltmp(z, keys, attention, size, merge, prune):
    """One image: merge, then prune.

    Returns:
        Tokens left, how many each was merged of, which they were; and of each input token the one it is put back from.
    """
    N, back = len(z), {}
    for i in range(0, N, 2):
        similarity = {j: float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(1, N, 2)}
        if similarity and max(similarity.values()) > merge:
            back[i] = max(similarity, key=similarity.get)
    left = [i for i in range(N) if i not in back]
    groups = {j: [j] + [i for i, to in back.items() if to == j] for j in left}
    sizes = {j: sum(float(size[i]) for i in group) for j, group in groups.items()}
    means = {j: sum(size[i] * z[i] for i in group) / sizes[j] for j, group in groups.items()}
    top = max(left, key=lambda j: (float(attention[j]), -j))
    stays = [j for j in left if float(attention[j]) >= prune or j == top]
    for j in left:
        if j not in stays:
            back[j] = max(stays, key=lambda k: float(F.cosine_similarity(keys[j], keys[k], dim=0)))
    for i in range(N):
        while back.get(i, i) != i:
            if back[i] not in back:
                break
            back[i] = back[back[i]]
    return (
        torch.stack([means[j] for j in stays]),
        torch.tensor([sizes[j] for j in stays], dtype=size.dtype),
        torch.tensor(stays),
        torch.tensor([back.get(i, i) for i in range(N)]),
    )


def random_case(B, N, num_prefix=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, keys = (torch.randn(B, n, 4, generator=g, dtype=torch.float64) for n in (num_prefix + N, N))
    keys = keys + torch.randn(B, 1, 4, generator=g, dtype=torch.float64)
    attention = torch.rand(B, N, generator=g, dtype=torch.float64) / N
    size = torch.randint(1, 4, (B, N), generator=g).double()
    return z, initial_tokens(z, num_prefix, (N, 1))._replace(size=size), Seen(keys, attention=attention), size


@pytest.mark.parametrize("N", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(
    ("merge", "prune"),
    [(0.5, 0.0), (2.0, 0.03), (0.5, 0.03), (0.0, 0.05), (-2.0, 2.0), (-2.0, 0.0), (2.0, 2.0), (2.0, 0.0)],
)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_a_block_against_a_slow_reference(N, merge, prune, num_prefix):
    """Dropped in eval, padded to the longest of the batch; masked in training."""
    z, tokens, seen, size = random_case(4, N, num_prefix)
    reducer = build(N, merge, prune)
    y, after = reducer(z, tokens, seen, num_prefix)
    masked, known = reducer.train()(z, tokens, seen, num_prefix)
    assert torch.equal(y[:, :num_prefix], z[:, :num_prefix])
    assert masked.shape == z.shape
    longest = 0
    for b in range(4):
        expected, sizes, stays, back = slow_ltmp(
            z[b, num_prefix:], seen.keys[b], seen.attention[b], size[b], merge, prune
        )
        P = len(stays)
        longest = max(longest, P)
        assert after.anchor[b, :P].tolist() == stays.tolist()
        assert_close(y[b, num_prefix : num_prefix + P], expected)
        assert_close(after.weight[b, :P], sizes)
        assert not after.weight[b, P:].any()
        assert not after.size[b, P:].any()
        of_input = torch.zeros(N, dtype=size.dtype).index_add(0, back, size[b])
        assert_close(after.size[b, :P], of_input[stays])
        assert torch.equal(stays[after.masks[0].slot[b]], back), "what is put back"
        assert_close(masked[b, num_prefix:][stays], expected)
        assert_close(known.weight[b], torch.zeros(N, dtype=size.dtype).index_add(0, stays, sizes))
        assert_close(known.size[b], of_input)
        assert torch.equal(known.masks[0].slot[b], back)
    assert y.shape[1] == num_prefix + longest
    for mask in (after.masks[0], known.masks[0]):
        assert_close(mask.dense().sum(dim=1), torch.ones_like(mask.size))
        assert torch.equal(mask.destinations().sum(dim=2), torch.ones(4, N, dtype=torch.float64))


@pytest.mark.parametrize("N", [6, 7])
def test_ties(N):
    """Of equal tokens those in even places go to one in an odd place; of equally attended ones one stays."""
    z = torch.randn(2, N, 4).double()
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()[torch.tensor([0, 0, 1, 1, 0, 1, 0])[:N]].expand(2, -1, -1)
    seen, tokens = Seen(keys, attention=torch.full((2, N), 0.1).double()), initial_tokens(z, 0, (N, 1))
    after = build(N, 0.99, 0.0)(z, tokens, seen)[1]
    assert after.anchor.tolist() == [[1, 3, 5]] * 2
    assert torch.equal(keys[0][after.anchor[0]][after.masks[0].slot[0]], keys[0]), "equal ones alone are merged"
    assert build(N, 1.0, 0.1)(z, tokens, seen)[0].shape == (2, N, 4), "at the threshold nothing goes"
    after = build(N, 1.0, 0.2)(z, tokens, seen)[1]
    assert after.anchor.tolist() == [[0], [0]]


def slow_model(model, x, merge, prune):
    """One image through blocks, head by head and token by token; merged tokens count as often as they are."""
    prefix = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(x)).squeeze(0)
    size, shares, n = torch.ones(len(x)), [], len(x) - prefix
    for block in model.blocks:
        h = block.norm1(x)
        qkv = block.attn.qkv(h).unflatten(1, (3, block.attn.num_heads, -1))  # N 3 h K
        out, received, entered = torch.zeros_like(x).unflatten(1, (block.attn.num_heads, -1)), 0, len(x) - prefix
        for head in range(block.attn.num_heads):
            q, k, v = qkv[:, :, head].unbind(1)
            for i in range(len(x)):
                weights = ((q[i] * k).sum(dim=1) * block.attn.scale).exp() * size
                weights = weights / weights.sum()
                out[i, head] = weights @ v
                received = received + weights / (block.attn.num_heads * len(x))
        x = x + block.ls1(block.attn.proj(out.flatten(1)))
        keys = qkv[prefix:, 1].mean(dim=1)
        kept, sizes, _, _ = slow_ltmp(x[prefix:], keys, received[prefix:], size[prefix:], merge, prune)
        x, size = torch.cat((x[:prefix], kept)), torch.cat((size[:prefix], sizes))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        shares.append(sum_of_products(entered, len(kept), x.shape[1]) / sum_of_products(n, n, x.shape[1]))
    return model.norm(x), sum(shares) / len(shares)


def sum_of_products(entered, left, d):
    """Multiply-adds of a block of width d: linear layers of attention, its two products, the MLP."""
    return 4 * entered * d * d + 2 * entered**2 * d + 8 * left * d * d


@pytest.mark.parametrize("kind", ["plain", "layer_scale"])
def test_a_model_against_a_slow_reference(kind):
    """Features, and r_FLOPs against a count by hand, of every image of a batch."""
    model, x = merging(kind), images()
    with torch.no_grad():
        merged = model.forward_merged(x)[0]
        ratios, lengths = flops_ratio(model), set()
        for b in range(len(x)):
            expected, ratio = slow_model(model, x[b : b + 1], 0.9, 0.045)
            assert_close(merged[b, : len(expected)], expected, rtol=1e-5, atol=1e-5)
            assert float(ratios[b]) == pytest.approx(ratio, rel=1e-6)
            lengths.add(len(expected))
    assert len(lengths) > 2
    assert max(lengths) == merged.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_images(kind):
    """Padded, dropped alone, and masked in training: the same output, class token and tokens put back."""
    model, x = merging(kind), images()
    with torch.no_grad():
        whole = model(x), model.forward_features(x)
        sizes = (model.forward_merged(x)[1].size > 0).sum(dim=1)
        assert len(sizes.unique()) > 1
        assert sizes.max() < 16
        ratios = flops_ratio(model)
        for b in range(len(x)):
            one = x[b : b + 1]
            assert_close(model(one)[0], whole[0][b], rtol=1e-5, atol=1e-5)
            assert_close(model.forward_features(one)[0], whole[1][b], rtol=1e-4, atol=1e-5)
            assert_close(flops_ratio(model)[0], ratios[b])
        model.train()
        assert_close(model.forward_features(x), whole[1], rtol=1e-4, atol=1e-5)
        merged, tokens = model.forward_merged(x)
        assert merged.shape[1] - model.num_prefix_tokens == 16
        assert torch.equal((tokens.weight > 0).sum(dim=1), sizes)
        copies = tokens.unmerge(merged, model.num_prefix_tokens)[:, model.num_prefix_tokens :]
        assert_close(tokens.mean(merged, model.num_prefix_tokens).squeeze(1), copies.mean(dim=1))


@pytest.mark.parametrize("off", ["set_merging", "gmacs"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_thresholds_it_is_the_plain_model(kind, off):
    reference, x = plain(kind), images()
    model = timm_ltm.convert(reference, "ltmp", gmacs=1.0 if off == "gmacs" else 0.6)
    if off == "set_merging":
        model.set_merging(False)
    assert torch.equal(model(x), reference(x))
    assert torch.equal(model.forward_features(x), reference.forward_features(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_nothing_is_the_plain_model(kind):
    reference, x = plain(kind), images()
    assert_close(merging(kind, 2.0, 0.0)(x), reference(x), rtol=1e-4, atol=1e-5)
    model = merging(kind, -2.0, 2.0)  # one token stays
    assert model.forward_merged(x)[0].shape[1] == model.num_prefix_tokens + 1
    assert model(x).isfinite().all()
