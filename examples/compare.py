"""All merging methods on data of your own: cost, speed, accuracy without training and fine-tuned, from one plain model.

    python examples/compare.py --model test_vit --img-size 32 --model-kwargs patch_size=4 --plain-lr 2e-3 --steps 200
    python examples/compare.py DATA --model vit_small_patch14_dinov2 --img-size 224 --checkpoint WEIGHTS --steps 500

DATA holds train/CLASS/*.jpg and validation/CLASS/*.jpg; without it, scikit-learn's digits are written and taken.
WEIGHTS is a checkpoint of timm's train.py or anybody's; without a head of DATA's classes, one is fitted to --shots
images of each by logistic regression. Without --checkpoint or --pretrained the plain model is trained first.

Writes compare.csv, compare.md and compare.png to --out, and each measurement as soon as it is done: a run that was
killed goes on where it was. More methods, budgets or seeds may be added to a run that is done.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from compare_report import Store, report
from digits_folder import write_digits
from finetuning import Pictures, Recipe, save, shortened, train
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import CommandError, load_model, parameters_of, settings_of
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.fidelity import errors, outputs_of
from timm_ltm.methods.ltmp import calibrate
from timm_ltm.models.saved import is_own
from timm_ltm.probe import fit_head
from timm_ltm.reduction import METHODS
from timm_ltm.speed import times_of

MERGES = [["tome", "schedule=flat"], ["ltm"], ["tofu", "schedule=flat"], ["ltmp"], ["patch_merger"]]
# What results depend on: of the plain model and of the data, and of fine-tuning
MEASURED = ("data", "model", "model_kwargs", "img_size", "checkpoint", "ema", "pretrained", "shots", "plain_epochs")
MEASURED += ("plain_lr", "plain_batch_size", "test_limit", "calibrate", "data_seed", "device")
TRAINED = ("steps", "epochs", "lr", "weight_decay", "batch_size", "smoothing", "warmup", "scale", "hflip")
TRAINED += ("refresh_every", "bfloat16", "channels_last")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    g.add_argument("--calibrate", type=int, default=32, help="training images that LTMP's thresholds are set by")
    g = p.add_argument_group("measurement")
    g.add_argument("--test-limit", type=int, default=0, help="validation images, drawn at random; 0 is all")
    g.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32], help="of timing")
    g.add_argument("--rounds", type=int, default=10, help="of timing; 0 leaves it out")
    g.add_argument("--eval-batch-size", type=int, default=32)
    g = p.add_argument_group("fine-tuning, of the plain model too")
    g.add_argument("--steps", type=int, default=0, help="0 is none")
    g.add_argument("--epochs", type=int, default=0, help="in place of steps")
    g.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    g.add_argument("--lr", type=float, default=5e-5)
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
    args = p.parse_args()
    if args.hflip is None:
        args.hflip = 0.0 if args.data is None else 0.5
    for name in ("shots", "plain_epochs", "plain_batch_size", "calibrate", "eval_batch_size", "batch_size"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected 1 or more.")
    return args


def settings_in(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """What earlier results of a folder depend on, by what kind of result."""
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
    return {"measured": found, **({"trained": {name: getattr(args, name) for name in TRAINED}} if trains else {})}


def check_settings(args: argparse.Namespace) -> None:
    """Remember the settings, or see that those of earlier results are the same."""
    file, now = args.out / "settings.json", settings_in(args)
    before = json.loads(file.read_text()) if file.exists() else {}
    for kind in before.keys() & now.keys():
        for name, value in now[kind].items():
            if before[kind].get(name) != value:
                raise CommandError(
                    f"--{name.replace('_', '-')}: got {value!r}, expected {before[kind].get(name)!r}, by which the "
                    f"results in {args.out} were made. Use another --out, or delete that folder."
                )
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**before, **now}, indent=2))


class Comparison:
    """A plain model, data, and what is measured of them; all of it is kept under ``--out``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.store = args, Store(args.out / "results")
        self.data = args.data or args.out / "digits"
        if args.data is None and not (self.data / "validation").exists():
            write_digits(self.data, args.img_size or 32)
        try:
            folders = [ImageFolder(str(self.data / split)) for split in ("train", "validation")]
        except FileNotFoundError as error:
            raise CommandError(f"data: {error} Expected train/CLASS/*.jpg and validation/CLASS/*.jpg.") from None
        if folders[0].classes != folders[1].classes:
            raise CommandError(
                "data: got other classes in validation than in train, expected the same folders in both."
            )
        self.classes, samples = len(folders[0].classes), [folder.samples for folder in folders]
        if 0 < args.test_limit < len(samples[1]):
            samples[1] = sorted(random.Random(args.data_seed).sample(samples[1], args.test_limit))
        self.plain, headless = self.bare_model()
        self.size = input_size_of(self.plain)
        config = {**resolve_model_data_config(self.plain), "input_size": self.size}
        self.mean, self.std = (255.0 * torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        clean = create_transform(**config, is_training=False, use_prefetcher=True)  # which leaves uint8
        room, pictures = args.cache_gb * 5e8, partial(Pictures, workers=args.workers)

        def decode(image: object) -> Tensor:
            return torch.as_tensor(clean(image))

        self.tests = pictures(samples[1], decode, room)
        self.clean = pictures(samples[0], decode, room / 10)  # of the training set, for heads and thresholds
        self.training = pictures(samples[0], shortened(round(max(self.size[1:]) * 8 / 7)), room)
        self.fill_in_plain(headless)

    def bare_model(self) -> tuple[nn.Module, bool]:
        """timm's model with a head of as many classes, and whether that was put on anew; None if nothing is trained."""
        args = argparse.Namespace(**vars(self.args))
        args.num_classes, spec = None, str(args.checkpoint or args.model)
        if not args.checkpoint and not args.pretrained:
            args.num_classes = self.classes
        torch.manual_seed(0)
        model, _ = load_model(spec, args)
        headless = model.num_classes != self.classes
        if headless:
            model.reset_classifier(self.classes)
        return model.to(self.args.device).eval(), headless

    def fill_in_plain(self, headless: bool) -> None:
        """A head for a model without, weights for one without; kept."""
        args, file = self.args, self.args.out / "plain.pt"
        if file.exists():
            self.plain.load_state_dict(torch.load(file, map_location=args.device))
        elif headless:
            of_class: dict[int, list[int]] = {}
            for i, label in enumerate(self.clean.labels.tolist()):
                of_class.setdefault(label, []).append(i)
            rng = random.Random(args.data_seed)
            chosen = [i for of in of_class.values() for i in rng.sample(of, min(args.shots, len(of)))]
            loader = tqdm(list(self.batches(self.clean, chosen, lazy=True)), desc="fitting the head", unit="batch")
            fit_head(self.plain, (batch() for batch in loader))
        elif not args.checkpoint and not args.pretrained:
            size = args.plain_batch_size
            steps = args.plain_epochs * max(1, len(self.training) // size)
            recipe = Recipe(
                steps, size, args.plain_lr, warmup=steps // 10, scale=args.scale, hflip=args.hflip,
                bfloat16=args.bfloat16, save_every=args.save_every,
            )  # fmt: skip
            state = args.out / "plain.state.pt"
            train(self.plain, self.training, self.normalize, self.size[1:], recipe, 0, state, "plain, from scratch")
            save(self.plain.state_dict(), file)
            state.unlink()
        if not file.exists():
            save(self.plain.state_dict(), file)

    # Images

    def normalize(self, x: Tensor) -> Tensor:
        """uint8 (B, C, H, W), on the device as the model expects it."""
        device = self.args.device
        return (x.to(device).float() - self.mean.to(device)) / self.std.to(device)

    def batches(self, pictures: Pictures, indices: list[int], lazy: bool = False):
        """Batches and their labels; lazy, functions that make them."""
        size = self.args.eval_batch_size
        for start in range(0, len(indices), size):
            of = indices[start : start + size]

            def make(of: list[int] = of) -> tuple[Tensor, Tensor]:
                return self.normalize(torch.stack(pictures.take(of))), pictures.labels[of]

            yield make if lazy else make()

    def first(self, pictures: Pictures, count: int) -> Tensor:
        """So many images, drawn at random, some more than once where there are not enough."""
        order = random.Random(self.args.data_seed).sample(range(len(pictures)), len(pictures))
        return self.normalize(torch.stack(pictures.take([order[i % len(order)] for i in range(count)])))

    # Models

    @cache  # noqa: B019  one comparison in a process
    def merging(self, words: tuple[str, ...], budget: float) -> nn.Module | str:
        """The model of a method for a budget, sharing the plain one's weights; or why there is none."""
        method, given = words[0], settings_of(words[1:])
        if method not in METHODS:
            raise CommandError(f"--merge: got {method!r}, expected one of {', '.join(METHODS)}.")
        file = self.store.path(f"{' '.join(words)} {budget:g}", ".pt")
        saved = torch.load(file, map_location=self.args.device) if file.exists() else None
        if saved is not None and "left_out" in saved:
            return saved["left_out"]
        settings = {"gmacs": budget, **given} if saved is None else saved["settings"]
        try:
            model = self.converted(method, settings)
            if saved is None and model.config.trains_budget:
                model = self.calibrated(method, settings)
        except ValueError as error:
            if not str(error).startswith(("method:", "gmacs:")):
                raise CommandError(f"--merge {' '.join(words)}: {error}") from None
            save({"left_out": str(error)}, file)
            return str(error)
        own = {name: p for name, p in model.named_parameters() if is_own(name)}
        if saved is None:  # a schedule takes seconds to find
            found = {k: v for k, v in given.items() if k != "schedule"} | model.config.setting_of(model.block_amounts)
            save({"settings": json.loads(json.dumps(found)), "own": {n: p.detach() for n, p in own.items()}}, file)
        else:
            with torch.no_grad():
                for name, p in own.items():
                    p.copy_(saved["own"][name])
        return model

    def converted(self, method: str, settings: dict[str, object]) -> nn.Module:
        torch.manual_seed(0)
        return timm_ltm.convert(self.plain, method, **settings).eval()

    def calibrated(self, method: str, settings: dict[str, object]) -> nn.Module:
        """With thresholds by which some training images cost the budget; what such a method aims at is near to it."""
        images, whole = self.first(self.clean, self.args.calibrate), gmacs(self.plain)
        budget = aim = settings["gmacs"]
        for _ in range(4):
            model = self.converted(method, {**settings, "gmacs": aim})
            calibrate(model, images)
            share = gmacs(model, inputs=images) / whole
            if budget - 0.01 <= share <= budget:
                break
            aim = min(aim * (budget - 0.003) / share, 0.999)
        return model

    def model(self, name: str) -> nn.Module:
        """By the name of its results."""
        return self.plain if name == "plain" else self.merging(*self.named[name])

    def find_models(self) -> list[tuple[str, ...]]:
        """Names and what they mean; methods that do not fit are left out, with a line that says why."""
        self.named, merges = {}, [tuple(words) for words in self.args.merge or MERGES]
        bar = tqdm([(words, b) for words in merges for b in self.args.budget], desc="models", unit="model")
        for words, budget in bar:
            found, name = self.merging(words, budget), f"{' '.join(words)} {budget:g}"
            if isinstance(found, str):
                tqdm.write(f"warning: {name} is left out: {found}", file=sys.stderr)
            else:
                self.named[name] = words, budget
        if not self.named:
            raise CommandError("--merge: got no method that fits this model and budget, expected one. Use others.")
        return list(dict.fromkeys(words for words, _ in self.named.values()))

    # Measurements

    def cost(self, model: nn.Module) -> float:
        """GMACs; of methods whose cost depends on the image, the mean over some."""
        by_image = model is not self.plain and any(getattr(r, "by_image", False) for r in model.modules())
        return gmacs(model, inputs=self.first(self.tests, min(64, len(self.tests))) if by_image else None)

    @torch.inference_mode()
    def outputs(self, model: nn.Module, title: str) -> dict[str, np.ndarray]:
        """Of every test image: ``right``, whether it is, and ``class`` and ``mean`` tokens (n, D)."""
        found: dict[str, list[np.ndarray]] = {}
        batches = list(self.batches(self.tests, list(range(len(self.tests))), lazy=True))
        for make in tqdm(batches, desc=title, unit="batch", leave=False):
            x, labels = make()
            features, logits = outputs_of(model, x)
            of_batch = {kind: features[kind].cpu().numpy() for kind in ("class", "mean") if kind in features}
            of_batch["right"] = (logits.argmax(dim=1).cpu() == labels).numpy()
            for kind, value in of_batch.items():
                found.setdefault(kind, []).append(value)
        return {kind: np.concatenate(values) for kind, values in found.items()}

    def measure(self, name: str) -> None:
        """Without training."""
        if self.store.has(name):
            return
        model = self.model(name)
        arrays = self.outputs(model, name)
        if name != "plain":
            reference = self.store.arrays("plain")
            features, expected = (
                {kind: torch.from_numpy(of[kind]) for kind in ("class", "mean") if kind in of}
                for of in (arrays, reference)
            )
            arrays = {kind: e.numpy() for kind, e in errors(features, expected).items()} | {"right": arrays["right"]}
        self.store.write(name, {"parameters_m": parameters_of(model), "gmacs": self.cost(model)}, arrays)

    def times(self, models: dict[str, nn.Module], batch_size: int, title: str) -> dict[str, list[float]]:
        """Milliseconds of every round, of models that take turns."""
        x = self.first(self.tests, batch_size)
        progress = partial(tqdm, desc=f"{title}, batch {batch_size}", unit="round", leave=False)
        return times_of(models, x, self.args.rounds, progress=progress)

    def time_all(self) -> None:
        names = ["plain", *self.named]
        for size in self.args.batch_sizes if self.args.rounds else ():
            done = self.store.read(f"speed {size}") if self.store.has(f"speed {size}") else {}
            if not set(names) <= done.get("times", {}).keys():
                times = self.times({name: self.model(name) for name in names}, size, "timing")
                self.store.write(f"speed {size}", {"threads": torch.get_num_threads(), "times": times})

    def finetune(self, name: str, seed: int) -> None:
        """Train a copy, then measure it; its time in turns with the plain model's."""
        args, title = self.args, f"{name} seed {seed}"
        if self.store.has(title):
            return
        steps = args.steps or args.epochs * max(1, len(self.training) // args.batch_size)
        recipe = Recipe(
            steps, args.batch_size, args.lr, args.weight_decay, args.smoothing, round(args.warmup * steps),
            args.scale, args.hflip, args.refresh_every or max(1, steps // 8), args.bfloat16, args.channels_last,
            args.save_every,
        )  # fmt: skip
        model, state = copy.deepcopy(self.model(name)), self.store.path(title, ".state.pt")
        train(model, self.training, self.normalize, self.size[1:], recipe, seed, state, title)
        arrays = {"right": self.outputs(model, title)["right"]}
        values = {"parameters_m": parameters_of(model), "gmacs": self.cost(model)}
        if args.rounds and name != "plain" and seed == args.seeds[0]:
            taken = {size: self.times({"plain": self.plain, name: model}, size, title) for size in args.batch_sizes}
            values["times"] = taken
        self.store.write(title, values, arrays)
        state.unlink()

    def run(self) -> None:
        merges = self.find_models()
        for name in tqdm(["plain", *self.named], desc="without training", unit="model"):
            self.measure(name)
        self.time_all()
        seeds = self.args.seeds if self.args.steps or self.args.epochs else []
        report(self.args, self.store, self.named, merges, [], self.size)
        runs = [(name, seed) for seed in seeds for name in ["plain", *self.named]]
        for name, seed in tqdm(runs, desc="fine-tuning", unit="run"):
            self.finetune(name, seed)
        report(self.args, self.store, self.named, merges, seeds, self.size)


def main() -> None:
    args = arguments()
    try:
        check_settings(args)
        Comparison(args).run()
    except CommandError as error:
        raise SystemExit(f"compare: {error}") from None
    print((args.out / "compare.md").read_text())


if __name__ == "__main__":
    main()
