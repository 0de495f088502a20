"""examples/segmentation.py on segmentation_models_pytorch: encoders of maps and ViTs, and its mean IoU."""

from __future__ import annotations

import pytest
import torch
from test_detection_example import data, load, write

smp = pytest.importorskip("segmentation_models_pytorch")


def test_pixels_and_labels(tmp_path):
    """Of the drawn set: a pixel has the class of the object that is seen there; labels are shares of objects."""
    example = load("segmentation")
    data.draw(tmp_path, 6, 1, 48)
    objects = data.CocoFolder(tmp_path, "train", masks=True)
    maps = example.Maps(objects, 48, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, train=False)
    for (image, classes, labels), (_, target) in zip(maps, objects, strict=True):
        assert image.shape == (3, 48, 48)
        assert image.amin() >= -1
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            assert (classes[mask > 0] == label).all()
        assert (classes > 0).sum() == target["masks"].sum()
        assert labels.sum() == pytest.approx(1.0 if len(target["labels"]) else 0.0)


def test_pixels_of_crowds_are_ignored_but_for_objects_in_them(tmp_path):
    example = load("segmentation")
    crowd = {"bbox": [0, 0, 60, 20], "segmentation": [[0, 0, 60, 0, 60, 20, 0, 20]], "iscrowd": 1}
    write(tmp_path, [crowd, {"bbox": [10, 10, 20, 20], "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}])
    objects = data.CocoFolder(tmp_path, "train", masks=True)
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    truth = example.Maps(objects, 40, config, train=False)[0][1]  # 40 x 60 pixels become 40 x 40
    assert [int((truth == k).sum()) for k in (example.IGNORED, 1, 0)] == [800 - 130, 260, 1600 - 800 - 130]

    class Answer(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(truth.clamp_min(0)[None], 3).permute(0, 3, 1, 2).float()

    wrong = truth.masked_fill(truth == example.IGNORED, 2)
    loader = [(torch.zeros(1, 3, 40, 40), truth[None], None)]
    assert example.mean_iou(Answer(), loader, 3, torch.device("cpu")) == 100
    loader = [(torch.zeros(1, 3, 40, 40), wrong[None], None)]
    assert example.mean_iou(Answer(), loader, 3, torch.device("cpu")) < 67


def test_mean_iou_by_hand():
    """Two images of 2 x 2 pixels and three classes: IoU 2/4, 1/3 and 2/4; a fourth that is nowhere does not count."""
    example = load("segmentation")
    found = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [0, 2]]])
    truth = torch.tensor([[[0, 0], [1, 2]], [[2, 2], [1, 0]]])

    class Answer(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(found, 4).permute(0, 3, 1, 2).float()

    iou = example.mean_iou(Answer(), [(torch.zeros(2, 3, 2, 2), truth, None)], 4, torch.device("cpu"))
    assert iou == pytest.approx(100 * (2 / 4 + 1 / 3 + 2 / 4) / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "encoder", "settings"),
    [
        ("Unet", "mobilevit_xxs", {}),
        ("FPN", "efficientvit_b0", {}),
        (
            "DPT",
            "vit_tiny_patch16_224",
            dict(
                embed_dim=48, num_heads=2, patch_size=8, encoder_depth=2, decoder_intermediate_channels=(16, 16),
                decoder_fusion_channels=16,
            ),
        ),
    ],
)  # fmt: skip
def test_a_short_training(tmp_path, decoder, encoder, settings):
    example = load("segmentation")
    data.draw(tmp_path, 16, 4, 64)
    maps = example.Maps(data.CocoFolder(tmp_path, "train", masks=True), 64, {"mean": [0.5], "std": [0.5]}, train=True)
    args = example.arguments(["--epochs", "8", "--lr", "2e-3"])
    for name, more in ((f"ltm_{encoder}", dict(compression_ratio=0.3)), (encoder, {})):
        torch.manual_seed(0)
        model = example.build(name, decoder, 5, 64, False, {**settings, **more})
        losses = example.train(model, torch.utils.data.DataLoader(maps, 8, drop_last=True), args, 5, name)
        assert losses[-1] < 0.85 * losses[0]
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5, 64, 64)


@pytest.mark.slow
def test_the_whole_example(tmp_path, monkeypatch):
    """Both encoders see the same batches, here under the same decoder; merging costs less."""
    example = load("segmentation")
    build, first = example.build, []

    def under_one_decoder(*args):
        model = build(*args)  # reducers are drawn before the decoder, which is another one then
        first.append({n: v.clone() for n, v in model.state_dict().items() if not n.startswith("encoder.")})
        assert not model.load_state_dict(first[0], strict=False).unexpected_keys
        return model

    monkeypatch.setattr(example, "build", under_one_decoder)
    data.draw(tmp_path / "set", 8, 2, 64)
    rows = example.main(
        [str(tmp_path / "set"), "--size", "64", "--epochs", "1", "--batch-size", "4", "--output", str(tmp_path / "run")]
    )
    assert [row["encoder"] for row in rows] == ["ltm_mobilevit_xxs", "mobilevit_xxs"]
    assert all(0 <= row["mIoU"] <= 100 for row in rows)
    assert rows[0]["GMACs"] < rows[1]["GMACs"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0.1)
    assert (tmp_path / "run" / "Unet_ltm_mobilevit_xxs.pt").is_file()
