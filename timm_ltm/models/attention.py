"""timm's attention of sequences, that also tells its keys, which no hook of timm's gives before they are rotated.

One letter per axis: B batch, h heads, N tokens, K width of a head.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat, maybe_add_mask
from timm.models import beit
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from timm_ltm.reduction import Seen, Tokens
from timm_ltm.reduction.tokens import at_least_float32, unflatten

__all__ = ["attend", "has_keys", "tells_attention"]

_KNOWN = (Attention, AttentionRope, EvaAttention, beit.Attention)


def has_keys(attn: nn.Module) -> bool:
    """Whether keys can be read of this attention: it is one of timm's, or has a fused projection of linear keys."""
    return type(attn) in _KNOWN or getattr(attn, "qkv", None) is not None


def tells_attention(attn: nn.Module) -> bool:
    """Whether the attention that tokens receive can be read: of timm's own."""
    return type(attn) in _KNOWN


def attend(
    attn: nn.Module,
    x: Tensor,
    bias: Tensor | None = None,
    rope: Tensor | None = None,
    prefix: int = 0,
    wanted: frozenset[str] = frozenset({"keys"}),
    tokens: Tokens | None = None,
) -> tuple[Tensor, Seen]:
    """timm's attention of x (B, N, D), and what a reducer may read of it.

    Args:
        attn: timm's module.
        x: (B, N, D).
        bias: Added to the logits, (B, 1, 1, N).
        rope: Rotary positions of the tokens behind the prefix, as timm's attention takes them.
        prefix: Tokens in front whose keys are not wanted.
        wanted: ``"attention"`` costs the fused kernel; keys are free.
        tokens: What is known of them: the queries of those that are masked do not count in the attention received.

    Returns:
        (B, N, D), and keys and attention received of the N - prefix.
    """
    if type(attn) not in _KNOWN:
        k = attn.qkv(x.detach()).chunk(3, dim=2)[1].detach()
        positions = {} if rope is None else {"rope": rope}
        return attn(x, attn_mask=bias, **positions), Seen(unflatten(k, 2, (attn.num_heads, -1)).mean(dim=2)[:, prefix:])
    q, k, v = _project(attn, x)
    keys = k.detach().mean(dim=1)[:, prefix:]
    if rope is not None:
        half, n = getattr(attn, "rotate_half", False), attn.num_prefix_tokens
        q, k = (
            torch.cat((t[:, :, :n], apply_rot_embed_cat(t[:, :, n:], rope, half=half)), dim=2).type_as(v)
            for t in (q, k)
        )
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    received: Tensor | None = None
    if attn.fused_attn and "attention" not in wanted:
        y = F.scaled_dot_product_attention(q, k, v, bias, attn.attn_drop.p if attn.training else 0.0)
    else:
        weights = maybe_add_mask(q * attn.scale @ k.transpose(-2, -1), bias).softmax(dim=-1)  # B h N N
        if "attention" in wanted:
            received = _received(weights, None if tokens is None else tokens.unmasked(prefix))[:, prefix:]
        y = attn.attn_drop(weights) @ v
    y = y.transpose(1, 2).flatten(2)  # B h N K -> B N (h K)
    y = attn.norm(y) if hasattr(attn, "norm") else y
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), Seen(keys, attention=received)


def _received(weights: Tensor, asking: Tensor | None) -> Tensor:
    """(B, N): what each token receives of attention (B, h, N, N), the mean over heads and the queries that count."""
    weights = weights.mean(dim=1, dtype=at_least_float32(weights).dtype)
    if asking is None:
        return weights.mean(dim=1)
    return (weights * asking.unsqueeze(2)).sum(dim=1) / asking.sum(dim=1, keepdim=True)


def _project(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, h, N, K), normalised where timm's are."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = qkv.chunk(3, dim=2)
    heads = getattr(attn, "num_kv_heads", attn.num_heads)
    q = unflatten(q, 2, (attn.num_heads, -1)).transpose(1, 2)  # B N (h K) -> B h N K
    k, v = (unflatten(t, 2, (heads, -1)).transpose(1, 2) for t in (k, v))
    return (attn.q_norm(q), attn.k_norm(k), v) if hasattr(attn, "q_norm") else (q, k, v)
