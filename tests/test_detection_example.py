"""examples/detection.py: data that is broken, average precision worked out by hand, and a run that resumes."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("pycocotools")
EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """An example as a module of another name: ``detection`` is also the package's."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


data = load("detection_data")


def write(root, annotations, images=((1, "a.png"), (2, "b.png")), categories=(5, 9), split="train"):
    """A folder in COCO's format with images of 40 x 60 pixels; returns its file of annotations."""
    (root / split).mkdir(parents=True)
    for _, name in images:
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / split / name)
    told = {
        "images": [{"id": i, "file_name": name, "height": 40, "width": 60} for i, name in images],
        "annotations": [{"id": k, "image_id": 1, "category_id": 5, **a} for k, a in enumerate(annotations)],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }
    (root / f"{split}.json").write_text(json.dumps(told))
    return root / f"{split}.json"


BOX = [10.0, 5.0, 20.0, 10.0]
SQUARE = [[10, 5, 30, 5, 30, 15, 10, 15]]


def test_targets(tmp_path):
    """Category ids are any; an image without objects has empty tensors; crowds and flat boxes are left out."""
    runs = {"size": [40, 60], "counts": [0, 40 * 60]}  # the whole image
    write(
        tmp_path,
        [
            {"bbox": BOX, "category_id": 9, "segmentation": SQUARE},
            {"bbox": [50, 30, 90, 90], "segmentation": runs},
            {"bbox": [1, 1, 0, 8], "segmentation": SQUARE},
            {"bbox": BOX, "iscrowd": 1, "segmentation": runs},
        ],
    )
    found = data.CocoFolder(tmp_path, "train", masks=True)
    (_, one), (_, empty) = found
    assert found.dropped == 1
    assert one["boxes"].tolist() == [[10, 5, 30, 15], [50, 30, 60, 40]]  # clipped to the image
    assert one["labels"].tolist() == [2, 1]
    assert one["masks"].sum(dim=(1, 2)).tolist() == [200, 2400]
    assert one["masks"][0, 5:15, 10:30].all()
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 40, 60)
    assert empty["image_id"] == 2


@pytest.mark.parametrize("layout", ["annotations/instances_train2017.json train2017", "train.json images/train"])
def test_layouts(tmp_path, layout):
    file, folder = layout.split()
    old = write(tmp_path / "old", [{"bbox": BOX}])
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    old.rename(tmp_path / file)
    (tmp_path / "old" / "train").rename(tmp_path / folder)
    assert len(data.CocoFolder(tmp_path, "train")[0][1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"train.json: bbox of annotation 0: got \[1, 2, 3\], expected four finite numbers"),
        ({"bbox": [1, 2, 3, None]}, "bbox of annotation 0"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox of annotation 0"),
        ({"bbox": BOX, "category_id": 6}, "train.json: annotation 0: got {'image_id': 1, 'category_id': 6}"),
        ({"bbox": BOX, "image_id": 77}, "expected an image and a category of this file"),
        ({"bbox": BOX, "segmentation": [[1, 2]]}, "segmentation of annotation 0"),
        ({"bbox": BOX, "segmentation": {"size": [4, 4], "counts": [16]}}, "segmentation of annotation 0"),
        ({"bbox": BOX}, "segmentation of annotation 0: got 'None'"),
    ],
)
def test_a_broken_annotation_is_named(tmp_path, annotation, message):
    write(tmp_path, [annotation])
    with pytest.raises(ValueError, match=message):
        data.CocoFolder(tmp_path, "train", masks=True)[0]  # masks are decoded when they are asked for


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"annotations: got none, expected one of .*train\.json"):
        data.CocoFolder(tmp_path, "train")
    file = write(tmp_path, [{"bbox": BOX}])
    (tmp_path / "train" / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"b\.png: got no image"):
        data.CocoFolder(tmp_path, "train")[1]
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "train" / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: got 60 x 40 pixels, expected 40 x 60"):
        data.CocoFolder(tmp_path, "train")[1]
    (tmp_path / "train" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png: got no such file \(1 of 2 images"):
        data.CocoFolder(tmp_path, "train")
    skipping = data.CocoFolder(tmp_path, "train", skip_missing=True)
    assert (len(skipping), skipping.missing) == (1, 1)
    for text, message in (("{", "got no JSON"), ("{}", "got no list 'images'"), ("[]", "got no list 'images'")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"train\.json: {message}"):
            data.CocoFolder(tmp_path, "train")


def test_average_precision_by_hand(tmp_path):
    """One image, two boxes of a class. Found, in order of score: one exactly, nothing, the other with an IoU of 0.62.

    Precision at recall 0.5 is 1; at recall 1, where 0.62 is enough, 2/3. Over 101 recalls AP50 is (51 + 50 * 2/3) / 101
    and AP75 51 / 101. Of the ten thresholds 0.5, 0.55 and 0.6 take the second box.
    """
    other = [35.0, 20.0, 10.0, 10.0]
    write(tmp_path, [{"bbox": BOX, "segmentation": SQUARE}, {"bbox": other, "segmentation": SQUARE}])
    of = data.CocoFolder(tmp_path, "train")
    found = {
        "boxes": torch.tensor([[10.0, 5, 30, 15], [0, 30, 5, 40], [35, 20, 45, 26.2]]),
        "labels": torch.tensor([1, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    told = data.average_precision(of, data.results_of(of, 1, found))
    both, one = 100 * (51 + 50 * 2 / 3) / 101, 100 * 51 / 101
    assert told["box_AP50"] == pytest.approx(both)
    assert told["box_AP75"] == pytest.approx(one)
    assert told["box_mAP"] == pytest.approx((3 * both + 7 * one) / 10)
    assert data.average_precision(of, []) == {"box_mAP": 0.0, "box_AP50": 0.0, "box_AP75": 0.0}
    write(tmp_path / "crowd", [{"bbox": BOX, "iscrowd": 1}])
    with pytest.raises(ValueError, match=r"train\.json: got no object to find, expected some"):
        data.average_precision(data.CocoFolder(tmp_path / "crowd", "train"), [])


class Perfect(torch.nn.Module):
    """Finds what there is, in images that a detector would be given in this order."""

    def __init__(self, of, order):
        super().__init__()
        self.truth = [of[i][1] for i in order]

    def forward(self, images):
        now, self.truth = self.truth[: len(images)], self.truth[len(images) :]
        return [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in now]


def test_processes_share_the_images(tmp_path, monkeypatch):
    """Of three images one process finds two, the other one; together they find everything, alone they do not."""
    example = load("detection")
    images = [(i, f"{i}.png") for i in (1, 2, 3)]
    write(tmp_path, [{"bbox": BOX, "image_id": i} for i, _ in images], images)
    of, others = data.CocoFolder(tmp_path, "train", example.transforms("none")[1]), []

    def gather(everyone, results):
        everyone[:] = [results, list(others)]
        others.extend(results)

    monkeypatch.setattr(example, "world", lambda: 2)
    monkeypatch.setattr(example.dist, "all_gather_object", gather)
    found = []
    for rank, order in ((0, (0, 2)), (1, (1,))):
        monkeypatch.setattr(example, "rank", lambda rank=rank: rank)
        told = example.evaluate(Perfect(of, order), of, torch.device("cpu"), 1, 0, False)
        found.append(told["box_mAP"])
    assert found[0] == pytest.approx(100 * 67 / 101)  # two of three: recalls 0 to 0.66 of 101
    assert found[1] == pytest.approx(100)
    assert sorted(row["image_id"] for row in others) == [1, 2, 3]


def test_categories_of_both_splits_are_the_same(tmp_path):
    write(tmp_path, [{"bbox": BOX}])
    write(tmp_path, [{"bbox": BOX}], categories=(5, 8), split="val")
    with pytest.raises(ValueError, match=r"val\.json: got categories \['c5', 'c8'\], expected those of training"):
        data.both_splits(tmp_path, (None, None), False, False)


def test_average_precision_of_masks(tmp_path):
    """A mask of exactly half the pixels has IoU 0.5, of the upper 80 % 0.8: 7 of 10 thresholds."""
    write(tmp_path, [{"bbox": BOX, "segmentation": SQUARE}])
    of = data.CocoFolder(tmp_path, "train", masks=True)
    masks = torch.zeros(1, 1, 40, 60)
    masks[:, :, 5:13, 10:30] = 1  # 8 of 10 rows
    found = {"boxes": torch.tensor([[10.0, 5, 30, 15]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    told = data.average_precision(of, data.results_of(of, 1, {**found, "masks": masks}), masks=True)
    assert told["box_mAP"] == pytest.approx(100)
    assert told["mask_mAP"] == pytest.approx(70)
    assert told["mask_AP75"] == pytest.approx(100)


def test_the_drawn_set(tmp_path):
    """Same seed, same set; boxes are those of the masks; a mask is what can be seen."""
    pytest.importorskip("sklearn")
    for name in ("one", "two"):
        data.draw(tmp_path / name, train=8, val=2, size=64)
    one, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two"))
    assert one == two
    found = data.CocoFolder(tmp_path / "one", "train", masks=True)
    assert found.names == list(data.SHAPES)
    for _, target in found:
        assert (target["masks"].sum(dim=0) <= 1).all()
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            y, x = mask.nonzero().unbind(1)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    photos = data.draw(tmp_path / "on_photos", 2, 1, 32, backgrounds=str(tmp_path / "one" / "train"))
    assert len(data.CocoFolder(photos, "train")) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="backgrounds: got no image"):
        data.draw(tmp_path / "x", 1, 1, 32, backgrounds=str(tmp_path / "none"))


ARGUMENTS = (
    "--backbone ltm_mobilevit_xxs --size 64 --epochs 2 --batch-size 4 --workers 0 --warmup-steps 0 --augment flip"
)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_resumes_is_one_that_never_stopped(tmp_path):
    example = load("detection")
    data.draw(tmp_path / "set", train=8, val=2, size=64)
    run = [str(tmp_path / "set"), *ARGUMENTS.split()]
    told = example.main([*run, "--output", str(tmp_path / "whole")])
    assert set(told) == {"box_mAP", "box_AP50", "box_AP75"}
    stop = {"at": 1}
    kept = example.save

    def save(value, file):
        kept(value, file)
        if file.name == "last.pt" and stop.pop("at", None):
            raise KeyboardInterrupt

    example.save = save
    with pytest.raises(KeyboardInterrupt):
        example.main([*run, "--output", str(tmp_path / "cut")])
    example.main([*run, "--output", str(tmp_path / "cut"), "--resume", str(tmp_path / "cut")])
    whole, cut = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("whole", "cut"))
    assert same(whole, cut)
    clusters = [value for key, value in whole.items() if key.endswith("clusters.centroids")]
    assert clusters
    assert all(value.any() for value in clusters)
    assert len((tmp_path / "cut" / "summary.csv").read_text().splitlines()) == 3
    assert (tmp_path / "cut" / "summary.csv").read_bytes() == (tmp_path / "whole" / "summary.csv").read_bytes()
    again = example.main([*run, "--evaluate", str(tmp_path / "whole" / "last.pt"), "--output", str(tmp_path / "again")])
    assert again == told
    assert Image.open(tmp_path / "again" / "predictions.png").width > 320


def test_frozen_clusters_stay(tmp_path):
    example = load("detection")
    data.draw(tmp_path / "set", train=4, val=1, size=64)
    run = [str(tmp_path / "set"), *ARGUMENTS.split(), "--freeze-clusters", "--eval-every", "2"]
    example.main([*run, "--output", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    clusters = [value for key, value in state.items() if key.endswith("clusters.centroids")]
    assert clusters
    assert not any(value.any() for value in clusters)
    example.main([*run, "--epochs", "3", "--resume", str(tmp_path / "run"), "--output", str(tmp_path / "on")])
    with open(tmp_path / "on" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["2"]
    with open(tmp_path / "run" / "summary.csv", newline="") as file:
        assert [bool(row["box_mAP"]) for row in csv.DictReader(file)] == [False, True]  # none of an epoch not evaluated


@pytest.mark.slow
def test_mask_rcnn_in_bfloat16(tmp_path):
    """Of the example: masks are trained and evaluated, batch norms stay as they are."""
    example = load("detection")
    data.draw(tmp_path / "set", train=4, val=2, size=64)
    few = "rpn_post_nms_top_n_train=30 rpn_post_nms_top_n_test=20 box_batch_size_per_image=8 box_detections_per_img=3"
    told = example.main(
        [
            str(tmp_path / "set"), *ARGUMENTS.split(), "--detector", "mask_rcnn", "--amp", "bfloat16", "--freeze-norms",
            "--detector-kwargs", *few.split(), "width=16", "--output", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert set(told) == {f"{of}_{k}" for of in ("box", "mask") for k in ("mAP", "AP50", "AP75")}
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    means = [value for key, value in state.items() if "body" in key and key.endswith("running_mean")]
    assert means
    assert not any(value.any() for value in means)


@pytest.mark.slow
def test_a_checkpoint_of_timms_is_converted(tmp_path):
    """--backbone FILE --merge: weights are the file's, in a detector that merges."""
    example = load("detection")
    data.draw(tmp_path / "set", train=4, val=1, size=64)
    model = timm.create_model("mobilevit_xxs", num_classes=3)
    torch.save({"arch": "mobilevit_xxs", "state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    args = example.arguments(
        ["--backbone", str(tmp_path / "model.pth.tar"), "--merge", "tome", "compression_ratio=0.5", "--size", "64"]
    )
    detector = example.build(args, 5)
    body = detector.backbone.body.model
    assert body.method == "tome"
    assert torch.equal(body.stem.conv.weight, model.stem.conv.weight)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under torchrun both end with the same weights and clusters, and all images are evaluated."""
    data.draw(tmp_path / "set", train=8, val=3, size=64)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        str(EXAMPLES / "detection.py"), str(tmp_path / "set"), *ARGUMENTS.split(), "--device", "cpu",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    example = load("detection")
    run = [str(tmp_path / "set"), *ARGUMENTS.split(), "--evaluate", str(tmp_path / "run" / "last.pt")]
    assert example.main([*run, "--output", str(tmp_path / "one")]) == pytest.approx(saved["told"])
    clusters = [value for key, value in saved["model"].items() if key.endswith("clusters.centroids")]
    assert all(value.any() for value in clusters)


def test_augmented_targets_stay_targets(tmp_path):
    """Colours, zoom and crops: boxes lie in the image and have an area, masks are of its size, none may be left."""
    example = load("detection")
    write(tmp_path, [{"bbox": BOX, "segmentation": SQUARE}, {"bbox": [40, 20, 15, 15], "segmentation": SQUARE}])
    of = data.CocoFolder(tmp_path, "train", example.transforms("ssd")[0], masks=True)
    sizes = set()
    for _ in range(20):
        for image, target in (of[0], of[1]):
            boxes, (H, W) = target["boxes"], image.shape[1:]
            assert len(boxes) == len(target["labels"]) == len(target["masks"])
            assert target["masks"].shape[1:] == (H, W)
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([W, H, W, H])).all()
            sizes.add((H, W))
    assert len(sizes) > 5
