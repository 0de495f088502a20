"""LTMP: 'Learned Thresholds Token Merging and Pruning for Vision Transformers', Bonnaerens & Dambre, TMLR 2023.

Written from the paper. In every block, between attention and MLP, two learned thresholds decide for each image how many
of its tokens go:

1. Merging. Tokens are split in alternation, as by ToMe; one of the first half whose keys' cosine to the nearest one of
   the other half is above theta_m is averaged into it, weighted by size.
2. Pruning. Of those left, a token goes that receives less attention than theta_p, the mean over heads and queries.

While training, tokens are masked and not dropped. A token's mask m is the product over all blocks so far of sigmoid(
(theta_m - cosine) / tau) and sigmoid((attention - theta_p) / tau), both cut at 0.5 with the gradient of what was cut
(straight-through); attention is exp(A) m, renormalised. The loss is

    CE + lambda (r_FLOPs - r_target)^2,
    r_FLOPs = mean over blocks of (2 m' n d^2 + (m' n)^2 d + 4 m n d^2) / (6 n d^2 + n^2 d),

with n tokens of width d, m' and m the shares of them that enter a block and that leave it. Over and under the line is
half of a block's multiply-adds, 4 m' n d^2 + 2 (m' n)^2 d of attention and 8 m n d^2 of an MLP four times as wide; the
prefix, the patches' projection and the head are left out. It is taken per image, then averaged: a mean of squares.

In eval tokens are dropped, of a batch to the length of its longest image, and what fills up the others counts nothing.
Graphs have fixed shapes: compiled, exported or traced, and on "meta", a model masks in eval too, with the same output
and no saving.

What the paper leaves open: attention is in proportion to the number of tokens merged, as in ToMe, by which exp(A) m is
multiplied; a query that is masked does not count in the attention that others receive, as it is not there in eval; what
is compared with the thresholds has no gradient, only the thresholds have; the most attended token always stays. For
dense outputs a pruned token is put back as the token left whose keys are most like its own.

One letter per axis: B batch, N tokens, P slots, M tokens that are merged away, D width, K width of the keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from timm_ltm.reduction.matching import unit_vectors
from timm_ltm.reduction.reducer import Reducer, Seen, Site, recomputing, register_method
from timm_ltm.reduction.settings import Config, check_flag, check_number, setting_error
from timm_ltm.reduction.tokens import Tokens, at_least_float32, fixed, no_autocast, one_hot, shapes_are_fixed, take

__all__ = ["LTMP", "LTMPConfig", "ThresholdMask", "calibrate", "flops_ratio"]

TARGET = 0.8  # r_target, where none is told: what other methods' default schedules cost
TAU = 0.1
THRESHOLDS = 0.9, 0.0  # of merging and pruning, before training


@dataclasses.dataclass(frozen=True)
class LTMPConfig(Config):
    """The settings of LTMP. Of those that all methods share, ``compression_ratio`` makes no sense: images differ.

    Args:
        gmacs: r_target, the share of the plain model's cost that training aims at; 0.8 if not given. Nothing is found
            from the shapes: before training or :func:`calibrate` a model merges tokens whose keys' cosine is above
            0.9, which in some models are few and in others (DINOv2's, whose keys share a large part) nearly all.
            1.0 means no thresholds.
        budget_weight: lambda, of the budget in the training loss.
        freeze: Everything but the thresholds is frozen, as in the paper: of a converted model also the given one's
            parameters, which it shares. Checkpoints do not carry this.
    """

    budget_weight: float = 10.0
    freeze: bool = False
    unsaved: ClassVar[tuple[str, ...]] = ("freeze",)
    trains_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.compression_ratio is not None:
            raise setting_error(
                "compression_ratio",
                self.compression_ratio,
                "none: thresholds leave a number of tokens that depends on the image",
                "Use gmacs, the share of the cost that training aims at.",
            )
        super().__post_init__()
        self._set("budget_weight", check_number("budget_weight", self.budget_weight, 0.0, at_least=True))
        check_flag("freeze", self.freeze)

    def amounts(self, depths: Sequence[int], default: Sequence[float]) -> tuple[float, ...]:
        """r_target of every block, which has thresholds unless it is 1."""
        return (TARGET if self.gmacs is None else self.gmacs,) * sum(depths)

    def setting_of(self, amounts: Sequence[float]) -> dict[str, Any]:
        return {"gmacs": amounts[0]}


class ThresholdMask(NamedTuple):
    """Slots are tokens: all of them, some masked, or those that stay and, to fill up, some that do not.

    Attributes:
        index: (B, P) the token that each slot is.
        own: (B, P) its weight there.
        goes: (B, M) tokens that are merged away.
        to: (B, M) the slots they go to.
        rest: (B, M) their weights there, 0 for what only fills up.
        slot: (B, N) the slot that each token is put back from.
        size: (B, P) how many input tokens are, 0 for a slot that is not there.
        weight: (B, P) how many tokens attention counts each slot as.
        merged: (B, P) the number of tokens merged in each, masked or not.
    """

    index: Tensor
    own: Tensor
    goes: Tensor
    to: Tensor
    rest: Tensor
    slot: Tensor
    size: Tensor
    weight: Tensor
    merged: Tensor
    linear = True
    keeps_own = True

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """G^T x: (B, num_prefix + N, D) -> (B, num_prefix + P, D), the prefix passed through."""
        assert parts == 1, "patches of several pixels are of stages"
        prefix, x = x[:, :num_prefix], x[:, num_prefix:]
        shares = one_hot(self.to, fixed(self.own.shape[1]), x.dtype) * self.rest.unsqueeze(2).to(x.dtype)  # B M P
        kept = take(x, self.index) * self.own.unsqueeze(2).to(x.dtype)
        return torch.cat((prefix, kept.baddbmm(shares.transpose(1, 2), take(x, self.goes))), dim=1)

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B, P, D) -> (B, N, D), a lookup."""
        assert parts == 1, "patches of several pixels are of stages"
        return take(x, self.slot)

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.index

    def dense(self) -> Tensor:
        """G (B, N, P), columns sum to 1."""
        N, P = fixed(self.slot.shape[1]), fixed(self.own.shape[1])
        own = one_hot(self.index, N, self.own.dtype) * self.own.unsqueeze(2)  # B P N
        rest = one_hot(self.to, P, self.rest.dtype) * self.rest.unsqueeze(2)  # B M P
        return own.transpose(1, 2) + one_hot(self.goes, N, self.rest.dtype).transpose(1, 2) @ rest

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return one_hot(self.slot, fixed(self.own.shape[1]), self.own.dtype)


@register_method("ltmp")
class LTMP(Reducer):
    """Thresholds of one block, for sequences of tokens.

    Attributes:
        merge_threshold: theta_m.
        prune_thousandths: 1000 theta_p. One learning rate, 5e-3 with Adam, whose steps have the size of the rate
            whatever a parameter is measured in, is then the paper's for both, 5e-3 and 5e-6.
        share: (B,) this block's part in r_FLOPs, of the images of the last forward pass, see :func:`flops_ratio`.
    """

    Config = LTMPConfig
    needs = frozenset({"keys", "attention"})
    by_image = True
    adds_loss = True
    untended = "nothing keeps it to its budget"
    share: Tensor | None = None

    def __init__(
        self, site: Site, amount: float, config: LTMPConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(site, amount, config, device, dtype)
        self.merge_threshold = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.prune_thousandths = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Thresholds before training: merging at cosines above 0.9, and no pruning."""
        with torch.no_grad():
            self.merge_threshold.fill_(THRESHOLDS[0])
            self.prune_thousandths.fill_(1000.0 * THRESHOLDS[1])

    @classmethod
    def weighs(cls, config: LTMPConfig) -> bool:
        return True

    def num_slots(self, num_tokens: int) -> int:
        """All tokens, of an image of which none goes."""
        return num_tokens

    @classmethod
    def planted(cls, model: nn.Module, config: LTMPConfig) -> None:
        if config.freeze:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for reducer in _reducers(model):
                for parameter in reducer.parameters():
                    parameter.requires_grad_(True)

    @classmethod
    def training_loss(cls, shown: list[Tensor], config: LTMPConfig) -> Tensor:
        """lambda (r_FLOPs - r_target)^2, r_FLOPs the mean over blocks and the batch's images."""
        target = TARGET if config.gmacs is None else config.gmacs
        return config.budget_weight * (torch.stack(shown).mean() - target).square()

    def carry(self, z: Tensor, tokens: Tokens, mask: ThresholdMask) -> Tensor:
        """What each token would count as, were it not masked: attention's gradient at m = 0 is exp(A) times that."""
        return mask.merged

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> ThresholdMask:
        assert seen.keys is not None, "tokens are compared by attention keys"
        assert seen.attention is not None, "tokens are pruned by attention"
        with no_autocast(z):
            keys, attention = (at_least_float32(t.detach()) for t in (seen.keys, seen.attention))
            return self._mask(unit_vectors(keys), attention, tokens)

    def _mask(self, unit: Tensor, attention: Tensor, tokens: Tokens) -> ThresholdMask:
        B, N = unit.shape[0], fixed(unit.shape[1])
        merged = tokens.size if tokens.carried is None else tokens.carried
        before = torch.ones_like(merged) if tokens.weight is None else tokens.weight / merged  # m of the blocks before
        index = torch.arange(N, device=unit.device).expand(B, -1)

        # Merging: of the tokens that are there, those in even places with those in odd ones
        there = before > 0.5
        odd = there & (there.long().cumsum(dim=1) % 2 == 0)  # the first is counted 1, and in an even place
        similarity = unit @ unit.transpose(1, 2)  # B N N
        best, partner = similarity.masked_fill(~odd.unsqueeze(1), -4.0).max(dim=2)
        can_go = there & ~odd & odd.any(dim=1, keepdim=True)
        kept = torch.where(can_go, self._keeps(at_least_float32(self.merge_threshold) - best), 1.0)
        goes = kept < 0.5
        left = there & ~goes

        # Pruning
        top = index == attention.masked_fill(~left, -1.0).argmax(dim=1, keepdim=True)
        enough = self._keeps(attention - at_least_float32(self.prune_thousandths) / 1000.0)
        after = before * kept * torch.where(left & ~top, enough, 1.0)
        stays = after > 0.5
        self._count(before, after, tokens.size.sum(dim=1))

        # Averages, and where everything is put back from
        into = one_hot(partner, N, merged.dtype) * goes.unsqueeze(2)  # B N N
        total = merged + (merged.unsqueeze(1) @ into).squeeze(1)
        nearest = similarity.masked_fill(~stays.unsqueeze(1), -4.0).argmax(dim=2)
        back = torch.where(left & ~stays, nearest, index).gather(1, torch.where(goes, partner, index))
        size = (tokens.size.unsqueeze(1) @ one_hot(back, N, merged.dtype)).squeeze(1)
        own = torch.where(goes, 1.0, merged / total)
        rest = torch.where(goes, merged / total.gather(1, partner), 0.0)
        weight = total.detach() * after
        if self.training:  # where no attention follows, thresholds have gradients too, of zero
            own = own + 0.0 * (self.merge_threshold + self.prune_thousandths)
        if self.training or shapes_are_fixed(unit):
            return ThresholdMask(index, own, index, partner, rest, back, size, weight, total)

        # Dropping: slots in token order
        place = (stays.cumsum(dim=1) - 1).clamp_min(0)
        goes = goes & stays.gather(1, partner)  # what a pruned token was made of is not needed
        own, rest = torch.where(stays, own, 1.0), torch.where(goes, rest, 0.0)
        index, goes = _first(stays), _first(goes)
        own, size, weight, total = (t.gather(1, index) for t in (own, size, weight, total))
        rest = rest.gather(1, goes)
        to = place.gather(1, partner.gather(1, goes))
        return ThresholdMask(index, own, goes, to, rest, place.gather(1, back), size, weight, total)

    def _keeps(self, margin: Tensor) -> Tensor:
        """Which are at 0 or above it: 1 or 0; while training with the gradient of sigmoid(margin / tau)."""
        hard = (margin >= 0).to(margin.dtype)
        if not self.training:
            return hard
        soft = (margin / TAU).sigmoid()
        return hard + (soft - soft.detach())

    def _count(self, before: Tensor, after: Tensor, n: Tensor) -> None:
        """The part of this block in r_FLOPs (B,), of masks m' and m (B, N) of n (B,) tokens, over n d."""
        d, before, after = self.site.dim, before.sum(dim=1), after.sum(dim=1)
        share = (2 * before * d + before.square() + 4 * after * d) / (6 * n * d + n.square())
        if self.training and self.observer is not None and not recomputing():
            self.observer.features = share.unsqueeze(1)
        if not shapes_are_fixed(share) and not recomputing():
            self.share = share.detach()


def _first(chosen: Tensor) -> Tensor:
    """(B, P): the tokens chosen of (B, N), in order, as many as an image has at most; others fill up."""
    P = int(chosen.sum(dim=1).max())
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :P]


def _reducers(model: nn.Module) -> Iterator[LTMP]:
    return (module for module in model.modules() if isinstance(module, LTMP))


def flops_ratio(model: nn.Module) -> Tensor:
    """r_FLOPs of each image (B,) of the last forward pass of a model that merges by LTMP, not compiled.

    Raises:
        ValueError: There was none, or the model has no thresholds.
    """
    shares = [reducer.share for reducer in _reducers(model)]
    if not shares or any(share is None for share in shares):
        got = "none" if not shares else "no forward pass that merged"
        raise ValueError(f"model: got {got}, expected blocks with thresholds and images run. Run the model on some.")
    return torch.stack(shares).mean(dim=0)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, gmacs: float | None = None, steps: int = 14) -> float:
    """Meet a budget without training, on images without labels: one merging threshold for all blocks, by bisection.

    Pruning thresholds stay as they are. In the paper each block learns its own.

    Args:
        model: That merges by LTMP.
        images: (B, C, H, W), some dozens of those it is made for.
        gmacs: r_target; the model's own if not given.
        steps: Of the bisection of cosines from -1 to 1.

    Returns:
        r_FLOPs of these images, not above the target.

    Raises:
        ValueError: Even with everything merged, the model costs more; its thresholds are then as they were.
    """
    reducers = list(_reducers(model))
    if not reducers:
        raise ValueError("model: got one without thresholds, expected one that merges by ltmp. Convert it before.")
    target = reducers[0].amount if gmacs is None else check_number("gmacs", gmacs, 0.0, 1.0)
    before = [reducer.merge_threshold.clone() for reducer in reducers]

    def costs(threshold: float) -> float:
        for reducer in reducers:
            reducer.merge_threshold.fill_(threshold)
        model(images)
        return float(flops_ratio(model).mean())

    with _evaluating(model):
        low, high = -1.001, 1.001
        found = costs(low)
        if found > target:
            for reducer, threshold in zip(reducers, before, strict=True):
                reducer.merge_threshold.copy_(threshold)
            raise ValueError(f"gmacs: got {target}, expected at least {found:.3f}, which merges all. Use more.")
        for _ in range(steps):
            middle = (low + high) / 2
            cost = costs(middle)
            low, high, found = (middle, high, cost) if cost <= target else (low, middle, found)
        costs(low)
    return found


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval within; not by ``eval()``, which ends an epoch of training."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
