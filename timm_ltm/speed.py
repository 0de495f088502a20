"""How long models take and how much memory, taking turns: a machine that slows down slows all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["latencies", "peak_memory", "times_of"]

WARMUP = 2


def latencies(
    models: Mapping[str, Callable[[Tensor], Any]],
    x: Tensor,
    rounds: int = 10,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, float]:
    """Milliseconds of a forward pass of x (B, C, H, W): each model's median, see :func:`times_of`."""
    times = times_of(models, x, rounds, seed, progress)
    return {name: statistics.median(series) for name, series in times.items()}


def times_of(
    models: Mapping[str, Callable[[Tensor], Any]],
    x: Tensor,
    rounds: int = 10,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Milliseconds of a forward pass of x (B, C, H, W), of every round after two of warm-up.

    Args:
        models: By name; each runs once in every round, in an order drawn anew.
        x: On the models' device.
        rounds: That count.
        seed: Of the orders.
        progress: Wraps the rounds, to show them.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    order, rng = list(models), random.Random(seed)

    def wait() -> None:
        if x.device.type != "cpu":
            getattr(torch, x.device.type).synchronize()

    with torch.inference_mode():
        for _ in progress(range(WARMUP + rounds)):
            rng.shuffle(order)
            for name in order:
                wait()
                start = time.perf_counter()
                models[name](x)
                wait()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: series[WARMUP:] for name, series in times.items()}


@torch.no_grad()
def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors alive at once in a forward pass of x, without parameters and input: the largest sum.

    The same on every device; what a kernel takes for itself is not in it.
    """
    with _Alive() as alive:
        model(x)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts what tensors that operations made hold, while they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if _stored(t)}
        out = func(*args, **(kwargs or {}))
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        for tensor in pytree.tree_leaves(out):
            if not _stored(tensor):
                continue
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref not in known:  # else a view of what came in, a parameter perhaps
                self._held[ref] = storage.nbytes()
        self.peak = max(self.peak, sum(self._held.values()))
        return out


def _stored(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
