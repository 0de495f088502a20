"""The commands of ``python -m timm_ltm``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from timm_ltm.cli import convert, listing, measure, report, show
from timm_ltm.cli.common import CommandError, one_line
from timm_ltm.reduction.settings import nearest

__all__ = ["COMMANDS", "main"]

_MODULES = (listing, show, measure, report, convert)
COMMANDS = tuple(name for module in _MODULES for name in module.COMMANDS)

_DESCRIPTION = """\
Vision transformers of timm, smaller and faster by merging tokens.

Give a command, or any python script, which then runs with the merging models registered, timm's own (train, validate,
benchmark, inference, onnx_export) for example:

  python -m timm_ltm path/to/validate.py --model ltm_mobilevit_s ...
  torchrun --nproc_per_node=2 -m timm_ltm path/to/train.py --model ltm_swin_tiny ..."""
_EPILOG = """\
A command's own help has an example: python -m timm_ltm list --help. Figures and tables are named as in the LTM paper.
Exit codes: 0 done, 1 could not be done (stderr says why, in one line), 2 not understood."""


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    top = argparse.ArgumentParser(
        "python -m timm_ltm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = top.add_subparsers(metavar="COMMAND", required=True)
    for module in _MODULES:
        module.add(parsers)
    run = parsers.add_parser(
        "run",
        help="a python script with the merging models registered",
        description="A python script with the merging models registered, as python would run it.",
        epilog="example:\n  python -m timm_ltm run path/to/validate.py --model ltm_mobilevit_s ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("script", metavar="SCRIPT", help="and its arguments")
    return top


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments.

    Returns:
        The exit code: 0 done, 1 could not be done. Arguments that argparse does not understand end the process by 2.
    """
    args = parser().parse_args(argv)
    name = argv[0]
    with warnings.catch_warnings():
        warnings.showwarning = _one_line
        try:
            args.run(args)
        except (CommandError, ValueError, OSError) as error:
            print(one_line(name, error), file=sys.stderr)
            return 1
        except ModuleNotFoundError as error:
            if error.name not in ("matplotlib", "safetensors"):
                raise
            print(f"{name}: {error.name} is not installed. pip install '{error.name}'", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            return 0
    return 0


def suggestion(word: str) -> str:
    """Of a word that is neither a command nor a script."""
    return nearest(word, (*COMMANDS, "run")) or f"Commands: {', '.join((*COMMANDS, 'run'))}."


def _one_line(message: Any, category: type[Warning], *_: Any) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
