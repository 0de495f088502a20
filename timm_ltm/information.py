"""IB(G) and IBB(G) of a model's merged tokens, by block and of the whole model: Table 5 and Figure 3 of the paper.

Section 3.2: merged features X~ and input features X are clustered by k-means, softly assigned to the clusters, and
IB(G) = I(X~, X) - I(X~, Y) with the labels Y. Merging models of every method and plain timm models go through the same
code: X~ of a block that does not merge is all its tokens behind attention.

One letter per axis: n images, B batch, N tokens, P slots, D width, H W grid, F features of what is clustered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ltm.methods.ltm.clusters import fit_temperature, kmeans
from timm_ltm.methods.ltm.information import InformationSums
from timm_ltm.methods.ltm.update import log_assign
from timm_ltm.models.base import ReducedModel
from timm_ltm.models.record import Merged, as_reduced, block_names, evaluating, record_merged
from timm_ltm.reduction import Tokens
from timm_ltm.reduction.settings import check_flag, check_number, check_whole, setting_error

__all__ = ["Information", "information"]

_ROWS = 4096  # images assigned to clusters at once
_IMAGE_CELLS = 16  # per side, that images are pooled to where tokens are pooled


@dataclasses.dataclass(frozen=True)
class Information:
    """The information bottleneck of one block's merged tokens, or of what the whole model gives its head. In nats.

    Attributes:
        block: Its name in the model, ``"model"`` for the whole.
        layer: Its number among the transformer blocks, from 1; None for the whole.
        tokens: P; of the whole model, whose merged tokens are copied to where they came from, all of the last grid.
        of_inputs: I(X~, X).
        of_labels: I(X~, Y).
        label_entropy: H(Y), which the latter cannot exceed.
        bound: IBB(G), with Q of Eq. 8.
        constant: C_0: IB(G) <= IBB(G) - C_0 (Theorem 3.1). Of input features alone.
    """

    block: str
    layer: int | None
    tokens: int
    of_inputs: float
    of_labels: float
    label_entropy: float
    bound: float
    constant: float

    @property
    def loss(self) -> float:
        """IB(G)."""
        return self.of_inputs - self.of_labels

    def row(self) -> dict[str, Any]:
        """As a table has it."""
        return {
            "layer": self.layer,
            "block": self.block,
            "tokens": self.tokens,
            "ib_loss": self.loss,
            "ib_bound": self.bound,
            "i_inputs": self.of_inputs,
            "i_labels": self.of_labels,
            "h_labels": self.label_entropy,
            "c_0": self.constant,
        }


@dataclasses.dataclass(frozen=True)
class _Choices:
    cells: int | None
    normalize: bool
    inputs: str


@torch.no_grad()
def information(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    clusters: int | None = None,
    cells: int | None = 4,
    normalize: bool = True,
    temperature: float | str = 1.0,
    inputs: str = "images",
    memory: float = 2.0,
    seed: int = 0,
) -> list[Information]:
    """IB(G) and IBB(G) of every transformer block of a model as it is, and of the whole model as the last entry.

    Defaults give numbers of the size of the paper's Table 5: features of length 1 and a temperature of 1 make phi all
    but uniform. As printed (``normalize=False, cells=None``) phi is one-hot where features are many.

    Args:
        model: Merging, of any method, or timm's. It runs in eval, merging if it does so now.
        loader: (images, labels) of all images, which may be gone through several times in the same order: a DataLoader
            that does not shuffle, a list. Images are moved to the model's device; labels are class indices, or (B, K).
        clusters: C, of merged features and of input features alike; the number of classes if not given (Section 3.2).
        cells: Tokens are put back on the grid that their stage began with and averaged over ``cells`` x ``cells`` parts
            of it, images over 16 x 16. None: all P D numbers of a block's merged tokens in their order, and all
            pixels, as printed.
        normalize: Features are scaled to length 1, as the authors' published loss has it; the printed formula does not.
        temperature: T in phi = softmax_a(-|x - C_a|^2 / T), 1 as printed. ``"fit"``: of every clustering the one at
            which the mean entropy of phi is half of its largest value.
        inputs: X: ``"images"``, the same for every block and model, or ``"block"``, each block's own input tokens (both
            are ways to read Section 3.2); the whole model's are the images.
        memory: 10^9 bytes of features that may be kept at once. Where those of all blocks are more, the images are gone
            through again for the next blocks.
        seed: Of k-means++.

    Raises:
        ValueError: A setting is out of range, there are too few images, features are not finite, or those of one block
            alone take more memory.
    """
    if clusters is not None:
        check_whole("clusters", clusters, 2)
    if cells is not None:
        check_whole("cells", cells, 1)
    check_flag("normalize", normalize)
    if temperature != "fit":
        check_number("temperature", temperature, 0.0)
    if inputs not in ("images", "block"):
        raise setting_error("inputs", inputs, "'images' or 'block'", "Use one of these.")
    check_number("memory", memory, 0.0)
    model, choices = as_reduced(model), _Choices(cells, normalize, inputs)
    names = [*block_names(model), "model"]
    device = next(model.parameters()).device
    with evaluating(model):
        sizes = _sizes(model, loader, choices)
        x, labels = _images(loader, choices, memory)
        C = max(clusters or labels.shape[1], 2)
        if len(x) < C:
            raise ValueError(
                f"loader: got {len(x)} images for {C} clusters, expected at least as many. Give more images, or fewer "
                "clusters."
            )
        of_images = _clustered(x, C, temperature, seed, device)
        found = []
        for group in _groups(sizes, len(labels), memory, names):
            for index, features in _collect(model, loader, {i: sizes[i] for i in group}, len(x), choices).items():
                if not all(value.isfinite().all() for value in features.values()):
                    raise ValueError(
                        f"loader: {names[index]} gives features that are not finite, expected finite ones. Run the "
                        "model in float32, and look at its weights."
                    )
                own, inner = features["merged"], features.get("inputs")
                merged = own, _clustered(own, C, temperature, seed, device)
                given = (x, of_images) if inner is None else (inner, _clustered(inner, C, temperature, seed, device))
                layer = index + 1 if index < len(names) - 1 else None
                found.append(_measure(names[index], layer, sizes[index].tokens, merged, given, labels))
    return found


def _measure(
    name: str,
    layer: int | None,
    tokens: int,
    merged: tuple[Tensor, _Clustering],
    given: tuple[Tensor, _Clustering],
    labels: Tensor,
) -> Information:
    """Of merged features (n, F) and input features (n, F'), both with their clustering, and labels (n, K)."""
    (x, clusters), (x_input, input_clusters) = merged, given
    sums = InformationSums(len(clusters.centroids), len(input_clusters.centroids), labels.shape[1])
    for own, theirs, y in zip(*(t.split(_ROWS) for t in (x, x_input, labels)), strict=True):
        sums.add(clusters.log_phi(own).exp(), input_clusters.log_phi(theirs), y)
    numbers = (sums.of_inputs(), sums.of_labels(), sums.label_entropy(), sums.bound(), sums.constant())
    return Information(name, layer, tokens, *(value.item() for value in numbers))


class _Clustering(NamedTuple):
    centroids: Tensor
    temperature: float

    def log_phi(self, x: Tensor) -> Tensor:
        """(n, A) of (n, F), in double: of long features, distances are differences of large numbers."""
        return log_assign(x.double(), self.centroids, torch.tensor(self.temperature, dtype=torch.float64))


def _clustered(x: Tensor, clusters: int, temperature: float | str, seed: int, device: torch.device) -> _Clustering:
    """Of features (n, F), clustered on the model's device."""
    x = x.to(device)
    centroids = kmeans(x, clusters, generator=torch.Generator().manual_seed(seed))
    if temperature == "fit":
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:2048].to(device)
        temperature = fit_temperature(x[some], centroids)
    return _Clustering(centroids.cpu().double(), float(temperature))


def _batches(model: ReducedModel, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    like = next(model.parameters())
    for images, _ in loader:
        yield images.to(like.device, like.dtype)


def _images(loader: Iterable[tuple[Tensor, Tensor]], choices: _Choices, memory: float) -> tuple[Tensor, Tensor]:
    """Features (n, F) of the images themselves, and labels (n, K)."""
    features, labels, held = [], [], 0.0
    for images, targets in loader:
        images = images.float()
        if choices.cells is not None:
            images = _pooled(images, _IMAGE_CELLS)
        features.append(_finished(images.flatten(1), choices))
        labels.append(targets.cpu())
        held += 4e-9 * features[-1].numel()
        if held > memory:
            raise ValueError(f"memory: got {memory}, expected more: the images alone take it. Give cells, or more.")
    y = torch.cat(labels)
    return torch.cat(features), y.float() if y.dim() == 2 else F.one_hot(y.long()).float()


class _Size(NamedTuple):
    features: dict[str, int]  # F of each kind
    tokens: int


def _sizes(model: ReducedModel, loader: Iterable[tuple[Tensor, Tensor]], choices: _Choices) -> dict[int, _Size]:
    """Of every block and of the whole model, in order."""
    for x in _batches(model, loader):
        found = _features(model, x[:1], None, choices)
        return {i: _Size({k: t.shape[1] for k, t in kinds.items()}, tokens) for i, (kinds, tokens) in found.items()}
    raise ValueError("loader: got no images, expected some. Give one that may be gone through several times.")


def _groups(sizes: dict[int, _Size], images: int, memory: float, names: list[str]) -> list[list[int]]:
    """Blocks whose features of all images may be kept at once."""
    groups: list[list[int]] = []
    left = 0.0
    for index, size in sizes.items():
        needed = 4e-9 * sum(size.features.values()) * images
        if needed > memory:
            raise ValueError(
                f"memory: got {memory} for {images} images, expected at least {math.ceil(10 * needed) / 10}, 10^9 "
                f"bytes for {names[index]}. Give more, fewer images, or fewer cells."
            )
        if needed > left:
            groups.append([])
            left = memory
        groups[-1].append(index)
        left -= needed
    return groups


def _collect(
    model: ReducedModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    wanted: dict[int, _Size],
    images: int,
    choices: _Choices,
) -> dict[int, dict[str, Tensor]]:
    """Features (n, F) of all images, of the wanted blocks."""
    all_ = {i: {k: torch.empty(images, F_) for k, F_ in size.features.items()} for i, size in wanted.items()}
    start = 0
    for x in _batches(model, loader):
        for index, (kinds, _) in _features(model, x, set(wanted), choices).items():
            for kind, value in kinds.items():
                all_[index][kind][start : start + len(x)] = value
        start += len(x)
    if start != images:
        raise ValueError(f"loader: got {start} images, then {images}, expected the same every time it is gone through.")
    return all_


def _features(
    model: ReducedModel, x: Tensor, wanted: set[int] | None, choices: _Choices
) -> dict[int, tuple[dict[str, Tensor], int]]:
    """Features (B, F) of images x and tokens P of the wanted blocks, None for all; the whole model's come last."""
    found: dict[int, tuple[dict[str, Tensor], int]] = {}
    last = 0

    def keep(seen: Merged) -> None:
        nonlocal last
        last = max(last, seen.index + 1)
        if wanted is not None and seen.index not in wanted:
            return
        kinds = {"merged": _of_tokens(seen.merged, seen.after, seen.parts, choices)}
        if choices.inputs == "block":
            kinds["inputs"] = _of_tokens(seen.inputs, seen.before, seen.parts, choices)
        found[seen.index] = kinds, seen.merged.shape[1]

    y, grid = record_merged(model, x, keep)
    if wanted is None or last in wanted:
        if choices.cells is not None:
            y = _pooled(y.float().transpose(1, 2).unflatten(2, grid), choices.cells)  # B (H W) D -> B D H W
        found[last] = {"merged": _finished(y.flatten(1), choices)}, grid[0] * grid[1]
    return found


def _of_tokens(x: Tensor, tokens: Tokens, parts: int, choices: _Choices) -> Tensor:
    """Features (B, F) of tokens (B parts, P, D)."""
    x = x.float().unflatten(0, (-1, parts))  # (B parts) P D -> B parts P D
    if choices.cells is None:
        return _finished(x.flatten(1), choices)
    x = tokens.unmerge(x.mean(dim=1)).transpose(1, 2).unflatten(2, tokens.start)  # B P D -> B D H W
    return _finished(_pooled(x, choices.cells).flatten(1), choices)


def _pooled(x: Tensor, cells: int) -> Tensor:
    """(B, D, H, W) averaged over cells x cells parts, over fewer where it has less."""
    return F.adaptive_avg_pool2d(x, (min(cells, x.shape[2]), min(cells, x.shape[3])))


def _finished(x: Tensor, choices: _Choices) -> Tensor:
    x = x.float().cpu()
    return F.normalize(x, dim=1) if choices.normalize else x
