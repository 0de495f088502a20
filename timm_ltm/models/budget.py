"""A budget in place of ratios: how much each block merges so that a forward pass costs a share of the plain model's."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.reduction import Config, Reducer, form_of

if TYPE_CHECKING:
    from timm_ltm.models.base import ReducedModel

__all__ = ["Scheduled", "amounts_within", "on_meta", "powers", "within"]

_ENOUGH = 0.002  # of the plain model's GMACs: a nearer share is not looked for
_STEPS = 16


class Scheduled(nn.Module):
    """Mixin of :class:`~timm_ltm.models.base.ReducedModel`: which blocks merge how much."""

    def merge_as(self, cls: type[Reducer], config: Config, amounts: tuple[float, ...]) -> None:
        """Merge by these amounts, whatever the settings say: to see what that costs."""
        self.block_amounts = amounts
        self._put_reducers(cls, config)
        self._merging = any(amount != 1 for amount in amounts)
        self._tell_parts()

    def path_for(self, share: float, schedule: str | None) -> Callable[[float], tuple[float, ...]]:
        """How much blocks merge, the more the larger the strength, to meet a share of the plain model's GMACs."""
        return powers(self.planned[1] if schedule is None else (0.9,) * sum(self.planned[0]))

    def parts_of(self, amounts: Sequence[float]) -> list[float]:
        """How much of what merges does so in each block, for :meth:`path_of`."""
        return [-math.log(amount) for amount in amounts]

    def path_of(self, parts: Sequence[float]) -> Callable[[float], tuple[float, ...]]:
        """As :meth:`path_for`, each block merging in proportion to its part."""
        return powers(tuple(math.exp(-part / max(parts)) for part in parts))

    def amounts_of(self, config: Config) -> tuple[float, ...]:
        """How much each transformer block merges by these settings, 1.0 for nothing."""
        depths, default = self.planned
        if config.gmacs is None or config.trains_budget:
            return config.amounts(depths, config.default_ratios(depths, self.lines) or default)
        if config not in self._budgets:
            self._budgets[config] = amounts_within(self, form_of(self.method, config), config, config.gmacs)
        return self._budgets[config]


def amounts_within(model: "ReducedModel", cls: type[Reducer], config: Config, budget: float) -> tuple[float, ...]:
    """The amounts that cost the largest share of the plain model's GMACs not above the budget.

    Those of the method's or the family's schedule for this share, as strong as needed, which is found by counting a
    copy of the model on torch's "meta" device: what the method computes and putting back are in it. No image is needed,
    and no memory.

    Args:
        model: Before its reducers are planted.
        cls: The method.
        config: Its settings.
        budget: A share of the plain model's GMACs.

    Returns:
        One for each transformer block, 1.0 for nothing.

    Raises:
        ValueError: However much is merged, the model costs more.
    """
    shape = on_meta(model).eval()
    size = input_size_of(model)
    shape.set_merging(False)
    whole = gmacs(shape, size)

    def share(amounts: tuple[float, ...]) -> float:
        shape.merge_as(cls, config, amounts)
        return gmacs(shape, size) / whole

    patterns = () if config.schedule else tuple(config.patterns(budget, model.planned[0], model.lines))
    least = 1.0
    paths = [powers(pattern) for pattern in patterns] or [model.path_for(budget, config.schedule)]
    if config.schedule is None and not patterns:  # few merges may not reach it, of methods that halve at most
        paths.append(model.path_for(budget, "flat"))
    for path in paths:
        amounts, found = within(path, budget, share)
        if found <= budget:
            return amounts
        least = min(least, found)
    raise ValueError(
        f"gmacs: got {budget}, expected at least {least:.3f} of this model's, where its blocks "
        "merge all that they can. Use a larger share, or compression_ratio to merge in other blocks."
    )


def powers(ratios: tuple[float, ...]) -> Callable[[float], tuple[float, ...]]:
    """Ratios to a power, the strength."""
    return lambda strength: tuple(max(ratio**strength, 1e-3) for ratio in ratios)


def within(
    path: Callable[[float], tuple[float, ...]], budget: float, share: Callable[[tuple[float, ...]], float]
) -> tuple[tuple[float, ...], float]:
    """What costs most within the budget, of a path of amounts along a strength 0, ...; and its share.

    Args:
        path: Amounts, one per block, which merge the more the larger the strength.
        budget: A share of the plain model's GMACs.
        share: What amounts cost.

    Returns:
        Amounts and their share; where no strength meets the budget, what was found to cost least.
    """
    low, of_low, high = 0.0, 1.0, 1.0  # strengths, and the first's share: above the budget and not above it
    of_high = share(path(high))
    least = of_high, high
    while of_high > budget:
        if path(2.0 * high) == path(high):
            return path(least[1]), least[0]
        low, of_low, high = high, of_high, 2.0 * high
        of_high = share(path(high))
        least = min(least, (of_high, high))  # of methods that halve at most, not the strongest
    for step in range(_STEPS):
        if budget - of_high <= _ENOUGH or path(low) == path(high):
            break
        # a straight line between the two tells where to look, every third time the middle
        at = (of_low - budget) / (of_low - of_high) if step % 3 != 2 and of_low > of_high else 0.5
        middle = low + min(max(at, 0.1), 0.9) * (high - low)
        found = share(path(middle))
        if found <= budget:
            high, of_high = middle, found
        else:
            low, of_low = middle, found
    return path(high), of_high


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without storage."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
