"""Does LTM's learned part pay, in which form? Forms of it as a method ``learned``, through examples/compare.py.

    python benchmarks/learned.py DATA --model vit_small_patch14_dinov2 --img-size 112 --checkpoint WEIGHTS \\
        --budget 0.5 --clusters 1500 --merge ltm update=False --merge learned step=residual eta=3

All of compare.py's options, its tables, paired intervals and seeds. Settings of ``learned`` beside those of ``ltm``:

    step         mlp: MLP(Z) of Eq. 3, which starts from random numbers; residual: Z + MLP(Z), so that the first step is
                 the gradient's
    eta          the step's size at first, of unit gradients
    direction    clusters: the gradient; constant: learned numbers in its place, the same for every image
    acts_on      both; weights: how much tokens count; destinations: where they go; order: which tokens are anchors
                 (nothing is learned: an order has no gradient)
    first_block  the update acts from that block on
    metric       not 0: keys are compared behind a learned residual projection; its gradient is that of a softmax of so
                 many times the cosine, while destinations stay hard
    metric_dim   width of a head

With --clusters, by block of each ``learned``: what clusters tell of labels of other images, the share of tokens whose
destination the update changes (of anchors, where it acts on the order), and the weight that it moves within slots (half
the sum of absolute differences, per slot).

With --information N, of every model as its first seed left it, the plain one too: IB loss and IB bound by block and of
the whole model (Table 5 of the paper), on N test images.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_ltm.cli.common import as_table, write_csv
from timm_ltm.information import information
from timm_ltm.methods.ltm import LTM, LTMConfig
from timm_ltm.methods.ltm.anchors import in_slots
from timm_ltm.reduction.lines import Line
from timm_ltm.reduction.masks import HardMask, Mask, SoftMask, hard_mask, soft_mask
from timm_ltm.reduction.matching import order_by, redundancy
from timm_ltm.reduction.reducer import Seen, Site, register_method
from timm_ltm.reduction.settings import check_number, check_whole, setting_error
from timm_ltm.reduction.tokens import Tokens, at_least_float32, no_autocast, one_hot, take

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import compare

CHOICES = {
    "step": ("mlp", "residual"),
    "direction": ("clusters", "constant"),
    "acts_on": ("both", "weights", "destinations", "order"),
}
TIE = 0.01  # of a cosine, that one deviation of the update is worth in the order of redundancy


@dataclasses.dataclass(frozen=True)
class LearnedConfig(LTMConfig):
    """See the top of this file."""

    step: str = "mlp"
    eta: float = 1.0
    direction: str = "clusters"
    acts_on: str = "both"
    first_block: int = 0
    metric: float = 0.0
    metric_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise setting_error(name, getattr(self, name), f"one of {choices}", "Choose one of these.")
        self._set("eta", check_number("eta", self.eta, -math.inf))
        self._set("first_block", check_whole("first_block", self.first_block, 0))
        self._set("metric", check_number("metric", self.metric, 0.0, at_least=True))
        self._set("metric_dim", check_whole("metric_dim", self.metric_dim, 1))
        if self.metric and self.acts_on != "both":
            raise setting_error("acts_on", self.acts_on, "'both' with a metric", "Leave out one of them.")


class Learned(LTM):
    """LTM with its learned part in other forms.

    Attributes:
        moved: Where it is a list: of every forward pass the share of changed destinations, and the weight moved.
    """

    Config = LearnedConfig
    moved: list[tuple[float, float]] | None = None

    def __init__(
        self, site: Site, amount: float, config: LearnedConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(site, amount, config, **dd)
        if config.update and config.direction == "constant":
            self.constant = nn.Parameter(torch.empty(self.num_cells, self.cluster_dim, **dd))
        if config.metric:
            self.metric = nn.Parameter(torch.empty(config.metric_dim, config.metric_dim, **dd))
        self._reset_further()

    def reset_parameters(self) -> None:
        """Initial values: LTM's, and no metric yet."""
        super().reset_parameters()
        self._reset_further()

    def _reset_further(self) -> None:
        if self.config.update:
            nn.init.constant_(self.eta, self.config.eta)
        if hasattr(self, "constant"):
            nn.init.normal_(self.constant)
        if hasattr(self, "metric"):
            nn.init.zeros_(self.metric)

    # The step

    def _step(self, values: Tensor) -> Tensor:
        step = super()._step(values)
        return step if self.config.step == "mlp" else at_least_float32(values) / self.cluster_dim + step

    def _direction(self, values: Tensor, tokens: Tokens) -> Tensor:
        found = super()._direction(values, tokens)
        return found if self.config.direction == "clusters" else self.constant.expand_as(found)

    def advice(self, z: Tensor, tokens: Tokens) -> Tensor | None:
        advice = super().advice(z, tokens)
        return advice if advice is None or self.site.index >= self.config.first_block else 0.0 * advice

    # What it acts on

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> Mask:
        if self.config.metric:
            if seen.keys.shape[2] != len(self.metric):
                raise ValueError(
                    f"metric_dim: got {len(self.metric)}, expected {seen.keys.shape[2]}, the width of a head's keys."
                )
            with no_autocast(z):
                keys = at_least_float32(seen.keys)
                seen = seen._replace(keys=keys + keys @ at_least_float32(self.metric))
        return super().mask(z, tokens, seen)

    def choose(self, line: Line, num_slots: int) -> HardMask | SoftMask:
        acts_on, P = self.config.acts_on, num_slots
        order = self._order(line, P)
        unit, own, rest = take(line.unit, order), None, None
        similarity = cosines = unit[:, P:] @ unit[:, :P].transpose(1, 2)  # B M P
        if line.advice is not None and acts_on != "order":
            own, rest = in_slots(take(line.advice, order), line.cells.gather(1, order[:, :P]))
            similarity = at_least_float32(self.log_beta).exp() * cosines
            if self.training and not self.config.metric:
                # soft_mask adds the update to what it is given: to where tokens go, and to how much they count
                logits = similarity if acts_on != "weights" else similarity - rest
                if acts_on == "destinations":
                    return soft_mask(order, logits + rest, line.size)
                return soft_mask(order, logits, line.size, own, rest)
        nearest = similarity.argmax(dim=2)
        slot = nearest if rest is None or acts_on == "weights" else (similarity + rest).argmax(dim=2)
        if acts_on == "destinations":
            own = rest = None
        of_slot = None if rest is None else rest.gather(2, slot.unsqueeze(2)).squeeze(2)
        mask = hard_mask(order, slot, line.size, P, own, of_slot)
        if self.moved is not None:
            plain = hard_mask(order, nearest, line.size, P)
            weight = (mask.dense() - plain.dense()).abs().sum(dim=1).mean() / 2
            changed = (slot != nearest).float().mean()
            if acts_on == "order":
                anchors = [
                    torch.zeros_like(line.size).scatter(1, of[:, :P], 1.0) for of in (order, super()._order(line, P))
                ]
                changed = (anchors[0] - anchors[1]).abs().sum(dim=1).mean() / (2 * P)
            self.moved.append((changed.item(), weight.item()))
        if self.training and self.config.metric:
            return _straight_through(mask, (self.config.metric * cosines).softmax(dim=2), line.size, own, rest)
        return mask

    def _order(self, line: Line, num_slots: int) -> Tensor:
        """As LTM's; acting on it, an anchor is sooner what the update counts for more in its own slot."""
        if line.advice is None or self.config.acts_on != "order":
            return super()._order(line, num_slots)
        own = line.advice.gather(2, line.cells.unsqueeze(2)).squeeze(2)
        own = (own - own.mean(dim=1, keepdim=True)) / own.std(dim=1, keepdim=True).clamp_min(1e-6)
        return order_by(redundancy(line.unit, line.size) - TIE * own, num_slots)


def _straight_through(mask: HardMask, soft: Tensor, size: Tensor, own: Tensor | None, rest: Tensor | None) -> SoftMask:
    """A hard mask with the gradient of soft destinations (B, M, P)."""
    P, size = soft.shape[2], size.gather(1, mask.order)
    to = one_hot(mask.slot, P, soft.dtype) + soft - soft.detach()
    own_weight, rest_weight = size[:, :P], size[:, P:].unsqueeze(2) * to
    if own is not None and rest is not None:
        own_weight, rest_weight = own_weight * own.exp(), rest_weight * rest.exp()
    total = own_weight + rest_weight.sum(dim=1)
    return SoftMask(mask.order, to, own_weight / total, rest_weight / total.unsqueeze(1), mask.size)


# What the update does


class Experiments(compare.Comparison):
    """compare.py's, and the tables of what updates tell and move, and of the information bottleneck."""

    @torch.no_grad()
    def moves(self) -> list[dict[str, Any]]:
        """By block of every model of ``learned`` with clusters: nats of the label, what is changed, moved weight."""
        x, rows = self.first(self.tests, 64), []
        for name in self.named:
            model = copy.deepcopy(self.model(name)).eval()
            told = self.told.get(name, {})
            reducers = [(block, r) for block, r in model.reducers() if isinstance(r, Learned) and block in told]
            for _, reducer in reducers:
                reducer.moved = []
            model.set_merging(True)
            model(x)
            for block, reducer in reducers:
                changed, weight = np.mean(reducer.moved, axis=0).tolist()  # of maps, rows and columns
                row = {"model": name, "block": block.removesuffix(".reducer"), "nats": told[block]}
                rows.append({**row, "changed": changed, "moved": weight})
        return rows

    def information(self) -> list[dict[str, Any]]:
        """By block of every fine-tuned model, and of the whole: IB loss and bound, of the same test images."""
        rng, count = random.Random(self.args.data_seed), min(self.args.information, len(self.tests))
        batches = list(self.batches(self.tests, rng.sample(range(len(self.tests)), count)))
        tuned = [name for name in ("plain", *self.named) if self.weights(name).exists()]
        return [{"model": name, **of.row()} for name in tuned for of in information(self.tuned(name), batches)]


def more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--information", type=int, default=0, metavar="N", help="test images that it is measured on")


def main() -> None:
    args = compare.arguments(__doc__, more_arguments)
    register_method("learned")(Learned)
    experiments = compare.run(Experiments, args)
    tables = {
        "moves": experiments.moves() if args.clusters else [],
        "information": experiments.information() if args.information else [],
    }
    for name, rows in tables.items():
        if rows:
            write_csv(args.out / f"{name}.csv", rows)
            print(as_table(rows))


if __name__ == "__main__":
    main()
