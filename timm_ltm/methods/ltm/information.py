"""The information bottleneck of merged features, for reports: I, IB(G) and IBB(G) (Section 3.2, Theorem 3.1).

One letter per axis: n images, A clusters of merged features, B clusters of input features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bound_constant",
    "class_conditional",
    "ib_bound",
    "ib_loss",
    "joint",
    "mutual_information",
]


def joint(phi: Tensor, other: Tensor) -> Tensor:
    """Pr[a, b] = 1/n sum_i phi_ia other_ib (Section 3.2). ``other`` may be one-hot labels. (n, A), (n, B) -> (A, B)."""
    return phi.t() @ other / phi.shape[0]


def mutual_information(joint_probability: Tensor) -> Tensor:
    """I = sum_ab Pr[a, b] log(Pr[a, b] / (Pr[a] Pr[b])), in nats. Cells of probability zero count nothing.

    The paper prints the numerator of I(X~, Y) as Pr[a] Pr[y]; this is the definition.
    """
    independent = joint_probability.sum(dim=1, keepdim=True) * joint_probability.sum(dim=0, keepdim=True)
    return (torch.xlogy(joint_probability, joint_probability) - torch.xlogy(joint_probability, independent)).sum()


def class_conditional(counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """Q(a | y) = sum_i phi_ia 1[y_i = y] / sum_i 1[y_i = y] (Eq. 8), with Laplace smoothing.

    Args:
        counts: (A, K) the numerator, phi^T onehot(y).
        smoothing: Added to every count, so that log Q is finite.

    Returns:
        (A, K), columns sum to 1.
    """
    counts = counts + smoothing
    return counts / counts.sum(dim=0)


def ib_loss(phi: Tensor, phi_input: Tensor, labels: Tensor) -> Tensor:
    """IB(G) = I(X~(G), X) - I(X~(G), Y), in nats.

    Args:
        phi: (n, A) assignment of merged features.
        phi_input: (n, B) assignment of input features.
        labels: (n, K) one-hot.
    """
    return mutual_information(joint(phi, phi_input)) - mutual_information(joint(phi, labels))


def ib_bound(phi: Tensor, phi_input: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
    """IBB(G) of Theorem 3.1, in nats; IB(G) <= IBB(G) - C_0 with C_0 as in :func:`bound_constant`.

    IBB = 1/n sum_iab phi_ia phi'_ib log phi'_ib - 1/n sum_iay phi_ia 1[y_i = y] log Q(a | y).

    Args:
        phi: (n, A) assignment of merged features.
        phi_input: phi' (n, B) assignment of input features.
        labels: (n, K) one-hot.
        log_q: (A, K) log Q(a | y).
    """
    input_term = torch.einsum("ia,ib->", phi, torch.xlogy(phi_input, phi_input))
    label_term = torch.einsum("ia,iy,ay->", phi, labels, log_q)
    return (input_term - label_term) / phi.shape[0]


def bound_constant(phi_input: Tensor) -> Tensor:
    """C_0 = 1/n^2 sum_ijb phi'_ib log phi'_jb (Section 6.2), of input features alone."""
    log_phi = phi_input.clamp_min(torch.finfo(phi_input.dtype).tiny).log()
    return (phi_input.mean(dim=0) * log_phi.mean(dim=0)).sum()
