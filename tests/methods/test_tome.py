"""ToMe against a slow reference: one image, explicit loops, written from Section 3.2 of its paper."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_ltm
from timm_ltm.reduction import Seen, Site, find_method, initial_tokens


def build(amount, num_tokens=9, **settings):
    cls, config = find_method("tome", settings)
    return cls(Site(4, num_tokens), amount, config)


def slow_tome(z, keys, size, r):
    """Of N tokens those of the one half with the most similar partners in the other half are averaged into them."""
    N = len(z)
    edges = []
    for i in range(0, N, 2):
        similarity = {j: float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(1, N, 2)}
        if similarity:
            j = max(similarity, key=similarity.get)
            edges.append((similarity[j], i, j))
    into = {i: j for _, i, j in sorted(edges, reverse=True)[: min(r, N // 2)]}
    kept, sizes = [], []
    for j in range(N):
        if j not in into:
            group = [j] + [i for i, to in into.items() if to == j]
            sizes.append(sum(float(size[i]) for i in group))
            kept.append(sum(size[i] * z[i] for i in group) / sizes[-1])
    return torch.stack(kept), torch.tensor(sizes, dtype=size.dtype)


@pytest.mark.parametrize("N", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_tome_against_a_slow_reference(N, r, num_prefix):
    z, keys = torch.randn(3, num_prefix + N, 4).double(), torch.randn(3, N, 5).double()
    size = torch.randint(1, 4, (3, N)).double()
    tokens = initial_tokens(z, num_prefix, (N, 1))._replace(size=size)
    y, after = build(-float(r), N)(z, tokens, Seen(keys), num_prefix)
    assert torch.equal(y[:, :num_prefix], z[:, :num_prefix])
    for b in range(3):
        expected, sizes = slow_tome(z[b, num_prefix:], keys[b], size[b], r)
        torch.testing.assert_close(y[b, num_prefix:], expected)
        torch.testing.assert_close(after.size[b], sizes)


@pytest.mark.parametrize("N", [6, 7])
def test_ties(N):
    """Tokens as similar as others: any of them may go, each to a token of the other half that is nearest to it."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[torch.tensor([0, 0, 1, 1, 0, 1, 0])[:N]].expand(2, -1, -1)
    z = torch.randn(2, N, 4)
    y, after = build(-2.0, N)(z, initial_tokens(z, 0, (N, 1)), Seen(keys))
    to = after.masks[0].destinations()
    assert y.shape == (2, N - 2, 4)
    assert torch.equal(after.size.sum(dim=1), torch.full((2,), float(N)))
    for b in range(2):
        gone = set(range(N)) - set(after.anchor[b].tolist())
        assert len(gone) == 2
        for i in gone:
            j = int(after.anchor[b, int(to[b, i].argmax())])
            assert i % 2 == 0
            assert j % 2 == 1
            assert torch.equal(keys[b, i], keys[b, j])


@pytest.mark.parametrize(("amount", "N", "P"), [(0.9, 20, 18), (0.5, 9, 5), (0.1, 9, 5), (0.1, 1, 1), (-8.0, 20, 12)])
def test_at_least_half_of_the_tokens_stay(amount, N, P):
    assert build(amount, N).num_slots(N) == P


def test_images_do_not_see_each_other():
    z, keys = torch.randn(4, 9, 4), torch.randn(4, 9, 5)
    reducer = build(0.6)
    together = reducer(z, initial_tokens(z, 0, (3, 3)), Seen(keys))[0]
    alone = [reducer(z[i : i + 1], initial_tokens(z[i : i + 1], 0, (3, 3)), Seen(keys[i : i + 1]))[0] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_r_of_a_model():
    model = timm_ltm.convert(timm.create_model("test_vit").eval(), "tome", r=[8, 0, 16, 0, 0, 300])
    _, tokens = model.forward_merged(torch.randn(2, 3, 160, 160))
    assert [mask.size.shape[1] for mask in tokens.masks] == [92, 76, 38]
    assert torch.equal(tokens.size.sum(dim=1), torch.full((2,), 100.0))
    assert not any("reducer" in name for name in model.state_dict())
    model = timm_ltm.convert(timm.create_model("mobilevit_xxs"), "tome", r=[56, 0, 24, 0, 0, 0, 6, 0, 0])  # patches
    assert [reducer.slots(reducer.site.tokens) for _, reducer in model.reducers()] == [200, 40, 10]
    with pytest.raises(ValueError, match=r"r: got 8 for a model whose tokens are a map.*compression_ratio"):
        timm_ltm.convert(timm.create_model("efficientvit_b0"), "tome", r=8)
