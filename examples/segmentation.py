"""Semantic segmentation with segmentation_models_pytorch on merging encoders, next to the plain one of equal settings.

    pip install segmentation-models-pytorch
    python examples/segmentation.py --encoders ltm_mobilevit_xxs mobilevit_xxs --size 128 --epochs 20   # drawn here
    python examples/segmentation.py COCO --decoder FPN --encoders ltm_efficientvit_b1 efficientvit_b1 --pretrained
    python examples/segmentation.py COCO --decoder DPT --encoders ltm_vit_small_patch16_224 --size 224

A folder in COCO's format; classes are its categories and the background, which counts in the mean of IoU. Pixels of
crowds, but for objects in them, count neither in losses nor in IoU. Encoders of maps take every decoder of the library
but DPT, which is for ViTs.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from detection_data import CocoFolder, both_splits, draw
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import CommandError, as_table, parameters_of, settings_of
from timm_ltm.cost import gmacs
from timm_ltm.detection import image_labels
from timm_ltm.models import ReducedModel

IGNORED = -100  # torch's own, which is no class however many there are


class Maps(torch.utils.data.Dataset):
    """Images (3, H, W) normalised as the encoder was trained, classes (H, W) of their pixels or IGNORED, and labels."""

    def __init__(self, data: CocoFolder, size: int, config: dict[str, Any], train: bool) -> None:
        self.data = data
        flip = [v2.RandomHorizontalFlip()] if train else []
        self.transform = v2.Compose(
            [
                v2.ToImage(), v2.Resize((size, size), antialias=True), *flip, v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config["mean"], config["std"]), v2.ToPureTensor(),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, target = self.data[index]
        image, target = self.transform(image, {**target, "crowds": self.data.crowds(index)})
        classes = torch.zeros(image.shape[1:], dtype=torch.int64)
        classes[target["crowds"][0] > 0] = IGNORED
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            classes[mask > 0] = label
        return image, classes, image_labels([target], len(self.data.categories) + 1)[0]


def build(name: str, decoder: str, classes: int, size: int, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    """A model of segmentation_models_pytorch on one of timm's, merging or plain."""
    if decoder == "DPT":
        settings = {"dynamic_img_size": False, "img_size": size, **settings}
    return getattr(smp, decoder)(
        f"tu-{name}", encoder_weights="imagenet" if pretrained else None, classes=classes, **settings
    )


@torch.no_grad()
def mean_iou(model: nn.Module, loader: DataLoader, classes: int, device: torch.device) -> float:
    """In percent: of each class over all pixels of all images, then the mean of classes that are seen or found."""
    model.eval()
    counts = torch.zeros(4, classes, dtype=torch.int64)
    for images, targets, _ in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        found = model(images.to(device)).argmax(dim=1).cpu()
        # of each image and class: true and false positives, false and true negatives
        stats = smp.metrics.get_stats(found, targets, "multiclass", ignore_index=IGNORED, num_classes=classes)
        counts += torch.stack([c.sum(dim=0) for c in stats])
    tp, fp, fn, tn = counts[:, None, counts[:3].any(dim=0)]
    return 100 * smp.metrics.iou_score(tp, fp, fn, tn, reduction="macro").item()


def train(model: nn.Module, loader: DataLoader, args: argparse.Namespace, classes: int, name: str) -> list[float]:
    """AdamW along one cycle, cross-entropy and Dice; every epoch's mean loss."""
    device, dice = torch.device(args.device), smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(loader))
    merging = any(isinstance(m, ReducedModel) and m.needs_refresh() for m in model.modules())
    refresh = timm_ltm.ClusterRefresh(model, classes - 1) if merging else None
    losses = []
    for epoch in range(args.epochs):
        model.train()
        losses.append(0.0)
        bar = tqdm(loader, desc=f"{name} {epoch + 1}/{args.epochs}", unit="batch", leave=False, disable=None)
        for images, targets, labels in bar:
            images, targets, labels = images.to(device), targets.to(device), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED) + dice(logits, targets)
            if refresh is not None:
                loss = loss + refresh.loss(labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if refresh is not None:
                refresh.step(labels)
            losses[-1] += loss.item() / len(loader)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if refresh is not None:
            refresh.epoch_end()
    return losses


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", help="a folder in COCO's format; drawn under output/segmentation if not given"
    )
    parser.add_argument("--encoders", nargs="+", default=["ltm_mobilevit_xxs", "mobilevit_xxs"], help="timm's names")
    parser.add_argument("--decoder", default="Unet", help="Unet, FPN, DPT (for ViTs), ...")
    parser.add_argument("--kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="of the decoder and timm's model")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-missing", action="store_true", help="leave out images without a file")
    parser.add_argument("--drawn", nargs=2, type=int, default=[300, 80], metavar=("TRAIN", "VAL"), help="images drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/segmentation"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.output / f"drawn_{args.size}_{args.drawn[0]}_{args.drawn[1]}"
        if not (args.data / "val.json").exists():
            draw(args.data, *args.drawn, size=args.size)
    sets = both_splits(args.data, (None, None), True, args.skip_missing)
    classes, rows = len(sets[0].categories) + 1, []
    for name in args.encoders:
        torch.manual_seed(args.seed)
        model = build(name, args.decoder, classes, args.size, args.pretrained, settings_of(args.kwargs)).to(args.device)
        config = resolve_model_data_config(model.encoder.model, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        loaders = [
            DataLoader(
                Maps(data, args.size, config, train), args.batch_size, shuffle=train, num_workers=args.workers,
                drop_last=train and len(data) >= args.batch_size, generator=torch.Generator().manual_seed(args.seed),
            )
            for data, train in zip(sets, (True, False), strict=True)
        ]  # fmt: skip
        torch.manual_seed(args.seed)  # flips are those of the other encoders, whatever their making drew
        loss = train(model, loaders[0], args, classes, name)[-1]
        iou = mean_iou(model, loaders[1], classes, torch.device(args.device))
        rows.append(
            {
                "encoder": name, "mIoU": iou, "loss": loss, "parameters (M)": parameters_of(model),
                "GMACs": gmacs(model, (3, args.size, args.size)),
            }
        )  # fmt: skip
        torch.save(model.state_dict(), args.output / f"{args.decoder}_{name}.pt")
        (args.output / "result.json").write_text(json.dumps(rows, indent=2))
    print(as_table(rows))
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CommandError) as error:
        raise SystemExit(f"error: {error}") from None
