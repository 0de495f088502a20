"""Every supported timm variant times every method that fits it, registered from timm's own registry.

timm's entrypoints build the models and load the weights; what is built is adopted. No constant of timm is copied.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, list_models, model_entrypoint
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import DefaultCfg
from timm.models._registry import register_model
from timm.models.beit import Beit
from timm.models.byobnet import ByobNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientvit_mit import EfficientVit, EfficientVitLarge
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_ltm.models.base import ReducedModel
from timm_ltm.models.beit import ReducedBeit
from timm_ltm.models.efficientvit import ReducedEfficientViT, ReducedEfficientViTLarge
from timm_ltm.models.eva import ReducedEva
from timm_ltm.models.mobilevit import ReducedMobileViT
from timm_ltm.models.saved import is_own
from timm_ltm.models.swin import ReducedSwin
from timm_ltm.models.vit import ReducedViT, ReducedViTDistilled
from timm_ltm.reduction import METHODS, Reducer
from timm_ltm.reduction.reducer import setting_names
from timm_ltm.reduction.settings import nearest, setting_error

__all__ = ["ALIASES", "FAMILIES", "REFUSED", "convert", "refusal"]

FAMILIES: dict[type[nn.Module], type[ReducedModel]] = {
    VisionTransformer: ReducedViT,
    VisionTransformerDistilled: ReducedViTDistilled,
    Eva: ReducedEva,
    Beit: ReducedBeit,
    SwinTransformer: ReducedSwin,
    ByobNet: ReducedMobileViT,
    EfficientVit: ReducedEfficientViT,
    EfficientVitLarge: ReducedEfficientViTLarge,
}
# timm's modules of each family, whose variants are registered
MODULES: dict[str, type[ReducedModel]] = {
    "vision_transformer": ReducedViT,
    "deit": ReducedViT,
    "eva": ReducedEva,
    "beit": ReducedBeit,
    "swin_transformer": ReducedSwin,
    "mobilevit": ReducedMobileViT,
    "efficientvit_mit": ReducedEfficientViT,
}
# Variants of these modules that cannot merge, and why
REFUSED: dict[str, str] = {
    "vit_*_18x2_*": "parallel blocks: several attentions side by side, then several MLPs",
    "vit_*_xp_*": "parallel blocks: attention and MLP side by side have no place between them",
    "vit_*pwee_*": "parallel blocks: attention and MLP side by side have no place between them",
    "vit_*_rpn_*": "post-norm residual blocks",
    "eva02_enormous_*": "post-norm residual blocks",
    "beit_*": "tables of relative positions, which are of all patches",
    "beitv2_*": "tables of relative positions, which are of all patches",
    "mobilevitv2_*": "linear attention without keys per head over all tokens",
}
# Variants without rotary positions, in families that have them: methods whose slots have no place merge these alone
UNROTATED = ("eva_giant_*",)
# Short names
ALIASES: dict[str, str] = {
    "vit_test": "test_vit",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
}
default_cfgs: dict[str, DefaultCfg] = {}  # timm's register_model reads it


def refusal(name: str) -> str | None:
    """Why a timm variant, by name, is not registered; None if it is."""
    return next((reason for pattern, reason in REFUSED.items() if fnmatch.fnmatch(name, pattern)), None)


def _fits(cls: type[Reducer], family: type[ReducedModel], name: str) -> bool:
    """Whether a method merges a timm variant of a family, by name."""
    rotates = getattr(family, "rotates", False) and not any(fnmatch.fnmatch(name, p) for p in UNROTATED)
    return family.takes(cls) and (cls.anchored or not rotates)


def convert(model: nn.Module, method: str = "ltm", **settings: Any) -> ReducedModel:
    """A timm model in hand as one that merges tokens, sharing its parameters. The given model stays as it is.

    Training one trains both; buffers, as the statistics of batch norms, and hooks are copies.

    Args:
        model: Of timm's ViT, DeiT, EVA, Swin, MobileViT or EfficientViT, whatever it was trained on.
        method: The method's name, see ``timm_ltm.METHODS``.
        **settings: The method's, ``compression_ratio=0.9`` for example. Of MobileViT and EfficientViT, which have no
            size of their own, also the ``img_size`` that merging is planned for.

    Returns:
        A new model of timm's class, merging, in the given model's mode.

    Raises:
        ValueError: The model or a setting does not fit; the reason is told.
    """
    if not isinstance(model, nn.Module):
        raise setting_error("model", model, "a timm model, not its name", "Make it with timm.create_model before.")
    if isinstance(model, ReducedModel):
        raise setting_error(
            "model", type(model).__name__, "a plain timm model", "It merges already; convert the plain one."
        )
    if type(model) not in FAMILIES:
        names = ", ".join(cls.__name__ for cls in FAMILIES)
        wrapped = any(type(m) in FAMILIES for m in model.modules())
        todo = (
            "Convert the model inside; of timm's features_only=True, create the merging one: "
            f"timm.create_model('{method}_...', features_only=True)."
            if wrapped
            else "Use one of these."
        )
        raise setting_error("model", type(model).__name__, f"one of timm's {names}", todo)
    shared = {id(p): p for p in model.parameters()}
    made = copy.deepcopy(model, shared)
    if FAMILIES[type(model)].any_size and settings.get("img_size") is not None:
        made.planned_size = to_2tuple(settings["img_size"])
        settings = {name: value for name, value in settings.items() if name != "img_size"}
    made = _adopted(made, method, settings)
    name = f"{made.method}_{(getattr(made, 'pretrained_cfg', None) or {}).get('architecture')}"
    if name in default_cfgs:  # what it is saved as, for timm to build it again
        made.pretrained_cfg = made.default_cfg = {**made.pretrained_cfg, "architecture": name}
    return made


def _adopted(model: nn.Module, method: str, settings: dict[str, Any]) -> ReducedModel:
    """A model of ours alone as its family's class, with reducers."""
    family = FAMILIES.get(type(model))
    if family is None:
        raise setting_error("model", type(model).__name__, "timm's class of its family", "Leave out what changes it.")
    family.check(model)
    model.__class__ = family
    return model.become(method, settings)


def _split(method: str, family: type[ReducedModel], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's settings and timm's arguments, apart.

    Raises:
        ValueError: One is neither, and reads like a setting, or is one of another method.
    """
    names = setting_names(METHODS[method])
    others = {name for cls in METHODS.values() for name in setting_names(cls)}
    timms = {name: value for name, value in kwargs.items() if name not in names}
    known = _known_arguments(family)
    for name in timms:
        if name not in known and (nearest(name, names) or name in others):
            raise ValueError(
                f"{name}: neither {method} nor timm has such a setting, expected timm's or one of {', '.join(names)}. "
                f"{nearest(name, names) or 'It is of another method.'}"
            )
    return {name: value for name, value in kwargs.items() if name in names}, timms


def _known_arguments(cls: type) -> set[str]:
    """The names of the arguments of timm's class behind a reduced one."""
    classes = [base for base in cls.__mro__ if base.__module__.startswith("timm.")]
    return {name for base in classes for name in inspect.signature(base.__init__).parameters}


def _entrypoint(method: str, plain: str, name: str, family: type[ReducedModel]) -> Callable[..., nn.Module]:
    """timm's entrypoint of ``plain`` as one of a merging model."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        settings, timms = _split(method, family, kwargs)
        cfg = timms.get("pretrained_cfg")
        # weights of timm's registry are loaded by timm's own entrypoint, as it loads the plain model's
        of_timm = pretrained and not isinstance(cfg, dict) and not timms.get("pretrained_cfg_overlay")

        def make(**model_args: Any) -> ReducedModel:
            source = {"pretrained_cfg": cfg, "pretrained_cfg_overlay": timms.get("pretrained_cfg_overlay")}
            if of_timm:
                source.update(pretrained=True, cache_dir=timms.get("cache_dir"))
            size = model_args.pop("img_size", None) if family.any_size else None
            model = model_entrypoint(plain)(**source, **model_args)
            if size is not None:
                model.planned_size = to_2tuple(size)
            return _adopted(model, method, settings)

        wrapper = timms.get("feature_cls", "getter")
        if timms.get("features_only") and wrapper not in ("getter", FeatureGetterNet):
            raise setting_error("feature_cls", wrapper, "'getter'", "Leave it out: hooks of blocks see merged tokens.")
        return build_model_with_cfg(
            make,
            name,
            pretrained and not of_timm,
            pretrained_filter_fn=_filter_of(plain),
            feature_cfg={"feature_cls": "getter", **family.feature_settings(timms)},
            **timms,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"{method} on timm's ``{plain}``."
    return entry


def _filter_of(plain: str) -> Callable[..., Any]:
    """The checkpoint filter of timm's module for everything but what is ours."""
    module = sys.modules[model_entrypoint(plain).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", None)

    def keep_ours(state_dict: dict[str, Any], model: ReducedModel) -> dict[str, Any]:
        ours = {name: v for name, v in state_dict.items() if is_own(name)}
        theirs = {name: v for name, v in state_dict.items() if name not in ours}
        return {**(filter_fn(theirs, model) if filter_fn is not None else theirs), **ours}

    return keep_ours


def _register() -> None:
    short = {}
    for alias, plain in ALIASES.items():
        short.setdefault(plain, []).append(alias)
    for module, family in MODULES.items():
        for plain in list_models(module=module):
            if refusal(plain):
                continue
            cfgs = {cfg.tag or "": cfg for cfg in get_arch_pretrained_cfgs(plain).values()}
            for method, cls in METHODS.items():
                if not _fits(cls, family, plain):
                    continue
                for name in (plain, *short.get(plain, [])):
                    name = f"{method}_{name}"
                    entry = _entrypoint(method, plain, name, family)
                    default_cfgs[name] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=True)
                    setattr(sys.modules[__name__], name, register_model(entry))


_register()
