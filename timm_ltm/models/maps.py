"""What reducing models share whose tokens are a map: Swin, MobileViT, EfficientViT.

A stage merges within itself, and puts its tokens back at its end, each with what was its own. So the layers between
stages see whole maps, and features are timm's.

One letter per axis: B batch, D width, H W grid of timm's map, H' W' of the merged one.
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch.fx
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_ltm.models.base import ReducedModel
from timm_ltm.reduction import Reducer, Tokens, initial_tokens
from timm_ltm.reduction.tokens import fixed

__all__ = ["MapModel", "ReducedStage", "map_tokens", "put_back_map", "to_map"]


class ReducedStage(nn.Module):
    """Mixin of a timm module that leads a map through transformer blocks. The family writes :meth:`merged`.

    A leaf of FX graphs.

    Attributes:
        merges: Whether the model merges now.
        collects: Merge nothing, but let reducers look while training (warm-up).
        watched: Run the blocks with tokens also where none merges, for who looks from outside.
    """

    merges: bool = False
    collects: bool = False
    watched: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """timm's forward: the map in, the map out."""
        looks = self.merges or (self.collects and self.training)
        if self.watched or (looks and any(isinstance(module, Reducer) for module in self.modules())):
            return self.merged(x, not self.merges)
        return super().forward(x)

    def merged(self, x: Tensor, observe: bool) -> Tensor:
        """The stage's map: tokens merged on the way, or with ``observe`` only looked at, and put back."""
        raise NotImplementedError


register_notrace_module(ReducedStage)


class MapModel(ReducedModel):
    """Mixin of models of such stages."""

    maps = True
    lines = True
    weighs_sizes: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False

    def _tell_parts(self) -> None:
        for stage in self._stages():
            stage.merges, stage.collects = self.merging, self.collecting

    def _stages(self) -> Iterator[ReducedStage]:
        return (module for module in self.modules() if isinstance(module, ReducedStage))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within, all blocks run with tokens."""
        stages = list(self._stages())
        try:
            for stage in stages:
                stage.watched = True
            yield
        finally:
            for stage in stages:
                stage.watched = False

    def _taken(self, x: Tensor) -> Tensor:
        """The images, for a forward pass of timm's."""
        if not self.merging:
            return self._keep_parameters_in_graph(x)
        self._check_tended()
        return _of_fixed_size(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's."""
        return super().forward_features(self._taken(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """timm's; also ``"NHWC"`` where the model's maps are, for ``features_only``."""
        formats = ("NCHW", "NHWC") if self.channels_last else ("NCHW",)
        if output_fmt not in formats:
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected one of {formats}. timm's model has no other.")
        result = super().forward_intermediates(
            self._taken(x), indices, norm, stop_early, "NCHW", intermediates_only, **kwargs
        )
        if output_fmt == "NCHW":
            return result
        if intermediates_only:
            return [y.permute(0, 2, 3, 1).contiguous() for y in result]
        return result[0], [y.permute(0, 2, 3, 1).contiguous() for y in result[1]]


def map_tokens(x: Tensor, grid: tuple[int, int], lines: bool = True, parts: int = 1) -> Tokens:
    """What is known of the tokens (B parts, H W, D) of a map at a stage's start; what putting back needs is kept.

    Args:
        x: The tokens.
        grid: (H, W).
        lines: They merge along lines, and stay a map.
        parts: As of :class:`~timm_ltm.reduction.Site`.
    """
    return initial_tokens(x, 0, grid, is_map=lines, parts=parts)._replace(kept=())


def to_map(x: Tensor, tokens: Tokens) -> Tensor:
    """(B, H' W', D) -> (B, H', W', D)."""
    assert tokens.grid is not None, "maps stay maps"
    return x.reshape(-1, *tokens.grid, fixed(x.shape[2]))


def put_back_map(x: Tensor, tokens: Tokens) -> Tensor:
    """At a stage's end: (B, H' W', D) -> (B, H, W, D), each token with what was its own."""
    return tokens.put_back(x).reshape(-1, *tokens.start, fixed(x.shape[2]))


@torch.fx.wrap
def _of_fixed_size(images: Tensor) -> Tensor:
    """Images whose height and width compilers and exporters take for constants.

    How many tokens are left, and their order, have no simple form in symbols: with symbolic sizes a compiler needs many
    times as long as for every size anew, and an exporter gives up on some.
    """
    for side in images.shape[2:]:
        operator.index(side)
    return images
