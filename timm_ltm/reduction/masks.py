"""A reduction as an object: what merges tokens, and puts them back (Section 3.1 of the paper).

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that have no slot of their own, D width, H W grid. A
mask G (B, N, P) has non-negative weights and columns that sum to 1; merged tokens are G^T Z. What is put back goes the
other way: a token gets the mean of the slots it went to, by the shares of it that went there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.reduction.tokens import at_least_float32, fixed, one_hot, take, unflatten

__all__ = ["DenseMask", "HardMask", "LengthMask", "Mask", "SoftMask", "hard_mask", "soft_mask"]


class Mask(Protocol):
    """What masks are; a method may have one of its own.

    Attributes:
        size: (B, P) how many input tokens each slot stands for.
        linear: Merging is a product with G, so that vectors of several tokens may be merged as one.
        keeps_own: A slot is for few tokens that resemble each other, each of which is put back with what was its own.
    """

    size: Tensor
    linear: bool
    keeps_own: bool

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """(B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B parts, P, D) -> (B parts, N, D)."""

    def anchors(self) -> Tensor:
        """(B, P) token indices."""

    def dense(self) -> Tensor:
        """G (B, N, P): what merging weighs tokens by, columns sum to 1."""

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""


class HardMask(NamedTuple):
    """Slots are tokens (anchors), and every other token goes to one of them.

    Attributes:
        order: (B, N) token indices: the P anchors in token order, then the M others.
        slot: (B, M) where the others go.
        own: (B, P) weight of each anchor in its slot.
        rest: (B, M) weight of the others in theirs, None where their features are dropped.
        size: (B, P) how many input tokens each slot stands for.
    """

    order: Tensor
    slot: Tensor
    own: Tensor
    rest: Tensor | None
    size: Tensor
    linear = True
    keeps_own = True

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """G^T x: (B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""
        return _merge_anchored(x, self.order, self.own, self._rest(), num_prefix, parts)

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B parts, P, D) -> (B parts, N, D), a lookup."""
        return take(x, _shared(self.slots().unsqueeze(2), parts).squeeze(2))

    def slots(self) -> Tensor:
        """(B, N): the slot every token goes to."""
        anchors = torch.arange(fixed(self.own.shape[1]), device=self.slot.device).expand(self.slot.shape[0], -1)
        return torch.cat((anchors, self.slot), dim=1).gather(1, self.order.argsort(dim=1))

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.order[:, : self.own.shape[1]]

    def dense(self) -> Tensor:
        """G (B, N, P)."""
        rest = self._rest()
        rest = one_hot(self.slot, fixed(self.own.shape[1]), self.own.dtype) * 0.0 if rest is None else rest
        return _rows(self.order, torch.diag_embed(self.own), rest)

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return one_hot(self.slots(), fixed(self.own.shape[1]), self.own.dtype)

    def _rest(self) -> Tensor | None:
        if self.rest is None:
            return None
        return one_hot(self.slot, fixed(self.own.shape[1]), self.rest.dtype) * self.rest.unsqueeze(2)  # B M P


class SoftMask(NamedTuple):
    """Slots are tokens (anchors), and every other token is shared out among them.

    Attributes:
        order: (B, N) token indices: the P anchors in token order, then the M others.
        to: (B, M, P) where the others go, rows sum to 1.
        own: (B, P) weight of each anchor in its slot.
        rest: (B, M, P) weights of the others. ``own + rest.sum(1)`` is 1.
        size: (B, P) how many input tokens each slot stands for.
    """

    order: Tensor
    to: Tensor
    own: Tensor
    rest: Tensor
    size: Tensor
    linear = True
    keeps_own = True

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """G^T x: (B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""
        return _merge_anchored(x, self.order, self.own, self.rest, num_prefix, parts)

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B parts, P, D) -> (B parts, N, D)."""
        others = _shared(self.to, parts).to(x.dtype) @ x
        places = _shared(self.order.argsort(dim=1).unsqueeze(2), parts).squeeze(2)
        return take(torch.cat((x, others), dim=1), places)

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.order[:, : self.own.shape[1]]

    def dense(self) -> Tensor:
        """G (B, N, P)."""
        return _rows(self.order, torch.diag_embed(self.own), self.rest)

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return _rows(self.order, torch.diag_embed(torch.ones_like(self.own)), self.to)


class DenseMask(NamedTuple):
    """A mask with every entry of its own.

    Attributes:
        weights: (B, N, P), columns sum to 1.
        to: (B, N, P), rows sum to 1.
        columns: (B, P) or (P,) the token each slot has the place of.
        size: (B, P) how many input tokens each slot stands for.
        grid: (H', W') of slots that are a map.
    """

    weights: Tensor
    to: Tensor
    columns: Tensor
    size: Tensor
    grid: tuple[int, int] | None = None
    linear = True
    keeps_own = False

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """G^T x: (B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""
        merged = _shared(self.weights, parts).to(x.dtype).transpose(1, 2) @ x[:, num_prefix:]
        return torch.cat((x[:, :num_prefix], merged), dim=1) if num_prefix else merged

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B parts, P, D) -> (B parts, N, D)."""
        return _shared(self.to, parts).to(x.dtype) @ x

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.columns.expand(self.size.shape[0], -1)

    def dense(self) -> Tensor:
        """G (B, N, P)."""
        return self.weights

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return self.to


class LengthMask(NamedTuple):
    """Another mask's means, made as long as the tokens that they are of: a mean of different directions is shorter.

    Of the tokens z_i of a slot, with weights g_i that sum to 1 and m = sum_i g_i z_i,

        y = m / |m| sum_i g_i |z_i|,    or    y = m / |m| max_i |z_i|   (MLERP; Kim et al., WACV 2024).

    The norms are those of token vectors (of every pixel's, where pixels are merged alike). Where tokens cancel, so that
    m has no direction, y = m.

    Attributes:
        inner: What goes where, and the weights g.
        longest: MLERP, of hard masks. Along the lines of a map, rows are merged so and then columns: each slot is as
            long as the longest token of its rectangle.
    """

    inner: HardMask | SoftMask
    longest: bool = False
    linear = False
    keeps_own = True

    @property
    def size(self) -> Tensor:
        """(B, P) how many input tokens each slot stands for."""
        return self.inner.size

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """(B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""
        return self.merge_aligned(x, num_prefix, parts)[0]

    def merge_aligned(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """:meth:`merge`, and |m| over the length of y (B, P): 1 where the tokens of a slot point the same way."""
        mean = self.inner.merge(x, num_prefix, parts)
        if fixed(x.shape[1]) == fixed(mean.shape[1]):
            return mean, torch.ones_like(self.size)
        norm, length = (torch.linalg.vector_norm(at_least_float32(t[:, num_prefix:]), dim=2) for t in (x, mean))
        meant = self._longest(norm, parts) if self.longest else self.inner.merge(norm.unsqueeze(2), 0, parts).squeeze(2)
        aligned = torch.where(meant > 0, length / torch.where(meant > 0, meant, 1.0), 1.0)
        scale = 1.0 / torch.where(aligned > _CANCELLED, aligned, 1.0)
        if num_prefix:
            scale = F.pad(scale, (num_prefix, 0), value=1.0)
        aligned = unflatten(aligned, 0, (-1, parts)).mean(dim=1)  # (B parts) P -> B parts P -> B P
        return mean * scale.unsqueeze(2).to(x.dtype), aligned

    def _longest(self, norm: Tensor, parts: int) -> Tensor:
        """(B parts, N) -> (B parts, P)."""
        assert isinstance(self.inner, HardMask), "of shares there is no longest"
        P = fixed(self.inner.own.shape[1])
        norm = unflatten(norm, 0, (-1, parts))  # (B parts) N -> B parts N
        norm = norm.gather(2, self.inner.order.unsqueeze(1).expand(-1, parts, -1)).unsqueeze(3)
        others = norm[:, :, P:] * one_hot(self.inner.slot, P, norm.dtype).unsqueeze(1)  # B parts M P
        return torch.maximum(norm[:, :, :P, 0], others.amax(dim=2)).reshape(-1, P)  # B parts P -> (B parts) P

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B parts, P, D) -> (B parts, N, D)."""
        return self.inner.unmerge(x, parts)

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.inner.anchors()

    def dense(self) -> Tensor:
        """(B, N, P): the weights g of the mean, columns sum to 1. What merging does is not their product."""
        return self.inner.dense()

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return self.inner.destinations()


def hard_mask(
    order: Tensor, slot: Tensor, size: Tensor, num_slots: int, own: Tensor | None = None, rest: Tensor | None = None
) -> HardMask:
    """Averages weighted by size times exp of an update.

    Args:
        order: (B, N) the anchors, then the others.
        slot: (B, M) where the others go.
        size: (B, N) how many input tokens each token stands for.
        num_slots: P.
        own: (B, P) update of each anchor in its slot, None for none.
        rest: (B, M) update of the others in theirs.
    """
    P = num_slots
    size = size.gather(1, order)
    to = one_hot(slot, P, size.dtype)  # B M P
    own_weight, rest_weight = size[:, :P], size[:, P:]
    merged = own_weight + (rest_weight.unsqueeze(1) @ to).squeeze(1)
    total = merged
    if own is not None and rest is not None:
        own_weight, rest_weight = (
            own_weight * own.clamp(-_BOUND, _BOUND).exp(),
            rest_weight * rest.clamp(-_BOUND, _BOUND).exp(),
        )
        total = own_weight + (rest_weight.unsqueeze(1) @ to).squeeze(1)
    return HardMask(order, slot, own_weight / total, rest_weight / total.gather(1, slot), merged)


def soft_mask(
    order: Tensor, logits: Tensor, size: Tensor, own: Tensor | None = None, rest: Tensor | None = None
) -> SoftMask:
    """The soft form of :func:`hard_mask`, which it nears as the logits grow sharp.

    ``to = softmax_p(logits + u)``, weights ``size * to * exp(u)``, columns scaled to sum to 1: the update u decides
    where a token goes and how much it counts there.

    Args:
        order: (B, N) the anchors, then the others.
        logits: (B, M, P) of the others to the anchors.
        size: (B, N) how many input tokens each token stands for.
        own: (B, P) u of each anchor in its own slot.
        rest: (B, M, P) u of the others in every slot.
    """
    floor = -40.0  # of logits below the largest: a sharp softmax leaves denormal numbers, with which CPUs crawl
    P = fixed(logits.shape[2])
    size = size.gather(1, order)
    own_weight = size[:, :P]
    if rest is not None:
        rest = rest.clamp(-_BOUND, _BOUND)
        logits = logits + rest
    to = (logits - logits.amax(dim=2, keepdim=True)).clamp_min(floor).softmax(dim=2)
    rest_weight = size[:, P:].unsqueeze(2) * to
    merged = total = own_weight + rest_weight.sum(dim=1)
    if own is not None and rest is not None:
        own_weight, rest_weight = own_weight * own.clamp(-_BOUND, _BOUND).exp(), rest_weight * rest.exp()
        total = own_weight + rest_weight.sum(dim=1)
    return SoftMask(order, to, own_weight / total, rest_weight / total.unsqueeze(1), merged)


_CANCELLED = 1e-6  # a mean that is shorter than its tokens by this has no direction that rounding leaves
_BOUND = 10.0  # of an update's log weights: e^10 is a slot to itself, and finite in half precision


def _rows(order: Tensor, kept: Tensor, others: Tensor) -> Tensor:
    return take(torch.cat((kept, others), dim=1), order.argsort(dim=1))  # B (P M) P in `order` -> B N P


def _merge_anchored(x: Tensor, order: Tensor, own: Tensor, rest: Tensor | None, num_prefix: int, parts: int) -> Tensor:
    """The anchors by their weights (B, P), plus the product with the others' (B, M, P), None where they are dropped."""
    N, P = fixed(order.shape[1]), fixed(own.shape[1])
    own = _shared(own.unsqueeze(2), parts).to(x.dtype)
    if num_prefix:  # prefix tokens are anchors that nobody is handed to
        own = F.pad(own, (0, 0, num_prefix, 0), value=1.0)
    if P == N:
        return x * own  # by 1: the mask's parameters still get gradients, which DistributedDataParallel waits for
    order = _shared((order if rest is not None else order[:, :P]).unsqueeze(2), parts).flatten(1)
    if num_prefix:
        prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
        order = torch.cat((prefix, order + num_prefix), dim=1)
    tokens = take(x, order)
    if rest is None:
        return tokens * own
    rest = _shared(rest, parts).to(x.dtype)
    if num_prefix:
        rest = F.pad(rest, (num_prefix, 0))
    kept, others = tokens[:, : P + num_prefix] * own, tokens[:, P + num_prefix :]
    return kept.baddbmm_(rest.transpose(1, 2), others)


def _shared(x: Tensor, parts: int) -> Tensor:
    """x (B, N, P) for every one of an image's parts: (B parts, N, P)."""
    return x if parts == 1 else x.repeat_interleave(parts, dim=0)
