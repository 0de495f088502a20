"""What the LTM models of every timm family share: the settings, the switch, and the epochs of warm-up."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_ltm.merging import MergeConfig, TokenMerger
from timm_ltm.merging.config import PRESETS

__all__ = ["LTMModel", "fit_classes", "split_ltm_kwargs"]

register_notrace_module(TokenMerger)  # a leaf of FX graphs: its shapes are counted, not traced

_LTM_ARGUMENTS = ("preset", *(field.name for field in dataclasses.fields(MergeConfig)))
_on_created: list[Callable[[LTMModel], None]] = []  # training.py asks to be told of models to attach to
_on_loaded: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod] = weakref.WeakKeyDictionary()
_on_mode: weakref.WeakKeyDictionary[nn.Module, Callable[[bool], None]] = weakref.WeakKeyDictionary()


def split_ltm_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """LTM's arguments and timm's, apart. ``ltm_defaults`` are a variant's own, which a preset goes before."""
    ltm = {name: value for name, value in kwargs.items() if name in _LTM_ARGUMENTS}
    for name, value in kwargs.pop("ltm_defaults", {}).items():
        if name not in PRESETS.get(ltm.get("preset", "default"), {}):
            ltm.setdefault(name, value)
    return ltm, {name: value for name, value in kwargs.items() if name not in ltm}


def _fill_in(model: LTMModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: a plain timm checkpoint gets the model's own values for what LTM adds, and so loads strictly."""
    if model.num_classes < 2:
        for name, merger in model.mergers():
            saved = state_dict.get(f"{prefix}{name}.clusters.centroids")
            if saved is not None:
                merger.fit_clusters(saved)
    own = {f"{prefix}{name}": value for name, value in model.state_dict().items() if ".merger." in name}
    plain = not any(name in state_dict for name in own)  # else trained with LTM: but for clusters, a gap is an error
    for name, value in own.items():
        if plain or ".clusters." in name:
            state_dict.setdefault(name, value)


def _read_epoch_after_loading(model: LTMModel, _: Any) -> None:
    model._read_epoch()
    callback = _on_loaded[model]() if model in _on_loaded else None
    if callback is not None:
        callback()


def fit_classes(state_dict: dict[str, Any], model: LTMModel) -> dict[str, Any]:
    """Pretrained weights for another number of classes: what is tied to it starts anew, as timm's head does."""
    if model.num_classes < 2 and not model.merge_config.num_clusters:
        return state_dict  # nothing to be tied to: the clusters are the checkpoint's
    state_dict, own = dict(state_dict), model.state_dict()
    for name, _ in model.mergers():
        saved = {key: state_dict[key] for key in own if key.startswith(f"{name}.clusters.") and key in state_dict}
        log_q, centroids = f"{name}.clusters.log_q", f"{name}.clusters.centroids"
        if not model.merge_config.num_clusters and centroids in saved and len(saved[centroids]) != model.num_classes:
            state_dict.update({key: own[key] for key in saved})
        elif log_q in saved and saved[log_q].shape[1] != model.num_classes:
            state_dict[log_q] = own[log_q]
    return state_dict


class LTMModel(nn.Module):
    """Mixin of every LTM model, in front of timm's class.

    The constructor of the subclass sets ``merge_config`` and gives blocks their :class:`TokenMerger`, then calls
    :meth:`_finish_ltm`.
    """

    merge_config: MergeConfig
    collecting: bool = False  # set by ClusterRefresh

    def _finish_ltm(self, ltm_kwargs: dict[str, Any]) -> None:
        self.ltm_args = dict(ltm_kwargs)
        self._forced: bool | None = None
        self._epoch, self._merging = 0, False
        self._read_epoch()
        self.register_load_state_dict_pre_hook(_fill_in)
        self.register_load_state_dict_post_hook(_read_epoch_after_loading)
        for callback in _on_created:
            callback(self)

    def mergers(self) -> Iterator[tuple[str, TokenMerger]]:
        """The blocks' mergers by name, in the order they run."""
        for name, module in self.named_modules():
            if isinstance(module, TokenMerger):
                yield name, module

    @property
    def epoch(self) -> int:
        """Epochs of training behind, as last read from the model's buffers."""
        return self._epoch

    @property
    def merging(self) -> bool:
        """Whether a forward pass merges now."""
        return self._merging

    def set_merging(self, enable: bool | None = True) -> None:
        """Switch merging on or off. Off, the model is the plain timm model, bit for bit.

        Args:
            enable: ``None`` returns to the schedule: on after ``merge_warmup_epochs``.
        """
        self._forced = enable
        self._read_epoch()

    def train(self, mode: bool = True) -> LTMModel:
        self._read_epoch()  # an EMA copy's buffers change behind its back
        callback = _on_mode.get(self)
        if callback is not None:
            callback(mode)
        return super().train(mode)

    def _read_epoch(self) -> None:
        epoch = next((merger.epoch for _, merger in self.mergers()), None)
        if epoch is not None and not epoch.is_meta:
            self._epoch = int(epoch)
        # a plain flag: torch.compile would compile anew for every value of a counter
        after_warmup = self._epoch >= self.merge_config.merge_warmup_epochs
        self._merging = epoch is not None and (after_warmup if self._forced is None else self._forced)

    def _keep_parameters_in_graph(self, x: Tensor) -> Tensor:
        """Add zero times every LTM parameter: DistributedDataParallel wants gradients of all, also in warm-up."""
        if self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            first = [p.flatten()[:1] for _, merger in self.mergers() for p in merger.parameters()]
            if first:
                x = x + 0.0 * torch.cat(first).sum().to(x.dtype)
        return x
