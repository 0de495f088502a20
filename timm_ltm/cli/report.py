"""``information``, ``curves`` and ``tradeoff``: the paper's Table 5, and Figures 3, 4 and 2, of one's own models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_ltm.cli.common import (
    CommandError,
    Progress,
    add_model_arguments,
    add_output_arguments,
    as_table,
    command,
    emit,
    load_model,
    merging_model,
    parameters_of,
    plain_parameters_of,
    write_csv,
)
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.models import ReducedModel

COMMANDS = ("information", "curves", "tradeoff")


def add(parsers: Any) -> None:
    p = command(
        parsers,
        "information",
        information,
        "IB loss and IB bound of trained models (Table 5, Figure 3)",
        "Of every block and of the whole model. Writes table.csv, layers.csv and layers.png.",
        "information output/train/ltm/model_best.pth.tar output/train/plain/model_best.pth.tar --data DATA",
    )
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="or folder or name, merging or plain")
    p.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="CLASS/*.jpg, or train/ and validation/ of them"
    )
    p.add_argument("--split", default="validation", help="of data that has splits; validation if not given")
    p.add_argument("--limit", type=int, default=0, help="images, drawn at random; all if not given")
    p.add_argument("--plain", action="store_true", help="each merging model without merging, too")
    p.add_argument("--clusters", type=int, help="the number of classes if not given")
    p.add_argument(
        "--cells", type=int, default=4, help="tokens are averaged over cells x cells; 0: whole tokens, as printed"
    )
    p.add_argument("--no-normalize", action="store_true", help="features as they are, as printed")
    p.add_argument("--temperature", default="1", help="of soft assignments; 'fit' fits it")
    p.add_argument("--inputs", default="images", choices=("images", "block"), help="what X is")
    p.add_argument("--memory", type=float, default=2.0, help="10^9 bytes of features kept at once")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    add_model_arguments(p)
    add_output_arguments(p, "information")

    p = command(
        parsers,
        "curves",
        curves,
        "training and test curves of several runs (Figure 4)",
        "Of what timm's train.py writes.",
        "curves output/train/plain output/train/ltm --output curves.png",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with a summary.csv, or such a file")
    p.add_argument("--names", nargs="+", help="one for each; the folders' if not given")
    add_output_arguments(p, "curves.png")

    p = command(
        parsers,
        "tradeoff",
        tradeoff,
        "top-1 against GMACs by method (Figure 2)",
        "Of a CSV with columns method, gmacs, top1 and perhaps top1_low and top1_high, the ends of an interval.",
        "tradeoff compare.csv --output tradeoff.png",
    )
    p.add_argument("tables", nargs="+", type=Path, metavar="CSV")
    add_output_arguments(p, "tradeoff.png")


def curves(args: argparse.Namespace) -> None:
    from timm_ltm.pictures import curves_figure
    from timm_ltm.pictures.charts import read_summary

    names = args.names or _names(args.runs)
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise CommandError(f"--names: got {names}, expected {len(args.runs)} that differ, one for each run.")
    runs = {name: read_summary(path) for name, path in zip(names, args.runs, strict=True)}
    _parent(args.output)
    curves_figure(runs, args.output)
    rows = [{"run": name, "epochs": len(of_run), **of_run[-1]} for name, of_run in runs.items()]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{head: row.get(head) for head in heads} for row in rows]
    emit(args, {"file": str(args.output), "last": rows}, f"{as_table(rows)}\n{args.output}")


def _names(paths: list[Path]) -> list[str]:
    """What tells the runs apart: their folders' names, with as much in front of them as it takes."""
    folders = [(path.parent if path.name == "summary.csv" else path).resolve() for path in paths]
    folders = [path.with_suffix("") if path.suffix == ".csv" else path for path in folders]
    for depth in range(1, max(len(path.parts) for path in folders) + 1):
        names = ["/".join(path.parts[-depth:]) for path in folders]
        if len(set(names)) == len(names):
            break
    return names


def tradeoff(args: argparse.Namespace) -> None:
    from timm_ltm.pictures import tradeoff_figure
    from timm_ltm.pictures.charts import read_table

    rows = [row for path in args.tables for row in read_table(path)]
    _parent(args.output)
    tradeoff_figure(rows, args.output)
    emit(args, {"file": str(args.output), "rows": len(rows)}, str(args.output))


def _parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def information(args: argparse.Namespace) -> None:
    from timm_ltm.information import information as measured
    from timm_ltm.pictures import information_figure

    models = _models(args)
    temperature: float | str = args.temperature
    if temperature != "fit":
        try:
            temperature = float(temperature)
        except ValueError:
            raise CommandError(f"--temperature: got {temperature!r}, expected a number or 'fit'.") from None
    found, table, layers = {}, [], []
    for name, model in models.items():
        loader, classes = _loader(model, args)
        top1 = _top1(model, Progress(loader, f"{name}, top-1")) if getattr(model, "num_classes", 0) == classes else None
        found[name] = measured(
            model,
            Progress(loader, name),
            clusters=args.clusters or None,
            cells=args.cells or None,
            normalize=not args.no_normalize,
            temperature=temperature,
            inputs=args.inputs,
            memory=args.memory,
            seed=args.seed,
        )
        whole = found[name][-1]
        merging = isinstance(model, ReducedModel) and model.merging
        table.append(
            {
                "model": name,
                "parameters_m": parameters_of(model) if merging else plain_parameters_of(model),
                "gmacs": gmacs(model, input_size_of(model)),
                "top1": top1,
                "ib_bound": whole.bound,
                "ib_loss": whole.loss,
            }
        )
        layers += [{"model": name, **f.row()} for f in found[name]]
    args.output.mkdir(parents=True, exist_ok=True)
    files = {name: str(args.output / name) for name in ("table.csv", "layers.csv", "layers.png")}
    write_csv(args.output / "table.csv", table)
    write_csv(args.output / "layers.csv", layers)
    information_figure(found, files["layers.png"])
    text = "\n".join([as_table(table), *files.values()])
    emit(args, {"table": table, "layers": layers, "files": list(files.values())}, text)


def _models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """By name; those converted by ``--merge``, and each without merging, where that is wanted."""
    models: dict[str, nn.Module] = {}
    for spec, name in zip(args.checkpoints, _labels(args.checkpoints), strict=True):
        model, _ = load_model(spec, args)
        plain = not isinstance(model, ReducedModel)
        if plain and not args.merge:
            models[name] = model
            continue
        if plain and args.plain:
            models[f"{name}, plain"] = model
        merged = merging_model(model, args)
        if not plain and args.plain:
            other = load_model(spec, args)[0]
            other.set_merging(False)
            models[f"{name}, plain"] = other
        models[f"{args.merge[0]}, {name}" if plain else name] = merged
    return models


def _labels(specs: list[str]) -> list[str]:
    """Checkpoints of timm's scripts by their run's folder, other files by name, where that tells them apart."""
    names = []
    for path in map(Path, specs):
        of_run = path.is_file() and path.name.startswith(("model_best", "last", "checkpoint-"))
        names.append(path.resolve().parent.name if of_run else path.stem if path.is_file() else path.name)
    return names if len(set(names)) == len(names) else specs


def _loader(model: nn.Module, args: argparse.Namespace) -> tuple[DataLoader, int]:
    """Images as timm's evaluation transform gives them, and how many classes there are."""
    from timm.data import create_dataset, create_transform

    from timm_ltm.pictures.photos import data_config

    if not args.data.is_dir():
        raise CommandError(f"--data: got {str(args.data)!r}, expected a folder with a folder of images for each class.")
    try:
        dataset: Dataset = create_dataset("", str(args.data), split=args.split)
    except RuntimeError as error:
        raise CommandError(f"--data: {str(error).splitlines()[0]} Expected DIR/CLASS/*.jpg.") from None
    classes = len(dataset.reader.class_to_idx)
    dataset.transform = create_transform(**data_config(model), is_training=False)
    if 0 < args.limit < len(dataset):
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))[: args.limit]
        dataset = Subset(dataset, chosen.tolist())
    return DataLoader(dataset, args.batch_size, num_workers=args.workers), classes


@torch.no_grad()
def _top1(model: nn.Module, loader: Progress) -> float:
    """In percent."""
    like, right, seen = next(model.parameters()), 0, 0
    for images, targets in loader:
        logits = model(images.to(like.device, like.dtype))
        right += (logits.argmax(dim=1).cpu() == targets).sum().item()
        seen += len(targets)
    return 100.0 * right / max(seen, 1)
