"""What the commands share: models by name or checkpoint, tables, progress."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import pickle
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import is_model, list_models, load_checkpoint
from torch import nn

import timm_ltm
from timm_ltm.models import ReducedModel
from timm_ltm.models.registry import MODULES
from timm_ltm.models.saved import is_own
from timm_ltm.reduction import METHODS
from timm_ltm.reduction.settings import nearest

__all__ = [
    "CommandError",
    "Progress",
    "add_model_arguments",
    "add_output_arguments",
    "as_table",
    "command",
    "emit",
    "load_model",
    "merging_model",
    "parameters_of",
    "plain_parameters_of",
    "settings_of",
    "write_csv",
]


class CommandError(Exception):
    """What went wrong and what to do, in one line."""


def one_line(program: str, error: Exception) -> str:
    """What a program that ends with an error says of it."""
    return f"{program}: {' '.join(str(error).split())}"


def command(parsers: Any, name: str, run: Any, short: str, more: str, example: str) -> argparse.ArgumentParser:
    """A subcommand, in short and with an example in its help."""
    parser = parsers.add_parser(
        name,
        help=short,
        description=textwrap.fill(f"{short[0].upper()}{short[1:]}. {more}", 88),
        epilog=f"example:\n  python -m timm_ltm {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, merge: bool = True) -> None:
    """What makes a model of a name, a checkpoint, or a folder in timm's Hub layout."""
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained", action="store_true", help="download timm's weights for a model's name")
    group.add_argument("--model", metavar="NAME", help="of a checkpoint that does not tell its model")
    group.add_argument("--num-classes", type=int, help="of the head; the checkpoint's if not given")
    group.add_argument("--img-size", type=int)
    group.add_argument("--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="timm's and the method's")
    group.add_argument("--ema", action="store_true", help="a checkpoint's averaged weights")
    if merge:
        group.add_argument(
            "--merge", nargs="+", metavar=("METHOD", "NAME=VALUE"), help="of a plain model; ltm if not given"
        )
    group.add_argument("--device", default="cpu", help="cpu, cuda, ...")


def add_output_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, for programs")
    if default is not None:
        parser.add_argument("--output", type=Path, default=Path(default), help=f"{default} if not given")


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE of a command line."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise CommandError(f"got {pair!r}, expected NAME=VALUE, compression_ratio=0.8 for example.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def load_model(spec: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a name, a checkpoint's file, or a folder or repository in timm's Hub layout.

    Returns:
        In eval on the device, and the arguments that timm makes it with.
    """
    kwargs = settings_of(args.model_kwargs)
    if args.img_size is not None:
        kwargs["img_size"] = args.img_size
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    device = _device(args.device)
    path = Path(spec)
    if path.is_file():
        model, kwargs = _of_checkpoint(path, args, kwargs)
    elif path.is_dir():
        model = timm.create_model(f"local-dir:{spec}", pretrained=True, **kwargs)
    elif ":" in spec:
        model = timm.create_model(spec, pretrained=True, **kwargs)
    else:
        _check_name(spec)
        model = timm.create_model(spec, pretrained=args.pretrained, **_sized(spec, kwargs))
    return model.to(device).eval(), kwargs


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device: got {name!r}, expected one that this machine has ({reason}).") from None
    return device


def _check_name(name: str) -> None:
    plain, _, _ = name.partition(".")
    if is_model(plain):
        return
    if "/" in name or Path(name).suffix in (".pth", ".tar", ".pt", ".safetensors", ".bin"):
        raise CommandError(f"{name}: there is no such file. Give the path of a checkpoint.")
    hint = nearest(plain, timm.list_models()) or "See 'python -m timm_ltm list' and timm.list_models()."
    raise CommandError(f"got {name!r}, expected a model's name, a checkpoint or a folder in timm's Hub layout. {hint}")


def _of_checkpoint(path: Path, args: argparse.Namespace, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a checkpoint of timm's scripts tells, or that ``--model`` names."""
    saved: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # as timm's own loading does
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise CommandError(f"{path}: cannot be read as a checkpoint of tensors ({reason}).") from None
        saved = {**loaded, **vars(loaded["args"])} if isinstance(loaded.get("args"), argparse.Namespace) else loaded
        state = next((loaded[key] for key in ("state_dict", "model") if isinstance(loaded.get(key), dict)), loaded)
    arch = saved.get("arch")
    name = args.model or saved.get("model") or arch
    if not isinstance(name, str) or not is_model(name.partition(".")[0]):
        raise CommandError(f"{path}: does not tell its model. Give --model NAME.")
    told = saved.get("model_kwargs")
    kwargs = {**(told if isinstance(told, dict) else {}), **kwargs}
    if saved.get("img_size") and "img_size" not in kwargs:
        kwargs["img_size"] = saved["img_size"]
    classes = _classes(name, state, saved)
    if "num_classes" not in kwargs and classes is not None:
        kwargs["num_classes"] = classes
    if "arch" in saved:
        model = timm.create_model(name, **_sized(name, kwargs))
        load_checkpoint(model, str(path), use_ema=args.ema)
    else:  # weights of anybody's, which timm renames and resizes as its own
        sized = _sized(name, {"num_classes": 0, **kwargs})
        overlay = {**sized.pop("pretrained_cfg_overlay", {}), "file": str(path), "num_classes": classes or 0}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
    return model, kwargs


def _sized(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with ``img_size`` where timm's plain model of this name has none: what it is said to be made for."""
    plain, size = name.partition(".")[0], kwargs.get("img_size")
    if size is None or not any(family.any_size and plain in list_models(module=m) for m, family in MODULES.items()):
        return kwargs
    overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "input_size": (3, *to_2tuple(size))}
    return {**{n: v for n, v in kwargs.items() if n != "img_size"}, "pretrained_cfg_overlay": overlay}


def _classes(name: str, state: dict[str, Any], saved: dict[str, Any]) -> int | None:
    """K of the head in a state dict, or of what a script said."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg is not None else None
    for layer in (classifier,) if isinstance(classifier, str) else classifier or ():
        for prefix in ("", "module."):
            weight = state.get(f"{prefix}{layer}.weight")
            if weight is not None:
                return len(weight)
    return saved.get("num_classes")


def merging_model(model: nn.Module, args: argparse.Namespace) -> ReducedModel:
    """A merging model as it is, a plain one converted by ``--merge``."""
    if isinstance(model, ReducedModel):
        if args.merge:
            raise CommandError(f"--merge: got {args.merge[0]!r} for a model that merges already. Leave it out.")
        return model
    method, *settings = args.merge or ["ltm"]
    if method not in METHODS:
        hint = nearest(method, METHODS) or "Use one of these."
        raise CommandError(f"--merge: got {method!r}, expected one of {', '.join(METHODS)}. {hint}")
    return timm_ltm.convert(model, method, **settings_of(settings))


def parameters_of(model: nn.Module) -> float:
    """In millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def plain_parameters_of(model: nn.Module) -> float:
    """In millions, without what merging adds."""
    return sum(p.numel() for name, p in model.named_parameters() if not is_own(name)) / 1e6


class Progress:
    """Batches with a bar on stderr, where that is a terminal, each time they are gone through."""

    def __init__(self, of: Any, title: str, unit: str = "batch") -> None:
        self.of, self.title, self.unit = of, title, unit

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm

        return iter(tqdm(self.of, desc=self.title, unit=self.unit, file=sys.stderr, leave=False, disable=None))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns; numbers to the right."""
    heads = list(rows[0]) if rows else []
    cells = [[_text(row[head]) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    right = [all(isinstance(row[head], (int, float, type(None))) for row in rows) for head in heads]

    def line(texts: Iterable[str]) -> str:
        aligned = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(heads), *map(line, cells)])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def emit(args: argparse.Namespace, value: Any, text: str) -> None:
    """The answer on stdout: JSON where a machine reads."""
    print(json.dumps(value, indent=2) if args.json else text)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
