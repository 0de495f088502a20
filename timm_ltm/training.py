"""Clusters and Q follow the training, committed at each epoch's end (Algorithm 1, line 11).

:class:`ClusterRefresh` serves anybody's loop; timm's tasks have theirs by themselves, see :mod:`timm_ltm.tasks`. A
model has one owner at a time: an explicit refresh goes before a task's, and several tasks of a model share theirs.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_ltm.models import base
from timm_ltm.models.base import ReducedModel, owner_of
from timm_ltm.models.saved import Reduction
from timm_ltm.reduction import Observer, Reducer
from timm_ltm.reduction.tokens import no_autocast

__all__ = ["ClusterRefresh"]

_logger = logging.getLogger(__name__)


class ClusterRefresh:
    """Collects features and labels while a merging model trains, refreshes clusters and Q, and counts its epochs.

    .. code-block:: python

        refresh = timm_ltm.ClusterRefresh(model)
        for epoch in range(epochs):
            model.train()
            for images, targets in loader:
                loss = criterion(model(images), targets) + refresh.loss(targets)
                ...
                refresh.step(targets)
            refresh.epoch_end()

    A model with ``merge_warmup_epochs`` begins to merge when that many epochs have ended. In the last one of warm-up
    features are collected, so that the first merged epoch starts with clusters.

    Args:
        model: A merging model, or a module that holds exactly one (DistributedDataParallel, a compiled module).
        num_classes: K of the targets; the model's own if not given.
        reservoir: Features kept per block to initialise clusters, to re-seed them and to fit T.
        seed: Of the reservoir and of k-means++. The training's random numbers are not touched.
        ema: An averaged copy of the model (timm's ``ModelEmaV3``), which is handed what is committed: an average of old
            and new clusters would be neither.

    Raises:
        ValueError: There is no merging model in ``model``, or the number of classes is unknown or does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        reservoir: int = 2048,
        seed: int = 0,
        ema: nn.Module | None = None,
    ) -> None:
        models = [module for module in model.modules() if isinstance(module, ReducedModel)]
        if len(models) != 1:
            raise ValueError(f"model: got {len(models)} merging models in {type(model).__name__}, expected one.")
        self.model, self.ema = models[0], ema
        self._given_classes, self._reservoir, self._seed = num_classes, reservoir, seed
        self.reducers: dict[str, Reducer] = {}
        self.observers: dict[str, Observer] = {}  # of what collects
        self.adding: dict[str, Observer] = {}  # of what adds to the loss
        self.running: dict[str, Any] = {}  # running sums, as each reducer makes them
        self.log_q: dict[str, Tensor] = {}  # (A, K) of each block's last commit, for the IB loss
        self.steps = 0  # training batches in this epoch
        self._waits = 0  # epochs of warm-up left, as last told
        self.skipped = 0  # images in all, left out for features that were not finite
        self.report: dict[str, dict[str, float]] = {}
        if any(reducer.collects for _, reducer in self.model.reducers()):
            self._classes()
        base.owners[self.model] = weakref.ref(self)
        self.on_loaded(self.model)

    def _classes(self) -> int:
        """K, as it is now: the head may have been replaced."""
        K = self.model.num_classes if self._given_classes is None else self._given_classes
        if K < 1:
            raise ValueError(f"num_classes: got {K}, expected 1 or more. Give the number of classes of the targets.")
        for name, reducer in self.model.reducers():
            if reducer.collects:
                reducer.check_classes(K, name)
        return K

    # What the model tells its owner

    def on_mode(self, model: ReducedModel, mode: bool) -> None:
        """The model's train() or eval(): an explicit refresh is told when an epoch ends."""

    def on_loaded(self, model: ReducedModel) -> None:
        """At the start, and after a checkpoint: reducers may be new, and the epoch another."""
        reducers = dict(model.reducers())
        if reducers != self.reducers:
            self.reducers, made = reducers, model.observers(new=True)
            self.observers = {name: observer for name, observer in made.items() if reducers[name].collects}
            self.adding = {name: observer for name, observer in made.items() if reducers[name].adds_loss}
            self.steps = 0
        if self.steps:
            return  # parameters that were set aside and put back, within an epoch
        self.running, self.log_q = {}, {}
        self._set_collecting()
        waits = model.warmup_left
        if waits and waits != self._waits:
            _logger.info("Plain training first: merging starts after %d more epochs.", waits)
        self._waits = waits

    def _set_collecting(self) -> None:
        """Collect in merged epochs and in the last one of warm-up."""
        self.model._read_epoch()
        self.collects = self.model.merging or self.model.warmup_left <= 1
        self.model.set_collecting(self.collects and bool(self.observers))

    @property
    def owns(self) -> bool:
        """Whether the model is refreshed by this, and not by one that was made later."""
        return owner_of(self.model) is self

    def _check_owner(self) -> None:
        if not self.owns:
            raise ValueError("model: its refresh is another, made later. Use that one, or make this one anew.")

    # A batch

    def _begin_epoch(self) -> None:
        """At an epoch's first batch, when the model is where and what it trains as."""
        self._set_collecting()
        self.running = {}
        for index, name in enumerate(self.observers if self.collects else ()):
            reducer = self.reducers[name]
            self.running[name] = reducer.running_sums(self._classes(), self._reservoir, self._seed + index)
            self.running[name].clear(self.model.epoch)

    def labels(self, targets: Tensor) -> None:
        """Before each forward pass of training: the labels that the printed Eq. 3 reads (``preset="paper"``)."""
        self._check_owner()
        if any(self.reducers[name].reads_labels for name in self.observers):
            one_hot = self._one_hot(targets)
            for observer in self.observers.values():
                observer.labels, observer.fresh = one_hot, True

    @property
    def adds_loss(self) -> bool:
        """Whether :meth:`loss` may be anything but zero."""
        return bool(self.adding) or bool(getattr(self.model.config, "ib_loss_weight", 0.0))

    def loss(self, targets: Tensor) -> Tensor:
        """After the forward pass of a training batch and before :meth:`step`: what the method adds to the loss.

        A budget that training aims at, of methods that have one, and :meth:`ib_loss`.

        Args:
            targets: As of :meth:`step`.

        Raises:
            ValueError: As of :meth:`ib_loss`.
        """
        shown = {name: observer.features for name, observer in self.adding.items() if observer.features is not None}
        for name, features in shown.items():
            self._check_gradient(name, features, "training loss")
        total = self.ib_loss(targets)
        if shown:  # nothing before merging starts
            total = total + type(self.reducers[next(iter(shown))]).training_loss([*shown.values()], self.model.config)
        return total

    def ib_loss(self, targets: Tensor) -> Tensor:
        """The information-bottleneck part of :meth:`loss` alone.

        ``ib_loss_weight`` times the IB bound of the pooled features that each block updates its mask from, summed over
        blocks, from ``ib_loss_start_epoch`` on; the bound's part that no mask changes is left out. Zero until Q was
        committed once, also after resuming.

        Args:
            targets: As of :meth:`step`.

        Raises:
            ValueError: Features have no gradient, as under re-entrant checkpoints, which are not timm's default.
        """
        config, total = self.model.config, torch.zeros((), device=targets.device)
        weight, start = getattr(config, "ib_loss_weight", 0.0), getattr(config, "ib_loss_start_epoch", 0)
        if weight and self.model.merging and self.model.epoch >= start:
            one_hot = self._one_hot(targets)
            for name, observer in self.observers.items():
                log_q = self.log_q.get(name)
                if observer.features is None or log_q is None or log_q.shape[1] != one_hot.shape[1]:
                    continue
                self._check_gradient(name, observer.features, "ib_loss_weight")
                with no_autocast(one_hot):
                    total = total + self.reducers[name].label_loss(observer.features, one_hot, log_q)
        return weight * total

    def _check_gradient(self, name: str, features: Tensor, what: str) -> None:
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.reducers[name].parameters())
        if trains and not features.requires_grad:
            raise ValueError(
                f"{what}: got features without gradient of {name}, expected some. Leave "
                "timm.layers.set_reentrant_ckpt at False."
            )

    @torch.no_grad()
    def step(self, targets: Tensor) -> None:
        """After the forward pass of a training batch.

        Args:
            targets: (B,) class indices, or (B, K) soft labels (Mixup, CutMix).

        Raises:
            ValueError: The targets do not fit the batch or the number of classes, or another refresh owns the model.
        """
        self._check_owner()
        one_hot = self._one_hot(targets) if self.observers else None
        for observer in self.observers.values():  # before anything is taken: a call that fails can be made again
            if observer.features is not None and len(observer.features) != len(one_hot):
                raise ValueError(
                    f"targets: got {len(one_hot)} for {len(observer.features)} images. Call step once after each "
                    "forward pass."
                )
        if not self.steps:
            self._begin_epoch()
        self.steps += 1
        for name, observer in self.observers.items():
            features, observer.fresh = observer.take(), False
            if features is not None and name in self.running:
                self.running[name].add(features, one_hot)
        for observer in self.adding.values():
            observer.take()

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

    # An epoch

    def epoch_end(self) -> dict[str, dict[str, float]]:
        """Commit C, T, R and the epoch counter. Under torch.distributed every process must call it.

        An epoch without a training batch, in any process, is none: calling this again changes nothing.

        Returns:
            For each block that collects: ``features``, ``entropy`` (mean entropy of phi over log A), ``skipped``,
            ``reseeded``.
        """
        self._check_owner()
        if not self._any_steps():
            return self.report
        if not self.steps:
            self._begin_epoch()  # a process without a batch still takes part
        self.report = {name: running.commit() for name, running in self.running.items()}
        self.log_q.update({name: running.log_q for name, running in self.running.items() if running.log_q is not None})
        was_merging = self.model.merging
        self.model.reduction.epoch += 1
        skipped = int(max((report["skipped"] for report in self.report.values()), default=0))
        if skipped and not self.skipped:
            warnings.warn(
                f"{skipped} images had features that are not finite; they were left out of the clusters' refresh.",
                stacklevel=2,
            )
        self.skipped += skipped
        self.steps, self.running = 0, {}
        self._set_collecting()
        self._hand_on()
        if self.model.merging and not was_merging:
            _logger.info("Merging starts, after %d epochs of plain training.", self.model.epoch)
        _logger.debug("clusters refreshed: %s", self.report)
        return self.report

    # Going on within an epoch

    def state_dict(self) -> dict[str, Any]:
        """What a run that stops within an epoch needs beside the model's checkpoint, to go on as if it never had."""
        running = {name: _values_of(sums) for name, sums in self.running.items()}
        return {"steps": self.steps, "skipped": self.skipped, "running": running, "log_q": dict(self.log_q)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, after the model's checkpoint was loaded."""
        self.steps = 0
        if state["steps"]:
            self._begin_epoch()
        for name, values in state["running"].items():
            for key, value in values.items():
                if isinstance(getattr(self.running[name], key), torch.Generator):
                    getattr(self.running[name], key).set_state(value.cpu())
                else:
                    setattr(self.running[name], key, value.clone() if isinstance(value, Tensor) else value)
        self.steps, self.skipped, self.log_q = state["steps"], state["skipped"], dict(state["log_q"])

    def _any_steps(self) -> bool:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.steps > 0
        steps = torch.tensor(self.steps, device=self.model.reduction.epoch.device)
        dist.all_reduce(steps)
        return int(steps) > 0

    @torch.no_grad()
    def _hand_on(self) -> None:
        """The averaged copy gets what was committed as it is."""
        for copy in [m for m in self.ema.modules() if isinstance(m, ReducedModel)] if self.ema is not None else []:
            for theirs, ours in zip(copy.modules(), self.model.modules(), strict=True):
                if isinstance(ours, (Reduction, Reducer)):
                    for old, new in zip(theirs.buffers(), ours.buffers(), strict=True):
                        old.copy_(new)
            copy._read_epoch()


def _values_of(sums: Any) -> dict[str, Any]:
    """Of a reducer's running sums; what they refresh is in the model's checkpoint."""
    values = {key: value for key, value in vars(sums).items() if not isinstance(value, nn.Module)}
    return {key: v.get_state() if isinstance(v, torch.Generator) else v for key, v in values.items()}
