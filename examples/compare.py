"""All merging methods on data of your own: cost, speed, accuracy without training and fine-tuned, from one plain model.

    python examples/compare.py --model test_vit --img-size 32 --model-kwargs patch_size=4 --plain-lr 2e-3 --steps 200
    python examples/compare.py DATA --model vit_small_patch14_dinov2 --img-size 224 --checkpoint WEIGHTS --steps 500

DATA holds train/CLASS/*.jpg and validation/CLASS/*.jpg; without it, scikit-learn's digits are written and taken.
WEIGHTS is a checkpoint of timm's train.py or anybody's; without a head of DATA's classes, one is fitted to --shots
images of each by logistic regression. Without --checkpoint or --pretrained the plain model is trained first, or, with
--scratch, every model from random weights.

Writes compare.csv, compare.md and compare.png to --out, and each measurement as soon as it is done: a run that was
killed goes on where it was. More methods, budgets or seeds may be added to a run that is done. Of each model, the
weights of its first fine-tuning are kept under --out/results, to be timed: as many files of the plain model's size.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from compare_report import Store, name_of, report
from compare_settings import Settings, arguments
from digits_folder import write_digits
from finetuning import Pictures, Recipe, clusters_first, save, shortened, train
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import CommandError, load_model, one_line, parameters_of, settings_of
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.fidelity import errors, outputs_of
from timm_ltm.methods.ltmp import calibrate, flops_ratio
from timm_ltm.probe import fit_head
from timm_ltm.reduction import METHODS
from timm_ltm.speed import times_of

MERGES = [["tome", "schedule=flat"], ["ltm"], ["tofu", "schedule=flat"], ["ltmp"], ["patch_merger"]]


class Comparison:
    """A plain model, data, and what is measured of them; all of it is kept under ``--out``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.store, self.settings = args, Store(args.out / "results"), Settings(args)
        self.settings.check("version")  # which counts where something is left to train
        self.data = args.data or args.out / "digits"
        if args.data is None and not (self.settings.made("measured") and self.data.exists()):
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
        self.merging, self.told = cache(self._merging), {}  # what clusters tell of labels, by model
        room, pictures = args.cache_gb * 5e8, partial(Pictures, workers=args.workers)

        def decode(image: object) -> Tensor:
            return torch.as_tensor(clean(image))

        self.tests = pictures(samples[1], decode, room)
        self.clean = pictures(samples[0], decode, room / 10)  # of the training set, for heads and thresholds
        self.training = pictures(samples[0], shortened(round(max(self.size[1:]) * 8 / 7)), room)
        self.fill_in_plain(headless)

    def bare_model(self, seed: int = 0) -> tuple[nn.Module, bool]:
        """timm's model with a head of as many classes, and whether that was put on anew."""
        args = argparse.Namespace(**vars(self.args))
        args.num_classes, spec = None, str(args.checkpoint or args.model)
        if not args.checkpoint and not args.pretrained:
            args.num_classes = self.classes
        torch.manual_seed(seed)
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
            return
        if headless:
            of_class: dict[int, list[int]] = {}
            for i, label in enumerate(self.clean.labels.tolist()):
                of_class.setdefault(label, []).append(i)
            rng = random.Random(args.data_seed)
            chosen = [i for of in of_class.values() for i in rng.sample(of, min(args.shots, len(of)))]
            loader = tqdm(list(self.batches(self.clean, chosen, lazy=True)), desc="fitting the head", unit="batch")
            fit_head(self.plain, (batch() for batch in loader))
        elif not args.checkpoint and not args.pretrained and not args.scratch:
            size = args.plain_batch_size
            steps = args.plain_epochs * max(1, len(self.training) // size)
            recipe = Recipe(
                steps, size, args.plain_lr, warmup=steps // 10, scale=args.scale, hflip=args.hflip,
                bfloat16=args.bfloat16, save_every=args.save_every,
            )  # fmt: skip
            state = args.out / "plain.state.pt"
            self.settings.remember("measured")
            train(self.plain, self.training, self.normalize, self.size[1:], recipe, 0, state, "plain, from scratch")
            save(self.plain.state_dict(), file)
            state.unlink()
        if not file.exists():
            self.settings.remember("measured")
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

    def _merging(self, words: tuple[str, ...], budget: float) -> nn.Module | str:
        """The model of a method for a budget, sharing the plain one's weights; or why there is none."""
        method, given = words[0], settings_of(words[1:])
        if method not in METHODS:
            raise CommandError(f"--merge: got {method!r}, expected one of {', '.join(METHODS)}.")
        name = name_of(words, budget)
        file = self.store.path(name, ".pt")
        saved = torch.load(file, map_location=self.args.device) if file.exists() else None
        if saved is not None and "left_out" in saved:
            return saved["left_out"]
        settings = {"gmacs": budget, **given} if saved is None else saved["settings"]
        try:
            model = self.converted(method, settings)
            if saved is None and model.config.trains_budget and not self.args.scratch:
                model = self.calibrated(method, settings)
        except ValueError as error:
            if not str(error).startswith(("method:", "gmacs:")):
                raise CommandError(f"--merge {' '.join(words)}: {error}") from None
            save({"left_out": str(error)}, file)
            return str(error)
        if saved is None:  # a schedule takes seconds to find
            self.told[name] = self.clustered(model)
            found = {k: v for k, v in given.items() if k != "schedule"} | model.config.setting_of(model.block_amounts)
            own = {key: value for key, value in model.state_dict().items() if ".reducer." in key}
            save({"settings": json.loads(json.dumps(found)), "own": own, "told": self.told[name]}, file)
        else:
            model.load_state_dict(saved["own"], strict=False)
            self.told[name] = saved.get("told", {})
        return model

    def clustered(self, model: nn.Module) -> dict[str, float]:
        """See :func:`finetuning.clusters_first`: of --clusters training images, and of 500 others."""
        if not self.args.clusters:
            return {}
        order = random.Random(self.args.data_seed).sample(range(len(self.clean)), len(self.clean))
        chosen, others = order[: self.args.clusters], order[self.args.clusters :][:500]
        return clusters_first(
            model, partial(self.batches, self.clean, chosen), partial(self.batches, self.clean, others or chosen)
        )

    def converted(self, method: str, settings: dict[str, object]) -> nn.Module:
        torch.manual_seed(0)
        return timm_ltm.convert(self.plain, method, **settings).eval()

    def calibrated(self, method: str, settings: dict[str, object]) -> nn.Module:
        """With thresholds by which some training images cost the budget; what such a method aims at is near to it.

        Of some tries, the one that costs the most within the budget, or what is nearest to it.
        """
        images = self.first(self.clean, min(self.args.calibrate, len(self.clean)))
        budget = aim = settings["gmacs"]
        tries: list[tuple[float, nn.Module]] = []
        for _ in range(4):
            model = self.converted(method, {**settings, "gmacs": aim})
            try:
                calibrate(model, images)
            except ValueError:
                if not tries:
                    raise
                break
            tries.append((self.mean_cost(model, images) / gmacs(self.plain), model))
            if budget - 0.01 <= tries[-1][0] <= budget:
                break
            aim = min(aim * (budget - 0.003) / tries[-1][0], 0.999)
        share, model = max(tries, key=lambda found: (found[0] <= budget, -abs(found[0] - budget)))
        if abs(share - budget) > 0.01:
            tqdm.write(
                f"warning: {method} costs {share:.3f} of the plain model on {len(images)} training images, where "
                f"{budget:g} was asked for: read its points with its ratio.", file=sys.stderr,
            )  # fmt: skip
        return model

    def model(self, name: str) -> nn.Module:
        """By the name of its results."""
        return self.plain if name == "plain" else self.merging(*self.named[name])

    def find_models(self) -> list[tuple[str, ...]]:
        """Names and what they mean; methods that do not fit are left out, with a line that says why."""
        self.named, merges = {}, [tuple(words) for words in self.args.merge or MERGES]
        bar = tqdm([(words, b) for words in merges for b in self.args.budget], desc="models", unit="model")
        for words, budget in bar:
            found, name = self.merging(words, budget), name_of(words, budget)
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
        if not getattr(model, "by_image", False):  # the plain model has none
            return gmacs(model)
        return self.mean_cost(model, self.first(self.tests, min(256, len(self.tests))))

    @torch.no_grad()
    def mean_cost(self, model: nn.Module, images: Tensor) -> float:
        """GMACs, the mean over images: counted for the first of them, and scaled by r_FLOPs, which is fast to have."""
        few = images[: min(16, self.args.eval_batch_size)]
        counted, ratios = gmacs(model, inputs=few), []
        for x in (few, *images.split(self.args.eval_batch_size)):
            model(x)
            ratios.append(flops_ratio(model))
        return counted * float(torch.cat(ratios[1:]).mean() / ratios[0].mean())

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

    def time_all(self, title: str, names: list[str], model: Callable[[str], nn.Module]) -> None:
        """Of models that take turns, unless all of them have been timed."""
        models: dict[str, nn.Module] = {}
        for size in self.args.batch_sizes if self.args.rounds else ():
            done = self.store.read(f"{title} {size}") if self.store.has(f"{title} {size}") else {}
            if not set(names) <= done.get("times", {}).keys():
                models = models or {name: model(name) for name in names}
                times = self.times(models, size, title)
                self.store.write(f"{title} {size}", {"threads": torch.get_num_threads(), "times": times})

    def finetune(self, name: str, seed: int) -> None:
        """Train a copy, then measure it; the weights of a model's first training are kept, to be timed."""
        args, title = self.args, f"{name} seed {seed}"
        if self.store.has(title):
            return
        steps = args.steps or args.epochs * max(1, len(self.training) // args.batch_size)
        recipe = Recipe(
            steps, args.batch_size, args.lr, args.weight_decay, args.smoothing, round(args.warmup * steps),
            args.scale, args.hflip, args.refresh_every or max(1, steps // 8), args.bfloat16, args.channels_last,
            args.save_every, args.own_lr, round(args.merge_warmup * steps),
        )  # fmt: skip
        model, state = copy.deepcopy(self.model(name)), self.store.path(title, ".state.pt")
        if args.scratch:
            model.load_state_dict(self.bare_model(seed)[0].state_dict(), strict=False)  # but for what a method adds
        train(model, self.training, self.normalize, self.size[1:], recipe, seed, state, title)
        arrays = {"right": self.outputs(model, title)["right"]}
        if not self.weights(name).exists():
            save(model.state_dict(), self.weights(name))
        self.store.write(title, {"parameters_m": parameters_of(model), "gmacs": self.cost(model)}, arrays)
        state.unlink()

    def weights(self, name: str) -> Path:
        """Of a fine-tuned model."""
        return self.store.path(f"{name} fine-tuned", ".pt")

    def tuned(self, name: str) -> nn.Module:
        model = copy.deepcopy(self.model(name))
        model.load_state_dict(torch.load(self.weights(name), map_location=self.args.device))
        return model.eval()

    def run(self) -> None:
        merges = self.find_models()
        names, seeds = ["plain", *self.named], self.args.seeds if self.args.steps or self.args.epochs else []
        runs = [(name, seed) for seed in seeds for name in names]
        to_train = not all(self.store.has(f"{name} seed {seed}") for name, seed in runs)
        if to_train:
            self.settings.check()
        if not self.args.scratch:
            for name in tqdm(names, desc="without training", unit="model"):
                self.measure(name)
            self.time_all("speed", names, self.model)
            report(self.args, self.store, self.named, merges, [], self.size)
        if to_train:
            self.settings.remember("trained")
        for name, seed in tqdm(runs, desc="training" if self.args.scratch else "fine-tuning", unit="run"):
            self.finetune(name, seed)
        kept = [name for name in names if self.weights(name).exists()]  # earlier versions kept none
        if seeds and "plain" in kept:
            self.time_all("speed fine-tuned", kept, self.tuned)
        report(self.args, self.store, self.named, merges, seeds, self.size)


def run(kind: type[Comparison], args: argparse.Namespace) -> Comparison:
    """A comparison, run to its end."""
    try:
        comparison = kind(args)
        comparison.run()
    except (CommandError, ValueError) as error:
        raise SystemExit(one_line("compare", error)) from None
    print((args.out / "compare.md").read_text())
    return comparison


def main() -> None:
    run(Comparison, arguments(__doc__))


if __name__ == "__main__":
    main()
