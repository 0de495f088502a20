"""A schedule of a user's own: which blocks merge how much, found by fidelity to the plain model, without labels."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_ltm.cost import gmacs as count_gmacs
from timm_ltm.cost import input_size_of
from timm_ltm.fidelity import errors, features_of, images_of
from timm_ltm.models import convert
from timm_ltm.models.base import ReducedModel
from timm_ltm.models.budget import amounts_within, on_meta, within
from timm_ltm.reduction import form_of

__all__ = ["Found", "search_schedule"]

_SMALLEST_STEP = 1.25  # factor of a block's part at which the search ends


class Found(NamedTuple):
    """What a search found.

    Attributes:
        compression_ratio: One for each transformer block, for ``convert`` or ``create_model``.
        gmacs: Their share of the plain model's GMACs.
        error: Mean over images of 1 - cos to the plain model's features, by kind, see
            :func:`timm_ltm.fidelity.features_of`.
        default: The same of the default schedule for this budget.
        tried: How many schedules were measured.
    """

    compression_ratio: list[float]
    gmacs: float
    error: dict[str, float]
    default: dict[str, float]
    tried: int


def search_schedule(
    model: nn.Module,
    loader: Iterable[Any],
    gmacs: float,
    method: str = "ltm",
    images: int = 64,
    tries: int = 40,
    progress: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Found:
    """Which blocks of a model merge how much, so that its features stay nearest to the plain model's within a budget.

    Starts from the default schedule, or the same number in every block (of maps: or one block alone); then one block
    after the other merges more, or less, the whole scaled to the budget each time. What lessens the error by more than
    the standard error of that, over the images, is kept: less is then kept by chance, which does not hold on others.
    The error is the sum over kinds of features of the mean of the square root of 1 - cos: of an angle, as a mean of
    squares would follow a few images.

    .. code-block:: python

        found = timm_ltm.search_schedule(plain, loader, gmacs=0.6)
        model = timm_ltm.convert(plain, "ltm", compression_ratio=found.compression_ratio)

    Args:
        model: A plain timm model; it stays as it is.
        loader: Batches of images (B, C, H, W), alone or in front of labels, which are not read. Normalised as the model
            expects them, 64 or more of those it will see.
        gmacs: Share of the plain model's GMACs that may be spent.
        method: To merge by.
        images: How many are used.
        tries: How many schedules are measured at most. One takes as long as a pass over the images.
        progress: Show a bar.
        seed: Of the order of blocks.
        **settings: The method's.

    Raises:
        ValueError: The budget cannot be met, or the loader yields no image.
    """
    device = next(model.parameters()).device
    trial = convert(model, method, **settings, gmacs=gmacs).eval()
    measure = _Measure(trial, loader, gmacs, images, device)
    default, of_default = measure(trial.block_amounts)
    best, of_best, amounts = default, of_default, trial.block_amounts
    parts = trial.parts_of(amounts)
    seen = {amounts}
    with tqdm(total=tries, initial=1, desc=f"schedule within {gmacs:g}", unit="try", disable=not progress) as bar:

        def lessens(candidate: tuple[float, ...]) -> bool:
            """Measure one that is new, and keep it if it is better."""
            nonlocal best, of_best, amounts
            if candidate in seen or measure.share(candidate) > gmacs:
                return False
            seen.add(candidate)
            score, of_kinds = measure(candidate)
            better = _surely_less(score, best)
            if better:
                best, of_best, amounts = score, of_kinds, candidate
            bar.set_postfix_str(f"error {best.mean() / default.mean():.2f} of the default's", refresh=False)
            bar.update()
            return better

        for candidate in _starts(trial, measure, gmacs):
            if len(seen) < tries and lessens(candidate):
                parts = trial.parts_of(candidate)
        factor, draw = 2.0, random.Random(seed)
        while factor > _SMALLEST_STEP and len(seen) < tries:
            improved = False
            for block in draw.sample(range(len(parts)), len(parts)):
                for moved in _moves(parts, block, factor):
                    if len(seen) >= tries:
                        break  # finding what is within the budget takes seconds
                    if lessens(within(trial.path_of(moved), gmacs, measure.share)[0]):
                        parts, improved = moved, True
                        break
            factor = factor if improved else factor**0.5
    return Found([float(a) for a in amounts], measure.share(amounts), of_best, of_default, len(seen))


def _starts(trial: ReducedModel, measure: _Measure, gmacs: float) -> Iterator[tuple[float, ...]]:
    """Where to begin beside the default: the same in every block; of maps, which merge in few blocks, in each alone."""
    yield amounts_within(trial, measure.cls, dataclasses.replace(trial.config, schedule="flat"), gmacs)
    blocks = len(trial.block_amounts)
    for block in range(blocks) if trial.maps else ():
        yield within(trial.path_of([float(i == block) for i in range(blocks)]), gmacs, measure.share)[0]


def _moves(parts: Sequence[float], block: int, factor: float) -> Iterator[list[float]]:
    """The same with more in one block, less, or nothing."""
    mean = sum(parts) / len(parts)
    for part in (parts[block] * factor, parts[block] / factor, 0.0) if parts[block] else (mean,):
        moved = [part if i == block else other for i, other in enumerate(parts)]
        if any(moved):
            yield moved


def _surely_less(score: Tensor, other: Tensor) -> bool:
    """Whether scores (n,) of images are less than others of the same ones by more than the standard error of it."""
    gain = other - score
    return bool(gain.mean() > (gain.std() / len(gain) ** 0.5 if len(gain) > 1 else 0.0))


class _Measure:
    """What schedules of one model cost, and how far its features then are from the plain model's."""

    def __init__(self, trial: ReducedModel, loader: Iterable[Any], gmacs: float, images: int, device: Any) -> None:
        self.trial, self.cls, self.config = trial, form_of(trial.method, trial.config), trial.config
        self.shape, self.size = on_meta(trial).eval(), input_size_of(trial)
        self.shape.set_merging(False)
        self.whole = count_gmacs(self.shape, self.size)
        self.batches = list(images_of(loader, images, device))
        trial.set_merging(False)
        with torch.inference_mode():
            self.expected = [features_of(trial, x) for x in self.batches]
        trial.set_merging(None)

    def share(self, amounts: tuple[float, ...]) -> float:
        """Of the plain model's GMACs."""
        self.shape.merge_as(self.cls, self.config, amounts)
        return count_gmacs(self.shape, self.size) / self.whole

    @torch.inference_mode()
    def __call__(self, amounts: tuple[float, ...]) -> tuple[Tensor, dict[str, float]]:
        """The score of each image, less is better, and the mean error of each kind."""
        self.trial.merge_as(self.cls, self.config, amounts)
        found: dict[str, list[Tensor]] = {}
        for x, expected in zip(self.batches, self.expected, strict=True):
            for kind, error in errors(features_of(self.trial, x), expected).items():
                found.setdefault(kind, []).append(error)
        joined = {kind: torch.cat(parts) for kind, parts in found.items()}
        score = torch.stack([error.sqrt() for error in joined.values()]).sum(dim=0)
        return score, {kind: error.mean().item() for kind, error in joined.items()}
