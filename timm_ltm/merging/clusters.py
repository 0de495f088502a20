"""Clusters and Q of merged features: what a forward pass reads, and the running sums that refresh it once per epoch.

The paper clusters all merged features and computes Q (Eq. 8) at each epoch's end (Algorithm 1, line 11). Here each
training batch adds to running sums instead: one Lloyd iteration and Q per epoch without another pass over the data.

One letter per axis: B batch, n features, A clusters, K classes, F features of what is clustered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.merging.information import class_conditional
from timm_ltm.merging.update import assign, at_least_float32, cluster_scores, direction, no_autocast, posterior_scores

__all__ = ["Clusters", "RunningClusters", "fit_temperature", "kmeans", "kmeans_plus_plus", "mean_entropy"]

_SMOOTHING = 1.0  # Laplace's, added to every entry of Q's numerator
_SCALE_FLOOR = 1e-4  # below this, clusters tell nothing of the class and the direction is noise


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
        members = F.one_hot(squared_distances(x, centroids).argmin(dim=1), num_clusters).to(x.dtype)
        counts = members.sum(dim=0).unsqueeze(1)
        centroids = torch.where(counts > 0, members.t() @ x / counts.clamp_min(1.0), centroids)
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
        num_classes: K, of the head in training. Only ``keeps_q`` makes buffers depend on it.
        keeps_q: Keep log Q (A, K), which the literal Eq. 3 and the IB loss read with the label.

    Attributes:
        centroids: C (A, F).
        temperature: T.
        scores: R (A, A), times the update's scale.
    """

    def __init__(
        self,
        num_clusters: int,
        num_features: int,
        num_classes: int = 0,
        keeps_q: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": torch.float32 if dtype is None else dtype}
        self.register_buffer("centroids", torch.zeros(num_clusters, num_features, **dd))
        self.register_buffer("temperature", torch.ones((), **dd))
        self.register_buffer("scores", torch.zeros(num_clusters, num_clusters, **dd))
        self.register_buffer("log_q", torch.zeros(num_clusters, num_classes, **dd) if keeps_q else None)
        self.register_buffer("q_scale", torch.ones((), **dd) if keeps_q else None)

    def reset_parameters(self) -> None:
        """Back to the state before the first refresh."""
        for buffer in self.buffers():
            buffer.zero_()
        self.temperature.fill_(1.0)
        if self.q_scale is not None:
            self.q_scale.fill_(1.0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """dir of pooled features x (B, F) -> (B, F), in float32 or more.

        Args:
            x: (B, F).
            labels: (B,) or (B, K), for the literal Eq. 3 only.
        """
        x = at_least_float32(x)
        centroids = self.centroids.to(x.dtype)
        phi = assign(x, centroids, self.temperature.to(x.dtype))
        if labels is not None and self.log_q is not None:
            w = self._of_labels(labels, x.dtype) / self.q_scale.to(x.dtype)
        else:
            w = posterior_scores(phi, self.scores.to(x.dtype))
        return direction(phi, w, centroids)

    def _of_labels(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """log Q(a | y) (B, A) of labels (B,) or (B, K)."""
        log_q = self.log_q.to(dtype).t()  # K A
        return log_q[labels] if labels.ndim == 1 else labels.to(dtype) @ log_q

    def label_term(self, x: Tensor, labels: Tensor) -> Tensor:
        """The part of IBB (Theorem 3.1) that depends on merged features: -1/n sum_ia phi_ia log Q(a | y_i), in nats.

        The other part, of input features, is the same whatever the mask: phi's rows sum to 1.

        Args:
            x: (B, F) pooled merged features.
            labels: (B,) or (B, K).
        """
        x = at_least_float32(x)
        phi = assign(x, self.centroids.to(x.dtype), self.temperature.to(x.dtype))
        return -(phi * self._of_labels(labels, x.dtype)).sum(dim=1).mean()

    def extra_repr(self) -> str:
        return f"clusters={self.centroids.shape[0]}, features={self.centroids.shape[1]}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                raise ValueError(
                    f"{prefix}{name}: the checkpoint's clusters have shape {tuple(saved.shape)}, this model's have "
                    f"{tuple(buffer.shape)}. Create the model with the num_clusters, cluster_dim and cluster_grid the "
                    f"checkpoint was trained with, or delete all '{prefix}*' entries from it to start with new ones."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class RunningClusters:
    """The running sums behind one :class:`Clusters`, over one epoch. Not a module: DDP would overwrite its buffers.

    Memory is bounded: A x F sums, A x K counts, and a reservoir of ``reservoir`` features.

    Args:
        clusters: What is refreshed.
        num_classes: K.
        fit: Whether T is fitted, or stays at ``temperature``.
        normalize: Whether R is scaled so that the direction has unit root mean square.
        reservoir: Features kept to initialise, to re-seed and to fit T.
        seed: Of the reservoir's own random numbers; the training's are not touched.
    """

    def __init__(
        self,
        clusters: Clusters,
        num_classes: int,
        temperature: float | str = "fit",
        normalize: bool = True,
        reservoir: int = 2048,
        seed: int = 0,
    ) -> None:
        self.clusters, self.num_classes = clusters, num_classes
        self.temperature, self.normalize = temperature, normalize
        self.size, self.seed = reservoir, seed
        self.clear(0)

    def clear(self, epoch: int) -> None:
        """Forget the sums; ``epoch`` numbers the one that begins, so that a resumed run draws as one never stopped."""
        A, F_ = self.clusters.centroids.shape
        device = self.clusters.centroids.device
        self.sums = torch.zeros(A, F_, device=device)
        self.counts = torch.zeros(A, device=device)
        self.joint = torch.zeros(A, self.num_classes, device=device)
        self.classes = torch.zeros(self.num_classes, device=device)
        self.features = torch.zeros(self.size + 1, F_, device=device)  # the last row takes what is not kept
        self.labels = torch.zeros(self.size + 1, self.num_classes, device=device)
        self.seen = 0
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.generator = torch.Generator().manual_seed(1000003 * self.seed + epoch)

    @torch.no_grad()
    def add(self, x: Tensor, labels: Tensor) -> None:
        """One training batch.

        Args:
            x: (B, F) features. Rows that are not finite are left out and counted in ``skipped``.
            labels: (B, K) one-hot or soft.
        """
        with no_autocast(x):
            self._add(x.float(), labels.float())

    def _add(self, x: Tensor, labels: Tensor) -> None:
        finite = x.isfinite().all(dim=1)
        self.skipped += (~finite).sum()
        x = torch.where(finite.unsqueeze(1), x, 0.0)
        weight = finite.to(x.dtype)
        labels = labels * weight.unsqueeze(1)
        centroids = self.clusters.centroids.float()
        logits = 2.0 * x @ centroids.t() - centroids.square().sum(dim=1)
        members = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(x.dtype) * weight.unsqueeze(1)
        self.sums += members.t() @ x
        self.counts += members.sum(dim=0)
        self.joint += (logits / self.clusters.temperature.float()).softmax(dim=1).t() @ labels
        self.classes += labels.sum(dim=0)
        self._keep(x, labels, finite)

    def _keep(self, x: Tensor, labels: Tensor, finite: Tensor) -> None:
        """Reservoir sampling (Vitter's algorithm R, a batch at a time), without waiting for the device."""
        position = torch.arange(self.seen, self.seen + x.shape[0])
        drawn = (torch.rand(x.shape[0], generator=self.generator, dtype=torch.double) * (position + 1)).long()
        slot = torch.where(position < self.size, position, drawn).clamp_max(self.size).to(x.device)
        slot = torch.where(finite, slot, self.size)
        self.features[slot] = x
        self.labels[slot] = labels
        self.seen += x.shape[0]

    def reduce(self) -> None:
        """Sum over the processes of torch.distributed, where there are several. Every process must call it."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for value in (self.sums, self.counts, self.joint, self.classes, self.skipped):
            dist.all_reduce(value)
        # of a full reservoir, a fair share: what is gathered does not grow with the number of processes
        share = min(self.size, 2 * math.ceil(self.size / dist.get_world_size()))
        rows = torch.randperm(min(self.seen, self.size), generator=self.generator)[:share]
        rows = F.pad(rows, (0, share - len(rows)), value=self.size).to(self.features.device)  # of no image, no label
        self.labels[self.size] = 0.0
        for name in ("features", "labels"):
            mine = getattr(self, name)[rows].contiguous()
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine)
            setattr(self, name, torch.cat((*everyone, mine[:1])))

    @torch.no_grad()
    def commit(self) -> dict[str, float]:
        """Refresh C, T and R (or log Q) from the epoch's sums. :meth:`clear` is the caller's.

        Returns:
            ``features``: how many were kept, ``entropy``: mean entropy of phi over log A, ``skipped``, ``reseeded``.
        """
        with no_autocast(self.sums):
            return self._commit()

    def _commit(self) -> dict[str, float]:
        self.reduce()
        clusters = self.clusters
        labels = self.labels[: len(self.labels) - 1]
        kept = labels.sum(dim=1) > 0  # rows never filled, and rows of batches skipped, have no label
        x, labels = self.features[: len(self.features) - 1][kept], labels[kept]
        report = {"features": float(len(x)), "skipped": float(self.skipped), "reseeded": 0.0, "entropy": 0.0}
        if len(x):
            first = not bool(clusters.centroids.any())
            reseeded = self._move_centroids(x, first)
            T = self.temperature if self.temperature != "fit" else fit_temperature(x, clusters.centroids.float())
            clusters.temperature.fill_(T)
            phi = assign(x, clusters.centroids.float(), torch.tensor(T))
            self._commit_q(x, phi, labels, reseeded, first)
            report["reseeded"] = float(reseeded.sum()) * (not first)
            report["entropy"] = float(mean_entropy(phi)) / math.log(phi.shape[1])
        for buffer in clusters.buffers():  # processes agree to the bit
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(buffer, 0)
        return report

    def _move_centroids(self, x: Tensor, first: bool) -> Tensor:
        """One Lloyd iteration, k-means++ the first time. Clusters without members are seeded anew: which, (A,)."""
        clusters = self.clusters
        if first:
            generator = torch.Generator().manual_seed(self.seed)
            # in an order of their own: of the same features, draws do not depend on which process saw which, and when
            order = (x.double().cpu() @ torch.arange(1, x.shape[1] + 1).double().sin()).argsort().to(x.device)
            clusters.centroids.copy_(kmeans(x[order], len(self.counts), generator=generator))
            return torch.zeros_like(self.counts, dtype=torch.bool)
        empty = self.counts <= 0
        centroids = torch.where(
            empty.unsqueeze(1), clusters.centroids.float(), self.sums / self.counts.clamp_min(1e-6).unsqueeze(1)
        )
        for a in empty.nonzero().flatten().tolist():  # where the clusters there are fit worst
            others = torch.cat((centroids[:a], centroids[a + 1 :]))
            centroids[a] = x[squared_distances(x, others).amin(dim=1).argmax()]
        clusters.centroids.copy_(centroids)
        return empty

    def _commit_q(self, x: Tensor, phi: Tensor, labels: Tensor, reseeded: Tensor, first: bool) -> None:
        """Q (Eq. 8) from the epoch's sums; for clusters that are new, from the reservoir."""
        clusters = self.clusters
        sampled = phi.t() @ labels
        if first:
            joint, classes = sampled, labels.sum(dim=0)
        else:
            share = self.classes.sum() / labels.sum()
            joint, classes = torch.where(reseeded.unsqueeze(1), sampled * share, self.joint), self.classes
        log_q = class_conditional(joint, _SMOOTHING).log()
        prior = (classes + _SMOOTHING) / (classes + _SMOOTHING).sum()
        if clusters.log_q is not None:
            clusters.log_q.copy_(log_q)
        scores = cluster_scores(log_q, prior)
        if self.normalize:
            centroids = clusters.centroids.float()
            scale = direction(phi, posterior_scores(phi, scores), centroids).square().mean().sqrt()
            scores = scores / scale.clamp_min(_SCALE_FLOOR)
            if clusters.q_scale is not None:
                clusters.q_scale.copy_(scale.clamp_min(_SCALE_FLOOR))
        clusters.scores.copy_(scores)
