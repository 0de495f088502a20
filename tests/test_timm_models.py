"""timm's own tests of models, unmodified, with the plugin loaded. TIMM_SOURCE names a clone of timm's repository.

TIMM_SOURCE=path/to/pytorch-image-models python -m pytest -m slow tests/test_timm_models.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_ltm  # noqa: F401  registers the models

SOURCE = os.environ.get("TIMM_SOURCE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOURCE is None, reason="TIMM_SOURCE does not name a clone of timm's repository"),
]
ALL = {
    "forward", "backward", "forward_torchscript", "forward_features", "forward_fx", "backward_fx",
    "forward_fx_torchscript",
}  # fmt: skip
# timm's file lists what it tests by names and modules it knows. Left out as for the plain models: tests that download
# weights, and the default cfgs of ViT, which has no map to pool (vit_* is in its NON_STD_FILTERS; run below).
SELECTION = "ltm_ and not load_pretrained and not features_pretrained and not (default_cfgs and ltm_vit)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """timm's tests alone: beside them, the clone would be imported in place of the installed timm."""
    folder = tmp_path_factory.mktemp("timm")
    shutil.copytree(Path(SOURCE) / "tests", folder / "tests")
    return folder


def test_of_all_models(folder):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "timm_ltm", "tests/test_models.py", "-k", SELECTION],
        cwd=folder, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.findall(r"test_model_(\w+)\[(?:\d-)?(ltm_\w+?)(?:\.\w+)?(?:-\d)?\] PASSED", run.stdout)
    for name in timm.list_models("ltm_*", name_matches_cfg=True):
        tests = {test for test, of in passed if of == name}
        assert tests >= (ALL if name.startswith("ltm_vit") else ALL | {"default_cfgs"}), name
    assert "SKIPPED" not in run.stdout


CALL = """
import sys, timm_ltm
sys.path.insert(0, "tests")
import test_models
test = getattr(test_models, "test_model_" + sys.argv[1])
for name in sys.argv[2:]:
    test(name, 1)
"""


@pytest.mark.parametrize(
    ("test", "names"),
    [
        ("default_cfgs_non_std", "ltm_vit*"),
        ("forward_features", "ltm_vit*"),
        ("forward_intermediates_features", "ltm_*"),
        ("forward_intermediates", "ltm_*"),
    ],
)
def test_of_listed_modules(folder, test, names):
    """Tests whose lists have no plugins, or not ours: the same functions, called for our models."""
    names = timm.list_models(names)
    assert names
    run = subprocess.run(
        [sys.executable, "-c", CALL, test, *names], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
