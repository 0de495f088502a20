"""timm's own scripts, unmodified. They are not in timm's wheel: TIMM_SOURCE names a clone of timm's repository.

``train.py`` runs with the clone's timm, the others, under ``python -m timm_ltm``, with the one that is installed.

TIMM_SOURCE=path/to/pytorch-image-models python -m pytest -m slow tests/test_timm_scripts.py
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small import fill

SOURCE = os.environ.get("TIMM_SOURCE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOURCE is None, reason="TIMM_SOURCE does not name a clone of timm's repository"),
]
MODEL = [
    "--model", "ltm_vit_test", "--model-kwargs", "img_size=32", "patch_size=8", "merge_warmup_epochs=1",
    "compression_ratio=0.75", "num_clusters=8", "--img-size", "32",
]  # fmt: skip
OTHERS = {
    "ltm_swin_tiny": [
        "img_size=64", "embed_dim=16", "num_heads=[1,1,2,2]", "depths=[1,1,2,1]", "merge_warmup_epochs=1",
        "compression_ratio=[1.0,0.7,1.0,1.0,1.0]",
    ],
    "ltm_mobilevit_xxs": ["merge_warmup_epochs=1", "compression_ratio=[0.4,1.0,1.0]"],
    "ltm_efficientvit_b0": ["merge_warmup_epochs=1", "compression_ratio=[0.4,1.0]"],
    "tome_test_vit": ["img_size=64", "patch_size=8", "merge_warmup_epochs=1", "compression_ratio=0.8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An ImageFolder of digits: 96 to train on, 32 to validate."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images[:128], labels[:128], strict=True)):
        folder = root / ("train" if i < 96 else "validation") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image.reshape(8, 8) * 15).astype("uint8")).resize((64, 64))
        picture.convert("RGB").save(folder / f"{i}.png")
    for label in range(10):
        (root / "validation" / str(label)).mkdir(parents=True, exist_ok=True)
    return root


def run(data, output, *args, model=MODEL, epochs=2, processes=1, name="run"):
    """train.py's last checkpoint and the rows of its summary."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        str(Path(SOURCE) / "train.py"), "--data-dir", str(data), "--device-modules", "timm_ltm", "--device", "cpu",
        "--num-classes", "10", "-b", "16", "-vb", "16", "-j", "1", "--epochs", str(epochs), "--warmup-epochs", "0",
        "--opt", "adamw", "--lr", "1e-3", "--output", str(output), "--experiment", name,
        *model, *args,
    ]  # fmt: skip
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = done.stdout + done.stderr
    assert told.count("ClusterRefresh attached to") == processes
    assert "trains without a refresh" not in told
    if "--resume" not in args:
        assert told.count("Plain training first: merging starts after") == processes
    with open(output / name / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    return torch.load(output / name / "last.pth.tar", weights_only=False), rows


def check(checkpoint, epochs=2, key="state_dict"):
    state = checkpoint[key]
    assert state["reduction.epoch"] == epochs
    centroids = [value for name, value in state.items() if name.endswith("reducer.clusters.centroids")]
    assert bool(centroids) == ("ltm" in checkpoint["arch"])
    assert all(value.any() for value in centroids)
    assert all(value.isfinite().all() for value in state.values())


FLAGS = {
    "smoothing": ["--smoothing", "0.1"],
    "bfloat16": ["--amp", "--amp-dtype", "bfloat16"],
    "ema": ["--model-ema", "--model-ema-decay", "0.9"],
    "ema on the cpu": ["--model-ema", "--model-ema-force-cpu"],
    "mixup and cutmix": ["--mixup", "0.8", "--cutmix", "1.0"],
    "accumulation": ["--grad-accum-steps", "2"],
    "compiled": ["--torchcompile", "aot_eager"],
    "checkpointing": ["--grad-checkpointing"],
    "binary cross-entropy": ["--bce-loss"],
    "logit distillation": ["--kd-model-name", "local-dir:{teacher}"],
    "feature distillation": ["--kd-model-name", "local-dir:{teacher}", "--kd-distill-type", "feature"],
    "ib loss": ["--model-kwargs", *MODEL[3:7], "ib_loss_weight=0.1", "ib_loss_start_epoch=1"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(data, tmp_path, flags):
    teacher = tmp_path / "teacher"  # without a network there are no pretrained weights
    timm.models.save_for_hf(timm.create_model("test_convnext", num_classes=10), teacher, safe_serialization=True)
    checkpoint, rows = run(data, tmp_path, *(flag.format(teacher=teacher) for flag in FLAGS[flags]))
    assert len(rows) == 2
    check(checkpoint)
    if "ema" in flags:
        check(checkpoint, key="state_dict_ema")


@pytest.mark.parametrize("name", OTHERS)
def test_families(data, tmp_path, name):
    check(run(data, tmp_path, model=["--model", name, "--model-kwargs", *OTHERS[name], "--img-size", "64"])[0])


@pytest.mark.skipif(
    SOURCE is not None and "device_ids=[device]" in (Path(SOURCE) / "train.py").read_text(),
    reason="this train.py hands device_ids to DistributedDataParallel, which takes none on a CPU, whatever the model",
)
@pytest.mark.parametrize("flags", [[], ["--model-ema", "--mixup", "0.8", "--amp", "--amp-dtype", "bfloat16"]], ids=str)
def test_two_processes(data, tmp_path, flags):
    check(run(data, tmp_path, *flags, processes=2)[0])


def test_validation_every_second_epoch(data, tmp_path):
    checkpoint, rows = run(data, tmp_path, "--val-interval", "2", epochs=4)
    check(checkpoint, 4)
    assert rows


@pytest.mark.parametrize("how", ["path", "auto"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resume(data, tmp_path, how, stop):
    """Stopped in warm-up, or after it."""
    if how == "auto" and '"auto"' not in (text := (Path(SOURCE) / "train.py").read_text()) and "'auto'" not in text:
        pytest.skip("this train.py has no --resume auto")
    longer = [arg.replace("merge_warmup_epochs=1", "merge_warmup_epochs=2") for arg in MODEL]
    checkpoint, _ = run(data, tmp_path, epochs=stop, model=longer)
    assert checkpoint["state_dict"]["reduction.epoch"] == stop
    last = tmp_path / "run" / "last.pth.tar"
    if how == "path":
        last = shutil.copy(last, tmp_path / "stopped.pth.tar")
    checkpoint, _ = run(data, tmp_path, "--resume", "auto" if how == "auto" else str(last), epochs=3, model=longer)
    check(checkpoint, 3)


VIT = ["--model", "ltm_vit_test", "--num-classes", "10", "--checkpoint", "{checkpoint}"]
DATA = ["-b", "16", "-j", "1", "--device", "cpu"]
SCRIPTS = {
    "validate.py": ["{data}", *VIT, *DATA, "--img-size", "160"],
    "inference.py": ["{data}", *VIT, *DATA, "--results-dir", "{folder}"],
    "benchmark.py": [
        "--model", "ltm_efficientvit_b0", "--device", "cpu", "-b", "2", "--num-bench-iter", "10",
        "--bench", "inference",
    ],
    "onnx_export.py": ["{folder}/model.onnx", *VIT],
    "avg_checkpoints.py": ["--input", "{folder}", "--output", "{folder}/mean.pth", "--no-sort", "-n", "2"],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_scripts(data, tmp_path, script):
    """``python -m timm_ltm`` and the script's path; ratios that are not the default's come with the checkpoint."""
    for needed in {"inference.py": ["pandas"], "onnx_export.py": ["onnx", "onnxscript", "onnxruntime"]}.get(script, []):
        pytest.importorskip(needed)
    model = fill(timm.create_model("ltm_vit_test", num_classes=10, compression_ratio=[0.6, 1.0, 1.0, 0.7, 1.0, 1.0]))
    names = {"data": data / "validation", "folder": tmp_path, "checkpoint": tmp_path / "model.pth.tar"}
    for name in ("model", "other"):
        torch.save({"state_dict": model.state_dict(), "metric": 1.0, "epoch": 1}, tmp_path / f"{name}.pth.tar")
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "timm_ltm", str(Path(SOURCE) / script), *(a.format(**names) for a in SCRIPTS[script])],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    if script == "onnx_export.py":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        x = torch.randn(1, 3, 160, 160)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=1e-3, atol=1e-3)
    if script == "avg_checkpoints.py":
        mean = timm.create_model("ltm_vit_test", num_classes=10, checkpoint_path=str(tmp_path / "mean.pth"))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(mean.state_dict()[name], value)
