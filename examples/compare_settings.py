"""What compare.py is told, and that what is told later fits the results that a folder has."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from finetuning import whole

from timm_ltm.cli.common import CommandError

# What results depend on: of the plain model and of the data, and of fine-tuning
MEASURED = ("data", "model", "model_kwargs", "img_size", "checkpoint", "ema", "pretrained", "shots", "plain_epochs")
MEASURED += ("plain_lr", "plain_batch_size", "test_limit", "calibrate", "clusters", "data_seed", "device", "scratch")
TRAINED = ("steps", "epochs", "lr", "own_lr", "weight_decay", "batch_size", "smoothing", "warmup", "scale", "hflip")
TRAINED += ("refresh_every", "bfloat16", "channels_last", "merge_warmup")
# Of training. 1, which said none, also decayed what timm's models name in no_weight_decay; 2 smoothed Q by one image in
# every cell, and its T left phi half of the entropy; in 3 attention counted LTM's slots by their sizes alone; in 4 LTM
# compared all pairs of more than 256 tokens
VERSION = 5
# What earlier versions did, and do not say
BEFORE = {"version": 1, "clusters": 0, "scratch": False, "merge_warmup": 0.0}


def arguments(
    description: str | None, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Of the command line.

    Args:
        description: What ``--help`` begins with.
        more: Adds options.
    """
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", nargs="?", type=Path, help="with train and validation; scikit-learn's digits if not given")
    p.add_argument("--out", type=Path, default=Path("output/compare"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--workers", type=int, default=2, help="threads that decode images")
    p.add_argument("--cache-gb", type=float, default=4.0, help="of decoded images that are kept")
    p.add_argument("--data-seed", type=int, default=0, help="of which images are drawn")
    g = p.add_argument_group("plain model")
    g.add_argument("--model", required=True, help="its name in timm")
    g.add_argument("--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE")
    g.add_argument("--img-size", type=int)
    g.add_argument("--checkpoint", type=Path)
    g.add_argument("--ema", action="store_true", help="the checkpoint's averaged weights")
    g.add_argument("--pretrained", action="store_true", help="timm's weights, which it downloads")
    g.add_argument("--shots", type=int, default=15, help="images of each class that a head is fitted to")
    g.add_argument("--plain-epochs", type=int, default=20, help="of training from scratch, without any weights")
    g.add_argument("--plain-lr", type=float, default=1e-3)
    g.add_argument("--plain-batch-size", type=int, default=64)
    g = p.add_argument_group("merging models")
    g.add_argument("--budget", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="shares of the plain GMACs")
    g.add_argument(
        "--merge", nargs="+", action="append", metavar="METHOD NAME=VALUE",
        help="may be repeated, the first is the reference; all methods if not given",
    )  # fmt: skip
    g.add_argument("--calibrate", type=int, default=128, help="training images that LTMP's thresholds are set by")
    g.add_argument(
        "--clusters", type=int, default=0, help="training images and labels from which LTM has clusters from the start"
    )
    g = p.add_argument_group("measurement")
    g.add_argument("--test-limit", type=int, default=0, help="validation images, drawn at random; 0 is all")
    g.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32], help="of timing")
    g.add_argument("--rounds", type=int, default=10, help="of timing; 0 leaves it out")
    g.add_argument("--eval-batch-size", type=int, default=32)
    g = p.add_argument_group("fine-tuning, of the plain model too")
    g.add_argument("--steps", type=int, default=0, help="0 is none")
    g.add_argument(
        "--scratch", action="store_true",
        help="train from random weights, the same ones of a seed for all models; nothing is measured without training",
    )  # fmt: skip
    g.add_argument("--merge-warmup", type=float, default=0.0, help="share of steps before merging begins")
    g.add_argument("--epochs", type=int, default=0, help="in place of steps")
    g.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    g.add_argument("--lr", type=float, default=5e-5)
    g.add_argument(
        "--own-lr", type=float,
        help="of what a method learns and the plain model lacks, PatchMerger's queries for example, which starts from "
        "random numbers; LTMP's thresholds have 5e-3 in any case. --lr if not given",
    )  # fmt: skip
    g.add_argument("--weight-decay", type=float, default=0.05)
    g.add_argument("--batch-size", type=int, default=32)
    g.add_argument("--smoothing", type=float, default=0.1)
    g.add_argument("--warmup", type=float, default=0.1, help="share of steps in which the learning rate rises")
    g.add_argument("--scale", type=float, default=0.5, help="share of an image that a crop has at least")
    g.add_argument("--hflip", type=float, help="share of images mirrored; 0.5, of digits 0, if not given")
    g.add_argument("--refresh-every", type=int, default=0, help="steps between refreshes of clusters; an eighth of all")
    g.add_argument("--bfloat16", action="store_true", help="autocast")
    g.add_argument("--channels-last", action="store_true")
    g.add_argument("--save-every", type=int, default=100, help="steps")
    more(p)
    args = p.parse_args()
    if args.scratch and (args.checkpoint or args.pretrained):
        p.error("--scratch: got weights beside it, expected none. Leave out --checkpoint or --pretrained.")
    if args.scratch and not (args.steps or args.epochs):
        p.error("--scratch: got nothing to train, expected --steps or --epochs.")
    if args.scratch and args.clusters:
        p.error("--scratch: got --clusters beside it, expected none: they would be of other weights. Leave them out.")
    if args.clusters < 0:
        p.error(f"--clusters: got {args.clusters}, expected 0 or more.")
    if not 0 <= args.merge_warmup <= 1:
        p.error(f"--merge-warmup: got {args.merge_warmup:g}, expected a share of all steps, from 0 to 1.")
    if args.hflip is None:
        args.hflip = 0.0 if args.data is None else 0.5
    for name in ("shots", "plain_epochs", "plain_batch_size", "calibrate", "eval_batch_size", "batch_size"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected 1 or more.")
    return args


def settings_in(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """What results of a folder depend on, by what kind of result."""
    found = {name: getattr(args, name) for name in MEASURED}
    found["data"] = "digits" if args.data is None else str(args.data.resolve())
    found["device"] = torch.device(args.device).type
    if args.checkpoint is not None:
        if not args.checkpoint.is_file():
            raise CommandError(f"--checkpoint: got {str(args.checkpoint)!r}, expected a file.")
        found["checkpoint"] = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    elif not args.pretrained:
        found |= {name: getattr(args, name) for name in ("scale", "hflip", "bfloat16")}
    trains = args.steps or args.epochs
    trained = {name: getattr(args, name) for name in TRAINED}
    return {"measured": found, **({"trained": {"version": VERSION, **trained}} if trains else {})}


class Settings:
    """Those that results of a folder were made by, in its ``settings.json``; they count once there are results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.file, self.now = args.out, args.out / "settings.json", settings_in(args)

    def made(self, kind: str) -> bool:
        """Whether there are results that depend on them, or parts of some."""
        names = ("plain.pt", "plain.state.pt", "results/*.json")
        if kind == "trained":
            names = ("results/*_seed_*.json", "results/*_seed_*.state.pt")
        return any(True for name in names for _ in self.out.glob(name))

    def check(self, *but: str) -> None:
        """CommandError where they differ from those told now."""
        for kind, now in self.now.items():
            if not self.made(kind) or kind not in self._read():
                continue
            before = {**BEFORE, **self._read()[kind]}
            for name in now:
                if name not in but and before.get(name) != now[name]:
                    told = "version of the training" if name == "version" else f"--{name.replace('_', '-')}"
                    raise CommandError(
                        f"{told}: got {now[name]!r}, expected {before.get(name)!r}, by which the results in {self.out} "
                        "were made. Use another --out, or delete that folder."
                    )

    def remember(self, kind: str) -> None:
        """Before the first result that depends on them is made; before another, see that they are the same."""
        self.check()
        if not self.made(kind):
            with whole(self.file) as part:
                part.write_text(json.dumps({**self._read(), kind: self.now[kind]}, indent=2))

    def _read(self) -> dict[str, dict[str, object]]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}
