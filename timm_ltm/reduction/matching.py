"""Which tokens are redundant, and the order that follows. Everything compares unit vectors, the mean attention keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.reduction.tokens import fixed

__all__ = ["bipartite_order", "order_by", "order_by_redundancy", "redundancy", "unit_vectors"]


def unit_vectors(x: Tensor) -> Tensor:
    """x (..., K) of length 1; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def redundancy(keys: Tensor, size: Tensor | None = None) -> Tensor:
    """How well another token could stand in for each token.

    With c_ij the cosine of keys and u_i the fourth root of size s_i, the largest over others of

        1 - (1 - c_ij) 2 u_i u_j / (u_i + u_j),

    the cosine where all sizes are 1. What is lost when two means merge grows with the numbers they stand for (Ward's
    criterion, where it is s_i s_j / (s_i + s_j)); on a real ViT-S/14 the fourth root lost less than the sizes
    themselves, than the square root and than none. Of two tokens that are each other's nearest, the first is ranked
    below all that are not the first of such a pair: of two twins only one goes.

    More than 256 tokens are compared within n strips: runs of c tokens, at most 256 and but for the last equally many.
    The likest token of a large image is near by, and what all pairs cost beside (1 % of the GMACs of a ViT-S/14 at 518
    pixels) is better spent on merging less. Graphs whose number of tokens is a symbol compare all pairs.

    Args:
        keys: (B, N, K) unit vectors, in token order.
        size: (B, N) how many input tokens each stands for, None for one.

    Returns:
        (B, N), far below the others for the first of a pair, and for a token that is alone in its strip.
    """
    N = fixed(keys.shape[1])
    if N < 2:
        return keys.new_zeros(keys.shape[0], N)
    n = -(-N // _STRIP) if isinstance(N, int) else 1  # balanced strips of a symbol have no form that export solves
    c = -(-N // n)
    missing = n * c - N  # of the last strip
    if missing:
        keys = F.pad(keys, (0, 0, 0, missing))
        size = F.pad(size, (0, missing), value=1.0) if size is not None else None
    keys = keys.reshape(-1, c, fixed(keys.shape[2]))  # B (n c) K -> (B n) c K
    index = torch.arange(c, device=keys.device)
    # 1 - cosine, a token far from itself; in few passes over B n c c numbers
    itself = 1.0 + _FAR * torch.eye(c, dtype=keys.dtype, device=keys.device)
    distance = torch.baddbmm(itself, keys, keys.transpose(1, 2), alpha=-1.0)  # (B n) c c
    if size is not None:
        inverse = size.detach().to(keys.dtype).clamp_min(1e-6) ** -0.25  # 2 u v / (u + v) = 2 / (1 / u + 1 / v)
        inverse = inverse.reshape(-1, c)  # B (n c) -> (B n) c
        distance = distance / (0.5 * inverse.unsqueeze(2) + 0.5 * inverse.unsqueeze(1))
    if missing:
        away = F.pad(keys.new_zeros(N), (0, missing), value=_FAR).reshape(n, 1, c)  # (n c) -> n 1 c
        distance = (distance.reshape(-1, n, c, c) + away).flatten(0, 1)  # (B n) c c -> B n c c -> (B n) c c
    nearest, partner = distance.min(dim=2)
    first = (partner.gather(1, partner) == index) & (index < partner)
    found = 1.0 - nearest - _FAR * first.to(nearest.dtype)
    return found.reshape(-1, n * c)[:, :N]  # (B n) c -> B (n c) -> B N


_STRIP = 256
_FAR = 32.0  # below all others, and with little loss of precision


def order_by_redundancy(keys: Tensor, num_slots: int, size: Tensor | None = None) -> Tensor:
    """(B, N) token indices: the ``num_slots`` least redundant (the anchors) in token order, then the others.

    Args:
        keys: (B, N, K) unit vectors.
        num_slots: P.
        size: (B, N) as of :func:`redundancy`.
    """
    return order_by(redundancy(keys, size), num_slots)


def order_by(score: Tensor, num_slots: int) -> Tensor:
    """(B, N) token indices: the ``num_slots`` of least score (B, N) in token order, then the others."""
    ranked = score.topk(fixed(score.shape[1]), dim=1, largest=False).indices
    anchors = ranked[:, :num_slots].sort(dim=1).values
    return torch.cat((anchors, ranked[:, num_slots:]), dim=1)


def bipartite_order(keys: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (Bolya et al., ICLR 2023, Section 3.2): of even tokens the most similar to an odd one go.

    Args:
        keys: (B, N, K) unit vectors.
        num_slots: P, at least N // 2: only even tokens can go.

    Returns:
        (B, N) token indices, those that stay in token order, then those that go; and (B, M) the slots these go to.
    """
    N = fixed(keys.shape[1])
    gone = N - num_slots
    assert 2 * gone <= N + 1, "more go than there are even tokens"
    best, partner = _odd_partners(keys, N) if isinstance(N, int) and N > 1 else _odd_partners_of_all(keys, N)
    ranked = best.topk(N, dim=1).indices  # even tokens, the most similar first, then odd ones
    goes, to = ranked[:, :gone], partner.gather(1, ranked[:, :gone])
    stays = ranked[:, gone:].sort(dim=1).values
    slot = to - (goes.unsqueeze(1) < to.unsqueeze(2)).sum(dim=2)  # as many places lower as tokens before it go
    return torch.cat((stays, goes), dim=1), slot


def _odd_partners(keys: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """(B, N) of even tokens the similarity to the nearest odd one, and which it is; odd ones are out of reach."""
    best, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=2)  # B N/2 N/2 -> B N/2
    odd = torch.full_like(best, -4.0)
    best = torch.stack((best, odd), dim=2).flatten(1)[:, :N]  # B N/2 2 -> B N
    return best, (2 * partner + 1).repeat_interleave(2, dim=1)[:, :N]


def _odd_partners_of_all(keys: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The same of all pairs: where N is a symbol of an exported graph, halves of it would fix whether it is even."""
    index = torch.arange(N, device=keys.device)
    apart = 1 - (1 - index % 2).unsqueeze(1) * (index % 2)  # N N: 0 for an even token and an odd one
    return (keys @ keys.transpose(1, 2) - 4.0 * apart.to(keys.dtype)).max(dim=2)  # B N N -> B N
