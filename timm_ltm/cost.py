"""What a model costs, counted the same way on every device: one counter for README, benchmarks and budgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["gmacs", "input_size_of"]


def _baddbmm(_: Sequence[int], a: Sequence[int], b: Sequence[int], *args: object, **kwargs: object) -> int:
    """Flops of a product of shapes (B, n, k) and (B, k, m)."""
    return 2 * a[0] * a[1] * a[2] * b[2]


_MORE = {torch.ops.aten.baddbmm_: _baddbmm}  # torch counts it out of place only


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images a timm model is made for: those it was built or resized to, not its weights'."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = cfg.get("input_size") or (3, 224, 224)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "planned_size", size)
    return getattr(model, "in_chans", channels), *size


def gmacs(model: nn.Module, input_size: Sequence[int] | None = None, inputs: torch.Tensor | None = None) -> float:
    """10^9 multiply-adds of a forward pass of one image, all matrix products and convolutions in it.

    Attention's products count whatever kernel would run: torch's counter has no formula for some fused ones and counts
    them as nothing, so that they are counted by the plain kernel. What a method adds, and putting back where that is a
    product, count too.

    Args:
        model: Any, in the mode and on the device it is in; evaluation is what is usually meant.
        input_size: (C, H, W); the model's own if not given. Of an image of zeros, unless there are ``inputs``.
        inputs: (B, C, H, W) images, for a model whose cost depends on them: each is run alone, and the mean counted.

    Returns:
        In 10^9.
    """
    size = tuple(input_size) if input_size is not None else input_size_of(model)
    like = next(model.parameters())
    x = torch.zeros(1, *size, device=like.device, dtype=like.dtype) if inputs is None else inputs
    # with gradients: torch's counter looks for those of a parameter that is a module's input, as in attention pooling
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=_MORE) as counter,
    ):
        for image in x.split(1):
            model(image)
    return counter.get_total_flops() / 2e9 / len(x)
