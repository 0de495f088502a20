"""Redundancy and orders, against loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.reduction import matching
from timm_ltm.reduction.matching import (
    _odd_partners,
    _odd_partners_of_all,
    order_by_redundancy,
    redundancy,
    unit_vectors,
)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 9])
def test_redundancy_against_loops(N, sized):
    keys, size = unit_vectors(torch.randn(2, N, 4)), 1 + 99 * torch.rand(2, N)
    scores = redundancy(keys, size if sized else None)
    for b in range(2 if N > 1 else 0):

        def alike(i, j, b=b):
            u, v = (float(size[b, n]) ** 0.25 if sized else 1.0 for n in (i, j))
            return 1 - (1 - float(keys[b, i] @ keys[b, j])) * 2 * u * v / (u + v)

        nearest = [max((j for j in range(N) if j != i), key=lambda j, i=i: alike(i, j)) for i in range(N)]
        for i, j in enumerate(nearest):
            expected = alike(i, j) - (32.0 if nearest[j] == i and i < j else 0.0)
            assert scores[b, i].item() == pytest.approx(expected, abs=1e-5)
    assert scores.shape == (2, N)
    torch.testing.assert_close(redundancy(keys, torch.ones(2, N)), redundancy(keys))


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize(("N", "c"), [(5, 5), (12, 6), (13, 5), (14, 5), (17, 6)])
def test_many_tokens_are_compared_in_strips(N, c, opposite, monkeypatch):
    """Runs of equally many, but for the last, as if each were alone; what fills up the last is far from everything."""
    keys, size = unit_vectors(torch.randn(2, N, 4)), 1 + 99 * torch.rand(2, N)
    if opposite:  # in the last strip; large sizes make them farther
        keys[:, -1], size[:, -3:] = -keys[:, -2], 4000.0
    strips = [range(start, min(start + c, N)) for start in range(0, N, c)]
    expected = torch.cat([redundancy(keys[:, strip], size[:, strip]) for strip in strips], dim=1)
    monkeypatch.setattr(matching, "_STRIP", 6)
    torch.testing.assert_close(redundancy(keys, size), expected)
    torch.testing.assert_close(redundancy(keys), redundancy(keys, torch.ones(2, N)))


def test_a_token_alone_in_its_strip_stays(monkeypatch):
    monkeypatch.setattr(matching, "_STRIP", 2)
    keys = unit_vectors(torch.randn(2, 1, 4)).expand(-1, 5, -1)
    for size in (None, torch.full((2, 5), 16.0)):
        assert (order_by_redundancy(keys, 3, size)[:, :3] == torch.tensor([0, 2, 4])).all()


@pytest.mark.parametrize(("N", "twins"), [(256, True), (257, False)])
def test_how_many_are_compared_at_once(N, twins):
    keys = unit_vectors(torch.randn(1, N, 64))
    keys[:, -1] = keys[:, 0]
    assert (redundancy(keys)[0, -1].item() > 0.99) == twins  # the second of a pair


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 12), st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_order_is_a_permutation_with_the_least_redundant_in_front(B, N, share, seed):
    keys = unit_vectors(torch.randn(B, N, 4, generator=torch.Generator().manual_seed(seed)))
    P = max(1, round(share * N))
    order, scores = order_by_redundancy(keys, P), redundancy(keys)
    assert torch.equal(order.sort(dim=1).values, torch.arange(N).expand(B, -1))
    assert (order[:, :P].diff(dim=1) > 0).all()
    if P < N:
        assert (scores.gather(1, order[:, :P]).amax(dim=1) <= scores.gather(1, order[:, P:]).amin(dim=1)).all()


def test_of_two_twins_one_stays():
    keys = F.normalize(torch.randn(1, 10, 6), dim=2)
    keys[:, 5] = keys[:, 4]
    assert order_by_redundancy(keys, 9)[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 5]


def test_a_zero_vector_stays_zero():
    assert torch.equal(unit_vectors(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("num_tokens", [2, 7, 10])
def test_pairs_of_halves_and_of_all_are_the_same(num_tokens):
    keys = unit_vectors(torch.randn(3, num_tokens, 5))
    (best, partner), (of_all, partner_of_all) = (f(keys, num_tokens) for f in (_odd_partners, _odd_partners_of_all))
    torch.testing.assert_close(best[:, ::2], of_all[:, ::2])
    assert torch.equal(partner[:, ::2], partner_of_all[:, ::2])
    assert (best[:, 1::2] < -1).all()
    assert (of_all[:, 1::2] < -1).all(), "odd tokens never go"
