"""What reducing models of every timm family share: planting reducers, the switch, warm-up, and what checkpoints carry.

torch.fx reads the annotations of forward passes, hence none of them postponed.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_ltm.models.budget import Scheduled
from timm_ltm.models.saved import Reduction, Saved
from timm_ltm.reduction import Config, Observer, Reducer, Site, Tokens, find_method, form_of

__all__ = ["MergeMasks", "ReducedModel", "owner_of", "owners", "plain_class"]


class Owner(Protocol):
    """What :mod:`timm_ltm.training` registers for a model that it trains."""

    def on_mode(self, model: "ReducedModel", mode: bool) -> None: ...

    def on_loaded(self, model: "ReducedModel") -> None: ...


# One owner of each model's refresh; weak, so that neither keeps the other alive.
owners: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]]" = weakref.WeakKeyDictionary()
on_created: list[Callable[["ReducedModel"], None]] = []  # training.py asks to be told of models to attach to


def owner_of(model: nn.Module) -> Owner | None:
    """Who refreshes this model while it trains."""
    reference = owners.get(model)
    return reference() if reference is not None else None


class MergeMasks(NamedTuple):
    """The masks of a batch of images, one entry per block that merges.

    Attributes:
        blocks: Their indices among the model's transformer blocks, as in ``compression_ratio``.
        masks: G (B, N, P) of each, columns sum to 1. N of a map is H W, row by row.
        accumulated: (B, H W, P) of each: the weight of every input token in every merged one, columns sum to 1. Input
            tokens are the image's patches; in models with stages, those of the map the stage began with.
        grids: (H, W) of these input tokens.
    """

    blocks: list[int]
    masks: list[Tensor]
    accumulated: list[Tensor]
    grids: list[tuple[int, int]]


def _load(model: "ReducedModel", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: settings that nobody told otherwise are the checkpoint's; a plain checkpoint is filled in."""
    model._take_over(state_dict, prefix)


def _loaded(model: "ReducedModel", _: Any) -> None:
    model._read_epoch()
    for callback in on_created:  # with the checkpoint's settings and epoch, training may have to tend it now
        callback(model)
    owner = owner_of(model)
    if owner is not None:
        owner.on_loaded(model)


class ReducedModel(Scheduled, Saved):
    """Mixin of every reducing model, in front of timm's class. A family writes the methods that raise.

    Attributes:
        weighs_sizes: Attention of this family can be in proportion to sizes.
        gives: What a reducer may read of its blocks, fields of :class:`~timm_ltm.reduction.Seen`.
        maps: Its tokens are maps, which merge stage by stage.
        lines: These merge along rows and columns.
        windows: Its attention is in windows of a map.
        rotary: Positions rotate its attention's queries and keys.
        any_size: timm's model has no size of its own: entrypoints take the ``img_size`` that merging is planned for.
        out_indices: Of ``features_only``, timm's default for the family.
        method: The method's name.
        config: Its settings.
        block_amounts: How much each transformer block merges, 1.0 for nothing.
        planned: :meth:`depths` and :meth:`default_ratios` of the model as it was built: timm may prune it.
    """

    weighs_sizes: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"keys", "inputs"})
    maps: ClassVar[bool] = False
    lines: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    rotary: bool = False
    out_indices: ClassVar[Any] = 3
    collecting: bool = False

    # What a family writes

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Before adopting a timm model.

        Raises:
            ValueError: Its blocks cannot merge; the reason is told.
        """

    @classmethod
    def feature_settings(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """timm's defaults of ``features_only``, for a model of these arguments."""
        return {"out_indices": cls.out_indices}

    def depths(self) -> list[int]:
        """Transformer blocks of each stage; of a model without stages, one number."""
        raise NotImplementedError

    def default_ratios(self) -> tuple[float, ...]:
        """The family's own schedule, one ratio per transformer block."""
        raise NotImplementedError

    def adopt(self) -> None:
        """Make timm's blocks, and what calls them, the family's own classes."""
        raise NotImplementedError

    def plan(self, put: Callable[..., Any]) -> None:
        """Call ``put(block, dim, tokens, first, parts)`` for every transformer block in order; it returns what is left.

        ``tokens`` are N, or (H, W), that the block sees at the model's input size; ``first`` begins a stage.
        """
        raise NotImplementedError

    @classmethod
    def takes(cls, method: type[Reducer]) -> bool:
        """Whether a method keeps the shape that this family's blocks need, and needs what they give."""
        keeps = (method.maps or not cls.maps) and (method.windows or not cls.windows)
        return keeps and method.needs <= cls.gives

    # Planting

    def become(self, method: str, settings: dict[str, Any]) -> "ReducedModel":
        """After adopting the class: adopt the blocks and plant the reducers of a method."""
        device = next((p.device for p in self.parameters()), None)
        cls, config = find_method(method, settings)
        self.adopt()
        self.planned = self.depths(), self.default_ratios()
        self.reduction = Reduction(dict(settings), device)
        self._forced: bool | None = None
        self._untended = 0  # forward passes of training that nobody refreshed
        self._merging = False
        self._epoch, self._budgets = 0, {}
        self.block_amounts = (1.0,) * sum(self.planned[0])
        self._plant(cls, config)
        self.register_load_state_dict_pre_hook(_load)
        self.register_load_state_dict_post_hook(_loaded)
        for callback in on_created:
            callback(self)
        return self

    def _plant(self, cls: type[Reducer], config: Config) -> None:
        """Give blocks their reducers: after timm's own initialisation, whose random numbers are the plain model's."""
        self._check_method(cls)
        self.method, self.config = cls.method, config
        self.block_amounts = self.amounts_of(config)
        if self._put_reducers(cls, config):
            ratio = self.config.compression_ratio or "the default"
            warnings.warn(
                f"compression_ratio: {ratio} merges nothing at this input size, where the number of tokens (of a map, "
                "of each side) is rounded up to what it was. Use less to merge in a block.",
                stacklevel=4,
            )
        cls.planted(self, config)
        self.reduction.write({"method": self.method, **self._settings()})
        self._read_epoch()

    def _put_reducers(self, cls: type[Reducer], config: Config) -> bool:
        """One in every block whose amount is not 1. True if there are some, and none of them merges anything."""
        amounts, behind, some, merges = iter(enumerate(self.block_amounts)), False, False, False

        def put(block: nn.Module, dim: int, tokens: Any, first: bool = False, parts: int = 1) -> Any:
            nonlocal behind, some, merges
            index, amount = next(amounts)
            behind = behind and not first  # a stage begins with tokens that the one before put back
            before, block.reducer, block.behind, block.parts = getattr(block, "reducer", None), None, behind, parts
            block.weighs = cls.weighs(config) and self.weighs_sizes
            block.num_prefix_tokens = getattr(self, "num_prefix_tokens", 0)
            if amount == 1:
                return tokens
            site = Site(dim, tokens, index, not behind, self.num_classes, parts, sum(self.planned[0]), self.rotary)
            like = next(block.parameters())
            block.reducer = cls(site, amount, config, device=like.device, dtype=like.dtype).train(self.training)
            _keep_parameters(before, block.reducer)
            left = block.reducer.slots(tokens)
            behind, some, merges = True, True, merges or left != tokens or cls.by_image
            return left

        self.plan(put)
        return some and not merges

    def _check_method(self, cls: type[Reducer]) -> None:
        name = plain_class(type(self)).__name__
        if not self.takes(cls):
            expected = f"merges {'windows of a map' if self.windows else 'maps, stage by stage'}"
            expected = expected if cls.needs <= self.gives else f"reads of a block only {sorted(self.gives)}"
            raise ValueError(
                f"method: got {cls.method} ({cls.__name__}) for {name}, expected one that {expected}. Use another one."
            )
        told = self.reduction.told
        for setting in cls.Config.of_weighing if not self.weighs_sizes else ():
            if setting in told:
                raise ValueError(
                    f"{setting}: got {told[setting]!r} for {name}, whose attention cannot be in proportion to sizes, "
                    "expected none. Leave it out."
                )

    def reducers(self) -> Iterator[tuple[str, Reducer]]:
        """The blocks' reducers by name, in the order they run."""
        for name, module in self.named_modules():
            if isinstance(module, Reducer):
                yield name, module

    @property
    def by_image(self) -> bool:
        """Whether how many tokens are left, and so what a forward pass costs, depends on the image."""
        return any(reducer.by_image for _, reducer in self.reducers())

    # The switch

    @property
    def epoch(self) -> int:
        """Epochs of training behind, as last read from the model's buffer."""
        return self._epoch

    @property
    def warmup_left(self) -> int:
        """Epochs of plain training still to come before merging begins."""
        return max(0, self.config.merge_warmup_epochs - self._epoch)

    @property
    def merging(self) -> bool:
        """Whether a forward pass merges now."""
        return self._merging

    def set_merging(self, enable: bool | None = True) -> None:
        """Switch merging on or off. Off, the model is the plain timm model, bit for bit.

        Args:
            enable: ``None`` returns to the schedule: on after ``merge_warmup_epochs``.
        """
        if enable is not None and not isinstance(enable, bool):
            raise ValueError(f"enable: got {enable!r}, expected True, False, or None for the schedule's.")
        self._forced = enable
        self._read_epoch()

    def _read_epoch(self) -> None:
        epoch = self.reduction.epoch
        self._epoch = 0 if epoch.is_meta else int(epoch)
        for _, reducer in self.reducers():
            reducer.read_state()
        # a plain flag: torch.compile would compile anew for every value of a counter
        after_warmup = self.warmup_left == 0
        reduces = any(amount != 1 for amount in self.block_amounts)
        self._merging = reduces and (after_warmup if self._forced is None else self._forced)
        self._tell_parts()

    def _tell_parts(self) -> None:
        """Whether it merges and collects now, to parts that timm's forward passes run."""

    def train(self, mode: bool = True) -> "ReducedModel":
        self._read_epoch()  # an EMA copy's buffers change behind its back
        owner = owner_of(self)
        if owner is not None:
            owner.on_mode(self, mode)
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for callback in on_created:  # a copy, or unpickled
            callback(self)

    # Training

    def needs_refresh(self) -> bool:
        """Whether training it needs somebody who counts its epochs, collects its features or adds to its loss."""
        reducers = [reducer for _, reducer in self.reducers()]  # none: it never merges, and waits for nothing
        warming = self._forced is None and self.warmup_left > 0 and bool(reducers)
        return warming or any(reducer.collects or reducer.adds_loss for reducer in reducers)

    def set_collecting(self, enable: bool) -> None:
        """Whether training batches are shown to reducers in warm-up too. The refresh calls this."""
        self.collecting = enable
        self._tell_parts()

    def observers(self, new: bool) -> dict[str, Observer]:
        """Give the reducers that show something new observers, or take theirs away."""
        made = {}
        for name, reducer in self.reducers():
            reducer.observer = None
            if new and (reducer.collects or reducer.adds_loss):
                made[name] = reducer.observer = Observer()
        return made

    def _observes(self) -> bool:
        """Merge nothing, but show the features to the refresh."""
        return self.collecting and self.training and not self.merging

    def _check_tended(self) -> None:
        """In a forward pass of training: say once that nobody counts epochs and collects."""
        if not self.training or torch.compiler.is_compiling() or self._untended > 1 or not torch.is_grad_enabled():
            return
        if owner_of(self) is not None or self._forced is False or not self.needs_refresh():
            return
        self._untended += 1
        if self._untended > 1:  # one alone is a look at a model that was just made, not training
            never = f"merging, planned after {self.warmup_left} epochs, will never start"
            lacks = never if self.warmup_left > 0 else form_of(self.method, self.config).untended
            warnings.warn(
                f"{type(self).__name__} trains without a refresh: {lacks}. Train it under a timm task, or with "
                "refresh = timm_ltm.ClusterRefresh(model), refresh.loss(targets) added to the loss, "
                "refresh.step(targets) after each batch and refresh.epoch_end().",
                stacklevel=3,
            )

    def _keep_parameters_in_graph(self, x: Tensor) -> Tensor:
        """Add zero times every parameter of reducers: DistributedDataParallel wants gradients of all, always."""
        self._check_tended()
        if self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            first = [p.flatten()[:1] for _, reducer in self.reducers() for p in reducer.parameters()]
            if first:
                x = x + 0.0 * torch.cat(first).sum().to(x.dtype)
        return x

    # Reports, heads, export

    def forward_masks(self, x: Tensor) -> MergeMasks:
        """The masks of images (B, C, H, W): of each block that merges, and accumulated back to the input's tokens.

        Of the model in eval, and merging whether it does so now or not: one in warm-up shows what it would do. What a
        refresh waits for stays.
        """
        found = MergeMasks([], [], [], [])

        def keep(reducer: Reducer, args: tuple[Any, ...], output: tuple[Tensor, Tokens]) -> None:
            tokens = output[1]
            found.blocks.append(reducer.site.index)
            found.masks.append(tokens.masks[-1].dense())
            whole = found.masks[-1] if len(tokens.masks) == 1 else found.accumulated[-1] @ found.masks[-1]
            found.accumulated.append(whole)  # B (H W) P
            found.grids.append(tokens.start)

        forced, reducers = self._forced, [reducer for _, reducer in self.reducers()]
        observers, modules = [reducer.observer for reducer in reducers], [m for m in self.modules() if m.training]
        hooks = [reducer.register_forward_hook(keep) for reducer in reducers]
        try:
            for reducer in reducers:
                reducer.observer = None
            for module in modules:  # not by eval(), which ends an epoch
                module.training = False
            self.set_merging(True)
            self.forward_features(x)
        finally:
            self.set_merging(forced)
            for module in modules:
                module.training = True
            for reducer, observer, hook in zip(reducers, observers, hooks, strict=True):
                reducer.observer = observer
                hook.remove()
        return found

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        super().reset_classifier(num_classes, *args, **kwargs)
        for _, reducer in self.reducers():
            reducer.reset_classes(num_classes)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            f"{type(self).__name__}: TorchScript is deprecated by torch and does not take a model that merges. Use "
            "torch.export, torch.onnx.export or torch.compile."
        )


def _keep_parameters(before: Reducer | None, after: Reducer) -> None:
    """Of a reducer that another one like it takes the place of: optimizers may know them."""
    old, new = (dict(r.named_parameters()) if r is not None else {} for r in (before, after))
    if {n: (p.shape, p.dtype) for n, p in old.items()} == {n: (p.shape, p.dtype) for n, p in new.items()}:
        for name, module in after.named_modules():
            if module._parameters:
                module._parameters.update(before.get_submodule(name)._parameters)


def plain_class(cls: type) -> type[nn.Module]:
    """timm's class behind a reduced one."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("timm."))
