"""examples/compare.py as a process: what it writes, and that a killed run goes on to the same numbers."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torchvision.datasets import ImageFolder

import timm_ltm
from timm_ltm.cli import main as command
from timm_ltm.cost import gmacs

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare  # noqa: E402

SHAPE = {"img_size": 16, "patch_size": 2}
STEPS = 12  # more than a run takes while it is found and killed
ARGUMENTS = ["--model", "test_vit", "--img-size", "16", "--model-kwargs", "patch_size=2", "--test-limit", "30",
             "--merge", "tome", "schedule=flat", "--merge", "ltm", "--budget", "0.7", "--seeds", "3",
             "--steps", str(STEPS), "--refresh-every", "4", "--save-every", "1", "--batch-size", "8", "--lr", "1e-3",
             "--rounds", "0", "--device", "cpu"]  # fmt: skip


def run_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()


def rows_in(folder):
    with open(folder / "compare.csv", newline="") as file:
        return {(row["method"], row["training"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a model without a head."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, **SHAPE)
    with torch.no_grad():
        for p in model.parameters():  # as initialised, blocks add next to nothing
            p.mul_(8.0 if p.ndim == 2 else 1.0)
    torch.save(model.state_dict(), path)
    return path


def saved_model(folder, plain, name):
    """The one that a run converted, by the schedule that it found."""
    settings = torch.load(folder / "results" / f"{name}.pt")["settings"]
    return timm_ltm.convert(plain, name.split("_")[0], **settings)


@pytest.fixture(scope="module")
def killed(weights, tmp_path_factory):
    """The folder of a run killed within a fine-tuning of LTM, and the arguments that go on with it."""
    out = tmp_path_factory.mktemp("killed")
    arguments = [*ARGUMENTS, "--checkpoint", str(weights), "--out", str(out)]
    line = [sys.executable, str(EXAMPLES / "compare.py"), *arguments]
    process = subprocess.Popen(line, stderr=subprocess.PIPE)
    state = out / "results" / "ltm_0.7_seed_3.state.pt"
    said: list[bytes] = []
    threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()  # a full pipe would stop it
    try:
        until = time.monotonic() + 600
        while not state.exists():
            assert process.poll() is None, b"".join(said).decode()
            assert time.monotonic() < until, "it has not begun to train LTM"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "results" / "ltm_0.7_seed_3.json").exists()
    assert torch.load(state)["step"] < STEPS
    return out, arguments


def test_a_killed_run_ends_as_one_never_killed(killed, weights, tmp_path, monkeypatch):
    """And its table says what is measured in another way."""
    folder, arguments = killed
    run_here(monkeypatch, *arguments)
    whole = tmp_path / "whole"
    run_here(monkeypatch, *arguments, "--out", whole)
    assert (whole / "compare.csv").read_bytes() == (folder / "compare.csv").read_bytes()
    arrays = sorted(path.name for path in (whole / "results").glob("*.npy"))
    assert len(arrays) == 12  # right of 3 models twice, and 2 kinds of features or errors of each
    for name in arrays:
        assert np.array_equal(np.load(whole / "results" / name), np.load(folder / "results" / name)), name
    before = (whole / "compare.csv").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"--lr: got 0\.5, expected 0\.001, by which the results in"):
        run_here(monkeypatch, *arguments, "--out", whole, "--lr", 0.5)
    assert (whole / "compare.csv").stat().st_mtime_ns == before
    check_table(folder, tmp_path)
    check_later_runs(whole, [*arguments, "--out", str(whole)], monkeypatch)


def check_later_runs(folder, arguments, monkeypatch):
    """Times are taken later of what was fine-tuned before; results of another version of the training are not mixed."""
    before = rows_in(folder)
    run_here(monkeypatch, *arguments, "--rounds", 2, "--batch-sizes", 2)
    rows = rows_in(folder)
    for key, row in rows.items():
        assert float(row["images_per_s_b2"]) == pytest.approx(2e3 / float(row["ms_b2"]))
        plain = rows["plain", key[1]]
        assert float(row["latency_ratio_b2"]) == pytest.approx(float(row["ms_b2"]) / float(plain["ms_b2"]))
        assert row["top1"] == before[key]["top1"]
    assert len({row["ms_b2"] for row in rows.values()}) == 6
    settings = folder / "settings.json"
    told = json.loads(settings.read_text())
    del told["trained"]["version"], told["trained"]["own_lr"]  # as earlier versions wrote it
    settings.write_text(json.dumps(told))
    run_here(monkeypatch, *arguments)  # nothing is left to train
    with pytest.raises(SystemExit, match=r"version of the training: got 5, expected 1, by which the results in"):
        run_here(monkeypatch, *arguments, "--seeds", 3, 4)
    with pytest.raises(SystemExit, match=r"--own-lr: got 0\.01, expected None"):
        run_here(monkeypatch, *arguments, "--own-lr", 0.01)


def check_table(killed, tmp_path):
    """Cost, top-1 and errors of the same weights, converted and run in another way."""
    rows = rows_in(killed)
    names = ("plain", "tome schedule=flat", "ltm")
    assert list(rows) == [(name, training) for training in ("none", "fine-tuned") for name in names]
    plain = timm.create_model("test_vit", num_classes=10, **SHAPE).eval()
    plain.load_state_dict(torch.load(killed / "plain.pt"))
    transform = create_transform((3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.95, interpolation="bicubic")
    folder = ImageFolder(str(killed / "digits" / "validation"), transform)
    chosen = sorted(compare.random.Random(0).sample(folder.samples, 30))
    x = torch.stack([transform(folder.loader(path)) for path, _ in chosen])
    y = torch.tensor([label for _, label in chosen])
    with torch.no_grad():
        features, right = {}, {}
        for name, model in (
            ("plain", plain),
            ("tome schedule=flat", saved_model(killed, plain, "tome_schedule=flat_0.7")),
            ("ltm", saved_model(killed, plain, "ltm_0.7")),
        ):
            features[name], right[name] = model.forward_features(x), 100.0 * (model(x).argmax(dim=1) == y).double()
            row = rows[name, "none"]
            assert float(row["gmacs"]) == pytest.approx(gmacs(model))
            assert model is plain or 0.6 < float(row["ratio"]) <= 0.7
            assert float(row["top1"]) == pytest.approx(right[name].mean().item())
            assert float(row["top1_low"]) <= float(row["top1"]) <= float(row["top1_high"])
    assert right["plain"].mean() > 30  # a fitted head
    for name in ("tome schedule=flat", "ltm"):
        row = rows[name, "none"]
        error = 1e3 * (1 - F.cosine_similarity(features[name][:, 0].double(), features["plain"][:, 0].double()))
        assert float(row["class_error"]) == pytest.approx(error.mean().item(), rel=1e-3)
        assert float(row["class_error"]) > 1e-6  # of images of few pixels; rounding is below 1e-9
        assert float(row["lost"]) == pytest.approx((right["plain"] - right[name]).mean().item())
    gained = right["ltm"] - right["tome schedule=flat"]
    assert float(rows["ltm", "none"]["gained"]) == pytest.approx(gained.mean().item())
    of_files = {
        name: 100.0 * np.load(killed / "results" / f"{name}_seed_3.right.npy").mean()
        for name in ("plain", "tome_schedule=flat_0.7", "ltm_0.7")
    }
    assert float(rows["ltm", "fine-tuned"]["top1"]) == pytest.approx(of_files["ltm_0.7"])
    lost = of_files["plain"] - of_files["ltm_0.7"]
    assert float(rows["ltm", "fine-tuned"]["lost"]) == pytest.approx(lost)
    trained, bare = (float(rows["ltm", training]["gmacs"]) for training in ("fine-tuned", "none"))
    assert trained > bare  # with clusters, the update runs
    text = (killed / "compare.md").read_text()
    assert text.count("\n| `ltm` 0.7 |") == 2
    assert "--refresh-every 4" in text
    assert matplotlib.image.imread(killed / "compare.png").shape[1] > 1500
    assert command(["tradeoff", str(killed / "compare.csv"), "--output", str(tmp_path / "t.png")]) == 0
    assert not list((killed / "results").glob("*.part")) + list((killed / "results").glob("*.state.pt"))


def test_settings_that_failed_may_be_mended(tmp_path, monkeypatch):
    """They count from the first result on."""
    with pytest.raises(SystemExit, match="compare: got 'test_vitt', expected a model's name"):
        run_here(monkeypatch, "--model", "test_vitt", "--img-size", 16, "--device", "cpu", "--out", tmp_path)
    assert not (tmp_path / "settings.json").exists()

    def settings(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--device", "cpu", "--out", str(tmp_path)])
        return compare.Settings(compare.arguments(None))

    settings("--model", "test_vit").remember("measured")
    settings("--model", "test_vit2").check()
    torch.save({}, tmp_path / "plain.pt")
    settings("--model", "test_vit").check()
    with pytest.raises(compare.CommandError, match=r"--model: got 'test_vit2', expected 'test_vit'"):
        settings("--model", "test_vit2").check()
    with_steps = settings("--model", "test_vit", "--steps", "3")
    with_steps.remember("trained")
    settings("--model", "test_vit", "--steps", "4").check()
    (tmp_path / "results").mkdir()
    torch.save({}, tmp_path / "results" / "ltm_0.7_seed_0.state.pt")
    with_steps.check()
    with pytest.raises(compare.CommandError, match="--steps: got 4, expected 3"):
        settings("--model", "test_vit", "--steps", "4").check()
    assert json.loads((tmp_path / "settings.json").read_text())["measured"]["model"] == "test_vit"


@pytest.mark.parametrize(
    ("shares", "best", "said"),
    [
        ([0.695], 0, ""),
        ([0.75, 0.68, 0.72, 0.685], 3, "warning: ltmp costs 0.685 of the plain model on 5 training images, where 0.7"),
        ([0.75, 0.72, 0.73, 0.74], 1, "warning: ltmp costs 0.720"),
        ([0.68, None], 0, "warning: ltmp costs 0.680"),
    ],
)
def test_calibration_keeps_the_best_try(shares, best, said, monkeypatch, capsys):
    """None is a try whose aim cannot be met."""
    tried = []

    def converted(method, settings):
        tried.append(torch.nn.Identity())
        return tried[-1]

    def calibrated(model, images):
        if shares[tried.index(model)] is None:
            raise ValueError("gmacs: got less than what merging all costs.")

    monkeypatch.setattr(compare, "calibrate", calibrated)
    monkeypatch.setattr(compare, "gmacs", lambda plain: 2.0)
    of = argparse.Namespace(
        args=argparse.Namespace(calibrate=128), clean=range(5), plain=None, converted=converted,
        first=lambda pictures, count: torch.zeros(count), mean_cost=lambda m, _: 2.0 * shares[tried.index(m)],
    )  # fmt: skip
    assert compare.Comparison.calibrated(of, "ltmp", {"gmacs": 0.7}) is tried[best]
    assert len(tried) == len(shares)
    err = capsys.readouterr().err
    assert said in err if said else not err


def test_the_mean_cost_is_near_to_one_that_counts_all_images():
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=10, **SHAPE).eval()
    model = timm_ltm.convert(plain, "ltmp", gmacs=0.7).eval()
    images = torch.randn(40, 3, 16, 16) * torch.linspace(0.1, 3, 40)[torch.randperm(40)].view(-1, 1, 1, 1)
    compare.calibrate(model, images)
    of = argparse.Namespace(args=argparse.Namespace(eval_batch_size=8))
    exact, few = gmacs(model, inputs=images), gmacs(model, inputs=images[:8])
    found = compare.Comparison.mean_cost(of, model, images)
    assert found == pytest.approx(exact, rel=0.005)
    assert abs(few - exact) > 4 * abs(found - exact)
