"""What a merging model's checkpoints carry beside its parameters, and what a model takes over from one."""

import dataclasses
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from timm_ltm.reduction import Config, find_method, form_of

__all__ = ["Reduction", "Saved", "is_own"]


class Reduction(nn.Module):
    """What a reducing model's checkpoints carry beside its parameters: method, schedule, settings and epochs behind.

    Attributes:
        told: The settings that the user gave, as given.
        said: What was warned about.
        epoch: Epochs of training behind.
        settings: UTF-8 of JSON, (L,) of uint8: a buffer that EMA, safetensors and process groups hand on unchanged.
    """

    def __init__(self, told: dict[str, Any], device: Any = None) -> None:
        super().__init__()
        self.told = told
        self.said: set[str] = set()
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("settings", torch.zeros(0, dtype=torch.uint8, device=device))

    def write(self, settings: dict[str, Any]) -> None:
        """Remember the settings."""
        text = json.dumps(settings, sort_keys=True).encode()
        self.settings = torch.tensor(list(text), dtype=torch.uint8, device=self.settings.device)

    @staticmethod
    def read(settings: Tensor) -> dict[str, Any]:
        """The settings in a checkpoint; averages of several checkpoints are floats.

        Raises:
            ValueError: They are none, as an average of checkpoints with different ones.
        """
        try:
            return json.loads(bytes(settings.double().round().to(torch.uint8).tolist()))
        except ValueError:
            raise ValueError(
                "reduction.settings: got what is no settings, expected those of one model. Average checkpoints of one "
                "model only, or delete the entry to keep this model's settings."
            ) from None


class Saved(nn.Module):
    """Mixin of :class:`~timm_ltm.models.base.ReducedModel`: loading. Settings that nobody told are the checkpoint's.

    Reducers that a checkpoint's settings change are made anew, so load before making an optimizer; of those that keep
    their shapes the parameters are kept.
    """

    def _settings(self, config: Config | None = None) -> dict[str, Any]:
        """All settings as JSON has them, the schedule with one entry per block."""
        config = self.config if config is None else config
        settings = {**dataclasses.asdict(config), **config.setting_of(self.amounts_of(config))}
        return json.loads(json.dumps({name: value for name, value in settings.items() if name not in config.unsaved}))

    def _take_over(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Before loading: settings from the checkpoint, and what it lacks of ours as we have it."""
        before = form_of(self.method, self.config), self.config
        try:
            self._fill_in(state_dict, prefix)
        except ValueError:
            if self.config is not before[1]:  # as if nothing had been loaded
                self._plant(*before)
            raise

    def _fill_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        saved = state_dict.get(f"{prefix}reduction.settings")
        if saved is not None and saved.is_meta:
            saved = None
        differing = self._adjust(Reduction.read(saved)) if saved is not None else {}
        own = {f"{prefix}{name}": value for name, value in self.state_dict().items() if is_own(name)}
        theirs = {name for name in state_dict if name.startswith(prefix) and is_own(name.removeprefix(prefix))}
        self._check_blocks(*({n.removeprefix(prefix) for n in names if ".reducer." in n} for names in (own, theirs)))
        for name in own.keys() & theirs:
            if differing and ".reducer." in name and own[name].shape != state_dict[name].shape:
                there = ", ".join(f"{n}={value!r}" for n, value in differing.items())
                raise ValueError(
                    f"{' or '.join(differing)}: with what this model was told, {name} has shape "
                    f"{tuple(own[name].shape)}, expected the checkpoint's {tuple(state_dict[name].shape)}, learned "
                    f"with {there}. Leave it out to take over the checkpoint's."
                )
        for name, value in own.items():
            state_dict.setdefault(name, value)
        self.reduction.write({"method": self.method, **self._settings()})  # a model from "meta" may hold anything there
        state_dict[f"{prefix}reduction.settings"] = self.reduction.settings
        for name in theirs - own.keys():  # of a method or form that learns more
            del state_dict[name]

    def _say_once(self, message: str) -> None:
        if message not in self.reduction.said:
            self.reduction.said.add(message)
            warnings.warn(message, stacklevel=2)

    def _check_blocks(self, own: set[str], theirs: set[str]) -> None:
        """ValueError if the learned masks of a checkpoint are of other blocks than this model's, which has some."""
        here, there = ({name.split(".reducer.")[0] for name in names} for names in (own, theirs))
        here, there = ({name for name in names if name in dict(self.named_modules())} for names in (here, there))
        if here and there and here != there:
            told = next((name for name in self.config.scheduled if name in self.reduction.told), "compression_ratio")
            raise ValueError(
                f"{told}: got one that merges in {sorted(here)}, expected {sorted(there)}, the blocks whose "
                "learned masks the checkpoint has. Leave it out to take over the checkpoint's."
            )

    def _adjust(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Take over a checkpoint's settings but for those told. Those told otherwise, which is said once."""
        method, told = saved.pop("method"), dict(self.reduction.told)
        if method != self.method:
            self._say_once(
                f"The checkpoint was saved with method {method!r}, this model merges by {self.method!r}: what the two "
                "share is loaded."
            )
            return {}
        form = {"preset": saved["preset"]} if "preset" in saved and "preset" not in told else {}
        cls, empty = find_method(method, {**form, **{n: told[n] for n in told if n == "preset"}})
        names = {field.name for field in dataclasses.fields(empty)}
        scheduled = set(cls.Config.scheduled)  # they say the same: who told one told all
        fixed = told.keys() | (scheduled if told.keys() & scheduled else set())
        for name in scheduled & saved.keys():  # of a model that was pruned before it merged
            saved[name] = saved[name][: sum(self.planned[0])] if isinstance(saved[name], list) else saved[name]
        taken = {name: value for name, value in saved.items() if name in names - fixed and value is not None}
        cls, config = find_method(method, {**taken, **told})
        settings = self._settings(config)
        differing = {name: saved[name] for name in sorted(fixed & saved.keys()) if settings.get(name) != saved[name]}
        if differing:
            both = {name: _apart(settings.get(name), value) for name, value in differing.items()}
            here = ", ".join(f"{name} {ours} here, {theirs} there" for name, (ours, theirs) in both.items())
            self._say_once(f"The checkpoint was saved with other settings than this model was told to have: {here}.")
        if settings != self._settings():
            self._plant(cls, config)
        return differing


def _apart(*values: Any) -> list[Any]:
    """Two settings to be told apart by a reader: ratios to three decimals, where these differ."""
    short = [[round(of, 3) for of in value] if isinstance(value, list) else value for value in values]
    return short if short[0] != short[1] else list(values)


def is_own(name: str) -> bool:
    """Whether a name in a state dict is not timm's."""
    return ".reducer." in name or name.startswith("reduction.")
