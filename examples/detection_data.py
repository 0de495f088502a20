"""Images with boxes and masks: folders in COCO's format, a set that is drawn here, and COCO's average precision.

    python examples/detection_data.py DRAWN --train 400 --val 100 --size 160 [--backgrounds PHOTOS]

draws real handwritten digits (scikit-learn's) and shapes on gradients and noise, or on photographs of yours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

_logger = logging.getLogger(__name__)
SHAPES = ("circle", "square", "triangle", "digit")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class CocoFolder(torch.utils.data.Dataset):
    """A split of a folder in COCO's format, as torchvision's detectors want it.

    Annotations are ``SPLIT.json``, or ``annotations/instances_SPLIT.json`` with or without COCO's 2017 behind the
    split; images lie in a folder of the split's name, with or without 2017, or in ``images`` or there in the split's
    folder.

    Crowds are left out of training targets, as boxes without an area are, which are counted in ``dropped`` and left out
    of the evaluation too. Images without objects stay: they teach what is background.

    Args:
        root: The folder.
        split: ``"train"`` or ``"val"``.
        transform: torchvision's v2, of an image and its target.
        masks: Whether targets have masks.
        skip_missing: Leave out images whose file is not there, and count them in ``missing``, in place of an error.

    Attributes:
        categories: COCO's category ids; label k of a target is the k-th, from 1 on.
        names: Of these.
        given: The ids that annotations have in the file, by those they have here.
        coco: pycocotools' index of what is evaluated.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Callable[..., Any] | None = None,
        masks: bool = False,
        skip_missing: bool = False,
    ) -> None:
        self.root, self.transform, self.masks = Path(root), transform, masks
        self.file = _first(
            [self.root / f"{split}.json"]
            + [self.root / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")],
            "annotations",
        )
        folders = [self.root / f"{split}{year}" for year in ("", "2017")]
        folders += [self.root / "images" / f"{split}{year}" for year in ("", "2017")] + [self.root / "images"]
        self.folder = _first(folders, "images")
        data = self._read()
        there = [image for image in data["images"] if (self.folder / image["file_name"]).is_file()]
        self.missing = len(data["images"]) - len(there)
        if self.missing and not skip_missing:
            name = next(i["file_name"] for i in data["images"] if not (self.folder / i["file_name"]).is_file())
            raise ValueError(
                f"{self.folder / name}: got no such file ({self.missing} of {len(data['images'])} images of "
                f"{self.file} are missing), expected all. Put them there, or skip them (--skip-missing)."
            )
        kept = {image["id"] for image in there}
        annotations = [a for a in data["annotations"] if a["image_id"] in kept]
        good = [a for a in annotations if min(a["bbox"][2:]) > 0]
        self.dropped = len(annotations) - len(good)
        for number, what in ((self.missing, "images without a file"), (self.dropped, "boxes without an area")):
            if number:
                _logger.warning("%s: %d %s were left out.", self.file, number, what)
        self.coco = COCO()
        # COCO's evaluation takes the id 0 for no match, and knows an annotation by its id: they are numbered anew
        self.given = {k: a.get("id") for k, a in enumerate(good, 1)}
        good = [{**a, "id": k} for k, a in enumerate(good, 1)]
        self.coco.dataset = {**data, "images": there, "annotations": good}
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.categories = sorted(self.coco.cats)
        self.names = [self.coco.cats[c].get("name", str(c)) for c in self.categories]
        self.label = {category: k + 1 for k, category in enumerate(self.categories)}
        self.ids = sorted(self.coco.imgs)
        if not self.ids:
            raise ValueError(f"{self.file}: got no image, expected some. Check its 'images'.")

    def _read(self) -> dict[str, Any]:
        """The annotations, each of which names an image and a category and has a box."""
        try:
            data = json.loads(self.file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.file}: got no JSON ({error}), expected COCO's. Write it again.") from None
        for key in ("images", "annotations", "categories"):
            if not isinstance(data, dict) or not isinstance(data.get(key), list):
                raise ValueError(f"{self.file}: got no list {key!r}, expected COCO's format. Write it again.")
        for image in data["images"]:
            if not {"id", "file_name", "height", "width"} <= set(image):
                raise self._broken(f"image {image.get('id')}", sorted(image), "id, file_name, height and width")
        images, categories = {i["id"]: i for i in data["images"]}, {c["id"] for c in data["categories"]}
        for a in data["annotations"]:
            what = f"annotation {a.get('id')}"
            if a.get("image_id") not in images or a.get("category_id") not in categories:
                raise self._broken(
                    what, {k: a.get(k) for k in ("image_id", "category_id")}, "an image and a category of this file"
                )
            box = a.get("bbox")
            try:
                x, y, w, h = (float(value) for value in box)
                if not all(math.isfinite(value) for value in (x, y, w, h)):
                    raise ValueError
            except (TypeError, ValueError):
                raise self._broken(f"bbox of {what}", box, "four finite numbers x, y, width, height") from None
            image = images[a["image_id"]]
            x1, y1 = min(max(x, 0.0), image["width"]), min(max(y, 0.0), image["height"])
            x2, y2 = min(max(x + w, 0.0), image["width"]), min(max(y + h, 0.0), image["height"])
            a["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            a.setdefault("iscrowd", 0)
            a.setdefault("area", (x2 - x1) * (y2 - y1))
        return data

    def _broken(self, what: str, got: object, expected: str) -> ValueError:
        return ValueError(f"{self.file}: {what}: got {got!r}, expected {expected}. Mend or remove it.")

    def _decode(self, a: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        """The mask (H, W) of an annotation's polygons, or of its runs."""
        H, W, of = image["height"], image["width"], a.get("segmentation")
        try:
            if isinstance(of, list):
                runs = coco_mask.merge(coco_mask.frPyObjects(of, H, W))
            else:
                runs = coco_mask.frPyObjects(of, H, W) if isinstance(of["counts"], list) else of
            if list(runs["size"]) != [H, W]:
                raise ValueError
            return coco_mask.decode(runs)
        except Exception:  # pycocotools raises all kinds
            short = repr(of)[:80]
            what = f"segmentation of annotation {self.given[a['id']]}"
            raise self._broken(what, short, f"polygons or runs of {H} x {W} pixels") from None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Image.Image:
        path = self.folder / self.coco.imgs[self.ids[index]]["file_name"]
        try:
            return Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: got no image ({error}), expected one. Replace it.") from None

    def crowds(self, index: int) -> tv_tensors.Mask:
        """Pixels (1, H, W) of crowds, in which objects are not told apart, and by far not all are marked."""
        info = self.coco.imgs[self.ids[index]]
        mask = np.zeros((1, info["height"], info["width"]), np.uint8)
        for a in self.coco.imgToAnns[self.ids[index]]:
            mask |= self._decode(a, info) if a["iscrowd"] else 0
        return tv_tensors.Mask(torch.from_numpy(mask))

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        image, info = self.image(index), self.coco.imgs[self.ids[index]]
        size = info["height"], info["width"]
        if image.size != size[::-1]:
            raise ValueError(
                f"{self.folder / info['file_name']}: got {image.size[1]} x {image.size[0]} pixels, expected {size[0]} "
                f"x {size[1]}, as {self.file} says. Correct one of them."
            )
        found = [a for a in self.coco.imgToAnns[self.ids[index]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x y w h -> x1 y1 x2 y2
        target: dict[str, Any] = {
            "image_id": self.ids[index],
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.label[a["category_id"]] for a in found], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(self._decode(a, info)) for a in found]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return (image, target) if self.transform is None else self.transform(image, target)


def _first(paths: Sequence[Path], what: str) -> Path:
    for path in paths:
        if path.exists():
            return path
    raise ValueError(f"{what}: got none, expected one of {', '.join(map(str, paths))}. Give a folder in COCO's format.")


def both_splits(
    root: str | Path, transforms: Sequence[Callable[..., Any] | None], masks: bool, skip_missing: bool
) -> list[CocoFolder]:
    """Training and validation, of the same categories."""
    train, val = (
        CocoFolder(root, split, transform, masks, skip_missing)
        for split, transform in zip(("train", "val"), transforms, strict=True)
    )
    if train.categories != val.categories:
        raise ValueError(
            f"{val.file}: got categories {val.names}, expected those of training, {train.names}. Write both files with "
            "the same."
        )
    return [train, val]


def results_of(data: CocoFolder, image_id: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A detector's output for one image as COCO's results."""
    boxes = found["boxes"].detach().cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    rows = [
        {"image_id": image_id, "category_id": data.categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    for row, mask in zip(rows, found.get("masks", ()), strict=False):
        runs = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).cpu().numpy().astype(np.uint8)))
        row["segmentation"] = {**runs, "counts": runs["counts"].decode()}
    return rows


def average_precision(data: CocoFolder, results: list[dict[str, Any]], masks: bool = False) -> dict[str, float]:
    """COCO's mAP, AP50 and AP75 in percent, of boxes and of masks, by pycocotools."""
    if all(a["iscrowd"] for a in data.coco.anns.values()):
        raise ValueError(f"{data.file}: got no object to find, expected some. Evaluate on images with annotations.")
    told = {}
    for kind, name in (("bbox", "box"), ("segm", "mask"))[: 1 + masks]:
        stats = [0.0] * 3
        if results:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(data.coco, data.coco.loadRes([dict(r) for r in results]), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            stats = evaluation.stats[:3]
        told.update({f"{name}_{k}": 100.0 * float(v) for k, v in zip(("mAP", "AP50", "AP75"), stats, strict=True)})
    return told


# A set that is drawn


def draw(
    folder: str | Path, train: int = 400, val: int = 100, size: int = 160, seed: int = 0, backgrounds: str | None = None
) -> Path:
    """Write a set in COCO's format: circles, squares, triangles and real handwritten digits, with boxes and masks.

    One to four objects an image, of 0.2 to 0.5 of its side, in any colour; one image in twenty has none. Digits of the
    two splits are different ones.

    Args:
        folder: Where; what lies there in these names is written over.
        train: Images.
        val: Images.
        size: Side of the images, pixels.
        seed: Of all that is drawn.
        backgrounds: A folder of photographs, of which crops are taken; gradients and noise if not given.
    """
    from sklearn.datasets import load_digits

    folder, digits = Path(folder), load_digits().images  # 8 x 8, 0 to 16
    photos = sorted(p for p in Path(backgrounds).rglob("*") if p.suffix.lower() in SUFFIXES) if backgrounds else []
    if backgrounds and not photos:
        raise ValueError(f"backgrounds: got no image in {backgrounds}, expected some. Give a folder of photographs.")
    for split, number, of in (("train", train, digits[:1300]), ("val", val, digits[1300:])):
        rng = np.random.default_rng([seed, split == "val"])
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in tqdm(range(1, number + 1), desc=f"drawing {split}", unit="image", leave=False, disable=None):
            picture, objects = _picture(rng, size, of, photos)
            images.append({"id": i, "file_name": f"{i:06d}.png", "height": size, "width": size})
            Image.fromarray(picture).save(folder / split / images[-1]["file_name"])
            for category, mask in objects:
                runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": i, "category_id": category + 1, "iscrowd": 0,
                        "area": float(coco_mask.area(runs)), "bbox": coco_mask.toBbox(runs).tolist(),
                        "segmentation": {**runs, "counts": runs["counts"].decode()},
                    }
                )  # fmt: skip
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(SHAPES)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(data))
    return folder


def _picture(
    rng: np.random.Generator, size: int, digits: np.ndarray, photos: Sequence[Path]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image (H, W, 3) and its objects: category and mask (H, W) of what can be seen of each."""
    picture = _background(rng, size, photos)
    objects: list[tuple[int, np.ndarray]] = []
    for _ in range(0 if rng.random() < 0.05 else rng.integers(1, 5)):
        category = int(rng.integers(len(SHAPES)))
        side = int(size * rng.uniform(0.2, 0.5))
        mask = np.zeros((size, size), bool)
        x, y = rng.integers(0, size - side, 2)
        mask[y : y + side, x : x + side] = _outline(rng, category, side, digits)
        if any((mask & other).sum() > 0.2 * min(mask.sum(), other.sum()) for _, other in objects):
            continue  # hides too much
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - picture[mask].mean(axis=0)).max() < 100:  # can be told from what is behind it
            colour = rng.uniform(0, 255, 3)
        shade = rng.normal(0, 8, (int(mask.sum()), 1))
        picture[mask] = np.clip(colour + shade, 0, 255)
        objects = [(c, other & ~mask) for c, other in objects] + [(category, mask)]
    return picture.astype(np.uint8), objects


def _outline(rng: np.random.Generator, category: int, side: int, digits: np.ndarray) -> np.ndarray:
    """The mask (side, side) of one object."""
    if SHAPES[category] == "digit":
        digit = Image.fromarray((digits[rng.integers(len(digits))] * 255 / 16).astype(np.uint8))
        return np.asarray(digit.resize((side, side), Image.Resampling.BICUBIC)) > 100
    angle = rng.uniform(0, 2 * math.pi)
    image = Image.new("L", (side, side))
    if SHAPES[category] == "circle":
        ImageDraw.Draw(image).ellipse((0, 0, side - 1, side - 1), fill=1)
    else:
        corners = 4 if SHAPES[category] == "square" else 3
        turns = [angle + 2 * math.pi * k / corners for k in range(corners)]
        ImageDraw.Draw(image).polygon([(side / 2 * (1 + math.cos(t)), side / 2 * (1 + math.sin(t))) for t in turns], 1)
    return np.asarray(image) > 0


def _background(rng: np.random.Generator, size: int, photos: Sequence[Path]) -> np.ndarray:
    """A crop of a photograph, or a gradient between two colours with noise of some coarseness, (H, W, 3)."""
    if photos:
        photo = Image.open(photos[rng.integers(len(photos))]).convert("RGB")
        share = rng.uniform(0.6, 1.0) * min(photo.size)
        x, y = (rng.uniform(0, full - share) for full in photo.size)
        return np.array(photo.resize((size, size), box=(x, y, x + share, y + share)), float)
    angle, (one, other) = rng.uniform(0, 2 * math.pi), rng.uniform(0, 255, (2, 3))
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    along = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle), 0, 1)[..., None]
    cells = int(rng.integers(4, 33))
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)).resize((size, size), 2)
    return np.clip(one * (1 - along) + other * along + 0.25 * (np.asarray(noise, float) - 128), 0, 255)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backgrounds", help="a folder of photographs")
    args = parser.parse_args()
    draw(args.folder, args.train, args.val, args.size, args.seed, args.backgrounds)
