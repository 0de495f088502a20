"""torchvision's SSDLite and Mask R-CNN on any timm backbone, merging or plain.

.. code-block:: python

    from timm_ltm.detection import mask_rcnn, ssdlite

    detector = ssdlite("ltm_mobilevit_s", num_classes=91, size=320, pretrained=True)
    detector = mask_rcnn(timm_ltm.convert(model, "ltm"), num_classes=91)

What comes back is torchvision's own class: it takes a list of images of any sizes, returns losses in training and boxes
in eval. A plain and a merging backbone give maps of the same shapes, so that all other weights have the same names and
shapes.

One letter per axis: B batch, D width, H W grid of a map.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import FeatureInfo
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from timm_ltm import cost
from timm_ltm.reduction import METHODS
from timm_ltm.reduction.settings import setting_error

__all__ = ["Pyramid", "feature_backbone", "gmacs", "image_labels", "mask_rcnn", "ssdlite"]

_EXTRA = (512, 256, 256, 128)  # of torchvision's SSDLite
_ANCHOR = 8  # side of Mask R-CNN's anchors in strides: 32 pixels on the map of stride 4, as torchvision's


def feature_backbone(
    backbone: str | nn.Module,
    strides: Sequence[int] | None = None,
    least: int = 1,
    size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    **backbone_kwargs: Any,
) -> FeatureGetterNet:
    """A timm model that gives its maps of some strides, (B, D, H, W) each, as ``features_only`` does.

    Args:
        backbone: A name, or a classification model of timm, merging or plain; a copy of it without its head is used.
        strides: Of the maps, pixels per cell; the deepest map of each. All from ``least`` on if not given,
            or else the largest there is.
        least: Smallest stride where ``strides`` are not given.
        size: (H, W) of the images, which models of a fixed size are built for, and merging is planned for.
        pretrained: timm's weights, of a name.
        **backbone_kwargs: Of ``timm.create_model``, of a name.

    Raises:
        ValueError: There is no such map, the backbone is made for another size, or a model that is made already has
            arguments.
    """
    if isinstance(backbone, str):
        name = backbone.partition(".")[0]
        cfg = None if ":" in backbone or not timm.is_model(name) else timm.get_pretrained_cfg(backbone)
        ours = any(name.startswith(f"{method}_") for method in METHODS)
        if size is not None and (ours or getattr(cfg, "fixed_input_size", False)):
            backbone_kwargs.setdefault("img_size", to_2tuple(size))
        model = timm.create_model(backbone, pretrained=pretrained, **backbone_kwargs)
    elif pretrained or backbone_kwargs:
        name, value = next(iter({**backbone_kwargs, **({"pretrained": True} if pretrained else {})}.items()))
        raise setting_error(name, value, "nothing, for a model that is made already", "Give the model's name instead.")
    else:
        model = copy.deepcopy(backbone)
    info = getattr(model, "feature_info", None)
    if isinstance(info, FeatureInfo) or not info or not hasattr(model, "forward_intermediates"):
        raise setting_error(
            "backbone",
            type(model).__name__,
            "a timm model with feature_info and forward_intermediates",
            "Give the classification model itself, not one wrapped by features_only.",
        )
    embed = getattr(model, "patch_embed", None)
    made_for = tuple(embed.img_size) if getattr(embed, "strict_img_size", False) and embed.img_size else None
    if made_for is not None and (size is None or to_2tuple(size) != made_for):
        raise setting_error(
            "size", size, f"{made_for}, which the backbone is made for", "Give that, or a backbone of another img_size."
        )
    deepest = {entry["reduction"]: index for index, entry in enumerate(info)}
    if strides is None:
        strides = sorted(s for s in deepest if s >= least) or [max(deepest)]
    strides = list(strides)
    if not strides or any(s not in deepest for s in strides) or strides != sorted(set(strides)):
        raise setting_error("strides", strides, f"some of {sorted(deepest)}, ascending", "Those are the model's.")
    return FeatureGetterNet(model, [deepest[s] for s in strides])


class Pyramid(nn.Module):
    """A timm backbone's maps by name, and what a detector puts on top of them.

    Args:
        body: Of :func:`feature_backbone`.
        extra: Blocks that each make a further map of the one before (SSDLite).
        fpn: Takes the dictionary of maps to another (Mask R-CNN). One of the two.
        out_channels: D of the maps that come out: one for each, or one that all share.
    """

    def __init__(
        self,
        body: nn.Module,
        out_channels: int | list[int],
        extra: Iterable[nn.Module] = (),
        fpn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body, self.extra, self.fpn = body, nn.ModuleList(extra), fpn
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        named = OrderedDict((str(i), y) for i, y in enumerate(maps))
        return named if self.fpn is None else self.fpn(named)


def _defaults(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Images are normalised as the backbone was trained, if not told otherwise."""
    config = resolve_model_data_config(model)
    return {"image_mean": list(config["mean"]), "image_std": list(config["std"]), **kwargs}


def _check_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise setting_error(
            "num_classes", num_classes, "2 or more, as torchvision counts them", "Class 0 is the background; add it."
        )


def ssdlite(
    backbone: str | nn.Module,
    num_classes: int = 91,
    size: int | tuple[int, int] = 320,
    strides: Sequence[int] | None = None,
    extra: Sequence[int] | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    anchor_generator: DefaultBoxGenerator | None = None,
    pretrained: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> SSD:
    """torchvision's SSDLite (section 6.2 of MobileNetV2's paper) on a timm backbone.

    Args:
        backbone: A name, or a classification model of timm, merging or plain.
        num_classes: With the background, class 0.
        size: Images are resized to, (H, W) or one side.
        strides: Of the backbone's maps; all from 16 on if not given.
        extra: Widths of the further maps, each with half the side of the one before. torchvision's four if not given,
            but none behind a map of one cell.
        norm_layer: Of extra blocks and head.
        anchor_generator: torchvision's of SSDLite if not given, on as many maps as there are.
        pretrained: timm's weights, of a name.
        backbone_kwargs: Of ``timm.create_model``, of a name.
        **kwargs: Of torchvision's ``SSD``.

    Raises:
        ValueError: The backbone has no map of such a stride, the anchors are for another number of maps, or the number
            of classes leaves no room for the background.
    """
    _check_classes(num_classes)
    height, width = to_2tuple(size)
    body = feature_backbone(backbone, strides, 16, (height, width), pretrained, **(backbone_kwargs or {}))
    norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # as torchvision's
    channels = list(body.feature_info.channels())
    if extra is None:
        side = math.ceil(max(height, width) / body.feature_info.reduction()[-1])
        extra = _EXTRA[: max(0, math.ceil(math.log2(side)))]
    blocks = [
        _extra_block(before, after, norm_layer) for before, after in zip([channels[-1], *extra], extra, strict=False)
    ]
    channels += extra
    anchors = anchor_generator or DefaultBoxGenerator([[2, 3] for _ in channels], min_ratio=0.2, max_ratio=0.95)
    per_cell = anchors.num_anchors_per_location()
    if len(per_cell) != len(channels):
        raise setting_error(
            "anchor_generator",
            f"one for {len(per_cell)} maps",
            f"one for {len(channels)}: {len(channels) - len(extra)} of the backbone and {len(extra)} extra",
            "Give aspect ratios for each, or other strides or extra.",
        )
    pyramid = Pyramid(body, channels, blocks)
    _normal_init(pyramid.extra)
    told = {"score_thresh": 0.001, "nms_thresh": 0.55, "detections_per_img": 300, "topk_candidates": 300, **kwargs}
    return SSD(
        pyramid,
        anchors,
        (width, height),
        num_classes,
        head=SSDLiteHead(channels, per_cell, num_classes, norm_layer),
        **_defaults(body.model, told),
    )


def mask_rcnn(
    backbone: str | nn.Module,
    num_classes: int = 91,
    size: int | tuple[int, int] | None = None,
    strides: Sequence[int] | None = None,
    width: int = 256,
    pretrained: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN with a feature pyramid on a timm backbone.

    Args:
        backbone: A name, or a classification model of timm, merging or plain.
        num_classes: With the background, class 0.
        size: Images are resized to exactly that, (H, W) or one side, for backbones of a fixed size. If not given, to
            torchvision's ``min_size`` and ``max_size``, and padded.
        strides: Of the backbone's maps; all from 4 on if not given.
        width: D of the pyramid.
        pretrained: timm's weights, of a name.
        backbone_kwargs: Of ``timm.create_model``, of a name.
        **kwargs: Of torchvision's ``MaskRCNN``.

    Raises:
        ValueError: The backbone has no map of such a stride, a stride is no power of two, or the number of classes
            leaves no room for the background.
    """
    if "box_predictor" not in kwargs:
        _check_classes(num_classes)
    body = feature_backbone(backbone, strides, 4, size, pretrained, **(backbone_kwargs or {}))
    found = body.feature_info.reduction()
    if any(s & (s - 1) for s in found):
        raise setting_error("strides", found, "powers of 2, which roi pooling rounds them to", "Use another backbone.")
    pyramid = Pyramid(
        body, width, fpn=FeaturePyramidNetwork(body.feature_info.channels(), width, extra_blocks=LastLevelMaxPool())
    )
    names = [str(i) for i in range(len(found))]
    levels = [*found, 2 * found[-1]]
    defaults = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((_ANCHOR * s,) for s in levels), ((0.5, 1.0, 2.0),) * len(levels)
        ),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "mask_roi_pool": MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
    }
    if size is not None:
        h, w = to_2tuple(size)
        defaults.update(min_size=min(h, w), max_size=max(h, w), fixed_size=(w, h))  # torchvision's order
        defaults.update(size_divisible=1)  # else torchvision pads to a multiple of 32, another size
    return MaskRCNN(pyramid, num_classes, **_defaults(body.model, {**defaults, **kwargs}))


class _Counted(nn.Module):
    """What a detector multiplies for one image, whatever it finds in it."""

    def __init__(self, detector: nn.Module, rois: int, masks: int) -> None:
        super().__init__()
        self.detector, self.rois, self.masks = detector, rois, masks

    def forward(self, x: Tensor) -> None:
        maps = self.detector.backbone(x)
        if isinstance(self.detector, SSD):
            self.detector.head(list(maps.values()))
            return
        self.detector.rpn.head(list(maps.values()))
        heads, D = self.detector.roi_heads, self.detector.backbone.out_channels
        rois = x.new_zeros(self.rois, D, *heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(rois))
        if heads.has_mask():
            rois = x.new_zeros(self.masks, D, *heads.mask_roi_pool.output_size)
            heads.mask_predictor(heads.mask_head(rois))


def gmacs(detector: nn.Module, size: int | tuple[int, int] = 320, rois: int = 1000, masks: int = 100) -> float:
    """10^9 multiply-adds of a detector and one image: backbone, putting back, further maps and heads.

    Matching, decoding and suppression of boxes are not counted, nor is the roi pooling of Mask R-CNN: there are no
    products of matrices in them.

    Args:
        detector: torchvision's SSD or Mask R-CNN (Faster R-CNN), in the mode it is in; evaluation is usually meant.
        size: (H, W) of the image as the backbone sees it.
        rois: Boxes that Mask R-CNN's box head looks at, which depends on the image; torchvision's most.
        masks: Of these, that get a mask; torchvision's most.
    """
    if not hasattr(detector, "backbone") or not (isinstance(detector, SSD) or hasattr(detector, "roi_heads")):
        raise setting_error(
            "detector",
            type(detector).__name__,
            "torchvision's SSD or Mask R-CNN",
            "Count others by timm_ltm.cost.gmacs.",
        )
    return cost.gmacs(_Counted(detector, rois, masks), (3, *to_2tuple(size)))


def image_labels(targets: Sequence[dict[str, Tensor]], num_classes: int) -> Tensor:
    """What a detector's targets tell a refresh of clusters: (B, K) shares of each class among an image's objects.

    .. code-block:: python

        refresh = timm_ltm.ClusterRefresh(detector, num_classes=num_classes - 1)
        refresh.step(image_labels(targets, num_classes))  # after each forward pass of training

    The background is no class here, K = num_classes - 1. A row of an image without objects is zero, which is no label:
    its features count among the clusters, and not in Q.
    """
    rows = [torch.bincount(t["labels"], minlength=num_classes)[1:num_classes].float() for t in targets]
    shares = torch.stack(rows)  # B K
    return shares / shares.sum(dim=1, keepdim=True).clamp_min(1.0)
