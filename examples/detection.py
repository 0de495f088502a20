"""Train and evaluate SSDLite or Mask R-CNN on a merging or plain timm backbone, on a folder in COCO's format.

    python examples/detection.py COCO --backbone ltm_mobilevit_s --pretrained --skip-missing
    torchrun --nproc-per-node 8 examples/detection.py COCO --detector mask_rcnn --backbone ltm_efficientvit_b1 --amp bfloat16
    python examples/detection.py --backbone ltm_mobilevit_xxs --size 160 --epochs 40      # a set that is drawn here

SSDLite trains 200 epochs at 320 pixels with AdamW, from 9e-4 down to 1.6e-6 along a cosine, Mask R-CNN 12 epochs from 1e-3,
as the paper says. BACKBONE is timm's name, a checkpoint of timm's scripts, or a folder in timm's Hub layout.

Clusters of LTM follow the training by default, since fine-tuning moves the features that they are of, and a plain backbone
that is converted has none to begin with. The label of an image are the shares of classes among its objects; one without
objects has no label. --freeze-clusters keeps those of the checkpoint.
"""  # noqa: E501

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detection_data import CocoFolder, average_precision, both_splits, draw, results_of
from finetuning import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Subset
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image
from tqdm import tqdm

import timm_ltm
from timm_ltm import detection
from timm_ltm.cli.common import CommandError, add_model_arguments, load_model, merging_model, settings_of
from timm_ltm.models import ReducedModel

_logger = logging.getLogger("detection")
DETECTORS = {"ssdlite": dict(epochs=200, lr=9e-4, size=320), "mask_rcnn": dict(epochs=12, lr=1e-3, size=None)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="a folder in COCO's format; drawn under output/detection if not given")
    parser.add_argument("--detector", choices=DETECTORS, default="ssdlite")
    parser.add_argument("--backbone", default="ltm_mobilevit_s", help="name, checkpoint or folder")
    add_model_arguments(parser)
    parser.add_argument("--size", type=int, help="side that images are resized to; 320 for ssdlite, or torchvision's")
    parser.add_argument("--detector-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="torchvision's")
    parser.add_argument("--freeze-clusters", action="store_true", help="keep the checkpoint's clusters")
    parser.add_argument("--freeze-norms", action="store_true", help="batch norms of the backbone keep their statistics")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, help="200 for ssdlite, 12 for mask_rcnn")
    group.add_argument("--batch-size", type=int, default=32, help="of each process")
    group.add_argument("--lr", type=float, help="9e-4 for ssdlite, 1e-3 for mask_rcnn")
    group.add_argument("--min-lr", type=float, default=1.6e-6)
    group.add_argument("--warmup-steps", type=int, default=500, help="at most a tenth of all")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=10.0, help="norm")
    group.add_argument("--augment", choices=["none", "flip", "ssd"], default="ssd", help="ssd: colours, zoom and crops")
    group.add_argument("--amp", choices=DTYPES, help="autocast")
    group.add_argument("--resume", help="last.pt of this script, or a folder with one")
    group.add_argument("--evaluate", metavar="CHECKPOINT", help="of this script: evaluate it and stop")
    group.add_argument("--eval-every", type=int, default=1, help="epochs")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--output", type=Path, help="output/detection/DETECTOR/BACKBONE if not given")
    group = parser.add_argument_group("data")
    group.add_argument("--workers", type=int, default=2)
    group.add_argument("--skip-missing", action="store_true", help="leave out images without a file")
    group.add_argument("--drawn", nargs=2, type=int, default=[400, 100], metavar=("TRAIN", "VAL"), help="images drawn")
    group.add_argument("--backgrounds", help="photographs behind what is drawn")
    args = parser.parse_args(argv)
    for name, value in DETECTORS[args.detector].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output = args.output or Path("output/detection", args.detector, Path(args.backbone).stem)
    return args


def build(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The detector that the arguments ask for."""
    made = getattr(detection, args.detector)
    kwargs: dict[str, Any] = {"size": args.size, **settings_of(args.detector_kwargs)}
    if Path(args.backbone).exists():
        backbone = load_model(args.backbone, args)[0].cpu()
        backbone = merging_model(backbone, args) if args.merge else backbone
    else:
        backbone = args.backbone if not args.merge else f"{args.merge[0]}_{args.backbone}"
        settings = settings_of(args.model_kwargs + (args.merge or [None])[1:])
        if args.img_size is not None:
            settings["img_size"] = args.img_size
        kwargs.update(pretrained=args.pretrained, backbone_kwargs=settings)
    return made(backbone, num_classes, **kwargs)


def transforms(augment: str) -> tuple[v2.Transform, v2.Transform]:
    """Of training and of evaluation; resizing is the detector's."""
    kinds = {
        "none": [],
        "flip": [v2.RandomHorizontalFlip()],
        "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(), v2.RandomIoUCrop(), v2.RandomHorizontalFlip()],
    }
    end = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    train = v2.Compose([v2.ToImage(), *kinds[augment], v2.SanitizeBoundingBoxes(), *end])
    return train, v2.Compose([v2.ToImage(), *end])


def collate(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def to_device(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def evaluate(
    detector: nn.Module, data: CocoFolder, device: torch.device, batch_size: int, workers: int, masks: bool
) -> dict[str, float]:
    """COCO's average precisions in percent; every process takes its share of the images."""
    detector.eval()
    mine = Subset(data, range(rank(), len(data), world()))
    results = []
    loader = DataLoader(mine, batch_size, collate_fn=collate, num_workers=workers)
    for images, targets in tqdm(
        loader, desc="evaluating", unit="batch", leave=False, disable=None if not rank() else True
    ):
        for target, found in zip(targets, detector([image.to(device) for image in images]), strict=True):
            results += results_of(data, target["image_id"], found)
    if world() > 1:
        everyone: list[Any] = [None] * world()
        dist.all_gather_object(everyone, results)
        results = [row for part in everyone for row in part]
    return average_precision(data, results, masks)


@torch.no_grad()
def picture(detector: nn.Module, data: CocoFolder, device: torch.device, file: Path, number: int = 8) -> None:
    """Images with what was found in them, of a score above a half."""
    detector.eval()
    tiles = []
    for index in range(min(number, len(data))):
        image = v2.functional.to_image(data.image(index))
        found = detector([image.to(device) / 255])[0]
        keep = found["scores"] > 0.5
        names = [
            f"{data.names[k - 1]} {s:.2f}"
            for k, s in zip(found["labels"][keep].tolist(), found["scores"][keep].tolist(), strict=True)
        ]
        if "masks" in found:
            image = draw_segmentation_masks(image, (found["masks"][keep, 0] > 0.5).cpu(), alpha=0.5)
        if names:
            image = draw_bounding_boxes(image, found["boxes"][keep].cpu(), names, colors="red", width=2)
        tiles.append(
            v2.functional.resize(v2.functional.center_crop(image, [max(image.shape[1:])] * 2), [320, 320]) / 255
        )
    save_image(make_grid(tiles, nrow=4), file)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    refresh: timm_ltm.ClusterRefresh | None,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    device: torch.device,
    num_classes: int,
    title: str,
) -> float:
    """Mean loss of an epoch."""
    model.train()
    if args.freeze_norms:
        for module in (model.module if world() > 1 else model).backbone.body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    dtype, total = DTYPES.get(args.amp), 0.0
    bar = tqdm(loader, desc=title, unit="batch", leave=False, disable=None if not rank() else True)
    for images, targets in bar:
        images, targets = [image.to(device) for image in images], to_device(targets, device)
        labels = detection.image_labels(targets, num_classes)
        if refresh is not None:
            refresh.labels(labels)
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            losses = model(images, targets)
            loss = sum(losses.values())
            if refresh is not None:
                loss = loss + refresh.loss(labels)
        if not loss.isfinite():
            told = {name: round(value.item(), 3) for name, value in losses.items()}
            raise ValueError(f"loss: got {told}, expected finite ones. Use a smaller --lr, or leave --amp out.")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if refresh is not None:
            refresh.step(labels)
        total += loss.item()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    if refresh is not None:
        refresh.epoch_end()
    return total / len(loader)


def cosine(steps: int, warmup: int, lowest: float) -> Any:
    """The share of the learning rate at a step: up along a line, then down along a cosine."""
    warmup = min(warmup, steps // 10)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        along = min(1.0, (step - warmup) / max(1, steps - warmup))
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * along))

    return share


def decayed(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters, of which vectors (norms and biases) do not decay."""
    trained = [p for p in detector.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == many] for many in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = arguments(argv)
    device = torch.device(args.device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    logging.basicConfig(level=logging.INFO if not rank() else logging.WARNING, format="%(message)s")
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        size, photos = args.size or 320, f"_{Path(args.backgrounds).name}" if args.backgrounds else ""
        args.data = Path("output/detection", f"drawn_{size}_{args.drawn[0]}_{args.drawn[1]}{photos}")
        if not rank() and not (args.data / "val.json").exists():
            draw(args.data, *args.drawn, size=size, backgrounds=args.backgrounds)
        if world() > 1:
            dist.barrier()
    masks = args.detector == "mask_rcnn"
    sets = both_splits(args.data, transforms(args.augment), masks, args.skip_missing)
    num_classes = len(sets[0].categories) + 1
    detector = build(args, num_classes).to(device)
    _logger.info("%d training images, %d to evaluate, %d classes", len(sets[0]), len(sets[1]), num_classes - 1)
    _logger.info("%.2f M parameters", sum(p.numel() for p in detector.parameters()) / 1e6)
    if args.evaluate:
        detector.load_state_dict(torch.load(args.evaluate, map_location=device, weights_only=True)["model"])
        told = evaluate(detector, sets[1], device, args.batch_size, args.workers, masks)
        _logger.info(", ".join(f"{k} {v:.1f}" for k, v in told.items()))
        if not rank():
            picture(detector, sets[1], device, args.output / "predictions.png")
    else:
        told = train(args, detector, sets, device, num_classes, masks)
    if dist.is_initialized():
        dist.destroy_process_group()
    return told


def train(
    args: argparse.Namespace,
    detector: nn.Module,
    sets: list[CocoFolder],
    device: torch.device,
    num_classes: int,
    masks: bool,
) -> dict[str, float]:
    """All epochs, from where a checkpoint stopped; the last evaluation."""
    generator, seed = torch.Generator(), 1_000_003 * args.seed  # no epoch draws as one of another seed
    sampler = DistributedSampler(sets[0], seed=seed) if world() > 1 else RandomSampler(sets[0], generator=generator)
    loader = DataLoader(
        sets[0], args.batch_size, sampler=sampler, collate_fn=collate, num_workers=args.workers,
        drop_last=len(sets[0]) >= args.batch_size * world(),
    )  # fmt: skip
    steps = args.epochs * len(loader)
    optimizer = torch.optim.AdamW(decayed(detector, args.weight_decay), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, args.warmup_steps, args.min_lr / args.lr))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    start, best, told = 0, -1.0, {}
    if args.resume:
        file = Path(args.resume) / "last.pt" if Path(args.resume).is_dir() else Path(args.resume)
        saved = torch.load(file, map_location=device, weights_only=True)
        for name, part in (("model", detector), ("optimizer", optimizer), ("schedule", schedule), ("scaler", scaler)):
            part.load_state_dict(saved[name])
        start, best, told = saved["epoch"] + 1, saved["best"], saved["told"]
    merging = any(isinstance(m, ReducedModel) and m.needs_refresh() for m in detector.modules())
    refresh = timm_ltm.ClusterRefresh(detector, num_classes - 1) if merging and not args.freeze_clusters else None
    if args.freeze_clusters:
        warnings.filterwarnings("ignore", ".*trains without a refresh")
    model = DistributedDataParallel(detector, [device] if device.type == "cuda" else None) if world() > 1 else detector
    for epoch in range(start, args.epochs):
        if world() > 1:
            sampler.set_epoch(epoch)
        generator.manual_seed(seed + epoch)
        torch.manual_seed(1000 * (seed + epoch) + rank())  # a resumed run draws as one that was not stopped
        title, lr = f"epoch {epoch + 1}/{args.epochs}", schedule.get_last_lr()[0]
        loss = train_epoch(
            model, loader, optimizer, schedule, refresh, scaler, args, device, num_classes, title
        )  # fmt: skip
        for buffer in detector.buffers() if world() > 1 else ():
            dist.broadcast(buffer, 0)  # statistics of batch norms are each process's own: all evaluate what is saved
        told = {}  # of this epoch
        if epoch + 1 == args.epochs or (epoch + 1) % args.eval_every == 0:
            told = evaluate(detector, sets[1], device, args.batch_size, args.workers, masks)
        if rank():
            continue
        tqdm.write(", ".join([f"{title}: loss {loss:.4f}", *(f"{k} {v:.1f}" for k, v in told.items())]))
        scores = {name: told.get(name) for name in average_precision(sets[1], [], masks)}
        _write_row(args.output / "summary.csv", {"epoch": epoch, "loss": loss, "lr": lr, **scores}, new=epoch == 0)
        saved = {"model": detector.state_dict(), "names": sets[0].names, "epoch": epoch, "told": told}
        if told and told["box_mAP"] > best:
            best = told["box_mAP"]
            save(saved, args.output / "best.pt")
        parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        save({**saved, "best": best, **{k: v.state_dict() for k, v in parts.items()}}, args.output / "last.pt")
    if not rank():
        (args.output / "result.json").write_text(json.dumps({**told, "best_box_mAP": best}, indent=2))
        picture(detector, sets[1], device, args.output / "predictions.png")
    return told


def _write_row(file: Path, row: dict[str, Any], new: bool) -> None:
    new = new or not file.exists()  # resumed from another folder
    with open(file, "w" if new else "a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CommandError) as error:
        raise SystemExit(f"error: {error}") from None
