"""``measure``: what a merging model costs next to its plain one."""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from torch import nn

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
)
from timm_ltm.cost import gmacs, input_size_of
from timm_ltm.speed import latencies, peak_memory

COMMANDS = ("measure",)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add(parsers: Any) -> None:
    p = command(
        parsers,
        "measure",
        run,
        "GMACs, parameters, latency and memory next to the plain model's",
        "The two take turns in every round; latencies are medians. Memory is what tensors hold at once in a forward "
        "pass, without weights.",
        "measure ltm_vit_small_patch16_224 --batch-sizes 1 32 --threads 4",
    )
    p.add_argument("name", metavar="MODEL", help="name, checkpoint or folder; a plain model is converted")
    p.add_argument("--batch-sizes", nargs="+", type=int, default=[8], metavar="B")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--threads", type=int, help="of the CPU; torch's if not given")
    p.add_argument("--dtype", default="float32", choices=list(_DTYPES))
    p.add_argument("--channels-last", action="store_true", help="memory format of the models and images")
    p.add_argument("--compile", action="store_true", help="torch.compile both")
    add_model_arguments(p)
    add_output_arguments(p)


def run(args: argparse.Namespace) -> None:
    for name in ("threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise CommandError(f"--{name}: got {getattr(args, name)}, expected 1 or more.")
    if min(args.batch_sizes) < 1:
        raise CommandError(f"--batch-sizes: got {min(args.batch_sizes)}, expected 1 or more.")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        rows = _rows(args)
    finally:
        torch.set_num_threads(before)
    where = args.device if args.device != "cpu" else f"cpu, {args.threads or before} threads"
    emit(args, {"device": where, "dtype": args.dtype, "rows": rows}, f"{where}, {args.dtype}\n{as_table(rows)}")


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    model, _ = load_model(args.name, args)
    model = merging_model(model, args)
    model.set_merging(True)
    if model.by_image:
        warnings.warn(
            f"{model.method} leaves a number of tokens that depends on the image, and noise is measured here. "
            "examples/compare.py measures on images of your own.",
            stacklevel=2,
        )
    size = input_size_of(model)
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # sharing weights
    plain.set_merging(False)
    cost = {"plain": gmacs(plain, size), model.method: gmacs(model, size)}
    parameters = {"plain": plain_parameters_of(model), model.method: parameters_of(model)}
    models: dict[str, nn.Module] = {"plain": plain, model.method: model}
    for each in models.values():
        each.to(dtype=_DTYPES[args.dtype])
        if args.channels_last:
            each.to(memory_format=torch.channels_last)
    like = next(model.parameters())
    rows = []
    for batch in args.batch_sizes:
        x = torch.randn(batch, *size, device=like.device, dtype=like.dtype)
        x = x.to(memory_format=torch.channels_last) if args.channels_last else x
        memory = {name: peak_memory(each, x) / 2**20 for name, each in models.items()}
        timed = {n: torch.compile(m, dynamic=False) if args.compile else m for n, m in models.items()}
        times = latencies(timed, x, args.rounds, progress=lambda r, b=batch: Progress(r, f"batch {b}", "round"))
        for name in models:
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "gmacs": cost[name],
                    "gmacs_ratio": cost[name] / cost["plain"],
                    "parameters_m": parameters[name],
                    "ms": times[name],
                    "ms_ratio": times[name] / times["plain"],
                    "images_per_s": 1e3 * batch / times[name],
                    "memory_mib": memory[name],
                    "memory_ratio": memory[name] / memory["plain"],
                }
            )
    return rows
