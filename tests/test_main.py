"""``python -m timm_ltm``: any script with the models registered, and commands, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import timm
from beside import VALUE
if __name__ == "__main__":
    print(json.dumps([sys.argv[1:], VALUE, len(timm.list_models("ltm_*")) > 10]))
"""


def run(*args, launcher=("-m",)):
    return subprocess.run(
        [sys.executable, *launcher, "timm_ltm", *args],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7")
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_runs_a_script_as_python_would(script):
    done = run(script, "--model", "ltm_swin_tiny")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["--model", "ltm_swin_tiny"], 7, True]


@pytest.mark.slow
def test_under_torchrun(script):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    done = run(script, "a", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[["a"], 7, True]] * 2


def test_a_script_that_is_not_there():
    done = run("nowhere.py")
    assert done.returncode == 1
    assert "PATH: got 'nowhere.py', expected a python script or a command. Commands: list, show," in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_command():
    """JSON alone on stdout; nothing on stderr, which is no terminal."""
    done = run("list", "tome_test_vit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["model"] == "tome_test_vit"
    assert done.stderr == ""


def test_a_scripts_own_error_is_its_own(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    assert run("run", str(tmp_path / "fails.py")).returncode == 3
