"""benchmarks/learned.py: forms of LTM's learned part, against LTM itself."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import timm_ltm
from timm_ltm.cost import input_size_of
from timm_ltm.reduction import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

FORMS = {
    "residual": "step=residual eta=3",
    "weights": "step=residual eta=3 acts_on=weights",
    "destinations": "step=residual eta=30 acts_on=destinations",
    "order": "step=residual acts_on=order",
    "constant": "direction=constant",
    "late": "first_block=3 step=residual eta=3",
    "metric": "update=False metric=50 metric_dim=32",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a run, fine-tuned for three steps."""
    out = tmp_path_factory.mktemp("learned")
    patch = pytest.MonkeyPatch()
    import learned

    merges = [["ltm", "update=False"], ["ltm"], ["learned"], *(["learned", *form.split()] for form in FORMS.values())]
    arguments = [
        "--model", "test_vit", "--img-size", "16", "--model-kwargs", "patch_size=2", "--test-limit", "20",
        "--plain-epochs", "1", "--budget", "0.6", "--clusters", "200", "--steps", "3", "--seeds", "0",
        "--batch-size", "8", "--lr", "1e-2", "--rounds", "0", "--device", "cpu", "--information", "20",
        "--out", str(out),
    ]  # fmt: skip
    merges = [word for words in merges for word in ("--merge", *words)]
    patch.setattr(sys, "argv", ["learned.py", *arguments, *merges])
    try:
        learned.main()
        yield out
    finally:
        patch.undo()
        METHODS.pop("learned")


def array(folder, name, kind="mean"):
    (path,) = folder.glob(f"results/{name.replace(' ', '_')}_0.6.{kind}.npy")
    return np.load(path)


def weights(folder, name):
    return torch.load(folder / "results" / f"{name.replace(' ', '_')}_0.6_fine-tuned.pt")


def test_its_default_is_ltm(results):
    assert np.array_equal(array(results, "learned"), array(results, "ltm"))
    ours, theirs = weights(results, "learned"), weights(results, "ltm")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if not name.startswith("reduction."))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "metric"])
def test_forms_with_clusters_differ_from_it(form, results):
    assert not np.array_equal(array(results, f"learned {FORMS[form]}"), array(results, "ltm"))


def test_a_metric_starts_as_none_and_is_learned(results):
    learned = [v for key, v in weights(results, f"learned {FORMS['metric']}").items() if key.endswith(".metric")]
    assert learned
    assert any(value.any() for value in learned)  # of the first block, which does not merge, it is not
    assert all(value.isfinite().all() for value in learned)
    plain = timm.create_model("test_vit", num_classes=3).eval()
    x = torch.randn(2, *input_size_of(plain))
    merged = timm_ltm.convert(plain, "ltm", update=False, compression_ratio=0.7)
    model = timm_ltm.convert(plain, "learned", update=False, metric=50, metric_dim=32, compression_ratio=0.7)
    torch.testing.assert_close(model(x), merged(x))
    torch.testing.assert_close(model.train()(x), merged(x))  # destinations stay hard


def test_information_of_what_was_trained(results):
    """By block of every model, and of the whole."""
    with open(results / "information.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    of = {}
    for row in rows:
        of.setdefault(row["model"], []).append(row)
    assert len(of) == 3 + 1 + len(FORMS)
    blocks = [*(f"blocks.{i}" for i in range(6)), "model"]
    assert all([row["block"] for row in found] == blocks for found in of.values())
    assert of["plain"][-1]["tokens"] == "64"
    assert int(of["ltm 0.6"][5]["tokens"]) < 40
    for row in rows:
        assert float(row["ib_loss"]) <= float(row["ib_bound"]) - float(row["c_0"]) + 1e-6  # Theorem 3.1
        assert 0 <= float(row["i_labels"]) <= float(row["h_labels"]) + 1e-6
    assert {row["ib_bound"] for row in of["ltm 0.6"]}.isdisjoint(row["ib_bound"] for row in of["plain"])


def test_what_the_update_moves(results):
    """By block: weights alone change no destination, destinations alone do, the order moves nothing within slots."""
    with open(results / "moves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["nats"]) < np.log(10) for row in rows)
    assert any(float(row["nats"]) > 0 for row in rows)
    of = {form: [row for row in rows if row["model"] == f"learned {words} 0.6"] for form, words in FORMS.items()}
    changed, moved = ({f: [float(row[key]) for row in of[f]] for f in of} for key in ("changed", "moved"))
    assert not any(changed["weights"])
    assert all(moved["weights"])
    assert any(changed["destinations"])
    assert any(changed["order"])
    assert not any(moved["order"])
    late = dict(zip([row["block"] for row in of["late"]], moved["late"], strict=True))
    assert {block for block, weight in late.items() if weight == 0} == {"blocks.1", "blocks.2"}
    assert not of["metric"]
    residual, mlp = moved["residual"], [float(row["moved"]) for row in rows if row["model"] == "learned 0.6"]
    assert sum(residual) > sum(mlp)
