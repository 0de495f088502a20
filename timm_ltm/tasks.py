"""Under timm's own ``train.py`` nothing has to be called: its tasks get the refresh of a merging model by themselves.

A :class:`timm.task.TrainingTask` that is given a merging model attaches one, which reads the task's forward calls.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from timm_ltm.models import base
from timm_ltm.models.base import ReducedModel, owner_of
from timm_ltm.training import ClusterRefresh

__all__: list[str] = []

_logger = logging.getLogger(__name__)


class _TaskRefresh(ClusterRefresh):
    """The refresh of a timm task: targets from its forward calls, epochs from the model's train() and eval().

    The commit falls on the first train() or eval() after training batches, so that what is validated and saved at an
    epoch's end has the epoch's clusters. A train() behind a single update of the parameters is no end: loops call it
    before every batch. A loop that validates within epochs makes a :class:`ClusterRefresh` of its own.
    """

    def __init__(self, model: ReducedModel) -> None:
        super().__init__(model)
        self._updates, self._version = 0, 0  # of the parameters, since the last train() or eval()
        self.on_mode(model, True)

    def on_mode(self, model: ReducedModel, mode: bool) -> None:
        self._look_for_update()
        if self.steps and (not mode or self._updates > 1):
            self.epoch_end()
        self._updates = 0

    def step(self, targets: Tensor | None) -> None:
        self._look_for_update()
        super().step(targets)

    def _look_for_update(self) -> None:
        version = sum(p._version for p in self.model.parameters())
        self._updates += version != self._version
        self._version = version


class _Attached:
    """A task's hooks: they keep its refresh alive, and find the model anew where the task was given another."""

    def __init__(self, task: TrainingTask) -> None:
        self.refresh: _TaskRefresh | None = None
        task.register_forward_pre_hook(self.before, with_kwargs=True)
        task.register_forward_hook(self.after, with_kwargs=True)

    def __getstate__(self) -> dict[str, None]:
        return {"refresh": None}  # a copied task finds its own

    def before(self, task: TrainingTask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refresh = self._of(task)
        if refresh is not None:
            refresh.labels(_target(args, kwargs))

    def after(self, task: TrainingTask, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        refresh = self._of(task)
        if refresh is not None:
            target = _target(args, kwargs)
            if refresh.adds_loss:
                output["loss"] = output["loss"] + refresh.loss(target)
            refresh.step(target)

    def _of(self, task: TrainingTask) -> _TaskRefresh | None:
        """The refresh of the model that the task trains now; None where there is none, or another owner."""
        models = [m for m in task.get_trainable_module().modules() if isinstance(m, ReducedModel) and m.training]
        if len(models) != 1:
            return None
        (model,) = models
        owner = owner_of(model)
        if owner is None and model.needs_refresh():
            owner = _TaskRefresh(model)
        if not isinstance(owner, _TaskRefresh):
            return None  # explicit, or nothing to do
        if owner is not self.refresh:
            self.refresh = owner
            _logger.info("ClusterRefresh attached to %s.", type(task).__name__)
        owner.ema = task.get_trainable_module(ema=True)
        return owner


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs["target"] if "target" in kwargs else args[1] if len(args) > 1 else None


# Tasks are told by a hook that is called when modules are assigned to modules, never in a forward pass. It is there
# while a model lives that training would have to tend: made, copied, unpickled, or loaded.
_living: weakref.WeakSet[ReducedModel] = weakref.WeakSet()
_hook: Any = None
_looking = False


def _watch_for_tasks(model: ReducedModel) -> None:
    global _hook
    if not model.needs_refresh() or model in _living:
        return
    weakref.finalize(model, _release)
    _living.add(model)
    if _hook is None:
        _hook = register_module_module_registration_hook(_watch)


def _release() -> None:
    global _hook
    if _hook is not None and not len(_living) and not _looking:  # torch goes through its hooks then
        _hook.remove()
        _hook = None


def _watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    global _looking
    if child is None or not isinstance(parent, TrainingTask):
        return
    _looking = True
    try:
        attached = any(isinstance(getattr(h, "__self__", None), _Attached) for h in parent._forward_hooks.values())
        if not attached and any(isinstance(module, ReducedModel) for module in child.modules()):
            _Attached(parent)
    finally:
        _looking = False


base.on_created.append(_watch_for_tasks)
