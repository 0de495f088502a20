"""Detectors of torchvision on timm backbones: one contract that every backbone and both detectors keep."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small import fill
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

import timm_ltm
from timm_ltm import detection
from timm_ltm.cost import gmacs
from timm_ltm.models import ReducedModel

SIZE = 64
BACKBONES = {  # by plain name: small ones of every family
    "mobilevit_xxs": {},
    "efficientvit_b0": dict(compression_ratio=0.3),
    "swin_tiny_patch4_window7_224": dict(
        embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, compression_ratio=0.7
    ),
    "vit_tiny_patch16_224": dict(depth=3, embed_dim=32, num_heads=2, patch_size=8, compression_ratio=0.7),
}
FEW = {  # of Mask R-CNN, whose heads cost more than all the rest
    "rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 8,
    "box_detections_per_img": 3, "width": 8,
}  # fmt: skip
DETECTORS = {"ssdlite": {}, "mask_rcnn": FEW}
slow = pytest.mark.slow
CASES = [
    pytest.param(name, kind, id=f"{name.partition('_')[0]}-{kind}", marks=slow if i > 1 and kind == "mask_rcnn" else ())
    for i, name in enumerate(BACKBONES)
    for kind in DETECTORS
]


def make(name, kind="ssdlite", method="ltm", num_classes=4, **kwargs):
    """A detector on a merging backbone, or a plain one (``method=""``), with the same random numbers."""
    settings = dict(BACKBONES[name])
    if not method:
        settings.pop("compression_ratio", None)
    torch.manual_seed(0)
    kwargs = {**DETECTORS[kind], **kwargs}
    name = f"{method}_{name}" if method else name
    return getattr(detection, kind)(name, num_classes, SIZE, backbone_kwargs=settings, **kwargs)


def batch(empty=False):
    """Two images of different sizes, and what is in them; the second has nothing if ``empty``."""
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80)]
    targets = []
    for i, image in enumerate(images):
        many = 0 if empty and i else 2
        boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 50.0, 40.0]])[:many]
        masks = torch.zeros(many, *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3])[:many], "masks": masks})
    return images, targets


def body(detector):
    return next(module for module in detector.modules() if isinstance(module, ReducedModel))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_takes_images_of_different_sizes(name, kind):
    detector = make(name, kind).eval()
    images, _ = batch()
    with torch.no_grad():
        found = detector(images)
    assert body(detector).merging
    for image, each in zip(images, found, strict=True):
        boxes, (H, W) = each["boxes"], image.shape[1:]
        assert boxes.shape == (len(each["labels"]), 4)
        assert boxes.shape[0] == len(each["scores"])
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([W, H, W, H]) + 1e-3).all()
        if kind == "mask_rcnn":
            assert each["masks"].shape == (len(boxes), 1, H, W)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_without_merging_it_is_the_plain_detector(name, kind):
    """The same names, shapes and weights beside what merging adds, and the same maps bit for bit with merging off."""
    merging, plain = (make(name, kind, method).eval() for method in ("ltm", ""))
    missing = merging.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".reduc" in key for key in missing.missing_keys)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, merged = plain.backbone(x), merging.backbone(x)
        assert [m.shape for m in merged.values()] == [m.shape for m in expected.values()]
        assert any((a - b).abs().max() > 1e-6 for a, b in zip(merged.values(), expected.values(), strict=True))
        body(merging).set_merging(False)
        off = merging.backbone(x)
        assert all(torch.equal(off[key], expected[key]) for key in expected)
        images, _ = batch()
        for a, b in zip(merging(images), plain(images), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_parameter_learns(name, kind):
    """Some steps on one batch, an image of which is empty: losses fall, clusters are collected."""
    detector = make(name, kind)
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    refresh = timm_ltm.ClusterRefresh(detector, 3)
    images, targets = batch(empty=True)
    losses = []
    for _ in range(2):
        detector.train()
        for _ in range(3):
            torch.manual_seed(1)  # of the proposals that are sampled
            loss = sum(detector(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            refresh.step(detection.image_labels(targets, 4))
            losses.append(loss.item())
        report = refresh.epoch_end()
    assert losses[-1] < 0.9 * losses[0]
    assert all(each["features"] == 3 for each in report.values())  # of the images with a label
    assert report
    reduced = {p for _, reducer in body(detector).reducers() for p in reducer.parameters()}
    lacking = [n for n, p in detector.named_parameters() if p.grad is None and p not in reduced]
    assert not lacking


@pytest.mark.parametrize("kind", DETECTORS)
def test_strides_and_anchors_are_the_backbones(kind):
    detector = make("mobilevit_xxs", kind).eval()
    maps = detector.backbone(torch.rand(1, 3, SIZE, SIZE))
    strides = detector.backbone.body.feature_info.reduction()
    assert strides == ([16, 32] if kind == "ssdlite" else [4, 8, 16, 32])
    sides = [SIZE // m.shape[-1] for m in maps.values()]
    assert sides[: len(strides)] == strides
    assert sides[len(strides) :] == [64]  # SSDLite's further map, which is one cell, and the pyramid's pooled one
    if kind == "mask_rcnn":
        images, _ = batch()
        with torch.no_grad():
            detector(images)
        assert detector.roi_heads.box_roi_pool.scales == [1 / s for s in strides]
        assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


def test_a_model_in_hand():
    """Converted or plain: the detector has a copy of its weights, and the model stays as it is."""
    plain = timm.create_model("mobilevit_xxs", num_classes=7)
    before = copy.deepcopy(plain.state_dict())
    for model in (plain, timm_ltm.convert(plain, "tome", compression_ratio=0.5)):
        detector = detection.ssdlite(model, 4, SIZE).eval()
        weights = detector.backbone.body.model.state_dict()
        assert all(torch.equal(weights[key], before[key]) for key in before if key in weights)
        with torch.no_grad():
            detector([torch.rand(3, 40, 40)])
    assert plain.num_classes == 7
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_torchvisions_arguments_pass_through():
    detector = make("mobilevit_xxs", score_thresh=0.3, image_mean=[0.1, 0.2, 0.3], extra=(32, 16))
    assert detector.score_thresh == 0.3
    assert detector.transform.image_mean == [0.1, 0.2, 0.3]
    assert [m.shape[1] for m in detector.backbone(torch.rand(2, 3, 128, 96)).values()][2:] == [32, 16]
    assert make("vit_tiny_patch16_224").transform.image_mean == [0.5, 0.5, 0.5]  # the backbone's own
    free = detection.mask_rcnn("ltm_mobilevit_xxs", 4, **{**FEW, "min_size": 64, "max_size": 96}).eval()
    fixed = dict(BACKBONES["vit_tiny_patch16_224"], depth=1)
    fixed = detection.mask_rcnn("ltm_vit_tiny_patch16_224", 4, 56, backbone_kwargs=fixed, **FEW).eval()
    with torch.no_grad():
        assert len(fixed([torch.rand(3, 50, 70)])) == 1  # not padded to 64, which such a backbone refuses
        assert len(free([torch.rand(3, 50, 70), torch.rand(3, 90, 60)])) == 2  # resized by their sides, and padded


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: detection.ssdlite("mobilevit_xxs", 1), "num_classes: got 1, expected 2 or more"),
        (lambda: detection.ssdlite("mobilevit_xxs", 4, strides=(12,)), r"strides: got \[12\], expected some of \[2, 4"),
        (lambda: detection.ssdlite("mobilevit_xxs", 4, strides=(32, 16)), "ascending"),
        (lambda: detection.ssdlite(torch.nn.Linear(1, 1), 4), "backbone: got 'Linear', expected a timm model"),
        (lambda: detection.ssdlite(timm.create_model("test_vit"), 4, pretrained=True), "pretrained: got True"),
        (
            lambda: detection.ssdlite("mobilevit_xxs", 4, SIZE, anchor_generator=DefaultBoxGenerator([[2]] * 6)),
            "anchor_generator: got 'one for 6 maps', expected one for 3",
        ),
        (
            lambda: detection.mask_rcnn("vit_tiny_patch16_224", 4, 56, backbone_kwargs=dict(patch_size=14, depth=1)),
            r"strides: got \[14\], expected powers of 2",
        ),
        (
            lambda: detection.mask_rcnn("ltm_vit_tiny_patch16_224", 4, backbone_kwargs=dict(depth=1)),
            r"size: got None, expected \(224, 224\), which the backbone is made for",
        ),
        (
            lambda: detection.ssdlite(timm.create_model("vit_tiny_patch16_224", depth=1), 4, 96),
            r"size: got \(96, 96\), expected \(224, 224\)",
        ),
        (lambda: detection.gmacs(torch.nn.Linear(1, 1)), "detector: got 'Linear', expected torchvision's SSD"),
    ],
)
def test_errors_tell_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Table 3: GMACs of LTM over the plain model's, and parameters that it adds, in M
@pytest.mark.parametrize(
    ("name", "ratio", "more"),
    [("mobilevit_xs", 0.88, 0.2), ("mobilevit_s", 0.875, 0.3), ("efficientvit_b1", 0.93, 0.4)],
)
def test_whole_detectors_cost_no_more_than_the_papers(name, ratio, more):
    merging, plain = (detection.ssdlite(f"{p}{name}", 91, 320).eval() for p in ("ltm_", ""))
    fill(merging)  # before there are clusters, inference leaves the update out
    counted = [detection.gmacs(each, 320) for each in (merging, plain)]
    assert counted[0] / counted[1] <= ratio
    parameters = [sum(p.numel() for p in each.parameters()) for each in (merging, plain)]
    assert 0 < parameters[0] - parameters[1] <= more * 1e6


def test_gmacs_are_those_of_the_parts():
    """Of SSDLite backbone and head; of Mask R-CNN, linear in its boxes and masks."""
    detector = make("mobilevit_xxs").eval()
    maps = [*detector.backbone(torch.rand(1, 3, SIZE, SIZE)).values()]
    head = 0.0
    for layer in (*detector.head.classification_head.module_list, *detector.head.regression_head.module_list):
        depthwise, pointwise = layer[0][0], layer[1]
        cells = maps[[m.shape[1] for m in maps].index(depthwise.in_channels)].shape[2:].numel()
        head += cells * (9 * depthwise.in_channels + pointwise.in_channels * pointwise.out_channels) / 1e9
    assert detection.gmacs(detector, SIZE) == pytest.approx(gmacs(detector.backbone, (3, SIZE, SIZE)) + head)
    detector = make("mobilevit_xxs", "mask_rcnn").eval()
    few = [detection.gmacs(detector, SIZE, rois, masks) for rois, masks in ((10, 1), (20, 1), (10, 2))]
    box = 8 * 49 * 1024 + 1024 * 1024 + 1024 * (4 + 16)
    assert few[1] - few[0] == pytest.approx(10 * box / 1e9)
    mask = 14 * 14 * (9 * 8 * 256 + 3 * 9 * 256 * 256) + 14 * 14 * 4 * 256 * 256 + 28 * 28 * 256 * 4
    assert few[2] - few[0] == pytest.approx(mask / 1e9)


def test_labels_are_shares_of_objects():
    labels = detection.image_labels([{"labels": torch.tensor([1, 1, 3, 2])}, {"labels": torch.zeros(0).long()}], 5)
    assert torch.equal(labels, torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_an_exported_backbone_and_head_take_other_batch_sizes(tmp_path):
    """The head reads the batch's size from the maps that were put back."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = detection.ssdlite("ltm_mobilevit_xxs", num_classes=5, size=64, strides=[8, 16, 32]).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, x):
            return self.head([*self.backbone(x).values()])["cls_logits"]

    net, path = Logits().eval(), tmp_path / "logits.onnx"
    torch.onnx.export(
        net, (torch.randn(2, 3, 64, 64),), path, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net(x))
