"""examples/compare.py as a process: what it writes, and that a killed run goes on to the same numbers."""

from __future__ import annotations

import argparse
import copy
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
from timm.optim import create_optimizer_v2
from torchvision.datasets import ImageFolder

import timm_ltm
from timm_ltm.cli import main as command
from timm_ltm.cost import gmacs
from timm_ltm.training import ClusterRefresh

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare  # noqa: E402
import finetuning  # noqa: E402

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
    with pytest.raises(SystemExit, match=r"version of the training: got 2, expected 1, by which the results in"):
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


METHODS = ["ltm", "ltmp", "patch_merger", pytest.param("paper", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_to_the_same_bits(method, tmp_path):
    """Stopped between two refreshes, with dropout: all parameters, clusters and epochs."""
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=10, drop_path_rate=0.2, **SHAPE)
    settings = {
        "ltm": {"compression_ratio": 0.8},
        "paper": {"preset": "paper", "compression_ratio": 0.8},
        "ltmp": {"gmacs": 0.8},
        "patch_merger": {"num_slots": 8},
    }[method]
    method = "ltm" if method == "paper" else method
    torch.manual_seed(0)
    images = torch.randint(0, 255, (20, 3, 18, 18), dtype=torch.uint8)
    pictures = finetuning.Pictures([("", i % 10) for i in range(20)], None, 0, 1)
    pictures.take = lambda indices: [images[i] for i in indices]
    recipe = finetuning.Recipe(7, 6, 1e-3, warmup=2, refresh_every=4, save_every=2)

    def trained(state, stop=None):
        torch.manual_seed(1)
        model, calls = timm_ltm.convert(copy.deepcopy(plain), method, **settings), []

        def normalize(x):
            calls.append(len(x))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return x.float() / 255

        finetuning.train(model, pictures, normalize, (16, 16), recipe, 5, state, "test")
        return model.state_dict(), len(calls)

    whole, steps = trained(tmp_path / "a")
    assert steps == 7
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop=4)
    assert torch.load(tmp_path / "b")["step"] == 2
    again, steps = trained(tmp_path / "b")
    assert steps == 5
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    assert int(whole["reduction.epoch"]) == 2
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, whole[name])}
    assert "blocks.0.mlp.fc1.weight" in changed
    if method == "ltm":
        assert any(value.any() for name, value in whole.items() if name.endswith("clusters.centroids"))


def test_an_epoch_sees_no_image_twice():
    order = [finetuning.batch_of(3, step, 20, 6) for step in range(7)]
    assert all(len({*order[i], *order[i + 1], *order[i + 2]}) == 18 for i in (0, 3))
    assert order[0] != order[3]
    assert order != [finetuning.batch_of(4, step, 20, 6) for step in range(7)]
    assert order == [finetuning.batch_of(3, step, 20, 6) for step in range(7)]


def test_steps_see_the_same_crops_for_every_model(tmp_path):
    """Whatever numbers a model itself draws."""
    plain = timm.create_model("test_vit", num_classes=10, drop_rate=0.1, drop_path_rate=0.2, **SHAPE)
    merging = timm_ltm.convert(copy.deepcopy(plain), "patch_merger", num_slots=8)
    images = torch.randint(0, 255, (20, 3, 18, 18), dtype=torch.uint8)
    pictures = finetuning.Pictures([("", i % 10) for i in range(20)], None, 0, 1)
    pictures.take = lambda indices: [images[i] for i in indices]

    def seen(model, seed, state):
        batches = []

        def normalize(x):
            batches.append(x)
            return x.float() / 255

        recipe = finetuning.Recipe(3, 6, 1e-3)
        finetuning.train(model, pictures, normalize, (16, 16), recipe, seed, tmp_path / state, "test")
        return torch.stack(batches)

    first = seen(plain, 5, "plain")
    assert torch.equal(first, seen(merging, 5, "merging"))
    assert not torch.equal(first, seen(plain, 6, "another"))


def test_thresholds_learn_at_a_rate_of_their_own():
    model = timm_ltm.convert(timm.create_model("test_vit", num_classes=10, **SHAPE), "ltmp", gmacs=0.8)
    groups = finetuning.optimizer_of(model, finetuning.Recipe(5, lr=1e-4)).param_groups
    assert {(group["lr"], len(group["params"])) for group in groups if group["lr"] != 1e-4} == {(5e-3, 12)}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 0 for group in groups if group["lr"] == 5e-3)


def test_what_a_method_learns_may_have_a_rate_of_its_own():
    model = timm_ltm.convert(timm.create_model("test_vit", num_classes=10, **SHAPE), "patch_merger", num_slots=8)
    own = {id(p) for name, p in model.named_parameters() if ".reducer." in name}
    given, same = (finetuning.optimizer_of(model, finetuning.Recipe(5, lr=1e-4, own_lr=lr)) for lr in (1e-2, None))
    assert own == {id(p) for group in given.param_groups for p in group["params"] if group["lr"] == 1e-2}
    assert {group["lr"] for group in same.param_groups} == {1e-4}
    for optimizer in (given, same):
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_what_decays_is_what_decays_under_timm():
    model = timm_ltm.convert(timm.create_model("test_vit", num_classes=10, **SHAPE), "ltm", compression_ratio=0.8)
    ours = finetuning.optimizer_of(model, finetuning.Recipe(5, weight_decay=0.05))
    theirs = create_optimizer_v2(model, "adamw", lr=5e-5, weight_decay=0.05)
    decays = [
        {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] > 0}
        for optimizer in (ours, theirs)
    ]
    assert decays[0] == decays[1]
    assert id(model.pos_embed) not in decays[0]


def test_a_refresh_goes_on_within_an_epoch():
    """Its state, saved and loaded by another, gives the same clusters; a fresh one does not."""
    found = {}
    for way in ("whole", "loaded", "fresh"):
        torch.manual_seed(0)
        model = timm.create_model("ltm_test_vit", num_classes=10, compression_ratio=0.8, **SHAPE).train()
        refresh = ClusterRefresh(model)
        for step in range(3):
            x, y = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(step)), torch.arange(40) % 10
            model(x)
            refresh.step(y)
            if step == 1 and way != "whole":
                state = {"model": model.state_dict(), "refresh": refresh.state_dict()}
                model = timm.create_model("ltm_test_vit", num_classes=10, compression_ratio=0.8, **SHAPE).train()
                refresh = ClusterRefresh(model)
                model.load_state_dict(state["model"])
                if way == "loaded":
                    refresh.load_state_dict(state["refresh"])
        refresh.epoch_end()
        found[way] = torch.cat([v.flatten() for n, v in model.state_dict().items() if "clusters." in n])
    assert torch.equal(found["whole"], found["loaded"])
    assert not torch.equal(found["whole"], found["fresh"])


@pytest.mark.slow
def test_maps_take_an_image_size_and_methods_that_do_not_fit_are_left_out(tmp_path, monkeypatch, capsys):
    """MobileViT has no img_size; its checkpoint, as timm's train.py writes it, tells one."""
    model = timm.create_model("mobilevit_xxs", num_classes=10)
    args = argparse.Namespace(model="mobilevit_xxs", model_kwargs={}, num_classes=10, img_size=64)
    torch.save({"arch": "mobilevit_xxs", "state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    run_here(monkeypatch, "--model", "mobilevit_xxs", "--checkpoint", tmp_path / "last.pth.tar", "--device", "cpu",
             "--merge", "ltmp", "--merge", "tome", "--budget", "0.85", "--test-limit", 3, "--batch-sizes", 2,
             "--rounds", 2, "--out", tmp_path / "out")  # fmt: skip
    assert "warning: ltmp 0.85 is left out: method: got ltmp" in capsys.readouterr().err
    rows = rows_in(tmp_path / "out")
    assert list(rows) == [("plain", "none"), ("tome", "none")]
    assert float(rows["plain", "none"]["gmacs"]) == pytest.approx(gmacs(model, (3, 64, 64)))
    assert float(rows["tome", "none"]["ratio"]) <= 0.85
    row = rows["tome", "none"]
    assert float(row["images_per_s_b2"]) == pytest.approx(2e3 / float(row["ms_b2"]))
    assert float(row["ms_low_b2"]) <= float(row["ms_b2"]) <= float(row["ms_high_b2"])
    assert float(row["latency_ratio_b2"]) == pytest.approx(float(row["ms_b2"]) / float(rows["plain", "none"]["ms_b2"]))


def test_from_scratch_all_models_start_from_the_same_weights(tmp_path, monkeypatch):
    """A method that has not begun to merge is the plain model, step by step. Nothing is measured without training."""
    arguments = ["--model", "test_vit", "--img-size", 16, "--model-kwargs", "patch_size=2", "--test-limit", 20,
                 "--merge", "tome", "--merge", "ltmp", "--budget", 0.7, "--seeds", 3, 4, "--steps", 3, "--scratch",
                 "--batch-size", 8, "--lr", 1e-2, "--rounds", 0, "--device", "cpu"]  # fmt: skip

    def weights(folder, name):
        return torch.load(folder / "results" / f"{name}_fine-tuned.pt")

    run_here(monkeypatch, *arguments, "--merge-warmup", 1, "--out", tmp_path / "never")
    plain, tome = (weights(tmp_path / "never", name) for name in ("plain", "tome_0.7"))
    assert all(torch.equal(value, tome[name]) for name, value in plain.items())
    run_here(monkeypatch, *arguments, "--merge-warmup", 0.4, "--out", tmp_path / "later")
    later = weights(tmp_path / "later", "tome_0.7")
    assert all(torch.equal(v, weights(tmp_path / "later", "plain")[name]) for name, v in plain.items())
    assert not torch.equal(plain["blocks.0.attn.qkv.weight"], later["blocks.0.attn.qkv.weight"])
    rows = rows_in(tmp_path / "later")
    assert list(rows) == [(name, "from scratch") for name in ("plain", "tome", "ltmp")]
    assert float(rows["tome", "from scratch"]["ratio"]) <= 0.7
    assert {row["seeds"] for row in rows.values()} == {"2"}
    text = (tmp_path / "later" / "compare.md").read_text()
    assert "## From scratch, 2 seeds: 3, 4" in text
    assert "Without training" not in text
    with pytest.raises(SystemExit, match=r"--merge-warmup: got 0\.0, expected 0\.4"):
        run_here(monkeypatch, *arguments, "--seeds", 5, "--out", tmp_path / "later")
