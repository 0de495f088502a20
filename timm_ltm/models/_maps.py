"""What the LTM models share whose tokens are a map: Swin, MobileViT, EfficientViT."""

from collections.abc import Sequence
from typing import Any, TypeVar

from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn

from timm_ltm.merging import MergeConfig
from timm_ltm.models._common import LTMModel, split_ltm_kwargs

__all__ = ["LTMMapModel", "LTMStage", "adopt", "input_size_of", "map_settings", "real_reduction"]

T = TypeVar("T", bound=nn.Module)


def adopt(cls: type[T], module: nn.Module, **attributes: Any) -> T:
    """A timm module as one of our subclass of it, where timm has no hook for the class: no constructor runs again."""
    assert issubclass(cls, type(module))
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    adopted._modules = module._modules.copy()
    for name, value in attributes.items():
        setattr(adopted, name, value)
    return adopted


def map_settings(kwargs: dict[str, Any]) -> tuple[dict[str, Any], MergeConfig, dict[str, Any]]:
    """LTM's arguments, their settings, and timm's arguments.

    The paper's ratio of 0.95 leaves every line of up to 39 tokens as it is, and its update begins with a stage's second
    mask: its preset merges with 0.7 in every block of a map.
    """
    ltm, timms = split_ltm_kwargs(kwargs)
    if ltm.get("preset") == "paper":
        ltm.setdefault("compression_ratio", 0.7)
    return ltm, MergeConfig.from_kwargs(**ltm), timms


def real_reduction(img_size: Sequence[int], grid: Sequence[int]) -> int | float:
    """Pixels of an image's side per token of a map's side: a whole number where it is one."""
    reduction = max(size / n for size, n in zip(img_size, grid, strict=True))
    return int(reduction) if reduction == int(reduction) else reduction


def input_size_of(variant: str, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of the images that an entrypoint's arguments are for: that of the weights, where they do not say."""
    given = {name: kwargs[name] for name in ("pretrained_cfg", "pretrained_cfg_overlay") if kwargs.get(name)}
    return tuple(resolve_pretrained_cfg(variant, **given).input_size[-2:])


class LTMStage(nn.Module):
    """Mixin of a timm module that hands a state from one of its blocks to the next, if there is anything to do.

    Attributes:
        cluster_grid: g of :class:`MergeConfig`.
        merging: Set by the model.
        collecting: Set by the model.
    """

    cluster_grid: int
    merging: bool = True
    collecting: bool = False

    @property
    def observes(self) -> bool:
        """Merge nothing, only show the features to the clusters' refresh."""
        return self.collecting and self.training and not self.merging

    @property
    def active(self) -> bool:
        """Not timm's plain forward pass."""
        return self.merging or self.observes


class LTMMapModel(LTMModel):
    """Mixin of LTM models with maps: timm's forward passes lead through stages, which are told what to do."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images this model was made for."""
        return self.planned_size if hasattr(self, "planned_size") else super().image_size

    def _tell_stages(self) -> None:
        for module in self.modules():
            if isinstance(module, LTMStage):
                module.merging, module.collecting = self._merging, self.collecting

    def set_collecting(self, enable: bool) -> None:
        super().set_collecting(enable)
        self._tell_stages()

    def _read_epoch(self) -> None:
        super()._read_epoch()
        self._tell_stages()

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's, with maps merged."""
        x = super().forward_features(x)
        return x if self.merging else self._keep_parameters_in_graph(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, of merged maps: their sizes are merged ones."""
        return super().forward_intermediates(x if self.merging else self._keep_parameters_in_graph(x), *args, **kwargs)
