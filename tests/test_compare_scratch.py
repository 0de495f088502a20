"""examples/compare.py from random weights, and with clusters before training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_compare import compare, rows_in, run_here

SMALL = ["--model", "test_vit", "--img-size", 16, "--model-kwargs", "patch_size=2", "--test-limit", 20, "--rounds", 0,
         "--device", "cpu", "--budget", 0.7]  # fmt: skip


def test_from_scratch_all_models_start_from_the_same_weights(tmp_path, monkeypatch):
    """A method that has not begun to merge is the plain model, step by step. Nothing is measured without training."""
    arguments = [*SMALL, "--merge", "tome", "--merge", "ltmp", "--seeds", 3, 4, "--steps", 3, "--scratch",
                 "--batch-size", 8, "--lr", 1e-2]  # fmt: skip

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
    with pytest.raises(SystemExit, match=r"--scratch: got False, expected True"):
        run_here(monkeypatch, *[a for a in arguments if a != "--scratch"], "--out", tmp_path / "later")
    without = ["--merge", "tome", "--plain-epochs", 1, "--out", tmp_path / "trained"]
    run_here(monkeypatch, *SMALL, *without)
    with pytest.raises(SystemExit, match=r"--scratch: got True, expected False"):
        run_here(monkeypatch, *SMALL, *without, "--scratch", "--steps", 3)


def test_clusters_before_training(tmp_path, monkeypatch):
    """They are kept with the model, a second run reads them, and what has none is as without them."""
    arguments = [*SMALL, "--plain-epochs", 2, "--merge", "ltm", "--merge", "ltm", "update=False", "--out", tmp_path]
    run_here(monkeypatch, *arguments, "--clusters", 300)
    saved = torch.load(tmp_path / "results" / "ltm_0.7.pt")
    assert any(value.any() for name, value in saved["own"].items() if name.endswith("clusters.centroids"))
    assert all(np.isfinite(value) and value < np.log(10) for value in saved["told"].values())
    assert len(saved["told"]) > 1
    assert torch.load(tmp_path / "results" / "ltm_update=False_0.7.pt")["told"] == {}
    of_clusters = np.load(tmp_path / "results" / "ltm_0.7.class.npy")
    (tmp_path / "results" / "ltm_0.7.json").unlink()
    run_here(monkeypatch, *arguments, "--clusters", 300)
    assert np.array_equal(np.load(tmp_path / "results" / "ltm_0.7.class.npy"), of_clusters)
    with pytest.raises(SystemExit, match="--clusters: got 0, expected 300"):
        run_here(monkeypatch, *arguments)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["measured"]["clusters"], settings["measured"]["scratch"]  # as earlier versions wrote it
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run_here(monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scratch"], "--scratch: got nothing to train"),
        (["--scratch", "--steps", "3", "--clusters", "9"], "--scratch: got --clusters beside it"),
        (["--scratch", "--steps", "3", "--pretrained"], "--scratch: got weights beside it"),
        (["--merge-warmup", "300"], "--merge-warmup: got 300, expected a share"),
        (["--clusters", "-1"], "--clusters: got -1"),
    ],
)
def test_options_that_do_not_go_together(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare.py", "--model", "test_vit", *options])
    with pytest.raises(SystemExit):
        compare.arguments(None)
    assert message in capsys.readouterr().err
