"""Anchors, masks, merge and unmerge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.merging.config import MergeConfig, num_slots
from timm_ltm.merging.merge import (
    anchored_mask,
    dense_mask,
    even_columns,
    merge,
    order_by_redundancy,
    redundancy,
    take,
    take_columns,
    unmerge,
)

sizes = st.tuples(st.integers(1, 3), st.integers(2, 12), st.floats(0.1, 1.0), st.integers(0, 2**31))


def make(B, N, ratio, seed, D=5):
    g = torch.Generator().manual_seed(seed)
    P = num_slots(N, ratio)
    keys = F.normalize(torch.randn(B, N, D, generator=g, dtype=torch.float64), dim=2)
    size = 1 + torch.randint(4, (B, N), generator=g).double()
    order = order_by_redundancy(keys, P)
    unit = take(keys, order)
    similarity = 5.0 * unit[:, P:] @ unit[:, :P].transpose(1, 2)
    own, rest = torch.randn(B, P, generator=g).double(), torch.randn(B, N - P, P, generator=g).double()
    return keys, size, order, similarity, own, rest, torch.randn(B, N, D, generator=g, dtype=torch.float64)


def check_mask(mask, merged_size, size):
    G, to = mask.dense(), mask.destinations()
    torch.testing.assert_close(G.sum(dim=1), torch.ones_like(G[:, 0]))
    torch.testing.assert_close(to.sum(dim=2), torch.ones_like(to[..., 0]))
    assert (G >= 0).all()
    torch.testing.assert_close(merged_size.sum(dim=1), size.sum(dim=1))


@settings(deadline=None, max_examples=60)
@given(sizes, st.booleans())
def test_anchored_mask_against_loops(shape, with_update):
    _, size, order, similarity, own, rest, x = make(*shape)
    B, P = own.shape
    updates = (own, rest) if with_update else (None, None)
    mask, merged_size = anchored_mask(order, similarity, size, *updates)
    check_mask(mask, merged_size, size)
    G = torch.zeros(B, x.shape[1], P, dtype=torch.float64)
    expected_size = torch.zeros(B, P, dtype=torch.float64)
    for b in range(B):
        for p in range(P):
            G[b, order[b, p], p] = size[b, order[b, p]] * (own[b, p].exp() if with_update else 1.0)
            expected_size[b, p] += size[b, order[b, p]]
        for m in range(x.shape[1] - P):
            i = order[b, P + m]
            logits = similarity[b, m] + (rest[b, m] if with_update else 0.0)
            to = logits.exp() / logits.exp().sum()
            expected_size[b] += size[b, i] * to
            G[b, i] = size[b, i] * to * (rest[b, m].exp() if with_update else 1.0)
    G = G / G.sum(dim=1, keepdim=True)
    torch.testing.assert_close(mask.dense(), G)
    torch.testing.assert_close(merged_size, expected_size)
    torch.testing.assert_close(merge(x, mask), G.transpose(1, 2) @ x)


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from(["slots", "tokens"]))
def test_dense_mask(shape, softmax):
    _, size, _, similarity, _, _, x = make(*shape)
    B, N, P = len(x), x.shape[1], similarity.shape[2]
    logits = torch.randn(B, N, P, dtype=torch.float64)
    mask, merged_size = dense_mask(logits, size, softmax)
    check_mask(mask, merged_size, size)
    if softmax == "tokens":
        torch.testing.assert_close(mask.weights, logits.softmax(dim=1))
    torch.testing.assert_close(merge(x, mask), mask.weights.transpose(1, 2) @ x)


def test_sharp_dense_mask_over_slots_is_the_anchored_one():
    """Design: a kept token in its own slot is the sharp limit of the dense form."""
    keys, size, order, _, _, _, _ = make(2, 11, 0.6, 3)
    P = num_slots(11, 0.6)
    unit = take(keys, order)
    anchored, anchored_size = anchored_mask(order, 1e4 * unit[:, P:] @ unit[:, :P].transpose(1, 2), size)
    dense, dense_size = dense_mask(1e4 * keys @ unit[:, :P].transpose(1, 2), size, "slots")
    torch.testing.assert_close(anchored.dense(), dense.dense())
    torch.testing.assert_close(anchored_size, dense_size)


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 3))
def test_prefix_tokens_pass_through(shape, num_prefix):
    _, size, order, similarity, own, rest, x = make(*shape)
    mask, _ = anchored_mask(order, similarity, size, own, rest)
    prefix = torch.randn(len(x), num_prefix, x.shape[2], dtype=torch.float64)
    merged = merge(torch.cat((prefix, x), dim=1), mask, num_prefix)
    assert torch.equal(merged[:, :num_prefix], prefix)
    torch.testing.assert_close(merged[:, num_prefix:], merge(x, mask))


@pytest.mark.parametrize("N", [2, 3, 8, 9])
def test_redundancy_against_loops(N):
    keys = F.normalize(torch.randn(2, N, 4), dim=2)
    scores = redundancy(keys)
    for b in range(2):
        nearest = [max((j for j in range(N) if j != i), key=lambda j: keys[b, i] @ keys[b, j]) for i in range(N)]
        for i, j in enumerate(nearest):
            expected = float(keys[b, i] @ keys[b, j]) - (4.0 if nearest[j] == i and i < j else 0.0)
            assert scores[b, i].item() == pytest.approx(expected, abs=1e-5)


def test_of_two_twins_one_stays():
    keys = F.normalize(torch.randn(1, 10, 6), dim=2)
    keys[:, 5] = keys[:, 4]
    order = order_by_redundancy(keys, 9)
    assert order[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 5]


@settings(deadline=None, max_examples=40)
@given(sizes)
def test_order_is_a_permutation_with_anchors_in_order(shape):
    keys, _, order, similarity, _, _, _ = make(*shape)
    P = similarity.shape[2]
    assert torch.equal(order.sort(dim=1).values, torch.arange(keys.shape[1]).expand_as(order))
    assert torch.equal(order[:, :P], order[:, :P].sort(dim=1).values)


def test_unmerge_puts_kept_tokens_back_exactly():
    _, size, order, similarity, _, _, x = make(2, 12, 0.5, 7)
    mask, _ = anchored_mask(order, similarity, size)
    merged = merge(x, mask)
    back = unmerge(merged, mask.destinations())
    P = similarity.shape[2]
    torch.testing.assert_close(take(back, order[:, :P]), merged)
    torch.testing.assert_close(take(back, order[:, P:]), mask.to @ merged)


def test_take_and_columns():
    x = torch.randn(3, 5, 4)
    index = torch.randint(5, (3, 2))
    torch.testing.assert_close(take(x, index), x.gather(1, index.unsqueeze(2).expand(-1, -1, 4)))
    columns = torch.randint(4, (3, 2))
    torch.testing.assert_close(take_columns(x, columns), x.gather(2, columns.unsqueeze(1).expand(-1, 5, -1)))
    assert even_columns(10, 5).tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("N", "ratio", "P"), [(196, 0.95, 187), (20, 0.95, 19), (10, 0.7, 7), (7, 1.0, 7), (3, 0.01, 1)]
)
def test_num_slots(N, ratio, P):
    assert num_slots(N, ratio) == P


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(compression_ratio=0.0), ["compression_ratio", "0.0", "(0, 1]"]),
        (dict(compression_ratio=[0.9, 1.2]), ["compression_ratio", "1.2"]),
        (dict(num_clusters=1), ["num_clusters", "1", "2 or more"]),
        (dict(mask_mode="image"), ["mask_mode", "image", "sample"]),
        (dict(mask_form="sparse"), ["mask_form", "sparse", "anchored"]),
        (dict(temperature=-1.0), ["temperature", "-1.0", "fit"]),
        (dict(temperature="cold"), ["temperature", "cold"]),
        (dict(first_mask="learned"), ["first_mask", "learned", "dense"]),
        (dict(cluster_dim=-1), ["cluster_dim", "-1"]),
        (dict(merge_warmup_epochs=-1), ["merge_warmup_epochs", "-1"]),
        (dict(preset="papper"), ["preset", "papper", "paper"]),
    ],
)
def test_bad_settings(kwargs, words):
    with pytest.raises(ValueError, match=r"got .* expected") as error:
        MergeConfig.from_kwargs(**kwargs)
    assert all(word in str(error.value) for word in words)


def test_wrong_number_of_ratios():
    with pytest.raises(ValueError, match=r"got '3 ratios', expected one number or 4"):
        MergeConfig(compression_ratio=(0.9, 0.9, 0.9)).ratios_for([4])
