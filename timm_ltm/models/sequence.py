"""What reducing models share whose tokens are a sequence: ViT, EVA, BEiT."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from timm.models import eva, get_pretrained_cfg, vision_transformer
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_ltm.models.attention import has_keys, tells_attention
from timm_ltm.models.base import ReducedModel
from timm_ltm.models.block import run_block
from timm_ltm.reduction import Reducer, Seen, Tokens
from timm_ltm.reduction.settings import num_slots

__all__ = ["SequenceModel"]

# timm's function is a leaf of FX graphs where timm's own forward pass is traced, but not where ours calls it. What is
# written is FX's table of leaves, which goes by the module that calls wrap; timm's modules are not
for _module in (vision_transformer, eva):
    assert hasattr(_module, "resample_abs_pos_embed"), "timm's positions are resized by another function"
    exec("torch.fx.wrap('resample_abs_pos_embed')", vars(_module))


@torch.fx.wrap  # FX's placeholders are not masks
def no_attention_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError if attention is asked to be masked."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask or is_causal: got one with merging on, expected neither: a mask over N tokens does not fit "
            "merged ones. Call model.set_merging(False) first."
        )


def declining(depth: int, tokens: int, merging: range, decline: float) -> Callable[[float], tuple[float, ...]]:
    """Merges in some blocks, in each fewer tokens than in the one before, and half of what is left in the last block.

    Args:
        depth: Of the model.
        tokens: N at the model's input size.
        merging: Blocks that merge, beside the last.
        decline: q, a block i merges tokens in proportion to q^i.

    Returns:
        Ratios by strength, the share of the N tokens that go in front of the last block.
    """

    def ratios(strength: float) -> tuple[float, ...]:
        share = min(strength, _MOST)  # beyond it no more tokens go, but earlier
        q = decline * share / strength if strength else decline
        parts = [q**i if i in merging else 0.0 for i in range(depth - 1)]
        whole = sum(parts) or 1.0
        behind = [sum(parts[: i + 1]) / whole for i in range(depth - 1)]
        left = [max(tokens - int(share * tokens * part), 1) for part in behind]
        left.append(math.ceil(left[-1] * max(0.5, 1.0 - 4.0 * strength)) if left else tokens)
        return _ratios(tokens, left)

    return ratios


def _ratios(tokens: int, left: list[int]) -> tuple[float, ...]:
    """Of N tokens and the numbers that blocks leave."""
    return tuple(1.0 if n == m else m / n for n, m in zip([tokens, *left], left, strict=False))


_MOST = 0.95  # of the tokens that may go: a single one that is left is far from the plain model
_LATE_FROM = 0.77  # share of the GMACs, below which merging late is farther from the ViT-S/14 too
_HEADLESS = "orig_in21k"  # timm's tag of supervised weights that lack their head


class SequenceModel(ReducedModel):
    """Mixin of models with ``blocks`` over tokens (B, prefix + N, D). The family writes :meth:`embed`.

    What comes out has timm's shapes: tokens that were merged are put back where they came from.
    """

    block_class: type[nn.Module]
    plain_block: type[nn.Module]
    rotates: bool = False
    default: tuple[float, float] = 0.8, 0.4  # without a budget: this share's schedule, and its strength
    gives = frozenset(Seen._fields)

    @classmethod
    def check(cls, model: nn.Module) -> None:
        for i, block in enumerate(model.blocks):
            if type(block) is not cls.plain_block:
                raise ValueError(
                    f"blocks.{i}: got {type(block).__name__}, expected timm's {cls.plain_block.__name__}: merging goes "
                    "between attention and MLP, where this block has no such place. Use another model."
                )
            if not has_keys(block.attn):
                raise ValueError(
                    f"blocks.{i}.attn: got {type(block.attn).__name__}, expected one whose keys can be read. Use "
                    "timm's Attention."
                )

    @property
    def rotary(self) -> bool:
        return self.rotates and self.rope is not None

    def _check_method(self, cls: type[Reducer]) -> None:
        super()._check_method(cls)
        if not cls.anchored and self.rotary:
            raise ValueError(
                f"method: got {cls.method} ({cls.__name__}) for a model with rotary positions, expected one whose "
                "merged tokens have the place of one token each. Use another method, form or model."
            )

        tells = all(tells_attention(block.attn) for block in self.blocks)
        if "attention" in cls.needs and not tells:
            raise ValueError(
                f"method: got {cls.method}, which reads attention, for blocks whose attention is not timm's own, "
                "expected one that does not. Use another method."
            )

    @property
    def input_tokens(self) -> int:
        """N in front of the first block, at the model's input size."""
        return self.patch_embed.num_patches

    def depths(self) -> list[int]:
        return [len(self.blocks)]

    def default_ratios(self) -> tuple[float, ...]:
        share, strength = (0.8, 0.48) if self._merges_late() else self.default
        return self.path_for(share, None)(strength)

    def _merges_late(self) -> bool:
        """timm's name is of weights that were trained without classes: DINO, DINOv2, DINOv3, MAE, SigLIP and others.

        By timm's registry: what a model carries is rewritten with its head.
        """
        own = getattr(self, "pretrained_cfg", None) or {}
        architecture = own.get("architecture") or ""
        found = (get_pretrained_cfg(name, True) for name in (f"{architecture}.{own.get('tag')}", architecture))
        cfg = next((cfg for cfg in found if cfg is not None), None)
        return cfg is not None and cfg.num_classes == 0 and cfg.tag != _HEADLESS

    def path_for(self, share: float, schedule: str | None) -> Callable[[float], tuple[float, ...]]:
        """In few blocks while little merges, as each merge has a fixed cost, else in all but the first, at last in all.

        Below 0.7 later blocks merge fewer tokens, the more so the smaller the budget: enough tokens then reach the end.
        Nearer to the plain model than the same number in every block, on a real self-supervised ViT-S/14 and on small
        supervised ViTs. ``"late"`` is nearer to the first from 0.77 on, and farther from the second.
        """
        depth, tokens = len(self.blocks), self.input_tokens
        if schedule == "flat":
            return self.path_of([1.0] * depth)
        if schedule is None and share >= _LATE_FROM and self._merges_late():
            schedule = "late"
        first, step, decline = int(share > 0.4), 1, 1.0 - max(0.725 - share, 0.0) * 2 / 3
        if schedule == "late":  # at 0.80 behind a third of the blocks, at 0.6 in the first
            first, step, decline = math.ceil(depth * (share - 0.6) * 5 / 3 - 0.25), 2, 1.0
        elif share >= 0.7:  # behind a sixth of the blocks
            first, step = round(depth / 6 * min((share - 0.5) / 0.27, 1.0)), 2
        return declining(depth, tokens, range(min(max(first, 0), max(depth - 2, 0)), depth - 1, step), decline)

    def parts_of(self, amounts: Sequence[float]) -> list[float]:
        left = [self.input_tokens]
        for amount in amounts:
            left.append(num_slots(left[-1], amount))
        return [float(n - m) for n, m in pairwise(left)]

    def path_of(self, parts: Sequence[float]) -> Callable[[float], tuple[float, ...]]:
        tokens, behind = self.input_tokens, [sum(parts[: i + 1]) / sum(parts) for i in range(len(parts))]
        return lambda strength: _ratios(tokens, [max(tokens - int(strength * tokens * part), 1) for part in behind])

    def adopt(self) -> None:
        for block in self.blocks:
            block.__class__ = self.block_class

    def plan(self, put: Callable[..., Any]) -> None:
        tokens = self.input_tokens
        for block in self.blocks:
            tokens = put(block, self.embed_dim, tokens)

    def embed(self, x: Tensor) -> tuple[Tensor, Tokens, list[Any]]:
        """timm's steps in front of the blocks: features (B, prefix + N, D), tokens, and arguments for each block."""
        raise NotImplementedError

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """(H, W) of the patches of images x."""
        return self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

    def forward_blocks(self, x: Tensor, observe: bool = False, keep: bool = False) -> tuple[Tensor, Tokens]:
        """Merged features (B, prefix + P, D) behind the last block, before the norm, and tokens.

        Args:
            x: Images.
            observe: Merge nothing, only let reducers look (warm-up).
            keep: Keep what putting back needs.
        """
        self._check_tended()
        x, tokens, arguments = self.embed(x)
        tokens = tokens._replace(kept=() if keep else None)
        for block, given in zip(self.blocks, arguments, strict=True):
            x, tokens = run_block(block, x, tokens, self.grad_checkpointing, observe, **given)
        return x, tokens

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's: tokens that were merged are put back where they came from."""
        if self.merging:
            no_attention_mask(attn_mask, is_causal)
            x, tokens = self.forward_blocks(x, keep=True)
            return self.norm(_put_back(tokens, x, self.num_prefix_tokens))
        if self._observes() and attn_mask is None and not is_causal:
            return self._keep_parameters_in_graph(self.norm(self.forward_blocks(x, observe=True)[0]))
        x = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        return self._keep_parameters_in_graph(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's. What the head does not read is not put back."""
        if not self.merging:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        no_attention_mask(attn_mask, is_causal)
        reads_all = getattr(self, "attn_pool", None) is not None or getattr(self, "pool_include_prefix", False)
        reads_all = reads_all or self.global_pool != "token"
        x, tokens = self.forward_blocks(x, keep=reads_all)
        if reads_all:
            x = _put_back(tokens, x, self.num_prefix_tokens)
        return self.forward_head(self.norm(x))

    def forward_merged(self, x: Tensor) -> tuple[Tensor, Tokens]:
        """Merged tokens as they are, for what wants few: features (B, prefix + P, D), normalised as timm's, and tokens.

        ``tokens.size`` (B, P) says how many patches each of the P stands for, ``tokens.anchor`` (B, P) at which patch
        of the grid ``tokens.start`` (H, W) it lies, ``tokens.unmerge(x, num_prefix)`` puts them back. Merges whether
        merging is on or not.
        """
        x, tokens = self.forward_blocks(x)
        return self.norm(x), tokens

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """timm's; tokens that were merged are put back where they came from."""
        no_mask = not self.merging and kwargs.get("attn_mask") is None and not kwargs.get("is_causal", False)
        observe = no_mask and self._observes()
        if not self.merging and not observe:
            return super().forward_intermediates(
                self._keep_parameters_in_graph(x), indices, return_prefix_tokens=return_prefix_tokens, norm=norm,
                stop_early=stop_early, output_fmt=output_fmt, intermediates_only=intermediates_only, **kwargs,
            )  # fmt: skip
        no_attention_mask(kwargs.get("attn_mask"), kwargs.get("is_causal", False))
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'. Use one of these.")
        taken, last = feature_take_indices(len(self.blocks), indices)
        grid, prefix = self.grid_of(x), self.num_prefix_tokens
        self._check_tended()
        x, tokens, arguments = self.embed(x)
        tokens = tokens._replace(kept=())
        maps, prefixes = [], []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x, tokens = run_block(block, x, tokens, self.grad_checkpointing, observe, **arguments[i])
            if i in taken:
                y = _put_back(tokens, x, prefix)
                y = self.norm(y) if norm else y
                prefixes.append(y[:, :prefix])
                y = y[:, prefix:]
                maps.append(y if output_fmt == "NLC" else y.transpose(1, 2).unflatten(2, grid).contiguous())
        final = None if intermediates_only else self.norm(_put_back(tokens, x, prefix))
        if kwargs.get("output_dict"):
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": final}
        if return_prefix_tokens and prefix:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (final, maps)


@torch.fx.wrap
def _put_back(tokens: Tokens, x: Tensor, prefix: int) -> Tensor:
    return tokens.put_back(x, prefix)
