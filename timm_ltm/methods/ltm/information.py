"""The information bottleneck of merged features: I, IB(G) and IBB(G) (Section 3.2, Theorem 3.1), in nats.

Everything is of soft assignments: phi (n, A) of merged features X~ to their clusters, phi' (n, B) of input features X
to theirs, and of labels Y. Where the paper's print contradicts itself or the proofs, the consistent form stands:

- The joint Pr[X~ in a, X in b] is printed as 1/n sum_i phi(X~_i, a) 1[y_i = y], which is the one with the labels; it is
  1/n sum_i phi(X~_i, a) phi(X_i, b).
- The numerator of I(X~, Y) is printed as the product Pr[a] Pr[y], with which I is 0; it is the joint Pr[a, y].
- phi's denominator is printed as a sum to A, sums over clusters to C; both are the number of clusters there is, and
  sums over y are to the number of classes.
- X~_i is printed as (Z_i G)^T in one place and (Z_i^T G)^T in another; only the latter's shapes fit.
- IBB(G) has no C_0 in it: what bounds IB(G) is IBB(G) - C_0.

One letter per axis: n images, A clusters of merged features, B clusters of input features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "InformationSums",
    "bound_constant",
    "class_conditional",
    "ib_bound",
    "ib_loss",
    "joint",
    "mutual_information",
    "told_of_labels",
]


def joint(phi: Tensor, other: Tensor) -> Tensor:
    """Pr[a, b] = 1/n sum_i phi_ia other_ib (Section 3.2). ``other`` may be one-hot labels. (n, A), (n, B) -> (A, B)."""
    return phi.t() @ other / phi.shape[0]


def mutual_information(joint_probability: Tensor) -> Tensor:
    """I = sum_ab Pr[a, b] log(Pr[a, b] / (Pr[a] Pr[b])). Cells of probability zero count nothing."""
    independent = joint_probability.sum(dim=1, keepdim=True) * joint_probability.sum(dim=0, keepdim=True)
    return (torch.xlogy(joint_probability, joint_probability) - torch.xlogy(joint_probability, independent)).sum()


def class_conditional(counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """Q(a | y) = sum_i phi_ia 1[y_i = y] / sum_i 1[y_i = y] (Eq. 8), smoothed towards Q(a) of all classes.

    A class of few images says little of many clusters: with one image more in every cell (Laplace's) 15 images of each
    of 101 classes would be drowned by 64 clusters.

    Args:
        counts: (A, K) the numerator, phi^T onehot(y).
        smoothing: Images that each class has more, shared among clusters as all images are, so that log Q is finite.

    Returns:
        (A, K), columns sum to 1; without smoothing those of classes without images are 0.
    """
    if smoothing:
        of_all = counts.sum(dim=1, keepdim=True) + 1.0 / counts.shape[0]
        counts = counts + smoothing * of_all / of_all.sum()
    return counts / counts.sum(dim=0).clamp_min(torch.finfo(counts.dtype).tiny)


def told_of_labels(phi: Tensor, log_q: Tensor, prior: Tensor, labels: Tensor) -> Tensor:
    """log p(y_i | x_i) / p(y_i) (n,) in nats: what clusters tell of labels. Its mean is I(cluster, Y) at most.

    p(y | x) = sum_a phi_a p(y | a) with p(y | a) in proportion to Q(a | y) p(y). To be taken of images that Q was not
    made of: of its own, noise counts as knowledge.

    Args:
        phi: (n, A).
        log_q: log Q(a | y) (A, K).
        prior: p(y) (K,).
        labels: (n,) class indices.
    """
    posterior = (log_q + prior.log()).softmax(dim=1)  # A K
    return ((phi @ posterior).gather(1, labels.unsqueeze(1)).squeeze(1) / prior[labels]).log()


class InformationSums:
    """All that IB(G) and IBB(G) need of the images, added up batch by batch: tables, whatever n.

    Args:
        clusters: A.
        input_clusters: B.
        classes: K.
        device, dtype: Of the tables.
    """

    def __init__(
        self,
        clusters: int,
        input_clusters: int,
        classes: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        self.images = 0.0
        self.inputs = torch.zeros(clusters, input_clusters, **dd)
        self.labels = torch.zeros(clusters, classes, **dd)
        self.phi_input = torch.zeros(input_clusters, **dd)
        self.log_phi_input = torch.zeros(input_clusters, **dd)
        self.entropy = torch.zeros((), **dd)

    def add(self, phi: Tensor, log_phi_input: Tensor, labels: Tensor) -> None:
        """A batch.

        Args:
            phi: (n, A) assignment of merged features.
            log_phi_input: (n, B) log phi', of input features: its logarithm is finite where phi' is rounded to 0.
            labels: (n, K) one-hot or soft.
        """
        like = self.inputs
        phi, log_phi_input, labels = (x.to(like.device, like.dtype) for x in (phi, log_phi_input, labels))
        phi_input = log_phi_input.exp()
        self.images += len(phi)
        self.inputs += phi.t() @ phi_input
        self.labels += phi.t() @ labels
        self.phi_input += phi_input.sum(dim=0)
        self.log_phi_input += log_phi_input.sum(dim=0)
        self.entropy += (phi_input * log_phi_input).sum()

    def of_inputs(self) -> Tensor:
        """I(X~(G), X)."""
        return mutual_information(self.inputs / self.images)

    def of_labels(self) -> Tensor:
        """I(X~(G), Y)."""
        return mutual_information(self.labels / self.images)

    def label_entropy(self) -> Tensor:
        """H(Y), which I(X~, Y) cannot exceed."""
        prior = self.labels.sum(dim=0) / self.images
        return -torch.xlogy(prior, prior).sum()

    def loss(self) -> Tensor:
        """IB(G) = I(X~(G), X) - I(X~(G), Y)."""
        return self.of_inputs() - self.of_labels()

    def bound(self, log_q: Tensor | None = None) -> Tensor:
        """IBB(G) of Theorem 3.1; IB(G) <= IBB(G) - C_0 with C_0 as in :meth:`constant`.

        IBB = 1/n sum_iab phi_ia phi'_ib log phi'_ib - 1/n sum_iay phi_ia 1[y_i = y] log Q(a | y).

        Args:
            log_q: (A, K) log Q(a | y); Eq. 8's of these images if not given.
        """
        if log_q is None:
            log_q = class_conditional(self.labels).log()
        fit = torch.where(self.labels > 0, self.labels * log_q.to(self.labels), 0.0).sum()
        return (self.entropy - fit) / self.images  # rows of phi sum to 1

    def constant(self) -> Tensor:
        """C_0 = 1/n^2 sum_ijb phi'_ib log phi'_jb (Section 6.2), of input features alone."""
        return (self.phi_input * self.log_phi_input).sum() / self.images**2


def _sums(phi: Tensor, phi_input: Tensor, labels: Tensor) -> InformationSums:
    sums = InformationSums(phi.shape[1], phi_input.shape[1], labels.shape[1], phi.device, phi.dtype)
    sums.add(phi, phi_input.clamp_min(torch.finfo(phi_input.dtype).tiny).log(), labels)
    return sums


def ib_loss(phi: Tensor, phi_input: Tensor, labels: Tensor) -> Tensor:
    """IB(G) = I(X~(G), X) - I(X~(G), Y).

    Args:
        phi: (n, A) assignment of merged features.
        phi_input: (n, B) assignment of input features.
        labels: (n, K) one-hot.
    """
    return _sums(phi, phi_input, labels).loss()


def ib_bound(phi: Tensor, phi_input: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
    """IBB(G), see :meth:`InformationSums.bound`.

    Args:
        phi: (n, A) assignment of merged features.
        phi_input: phi' (n, B) assignment of input features.
        labels: (n, K) one-hot.
        log_q: (A, K) log Q(a | y).
    """
    return _sums(phi, phi_input, labels).bound(log_q)


def bound_constant(phi_input: Tensor) -> Tensor:
    """C_0, see :meth:`InformationSums.constant`, of phi' (n, B)."""
    one = phi_input.new_ones(len(phi_input), 1)
    return _sums(one, phi_input, one).constant()
