"""What travels with tokens from block to block, and the tensor helpers that everything here is made of.

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that lose their slot, D width, H W grid.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from timm_ltm.reduction.masks import Mask

__all__ = [
    "Tokens",
    "at_least_float32",
    "fixed",
    "grid_cells",
    "initial_tokens",
    "no_autocast",
    "one_hot",
    "shapes_are_fixed",
    "take",
    "unflatten",
]


class Tokens(NamedTuple):
    """What is known of the tokens behind the prefix, beside their features.

    Attributes:
        size: (B, N) how many input tokens each token stands for, in float32 or more.
        anchor: (B, N) which input token each token has the place of.
        start: (H, W) of the input tokens: the image's patches, or the map that a stage began with.
        grid: (H, W) of tokens that are a map and stay one, None for a sequence.
        masks: Of the merges since the start.
        carried: What a method hands from block to block.
        weight: (B, N) how many tokens attention counts each token as, None for its size. It may have a gradient, and be
            0: what is masked and not dropped.
        kept: Of each merge since the start the tokens in front of it (B, N, D) and behind it (B, P, D), for
            :meth:`put_back`. None: they are not kept.
    """

    size: Tensor
    anchor: Tensor
    start: tuple[int, int]
    grid: tuple[int, int] | None = None
    masks: tuple[Mask, ...] = ()
    carried: Tensor | None = None
    weight: Tensor | None = None
    kept: tuple[tuple[Tensor, Tensor], ...] | None = None

    def cells(self, per_side: int) -> Tensor:
        """(B, N): in which cell of a ``per_side`` x ``per_side`` grid over the input each token lies."""
        return grid_cells(*self.start, per_side, self.anchor.device)[self.anchor]

    def log_sizes(self, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """What attention in proportion to sizes adds to its logits: (B parts, 1, 1, num_prefix + N).

        A token of size s then attracts attention like s equal ones (Bolya et al., ICLR 2023). Without gradient, as a
        size may come near zero; that of :attr:`weight` is kept, also at 0.
        """
        # of attention 1e-20 is nothing; times small gradients, less would be denormal, with which CPUs crawl
        counted = self.size.detach().clamp_min(1e-6) if self.weight is None else self.weight + 1e-20
        bias = F.pad(counted.log(), (num_prefix, 0))
        return bias.repeat_interleave(parts, dim=0).unsqueeze(1).unsqueeze(1)

    def unmasked(self, num_prefix: int = 0) -> Tensor | None:
        """(B, num_prefix + N): 1 for tokens that are there and 0 for those that are masked, None for all there."""
        if self.weight is None:
            return None
        return F.pad((self.weight > 0).to(self.size.dtype), (num_prefix, 0), value=1.0)

    def unmerge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """Tokens put back where they came from, copies of slots.

        Args:
            x: (B parts, num_prefix + P, D).
            num_prefix: Prefix tokens in front.
            parts: As of :class:`~timm_ltm.reduction.Site`.

        Returns:
            (B parts, num_prefix + H W, D).
        """
        if not self.masks:
            return x
        prefix, x = x[:, :num_prefix], x[:, num_prefix:]
        for mask in reversed(self.masks):
            x = mask.unmerge(x, parts)
        return torch.cat((prefix, x), dim=1) if num_prefix else x

    def put_back(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """As :meth:`unmerge`, but each token as it was in front of the merge, plus what its slot has gained since.

        Features are sums of what blocks add, and tokens that were merged share only what was added since. On a real
        ViT-S/14 this is nearer to the plain model's tokens by a sixth to two thirds than copies of slots.

        Args:
            x: Such sums: in front of a norm.
            num_prefix: Prefix tokens in front.
            parts: As of :class:`~timm_ltm.reduction.Site`.
        """
        if not self.kept:
            return self.unmerge(x, num_prefix, parts)
        prefix, x = x[:, :num_prefix], x[:, num_prefix:]
        for mask, (before, after) in zip(reversed(self.masks), reversed(self.kept), strict=True):
            x = before + mask.unmerge(x - after, parts) if mask.keeps_own else mask.unmerge(x, parts)
        return torch.cat((prefix, x), dim=1) if num_prefix else x

    def mean(self, x: Tensor, num_prefix: int = 0) -> Tensor:
        """The mean of the tokens put back, (B, num_prefix + P, D) -> (B, 1, D): the mean weighted by size."""
        weight = self.size / self.size.sum(dim=1, keepdim=True)
        return weight.to(x.dtype).unsqueeze(1) @ x[:, num_prefix:]


def initial_tokens(
    x: Tensor,
    num_prefix: int,
    start: tuple[int, int],
    kept: Tensor | None = None,
    is_map: bool = False,
    parts: int = 1,
) -> Tokens:
    """In front of the first block every token stands for itself.

    Args:
        x: (B parts, num_prefix + N, D).
        start: (H, W).
        kept: (B, N) which of the H W input tokens are left, where some were dropped.
        is_map: The tokens are to stay a map.
        parts: Rows of ``x`` in a row that are of one image and merged alike (the pixels of MobileViT's patches).
    """
    start = fixed(start[0]), fixed(start[1])
    B, N = x.shape[0] // parts, fixed(x.shape[1]) - num_prefix
    anchor = torch.arange(N, device=x.device).expand(B, -1) if kept is None else kept
    return Tokens(at_least_float32(x.new_ones(B, N)), anchor, start, start if is_map else None)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors in float32, others as they are: distances and sharp softmaxes need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products of what :func:`at_least_float32` returned stay in float32 under autocast."""
    device = x.device.type
    # "meta" has none; and exported graphs have a graph of its own for every context
    entered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if entered else nullcontext()


def fixed(size: int) -> int:
    """A size that is not the batch's as a constant of traces, which then compute no shapes."""
    return int(size) if torch.jit.is_tracing() else size


def shapes_are_fixed(x: Tensor) -> bool:
    """Whether shapes must not depend on values: in graphs that are compiled, exported or traced, and without values."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing() or x.is_meta


def unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """``x.unflatten``, by a reshape that leaves the batch open: ONNX's older exporter makes constants of the other.

    Args:
        x: (B, ...).
        dim: Not negative; where it is 0, one of ``sizes`` is -1.
        sizes: What it becomes.
    """
    shape = [fixed(n) for n in x.shape[1:]]
    if dim == 0:
        return x.reshape(*sizes, *shape)
    n, known = shape[dim - 1], math.prod([size for size in sizes if size != -1])
    sizes = tuple(n // known if size == -1 else size for size in sizes)
    return x.reshape(-1, *shape[: dim - 1], *sizes, *shape[dim:])


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of each image of ``x`` (B, N, D): (B, K, D). One flat lookup, far faster than gather."""
    N, D = fixed(x.shape[1]), fixed(x.shape[2])
    flat = index + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * N
    return F.embedding(flat, x.reshape(-1, D) if D else x.flatten(0, 1))


def one_hot(index: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """(..., num) of indices (...), without a scatter, which exporters lack."""
    return (index.unsqueeze(-1) == torch.arange(num, device=index.device)).to(dtype)


def grid_cells(height: int, width: int, per_side: int, device: torch.device | None = None) -> Tensor:
    """(H W,): the cell of a coarse g x g grid in which each token of an H x W grid lies."""
    rows = torch.arange(height, device=device) * per_side // height
    columns = torch.arange(width, device=device) * per_side // width
    return (rows.unsqueeze(1) * per_side + columns).flatten()  # H W -> (H W)
