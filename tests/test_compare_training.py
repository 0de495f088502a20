"""examples/finetuning.py: training that goes on to the same bits, on the same images and crops for all models."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_compare import SHAPE, rows_in, run_here
from timm.optim import create_optimizer_v2

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.training import ClusterRefresh

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import finetuning

METHODS = ["ltm", "ltmp", "patch_merger", pytest.param("paper", marks=pytest.mark.slow)]


@pytest.mark.parametrize("merge_warmup", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_to_the_same_bits(method, merge_warmup, tmp_path):
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
    recipe = finetuning.Recipe(7, 6, 1e-3, warmup=2, refresh_every=4, save_every=2, merge_warmup=merge_warmup)

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
