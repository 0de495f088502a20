"""The settings of Learnable Token Merging, and the paper's own form of them as one preset."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["PAPER", "PRESETS", "MergeConfig"]

# The form the paper prints. "Eq. N" and sections are those of Wang & Yang, TPAMI 2025.
PAPER: dict[str, Any] = dict(
    compression_ratio=0.95,  # Section 3.1: one ratio, every block
    mask_form="dense",  # Section 3.1: G in R^{N x P}
    mask_softmax="tokens",  # Section 4.1: the weights of each merged token sum to 1
    first_mask="printed",  # Section 3.1: G^(1) = Softmax(f(X / tau))
    carry_mask=True,  # Eq. 2: G^(l) starts from G^(l-1)
    num_clusters=0,  # Section 3.2: as many clusters as classes
    cluster_dim=0,  # Section 3.2: clusters of the merged tokens themselves, d = D
    cluster_grid=0,  # Section 3.2: clusters in R^{P x D}, one cell per slot
    labels="true",  # Eq. 3: psi_ia needs y_i
    proportional_attention=False,  # Figure 1: attention is the plain model's
    mask_mode="batch",  # Eq. 3: one sum over the minibatch
    temperature=1.0,  # Section 3.2: phi without a temperature
    update_scale="exact",  # Eq. 3: the step 2 eta / T, not normalised
)
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}

_CHOICES = {
    "mask_form": ("anchored", "dense"),
    "mask_softmax": ("slots", "tokens"),
    "first_mask": ("anchors", "learned", "printed"),
    "map_lines": ("own", "straight", "even"),
    "mask_mode": ("sample", "batch"),
    "labels": ("posterior", "true"),
    "update_scale": ("normalized", "exact"),
}


def _error(name: str, got: object, expected: str, remedy: str) -> ValueError:
    return ValueError(f"{name}: got {got!r}, expected {expected}. {remedy}")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Every setting of Learnable Token Merging (LTM), checked on construction.

    Args:
        compression_ratio: r of Section 3.1. A block turns its N tokens into P = ceil(r N), its H x W map into
            ceil(H sqrt r) x ceil(W sqrt r). One number for all blocks, one per stage, or one per block; 1.0 means that
            this block does not merge. Of few tokens a ratio near 1 merges none: 0.95 of 19 are 19.
        merge_warmup_epochs: Epochs of plain training before merging begins (t_warm of Algorithm 1).
        num_clusters: A, clusters of merged features per block. 0: the number of classes.
        cluster_dim: d, width of the projection that is clustered and of the mask MLP. 0: the tokens themselves.
        cluster_grid: g, slots are pooled by position onto g x g cells before clustering. 0: one cell per slot.
        mask_form: ``"anchored"``: P tokens keep their slot, the other N - P are handed out (a sparse mask).
            ``"dense"``: every entry of the N x P mask is computed.
        mask_softmax: What a dense mask is normalised over. ``"slots"``: a token hands out its whole weight, then
            columns are scaled to sum to 1. ``"tokens"``: softmax over the N tokens of each slot, as in the paper.
        first_mask: ``"anchors"``: similarity to the slots' anchors. ``"learned"``: sigmoid(f(X)) / tau.
            ``"printed"``: sigmoid(f(X / tau)), as in the paper. The last two need ``mask_form="dense"``.
        carry_mask: Start a block's mask from that of the block before it (Eq. 2). An anchored mask takes over the
            update of that one block, as factors; a dense one all that went before.
        map_lines: How an anchored mask merges a map. ``"straight"``: one mask for all rows and one for all columns, so
            that lines of the image stay straight. ``"own"``: each row by a mask of its own, then each column.
            ``"even"``: straight lines whose anchors lie at even spacing.
        proportional_attention: Attention to a token is in proportion to its size, as in ToMe: blocks behind a merge add
            log sizes to the logits. For attention of all tokens to all, ViT's and MobileViT's.
        mask_mode: ``"sample"``: one mask per image. ``"batch"``: the batch's mean update, its running mean in eval.
        labels: ``"posterior"``: no labels, the expectation over the posterior that Q implies. ``"true"``: the label in
            training, as in Eq. 3 (the posterior in eval, where there is none).
        update: Apply the information-bottleneck update. ``False`` leaves anchors alone.
        update_scale: ``"normalized"``: the update's direction has unit root mean square over the refresh data.
            ``"exact"``: the step 2 eta / T of Eq. 3.
        eta: Initial step size of the update, learned per block.
        beta: Initial sharpness of the anchors' similarity, learned per block.
        tau: Temperature of the first mask, in (0, 1].
        temperature: ``"fit"``: T is fitted at each refresh so that the mean entropy of phi is half of log A.
            A number: fixed.
        momentum: Of the running mean update in ``mask_mode="batch"``, as in BatchNorm.
        ib_loss_weight: Of the IB bound in the training loss, which :class:`timm_ltm.ClusterRefresh` adds under a timm
            task, and offers as ``ib_loss`` to other loops. The authors' code has 0.1.
        ib_loss_start_epoch: Epochs of training before that. The authors' code has 30 % of them.

    Raises:
        ValueError: A setting is out of range or two settings contradict each other.
    """

    compression_ratio: float | Sequence[float] = 0.95
    merge_warmup_epochs: int = 0
    num_clusters: int = 64
    cluster_dim: int = 32
    cluster_grid: int = 4
    mask_form: str = "anchored"
    mask_softmax: str = "slots"
    first_mask: str = "anchors"
    carry_mask: bool = False
    map_lines: str = "straight"
    proportional_attention: bool = True
    mask_mode: str = "sample"
    labels: str = "posterior"
    update: bool = True
    update_scale: str = "normalized"
    eta: float = 1.0
    beta: float = 300.0
    tau: float = 0.1
    temperature: float | str = "fit"
    momentum: float = 0.1
    ib_loss_weight: float = 0.0
    ib_loss_start_epoch: int = 0

    def __post_init__(self) -> None:
        for name in ("merge_warmup_epochs", "num_clusters", "cluster_dim", "cluster_grid", "ib_loss_start_epoch"):
            if not isinstance(getattr(self, name), int):
                raise _error(name, getattr(self, name), "a whole number", "Leave it out for the default.")
        for ratio in self.ratios:
            if not (isinstance(ratio, (int, float)) and 0.0 < ratio <= 1.0):
                raise _error(
                    "compression_ratio", ratio, "numbers in (0, 1]", "Use 1.0 for a block that must not merge."
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _error(name, getattr(self, name), f"one of {choices}", "Choose one of these.")
        if self.merge_warmup_epochs < 0:
            raise _error("merge_warmup_epochs", self.merge_warmup_epochs, "0 or more", "0 merges from the start.")
        if self.num_clusters < 0 or self.num_clusters == 1:
            raise _error("num_clusters", self.num_clusters, "2 or more, or 0", "update=False does without clusters.")
        for name in ("cluster_dim", "cluster_grid", "ib_loss_weight", "ib_loss_start_epoch"):
            if not getattr(self, name) >= 0:
                raise _error(name, getattr(self, name), "0 or more", "Leave it out for the default.")
        if self.temperature != "fit" and not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise _error(
                "temperature", self.temperature, "'fit' or a number above 0", "Leave it out to have it fitted."
            )
        for name in ("beta", "tau", "eta"):
            if not getattr(self, name) > 0:
                raise _error(name, getattr(self, name), "a number above 0", "update=False turns the update off.")
        if self.tau > 1:
            raise _error("tau", self.tau, "a number in (0, 1]", "A smaller one makes the first mask sharper.")
        if not 0 < self.momentum <= 1:
            raise _error("momentum", self.momentum, "a number in (0, 1]", "0.1 is BatchNorm's.")
        if self.ib_loss_weight and not self.update:
            raise _error(
                "ib_loss_weight", self.ib_loss_weight, "0 with update=False", "Without it, nothing is clustered."
            )
        if self.carry_mask and not self.update and self.first_mask == "anchors":
            raise _error("carry_mask", True, "False with update=False", "Anchors are found anew in each block.")
        if self.mask_form == "anchored" and self.first_mask != "anchors":
            raise _error("first_mask", self.first_mask, "'anchors' with mask_form='anchored'", "Set mask_form='dense'.")
        if self.mask_form == "anchored" and self.mask_softmax != "slots":
            raise _error(
                "mask_softmax", self.mask_softmax, "'slots' with mask_form='anchored'", "Set mask_form='dense'."
            )

    @property
    def keeps_q(self) -> bool:
        """Whether anything reads log Q with the label: its size depends on the number of classes."""
        return self.labels == "true" or self.ib_loss_weight > 0

    @property
    def ratios(self) -> tuple[float, ...]:
        """The given ratios, one entry if one was given."""
        ratio = self.compression_ratio
        return tuple(ratio) if isinstance(ratio, Sequence) and not isinstance(ratio, str) else (ratio,)

    def ratios_for(self, depths: Sequence[int]) -> tuple[float, ...]:
        """One ratio for each block of a model.

        Args:
            depths: Blocks of each stage; of a model without stages, one number.

        Raises:
            ValueError: The number of ratios is neither 1, nor that of stages, nor that of blocks.
        """
        ratios, blocks = self.ratios, sum(depths)
        if len(ratios) == 1:
            return ratios * blocks
        if len(ratios) == blocks:
            return ratios
        if len(ratios) == len(depths):
            return tuple(ratio for ratio, depth in zip(ratios, depths, strict=True) for _ in range(depth))
        stages = f", {len(depths)}, one per stage," if len(depths) > 1 else ""
        raise _error(
            "compression_ratio",
            f"{len(ratios)} ratios",
            f"one number{stages} or {blocks}, one per block",
            "Use 1.0 for blocks that must not merge.",
        )

    @classmethod
    def from_kwargs(cls, preset: str = "default", **kwargs: Any) -> MergeConfig:
        """The settings of a preset, overridden by ``kwargs``."""
        if preset not in PRESETS:
            raise _error("preset", preset, f"one of {tuple(PRESETS)}", "Choose one of these.")
        return cls(**{**PRESETS[preset], **kwargs})


def num_slots(num_tokens: int, ratio: float) -> int:
    """P = ceil(r N) (Section 3.1), immune to r N being a rounding error above a whole number.

    Raises:
        ValueError: There is not one slot.
    """
    slots = math.ceil(ratio * num_tokens - 1e-6)
    if slots < 1 and not torch.jit.is_scripting():
        raise _error("compression_ratio", ratio, f"at least one slot of {num_tokens} tokens", "Raise the ratio.")
    return slots
