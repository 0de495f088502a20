"""The settings that all methods share, how any setting is checked, and how ratios are handed to blocks."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

__all__ = [
    "Config",
    "check_flag",
    "check_number",
    "check_whole",
    "is_several",
    "nearest",
    "num_slots",
    "setting_error",
    "spread",
]


def setting_error(name: str, got: object, expected: str, remedy: str) -> ValueError:
    """What was got, what was expected, what to do."""
    return ValueError(f"{name}: got {got!r}, expected {expected}. {remedy}")


def nearest(name: str, names: Iterable[str]) -> str:
    """ "Did you mean", or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f"Did you mean {found[0]!r}?" if found else ""


def check_number(name: str, value: Any, above: float, most: float = math.inf, at_least: bool = False) -> float:
    """A finite number above ``above`` (or equal, if ``at_least``) and at most ``most``; numpy's are taken too."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    value_ = float(value) if is_number else math.nan
    if not (math.isfinite(value_) and (value_ > above or (at_least and value_ == above)) and value_ <= most):
        low = f"{above:g} or more" if at_least else f"above {above:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise setting_error(name, value, f"a number, {low}{high}", "Leave it out for the default.")
    return value_


def check_whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``; numpy's are taken too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise setting_error(name, value, f"a whole number, {least} or more", "Leave it out for the default.")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only looks like them."""
    if not isinstance(value, bool):
        hint = f"On a command line, {name}=True or {name}=False. " if isinstance(value, str) else ""
        raise setting_error(name, value, "True or False", f"{hint}Leave it out for the default.")
    return value


def is_several(value: Any) -> bool:
    """Whether a value is a row of them: a list, a tuple, an array."""
    return (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) == 1


def num_slots(num_tokens: int, ratio: float) -> int:
    """P = ceil(r N) (Section 3.1), at least 1 and immune to r N being a rounding error above a whole number.

    In whole numbers: exporters take minutes for sizes known at run time that are rounded products of floats.
    """
    whole, share = 10**9, max(round(ratio * 10**9), 2000)
    return (num_tokens * share + whole - 1 - 1000) // whole


SCHEDULES = ("flat", "late")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of every method. A method's own are fields of a subclass.

    Args:
        compression_ratio: r of Section 3.1. A block turns its N tokens into P = ceil(r N), an H x W map that merges
            along lines (Swin, EfficientViT) into ceil(H sqrt r) x ceil(W sqrt r). One number for all blocks, one per
            stage, or one per block; 1.0 means that this block does not merge. Of few tokens a ratio near 1 merges none:
            0.95 of 19 are 19. None: the family's own schedule.
        gmacs: In place of ratios, the share of the plain model's GMACs that the merging one may cost. The ratios that
            meet it are found from the shapes, and saved as ``compression_ratio``.
        schedule: Which blocks merge how much within ``gmacs``: ``"flat"``, the same number of tokens in every block (of
            maps, the same share), as in ToMe's paper; ``"late"``, for self-supervised ViTs, from behind the first third
            of the blocks where the budget allows. None: the best that was found for the family and this share; of ViTs
            whose weights have no classes in timm's configuration ``"late"``, from 0.77 on.
        merge_warmup_epochs: Epochs of plain training before merging begins (t_warm of Algorithm 1).

    Raises:
        ValueError: A setting is of the wrong kind or out of range.
    """

    compression_ratio: float | Sequence[float] | None = None
    gmacs: float | None = None
    schedule: str | None = None
    merge_warmup_epochs: int = 0
    scheduled: ClassVar[tuple[str, ...]] = ("compression_ratio", "gmacs")  # what says how much each block merges
    of_weighing: ClassVar[tuple[str, ...]] = ()  # without effect where attention cannot be in proportion to sizes
    unsaved: ClassVar[tuple[str, ...]] = ()  # of a training, and not of the model: checkpoints do not carry them
    trains_budget: ClassVar[bool] = False  # gmacs is what training aims at, and amounts reads it: no ratios are found

    def __post_init__(self) -> None:
        ratio = self.compression_ratio
        if ratio is not None:
            several = is_several(ratio)
            checked = tuple(check_number("compression_ratio", r, 0.0, 1.0) for r in (ratio if several else (ratio,)))
            self._set("compression_ratio", checked if several else checked[0])
        if self.gmacs is not None:
            self._set("gmacs", check_number("gmacs", self.gmacs, 0.0, 1.0))
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise setting_error("schedule", self.schedule, f"one of {SCHEDULES}", "Leave it out for the best found.")
        if self.schedule is not None and self.gmacs is None:
            raise setting_error("schedule", self.schedule, "none without gmacs", "Give the share that it may cost.")
        self._set("merge_warmup_epochs", check_whole("merge_warmup_epochs", self.merge_warmup_epochs, 0))
        given = [name for name in self.scheduled if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: got one beside {given[0]}, expected one of them. Leave out the other.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen, but for the checks of its own constructor

    @classmethod
    def from_settings(cls, settings: dict[str, Any], form: str) -> Config:
        """Of the given settings, of a method or form of one that errors call ``form``.

        Raises:
            ValueError: One is unknown; the nearest right one is named.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                known = f"one of {', '.join(names)}" if names else "no setting"
                raise ValueError(
                    f"{name}: {form} has no such setting, expected {known}. {nearest(name, names)}".rstrip()
                )
        return cls(**settings)

    def amounts(self, depths: Sequence[int], default: Sequence[float]) -> tuple[float, ...]:
        """How much each block of a model merges; 1.0 is nothing.

        Args:
            depths: Blocks of each stage; of a model without stages, one number.
            default: The family's own schedule, one ratio per block.

        Raises:
            ValueError: The number of ratios is neither 1, nor that of stages, nor that of blocks.
        """
        if self.compression_ratio is None:
            return tuple(default)
        return spread(self.compression_ratio, depths, "compression_ratio", "Use 1.0 for blocks that must not merge.")

    def default_ratios(self, depths: Sequence[int], lines: bool) -> tuple[float, ...] | None:
        """The method's own schedule where it has one, for models of these stages, merging along lines or not."""
        return None

    def patterns(self, share: float, depths: Sequence[int], lines: bool) -> Iterable[tuple[float, ...]]:
        """For a budget, a share of the plain model's GMACs: ratios of which some power costs it, the best ones first.

        The first that can meet the budget are taken. None at all: the family's own.
        """
        ratios = self.default_ratios(depths, lines)
        return () if ratios is None else (ratios,)

    def setting_of(self, amounts: Sequence[float]) -> dict[str, Any]:
        """What :meth:`amounts` returned as the setting that says the same."""
        return {"compression_ratio": list(amounts), "gmacs": None, "schedule": None}


def spread(value: Any, depths: Sequence[int], name: str, remedy: str) -> tuple[Any, ...]:
    """One number, one per stage or one per block -> one per block."""
    values, blocks = (value if isinstance(value, tuple) else (value,)), sum(depths)
    if len(values) == 1:
        return values * blocks
    if len(values) == blocks:
        return values
    if len(values) == len(depths):
        return tuple(v for v, depth in zip(values, depths, strict=True) for _ in range(depth))
    stages = f", {len(depths)}, one per stage," if len(depths) > 1 else ""
    raise setting_error(name, f"{len(values)} numbers", f"one number{stages} or {blocks}, one per block", remedy)
