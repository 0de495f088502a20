"""LTM's mask: slots are tokens, the least redundant ones; a learned update says how much the others count there.

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that lose their slot, A clusters, c cells, d width of
what is clustered, D width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.methods.ltm.clusters import Clusters
from timm_ltm.methods.ltm.running import RunningClusters
from timm_ltm.methods.ltm.update import mask_update, pool_slots
from timm_ltm.reduction.lines import CELLS_PER_SIDE, Line, LineReducer
from timm_ltm.reduction.masks import HardMask, LengthMask, Mask, SoftMask, hard_mask, soft_mask
from timm_ltm.reduction.matching import bipartite_order, order_by_redundancy
from timm_ltm.reduction.reducer import Seen, Site, recomputing, register_method
from timm_ltm.reduction.settings import Config, check_flag, check_number, check_whole
from timm_ltm.reduction.tokens import Tokens, at_least_float32, fixed, one_hot, take

__all__ = ["LTM", "Clustered", "LTMConfig", "TrainedConfig", "in_slots"]


@dataclasses.dataclass(frozen=True)
class TrainedConfig(Config):
    """What training with clusters adds to every form of LTM.

    Args:
        ib_loss_weight: Of the IB bound in the training loss, which :class:`timm_ltm.ClusterRefresh` adds under a timm
            task, and offers as ``ib_loss`` to other loops. The authors' code has 0.1.
        ib_loss_start_epoch: Epochs of training before that. The authors' code has 30 % of them.
    """

    ib_loss_weight: float = 0.0
    ib_loss_start_epoch: int = 0
    preset: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ib_loss_weight", check_number("ib_loss_weight", self.ib_loss_weight, 0.0, at_least=True))
        self._set("ib_loss_start_epoch", check_whole("ib_loss_start_epoch", self.ib_loss_start_epoch, 0))


@dataclasses.dataclass(frozen=True)
class LTMConfig(TrainedConfig):
    """The settings of Learnable Token Merging, beside those that all methods share.

    Args:
        num_clusters: A, clusters of merged features per block.
        cluster_dim: d, width of the projection that is clustered. None: 32, or 16 in blocks narrower than 256.
        beta: Initial sharpness of destinations while training, learned per block: there a token is shared out by
            softmax of beta times the cosine of keys. Otherwise each goes to its nearest anchor, as if beta were
            infinite.
        proportional_attention: Attention to a token is in proportion to its size, as in ToMe: blocks behind a merge add
            log sizes to the logits; of sequences, less where the directions of a slot's tokens differ.
        update: Apply the information-bottleneck update. ``False`` leaves anchors alone, and nothing to train.
        preset: ``"paper"`` is the printed form, see :mod:`timm_ltm.methods.paper`.
    """

    num_clusters: int = 64
    cluster_dim: int | None = None
    beta: float = 1000.0
    proportional_attention: bool = True
    update: bool = True
    of_weighing: ClassVar[tuple[str, ...]] = ("proportional_attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("num_clusters", check_whole("num_clusters", self.num_clusters, 2))
        if self.cluster_dim is not None:
            self._set("cluster_dim", check_whole("cluster_dim", self.cluster_dim, 1))
        self._set("beta", check_number("beta", self.beta, 0.0, most=1e6))  # of cosines, which rounding blurs below
        check_flag("proportional_attention", self.proportional_attention)
        if not check_flag("update", self.update) and self.ib_loss_weight:
            raise ValueError(
                f"ib_loss_weight: got {self.ib_loss_weight!r}, expected 0 with update=False. Without it, nothing is "
                "clustered."
            )


class Clustered:
    """Mixin of reducers that cluster features: what they show to the refresh."""

    def _observed(self, features: Tensor) -> None:
        """Keep features (B, F) of a training batch for the refresh that asked; not again when they are recomputed."""
        if self.training and self.observer is not None and not recomputing():
            self.observer.features = features if self.config.ib_loss_weight else features.detach()

    def running_sums(self, num_classes: int, reservoir: int, seed: int) -> RunningClusters:
        return RunningClusters(self.clusters, num_classes, reservoir=reservoir, seed=seed)

    def label_loss(self, features: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
        return self.clusters.label_term(features, labels, log_q)


@register_method("ltm")
class LTM(Clustered, LineReducer):
    """Learnable Token Merging: the P least redundant tokens are anchors and keep their slots; the others go to them.

    The update is one step along minus the gradient of the IB bound (Eq. 3, simplified exactly in
    :mod:`timm_ltm.methods.ltm.update`), from features pooled by position onto a coarse grid of cells.

    Attributes:
        clusters: Of pooled features.
        updates: There may be some: without, the update is zero and inference leaves it out.
    """

    Config = LTMConfig
    updates = True

    def __init__(
        self, site: Site, amount: float, config: LTMConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(site, amount, config, device, dtype)
        self.collects = config.update
        if not config.update:
            return
        dd = {"device": device, "dtype": dtype}
        d = self.cluster_dim = config.cluster_dim or (32 if site.dim >= 256 else 16)
        self.num_cells = CELLS_PER_SIDE**2
        self.log_beta = nn.Parameter(torch.empty((), **dd))
        self.eta = nn.Parameter(torch.empty((), **dd))
        self.proj = nn.Linear(site.dim, d, bias=False, **dd)
        self.mlp = nn.Linear(d, d, **dd)
        self.clusters = Clusters(config.num_clusters, self.num_cells * d, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: timm's for ViT's linear layers, and no clusters yet."""
        if not self.config.update:
            return
        with torch.no_grad():
            self.log_beta.fill_(math.log(self.config.beta))
            self.eta.fill_(1.0)
        for module in (self.proj, self.mlp):
            nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.mlp.bias)
        self.clusters.reset_parameters()

    def read_state(self) -> None:
        if self.config.update:
            self.updates = self.clusters.centroids.is_meta or bool(self.clusters.centroids.any())

    @classmethod
    def weighs(cls, config: LTMConfig) -> bool:
        return config.proportional_attention

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> Mask:
        mask = super().mask(z, tokens, seen)
        return mask if tokens.grid is not None else LengthMask(mask)

    def merge(self, mask: Mask, z: Tensor, tokens: Tokens, num_prefix: int) -> tuple[Tensor, Tensor | None]:
        """Attention counts a slot as less than its tokens, the more their directions differ.

        Their mean, normalised, has longer keys and values than theirs are on average, by about one over its length. On
        a real ViT-S/14 the error of the class token falls by a tenth at 0.65 of the GMACs.
        """
        if not isinstance(mask, LengthMask) or not self.config.proportional_attention:
            return super().merge(mask, z, tokens, num_prefix)
        merged, aligned = mask.merge_aligned(z, num_prefix, self.site.parts)
        if tokens.weight is not None:
            aligned = aligned * mask.inner.merge((tokens.weight / tokens.size).unsqueeze(2)).squeeze(2)
        return merged, (mask.size * aligned).detach().clamp_min(1e-6)

    def compared(self, unit: Tensor, tokens: Tokens) -> Tensor:
        """Keys, and where positions rotate them also places: they say less of where a token lies than others do.

        Beside the cosine of keys then stands rho^2 (cos dy + cos dx), all over 1 + 2 rho^2, with the distance of places
        in sides of the image: nearly minus rho^2 / 2 times its square. On a small EVA-02 of rho = 0, 1, 3 the error of
        the class token is 56, 28 and 20 thousandths at 0.65 of the GMACs (ToMe's 35).
        """
        if not self.site.rotary:
            return unit
        H, W = tokens.start
        places = torch.stack((tokens.anchor // W, tokens.anchor % W), dim=2).to(unit.dtype) / max(H, W)  # B N 2
        return torch.cat((unit, _RHO * places.cos(), _RHO * places.sin()), dim=2) / (1.0 + 2.0 * _RHO**2) ** 0.5

    def choose(self, line: Line, num_slots: int) -> HardMask | SoftMask:
        order = self._order(line, num_slots)  # keys have no gradient
        P, unit = num_slots, take(line.unit, order)
        similarity = unit[:, P:] @ unit[:, :P].transpose(1, 2)  # B M P
        own: Tensor | None = None
        rest: Tensor | None = None
        if line.advice is not None:
            assert line.cells is not None, "advice is for cells"
            own, rest = in_slots(take(line.advice, order), line.cells.gather(1, order[:, :P]))
            similarity = at_least_float32(self.log_beta).exp() * similarity
            if self.training:
                return soft_mask(order, similarity, line.size, own, rest)
            similarity = similarity + rest
        slot = similarity.argmax(dim=2)  # B M
        rest = rest.gather(2, slot.unsqueeze(2)).squeeze(2) if rest is not None else None
        return hard_mask(order, slot, line.size, P, own, rest)

    def _order(self, line: Line, num_slots: int) -> Tensor:
        """(B, n) token indices: the anchors, then the others.

        Of the columns and rows of a map ToMe's choice, as long as at most half go: what is left is spaced more evenly,
        and layers behind it are nearer to the plain model's, by 3 to 13 % in a Swin and 0 to 40 % in an EfficientViT.
        """
        n = fixed(line.unit.shape[1])
        if line.straight and 2 * (n - num_slots) <= n + 1:
            return bipartite_order(line.unit, num_slots)[0]
        return order_by_redundancy(line.unit, num_slots, line.size)

    def advice(self, z: Tensor, tokens: Tokens) -> Tensor | None:
        """Eq. 3 (B, N, c): how the log weight of each token changes in slots of each cell. None without an update."""
        if not self.config.update or not (self.training or self.updates):
            return None
        values = self._values(z)
        of_cells = self._direction(at_least_float32(values), tokens)
        return mask_update(self._step(values), of_cells, at_least_float32(self.eta))

    def _step(self, values: Tensor) -> Tensor:
        """MLP(Z) of Eq. 3 (B, N, d): two linear layers with a ReLU between, of which the projection is the first."""
        return at_least_float32(self.mlp(F.relu(values)))

    def observe(self, z: Tensor, tokens: Tokens, seen: Seen) -> None:
        if self.config.update:
            self._direction(at_least_float32(self._values(z)), tokens)

    def _values(self, z: Tensor) -> Tensor:
        """What is clustered (B, N, d): a projection of the tokens, each normalised: merging stays linear."""
        z = self.of_image(z).to(self.eta.dtype)  # half precision under autocast, which is off here; weights may be int8
        return F.layer_norm(self.proj(z), (self.cluster_dim,))

    def _direction(self, values: Tensor, tokens: Tokens) -> Tensor:
        """dir of Eq. 3 (B, c, d), one per cell.

        Eq. 3 starts from the features merged by the mask before. This block's tokens are the slots of the block before:
        pooled onto cells they are those features, before this block merges. A slot takes the direction of its cell; its
        share in the pooling is left to the step size, and T to the scale of R.
        """
        pooled = pool_slots(values, tokens.cells(CELLS_PER_SIDE), self.num_cells, tokens.size)[0]
        flat = pooled.flatten(1)  # B c d -> B (c d)
        self._observed(flat)
        return self.clusters(flat).reshape(-1, self.num_cells, self.cluster_dim)


_RHO = 3.0


def in_slots(update: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 3 where it is read: each anchor in its own slot (B, P), the others in every slot (B, M, P).

    Args:
        update: (B, N, c) of every token for every cell: anchors first, then the others.
        cells: (B, P) of the slots.
    """
    P = fixed(cells.shape[1])
    own, rest = update[:, :P], update[:, P:]
    of_slots = one_hot(cells, fixed(update.shape[2]), update.dtype)  # B P c
    return (own * of_slots).sum(dim=2), rest @ of_slots.transpose(1, 2)
