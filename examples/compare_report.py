"""What compare.py measured, as files, and their tables and picture."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from finetuning import whole

import timm_ltm
from timm_ltm.cli.common import write_csv
from timm_ltm.fidelity import interval
from timm_ltm.reduction import METHODS


class Store:
    """Measurements by name: numbers in NAME.json, what is of every image in NAME.KIND.npy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', name)}{suffix}"

    def has(self, name: str) -> bool:
        return self.path(name, ".json").exists()

    def write(self, name: str, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
        """The numbers last, and at once: what has them is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, array in (arrays or {}).items():
            np.save(self.path(name, f".{kind}.npy"), array)
        with whole(self.path(name, ".json")) as part:
            part.write_text(json.dumps({"name": name, **values, "kinds": list(arrays or {})}))

    def read(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name, ".json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return {kind: np.load(self.path(name, f".{kind}.npy")) for kind in self.read(name)["kinds"]}


def name_of(words: Sequence[str], budget: float) -> str:
    """Of the results of a method and its settings, at a budget."""
    return f"{' '.join(words)} {budget:g}"


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def with_interval(name: str, *series: np.ndarray) -> dict[str, float]:
    """The mean of one series (S, n), or of the difference of two in pairs; and the ends of its interval of 95 %."""
    values = series[0] if len(series) == 1 else series[0] - series[1]
    low, high = interval(mean, values)
    return {name: mean(values), f"{name}_low": low, f"{name}_high": high}


def speed_of(batch_size: int, taken: dict[str, list[float]], name: str) -> dict[str, float]:
    """Medians of rounds, quartiles, and the ratio to the plain model's."""
    times, size = taken[name], f"_b{batch_size}"
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    ratio = middle / statistics.median(taken["plain"])
    found = {f"ms{size}": middle, f"ms_low{size}": low, f"ms_high{size}": high}
    return {**found, f"latency_ratio{size}": ratio, f"images_per_s{size}": 1e3 * batch_size / middle}


def rows_of(
    store: Store,
    named: dict[str, tuple[tuple[str, ...], float]],
    reference: tuple[str, ...],
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
    training: str = "none",
) -> list[dict[str, Any]]:
    """A row for each model, without training or, of some seeds, trained as ``training`` says.

    Points of top-1 lost to the plain model, and gained on the reference at the same budget, are of the same images, and
    of models trained by the same seeds.
    """
    results = {name: [f"{name} seed {seed}" for seed in seeds] or [name] for name in ("plain", *named)}
    right = {
        name: 100.0 * np.stack([store.arrays(result)["right"] for result in of], dtype=float)
        for name, of in results.items()
    }
    rows = []
    plain_cost = store.read(results["plain"][0])["gmacs"]
    for name, of in results.items():
        words, budget = named.get(name, (("plain",), 1.0))
        read = [store.read(result) for result in of]
        cost = statistics.mean(values["gmacs"] for values in read)
        row = {
            "method": " ".join(words), "budget": budget, "training": training,
            "seeds": len(seeds), "images": right[name].shape[1], "parameters_m": read[0]["parameters_m"],
            "gmacs": cost, "ratio": cost / plain_cost, **with_interval("top1", right[name]),
        }  # fmt: skip
        if name != "plain":
            row |= with_interval("lost", right["plain"], right[name])
            other = name_of(reference, budget)
            if other in right and other != name:
                row |= with_interval("gained", right[name], right[other])
        arrays = {} if seeds or name == "plain" else store.arrays(name)
        for kind in [kind for kind in ("class", "mean") if kind in arrays]:
            row |= with_interval(f"{kind}_error", 1e3 * arrays[kind][None])
        for size in batch_sizes:
            taken, timed = read[0].get("times", {}).get(str(size)), f"speed{' fine-tuned' if seeds else ''} {size}"
            if store.has(timed):
                taken = store.read(timed)["times"]  # earlier versions kept those of fine-tuned models by model
            if taken and name in taken:
                row |= speed_of(size, taken, name)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], batch_sizes: Sequence[int]) -> str:
    """A table of rows of one kind of training."""
    heads = ["model", "GMACs", "ratio", "parameters (M)"]
    for size in batch_sizes:
        heads += [f"ms, batch {size}", "latency ratio", "images/s"]
    heads += ["top-1 (%)", "points lost", "gained on the first"]
    kinds = [kind for kind in ("class", "mean") if any(f"{kind}_error" in row for row in rows)]
    heads += [f"error, {kind} token" for kind in kinds]
    lines = [heads, [":---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        name = row["method"] if row["method"] == "plain" else f"`{row['method']}` {row['budget']:g}"
        line = [name, f"{row['gmacs']:.3f}", f"{row['ratio']:.3f}", f"{row['parameters_m']:.2f}"]
        for size in batch_sizes:
            part = f"_b{size}"
            if f"ms{part}" in row:
                spread = f"({row[f'ms_low{part}']:.1f} to {row[f'ms_high{part}']:.1f})"
                line += [f"{row[f'ms{part}']:.1f} {spread}", f"{row[f'latency_ratio{part}']:.3f}"]
                line += [f"{row[f'images_per_s{part}']:.1f}"]
            else:
                line += ["-"] * 3
        for key in ("top1", "lost", "gained", *(f"{kind}_error" for kind in kinds)):
            ends = (row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"))
            line.append("-" if ends[0] is None else "{:.2f} ({:.2f} to {:.2f})".format(*ends))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    args: argparse.Namespace,
    store: Store,
    named: dict[str, tuple[tuple[str, ...], float]],
    merges: Sequence[tuple[str, ...]],
    seeds: Sequence[int],
    size: Sequence[int],
) -> None:
    """Write compare.csv, compare.md and compare.png of what is there, without training and of these seeds."""
    from timm_ltm.pictures import tradeoff_figure
    from timm_ltm.pictures.charts import read_table

    sizes = args.batch_sizes if args.rounds else []
    trained = "from scratch" if args.scratch else "fine-tuned"
    tables = {} if args.scratch else {"none": rows_of(store, named, merges[0], (), sizes)}
    if seeds:
        tables[trained] = rows_of(store, named, merges[0], seeds, sizes, trained)
    rows = [row for of in tables.values() for row in of]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(args.out / "compare.csv", [{head: row.get(head, "") for head in heads} for row in rows])
    drawn = "images drawn in pairs"
    if len(seeds) > 1:
        drawn += ", of trained models seeds too"
    elif seeds:
        drawn += ", and of one seed: how much another would change is not in them"
    of_images = [f"`{' '.join(words)}`" for words in merges if METHODS[words[0]].by_image]
    by_image = (
        f" The cost of {' and '.join(of_images)} depends on the images, and is only near to the budget: read what is "
        "gained with the column of ratios."
        if of_images
        else ""
    )
    errors = "" if args.scratch else "Errors: 1 - cos to the plain model's features, in thousandths. "
    text = [
        f"# {args.model}, {size[1]} x {size[2]}, {rows[0]['images']} images",
        f"`python {shlex.join(sys.argv)}`",
        f"timm_ltm {timm_ltm.__version__}, timm {timm.__version__}, torch {torch.__version__}, {args.device}, "
        f"{torch.get_num_threads()} threads. In brackets: intervals of 95 %, {drawn}; of times, quartiles. "
        f"{errors}Points are of top-1: lost to the plain model, and "
        f"gained on `{' '.join(merges[0])}` at the same budget. Each method merges by its own schedule, or by the one "
        f"that is listed with it, and what it gains includes that.{by_image}",
    ]
    if "none" in tables:
        text += ["## Without training", markdown(tables["none"], sizes)]
    if seeds:
        count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        text += [f"## {trained.capitalize()}, {count}: {', '.join(map(str, seeds))}", markdown(tables[trained], sizes)]
    (args.out / "compare.md").write_text("\n\n".join(text) + "\n")
    tradeoff_figure(read_table(args.out / "compare.csv"), args.out / "compare.png")
