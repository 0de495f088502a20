"""What every form of a mask shares: parameters, clusters, and the direction of the information-bottleneck update.

TorchScript compiles the forward pass, hence no postponed annotations.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import Final

from timm_ltm.merging.clusters import Clusters
from timm_ltm.merging.config import MergeConfig, num_slots
from timm_ltm.merging.merge import Mask, fixed
from timm_ltm.merging.update import at_least_float32, pool_slots

__all__ = ["MaskModule", "MergeState", "count", "grid_cells", "initial_state", "map_slots", "slots_of"]


class MergeState(NamedTuple):
    """What travels with the tokens from block to block.

    Attributes:
        size: (B, N) how many input tokens each token stands for; of a map, tokens of the map its stage began with.
        cells: (B, N) the cell of the coarse grid each token lies in, None where nothing is pooled.
        grid: (H, W) of tokens that are a map and stay one, None for a sequence.
        carried: The previous block's mask or update (Eq. 2) with its rows merged already, if it is carried.
        mask: Of the last merge.
    """

    size: Tensor
    cells: Tensor | None
    grid: tuple[int, int] | None = None
    carried: Tensor | None = None
    mask: Mask | None = None


def grid_cells(height: int, width: int, cells: int, device: torch.device | None = None) -> Tensor:
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
    stays_map: bool = False,
    parts: int = 1,
) -> MergeState:
    """The state in front of the first block: every token stands for itself.

    Args:
        x: (B parts, num_prefix + N, D) tokens.
        grid: (H, W).
        cells: g, or 0 where nothing is pooled.
        kept: (B, N) which of the H W patches are left, where some were dropped.
        stays_map: Whether merged tokens are to be a map again.
        parts: Rows of ``x`` in a row that are of one image and merged alike (the pixels of MobileViT's patches).
    """
    grid = fixed(grid[0]), fixed(grid[1])
    B, N = x.shape[0] // parts, fixed(x.shape[1]) - num_prefix
    size = at_least_float32(x.new_ones(B, N))
    of_map = grid if stays_map else None
    if not cells:
        return MergeState(size, None, of_map)
    index = grid_cells(grid[0], grid[1], cells, x.device)
    return MergeState(size, index.expand(B, -1) if kept is None else index[kept], of_map)


def slots_of(tokens: int | tuple[int, int], ratio: float) -> int | tuple[int, int]:
    """P = ceil(r N) of N tokens; (ceil(H sqrt r), ceil(W sqrt r)) of a map."""
    return map_slots(tokens, ratio) if isinstance(tokens, tuple) else num_slots(tokens, ratio)


def map_slots(grid: tuple[int, int], ratio: float) -> tuple[int, int]:
    """(ceil(H sqrt r), ceil(W sqrt r)) of a map (H, W)."""
    side = math.sqrt(ratio)
    return num_slots(grid[0], side), num_slots(grid[1], side)


def count(tokens: int | tuple[int, int]) -> int:
    """N, or H W."""
    return tokens[0] * tokens[1] if isinstance(tokens, tuple) else tokens


class MaskModule(nn.Module):
    """Parameters, clusters and direction, without the forms of a mask: see :class:`TokenMerger`.

    Attributes:
        updates: Whether there is an update: in the paper's form, from the second mask on (Eq. 2).
        starts_mask: Whether the mask begins with f(X).
        needs_keys: Whether :meth:`forward` reads attention keys.
        tied: Whether settings tie this module to one number of tokens.
    """

    updates: Final[bool]
    starts_mask: Final[bool]
    needs_keys: Final[bool]
    tied: Final[bool]
    dense: Final[bool]
    carries: Final[bool]
    projects: Final[bool]
    normalizes: Final[bool]
    even_lines: Final[bool]
    own_lines: Final[bool]
    printed: Final[bool]

    def __init__(
        self,
        dim: int,
        tokens: int | tuple[int, int],
        ratio: float,
        config: MergeConfig,
        num_classes: int = 0,
        first: bool = False,
        parts: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if isinstance(tokens, tuple) and config.mask_form == "anchored" and config.update:
            for name, wrong in (("carry_mask", config.carry_mask), ("cluster_grid", config.cluster_grid == 0)):
                if wrong:
                    raise ValueError(
                        f"{name}: got {getattr(config, name)!r} for a map merged by rows and columns, expected "
                        f"{MergeConfig.__dataclass_fields__[name].default!r}. Leave it out; a dense mask has it, in "
                        "models that take one."
                    )
        self.ratio, self.config, self.first, self.parts = ratio, config, first, parts
        self.tokens = tokens
        self.grid = tokens if isinstance(tokens, tuple) else (tokens, 1)
        self.num_tokens, self.num_slots = count(tokens), count(slots_of(tokens, ratio))
        self.collecting = False  # set by ClusterRefresh: keep each training batch's features
        self.features: Tensor | None = None  # (B, F), read and cleared by ClusterRefresh
        self.labels: Tensor | None = None  # (B,) or (B, K), set by ClusterRefresh for labels="true"

        self.starts_mask = config.first_mask != "anchors" and (first or not config.carry_mask)
        self.updates = config.update and not (self.starts_mask and config.carry_mask)  # Eq. 2: l >= 2
        self.needs_keys = config.first_mask == "anchors"
        self.tied = self.starts_mask or (self.updates and (config.cluster_grid == 0 or config.mask_mode == "batch"))
        # settings as constants: TorchScript compiles only what they lead to
        self.dense, self.carries = config.mask_form == "dense", config.carry_mask
        self.projects, self.normalizes = config.cluster_dim > 0, config.update_scale == "normalized"
        self.even_lines = config.map_lines == "even" and isinstance(tokens, tuple)
        self.own_lines, self.printed = config.map_lines == "own", config.first_mask == "printed"
        self.cluster_grid, self.momentum, self.tau = config.cluster_grid, config.momentum, config.tau
        self.mask_softmax = config.mask_softmax
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
            running = (self.num_tokens, self.num_slots if config.mask_form == "dense" else self.num_cells)
            running_update = torch.zeros(running, **dd) if config.mask_mode == "batch" else None
            self.register_buffer("running_update", running_update)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long, device=device))  # epochs of training behind
        self.reset_parameters()

    def _new_clusters(self, num_classes: int, **dd: Any) -> Clusters:
        A = self.config.num_clusters or max(num_classes, 2)  # without a head, a checkpoint tells: see fit_clusters
        return Clusters(A, self.num_cells * self.cluster_dim, num_classes, self.config.keeps_q, **dd)

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

    def _num_slots(self, num_tokens: int) -> int:
        """P; if tied to a size, that of this size: in warm-up blocks see more tokens."""
        return num_slots(self.num_tokens if self.tied else num_tokens, self.ratio)

    def _map_slots(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H', W'); if tied to a size, those of this size."""
        return map_slots(self.grid if self.tied else grid, self.ratio)

    def _of_image(self, x: Tensor) -> Tensor:
        """(B parts, N, D) -> (B, N, D): the mean of what is merged alike."""
        if self.parts == 1:
            return x
        return x.reshape(-1, self.parts, fixed(x.shape[1]), fixed(x.shape[2])).mean(dim=1)

    def _values(self, z: Tensor, num_prefix: int = 0) -> tuple[Tensor | None, Tensor | None]:
        """What is clustered and MLP(Z), (B, N, d) each; nothing without an update.

        What is clustered are the tokens themselves, or a projection of them with every token normalised.

        The normalisation is per token, before merging: merging and pooling stay linear in what is clustered.
        """
        if self.updates:
            values = self.proj(self._of_image(z)[:, num_prefix:])
            if self.projects:
                values = F.layer_norm(values, (self.cluster_dim,))
            # MLP of Eq. 3: two linear layers with a ReLU between; the projection is the first where there is one
            mlp = self.mlp_fc2(F.relu(self.mlp_fc1(values)))
            return at_least_float32(values), at_least_float32(mlp)
        else:  # TorchScript compiles what follows a return
            return None, None

    def _direction(self, values: Tensor, state: MergeState, merged: Tensor | None) -> Tensor:
        """dir of Eq. 3 (B, c, d), one per cell.

        Eq. 3 starts from the features merged by the mask before. This block's tokens are the slots of the block
        before: pooled onto cells they are those features, before this block merges. With one cell per slot they are
        ``merged`` (B, P, d), by this block's mask without the update. A slot takes the direction of its cell; its
        share in the pooling is left to the step size.
        """
        cells, pooled = state.cells, merged
        if cells is not None:
            pooled = pool_slots(values, cells, self.num_cells, state.size)[0]
        assert pooled is not None, "one cell per slot needs merged features"
        flat = pooled.flatten(1)  # B (c d)
        if torch.jit.is_scripting():
            return self.clusters(flat, None).reshape(pooled.shape)
        if self.training and self.collecting:
            self.features = flat if self.config.ib_loss_weight else flat.detach()
        labels = self.labels if self.training else None
        if labels is not None and labels.shape[0] != flat.shape[0]:
            raise ValueError(f"labels: got {labels.shape[0]} for a batch of {flat.shape[0]}. Give one label per image.")
        return self.clusters(flat, labels).reshape(-1, fixed(pooled.shape[1]), fixed(pooled.shape[2]))

    def _step(self) -> Tensor:
        """2 eta / T of Eq. 3, or eta where R has the rest in it."""
        eta = at_least_float32(self.eta)
        return eta if self.normalizes else 2.0 * eta / self.clusters.temperature.to(eta.dtype)

    def _batch_mean(self, update: Tensor) -> Tensor:
        """The sum over the minibatch of Eq. 3, as a mean: of the batch in training, the running one in eval."""
        running = self.running_update
        if running is None:
            return update
        if not self.training:
            return running.to(update.dtype).expand_as(update)
        mean = update.mean(dim=0)
        with torch.no_grad():
            running.lerp_(mean.to(running.dtype), self.momentum)
        return mean.expand_as(update)
