"""Any timm model and any folder of images: what merging saves, and how far its tokens are from the plain model's.

    python examples/merge_any.py PHOTOS --model vit_small_patch14_dinov2.lvd142m --img-size 224
    python examples/merge_any.py PHOTOS --model vit_small_patch14_dinov2 --img-size 224 --checkpoint my.safetensors \\
        --merge ltm --merge tome r=8 --merge tome compression_ratio=0.95 --limit 100

Nothing is trained and no label is read. The plain model and each merging one see the same images; the error is 1 minus
the cosine to the plain model's class token, mean token and every token, in thousandths, with its standard error.
Latencies are medians of rounds in which the models take turns. Without --checkpoint, timm downloads its weights.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import settings_of
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.fidelity import errors, features_of
from timm_ltm.speed import latencies

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
NAMES = {"class": "class token", "mean": "mean token", "every": "every token"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images, searched in all its folders")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m", help="a plain timm model's name")
    parser.add_argument("--checkpoint", type=Path, help="weights in timm's or the original names; timm adapts them")
    parser.add_argument("--img-size", type=int)
    parser.add_argument(
        "--merge", nargs="+", action="append", metavar="METHOD NAME=VALUE", help="may be repeated; ltm and tome if not"
    )
    parser.add_argument("--limit", type=int, default=100, help="images, drawn at random; 0 is all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def plain_model(args: argparse.Namespace) -> nn.Module:
    """timm's model with its weights, or those of a file, which timm resizes to the input size."""
    kwargs = {"img_size": args.img_size} if args.img_size else {}
    if args.checkpoint:
        kwargs["pretrained_cfg_overlay"] = {"file": str(args.checkpoint)}
    return timm.create_model(args.model, pretrained=True, **kwargs).to(args.device).eval()


def images_in(folder: Path, limit: int, seed: int) -> list[Path]:
    """Paths of images, in an order of their own."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"folder: got {str(folder)!r}, which holds no images. Expected some of {sorted(SUFFIXES)}.")
    random.Random(seed).shuffle(paths)
    return paths[: limit or None]


def main() -> None:
    args = arguments()
    paths = images_in(args.folder, args.limit, args.seed)
    plain = plain_model(args)
    size = input_size_of(plain)
    config = {**resolve_model_data_config(plain), "input_size": size}
    transform = create_transform(**config, is_training=False)
    models = {"plain": plain}
    for method, *settings in args.merge or [["ltm"], ["tome"]]:
        models[" ".join([method, *settings])] = timm_ltm.convert(plain, method, **settings_of(settings))

    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models if name != "plain"}
    batch = None
    for start in tqdm(range(0, len(paths), args.batch_size), desc="images", unit="batch"):
        files = paths[start : start + args.batch_size]
        x = torch.stack([transform(Image.open(path).convert("RGB")) for path in files]).to(args.device)
        batch = x if batch is None else batch
        with torch.inference_mode():
            expected = features_of(plain, x)
            for name, of_model in found.items():
                for kind, error in errors(features_of(models[name], x), expected).items():
                    of_model.setdefault(kind, []).append(1e3 * error)

    timing = partial(tqdm, desc="timing", unit="round")
    taken = latencies(models, batch, args.rounds, progress=timing) if args.rounds else {}
    base = gmacs(plain, size)
    kinds = list(next(iter(found.values())))
    print(f"{args.model}, {size[1]} x {size[2]}, {len(paths)} images, {args.device},")
    print(
        f"{torch.get_num_threads()} threads, batch {len(batch)}. Error: 1 - cos to the plain model's, in thousandths."
    )
    print()
    print("| model | GMACs | ratio | latency ratio |" + "".join(f" error, {NAMES[kind]} |" for kind in kinds))
    print("|:---|---:|---:|---:|" + "---:|" * len(kinds))
    for name, model in models.items():
        cost = gmacs(model, size)
        speed = f"{taken[name] / taken['plain']:.3f}" if taken else "-"
        row = f"| {name} | {cost:.3f} | {cost / base:.3f} | {speed} |"
        for kind in kinds:
            if name == "plain":
                row += " 0 |"
            else:
                e = torch.cat(found[name][kind])
                row += f" {e.mean():.2f} ± {e.std() / len(e) ** 0.5:.2f} |"
        print(row)


if __name__ == "__main__":
    main()
