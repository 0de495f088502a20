"""Clusters of merged features: k-means, the fitted temperature, and what a forward pass reads of clusters and Q.

One letter per axis: B batch, n features, A clusters, K classes, F features of what is clustered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.methods.ltm.update import assign, direction, posterior_scores
from timm_ltm.reduction.tokens import at_least_float32

__all__ = ["Clusters", "fit_temperature", "kmeans", "kmeans_plus_plus", "mean_entropy", "squared_distances"]


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(n, F), (A, F) -> (n, A)."""
    return (x.square().sum(dim=1, keepdim=True) - 2.0 * x @ centroids.t() + centroids.square().sum(dim=1)).clamp_min(
        0.0
    )


def kmeans_plus_plus(x: Tensor, num_clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """Initial centroids (A, F) among the features (n, F), drawn in proportion to their squared distance.

    Greedy, as scikit-learn's: of 2 + log A draws the one that leaves the smallest distances is taken. With fewer
    distinct features than clusters, features repeat.
    """
    trials = 2 + int(math.log(num_clusters))
    chosen = [x[torch.randint(len(x), (1,), generator=generator)]]
    nearest = squared_distances(x, chosen[0])  # n 1
    for _ in range(num_clusters - 1):
        probability = nearest.squeeze(1).double().cpu()
        if probability.sum() <= 0:
            probability = torch.ones_like(probability)
        candidates = x[torch.multinomial(probability, trials, replacement=True, generator=generator)]
        left = torch.minimum(nearest, squared_distances(x, candidates))  # n trials
        best = left.sum(dim=0).argmin()
        chosen.append(candidates[best].unsqueeze(0))
        nearest = left[:, best].unsqueeze(1)
    return torch.cat(chosen)


def kmeans(x: Tensor, num_clusters: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Centroids (A, F) of features (n, F): k-means++ and Lloyd's iterations. A cluster without members stays put."""
    centroids = kmeans_plus_plus(x, num_clusters, generator)
    for _ in range(iterations):
        sums, counts = torch.zeros_like(centroids), centroids.new_zeros(num_clusters, 1)
        for part in x.split(8192):  # (n, A) in parts
            members = F.one_hot(squared_distances(part, centroids).argmin(dim=1), num_clusters).to(x.dtype)
            sums += members.t() @ part
            counts += members.sum(dim=0).unsqueeze(1)
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1.0), centroids)
    return centroids


def mean_entropy(phi: Tensor) -> Tensor:
    """Mean over rows of -sum_a phi_a log phi_a, in nats."""
    return -torch.xlogy(phi, phi).sum(dim=-1).mean()


def fit_temperature(x: Tensor, centroids: Tensor, target: float = 0.5, iterations: int = 30) -> float:
    """T at which the mean entropy of phi is ``target`` times log A.

    A one-hot phi makes the update zero, a uniform one carries no information. The entropy grows with T: bisection.
    """
    goal = target * math.log(centroids.shape[0])
    spread = squared_distances(x, centroids).mean().clamp_min(1e-12).item()
    low, high = math.log(spread) - 25.0, math.log(spread) + 10.0
    for _ in range(iterations):
        middle = 0.5 * (low + high)
        if mean_entropy(assign(x, centroids, torch.tensor(math.exp(middle)))) < goal:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))


class Clusters(nn.Module):
    """What a forward pass needs of clusters and Q: persistent buffers, which checkpoints, EMA and Hub files carry.

    Before the first refresh the centroids are zero, and with them the direction: the update does nothing yet.

    Args:
        num_clusters: A.
        num_features: F.

    Attributes:
        centroids: C (A, F).
        temperature: T.
        scores: R (A, A), times the update's scale.
    """

    def __init__(
        self, num_clusters: int, num_features: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": torch.float32 if dtype is None else dtype}
        self.register_buffer("centroids", torch.zeros(num_clusters, num_features, **dd))
        self.register_buffer("temperature", torch.ones((), **dd))
        self.register_buffer("scores", torch.zeros(num_clusters, num_clusters, **dd))

    def reset_parameters(self) -> None:
        """Back to the state before the first refresh."""
        for buffer in self.buffers():
            buffer.zero_()
        self.temperature.fill_(1.0)

    def phi(self, x: Tensor) -> Tensor:
        """The soft assignment (B, A) of pooled features x (B, F), in float32 or more."""
        x = at_least_float32(x)
        return assign(x, self.centroids.to(x.dtype), self.temperature.to(x.dtype))

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """dir of pooled features x (B, F) -> (B, F), in float32 or more.

        Args:
            x: (B, F).
            w: log Q(a | y) (B, A) where labels are known; its expectation over the posterior if not given.
        """
        phi = self.phi(x)
        if w is None:
            w = posterior_scores(phi, self.scores.to(phi.dtype))
        return direction(phi, w, self.centroids.to(phi.dtype))

    def committed(self, log_q: Tensor) -> None:
        """After a refresh: log Q (A, K), for a form that reads it with the label."""

    def label_term(self, x: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
        """The part of IBB (Theorem 3.1) that depends on merged features: -1/n sum_ia phi_ia log Q(a | y_i), in nats.

        The other part, of input features, is the same whatever the mask: phi's rows sum to 1.

        Args:
            x: (B, F) pooled merged features.
            labels: (B, K), one-hot or soft.
            log_q: (A, K).
        """
        phi = self.phi(x)
        return -(phi * (labels.to(phi.dtype) @ log_q.to(phi.dtype).t())).sum(dim=1).mean()

    def extra_repr(self) -> str:
        return f"clusters={self.centroids.shape[0]}, features={self.centroids.shape[1]}"
