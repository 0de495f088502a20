"""Images kept decoded, clusters before training, and training that goes on where it was killed, bit for bit on a CPU.

All that is random in a step follows from the seed and the step's number, and nothing of it has to be saved. Order,
crops and flips are the same for all models; what dropout leaves out is not, where models have other numbers of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import timm_ltm
from timm_ltm.methods.ltm.information import told_of_labels
from timm_ltm.methods.ltm.update import assign
from timm_ltm.models import ReducedModel
from timm_ltm.models.saved import is_own

THRESHOLD_LR = 5e-3  # of LTMP's paper


class Pictures:
    """Images as uint8 tensors (C, H, W), decoded when first asked for and kept while there is room.

    Args:
        samples: Files and their labels.
        decode: Of an image.
        room: Bytes that may be kept.
        workers: Threads that decode.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], decode: Callable[[Image.Image], Tensor], room: float, workers: int
    ) -> None:
        self.files = [file for file, _ in samples]
        self.labels = torch.tensor([label for _, label in samples])
        self.decode, self.room, self.kept = decode, room, {}
        self.pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Those of these indices."""
        return list(self.pool.map(self._one, indices))

    def _one(self, index: int) -> Tensor:
        image = self.kept.get(index)
        if image is None:
            with Image.open(self.files[index]) as file:
                image = self.decode(file.convert("RGB"))
            if self.room >= image.numel():
                self.room -= image.numel()
                self.kept[index] = image
        return image


def shortened(side: int) -> Callable[[Image.Image], Tensor]:
    """Decode to a shorter side of at most that many pixels: crops are taken of it."""

    def decode(image: Image.Image) -> Tensor:
        factor = side / min(image.size)
        if factor < 1:
            image = image.resize([max(1, round(length * factor)) for length in image.size], Image.BICUBIC)
        return pil_to_tensor(image)

    return decode


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training: AdamW, a warm-up of the learning rate and its cosine, random crops and flips.

    Args:
        steps: Updates.
        batch_size, lr, weight_decay, smoothing: As everywhere.
        warmup: Steps of a rising learning rate.
        scale: Share of the image that a crop has at least.
        hflip: Share of images that are mirrored.
        refresh_every: Steps between refreshes of clusters.
        bfloat16: Forward passes under autocast.
        channels_last: The memory format of weights and images.
        save_every: Steps between saves.
        own_lr: Of parameters that a method adds to the plain model's and learns, which start from random numbers;
            ``lr`` if not given. Thresholds have their own.
        merge_warmup: Steps before merging begins.
    """

    steps: int
    batch_size: int = 32
    lr: float = 5e-5
    weight_decay: float = 0.05
    smoothing: float = 0.1
    warmup: int = 0
    scale: float = 0.5
    hflip: float = 0.5
    refresh_every: int = 100
    bfloat16: bool = False
    channels_last: bool = False
    save_every: int = 100
    own_lr: float | None = None
    merge_warmup: int = 0


def batch_of(seed: int, step: int, count: int, size: int) -> list[int]:
    """Indices of a step's images: every image once in an epoch, what is left of the last batch in none."""
    epoch, place = divmod(step, max(1, count // size))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[place * size : (place + 1) * size].tolist()


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with timm's weight decay; what a method learns beside the plain model may have a learning rate of its own.

    Thresholds, of a method whose training aims at a budget, have one in any case, and do not decay.
    """
    reducers = [reducer for _, reducer in model.reducers()] if isinstance(model, ReducedModel) else []
    thresholds = {id(p) for reducer in reducers if reducer.config.trains_budget for p in reducer.parameters()}
    own = {id(p) for name, p in model.named_parameters() if is_own(name)} - thresholds
    undecayed = getattr(model, "no_weight_decay", set)()
    groups = []
    for group in param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=undecayed):
        of: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            own_lr = recipe.own_lr if id(p) in own else None
            lr = THRESHOLD_LR if id(p) in thresholds else recipe.lr if own_lr is None else own_lr
            of.setdefault(lr, []).append(p)
        groups += [{"params": params, "weight_decay": group["weight_decay"], "lr": lr} for lr, params in of.items()]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def train(
    model: nn.Module,
    pictures: Pictures,
    normalize: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    recipe: Recipe,
    seed: int,
    state: Path,
    title: str,
) -> None:
    """Train a model, plain or merging, in place; it is left in eval.

    Args:
        model: On its device.
        pictures: To train on.
        normalize: Of a batch of uint8 images (B, C, H, W), to the model's device.
        size: (H, W) of crops.
        recipe: How.
        seed: Of order, crops, flips and dropout.
        state: Everything is saved here; if it is there, training goes on from it.
        title: Of the bar.

    Raises:
        ValueError: The loss is not finite.
    """
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    device = next(model.parameters()).device
    refresh = timm_ltm.ClusterRefresh(model) if isinstance(model, ReducedModel) else None
    saved = torch.load(state, map_location="cpu") if state.exists() else None  # where AdamW counts its steps
    if saved is not None:
        model.load_state_dict(saved["model"])
    optimizer, start = optimizer_of(model, recipe), 0
    scheduler = CosineLRScheduler(optimizer, max(2, recipe.steps), warmup_t=recipe.warmup, t_in_epochs=False)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        if refresh is not None:
            refresh.load_state_dict(pytree.tree_map_only(Tensor, lambda t: t.to(device), saved["refresh"]))
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(recipe.scale, 1.0), antialias=True),
            v2.RandomHorizontalFlip(recipe.hflip),
        ]
    )
    model.train()
    if refresh is not None and start < recipe.merge_warmup:
        model.set_merging(False)
    bar = tqdm(range(start, recipe.steps), desc=title, unit="step", initial=start, total=recipe.steps, leave=False)
    for step in bar:
        torch.manual_seed(1_000_003 * seed + step)
        indices = batch_of(seed, step, len(pictures), recipe.batch_size)
        x = normalize(torch.stack([crop(image) for image in pictures.take(indices)]))
        if recipe.channels_last:
            x = x.to(memory_format=torch.channels_last)
        targets = pictures.labels[indices].to(device)
        scheduler.step_update(step + 1 if step < recipe.warmup else step)  # not a first step of rate 0
        if refresh is not None:
            if step == recipe.merge_warmup:
                model.set_merging(None)
            refresh.labels(targets)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing)
        total = loss if refresh is None else loss + refresh.loss(targets)
        if not math.isfinite(total.item()):
            raise ValueError(f"lr: got {recipe.lr}, with which the loss of {title} is {total.item()}. Use less.")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        done = step + 1
        if refresh is not None:
            refresh.step(targets)
            if done % recipe.refresh_every == 0 or done == recipe.steps:
                refresh.epoch_end()
        if done % recipe.save_every == 0 or done == recipe.steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save({**saved, "refresh": None if refresh is None else refresh.state_dict()}, state)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    if refresh is not None:
        model.set_merging(None)
    model.eval()


@torch.no_grad()
def clusters_first(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    others: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> dict[str, float]:
    """Clusters and Q of a merging model from one pass over images, before any training.

    Args:
        model: It is left in eval, its epoch 0. A model without clusters stays as it is.
        batches: Images and labels that they are of.
        others: Images and labels that they are not of.

    Returns:
        What the clusters of each reducer tell of the labels of the others, in nats.
    """
    if not any(reducer.collects for _, reducer in model.reducers()):
        return {}
    refresh = timm_ltm.ClusterRefresh(model, reservoir=10**4)
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout, DropPath)):
            module.eval()
    classes = torch.ones(model.num_classes)
    for x, labels in batches():
        refresh.labels(labels.to(x.device))
        model(x)
        refresh.step(labels.to(x.device))
        classes += torch.bincount(labels, minlength=len(classes))
    refresh.epoch_end()
    prior = classes / classes.sum()
    told: dict[str, list[Tensor]] = {name: [] for name in refresh.log_q}
    for x, labels in others():
        refresh.labels(labels.to(x.device))
        model(x)
        for name, found in told.items():
            clusters, log_q = refresh.reducers[name].clusters, refresh.log_q[name]
            phi = assign(refresh.observers[name].take(), clusters.centroids, clusters.temperature)
            found.append(told_of_labels(phi.to(log_q), log_q, prior.to(log_q), labels.to(x.device)))
    model.reduction.epoch.zero_()
    model.eval()
    return {name: float(torch.cat(found).mean()) for name, found in told.items()}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of another: as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)


def save(value: object, path: Path) -> None:
    with whole(path) as part:
        torch.save(value, part)
