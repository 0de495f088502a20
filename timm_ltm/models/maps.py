"""What reducing models share whose tokens are a map: Swin, MobileViT, EfficientViT.

One letter per axis: B batch, D width, H W grid of timm's map, H' W' of the merged one.
"""

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch.fx
from timm.layers import register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_ltm.models.base import ReducedModel
from timm_ltm.models.block import recomputed
from timm_ltm.reduction import Placement, Tokens, initial_tokens
from timm_ltm.reduction.tokens import fixed

__all__ = ["MapModel", "ReducedStage", "map_tokens", "to_map"]


class ReducedStage(nn.Module):
    """Mixin of a timm module that leads a map through blocks, a leaf of FX graphs. The family writes :meth:`merged`."""

    def forward(self, x: Tensor, placement: Placement | None = None, merge: bool = False, observe: bool = False) -> Any:
        """timm's forward; with ``merge`` or ``observe``, returns the map and where it lies.

        Args:
            x: The map, merged by the stages before.
            placement: Where it lies on timm's, None if nothing has merged yet.
            merge: Merge, or be told that stages before have merged.
            observe: Merge nothing, only let reducers look (warm-up).
        """
        if not merge and not observe:
            return super().forward(x)
        return self.merged(x, placement, observe)

    def merged(self, x: Tensor, placement: Placement | None, observe: bool) -> tuple[Tensor, Placement | None]:
        """The map behind this stage, and where it lies."""
        raise NotImplementedError


register_notrace_module(ReducedStage)


class MapModel(ReducedModel):
    """Mixin of models with stages. The family writes :attr:`stem`, :meth:`stage_modules` and :meth:`finish`.

    What comes out has timm's shapes and integer reductions: maps that were merged are put back.
    """

    maps = True
    weighs_sizes: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False
    recomputes_stages: ClassVar[bool] = False  # gradient checkpoints are whole stages, not blocks of them

    stem: Callable[[Tensor], Tensor]  # in front of the stages: timm's module of this name, or the family's method

    def stage_modules(self) -> nn.Sequential:
        """The stages."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What is behind the stages and before the head, token by token."""
        return x

    def forward_stages(self, x: Tensor, observe: bool = False) -> tuple[Tensor, Placement | None]:
        """The merged map behind the last stage, before :meth:`finish`, and where it lies."""
        self._check_tended()
        x, placement = self.stem(_of_fixed_size(x)), None
        for stage in self.stage_modules():
            x, placement = self.run_stage(stage, x, placement, observe)
        return x, placement

    def run_stage(
        self, stage: nn.Module, x: Tensor, placement: Placement | None, observe: bool
    ) -> tuple[Tensor, Placement | None]:
        """One stage; those that timm runs as they are lie in front of all merges."""

        def run(x: Tensor, placement: Placement | None) -> tuple[Tensor, Placement | None]:
            if isinstance(stage, ReducedStage):
                return stage(x, placement, merge=not observe, observe=observe)
            return stage(x), placement

        if self.recomputes_stages and self.grad_checkpointing:
            return recomputed(run, x, placement)
        return run(x, placement)

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's: maps that were merged are put back."""
        if self.merging:
            x, placement = self.forward_stages(x)
            return _put_back(placement, self.finish(x), self.channels_last)
        if self._observes():
            return self._keep_parameters_in_graph(self.finish(self.forward_stages(x, observe=True)[0]))
        return self._keep_parameters_in_graph(super().forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """timm's. A mean is weighted by size in place of putting back."""
        if not self.merging:
            return super().forward(x)
        x, placement = self.forward_stages(x)
        x = self.finish(x)
        if self.pool_type() == "avg":
            x = _mean(placement, x, self.channels_last)  # a map of one token, the mean of all put back
        else:
            x = _put_back(placement, x, self.channels_last)
        return self.forward_head(x)

    def pool_type(self) -> str:
        """How the head pools."""
        return self.head.global_pool.pool_type

    def forward_merged(self, x: Tensor) -> tuple[Tensor, Placement | None]:
        """Merged maps as they are: features as timm's model lays them out, H' x W', and where they lie.

        Merges whether merging is on or not.
        """
        x, placement = self.forward_stages(x)
        return self.finish(x), placement

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
        """timm's; maps that were merged are put back. ``"NHWC"`` too where the model's are, for ``features_only``."""
        formats = ("NCHW", "NHWC") if self.channels_last else ("NCHW",)
        if output_fmt not in formats:
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected one of {formats}. timm's model has no other.")
        observe, turn = self._observes(), self.channels_last and output_fmt == "NCHW"
        if not self.merging and not observe:
            result = super().forward_intermediates(
                self._keep_parameters_in_graph(x), indices, norm=norm, stop_early=stop_early, output_fmt="NCHW",
                intermediates_only=intermediates_only, **kwargs,
            )  # fmt: skip
            if output_fmt == "NCHW":
                return result
            maps = [y.permute(0, 2, 3, 1).contiguous() for y in (result if intermediates_only else result[1])]
            return maps if intermediates_only else (result[0], maps)
        self._check_tended()
        stages = self.stage_modules()
        taken, last = feature_take_indices(len(stages), indices)
        end = len(stages) - 1
        x, placement, maps = self.stem(_of_fixed_size(x)), None, []
        finished = None  # once: norms of batches count
        for i, stage in enumerate(stages):
            if stop_early and i > last:
                break
            x, placement = self.run_stage(stage, x, placement, observe)
            if i == end and (self.tells_finished(norm, **kwargs) or not intermediates_only):
                finished = self.finish(x)
            if i in taken:
                y = finished if i == end and self.tells_finished(norm, **kwargs) else x
                y = _put_back(placement, y, self.channels_last)
                maps.append(y.permute(0, 3, 1, 2).contiguous() if turn else y)
        if intermediates_only:
            return maps
        return _put_back(placement, x if finished is None else finished, self.channels_last), maps

    def tells_finished(self, norm: bool) -> bool:
        """Whether the last map of :meth:`forward_intermediates` is one behind :meth:`finish`."""
        return False


def map_tokens(x: Tensor, grid: tuple[int, int], parts: int = 1) -> Tokens:
    """What is known of the tokens (B parts, H W, D) of a map at a stage's start."""
    return initial_tokens(x, 0, grid, is_map=True, parts=parts)


def to_map(x: Tensor, tokens: Tokens) -> Tensor:
    """(B, H' W', D) -> (B, H', W', D)."""
    assert tokens.grid is not None, "maps stay maps"
    return x.reshape(-1, *tokens.grid, fixed(x.shape[2]))


@torch.fx.wrap
def _of_fixed_size(images: Tensor) -> Tensor:
    """Images whose height and width compilers and exporters take for constants.

    How many tokens are left, their order and how they are halved have no simple form in symbols: with symbolic sizes a
    compiler needs many times as long as for every size anew, and an exporter gives up on some.
    """
    for side in images.shape[2:]:
        operator.index(side)
    return images


@torch.fx.wrap
def _put_back(placement: Placement | None, x: Tensor, channels_last: bool) -> Tensor:
    if placement is None:
        return x
    if channels_last:
        return placement.unmerge(x)
    return placement.unmerge(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@torch.fx.wrap
def _mean(placement: Placement | None, x: Tensor, channels_last: bool) -> Tensor:
    if placement is None:
        return x
    x = placement.mean(x if channels_last else x.permute(0, 2, 3, 1))  # B D
    return x[:, None, None] if channels_last else x[:, :, None, None]


def halves(layer: nn.Module) -> bool:
    """Whether a layer of convolutions has stride 2."""
    return any(getattr(module, "stride", 1) in (2, (2, 2)) for module in layer.modules())


def after_layer(layer: nn.Module, placement: Placement | None) -> Placement | None:
    """Where a map lies behind a layer of convolutions."""
    return placement.halved() if placement is not None and halves(layer) else placement
