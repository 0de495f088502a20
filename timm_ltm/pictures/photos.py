"""Photographs at their own resolution, and what of them a model sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from timm_ltm.cost import input_size_of

__all__ = ["data_config", "load_photo", "shown"]


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, at the size that it was built for."""
    return {**resolve_model_data_config(model), "input_size": input_size_of(model)}


def load_photo(path: str | Path, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The part of a photograph that timm's evaluation transform shows a model, as it is and as the model takes it.

    Args:
        path: Of an image file.
        config: :func:`data_config` of the model.

    Returns:
        (3, H, W) in [0, 1] at the file's resolution, and the model's input (C, h, w).

    Raises:
        ValueError: It is no image.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image: got {str(path)!r}, expected an image file that can be read ({error}).") from None
    channels, *size = config["input_size"]
    mode = config.get("crop_mode") or "center"
    if mode != "border":  # which pads
        share = float(config.get("crop_pct") or 0.875)
        shape = (size[0], size[1]) if mode == "center" else (image.height, image.width)
        image = _centre(image, shape, share)
        config = {**config, "crop_pct": 1.0, "crop_mode": "squash"}
    x = create_transform(**config, is_training=False)(image)
    photo = to_tensor(image) if mode != "border" else shown(x)
    return photo, x if x.shape[0] == channels else x.mean(dim=0, keepdim=True).expand(channels, -1, -1)


def _centre(image: Image.Image, size: tuple[int, int], share: float) -> Image.Image:
    """The middle, in the input's shape, a share of the largest such part wide and high."""
    scale = share * min(image.height / size[0], image.width / size[1])
    height, width = (min(max(1, round(scale * n)), full) for n, full in zip(size, image.size[::-1], strict=True))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def shown(image: Tensor) -> Tensor:
    """A model's input (C, H, W), of any range, or a photograph, as (3, H, W) in [0, 1]."""
    image = image.detach().float().cpu()
    if image.amin() < 0 or image.amax() > 1:
        image = (image - image.amin()) / (image.amax() - image.amin()).clamp_min(1e-6)
    return image[:1].expand(3, -1, -1) if image.shape[0] < 3 else image[:3]
