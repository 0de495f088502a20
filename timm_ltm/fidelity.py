"""How far a merging model's features are from the plain model's: without labels, and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["errors", "features_of", "images_of", "interval", "outputs_of"]


def features_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a timm model makes of images (B, C, H, W), behind its last block.

    Returns:
        ``class``: the class token (B, D), of models that have one. ``mean``: the mean over the image (B, D).
        ``every``: all tokens, of the grid or of the last map (B, N, D).
    """
    return _features(model, *model.forward_intermediates(x, indices=1))


def outputs_of(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`features_of` and the logits (B, K) of the head, in one forward pass."""
    last, maps = model.forward_intermediates(x, indices=1)
    return _features(model, last, maps), model.forward_head(last)


def _features(model: nn.Module, last: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
    tokens = maps[-1].flatten(2).transpose(1, 2)  # B D H W -> B (H W) D
    if last.ndim != 3:
        return {"mean": tokens.mean(dim=1), "every": tokens}
    tokens = last[:, getattr(model, "num_prefix_tokens", 0) :]  # normalised, unlike maps
    found = {"mean": tokens.mean(dim=1), "every": tokens}
    if getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None):
        found = {"class": last[:, 0], **found}
    return found


def errors(features: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 - cos to what is expected, (B,) of each kind; of ``every`` the mean over tokens.

    Args:
        features: As :func:`features_of` returns them.
        expected: Of the plain model, on the same images.
    """
    found = {}
    for kind, reference in expected.items():
        error = 1.0 - F.cosine_similarity(features[kind].double(), reference.double(), dim=-1)
        found[kind] = error.clamp_min(0.0).reshape(len(error), -1).mean(dim=1)
    return found


def images_of(loader: Iterable[object], limit: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of the first images of a loader, whatever else it yields beside them.

    Raises:
        ValueError: It yields none.
    """
    seen = 0
    for batch in loader:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        x = x[: limit - seen]
        seen += len(x)
        yield x.to(device)
        if seen >= limit:
            return
    if not seen:
        raise ValueError("loader: got no image, expected some. Give batches of images (B, C, H, W).")


def interval(
    statistic: Callable[..., float], *series: np.ndarray, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Of a statistic of what was measured on the same images: 95 %, by the bootstrap, images drawn in pairs.

    Args:
        statistic: Of one mean (n,) over runs for each series.
        *series: (n,) each, one number per image, or (S, n) of S runs, which are drawn in pairs too.
        seed: Of the draws.
        draws: That many.
    """
    runs = [np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in series]
    S, n = runs[0].shape
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        of_runs, of_images = rng.integers(S, size=S), rng.integers(n, size=n)
        found.append(statistic(*(values[of_runs].mean(axis=0)[of_images] for values in runs)))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
