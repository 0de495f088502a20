"""What the tests of families with maps share."""

from __future__ import annotations

from .contract import MODES

MAP_MODES = [mode for mode in MODES if mode not in ("carry", "slots")]  # an anchored mask of a map has neither
