"""What a merging model's checkpoints carry beside its parameters, and what a model takes over from one."""

import dataclasses
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from timm_ltm.reduction import find_method

__all__ = ["Reduction", "Saved", "is_own"]


class Reduction(nn.Module):
    """What a reducing model's checkpoints carry beside its parameters: method, schedule, settings and epochs behind.

    Attributes:
        epoch: Epochs of training behind.
        settings: UTF-8 of JSON, (L,) of uint8: a buffer that EMA, safetensors and process groups hand on unchanged.
    """

    def __init__(self, told: dict[str, Any], device: Any = None) -> None:
        super().__init__()
        self.told = told
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("settings", torch.zeros(0, dtype=torch.uint8, device=device))

    def write(self, settings: dict[str, Any]) -> None:
        """Remember the settings."""
        text = json.dumps(settings, sort_keys=True).encode()
        self.settings = torch.tensor(list(text), dtype=torch.uint8, device=self.settings.device)

    @staticmethod
    def read(settings: Tensor) -> dict[str, Any]:
        """The settings in a checkpoint; averages of several checkpoints are floats."""
        return json.loads(bytes(settings.to(torch.uint8).tolist()))


class Saved(nn.Module):
    """Mixin of :class:`~timm_ltm.models.base.ReducedModel`: loading. Settings that nobody told are the checkpoint's."""

    def _settings(self) -> dict[str, Any]:
        """All settings, the schedule with one entry per block."""
        return {**dataclasses.asdict(self.config), **self.config.schedule(self.block_amounts)}

    def _take_over(self, state_dict: dict[str, Any], prefix: str) -> None:
        saved = state_dict.get(f"{prefix}reduction.settings")
        if saved is not None:
            self._adjust(Reduction.read(saved))
        own = {f"{prefix}{name}": value for name, value in self.state_dict().items() if is_own(name)}
        theirs = {name for name in state_dict if name.startswith(prefix) and is_own(name.removeprefix(prefix))}
        learned = {name for name in theirs if ".reducer." in name}
        missing = {name for name in own if ".reducer." in name and name not in state_dict}
        if learned and missing:
            blocks = sorted({name.split(".reducer.")[0].removeprefix(prefix) for name in learned})
            raise ValueError(
                f"compression_ratio: this model merges in {[name for name, _ in self.reducers()]}, the checkpoint has "
                f"learned masks of {blocks}. Leave compression_ratio out to take over the checkpoint's, or merge in the "
                "same blocks."
            )
        for name, value in own.items():
            state_dict.setdefault(name, value)
        state_dict[f"{prefix}reduction.settings"] = self.reduction.settings
        for name in theirs - own.keys():  # of a method or form that learns more
            del state_dict[name]

    def _adjust(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's settings but for those told otherwise, which is said once."""
        method, told = saved.pop("method"), self.reduction.told
        if method != self.method:
            _say_once(
                f"The checkpoint was saved with method {method!r}, this model merges by {self.method!r}: what the two "
                "share is loaded."
            )
            return
        now = {name: list(value) if isinstance(value, tuple) else value for name, value in self._settings().items()}
        other = {name for name, value in saved.items() if now.get(name) != value}
        schedule = set(self.config.schedule(self.block_amounts))
        if schedule & told.keys():  # two settings say the same: who is told one is told both
            schedule |= other & {"compression_ratio", "r"}
        kept = {name for name in other if name in told or (name in schedule & other and schedule & told.keys())}
        if kept:
            differing = ", ".join(f"{name} {now.get(name)} here, {saved[name]} there" for name in sorted(kept))
            _say_once(f"The checkpoint was saved with other settings than this model was told to have: {differing}.")
        if other - kept and "preset" not in kept:
            taken = {name: value for name, value in saved.items() if name not in kept and value is not None}
            self._plant(*find_method(self.method, {**taken, **{name: told[name] for name in kept & told.keys()}}))


def is_own(name: str) -> bool:
    """Whether a name in a state dict is not timm's."""
    return ".reducer." in name or name.startswith("reduction.")


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)
