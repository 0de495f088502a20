"""What a release holds: wheel and sdist, installed elsewhere; and CI, which runs what the README says."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml

import timm_ltm

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "output", "__pycache__", ".*_cache")
IN_ANOTHER_FOLDER = """
import timm, torch
import timm_ltm
model = timm.create_model("ltm_test_vit", num_classes=3, compression_ratio=0.5).eval()
print(timm_ltm.__file__, *model(torch.zeros(1, 3, 160, 160)).shape, sep="\\n")
"""


def files_of_package(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in (root / "timm_ltm").rglob("*") if p.suffix in (".py", ".typed")}


@pytest.fixture(scope="module")
def archives():
    """Wheel and sdist of a copy of this tree, which building leaves files in. The wheel is built from the sdist."""
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder) / "copy", Path(folder) / "dist"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        files = files_of_package(copy)
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
        built = subprocess.run(build, capture_output=True, text=True, timeout=300)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
        (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
        yield {"wheel": wheel, "sdist": sdist, "files": files}


@pytest.mark.slow
def test_every_file_of_the_package_is_in_both(archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = set(wheel.namelist())
    with tarfile.open(archives["sdist"]) as sdist:
        sources = {name.partition("/")[2] for name in sdist.getnames()}
    expected = archives["files"]
    assert {"timm_ltm/py.typed", "timm_ltm/cli/__init__.py", "timm_ltm/methods/ltm/__init__.py"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name for name in sources if name.startswith("timm_ltm/") and Path(name).suffix} == expected
    assert any(name.endswith("LICENSE") for name in names)
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= sources


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_in_an_environment_of_its_own(archives, kind):
    """This environment's packages, torch among them, stand behind it, without what is installed in place there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder})
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
        subprocess.run([*install, "--target", packages, str(archives[kind])], check=True, timeout=300)
        (Path(packages) / "z_shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        python, elsewhere = str(Path(folder) / "bin" / "python"), Path(folder) / "elsewhere"
        elsewhere.mkdir()
        run = [python, "-c", IN_ANOTHER_FOLDER]
        found = subprocess.run(run, cwd=elsewhere, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        path, *shape = found.stdout.split()
        assert Path(path).is_relative_to(packages)
        assert shape == ["1", "3"]


def test_ci_runs_the_command_of_the_readme_on_the_oldest_and_the_newest_timm():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    readme = (ROOT / "README.md").read_text()
    (command,) = set(re.findall(r"^pip install .*&& python -m pytest", readme, flags=re.MULTILINE))
    assert command in [step.get("run") for step in jobs["tests"]["steps"]]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = re.search(r"timm>=([\d.]+)", setup["options"]["install_requires"])[1]
    tested = [entry["timm"] for entry in jobs["tests"]["strategy"]["matrix"]["include"]]
    assert tested[0] == oldest
    assert f"timm {tested[0]} to {tested[-1]}" in readme


def test_the_changelog_has_the_version_on_top():
    """Until it is released: of what is coming."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    top = re.search(r"^## (.*)$", changelog, flags=re.MULTILINE)[1]
    assert top == "Unreleased" or top.startswith(timm_ltm.__version__)
