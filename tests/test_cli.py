"""The commands of ``python -m timm_ltm``: what they write, print and return."""

from __future__ import annotations

import csv
import json

import matplotlib.image
import pytest
import timm
import torch
from PIL import Image
from small import fill
from timm.utils import CheckpointSaver
from torch import nn

from timm_ltm.cli import COMMANDS, main
from timm_ltm.cli.common import as_table, settings_of
from timm_ltm.cost import gmacs
from timm_ltm.speed import latencies, peak_memory

SHAPE = {"img_size": 16, "patch_size": 4}


@pytest.fixture
def data(tmp_path):
    """Four colours, which are easy to tell apart, as an ImageFolder."""
    g = torch.Generator().manual_seed(0)
    for label, colour in enumerate(torch.tensor([[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 0]])):
        folder = tmp_path / "data" / "validation" / str(label)
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = (20 * colour.view(1, 1, 3) + torch.randint(0, 60, (20, 24, 3), generator=g)).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "data"


def save(folder, name, **kwargs):
    """A checkpoint as timm's train.py writes it."""
    import argparse

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = fill(timm.create_model(name, num_classes=4, **SHAPE, **kwargs))
    saved = argparse.Namespace(model=name, model_kwargs={**SHAPE, **kwargs}, num_classes=None, img_size=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    CheckpointSaver(model, optimizer, saved, checkpoint_dir=str(folder)).save_checkpoint(0, metric=1.0)
    return model.eval(), str(folder / "model_best.pth.tar")


def answer(capsys, *argv):
    """What a command printed as JSON."""
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *argv):
    """What a command that could not be done said, in one line."""
    assert main([str(a) for a in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    return lines[0]


def test_list(capsys):
    """GMACs are those that a model with weights has, by any pattern, at any budget."""
    (row,) = answer(capsys, "list", "tome_test_vit")
    model = timm.create_model("tome_test_vit").eval()
    assert row["gmacs"] == pytest.approx(gmacs(model))
    model.set_merging(False)
    assert row["plain_gmacs"] == pytest.approx(gmacs(model))
    assert row["ratio"] == pytest.approx(row["gmacs"] / row["plain_gmacs"])
    assert row["parameters_m"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    (row,) = answer(capsys, "list", "ltm_test_vit", "--model-kwargs", "gmacs=0.7", "img_size=96")
    assert 0.6 < row["ratio"] <= 0.7
    assert row["size"] == "96 x 96"
    (row,) = answer(capsys, "list", "ltmp_test_vit")  # what it costs depends on the image
    assert row["gmacs"] is None
    assert row["ratio"] is None
    assert row["plain_gmacs"] > 0
    names = answer(capsys, "list", "mobilevit_x", "--names")
    assert "tome_mobilevit_xxs" in names
    assert "ltm_mobilevit_xs" in names
    (row,) = answer(capsys, "list", "ltm_test_vit")
    assert main(["list", "ltm_test_vit"]) == 0
    assert f"{row['ratio']:.4g}" in capsys.readouterr().out.splitlines()[1]
    assert complaint(capsys, "list", "resnet") == "list: got 'resnet', which matches no merging model. Try " + (
        "'ltm_*' or 'mobilevit'."
    )


def test_show(capsys, tmp_path, data):
    """Pictures of a checkpoint, of a plain model and of a folder; blocks tell how many tokens are left."""
    model, path = save(tmp_path / "run", "ltm_test_vit", compression_ratio=0.7)
    image = data / "validation" / "0" / "0.png"
    told = answer(capsys, "show", path, image, image, "--layer", 2, "--output", tmp_path / "masks")
    assert [b["tokens"] for b in told["blocks"]] == [reducer.slots(b["of"]) for (_, reducer), b in
                                                     zip(model.reducers(), told["blocks"], strict=True)]  # fmt: skip
    for file in told["files"]:
        assert matplotlib.image.imread(file).shape[0] > 100
    arguments = ("--merge", "tome", "r=3", "--model-kwargs", "img_size=16", "patch_size=4", "--token", "largest")
    told = answer(capsys, "show", "test_vit", image, *arguments, "--output", tmp_path / "more")
    assert [b["tokens"] for b in told["blocks"]] == [13, 10, 7, 4, 2, 1]
    assert "--layer: got 9, expected 1 to 6" in complaint(capsys, "show", path, image, "--layer", 9)
    assert "image: got" in complaint(capsys, "show", path, tmp_path / "none.png")
    assert complaint(capsys, "show", path, image, "--merge", "tome").startswith("show: --merge: got 'tome' for a model")
    assert "merges in no block" in complaint(
        capsys, "show", "test_vit", image, "--merge", "ltm", "compression_ratio=1.0"
    )


def test_measure(capsys, tmp_path):
    """Rows for each batch size, plain first; merging holds less and computes less."""
    rows = answer(capsys, "measure", "ltm_test_vit", "--model-kwargs", "compression_ratio=0.5", "--rounds", 1,
                  "--batch-sizes", 1, 2, "--threads", 1)["rows"]  # fmt: skip
    assert [(row["model"], row["batch"]) for row in rows] == [("plain", 1), ("ltm", 1), ("plain", 2), ("ltm", 2)]
    plain, ltm = rows[2:]
    assert ltm["gmacs_ratio"] == pytest.approx(ltm["gmacs"] / plain["gmacs"])
    assert ltm["gmacs_ratio"] < 0.8
    assert ltm["parameters_m"] > plain["parameters_m"]
    assert ltm["memory_mib"] < plain["memory_mib"]
    assert plain["memory_mib"] == pytest.approx(2 * rows[0]["memory_mib"], rel=0.1)
    assert ltm["images_per_s"] == pytest.approx(2e3 / ltm["ms"])
    half = answer(capsys, "measure", "ltm_test_vit", "--rounds", 1, "--batch-sizes", 1, "--dtype", "bfloat16")["rows"]
    assert half[0]["memory_mib"] == pytest.approx(rows[0]["memory_mib"] / 2, rel=0.1)
    assert main(["measure", "ltmp_test_vit", "--rounds", "1", "--batch-sizes", "1"]) == 0
    assert "depends on the image" in capsys.readouterr().err
    assert "--threads: got 0" in complaint(capsys, "measure", "ltm_test_vit", "--threads", 0)
    assert "--device: got 'nowhere'" in complaint(capsys, "measure", "ltm_test_vit", "--device", "nowhere")


def test_memory_and_time():
    """What a chain of layers holds at once: an input, which the caller holds, an output, and what is between."""
    chain = nn.Sequential(nn.Linear(10, 1000, bias=False), nn.ReLU(inplace=True), nn.Linear(1000, 20, bias=False))
    assert peak_memory(chain, torch.zeros(5, 10)) == 4 * (5 * 1000 + 5 * 20)
    assert peak_memory(nn.Sequential(chain, nn.ReLU()), torch.zeros(5, 10)) == 4 * (5 * 1000 + 5 * 20)
    assert peak_memory(nn.Flatten(), torch.zeros(5, 2, 5)) == 0  # a view
    calls = []
    times = latencies({"a": lambda x: calls.append("a"), "b": lambda x: calls.append("b")}, torch.zeros(1), rounds=3)
    assert set(times) == {"a", "b"}
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5


def test_information(capsys, tmp_path, data):
    """Table 5 and Figure 3 of a merging checkpoint, of it without merging, and of a plain one."""
    save(tmp_path / "ltm", "ltm_test_vit", compression_ratio=0.6)
    save(tmp_path / "plain", "test_vit")
    paths = [tmp_path / name / "model_best.pth.tar" for name in ("ltm", "plain")]
    told = answer(capsys, "information", *paths, "--data", data, "--plain", "--workers", 0, "--output", tmp_path / "ib",
                  "--temperature", "fit", "--batch-size", 7)  # fmt: skip
    assert [row["model"] for row in told["table"]] == ["ltm, plain", "ltm", "plain"]
    unmerged, merged, plain = told["table"]
    for key in ("ib_bound", "ib_loss", "gmacs", "parameters_m", "top1"):  # of the same weights
        assert unmerged[key] == pytest.approx(plain[key], rel=1e-5)
    assert merged["gmacs"] < plain["gmacs"]
    assert 0 <= merged["top1"] <= 100
    assert len(told["layers"]) == 3 * 7
    with open(tmp_path / "ib" / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ib_loss"]) for row in rows] == [row["ib_loss"] for row in told["table"]]
    with open(tmp_path / "ib" / "layers.csv") as file:
        assert [row["block"] for row in csv.DictReader(file)][:7] == [*(f"blocks.{i}" for i in range(6)), "model"]
    assert matplotlib.image.imread(tmp_path / "ib" / "layers.png").shape[2] == 4

    assert "--data: got" in complaint(capsys, "information", paths[0], "--data", tmp_path / "none")
    told = complaint(capsys, "information", paths[0], "--data", data, "--workers", 0, "--limit", 3)
    assert "got 3 images for" in told
    told = complaint(capsys, "information", paths[0], "--data", data, "--temperature", "hot", "--workers", 0)
    assert told == "information: --temperature: got 'hot', expected a number or 'fit'."


def test_curves_and_tradeoff(capsys, tmp_path):
    for name in ("plain", "ltm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1\n0,2,2.1,30\n1,1,1.2,50\n")
    told = answer(
        capsys, "curves", tmp_path / "plain", tmp_path / "ltm" / "summary.csv", "--output", tmp_path / "c.png"
    )
    assert [(row["run"], row["epochs"], row["eval_top1"]) for row in told["last"]] == [("plain", 2, 50), ("ltm", 2, 50)]
    assert matplotlib.image.imread(tmp_path / "c.png").shape[1] > 1000
    assert "expected a CSV file" in complaint(capsys, "curves", tmp_path / "none")
    assert "--names: got ['a']" in complaint(capsys, "curves", tmp_path / "plain", tmp_path / "ltm", "--names", "a")
    (tmp_path / "t.csv").write_text("method,gmacs,top1\nplain,6,70\nltm,4,69\n")
    assert answer(capsys, "tradeoff", tmp_path / "t.csv", "--output", tmp_path / "new" / "t.pdf")["rows"] == 2
    assert (tmp_path / "new" / "t.pdf").stat().st_size > 1000
    (tmp_path / "t.csv").write_text("method,top1\nplain,70\n")
    assert "rows: got none with ['gmacs']" in complaint(capsys, "tradeoff", tmp_path / "t.csv")


def test_convert(capsys, tmp_path):
    """A checkpoint and a plain model become folders that timm loads, with weights, method and schedule."""
    model, path = save(tmp_path / "run", "ltm_test_vit", compression_ratio=0.7)
    told = answer(capsys, "convert", path, "--output", tmp_path / "a")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert loaded.block_amounts == model.block_amounts
    assert told["gmacs"] == pytest.approx(gmacs(model))
    plain, path = save(tmp_path / "plain", "test_vit")
    told = answer(capsys, "convert", path, "--merge", "tome", "r=2", "--output", tmp_path / "b")
    assert told["model"] == "tome_test_vit"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert loaded.config.r == (2,) * 6 or loaded.config.r == 2
    loaded.set_merging(False)
    assert torch.equal(loaded(x), plain(x))
    torch.save(plain.state_dict(), tmp_path / "weights.pth")  # tells no model; at another size timm resizes positions
    arguments = ("--model", "test_vit", "--img-size", 32, "--model-kwargs", "patch_size=4", "--merge", "tome")
    answer(capsys, "convert", tmp_path / "weights.pth", *arguments, "--output", tmp_path / "d")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'd'}", pretrained=True)
    assert loaded.pos_embed.shape[1] > plain.pos_embed.shape[1]
    assert torch.equal(loaded.head.weight, plain.head.weight)
    (row, _) = answer(capsys, "measure", tmp_path / "b", "--rounds", 1)["rows"]  # a folder is a model too
    assert row["gmacs"] == pytest.approx(gmacs(plain))
    told = complaint(capsys, "convert", path, "--merge", "tom", "--output", tmp_path / "c")
    assert "--merge: got 'tom', expected one of ltm" in told
    assert "Did you mean 'tome'?" in told


def test_models_that_cannot_be_loaded(capsys, tmp_path):
    assert "Did you mean 'ltm_test_vit" in complaint(capsys, "measure", "ltm_test_vitt")
    assert "there is no such file" in complaint(capsys, "measure", "runs/last.pth.tar")
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    assert "cannot be read as a checkpoint" in complaint(capsys, "measure", tmp_path / "x.pth")
    torch.save({"state_dict": {}}, tmp_path / "y.pth")
    assert "Give --model NAME" in complaint(capsys, "measure", tmp_path / "y.pth")
    assert "expected NAME=VALUE" in complaint(capsys, "measure", "ltm_test_vit", "--model-kwargs", "r")
    told = complaint(capsys, "measure", "ltm_test_vit", "--model-kwargs", "compression_ratio=2")
    assert "compression_ratio: got 2" in told


def test_help_has_examples(capsys):
    """Of every command one that names it; of all together, how scripts are run."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "path/to/validate.py" in capsys.readouterr().out
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"python -m timm_ltm {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["measure", "--nonsense"])
    assert ended.value.code == 2


def test_tables_and_settings():
    assert settings_of(["a=1", "b=[1.0, 0.5]", "c=token"]) == {"a": 1, "b": [1.0, 0.5], "c": "token"}
    text = as_table([{"model": "a", "x": 1.23456}, {"model": "longer", "x": None}])
    assert text.splitlines() == ["model       x", "a       1.235", "longer      -"]
