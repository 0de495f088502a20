"""How far merging models are from the plain one at the same cost, without training: any timm model, any images.

    python benchmarks/fidelity.py PHOTOS --model vit_small_patch14_dinov2 --img-size 224 --checkpoint WEIGHTS
    python benchmarks/fidelity.py PHOTOS --probe FOLDER --budget 0.72 0.60     # and a linear probe of FOLDER/train
    python benchmarks/fidelity.py PHOTOS --model swin_tiny_patch4_window7_224 --merge tome --merge ltm --merge resized

Every method and schedule of --merge at every --budget, on the same images. Errors are 1 - cos to the plain model's
features (class token, mean token, every token), in thousandths, with standard errors; beside them the ratio to the
reference's (the first of --merge) with a bootstrap interval of 95 %, images drawn in pairs. Of models with a head, the
share of images that get the plain model's answer. With --probe, a logistic regression on the plain model's class token
and mean token of FOLDER/train, 15 images of each class, reads all of FOLDER/validation: points of top-1 lost, and
gained on the reference, with the standard errors of paired differences. With --search, a schedule is searched on that
many further images. Writes CSV, a Markdown table and a plot.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import numpy as np
import resized
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import CommandError, load_model, one_line, settings_of
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.fidelity import errors, features_of, interval
from timm_ltm.speed import latencies

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
REFERENCE = ["tome", "schedule=flat"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images, searched in all its folders")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m", help="a plain timm model's name")
    parser.add_argument("--checkpoint", type=Path, help="its weights; timm adapts them, or a checkpoint of train.py")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="shares of the plain GMACs")
    parser.add_argument(
        "--merge", nargs="+", action="append", metavar="METHOD NAME=VALUE",
        help="may be repeated, the first is the reference; ToMe's own schedule, ltm, tome and tofu if not given",
    )  # fmt: skip
    parser.add_argument("--search", type=int, default=0, help="images on which a schedule of LTM is searched")
    parser.add_argument("--probe", type=Path, help="an ImageFolder with train and validation")
    parser.add_argument("--limit", type=int, default=300, help="images, drawn at random; 0 is all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0, help="of timing, batches of 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("output/fidelity"))
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(pretrained=True, ema=False, num_classes=None)
    return parser.parse_args()


class Images:
    """Batches of a list of files, as a model expects them."""

    def __init__(self, files: list[Path], plain: nn.Module, args: argparse.Namespace) -> None:
        config = {**resolve_model_data_config(plain), "input_size": input_size_of(plain)}
        self.files, self.transform = files, create_transform(**config, is_training=False)
        self.size, self.device = args.batch_size, args.device

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __iter__(self):
        for start in range(0, len(self.files), self.size):
            files = self.files[start : start + self.size]
            yield torch.stack([self.transform(Image.open(f).convert("RGB")) for f in files]).to(self.device)


@torch.inference_mode()
def compare(plain: nn.Module, models: dict[str, nn.Module], images: Images) -> dict[str, dict[str, np.ndarray]]:
    """Errors of each model on each image, by kind; ``same``: whether the head gives the plain model's answer."""
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    for x in tqdm(images, desc="fidelity", unit="batch"):
        expected = features_of(plain, x)
        answer = plain(x).argmax(dim=1) if plain.num_classes else None
        for name, model in models.items():
            of_model = errors(features_of(model, x), expected)
            if answer is not None:
                of_model["same"] = (model(x).argmax(dim=1) == answer).double()
            for kind, value in of_model.items():
                found[name].setdefault(kind, []).append(value.cpu())
    return {name: {kind: torch.cat(v).numpy() for kind, v in kinds.items()} for name, kinds in found.items()}


@torch.inference_mode()
def probe_features(model: nn.Module, images: Images, what: str) -> np.ndarray:
    """[class token; mean token] (n, 2 D), or what there is of them."""
    rows = []
    for x in tqdm(images, desc=what, unit="batch"):
        features = features_of(model, x)
        rows.append(torch.cat([features[kind] for kind in ("class", "mean") if kind in features], dim=1).cpu())
    return torch.cat(rows).numpy()


def probe(plain: nn.Module, models: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Which images of the validation set a probe of the plain model's features gets right, by model."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, validation = (ImageFolder(args.probe / split) for split in ("train", "validation"))
    rng, by_class = random.Random(args.seed), {}
    for path, label in train.samples:
        by_class.setdefault(label, []).append(path)
    chosen = [(Path(p), c) for c, paths in by_class.items() for p in rng.sample(paths, min(15, len(paths)))]
    x = probe_features(plain, Images([path for path, _ in chosen], plain, args), "probe, train")
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    reader.fit(x, [label for _, label in chosen])
    labels = np.array([label for _, label in validation.samples])
    images = Images([Path(path) for path, _ in validation.samples], plain, args)
    models = {"plain": plain, **models}
    return {name: reader.predict(probe_features(m, images, f"probe, {name}")) == labels for name, m in models.items()}


def to_reference(values: np.ndarray, reference: np.ndarray) -> float:
    """Of two means over the same images, their ratio."""
    return values.mean() / reference.mean()


def plot(rows: list[dict[str, object]], kinds: list[str], path: Path) -> None:
    """Errors against GMACs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.4), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row["method"] for row in rows))
    for ax, kind in zip(axes[0], kinds, strict=True):
        for marker, name in zip("osD^vP*X", names, strict=False):
            of_name = sorted((row["gmacs"], row[kind], row[f"{kind}_se"]) for row in rows if row["method"] == name)
            ax.errorbar(*np.array(of_name).T[:2], yerr=np.array(of_name).T[2], marker=marker, label=name, capsize=2)
        ax.set(xlabel="GMACs", ylabel=f"1 - cos, {kind}, thousandths", yscale="log")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    try:
        run(arguments())
    except CommandError as error:
        raise SystemExit(one_line("fidelity", error)) from None


def run(args: argparse.Namespace) -> None:
    resized.register()
    files = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise CommandError(
            f"folder: got {str(args.folder)!r}, which holds no images. Expected some of {sorted(SUFFIXES)}."
        )
    for split in ("train", "validation") if args.probe else ():
        if not (args.probe / split).is_dir():
            raise CommandError(f"--probe: got {str(args.probe)!r}, expected a folder with train and validation in it.")
    random.Random(args.seed).shuffle(files)
    limit = args.limit or len(files) - args.search
    plain, _ = load_model(str(args.checkpoint or args.model), args)
    base, merges = gmacs(plain), args.merge or [REFERENCE, ["ltm"], ["tome"], ["tofu", "schedule=flat"]]
    models, about = {}, {}
    for budget in args.budget:
        for method, *settings in merges:
            title = " ".join([method, *settings])
            name = f"{title} {budget:g}"
            try:
                models[name] = timm_ltm.convert(plain, method, gmacs=budget, **settings_of(settings))
            except (CommandError, ValueError) as error:
                raise CommandError(f"--merge {title} at {budget:g}: {error}") from None
            about[name] = (title, budget)
        if args.search:
            others = Images(files[limit : limit + args.search], plain, args)
            found = timm_ltm.search_schedule(plain, others, budget, images=args.search)
            name = f"ltm searched {budget:g}"
            models[name] = timm_ltm.convert(plain, "ltm", compression_ratio=found.compression_ratio)
            about[name] = ("ltm searched", budget)
    images = Images(files[:limit], plain, args)
    found = compare(plain, models, images)
    right = probe(plain, models, args) if args.probe else {}
    x = next(iter(Images(files[:8], plain, args)))
    taken = latencies({"plain": plain, **models}, x, args.rounds, progress=tqdm) if args.rounds else {}
    kinds = [kind for kind in next(iter(found.values())) if kind != "same"]
    rows = []
    for name, (method, budget) in about.items():
        reference = found[f"{' '.join(merges[0])} {budget:g}"]
        cost = gmacs(models[name])
        row = {"method": method, "budget": budget, "gmacs": cost, "ratio": cost / base}
        if taken:
            row["latency_ratio"] = taken[name] / taken["plain"]
        for kind in kinds:
            values = 1e3 * found[name][kind]
            low, high = interval(to_reference, found[name][kind], reference[kind], seed=args.seed)
            row |= {kind: values.mean(), f"{kind}_se": values.std(ddof=1) / len(values) ** 0.5}
            row |= {f"{kind}_to_reference": found[name][kind].mean() / reference[kind].mean()}
            row |= {f"{kind}_low": low, f"{kind}_high": high}
        if "same" in found[name]:
            row["same_answer"] = found[name]["same"].mean()
        if right:
            lost = 100.0 * (right["plain"].astype(float) - right[name])
            row |= {"top1": 100 * right[name].mean(), "lost": lost.mean(), "lost_se": lost.std() / len(lost) ** 0.5}
            against = 100.0 * (right[name].astype(float) - right[f"{' '.join(merges[0])} {budget:g}"])
            row |= {"gain": against.mean(), "gain_se": against.std() / len(against) ** 0.5}
        rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "fidelity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, kinds, args, base, len(files[:limit]), right)
    (args.out / "fidelity.md").write_text(text)
    plot(rows, kinds, args.out / "fidelity.png")
    print(f"{text}\n{', '.join(str(args.out / f'fidelity.{kind}') for kind in ('csv', 'md', 'png'))}")


def table(rows: list, kinds: list[str], args: argparse.Namespace, base: float, count: int, right: dict) -> str:
    """Markdown."""
    head = ["model", "GMACs ratio", *(["latency ratio"] if "latency_ratio" in rows[0] else [])]
    head += [text for kind in kinds for text in (kind, "to the first")]
    head += ["same answer"] if "same_answer" in rows[0] else []
    head += [f"top-1 lost of {100 * right['plain'].mean():.2f} %", "gain on the first"] if right else []
    lines = [f"{args.model}, {count} images, plain {base:.3f} GMACs, {args.device}", ""]
    lines += ["| " + " | ".join(head) + " |", "|:---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [f"`{row['method']}` {row['budget']:g}", f"{row['ratio']:.3f}"]
        cells += [f"{row['latency_ratio']:.3f}"] if "latency_ratio" in row else []
        for kind in kinds:
            cells += [f"{row[kind]:.2f} ± {row[f'{kind}_se']:.2f}"]
            cells += [f"{row[f'{kind}_to_reference']:.2f} ({row[f'{kind}_low']:.2f} to {row[f'{kind}_high']:.2f})"]
        cells += [f"{row['same_answer']:.3f}"] if "same_answer" in row else []
        if right:
            cells += [f"{row['lost']:.2f} ± {row['lost_se']:.2f}", f"{row['gain']:+.2f} ± {row['gain_se']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
