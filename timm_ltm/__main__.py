"""``python -m timm_ltm``: the commands of :mod:`timm_ltm.cli`, or any script with the merging models registered.

    python -m timm_ltm list 'ltm_vit_small*'
    python -m timm_ltm path/to/validate.py --model ltm_mobilevit_s ...
    torchrun --nproc_per_node=2 -m timm_ltm path/to/train.py --model ltm_swin_tiny ...

A script runs as if python had been given its path: its folder leads the search path, its arguments are its own. It uses
the timm that is installed, also if it lies in a clone of another version.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """The command line."""
    argv = sys.argv[1:]
    if argv[:1] == ["run"] and len(argv) > 1 and argv[1] not in ("-h", "--help"):
        _run(argv[1:])
        return
    from timm_ltm import cli

    if not argv or argv[0].startswith("-") or argv[0] in (*cli.COMMANDS, "run"):
        raise SystemExit(cli.main(argv or ["--help"]))
    _run(argv)


def _run(argv: list[str]) -> None:
    """A script and its arguments."""
    script = Path(argv[0])
    if not script.is_file():
        from timm_ltm import cli

        print(
            f"PATH: got {str(script)!r}, expected a python script or a command. {cli.suggestion(argv[0])}",
            file=sys.stderr,
        )
        raise SystemExit(1)
    sys.argv = argv
    sys.path[0] = str(script.resolve().parent)  # python -m put the current folder there
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
