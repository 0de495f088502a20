"""timm's own tests of models, unmodified, on one variant of every kind of block. TIMM_SOURCE names a clone of timm.

    TIMM_SOURCE=path/to/pytorch-image-models python -m pytest -m slow tests/test_timm_models.py

Left out are its tests of TorchScript, which torch has deprecated and merging models refuse, and those that download.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

import timm_ltm  # noqa: F401  registers the models

SOURCE = os.environ.get("TIMM_SOURCE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOURCE is None, reason="TIMM_SOURCE does not name a clone of timm's repository"),
]
VARIANTS = (
    "test_vit",  # class token
    "test_vit2",  # LayerScale, register tokens, no class token
    "test_vit3",  # attention pooling
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_little_patch16_reg4_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",  # SwiGLU, rotary positions
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "swin_tiny_patch4_window7_224",
    "mobilevit_xxs",
    "efficientvit_b0",
    "efficientvit_l1",
)
NAMES = [*(f"ltm_{name}" for name in VARIANTS), "tome_test_vit2", "tome_eva02_tiny_patch14_224", "tome_swin_tiny"]
TESTS = (
    "forward",
    "backward",
    "forward_features",
    "forward_intermediates",
    "forward_intermediates_features",
    "forward_fx",
    "backward_fx",
)


@pytest.fixture(scope="module")
def timms(request):
    """timm's file. Its lists of models are read on import, what it tests is called by name here."""
    for marker in ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"):
        request.config.addinivalue_line("markers", f"{marker}: timm's")
    spec = importlib.util.spec_from_file_location("timms_test_models", Path(SOURCE) / "tests" / "test_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*trains without a refresh")
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("name", NAMES)
def test_of_all_models(timms, name, test):
    getattr(timms, f"test_model_{test}")(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfgs(timms, name):
    """Maps and sequences have a test each."""
    maps = any(word in name for word in ("swin", "mobilevit", "efficientvit"))
    getattr(timms, "test_model_default_cfgs" if maps else "test_model_default_cfgs_non_std")(name, 1)
