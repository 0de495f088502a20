"""The running sums that refresh clusters and Q once per epoch, without another pass over the data.

The paper clusters all merged features and computes Q (Eq. 8) at each epoch's end (Algorithm 1, line 11). Here each
training batch adds to running sums instead: one Lloyd iteration and Q per epoch.

One letter per axis: B batch, n features, A clusters, K classes, F features of what is clustered.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.methods.ltm.clusters import Clusters, fit_temperature, kmeans, mean_entropy, squared_distances
from timm_ltm.methods.ltm.information import class_conditional
from timm_ltm.methods.ltm.update import assign, cluster_scores, direction, posterior_scores
from timm_ltm.reduction.tokens import no_autocast

__all__ = ["RunningClusters"]

_SMOOTHING = 1.0  # images that each class has more in Q, and in the prior
_ENTROPY = 0.25  # of phi, over log A: of 0.5, 0.25 and 0.1 what told most of held-out labels, docs/learned.md
_SCALE_FLOOR = 1e-4  # below this, clusters tell nothing of the class and the direction is noise


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
        self.log_q: Tensor | None = None  # (A, K), of the last commit
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
        slot = torch.where(position < self.size, position, drawn).clamp_max(self.size)
        # of two that draw one place the later stays: an index written twice may get its features and labels from both
        last = {place: i for i, place in enumerate(slot.tolist())}
        stays = torch.tensor([last[place] == i for i, place in enumerate(slot.tolist())])
        slot = torch.where(stays, slot, self.size).to(x.device)
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
            T = self.temperature
            if T == "fit":
                T = fit_temperature(x, clusters.centroids.float(), _ENTROPY)
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
        self.log_q = log_q
        scores = cluster_scores(log_q, prior)
        if self.normalize:
            centroids = clusters.centroids.float()
            scale = direction(phi, posterior_scores(phi, scores), centroids).square().mean().sqrt()
            scores = scores / scale.clamp_min(_SCALE_FLOOR)
        clusters.scores.copy_(scores)
        clusters.committed(log_q)
