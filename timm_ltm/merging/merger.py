"""The mask module of one block (Figure 1 of the paper): from a block's attention output to merged tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.merging.clusters import Clusters
from timm_ltm.merging.config import MergeConfig, num_slots
from timm_ltm.merging.merge import (
    AnchoredMask,
    DenseMask,
    Mask,
    anchored_mask,
    dense_mask,
    even_columns,
    merge,
    order_by_redundancy,
    take,
    take_columns,
)
from timm_ltm.merging.update import at_least_float32, mask_update, no_autocast, pool_slots

__all__ = ["MergeState", "TokenMerger", "grid_cells", "initial_state"]


class MergeState(NamedTuple):
    """What travels with the tokens from block to block.

    Attributes:
        size: (B, N) how many input tokens each token stands for.
        cells: (B, N) the cell of the coarse grid each token lies in, None where nothing is pooled.
        carried: The previous block's mask or update (Eq. 2) with its rows merged already, if it is carried.
        trace: Masks are appended here, if they are asked for.
    """

    size: Tensor
    cells: Tensor | None
    carried: Tensor | None = None
    trace: list[Mask] | None = None


def grid_cells(height: int, width: int, cells: int, device: Any = None) -> Tensor:
    """(H W,): the index of the cell of a coarse g x g grid in which each token of an H x W grid lies."""
    rows = torch.arange(height, device=device) * cells // height
    columns = torch.arange(width, device=device) * cells // width
    return (rows.unsqueeze(1) * cells + columns).flatten()  # H W -> (H W)


def initial_state(
    x: Tensor,
    num_prefix: int,
    grid: tuple[int, int],
    cells: int,
    kept: Tensor | None = None,
    trace: list[Mask] | None = None,
) -> MergeState:
    """The state in front of the first block: every token stands for itself.

    Args:
        x: (B, num_prefix + N, D) tokens.
        grid: (H, W).
        cells: g, or 0 where nothing is pooled.
        kept: (B, N) which of the H W patches are left, where some were dropped.
        trace: Masks are appended here.
    """
    B, N = x.shape[0], x.shape[1] - num_prefix
    size = at_least_float32(x.new_ones(B, N))
    if not cells:
        return MergeState(size, None, trace=trace)
    index = grid_cells(*grid, cells, x.device)
    return MergeState(size, index.expand(B, -1) if kept is None else index[kept], trace=trace)


class TokenMerger(nn.Module):
    """Merges the tokens of one block: anchors, information-bottleneck update, mask, merge.

    Args:
        dim: D.
        num_tokens: N this block will see at the model's default input size. Only settings tied to a size use it.
        ratio: r of Section 3.1, P = ceil(r N).
        config: The method's settings.
        num_classes: K, where the number of clusters or the literal Eq. 3 depends on it.
        first: Whether this is the first block that merges.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        ratio: float,
        config: MergeConfig,
        num_classes: int = 0,
        first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.ratio, self.config, self.first = ratio, config, first
        self.num_tokens, self.num_slots = num_tokens, num_slots(num_tokens, ratio)
        self.collecting = False  # set by ClusterRefresh: keep each training batch's features
        self.features: Tensor | None = None  # (B, F), read and cleared by ClusterRefresh
        self.labels: Tensor | None = None  # (B,) or (B, K), set by ClusterRefresh for labels="true"

        self.starts_mask = config.first_mask != "anchors" and (first or not config.carry_mask)
        self.updates = config.update and not (self.starts_mask and config.carry_mask)  # Eq. 2: l >= 2
        if config.mask_form == "anchored" or config.first_mask == "anchors":
            self.log_beta = nn.Parameter(torch.empty((), **dd))
        if self.starts_mask:
            self.mask_fc = nn.Linear(dim, self.num_slots, **dd)  # f of G^(1) = Softmax(f(X / tau))
        self.num_cells = config.cluster_grid**2 or self.num_slots
        if self.updates:
            d = config.cluster_dim or dim
            self.cluster_dim = d
            self.eta = nn.Parameter(torch.empty((), **dd))
            self.proj = nn.Linear(dim, d, bias=False, **dd) if config.cluster_dim else nn.Identity()
            self.mlp_fc1 = nn.Identity() if config.cluster_dim else nn.Linear(dim, dim, **dd)
            self.mlp_fc2 = nn.Linear(d, d, **dd)
            self.clusters = self._new_clusters(num_classes, **dd)
            running = (num_tokens, self.num_slots if config.mask_form == "dense" else self.num_cells)
            running_update = torch.zeros(running, **dd) if config.mask_mode == "batch" else None
            self.register_buffer("running_update", running_update)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long, device=device))  # epochs of training behind
        self.reset_parameters()

    def _new_clusters(self, num_classes: int, **dd: Any) -> Clusters:
        A = self.config.num_clusters or max(num_classes, 2)  # without a head, a checkpoint tells: see fit_clusters
        return Clusters(A, self.num_cells * self.cluster_dim, num_classes, self.config.labels == "true", **dd)

    def reset_parameters(self) -> None:
        """Initial values: timm's for ViT's linear layers, and no clusters or epochs yet."""
        self.epoch.zero_()
        with torch.no_grad():
            if hasattr(self, "log_beta"):
                self.log_beta.fill_(math.log(self.config.beta))
            if self.updates:
                self.eta.fill_(self.config.eta)
                self.clusters.reset_parameters()
                if self.running_update is not None:
                    self.running_update.zero_()
        for module in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def fit_clusters(self, saved: Tensor) -> None:
        """Before loading without a head: as many clusters as the checkpoint was trained with."""
        C = self.clusters.centroids
        if not self.config.num_clusters and saved.shape[0] != C.shape[0]:
            self.clusters = self._new_clusters(saved.shape[0], device=C.device, dtype=C.dtype)

    def reset_classes(self, num_classes: int) -> None:
        """A new head: what is tied to the old classes is forgotten until the next refresh, the rest stays."""
        if not self.updates or num_classes < 2:
            return
        C, log_q = self.clusters.centroids, self.clusters.log_q
        if not self.config.num_clusters:
            self.clusters = self._new_clusters(num_classes, device=C.device, dtype=C.dtype)
        elif log_q is not None:
            self.clusters.log_q = log_q.new_zeros(log_q.shape[0], num_classes)

    @property
    def needs_keys(self) -> bool:
        """Whether :meth:`forward` reads attention keys."""
        return self.config.first_mask == "anchors"

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, form={self.config.mask_form}"

    def forward(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int = 0,
        keys: Tensor | None = None,
        inputs: Tensor | None = None,
        observe: bool = False,
    ) -> tuple[Tensor, MergeState]:
        """Merge one block's tokens.

        Args:
            z: Attention output with its shortcut (B, num_prefix + N, D).
            state: Of these tokens.
            keys: (B, num_prefix + N, K) mean attention keys, where :attr:`needs_keys`.
            inputs: X (B, num_prefix + N, D) the block's input, where the first mask is f(X).
            observe: Leave the tokens as they are; only keep features for the clusters' refresh (warm-up).

        Returns:
            Merged tokens (B, num_prefix + P, D) and their state.
        """
        N = z.shape[1] - num_prefix
        P = self.num_slots if self.tied else num_slots(N, self.ratio)
        if self.tied and self.num_tokens != N and not observe:
            raise ValueError(
                f"got {N} tokens, expected {self.num_tokens}: cluster_grid=0, first_mask={self.config.first_mask!r} "
                f"or mask_mode={self.config.mask_mode!r} tie a model to one input size. Create the model with this "
                "img_size, or with settings that are not tied to one."
            )
        patches = slice(num_prefix, None)
        unit = None
        if self.needs_keys:
            assert keys is not None, "anchors are compared by attention keys"
            unit = F.normalize(at_least_float32(keys[:, patches]), dim=2)
        if self.config.mask_form == "anchored":
            merged, mask, state_after = self._anchored(z, state, num_prefix, P, unit, observe)
        else:
            X = inputs[:, patches] if inputs is not None else None
            merged, mask, state_after = self._dense(z, state, num_prefix, P, unit, X, observe)
        if state.trace is not None and not observe:
            state.trace.append(mask)
        return merged, state_after

    @property
    def tied(self) -> bool:
        """Whether settings tie this module to one number of tokens."""
        config = self.config
        return self.starts_mask or (self.updates and (config.cluster_grid == 0 or config.mask_mode == "batch"))

    def _values(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What is clustered and MLP(Z), (B, N, d) each.

        What is clustered are the tokens themselves, or a projection of them with every token normalised.

        The normalisation is per token, before merging: merging and pooling stay linear in what is clustered.
        """
        values = self.proj(z)
        values = F.layer_norm(values, (self.cluster_dim,)) if self.config.cluster_dim else values
        # MLP of Eq. 3: two linear layers with a ReLU between; the projection is the first where there is one
        mlp = self.mlp_fc2(F.relu(self.mlp_fc1(values)))
        return at_least_float32(values), at_least_float32(mlp)

    def _direction(self, values: Tensor, state: MergeState, merged: Tensor | None) -> Tensor:
        """dir of Eq. 3 (B, c, d), one per cell.

        Eq. 3 starts from the features merged by the mask before. This block's tokens are the slots of the block
        before: pooled onto cells they are those features, before this block merges. With one cell per slot they are
        ``merged`` (B, P, d), by this block's mask without the update. A slot takes the direction of its cell; its
        share in the pooling is left to the step size.
        """
        pooled = merged
        if state.cells is not None:
            pooled, _ = pool_slots(values, state.cells, self.num_cells, state.size)
        assert pooled is not None, "one cell per slot needs merged features"
        flat = pooled.flatten(1)  # B (c d)
        if self.training and self.collecting:
            self.features = flat.detach()
        labels = self.labels if self.training else None
        if labels is not None and labels.shape[0] != flat.shape[0]:
            raise ValueError(f"labels: got {labels.shape[0]} for a batch of {flat.shape[0]}. Give one label per image.")
        return self.clusters(flat, labels).view(pooled.shape)

    @property
    def _step(self) -> Tensor:
        """2 eta / T of Eq. 3, or eta where R has the rest in it."""
        eta = at_least_float32(self.eta)
        return eta if self.config.update_scale == "normalized" else 2.0 * eta / self.clusters.temperature.to(eta.dtype)

    def _batch_mean(self, update: Tensor) -> Tensor:
        """The sum over the minibatch of Eq. 3, as a mean: of the batch in training, the running one in eval."""
        if self.running_update is None:
            return update
        if not self.training:
            return self.running_update.to(update.dtype).expand_as(update)
        mean = update.mean(dim=0)
        with torch.no_grad():
            self.running_update.lerp_(mean.to(self.running_update.dtype), self.config.momentum)
        return mean.expand_as(update)

    def _anchored(
        self, z: Tensor, state: MergeState, num_prefix: int, P: int, unit: Tensor, observe: bool
    ) -> tuple[Tensor, AnchoredMask, MergeState]:
        """A selection plus dense rows for the tokens that lose their slot."""
        with torch.no_grad():
            order = order_by_redundancy(unit, P)
        unit = take(unit, order)  # in order: anchors, then the others
        values, mlp = self._values(z) if self.updates else (None, None)
        with no_autocast(z):
            similarity = at_least_float32(self.log_beta).exp() * (unit[:, P:] @ unit[:, :P].transpose(1, 2))
            cells = state.cells.gather(1, order[:, :P]) if state.cells is not None else None
            own = rest = carried = None
            if values is not None and mlp is not None:
                values = values[:, num_prefix:]
                merged = merge(values, anchored_mask(order, similarity, state.size)[0]) if cells is None else None
                of_cells = self._direction(values, state, merged)
                of_slots = of_cells if cells is None else take(of_cells, cells)
                mlp = take(mlp, order + num_prefix)
                if not observe:
                    own, rest = self._anchored_update(mlp, of_cells, of_slots * self._step, order, cells)
                if self.config.carry_mask and state.carried is not None:
                    query, key = take(state.carried, order).chunk(2, dim=2)
                    own = own + (query[:, :P] * key[:, :P]).sum(dim=2)
                    rest = rest + query[:, P:] @ key[:, :P].transpose(1, 2)
            mask, size = anchored_mask(order, similarity, state.size, own, rest)
            if self.config.carry_mask and mlp is not None:
                # the update as factors: rows (queries) travel by merging, columns (keys) as they are
                carried = torch.cat((merge(take(mlp, order.argsort(dim=1)), mask), of_slots * self._step), dim=2)
        if observe:
            return z, mask, state
        return merge(z, mask, num_prefix), mask, MergeState(size, cells, carried, state.trace)

    def _anchored_update(
        self, mlp: Tensor, of_cells: Tensor, of_slots: Tensor, order: Tensor, cells: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. 3 where the mask is dense: each anchor in its own slot (B, P), the others in every slot (B, M, P)."""
        P = of_slots.shape[1]
        if self.running_update is None:
            return (mlp[:, :P] * of_slots).sum(dim=2), mask_update(mlp[:, P:], of_slots, 1.0)
        by_index = take(mask_update(mlp, of_cells, self._step), order.argsort(dim=1))  # B N c: images align
        update = take(self._batch_mean(by_index), order)
        columns = torch.arange(P, device=mlp.device).expand(mlp.shape[0], -1) if cells is None else cells
        own = update[:, :P].gather(2, columns.unsqueeze(2)).squeeze(2)
        return own, take_columns(update[:, P:], columns)

    def _dense(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int,
        P: int,
        unit: Tensor | None,
        X: Tensor | None,
        observe: bool,
    ) -> tuple[Tensor, DenseMask, MergeState]:
        """Every entry of the N x P mask."""
        config = self.config
        first = self._first_logits(X) if self.starts_mask else None
        values, mlp = self._values(z[:, num_prefix:]) if self.updates else (None, None)
        with no_autocast(z):
            if unit is not None:
                with torch.no_grad():
                    columns = order_by_redundancy(unit, P)[:, :P]
                first = at_least_float32(self.log_beta).exp() * (unit @ take(unit, columns).transpose(1, 2))
            else:
                # token i of this block is slot i of the last one: of unmerged tokens (warm-up), slots are the columns
                slots = z.shape[1] - num_prefix if state.carried is None else state.carried.shape[2]
                columns = even_columns(slots, P, z.device)
            previous = take_columns(state.carried, columns) if state.carried is not None else None
            if first is not None:
                base = at_least_float32(first)
                mask, size = dense_mask(base, state.size, config.mask_softmax)
                weights = mask.weights
            else:
                assert previous is not None, "a block without a first mask follows one that carries its mask"
                base = weights = previous  # G^(l-1)
            slot_cells = state.cells
            if slot_cells is not None:
                index = (
                    columns if columns.ndim == 2 else columns.clamp_max(slot_cells.shape[1] - 1).expand(z.shape[0], -1)
                )
                slot_cells = slot_cells.gather(1, index)
            update = None
            if values is not None and mlp is not None:
                merged = weights.transpose(1, 2) @ values if slot_cells is None else None  # G^T Z
                of_cells = self._direction(values, state, merged)
                of_slots = of_cells if slot_cells is None else take(of_cells, slot_cells)
                if not observe:
                    update = self._batch_mean(mask_update(mlp, of_slots, self._step))  # Eq. 3
            if config.first_mask == "anchors" and previous is not None:
                update = previous if update is None else update + previous
            if update is not None or first is None:
                mask, size = dense_mask(base if update is None else base + update, state.size, config.mask_softmax)
            carried = None
            if config.carry_mask:
                carried = mask.weights if config.first_mask != "anchors" else update
            if observe:
                return z, mask, state._replace(carried=carried)
            if carried is not None:
                carried = merge(carried, mask)  # rows travel by merging
        return merge(z, mask, num_prefix), mask, MergeState(size, slot_cells, carried, state.trace)

    def _first_logits(self, X: Tensor | None) -> Tensor:
        """f(X) (B, N, P). ``"printed"`` is Section 3.1's f(X / tau); inside the sigmoid tau sparsifies nothing."""
        assert X is not None, "f(X) needs the block's input"
        if self.config.first_mask == "printed":
            return self.mask_fc(X / self.config.tau).sigmoid()
        return self.mask_fc(X).sigmoid() / self.config.tau
