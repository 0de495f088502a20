"""Training with LTM: clusters and Q collected while training, committed at each epoch's end (Algorithm 1, line 11).

:class:`ClusterRefresh` serves anybody's loop. Under timm's own ``train.py`` nothing has to be called: an LTM model that
becomes part of a :class:`timm.task.TrainingTask` gets its refresh by itself, from the task's forward calls.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from timm_ltm.merging import RunningClusters
from timm_ltm.merging.update import no_autocast
from timm_ltm.models import _common
from timm_ltm.models._common import LTMModel

__all__ = ["ClusterRefresh"]

_logger = logging.getLogger(__name__)


class ClusterRefresh:
    """Collects features and labels while an LTM model trains, and refreshes its clusters and Q once per epoch.

    .. code-block:: python

        refresh = timm_ltm.ClusterRefresh(model)
        for epoch in range(epochs):
            model.train()
            for images, targets in loader:
                loss = criterion(model(images), targets)
                ...
                refresh.step(targets)
            refresh.epoch_end()

    Counts epochs too: a model with ``merge_warmup_epochs`` begins to merge when that many have ended. In the last epoch
    of warm-up features are collected, so that the first merged epoch starts with clusters.

    Args:
        model: An LTM model, or a module that holds exactly one (DistributedDataParallel, a compiled module).
        num_classes: K; the model's own if not given.
        reservoir: Features kept per block to initialise clusters, to re-seed them and to fit T.
        seed: Of the reservoir and of k-means++. The training's random numbers are not touched.

    Raises:
        ValueError: There is no LTM model in ``model``, or the number of classes is unknown.
    """

    def __init__(self, model: nn.Module, num_classes: int | None = None, reservoir: int = 2048, seed: int = 0) -> None:
        models = [module for module in model.modules() if isinstance(module, LTMModel)]
        if len(models) != 1:
            raise ValueError(f"model: got {len(models)} LTM models in {type(model).__name__}, expected one.")
        self.model = models[0]
        self._given_classes, self._reservoir, self._seed = num_classes, reservoir, seed
        self.mergers = dict(self.model.mergers())
        self.running: dict[str, RunningClusters] = {}
        self.steps = 0  # training batches in this epoch
        self.skipped = 0  # images in all, left out for features that were not finite
        self.report: dict[str, dict[str, float]] = {}
        self._classes()
        _pending.discard(self.model)
        _release()
        self._set_collecting()
        _common._on_loaded[self.model] = weakref.WeakMethod(self._set_collecting)

    def _classes(self) -> int:
        """K, as it is now: the head may have been replaced."""
        K = self.model.num_classes if self._given_classes is None else self._given_classes
        if K < 1:
            raise ValueError(f"num_classes: got {K}, expected 1 or more. Give the number of classes of the targets.")
        return K

    def _set_collecting(self) -> None:
        """Collect in merged epochs and in the last one of warm-up: at an epoch's start, and after a checkpoint."""
        if self.steps:
            return
        self.model._read_epoch()
        self.model.set_collecting(self.model.epoch + 1 >= self.model.merge_config.merge_warmup_epochs)

    def _begin_epoch(self) -> None:
        """At an epoch's first batch, when the model is where and what it trains as."""
        config = self.model.merge_config
        self.running = {}
        for index, (name, merger) in enumerate(self.mergers.items()):
            if merger.collecting:
                self.running[name] = RunningClusters(
                    merger.clusters,
                    self._classes(),
                    temperature=config.temperature,
                    normalize=config.update_scale == "normalized",
                    reservoir=self._reservoir,
                    seed=self._seed + index,
                )
                self.running[name].clear(self.model.epoch)

    def labels(self, targets: Tensor) -> None:
        """Before each forward pass: the labels that the literal Eq. 3 reads (``labels="true"``)."""
        if self.model.merge_config.labels == "true":
            for merger in self.mergers.values():
                merger.labels = targets

    def ib_loss(self, targets: Tensor) -> Tensor:
        """After the forward pass of a training batch and before :meth:`step`: what to add to the loss.

        ``ib_loss_weight`` times the IB bound of the pooled features that each block updates its mask from, summed over
        blocks, from ``ib_loss_start_epoch`` on; the bound's part that no mask changes is left out. Zero until clusters
        are there. Recomputed activations (gradient checkpointing) have to be of the non-reentrant kind, timm's default.

        Args:
            targets: As of :meth:`step`.
        """
        config, total = self.model.merge_config, torch.zeros((), device=targets.device)
        if config.ib_loss_weight and self.model.merging and self.model.epoch >= config.ib_loss_start_epoch:
            one_hot = self._one_hot(targets)
            for merger in self.mergers.values():
                if merger.features is not None:
                    with no_autocast(one_hot):
                        total = total + merger.clusters.label_term(merger.features, one_hot)
        return config.ib_loss_weight * total

    @torch.no_grad()
    def step(self, targets: Tensor) -> None:
        """After the forward pass of a training batch.

        Args:
            targets: (B,) class indices, or (B, K) soft labels (Mixup, CutMix).

        Raises:
            ValueError: The targets do not fit the batch or the number of classes.
        """
        one_hot = self._one_hot(targets)
        for merger in self.mergers.values():  # before anything is taken: a call that fails can be made again
            if merger.features is not None and len(merger.features) != len(one_hot):
                raise ValueError(
                    f"targets: got {len(one_hot)} for {len(merger.features)} images. Call step once after each "
                    "forward pass."
                )
        if not self.steps:
            self._begin_epoch()
        self.steps += 1
        for name, running in self.running.items():
            merger = self.mergers[name]
            features, merger.features = merger.features, None
            if features is not None:
                running.add(features, one_hot)

    def _one_hot(self, targets: Tensor) -> Tensor:
        K = self._classes()
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets: got {targets!r}, expected a tensor of labels, one per image.")
        if targets.ndim == 2 and targets.shape[1] == K:
            return targets.float()
        if targets.ndim == 1 and not targets.is_floating_point():
            if targets.device.type == "cpu" and (targets >= K).any():  # elsewhere the check would wait for the device
                raise ValueError(f"targets: got class {int(targets.max())}, expected less than {K}, negative for none.")
            return (targets.unsqueeze(1) == torch.arange(K, device=targets.device)).float()
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)} of {targets.dtype}, expected (B,) class indices or "
            f"(B, {K}) soft labels."
        )

    def epoch_end(self) -> dict[str, dict[str, float]]:
        """Commit C, T, R and the epoch counter. Under torch.distributed every process must call it.

        Returns:
            For each block that merges: ``features``, ``entropy`` (mean entropy of phi over log A), ``skipped``,
            ``reseeded``.
        """
        if not self.steps:
            self._begin_epoch()  # a process without a batch still takes part
        self.report = {name: running.commit() for name, running in self.running.items()}
        for merger in self.mergers.values():
            merger.epoch += 1
        skipped = int(max((report["skipped"] for report in self.report.values()), default=0))
        if skipped and not self.skipped:
            warnings.warn(
                f"{skipped} images had features that are not finite; they were left out of the clusters' refresh.",
                stacklevel=2,
            )
        self.skipped += skipped
        self.steps, self.running = 0, {}
        self._set_collecting()
        _logger.debug("clusters refreshed: %s", self.report)
        return self.report

    @torch.no_grad()
    def _hand_on(self, ema: nn.Module | None) -> None:
        """An EMA copy gets the committed clusters as they are: an average of old and new ones would be neither."""
        for copy in [module for module in ema.modules() if isinstance(module, LTMModel)] if ema is not None else []:
            for name, merger in copy.mergers():
                for buffer, new in zip(merger.buffers(), self.mergers[name].buffers(), strict=True):
                    buffer.copy_(new)

    def attach(self, task: TrainingTask) -> None:
        """Be called by a timm task: targets from its forward calls, epochs from the model's train() and eval().

        The commit falls on the first train() or eval() after a training batch, so that what is validated and saved at
        an epoch's end has the epoch's clusters.
        """

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.model.training:
                self.labels(_target(args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.model.training:
                target = _target(args, kwargs)
                if self.model.merge_config.ib_loss_weight:
                    output["loss"] = output["loss"] + self.ib_loss(target)
                self.step(target)

        task.register_forward_pre_hook(before, with_kwargs=True)
        task.register_forward_hook(after, with_kwargs=True)
        refresh = weakref.ref(self)  # the task's hooks keep it alive, and with it the model
        owner = weakref.ref(task)

        def on_mode(_: bool) -> None:
            alive, task = refresh(), owner()
            if alive is not None and task is not None and alive.steps:
                alive.epoch_end()
                alive._hand_on(task.get_trainable_module(ema=True))

        _common._on_mode[self.model] = on_mode


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["target"] if "target" in kwargs else args[1]


# An LTM model waits here until it becomes part of a timm task. The hook that watches for it is called when modules are
# assigned to modules, never in a forward pass, and is there only while a model waits.
_pending: weakref.WeakSet[LTMModel] = weakref.WeakSet()
_hook: Any = None


def _wait(model: LTMModel) -> None:
    global _hook
    weakref.finalize(model, _release)  # before the set's own callback, which runs first then
    _pending.add(model)
    if _hook is None:
        _hook = register_module_module_registration_hook(_watch)


def _release() -> None:
    global _hook
    if _hook is not None and not len(_pending):
        _hook.remove()
        _hook = None


def _watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if not isinstance(parent, TrainingTask) or child is None:
        return
    for model in [module for module in child.modules() if module in _pending]:
        if model.num_classes > 0:
            ClusterRefresh(model).attach(parent)
            _logger.info("ClusterRefresh attached to %s.", type(parent).__name__)
        _pending.discard(model)
    _release()


_common._on_created.append(_wait)
