"""``list``: the merging models by name, and what they cost."""

from __future__ import annotations

import argparse
from typing import Any

import timm

from timm_ltm.cli.common import (
    CommandError,
    Progress,
    add_output_arguments,
    as_table,
    command,
    emit,
    parameters_of,
    settings_of,
)
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.models import ReducedModel
from timm_ltm.models.registry import default_cfgs

COMMANDS = ("list",)


def add(parsers: Any) -> None:
    p = command(
        parsers,
        "list",
        run,
        "merging models, their parameters and GMACs",
        "Counted from shapes, without weights; ratio is that to the plain model's GMACs.",
        "list 'ltm_vit_small*' --model-kwargs gmacs=0.65",
    )
    p.add_argument(
        "pattern", nargs="?", default="ltm_*", help="shell wildcards, or a part of a name; ltm_* if not given"
    )
    p.add_argument("--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="timm's and the method's")
    p.add_argument("--names", action="store_true", help="names alone")
    add_output_arguments(p)


def run(args: argparse.Namespace) -> None:
    whole = args.pattern in default_cfgs or any(c in args.pattern for c in "*?[")
    pattern = args.pattern if whole else f"*{args.pattern}*"
    names = [name for name in timm.list_models(pattern) if name in default_cfgs]
    if not names:
        raise CommandError(f"got {args.pattern!r}, which matches no merging model. Try 'ltm_*' or 'mobilevit'.")
    if args.names:
        emit(args, names, "\n".join(names))
        return
    kwargs = settings_of(args.model_kwargs)
    rows = []
    for name in Progress(names, "counting", "model"):
        rows.append(row_of(name, kwargs))
    emit(args, rows, as_table(rows))


def row_of(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What one model costs; None for what shapes alone do not tell."""
    model: ReducedModel = timm.create_model(name, device="meta", **kwargs).eval()
    size = input_size_of(model)
    row: dict[str, Any] = {"model": name, "size": f"{size[1]} x {size[2]}", "parameters_m": parameters_of(model)}
    merged = None if model.by_image else gmacs(model, size)
    model.set_merging(False)
    plain = gmacs(model, size)
    return {**row, "gmacs": merged, "plain_gmacs": plain, "ratio": None if merged is None else merged / plain}
