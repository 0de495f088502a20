"""``show``: what a model merges in photographs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from timm_ltm.cli.common import (
    CommandError,
    add_model_arguments,
    add_output_arguments,
    command,
    emit,
    load_model,
    merging_model,
)

COMMANDS = ("show",)


def add(parsers: Any) -> None:
    p = command(
        parsers,
        "show",
        run,
        "pictures of what is merged in photographs (Figure 5)",
        "At their resolution. Writes masks.png, one merged token and all sources of a block, and blocks.png, what is "
        "left of each photograph block by block.",
        "show ltm_vit_small_patch16_224 --pretrained photo.jpg --output masks",
    )
    p.add_argument("name", metavar="MODEL", help="name, checkpoint or folder; a plain model is converted")
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    p.add_argument("--layer", type=int, default=0, help="which of the merging blocks, from 1; the last if not given")
    p.add_argument(
        "--token",
        default="class",
        choices=("class", "largest"),
        help="the merged token shown: which speaks most for the predicted class (default), or which gathers most",
    )
    add_model_arguments(p)
    add_output_arguments(p, "masks")


def run(args: argparse.Namespace) -> None:
    from timm_ltm.models.record import representative_tokens
    from timm_ltm.pictures import blocks_figure, load_photo, mask_figure
    from timm_ltm.pictures.photos import data_config

    model, _ = load_model(args.name, args)
    model = merging_model(model, args)
    config = data_config(model)
    photos, inputs = zip(*[load_photo(path, config) for path in args.images], strict=True)
    x = torch.stack(inputs).to(next(model.parameters()).device)
    masks = model.forward_masks(x)
    if not masks.blocks:
        raise CommandError("the model merges in no block. Give --merge METHOD compression_ratio=0.9 or less.")
    if not 0 <= args.layer <= len(masks.blocks):
        raise CommandError(f"--layer: got {args.layer}, expected 1 to {len(masks.blocks)}, the blocks that merge.")
    layer = (args.layer or len(masks.blocks)) - 1
    tokens = representative_tokens(model, x, layer) if args.token == "class" else None
    args.output.mkdir(parents=True, exist_ok=True)
    files = [str(args.output / name) for name in ("masks.png", "blocks.png")]
    labels = [path.name for path in args.images]
    mask_figure(photos, masks, files[0], layer, tokens, labels)
    blocks_figure(photos, masks, files[1], labels)
    blocks = [
        {"block": block + 1, "tokens": mask.shape[2], "of": mask.shape[1]}
        for block, mask in zip(masks.blocks, masks.masks, strict=True)
    ]
    text = [f"block {b['block']}: {b['of']} tokens to {b['tokens']}" for b in blocks]
    emit(args, {"files": files, "blocks": blocks}, "\n".join([*text, *files]))
