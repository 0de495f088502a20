"""Anchors, masks, merge and unmerge (Section 3.1 of the paper).

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that have no slot of their own, D width, d cluster
width, H W grid. A mask G (B, N, P) has non-negative weights and columns that sum to 1; merged tokens are G^T Z.

TorchScript compiles what a forward pass calls, hence no postponed annotations, and no generators or recursion there.
"""

from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AnchoredMask",
    "DenseMask",
    "GridMask",
    "Mask",
    "anchored_mask",
    "dense_mask",
    "even_columns",
    "fixed",
    "merge",
    "order_by_redundancy",
    "order_evenly",
    "redundancy",
    "take",
    "take_columns",
    "unmerge",
]


class AnchoredMask(NamedTuple):
    """A mask whose slots are tokens (anchors): a selection plus M dense rows.

    Attributes:
        order: (B, N) token indices: the P anchors in token order, then the M others.
        own: (B, P) weight of each anchor in its slot.
        rest: (B, M, P) weights of the others. ``own + rest.sum(1)`` is 1.
        to: (B, M, P) where the others go, rows sum to 1.
    """

    order: Tensor
    own: Tensor
    rest: Tensor
    to: Tensor

    def dense(self) -> Tensor:
        """G (B, N, P)."""
        return self._rows(torch.diag_embed(self.own), self.rest)

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return self._rows(torch.diag_embed(torch.ones_like(self.own)), self.to)

    def _rows(self, kept: Tensor, others: Tensor) -> Tensor:
        rows = torch.cat((kept, others), dim=1)  # B (P M) P, in `order`
        return take(rows, self.order.argsort(dim=1))


class DenseMask(NamedTuple):
    """A mask with every entry of its own.

    Attributes:
        weights: (B, N, P), columns sum to 1.
        to: (B, N, P), rows sum to 1.
    """

    weights: Tensor
    to: Tensor

    def dense(self) -> Tensor:
        """G (B, N, P)."""
        return self.weights

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return self.to


class GridMask(NamedTuple):
    """The mask of a map that stays a map: rows are merged from W to W' tokens, then columns from H to H'.

    Attributes:
        rows: Of the B H rows, None where they stay as they are.
        columns: Of the B W' columns, None where they stay as they are.
        grid: (H, W).
        straight: All rows of an image share one mask, and so do its columns: ``rows`` and ``columns`` have B of them.
    """

    rows: AnchoredMask | None
    columns: AnchoredMask | None
    grid: tuple[int, int]
    straight: bool = False

    def dense(self) -> Tensor:
        """G (B, H W, H' W')."""
        return self._product(*(m.dense() if m is not None else None for m in (self.rows, self.columns)))

    def destinations(self) -> Tensor:
        """(B, H W, H' W'): the share of each token that goes to each slot, rows sum to 1."""
        return self._product(*(m.destinations() if m is not None else None for m in (self.rows, self.columns)))

    def _product(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        H, W = self.grid
        W_ = W if rows is None else rows.shape[2]
        if self.straight:
            rows, columns = (
                t if t is None else t.unsqueeze(1).expand(-1, lines, -1, -1).flatten(0, 1)
                for t, lines in ((rows, H), (columns, W_))
            )
        if rows is None:
            assert columns is not None
            rows = torch.eye(W, dtype=columns.dtype, device=columns.device).expand(len(columns) // W * H, -1, -1)
        if columns is None:
            columns = torch.eye(H, dtype=rows.dtype, device=rows.device).expand(len(rows) // H * W_, -1, -1)
        rows, columns = rows.unflatten(0, (-1, H)), columns.unflatten(0, (-1, W_))  # B H W W', B W' H H'
        return torch.einsum("bhwv,bvhu->bhwuv", rows, columns).flatten(3, 4).flatten(1, 2)


Mask = Union[AnchoredMask, DenseMask, GridMask]


def fixed(size: int) -> int:
    """A size that is not the batch's as a constant of traces, which then compute no shapes."""
    if torch.jit.is_scripting():
        return size
    return int(size) if torch.jit.is_tracing() else size


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of each image of ``x`` (B, N, D): (B, K, D). One flat lookup, far faster than gather."""
    N, D = fixed(x.shape[1]), fixed(x.shape[2])
    flat = index + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * N
    return F.embedding(flat, x.reshape(-1, D) if D else x.flatten(0, 1))


def redundancy(keys: Tensor) -> Tensor:
    """How well another token could stand in for each token: the largest cosine similarity to another one.

    Of two tokens that are each other's nearest, the first is ranked below all that are not the first of such a pair: of
    two twins only one goes. ToMe's bipartition (even tokens go, odd ones stay) compares a quarter of the pairs, and is
    as good where few tokens go, but not where many do.

    Args:
        keys: (B, N, K) unit vectors.

    Returns:
        (B, N), in [-1, 1], or at most -3 for the first of a pair.
    """
    N = fixed(keys.shape[1])
    if N < 2:
        return keys.new_zeros(keys.shape[0], N)
    index = torch.arange(N, device=keys.device)
    similarity = keys @ keys.transpose(1, 2) - 4.0 * torch.eye(N, dtype=keys.dtype, device=keys.device)  # B N N
    best, partner = similarity.max(dim=2)
    first = (partner.gather(1, partner) == index) & (index < partner)
    return best - 4.0 * first.to(best.dtype)


def order_by_redundancy(keys: Tensor, num_slots: int) -> Tensor:
    """(B, N) token indices: the ``num_slots`` least redundant (the anchors) in token order, then the others.

    Args:
        keys: (B, N, K) unit vectors.
        num_slots: P.
    """
    ranked = redundancy(keys).topk(fixed(keys.shape[1]), dim=1, largest=False).indices
    anchors = ranked[:, :num_slots].sort(dim=1).values
    return torch.cat((anchors, ranked[:, num_slots:]), dim=1)


def order_evenly(num_tokens: int, num_slots: int, device: torch.device | None = None) -> Tensor:
    """(N,) token indices: ``num_slots`` anchors at even spacing in token order, then the others."""
    anchors = even_columns(num_tokens, num_slots, device)
    line = torch.arange(num_tokens, device=device)
    goes = (line.unsqueeze(1) != anchors).all(dim=1)  # N
    return torch.cat((anchors, (goes * num_tokens - line).topk(num_tokens - num_slots).indices))


def anchored_mask(
    order: Tensor,
    similarity: Tensor,
    size: Tensor,
    update_own: Tensor | None = None,
    update_rest: Tensor | None = None,
) -> tuple[AnchoredMask, Tensor]:
    """Each anchor keeps its slot; every other token hands out its whole weight over the slots.

    ``to = softmax_p(similarity + u)``, weights ``size * to * exp(u)``, columns scaled to sum to 1: the update u decides
    where a token goes and how much it counts there.

    Args:
        order: (B, N) from :func:`order_by_redundancy`.
        similarity: (B, M, P) logits of the others to the anchors.
        size: (B, N) how many input tokens each token stands for.
        update_own: (B, P) u of each anchor in its own slot.
        update_rest: (B, M, P) u of the others in every slot.

    Returns:
        The mask, and the sizes (B, P) of the merged tokens. Sizes add up to those put in.
    """
    bound = 10.0  # of the update's log weights: e^10 is a slot to itself, and finite in half precision
    floor = -40.0  # of logits below the largest: a sharp softmax leaves denormal numbers, with which CPUs crawl
    P = fixed(similarity.shape[2])
    size = size.gather(1, order)
    own, size_rest = size[:, :P], size[:, P:]
    if update_rest is not None:
        update_rest = update_rest.clamp(-bound, bound)
        similarity = similarity + update_rest
    to = (similarity - similarity.amax(dim=2, keepdim=True)).clamp_min(floor).softmax(dim=2)
    rest = size_rest.unsqueeze(2) * to
    merged_size = total = own + rest.sum(dim=1)
    if update_own is not None and update_rest is not None:
        own, rest = own * update_own.clamp(-bound, bound).exp(), rest * update_rest.exp()
        total = own + rest.sum(dim=1)
    return AnchoredMask(order, own / total, rest / total.unsqueeze(1), to), merged_size


def dense_mask(logits: Tensor, size: Tensor, softmax: str = "slots") -> tuple[DenseMask, Tensor]:
    """A dense mask from its logits.

    Args:
        logits: (B, N, P).
        size: (B, N) how many input tokens each token stands for.
        softmax: ``"tokens"``: softmax over N, the paper's (Section 4.1). ``"slots"``: each token's softmax over P times
            its size, then columns scaled to sum to 1.

    Returns:
        The mask, and the sizes (B, P) of the merged tokens. Sizes add up to those put in.
    """
    if softmax == "tokens":
        weights = logits.softmax(dim=1)
        to = (weights + 1e-12) / (weights + 1e-12).sum(dim=2, keepdim=True)
        shares = to * size.unsqueeze(2)
    else:
        to = logits.softmax(dim=2)
        shares = to * size.unsqueeze(2)
        weights = (shares + 1e-12) / (shares + 1e-12).sum(dim=1, keepdim=True)
    return DenseMask(weights, to), shares.sum(dim=1)


def merge(x: Tensor, mask: Mask, num_prefix: int = 0, parts: int = 1) -> Tensor:
    """G^T x: merged tokens, the ``num_prefix`` first ones passed through.

    Args:
        x: (B parts, num_prefix + N, D); a map is flattened, N = H W.
        mask: Of the N tokens behind the prefix.
        num_prefix: Class, register and distillation tokens in front. A map has none.
        parts: Rows of ``x`` in a row that are merged alike.

    Returns:
        (B parts, num_prefix + P, D).
    """
    if isinstance(mask, GridMask):
        return _merge_map(x, mask, parts)
    if isinstance(mask, DenseMask):
        merged = _shared(mask.weights, 1, parts).to(x.dtype).transpose(1, 2) @ x[:, num_prefix:]
        return torch.cat((x[:, :num_prefix], merged), dim=1) if num_prefix else merged
    return _merge_lines(x, mask, 1, parts, num_prefix)


def _merge_map(x: Tensor, mask: GridMask, parts: int) -> Tensor:
    """Rows, then columns."""
    H, W = mask.grid
    D, rows, columns = fixed(x.shape[2]), mask.rows, mask.columns
    if rows is not None:
        lines, repeats = (1, H * parts) if mask.straight else (H, parts)
        x = _merge_lines(x.reshape(-1, W, D), rows, lines, repeats)  # (B H) W D -> (B H) W' D
        W = fixed(x.shape[1])
    if columns is not None and mask.straight:
        x = _merge_lines(x.reshape(-1, H, W * D), columns, 1, parts)  # B H (W' D) -> B H' (W' D)
        H = fixed(x.shape[1])
    elif columns is not None:
        x = x.reshape(-1, H, W, D).transpose(1, 2).reshape(-1, H, D)  # B H W' D -> (B W') H D
        x = _merge_lines(x, columns, W, parts)
        H = fixed(x.shape[1])
        x = x.reshape(-1, W, H, D).transpose(1, 2)  # (B W') H' D -> B H' W' D
    return x.reshape(-1, H * W, D)


def _merge_lines(x: Tensor, mask: AnchoredMask, lines: int, parts: int, num_prefix: int = 0) -> Tensor:
    """An anchored mask of (B ``lines``) lines, each shared by ``parts`` of them."""
    N, P = fixed(mask.order.shape[1]), fixed(mask.own.shape[1])
    own = _shared(mask.own.unsqueeze(2), lines, parts).to(x.dtype)
    if num_prefix:  # prefix tokens are anchors that nobody is handed to
        own = F.pad(own, (0, 0, num_prefix, 0), value=1.0)
    if P == N:
        return x * own  # by 1: the mask's parameters still get gradients, which DistributedDataParallel waits for
    order = _shared(mask.order.unsqueeze(2), lines, parts).flatten(1)
    rest = _shared(mask.rest, lines, parts).to(x.dtype)
    if num_prefix:
        rest = F.pad(rest, (num_prefix, 0))
        prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
        order = torch.cat((prefix, order + num_prefix), dim=1)
    tokens = take(x, order)
    kept, others = tokens[:, : P + num_prefix] * own, tokens[:, P + num_prefix :]
    if torch.jit.is_scripting():  # whose autocast does not know in-place operations
        return kept.baddbmm(rest.transpose(1, 2), others)
    return kept.baddbmm_(rest.transpose(1, 2), others)


def _shared(x: Tensor, lines: int, parts: int) -> Tensor:
    """x (B L, N, P) of B ``lines`` lines, for B ``parts`` ``lines`` of them: one for all parts of an image."""
    if parts == 1:
        return x
    N, P = fixed(x.shape[1]), fixed(x.shape[2])
    x = x.reshape(-1, 1, lines, N, P).expand(-1, parts, -1, -1, -1)  # (B L) N P -> B S L N P
    return x.reshape(-1, N, P)


def unmerge(x: Tensor, destinations: Tensor) -> Tensor:
    """Merged tokens (B, P, D) back at the tokens they came from: ``destinations`` (B, N, P) @ x, (B, N, D)."""
    return destinations.to(x.dtype) @ x


def even_columns(num_tokens: int, num_slots: int, device: torch.device | None = None) -> Tensor:
    """(P,) token indices at even spacing, the columns of a carried mask where slots have no anchors."""
    return ((torch.arange(num_slots, device=device) + 0.5) * (num_tokens / num_slots)).long()


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns ``index``, (P,) or (B, P), of each image of ``x`` (B, N, K): (B, N, P)."""
    if index.ndim == 1:
        return x[:, :, index]
    return take(x.transpose(1, 2), index).transpose(1, 2)
