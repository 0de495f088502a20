"""Weights that leave and come back: the Hugging Face Hub, by its own client, against a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub import Hub

import timm_ltm  # noqa: F401  registers the models

CODE = """
import json, sys
import timm, torch, timm_ltm

def output(model):
    g = torch.Generator().manual_seed(0)
    return model.eval()(torch.randn(2, 3, 32, 32, generator=g)).tolist()
"""
TESTS = str(Path(__file__).parent)
FAMILIES = {
    "ltm_vit_test": dict(
        img_size=[32, 32], compression_ratio=[0.8, 1.0, 0.9, 1.0, 1.0, 1.0], merge_warmup_epochs=2, num_clusters=8
    ),
    "ltm_efficientvit_b0": dict(compression_ratio=[0.6, 1.0, 1.0, 1.0], num_clusters=8),
    "tome_vit_test": dict(img_size=[32, 32], r=[0, 5, 0, 7, 0, 0]),
    "ltmp_vit_test": dict(img_size=[32, 32], gmacs=0.6),
    "patch_merger_vit_test": dict(img_size=[32, 32], num_slots=[0, 2, 0, 0, 0, 0]),
}


def run(hub, cache, code, given=None):
    """A fresh process that takes the stand-in for the Hub: what it prints last, as JSON."""
    head = f"GIVEN = {given!r}\n" + CODE
    paths = os.pathsep.join(filter(None, (TESTS, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_round_trip(tmp_path):
    """Weights carry method, ratios and clusters; the configuration what timm itself has to know."""
    with Hub() as hub:
        pushed = run(
            hub, tmp_path / "one",
            """
from small import fill
results = []
for name, kwargs in GIVEN.items():
    torch.manual_seed(0)
    made = fill(timm.create_model(name, num_classes=5, **kwargs))
    made.reduction.epoch.fill_(7)
    args = {key: value for key, value in kwargs.items() if key == "img_size"} or None  # timm 1.0.29 remembers none
    timm.models.push_to_hf_hub(
        made, f"user/{name}", safe_serialization=True, model_args=args, model_card={"description": "a test"}
    )
    results.append([output(made), made.block_amounts])
print(json.dumps(results))
""", FAMILIES,
        )  # fmt: skip
        for name in FAMILIES:
            files = hub.files[f"user/{name}"]
            assert set(files) == {"config.json", "model.safetensors", "README.md"}, "no pickle"
            assert json.loads(files["config.json"])["architecture"] == name
            weights = safetensors.torch.load(files["model.safetensors"])
            assert any("clusters.centroids" in key for key in weights) == name.startswith("ltm_")
        loaded = run(
            hub, tmp_path / "two",
            """
results = []
for name in GIVEN:
    made = timm.create_model(f"hf-hub:user/{name}", pretrained=True)
    assert made.reduction.epoch == made.epoch == 7
    results.append([output(made), made.block_amounts])
print(json.dumps(results))
""", FAMILIES,
        )  # fmt: skip
        for name, ours, theirs in zip(FAMILIES, pushed, loaded, strict=True):
            assert ours == theirs, name


def test_pretrained_weights_of_the_plain_model_come_from_its_repository(tmp_path):
    """``pretrained=True``: the plain model's own weights, filled in."""
    with Hub() as hub:
        equal = run(
            hub, tmp_path,
            """
plain = timm.create_model("test_vit").eval()
timm.models.push_to_hf_hub(plain, "timm/test_vit.r160_in1k", safe_serialization=True)
made = timm.create_model("ltm_vit_test", pretrained=True).eval()
x = torch.ones(1, 3, 160, 160)
assert not torch.equal(made(x), plain(x)), "it merges at once"
made.set_merging(False)
print(json.dumps(torch.equal(made(x), plain(x))))
""",
        )  # fmt: skip
        assert equal is True
        assert any("/timm/test_vit.r160_in1k/" in request for request in hub.requests)


@pytest.mark.slow  # the client tries for 50 s
def test_a_hub_out_of_reach_is_told_by_the_hubs_own_error(tmp_path):
    hub = Hub()
    hub.server_close()  # nobody listens
    told = run(
        hub, tmp_path,
        """
try:
    timm.create_model("ltm_vit_test", pretrained=True)
except Exception as error:
    print(json.dumps([type(error).__module__, str(error)]))
""",
    )  # fmt: skip
    assert told[0].startswith("huggingface_hub")
    assert "check your connection" in told[1]


def test_the_example_pushes_a_checkpoint_with_what_was_measured(tmp_path):
    ratios = [0.7, 1.0, 0.7, 1.0, 1.0, 1.0]
    model = timm.create_model("ltm_vit_test", num_classes=5, img_size=32, compression_ratio=ratios)
    saved = tmp_path / "last.pth.tar"
    torch.save({"state_dict": model.state_dict(), "metric": 93.21, "epoch": 4, "arch": "ltm_vit_test"}, saved)
    example = str(Path(__file__).parents[1] / "examples" / "push_to_hub.py")
    with Hub() as hub:
        code = f"""
import runpy
sys.argv = [{example!r}, {str(saved)!r}, "user/pushed", "--model", "ltm_vit_test", "--num-classes", "5",
            "--model-kwargs", "img_size=32"]
runpy.run_path(sys.argv[0], run_name="__main__")
loaded = timm.create_model("hf-hub:user/pushed", pretrained=True)
print(json.dumps(all(torch.equal(a, b) for a, b in zip(
    loaded.state_dict().values(), torch.load({str(saved)!r}, weights_only=False)["state_dict"].values(), strict=True))))
"""
        assert run(hub, tmp_path / "cache", code) is True
        files = hub.files["user/pushed"]
        assert set(files) == {"config.json", "model.safetensors", "README.md"}
        card = files["README.md"].decode()
        for told in ("hf-hub:user/pushed", "93.21 %", "GMACs at 32 x 32", "without merging"):
            assert told in card, card
