"""The simplified update against autograd of the literal IBB, and against Eq. 3 written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.methods.ltm.update import assign, cluster_scores, direction, mask_update, pool_slots, posterior_scores

shapes = st.fixed_dictionaries(
    dict(
        n=st.integers(1, 5),
        N=st.integers(2, 9),
        P=st.integers(1, 6),
        D=st.integers(1, 5),
        A=st.integers(2, 6),
        K=st.integers(1, 4),
        seed=st.integers(0, 2**31),
    )
)


def make(n, N, P, D, A, K, seed, cells=None):
    g = torch.Generator().manual_seed(seed)
    dd = dict(generator=g, dtype=torch.float64)
    F_ = (P if cells is None else cells) * D
    return dict(
        G=torch.randn(N, P, **dd).softmax(dim=0),
        Z=torch.randn(n, N, D, **dd),
        C=torch.randn(A, F_, **dd),
        phi_input=torch.randn(n, A, **dd).softmax(dim=1),
        log_q=torch.randn(A, K, **dd).log_softmax(dim=0),
        y=torch.randint(K, (n,), generator=g),
        K=K,
    )


def literal_ibb(features, C, T, phi_input, y, log_q):
    """Theorem 3.1, term by term, from the definition of phi."""
    n, A = len(features), len(C)
    total = features.new_zeros(())
    for i in range(n):
        S = torch.stack([torch.exp(-(features[i] - C[a]).square().sum() / T) for a in range(A)])
        phi = S / S.sum()
        for a in range(A):
            for b in range(phi_input.shape[1]):
                total = total + phi[a] * phi_input[i, b] * phi_input[i, b].log()
            for k in range(log_q.shape[1]):
                total = total - phi[a] * float(y[i] == k) * log_q[a, k]
    return total / n


@settings(deadline=None, max_examples=20)
@given(shapes)
def test_update_is_minus_the_gradient_of_literal_ibb(shape):
    v = make(**shape)
    G = v["G"].clone().requires_grad_()
    features = (G.t() @ v["Z"]).flatten(1)  # n (P D)
    (gradient,) = torch.autograd.grad(literal_ibb(features, v["C"], 1.0, v["phi_input"], v["y"], v["log_q"]), G)
    phi = assign(features.detach(), v["C"], 1.0)
    dir_ = direction(phi, v["log_q"].t()[v["y"]], v["C"]).view(len(v["Z"]), *G.shape[1:], -1)
    update = mask_update(v["Z"], dir_, 2.0).mean(dim=0)
    torch.testing.assert_close(update, -gradient, rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(shapes, st.integers(1, 4), st.floats(0.3, 5.0))
def test_update_is_minus_the_gradient_of_literal_ibb_of_pooled_features(shape, cells, T):
    v = make(**shape, cells=cells)
    g = torch.Generator().manual_seed(shape["seed"])
    n, P = len(v["Z"]), v["G"].shape[1]
    membership = torch.randint(cells, (n, P), generator=g)
    size = torch.rand(n, P, generator=g, dtype=torch.float64) + 0.5
    G = v["G"].clone().requires_grad_()
    features, weights = pool_slots(G.t() @ v["Z"], membership, cells, size)
    ibb = literal_ibb(features.flatten(1), v["C"], T, v["phi_input"], v["y"], v["log_q"])
    (gradient,) = torch.autograd.grad(ibb, G)
    phi = assign(features.detach().flatten(1), v["C"], T)
    dir_ = direction(phi, v["log_q"].t()[v["y"]], v["C"]).view(n, cells, -1)
    update = mask_update(v["Z"], weights @ dir_, 2.0 / T).mean(dim=0)
    torch.testing.assert_close(update, -gradient, rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(shapes)
def test_update_equals_equation_3_as_loops(shape):
    """With psi in full: the terms of the input clusters included, and S, gamma, zeta as printed."""
    v = make(**shape)
    n, N, D = v["Z"].shape
    P, A, eta = v["G"].shape[1], len(v["C"]), 0.7
    features = (v["G"].t() @ v["Z"]).flatten(1)
    step = torch.zeros(N, P, dtype=torch.float64)
    for i in range(n):
        S = [torch.exp(-(features[i] - v["C"][a]).square().sum()) for a in range(A)]
        gamma = sum(S)
        zeta = sum(S[a] * v["C"][a] for a in range(A))
        for a in range(A):
            psi = sum(v["phi_input"][i, b] * v["phi_input"][i, b].log() for b in range(v["phi_input"].shape[1]))
            psi = psi - sum(float(v["y"][i] == k) * v["log_q"][a, k] for k in range(v["K"]))
            factor = S[a] / gamma**2 * (gamma * v["C"][a] - zeta) * psi
            step += v["Z"][i] @ factor.view(P, D).t()
    printed = -2.0 * eta / n * step
    phi = assign(features, v["C"], 1.0)
    dir_ = direction(phi, v["log_q"].t()[v["y"]], v["C"]).view(n, P, D)
    torch.testing.assert_close(mask_update(v["Z"], dir_, 2.0 * eta).mean(dim=0), printed, rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(shapes)
def test_first_term_of_psi_cancels(shape):
    """sum_a S_ia (gamma_i C_a - zeta_i) = 0: whatever does not depend on a adds nothing."""
    v = make(**shape)
    features = (v["G"].t() @ v["Z"]).flatten(1)
    S = torch.exp(-torch.cdist(features, v["C"]).square())
    gamma, zeta = S.sum(dim=1, keepdim=True), S @ v["C"]
    total = torch.einsum("ia,iaf->if", S, gamma.unsqueeze(2) * v["C"] - zeta.unsqueeze(1))
    scale = (gamma * zeta.abs()).amax() + 1e-30
    assert (total / scale).abs().amax() < 1e-12


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_label_free_scores_are_the_posterior_expectation(A, K, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.rand(A, K, generator=g, dtype=torch.float64) + 0.01
    q = q / q.sum(dim=0)
    prior = torch.rand(K, generator=g, dtype=torch.float64) + 0.1
    prior = prior / prior.sum()
    R = cluster_scores(q.log(), prior)
    for a_ in range(A):
        posterior = q[a_] * prior / (q[a_] * prior).sum()
        for a in range(A):
            assert R[a_, a].item() == pytest.approx(sum(posterior[k] * q[a, k].log() for k in range(K)).item())
    phi = torch.rand(3, A, generator=g, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(posterior_scores(phi, R), torch.einsum("ib,ba->ia", phi, R))


def test_uninformative_clusters_give_no_direction():
    """Q(a | y) = Q(a) tells nothing of y, and equally likely clusters none of themselves."""
    C = torch.randn(4, 6, dtype=torch.float64)
    phi = torch.rand(5, 4, dtype=torch.float64).softmax(dim=1)
    R = cluster_scores(torch.full((4, 3), 0.25, dtype=torch.float64).log(), torch.full((3,), 1 / 3))
    assert direction(phi, posterior_scores(phi, R), C).abs().amax() < 1e-12


def test_assignment_in_log_space_survives_large_features():
    phi = assign(1e4 * torch.randn(8, 16), 1e4 * torch.randn(5, 16), 1.0)
    assert phi.isfinite().all()
    torch.testing.assert_close(phi.sum(dim=1), torch.ones(8))
