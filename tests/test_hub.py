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

def model():
    torch.manual_seed(0)
    made = timm.create_model(NAME, num_classes=5, **KWARGS).eval()
    for _, merger in made.mergers():
        merger.clusters.centroids.normal_()
        merger.clusters.scores.normal_()
        merger.epoch.fill_(7)
    return made
"""
FAMILIES = {
    "ltm_vit_test": dict(
        img_size=[32, 32], compression_ratio=[0.8, 1.0, 0.9, 1.0, 1.0, 1.0], merge_warmup_epochs=2, num_clusters=8
    ),
    "ltm_efficientvit_b0": dict(compression_ratio=[0.6, 1.0, 1.0, 1.0], num_clusters=8, eta=0.5),
}


def run(hub, cache, code, name="ltm_vit_test", kwargs=None):
    """A fresh process that takes the stand-in for the Hub: what it prints last, as JSON."""
    head = f"NAME, KWARGS = {name!r}, {kwargs or {}!r}\n" + CODE
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(tmp_path, name):
    kwargs = FAMILIES[name]
    with Hub() as hub:
        pushed = run(
            hub, tmp_path / "one",
            """
made = model()
timm.models.push_to_hf_hub(made, "user/merged", safe_serialization=True, model_card={"description": "a test"})
x = torch.ones(2, 3, 32 if "vit_test" in NAME else 96, 32 if "vit_test" in NAME else 96)
print(json.dumps(made(x).tolist()))
""", name, kwargs,
        )  # fmt: skip
        assert set(hub.files["user/merged"]) == {"config.json", "model.safetensors", "README.md"}, "no pickle"
        config = json.loads(hub.files["user/merged"]["config.json"])
        assert config["architecture"] == name
        assert {key: config["model_args"][key] for key in kwargs} == kwargs
        weights = safetensors.torch.load(hub.files["user/merged"]["model.safetensors"])
        assert any("clusters.centroids" in key for key in weights)
        loaded = run(
            hub, tmp_path / "two",
            """
made = timm.create_model("hf-hub:user/merged", pretrained=True).eval()
assert {merger.epoch.item() for _, merger in made.mergers()} == {7}
assert all(merger.clusters.centroids.any() for _, merger in made.mergers())
x = torch.ones(2, 3, 32 if "vit_test" in NAME else 96, 32 if "vit_test" in NAME else 96)
print(json.dumps(made(x).tolist()))
""", name,
        )  # fmt: skip
        assert loaded == pushed


def test_pretrained_weights_of_the_plain_model_come_from_its_repository(tmp_path):
    """``pretrained=True``: the plain model's own weights, filled in."""
    with Hub() as hub:
        run(
            hub, tmp_path / "one",
            """
plain = timm.create_model("test_vit")
for owner in ("timm",):
    timm.models.push_to_hf_hub(plain, f"{owner}/test_vit.r160_in1k", safe_serialization=True)
torch.save(plain.state_dict(), KWARGS["file"])
print("null")
""", kwargs={"file": str(tmp_path / "plain.pth")},
        )  # fmt: skip
        equal = run(
            hub, tmp_path / "two",
            """
plain = timm.create_model("test_vit").eval()
plain.load_state_dict(torch.load(KWARGS["file"], weights_only=True))
made = timm.create_model("ltm_vit_test", pretrained=True).eval()
x = torch.ones(1, 3, 160, 160)
assert not torch.equal(made(x), plain(x)), "it merges at once"
made.set_merging(False)
print(json.dumps(torch.equal(made(x), plain(x))))
""", kwargs={"file": str(tmp_path / "plain.pth")},
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
    model = timm.create_model("ltm_vit_test", num_classes=5, img_size=32)
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
