"""Run any script with the LTM models registered, timm's own (validate, benchmark, inference, onnx_export) for example.

    python -m timm_ltm path/to/validate.py --model ltm_mobilevit_s ...
    torchrun --nproc_per_node=2 -m timm_ltm path/to/train.py --model ltm_swin_tiny ...

The script runs as if python had been given its path: its folder leads the search path, its arguments are its own. It
uses the timm that is installed, also if it lies in a clone of another version.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"PATH: got {str(script)!r}, expected a python script. timm's are in its repository.")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # python -m put the current folder there
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
