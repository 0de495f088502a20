"""``convert``: a saved merging model in timm's Hub layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, save_for_hf

from timm_ltm.cli.common import (
    CommandError,
    add_model_arguments,
    add_output_arguments,
    command,
    emit,
    load_model,
    merging_model,
)
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.reduction import METHODS
from timm_ltm.reduction.reducer import setting_names

COMMANDS = ("convert",)


def add(parsers: Any) -> None:
    p = command(
        parsers,
        "convert",
        run,
        "a merging model saved in timm's Hub layout",
        "Of any timm model or checkpoint. After import timm_ltm, timm.create_model('local-dir:FOLDER', "
        "pretrained=True) gives it back, with weights, method and schedule.",
        "convert vit_small_patch16_224 --pretrained --merge ltm gmacs=0.65 --output ltm_vit_small",
    )
    p.add_argument("name", metavar="MODEL_OR_CHECKPOINT", help="plain or merging")
    add_model_arguments(p)
    add_output_arguments(p)
    p.add_argument("--output", type=Path, required=True, help="the folder to write")


def run(args: argparse.Namespace) -> None:
    model, kwargs = load_model(args.name, args)
    model = merging_model(model, args)
    name = model.pretrained_cfg.get("architecture")
    if not isinstance(name, str) or not is_model(name) or not name.startswith(f"{model.method}_"):
        raise CommandError(f"{name}: {model.method} on it has no name of its own, by which it could be loaded again.")
    if args.output.is_file():
        raise CommandError(f"--output: got {str(args.output)!r}, which is a file, expected a folder.")
    own = {setting for cls in METHODS.values() for setting in setting_names(cls)}  # the weights carry these
    timms = {key: value for key, value in kwargs.items() if key not in {*own, "num_classes"}}
    # where nothing was told, newer versions of timm remember what the model was made with
    save_for_hf(model, args.output, model_args=timms or None, safe_serialization=True)
    size = input_size_of(model)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    loaded = timm.create_model(f"local-dir:{args.output}", pretrained=True).eval()
    with torch.no_grad():
        same = torch.equal(loaded(x), model.cpu()(x))
    if not same:
        raise CommandError(f"{args.output}: what is loaded again gives other logits. Is the model one of timm's own?")
    merged = gmacs(model, size)
    model.set_merging(False)
    plain = gmacs(model, size)
    value = {
        "folder": str(args.output),
        "model": name,
        "gmacs": merged,
        "plain_gmacs": plain,
        "ratio": merged / plain,
    }
    text = f"{name}, {merged:.3f} GMACs, {merged / plain:.3f} of the plain model's; loaded again, logits are equal\n"
    emit(args, value, f'{text}timm.create_model("local-dir:{args.output}", pretrained=True)')
