"""The information bottleneck of reports: Theorem 3.1, known tables, scikit-learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from timm_ltm.methods.ltm.information import (
    InformationSums,
    bound_constant,
    class_conditional,
    ib_bound,
    ib_loss,
    joint,
    mutual_information,
    told_of_labels,
)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 12), st.integers(2, 5), st.integers(2, 5), st.integers(2, 4), st.integers(0, 2**31))
def test_ib_is_at_most_ibb_minus_constant(n, A, B, K, seed):
    """Theorem 3.1, with the Q of Eq. 8."""
    g = torch.Generator().manual_seed(seed)
    phi = (3 * torch.randn(n, A, generator=g, dtype=torch.float64)).softmax(dim=1)
    phi_input = (3 * torch.randn(n, B, generator=g, dtype=torch.float64)).softmax(dim=1)
    labels = F.one_hot(torch.randint(K, (n,), generator=g), K).double()
    log_q = class_conditional(phi.t() @ labels, smoothing=1e-9).log()
    bound = ib_bound(phi, phi_input, labels, log_q) - bound_constant(phi_input)
    assert ib_loss(phi, phi_input, labels) <= bound + 1e-9


def test_q_is_smoothed_by_a_share_of_each_class():
    """Not by a count in every cell, which would drown classes of few images."""
    counts = torch.tensor([[6.0, 0.0, 0.0], [2.0, 4.0, 0.0]], dtype=torch.float64)  # of a third class there is none
    q = class_conditional(counts, smoothing=1.0)
    of_all = torch.tensor([6.5, 6.5], dtype=torch.float64) / 13.0
    torch.testing.assert_close(q, (counts + of_all.unsqueeze(1)) / torch.tensor([9.0, 5.0, 1.0], dtype=torch.float64))
    many = class_conditional(5.0 * torch.eye(50, dtype=torch.float64), smoothing=1.0)  # a cluster for each class
    torch.testing.assert_close(many.diagonal(), torch.full((50,), (5.0 + 1 / 50) / 6.0, dtype=torch.float64))


def test_what_clusters_tell_of_labels():
    """Worked out by hand; nothing of noise that Q was not made of, and at most the mutual information."""
    log_q, prior = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).log(), torch.tensor([0.25, 0.75])
    phi = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    first, second = 0.9 * 0.25 / (0.9 * 0.25 + 0.2 * 0.75), 0.1 * 0.25 / (0.1 * 0.25 + 0.8 * 0.75)
    expected = torch.tensor([(1 - first) / 0.75, ((first + second) / 2) / 0.25]).log()
    torch.testing.assert_close(told_of_labels(phi, log_q, prior, torch.tensor([1, 0])), expected)
    g = torch.Generator().manual_seed(0)
    phi, labels = torch.randn(3000, 20, generator=g).mul(3).softmax(dim=1), torch.randint(30, (3000,), generator=g)
    log_q = class_conditional(phi[:1500].t() @ F.one_hot(labels[:1500], 30).float(), smoothing=1.0).log()
    prior, halves = torch.full((30,), 1 / 30), (slice(1500), slice(1500, 3000))
    told = [told_of_labels(phi[half], log_q, prior, labels[half]).mean() for half in halves]
    assert told[1] < 0 < told[0]


def test_mutual_information_of_known_tables():
    torch.testing.assert_close(mutual_information(torch.eye(4) / 4), torch.tensor(4.0).log())
    independent = torch.tensor([0.2, 0.8]).unsqueeze(1) * torch.tensor([0.5, 0.1, 0.4])
    assert mutual_information(independent).abs() < 1e-6


def test_mutual_information_agrees_with_scikit_learn():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(4, (2, 200), generator=g)
    table = joint(F.one_hot(a, 4).double(), F.one_hot(b, 4).double())
    assert mutual_information(table).item() == pytest.approx(mutual_info_score(a, b), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(2, 12), st.integers(2, 5), st.integers(2, 4), st.sampled_from([0.1, 3.0, 1e4]), st.integers(0, 2**31)
)
def test_limits_hold_however_sharp(n, A, K, sharpness, seed):
    """I >= 0, I(X~, Y) <= H(Y), Theorem 3.1, also where phi and Q are rounded to 0; batches add up to the whole."""
    g = torch.Generator().manual_seed(seed)
    log_phi, log_phi_input = (sharpness * torch.randn(2, n, A, generator=g, dtype=torch.float64)).log_softmax(dim=2)
    labels = F.one_hot(torch.randint(K, (n,), generator=g), K).double()
    whole, parts = InformationSums(A, A, K), InformationSums(A, A, K)
    whole.add(log_phi.exp(), log_phi_input, labels)
    for rows in torch.arange(n).split(3):
        parts.add(log_phi[rows].exp(), log_phi_input[rows], labels[rows])
    assert whole.of_inputs() >= -1e-9
    assert -1e-9 <= whole.of_labels() <= whole.label_entropy() + 1e-9
    assert whole.loss() <= (whole.bound() - whole.constant()) * (1 + 1e-12) + 1e-9
    torch.testing.assert_close(parts.bound(), whole.bound())
    torch.testing.assert_close(parts.loss(), whole.loss(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(parts.constant(), whole.constant())
