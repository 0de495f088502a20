"""LTM in the form its paper prints (Wang & Yang, TPAMI 2025): ``preset="paper"``.

What the printed form needs and nothing else does is here: dense masks, f(X), masks carried from block to block, one
cell per slot, labels, the sum over the minibatch. "Eq. N" and sections are the paper's.

One letter per axis: B batch, N tokens, P slots, D width, K classes, which are as many clusters A, H W grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.methods.ltm.anchors import Clustered, TrainedConfig
from timm_ltm.methods.ltm.clusters import Clusters
from timm_ltm.methods.ltm.running import RunningClusters
from timm_ltm.methods.ltm.update import mask_update
from timm_ltm.reduction.masks import DenseMask
from timm_ltm.reduction.reducer import Reducer, Seen, Site, recomputing, register_method
from timm_ltm.reduction.tokens import Tokens, at_least_float32, no_autocast

__all__ = ["PaperConfig", "PaperLTM"]

RATIO = 0.95  # Section 3.1: one ratio, every block
LINES_RATIO = 0.7  # of a map: 0.95 of its area is nothing of a side of up to 39 tokens
TAU = 0.1  # Section 3.1: tau of the first mask
TEMPERATURE = 1.0  # Section 3.2: phi without a temperature
MOMENTUM = 0.1  # of the running mean in eval, BatchNorm's


@dataclasses.dataclass(frozen=True)
class PaperConfig(TrainedConfig):
    """The settings of ``preset="paper"``: what all methods share, and training's."""

    def default_ratios(self, depths: Sequence[int], lines: bool) -> tuple[float, ...]:
        return (LINES_RATIO if lines else RATIO,) * sum(depths)


class LabelledClusters(Clusters):
    """Clusters that keep log Q, which Eq. 3 reads with the label. As many as classes: K shapes them anyway.

    Attributes:
        log_q: log Q(a | y) (A, K), Eq. 8.
    """

    def __init__(
        self, num_features: int, num_classes: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        num_clusters = max(num_classes, 2)  # Section 3.2: as many as classes
        super().__init__(num_clusters, num_features, device, dtype)
        self.register_buffer("log_q", self.centroids.new_zeros(num_clusters, num_classes))

    def committed(self, log_q: Tensor) -> None:
        self.log_q.copy_(log_q)


@register_method("ltm", preset="paper")
class PaperLTM(Clustered, Reducer):
    """The printed form: G^(1) = Softmax(f(X / tau)), then G^(l) = Softmax(Eq. 3 from G^(l-1)).

    The mean of Eq. 3 over the minibatch is the batch's in training and a running one in eval, where labels and clusters
    are not read. It needs the labels of every training batch before its forward pass: ``refresh.labels``.

    Attributes:
        grid: (H, W) or (N, 1), what the block sees at the one input size that it is tied to.
        slots_grid: (H', W') or (P, 1).
        collects: It updates a carried mask, where it is not the first that merges (Eq. 2: l >= 2).
    """

    Config = PaperConfig
    needs = frozenset({"inputs"})
    anchored = False
    maps = True
    reads_labels = True

    def __init__(
        self, site: Site, amount: float, config: PaperConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(site, amount, config, device, dtype)
        dd = {"device": device, "dtype": dtype}
        self.grid, self.slots_grid = _as_grid(site.tokens), _as_grid(self.slots(site.tokens))
        N, P = math.prod(self.grid), math.prod(self.slots_grid)
        self.collects = not site.first
        if site.first:
            self.mask_fc = nn.Linear(site.dim, P, **dd)  # f of Section 3.1, without its sigmoid
        else:
            self.eta = nn.Parameter(torch.empty((), **dd))
            self.mlp_fc1 = nn.Linear(site.dim, site.dim, **dd)
            self.mlp_fc2 = nn.Linear(site.dim, site.dim, **dd)
            self.clusters = LabelledClusters(P * site.dim, site.num_classes, **dd)  # Section 3.2: in R^(P x D)
            self.register_buffer("running_update", torch.zeros(N, P, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: timm's for ViT's linear layers, and no clusters yet."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.collects:
            with torch.no_grad():
                self.eta.fill_(1.0)
                self.running_update.zero_()
            self.clusters.reset_parameters()

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> DenseMask:
        self._check_size(z.shape[1], tokens.grid)
        if not self.collects:
            return self._dense(self._first_mask(seen), tokens)
        values = self._values(z)
        # MLP of Eq. 3: two linear layers with a ReLU between
        mlp = at_least_float32(self.mlp_fc2(F.relu(self.mlp_fc1(values))))
        with no_autocast(z):
            before = self._mask_before(tokens)
            return self._dense(before + self._update(before, at_least_float32(values), mlp), tokens)

    def carry(self, z: Tensor, tokens: Tokens, mask: DenseMask) -> Tensor:
        """G^(l) (B, P, P) for Eq. 2 in the next block, whose tokens are this one's slots: its rows are merged too."""
        with no_autocast(z):
            return mask.merge(mask.weights)

    def observe(self, z: Tensor, tokens: Tokens, seen: Seen) -> Tensor:
        """Without a merge the mask's rows stay those of the N tokens, and the slots before are its columns."""
        if not self.collects:
            return self._dense(self._first_mask(seen), tokens).weights
        values, before = at_least_float32(self._values(z)), self._mask_before(tokens)
        self._merged(before, values)
        return self._dense(before, tokens).weights

    def _first_mask(self, seen: Seen) -> Tensor:
        """f(X / tau) (B, N, P), a linear layer and a sigmoid (Section 3.1)."""
        assert seen.inputs is not None, "f(X) needs the block's input"
        X = _as_weights(self.of_image(seen.inputs), self.mask_fc)
        return at_least_float32(self.mask_fc(X / TAU).sigmoid())

    def _values(self, z: Tensor) -> Tensor:
        """What is clustered (B, N, D): the tokens themselves (Section 3.2)."""
        return _as_weights(self.of_image(z), self.mlp_fc1)

    def _mask_before(self, tokens: Tokens) -> Tensor:
        """G^(l-1) (B, N, P) in this block's shape: its P columns at even spacing (Eq. 2)."""
        assert tokens.carried is not None, "the first block that merges carries its mask on"
        return tokens.carried[:, :, self._columns(tokens.carried)]

    def _merged(self, before: Tensor, values: Tensor) -> Tensor:
        """X~(G^(l-1)) = G^T X (Section 3.1) as features (B, P D), shown to the refresh."""
        features = (before.transpose(1, 2) @ values).flatten(1)
        self._observed(features)
        return features

    def _update(self, before: Tensor, values: Tensor, mlp: Tensor) -> Tensor:
        """What Eq. 3 adds to G^(l-1): in eval (1, N, P)."""
        if not self.training:
            return self.running_update.to(before.dtype).unsqueeze(0)
        features = self._merged(before, values)
        directions = self.clusters(features, self._label_scores(features)).unflatten(1, (-1, self.site.dim))  # B P D
        step = 2.0 * at_least_float32(self.eta) / TEMPERATURE  # Eq. 3: 2 eta
        mean = mask_update(mlp, directions, step).mean(dim=0, keepdim=True)  # Eq. 3: 1/n sum_i over the minibatch
        if not recomputing():
            with torch.no_grad():
                self.running_update.lerp_(mean[0].to(self.running_update.dtype), MOMENTUM)
        return mean

    def _label_scores(self, features: Tensor) -> Tensor | None:
        """w_ia = log Q(a | y_i) (B, A), the part of psi in Eq. 3 that does not cancel.

        None where nobody refreshes the clusters: then its expectation over the posterior.
        """
        observer = self.observer
        if observer is None:
            return None
        if observer.labels is None or not (observer.fresh or recomputing()):
            got = "none" if observer.labels is None else "those of the batch before"
            raise ValueError(
                f"labels: got {got}, expected this training batch's: preset='paper' reads them (Eq. 3). Call "
                "refresh.labels(targets) before each forward pass in training."
            )
        if len(observer.labels) != len(features):
            raise ValueError(
                f"labels: got {len(observer.labels)} for a batch of {len(features)}, expected one per image. Call "
                "refresh.labels with the targets of this batch."
            )
        if not recomputing():
            observer.fresh = False  # the next forward pass is of another batch
        log_q = self.clusters.log_q.to(features.dtype)
        return observer.labels.to(features.dtype) @ log_q.t()  # B K @ K A

    def _dense(self, logits: Tensor, tokens: Tokens) -> DenseMask:
        """The mask of logits (B, N, P): Section 4.1, the weights of each merged token sum to 1."""
        weights = logits.softmax(dim=1)
        shares = weights + 1e-12
        to = shares / shares.sum(dim=2, keepdim=True)
        size = (to * tokens.size.unsqueeze(2)).sum(dim=1)
        return DenseMask(weights, to, self._columns(logits), size, None if tokens.grid is None else self.slots_grid)

    def _columns(self, like: Tensor) -> Tensor:
        """(P,): the token that each slot has the place of, at even spacing on each side."""
        rows, columns = (
            (2 * torch.arange(p, device=like.device) + 1) * n // (2 * p)
            for n, p in zip(self.grid, self.slots_grid, strict=True)
        )
        return (rows.unsqueeze(1) * self.grid[1] + columns).flatten()  # H' W' -> (H' W')

    def _check_size(self, num_tokens: int, grid: tuple[int, int] | None) -> None:
        got = (num_tokens, 1) if grid is None else grid
        if tuple(got) != self.grid:
            sides = [str(n) if grid is None else f"{n} x {m}" for n, m in (got, self.grid)]
            raise ValueError(
                f"got {sides[0]} tokens, expected {sides[1]}: preset='paper' ties a model to one input size and takes "
                "no patch dropout. Create the model with this img_size, or leave preset out."
            )

    def running_sums(self, num_classes: int, reservoir: int, seed: int) -> RunningClusters:
        return RunningClusters(
            self.clusters,
            num_classes,
            temperature=TEMPERATURE,
            normalize=False,  # Eq. 3: the exact step
            reservoir=reservoir,
            seed=seed,
        )

    def reset_classes(self, num_classes: int) -> None:
        """As many clusters as classes: the old ones are forgotten. Masks stay as they are until they are trained."""
        self.site = self.site._replace(num_classes=num_classes)
        if self.collects and num_classes > 0:
            self._new_clusters(num_classes)

    def check_classes(self, num_classes: int, name: str) -> None:
        expected = self.clusters.log_q.shape[1]
        if num_classes != expected:
            raise ValueError(
                f"num_classes: got {num_classes} for {name}, expected {expected}, the head's: preset='paper' has a "
                "cluster per class. Create the model with the targets' num_classes, or call reset_classifier."
            )

    def _new_clusters(self, num_classes: int) -> None:
        C = self.clusters.centroids
        self.clusters = LabelledClusters(C.shape[1], num_classes, C.device, C.dtype).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}clusters.log_q")
        if saved is not None and self.collects and saved.shape[1] != self.clusters.log_q.shape[1]:
            if not self.site.num_classes:  # without a head, the checkpoint tells
                self._new_clusters(saved.shape[1])
            else:  # for another head, clusters are other ones: as after reset_classes
                state_dict.update({f"{prefix}clusters.{name}": b for name, b in self.clusters.named_buffers()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_grid(tokens: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a map, (N, 1) of a sequence."""
    return tokens if isinstance(tokens, tuple) else (tokens, 1)


def _as_weights(x: Tensor, layer: nn.Module) -> Tensor:
    """x in the dtype of a layer's weights: half precision under autocast, off here. In 8 bits, they take any."""
    return x.to(layer.weight.dtype) if isinstance(layer.weight, Tensor) else x
