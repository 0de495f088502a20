"""The information-bottleneck update of a mask: Eq. 2 and Eq. 3 of the paper, simplified exactly.

The paper steps along minus the gradient of IBB(G) (Theorem 3.1), printed as

    G^(l) = G^(l-1) - (2 eta / n) sum_i sum_a MLP(Z_i) S_ia / gamma_i^2 (gamma_i C_a - zeta_i) psi_ia       (Eq. 3)
    psi_ia = sum_b phi(X_i, b) log phi(X_i, b) - log Q(a | y_i).

The first term of psi does not depend on a, and sum_a S_ia (gamma_i C_a - zeta_i) = 0: it cancels. What is left is

    dir_i = sum_a phi_ia (w_ia - wbar_i) C_a,      w_ia = log Q(a | y_i),      wbar_i = sum_a phi_ia w_ia
    G^(l) = G^(l-1) + (2 eta / T) MLP(Z_i) dir_i^T

with phi_ia = softmax_a(-|x_i - C_a|^2 / T). At inference there is no y: w is its expectation over the posterior that Q
implies, w_ia = sum_a' phi_ia' R[a', a] with R[a', a] = sum_y p(y | a') log Q(a | y), fixed between refreshes.

One letter per axis: B batch, A clusters, K classes, F features of what is clustered, N tokens, P slots, d width.
"""

from __future__ import annotations

from torch import Tensor

from timm_ltm.reduction.tokens import one_hot

__all__ = [
    "assign",
    "cluster_scores",
    "direction",
    "log_assign",
    "mask_update",
    "pool_slots",
    "posterior_scores",
]


def assign(x: Tensor, centroids: Tensor, temperature: Tensor) -> Tensor:
    """phi: soft assignment of features to clusters (Section 3.2).

    phi_a = exp(-|x - C_a|^2 / T) / sum_a exp(-|x - C_a|^2 / T), in log space; |x|^2 cancels.

    Args:
        x: (..., F) features.
        centroids: C (A, F).
        temperature: T, a scalar.

    Returns:
        (..., A), rows sum to 1.
    """
    return _logits(x, centroids, temperature).softmax(dim=-1)


def log_assign(x: Tensor, centroids: Tensor, temperature: Tensor) -> Tensor:
    """log phi of :func:`assign`, finite where phi is rounded to 0."""
    return _logits(x, centroids, temperature).log_softmax(dim=-1)


def _logits(x: Tensor, centroids: Tensor, temperature: Tensor) -> Tensor:
    return (2.0 * x @ centroids.t() - centroids.square().sum(dim=1)) / temperature


def cluster_scores(log_q: Tensor, prior: Tensor) -> Tensor:
    """R: the expected log Q of a cluster over the posterior that another one implies.

    p(y | a') = Q(a' | y) p(y) / sum_y' Q(a' | y') p(y') and R[a', a] = sum_y p(y | a') log Q(a | y).

    Args:
        log_q: (A, K) log Q(a | y), Eq. 8.
        prior: (K,) p(y).

    Returns:
        (A, A), the first index is a'.
    """
    posterior = (log_q + prior.log()).softmax(dim=1)  # A K
    return posterior @ log_q.t()


def posterior_scores(phi: Tensor, scores: Tensor) -> Tensor:
    """w without labels: w_ia = sum_a' phi_ia' R[a', a].

    Args:
        phi: (..., A).
        scores: R (A, A) from :func:`cluster_scores`.

    Returns:
        (..., A).
    """
    return phi @ scores


def direction(phi: Tensor, w: Tensor, centroids: Tensor) -> Tensor:
    """dir_i = sum_a phi_ia (w_ia - wbar_i) C_a: minus T / 2 times the gradient of IBB at the clustered features.

    Args:
        phi: (..., A).
        w: (..., A) log Q(a | y), or its expectation.
        centroids: C (A, F).

    Returns:
        (..., F).
    """
    weights = phi * (w - (phi * w).sum(dim=-1, keepdim=True))
    return weights @ centroids


def pool_slots(x: Tensor, cells: Tensor, num_cells: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Slots pooled by position onto cells: the mean of each cell's slots, weighted by their sizes.

    Args:
        x: (B, P, d) features of the slots.
        cells: (B, P) the index of the cell each slot lies in.
        num_cells: c.
        size: (B, P) how many tokens a slot stands for.

    Returns:
        The pooled features (B, c, d), zero for a cell without slots, and the pooling weights (B, P, c).
    """
    weights = one_hot(cells, num_cells, size.dtype) * size.unsqueeze(2)  # B P c
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6)
    return weights.transpose(1, 2) @ x, weights


def mask_update(mlp: Tensor, slot_direction: Tensor, step: Tensor) -> Tensor:
    """Eq. 3 for one image: (2 eta / T) MLP(Z) dir^T.

    Args:
        mlp: MLP(Z) (B, N, d).
        slot_direction: dir of each slot (B, P, d).
        step: 2 eta / T, a scalar.

    Returns:
        What is added to G^(l-1) (B, N, P).
    """
    return mlp @ (step * slot_direction).transpose(1, 2)
