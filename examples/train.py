"""Train any timm model, merging or plain, on an ImageFolder (train/CLASS/*.png, validation/CLASS/*.png): one process.

    python examples/train.py DATA --model ltm_mobilevit_s --pretrained --model-kwargs merge_warmup_epochs=5

All parts are timm's: loaders, optimizer, scheduler, task, EMA, saver. What refreshes clusters and counts epochs
attaches itself to the task; nothing here knows of it. For several machines, AMP with fp16, distillation and the rest,
take timm's train.py: see docs/recipe.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, ParseKwargs, accuracy, setup_default_logging
from torch import nn
from tqdm import tqdm

from timm_ltm.cost import input_size_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="ltm_mobilevit_s")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="name=value ...")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup-epochs", type=int, default=2, help="of the learning rate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--hflip", type=float, default=0.5, help="0 where left and right matter")
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--ema-decay", type=float, default=0.0, help="0 is none")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", help="a checkpoint of this script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="output/train/MODEL if not given")
    args = parser.parse_args()
    args.output = args.output or f"output/train/{args.model}"
    return args


@torch.no_grad()
def validate(model: nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> float:
    """Top-1 in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        top1.update(accuracy(model(images), targets)[0].item(), len(targets))
    return top1.avg


def main() -> None:
    args = arguments()
    setup_default_logging()  # timm_ltm says when merging will start, and that it starts
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    Path(args.output).mkdir(parents=True, exist_ok=True)

    datasets = [create_dataset("", args.data, split=split) for split in ("train", "validation")]
    classes = len(datasets[0].reader.class_to_idx)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes, **args.model_kwargs)
    model = model.to(device)
    config = resolve_model_data_config(model)
    common = dict(
        input_size=input_size_of(model), mean=config["mean"], std=config["std"], interpolation=config["interpolation"],
        batch_size=args.batch_size, num_workers=args.workers, use_prefetcher=False, persistent_workers=args.workers > 0,
    )  # fmt: skip
    augmentation = dict(scale=(0.6, 1.0), hflip=args.hflip, color_jitter=None)
    train_loader = create_loader(datasets[0], is_training=True, **augmentation, **common)
    test_loader = create_loader(datasets[1], crop_pct=config["crop_pct"], **common)

    mixup, criterion = None, nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)
        criterion = SoftTargetCrossEntropy()
    task = ClassificationTask(model, criterion, device=device, verbose=False)  # the refresh attaches itself here
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.lr / 10
    )
    if args.ema_decay:
        task.setup_ema(decay=args.ema_decay)
    start = resume_task_checkpoint(task, args.resume, optimizer) if args.resume else 0
    saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=args.output, max_history=2, task=task)

    updates = start * len(train_loader)
    for epoch in range(start, epochs):
        scheduler.step(epoch)
        model.train()
        losses, bar = AverageMeter(), tqdm(train_loader, desc=f"epoch {epoch}", unit="batch")
        for images, targets in bar:
            images, targets = images.to(device), targets.to(device)
            if mixup is not None:
                images, targets = mixup(images, targets)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bfloat16):
                loss = task(images, targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            task.update_ema(step=updates)
            losses.update(loss.item(), len(images))
            bar.set_postfix(loss=f"{losses.avg:.3f}")
        top1 = validate(task.get_eval_model(), test_loader, device)
        line = f"epoch {epoch}: loss {losses.avg:.4f}, top-1 {top1:.2f} %"
        if task.has_ema():
            line += f", of the EMA {validate(task.get_eval_model(ema=True), test_loader, device):.2f} %"
        merging = getattr(model, "merging", None)
        tqdm.write(line + ("" if merging is None else ", merging" if merging else ", not merging yet"))
        saver.save_checkpoint(epoch, metric=top1)


if __name__ == "__main__":
    main()
