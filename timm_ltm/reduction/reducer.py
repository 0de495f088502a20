"""What a method writes, and the registry of methods. A method knows this package alone, and no model.

One letter per axis: B batch, N tokens, P slots, D width, K width of the keys, H W grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from timm_ltm.reduction.masks import Mask
from timm_ltm.reduction.settings import Config, nearest, num_slots, setting_error
from timm_ltm.reduction.tokens import Tokens, fixed, no_autocast

__all__ = [
    "METHODS",
    "Config",
    "Observer",
    "Reducer",
    "Seen",
    "Site",
    "find_method",
    "form_of",
    "recomputing",
    "register_method",
    "setting_names",
]


class Site(NamedTuple):
    """Where in a model a reducer sits.

    Attributes:
        dim: D.
        tokens: N, or (H, W) of a map, that the block sees at the model's own input size.
        index: Of the block among the model's transformer blocks.
        first: It is the first that merges, of the model or of a stage.
        num_classes: Of the model's head, 0 without one.
        parts: Rows of the input in a row that are of one image and merged alike (the pixels of MobileViT's patches).
        depth: Of the model, how many transformer blocks it was built with.
        rotary: Positions rotate queries and keys.
    """

    dim: int
    tokens: int | tuple[int, int]
    index: int = 0
    first: bool = True
    num_classes: int = 0
    parts: int = 1
    depth: int = 1
    rotary: bool = False


class Seen(NamedTuple):
    """What a reducer may read of its block. A reducer gets what it :attr:`Reducer.needs`, None for the rest.

    Attributes:
        keys: (B parts, N, K) attention keys, the mean over heads, before any rotation, without gradient.
        inputs: X (B parts, N, D), the block's input.
        attention: (B parts, N) that each token receives, the mean over heads and over all queries that are not masked,
            the prefix among them. Behind proportional attention it is that of all the tokens it stands for. It costs
            the fused kernel.
    """

    keys: Tensor | None = None
    inputs: Tensor | None = None
    attention: Tensor | None = None


class Observer:
    """What a refresh asks a reducer for while training, and what it tells it. It belongs to the refresh.

    Attributes:
        features: (B, F) of the last training batch, None once taken.
        labels: (B, K) of the batch, for methods that read them.
        fresh: No forward pass has read these labels yet.

    Copies of a model are not observed: deepcopy and pickle leave None in its place.
    """

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.labels: Tensor | None = None
        self.fresh = False

    def take(self) -> Tensor | None:
        """The features, once."""
        features, self.features = self.features, None
        return features

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def recomputing() -> bool:
    """Whether this forward pass is torch.utils.checkpoint's, inside a backward pass: nothing is observed twice."""
    # in a compiled graph nothing in Python runs twice
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _nothing() -> None:
    return None


class Reducer(nn.Module):
    """Merges the tokens of one block. A method subclasses it, gives a :class:`Config` and writes :meth:`mask`.

    Args:
        site: Where it sits.
        amount: How much it merges, one of what :meth:`Config.amounts` returned: r of Section 3.1, P = ceil(r N), on
            maps (ceil(H sqrt r), ceil(W sqrt r)).
        config: The method's settings.
        device, dtype: Of its parameters.

    Attributes:
        needs: Names of :class:`Seen` that it reads.
        where: ``"between"`` attention and MLP, or ``"behind"`` the block.
        anchored: Every slot has the place of one token: rotary positions can be looked up there.
        maps: It reduces maps to maps.
        windows: It reduces maps whose attention is in windows.
        by_image: How many tokens it leaves depends on the image: :meth:`slots` returns the most.
        collects: It shows features to a refresh while training.
        reads_labels: It reads the labels of its batch while training.
        adds_loss: It shows its observer, while training, what :meth:`training_loss` is made of.
        untended: What goes wrong where nobody refreshes a model that is trained.
        observer: Set by the refresh that collects from it.
    """

    Config: ClassVar[type[Config]] = Config
    presets: ClassVar[dict[str, type[Reducer]]]
    method: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    where: ClassVar[str] = "between"
    anchored: ClassVar[bool] = True
    maps: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    by_image: ClassVar[bool] = False
    collects: bool = False
    reads_labels: ClassVar[bool] = False
    adds_loss: ClassVar[bool] = False
    untended: ClassVar[str] = "its clusters are never updated, so the learned part stays at zero"
    observer: Observer | None = None

    def __init__(
        self, site: Site, amount: float, config: Config, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.site, self.config = site, config
        self._amount = float(amount).as_integer_ratio()  # whole numbers: torch.compile may take floats for symbols

    @property
    def amount(self) -> float:
        """How much it merges, one of what :meth:`Config.amounts` returned."""
        return self._amount[0] / self._amount[1]

    @classmethod
    def weighs(cls, config: Config) -> bool:
        """Whether attention behind a merge is in proportion to sizes."""
        return False

    def slots(self, tokens: int | tuple[int, int]) -> int | tuple[int, int]:
        """P of N tokens, (H', W') of a map (H, W)."""
        if isinstance(tokens, tuple):
            return self.side_slots(tokens[0]), self.side_slots(tokens[1])
        return self.num_slots(tokens)

    def num_slots(self, num_tokens: int) -> int:
        """P = ceil(r N) of a sequence of N tokens."""
        return num_slots(num_tokens, self.amount)

    def side_slots(self, num_tokens: int) -> int:
        """ceil(n sqrt r) of the n tokens of a map's side."""
        return num_slots(num_tokens, self.amount**0.5)

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> Mask:
        """The mask of one block's tokens.

        Args:
            z: Attention output with its shortcut (B parts, N, D), or the block's output; without the prefix.
            tokens: What is known of them.
            seen: Of the block.
        """
        raise NotImplementedError

    def merge(self, mask: Mask, z: Tensor, tokens: Tokens, num_prefix: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B parts, num_prefix + N, D) merged by a mask, and how many attention counts each slot as.

        See :attr:`Tokens.weight`. A mask that drops no token but masks it has one.
        """
        return mask.merge(z, num_prefix, self.site.parts), getattr(mask, "weight", None)

    def carry(self, z: Tensor, tokens: Tokens, mask: Mask) -> Tensor | None:
        """What is handed on to the next reducer, see :attr:`Tokens.carried`."""
        return None

    def of_image(self, x: Tensor) -> Tensor:
        """(B parts, N, D) -> (B, N, D): the mean of what is merged alike."""
        if self.site.parts == 1:
            return x
        return x.reshape(-1, self.site.parts, fixed(x.shape[1]), fixed(x.shape[2])).mean(dim=1)

    def observe(self, z: Tensor, tokens: Tokens, seen: Seen) -> Tensor | None:
        """In warm-up: look at tokens (B parts, N, D) that are not merged. What is returned is carried on. No keys."""

    def forward(
        self, z: Tensor, tokens: Tokens, seen: Seen, num_prefix: int = 0, observe: bool = False
    ) -> tuple[Tensor, Tokens]:
        """Merge one block's tokens.

        Args:
            z: (B parts, num_prefix + N, D).
            tokens: Of the N.
            seen: Of the block, without the prefix.
            num_prefix: Class, register and distillation tokens in front.
            observe: Leave the tokens as they are, only look at them (warm-up).

        Returns:
            Merged tokens (B parts, num_prefix + P, D) and what is known of them.
        """
        if observe:
            with torch.no_grad(), no_autocast(z):
                return z, tokens._replace(carried=self.observe(z[:, num_prefix:], tokens, seen))
        mask = self.mask(z[:, num_prefix:], tokens, seen)
        grid, kept = getattr(mask, "grid", None), tokens.kept
        merged, weight = self.merge(mask, z, tokens, num_prefix)
        if kept is not None:
            kept = (*kept, (z[:, num_prefix:], merged[:, num_prefix:]))
        after = Tokens(
            mask.size,
            tokens.anchor.gather(1, mask.anchors()),
            tokens.start,
            grid,
            (*tokens.masks, mask),
            self.carry(z[:, num_prefix:], tokens, mask),
            weight,
            kept,
        )
        return merged, after

    def read_state(self) -> None:
        """When the model was loaded, refreshed or changes its mode: what buffers say that forward passes go by."""

    def reset_classes(self, num_classes: int) -> None:
        """A new head: what is tied to the old classes is forgotten."""

    def running_sums(self, num_classes: int, reservoir: int, seed: int) -> Any:
        """What adds up the features of an epoch, of a method that :attr:`collects`: with clear, add and commit.

        Args:
            num_classes: K of the targets.
            reservoir: Features that it may keep.
            seed: Of which ones.
        """
        raise NotImplementedError

    def label_loss(self, features: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
        """What features (B, F) of a batch add to the training loss, given labels (B, K) and log Q (A, K)."""
        raise NotImplementedError

    @classmethod
    def training_loss(cls, shown: list[Tensor], config: Config) -> Tensor:
        """What the blocks of a model together add to the training loss, of a method that :attr:`adds_loss`.

        Args:
            shown: What each block showed of the batch (B, F), in the order they run.
            config: The method's settings.
        """
        raise NotImplementedError

    @classmethod
    def planted(cls, model: nn.Module, config: Config) -> None:
        """When all blocks of a model have their reducers: what the settings ask of the model as a whole."""

    def check_classes(self, num_classes: int, name: str) -> None:
        """Before collecting with targets of K classes: ValueError if this reducer, of that name, is made for others."""

    def extra_repr(self) -> str:
        return f"amount={self.amount}"


METHODS: dict[str, type[Reducer]] = {}
R = TypeVar("R", bound=type[Reducer])


def register_method(name: str, preset: str | None = None) -> Callable[[R], R]:
    """Register a method by name, or a preset's own form of one that is registered."""

    def put(cls: R) -> R:
        if preset is None:
            METHODS[name], cls.presets = cls, {}
        else:
            METHODS[name].presets[preset] = cls
        cls.method = name
        return cls

    return put


def find_method(name: str, settings: dict[str, Any]) -> tuple[type[Reducer], Config]:
    """The reducer of a method, or of its ``preset``, and its settings.

    Args:
        name: Of the method.
        settings: As the user gave them.

    Raises:
        ValueError: There is no such method, preset or setting, or a setting is out of range.
    """
    if name not in METHODS:
        raise setting_error(
            "method", name, f"one of {tuple(METHODS)}", nearest(name, METHODS) or "Choose one of these."
        )
    cls, settings = METHODS[name], dict(settings)
    preset = settings.get("preset", "default")
    if preset != "default" or ("preset" in settings and not hasattr(cls.Config, "preset")):
        choices = ("default", *cls.presets)
        if not isinstance(preset, str) or preset not in choices or not cls.presets:
            expected = f"one of {choices}" if cls.presets else f"no preset: {name} has none"
            raise setting_error("preset", preset, expected, "Leave it out for the default.")
        cls = cls.presets.get(preset, cls)
    form = f"{name} with preset={preset!r}" if "preset" in settings else name
    return cls, cls.Config.from_settings(settings, form)


def form_of(name: str, config: Config) -> type[Reducer]:
    """The reducer of a method, or of the preset that its settings name."""
    cls = METHODS[name]
    return cls.presets.get(getattr(config, "preset", "default"), cls)


def setting_names(cls: type[Reducer]) -> list[str]:
    """The names of a method's settings, those of its presets included."""
    configs = [cls.Config, *(preset.Config for preset in cls.presets.values())]
    return list(dict.fromkeys(field.name for config in configs for field in dataclasses.fields(config)))
