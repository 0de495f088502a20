"""The package with the oldest timm that it says it works with: in an environment of its own, which shares torch."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "tests/models",
    "tests/methods",
    "tests/reduction",
    "tests/test_training.py",
    "tests/test_tasks.py",
    "tests/test_frameworks.py",
]
SELECTION = "not compile and not export and not onnx and not fx and not import"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment with the oldest timm, and this one's packages behind it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = re.search(r"timm>=([\d.]+)", setup["options"]["install_requires"])[1]
    folder = tmp_path_factory.mktemp("oldest")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"timm=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"timm {version} cannot be installed: {installed.stderr[-300:]}")
    (Path(packages) / "a_package.pth").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n")
    (Path(packages) / "z_shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = str(folder / "bin" / "python")
    found = subprocess.run([python, "-c", "import timm; print(timm.__version__)"], capture_output=True, text=True)
    assert found.stdout.strip() == version, found.stderr
    return python


@pytest.mark.slow
def test_with_the_oldest_timm(python):
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", SELECTION]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 500
