"""What LTM costs while training, and saves: time of a step, of collecting and of the commit; memory; checkpoint size.

    python benchmarks/training.py

Each model trains in a process of its own for its peak memory; times are of one process, where plain model, LTM with
a refresh and LTM without take turns. Images and labels are random.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.methods.ltm import Clusters, RunningClusters

CLASSES = 1000


def make(name: str) -> nn.Module:
    """A model with an optimizer, in training."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return model


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, refresh: timm_ltm.ClusterRefresh | None = None) -> None:
    """Forward, backward, update."""
    loss = nn.functional.cross_entropy(model(x), y)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    if refresh is not None:
        refresh.step(y)


def times(name: str, batch: int, rounds: int) -> None:
    """Print the ratios of one pair of models."""
    size = timm.get_pretrained_cfg(name).input_size
    x, y = torch.randn(batch, *size), torch.randint(CLASSES, (batch,))
    plain, ltm, collecting = make(name), make(f"ltm_{name}"), make(f"ltm_{name}")
    refresh = timm_ltm.ClusterRefresh(collecting)
    for _ in range(2):
        step(collecting, x, y, refresh)
    refresh.epoch_end()  # clusters, as in every merged epoch but the first
    ltm.load_state_dict(collecting.state_dict())
    ways = {
        "plain": lambda: step(plain, x, y),
        "ltm": lambda: step(ltm, x, y),
        "collecting": lambda: step(collecting, x, y, refresh),
    }
    series: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            series[way].append(time.perf_counter() - start)
    median = {way: statistics.median(values[1:]) for way, values in series.items()}
    start = time.perf_counter()
    refresh.epoch_end()
    commit = time.perf_counter() - start

    cost = [gmacs(model.eval(), size) for model in (plain, ltm)]
    print(f"{name}, batch {batch}, {rounds} rounds")
    print(f"- step, LTM / plain: {median['collecting'] / median['plain']:.3f} (GMACs ratio {cost[1] / cost[0]:.3f})")
    print(f"- collecting / step: {100 * (median['collecting'] / median['ltm'] - 1):.1f} %")
    print(f"- commit / epoch of 1,000 steps: {100 * commit / (1000 * median['collecting']):.2f} % ({commit:.2f} s)")
    files = []
    for model in (plain, ltm):
        file = io.BytesIO()
        torch.save({"state_dict": model.state_dict(), "optimizer": model.optimizer.state_dict()}, file)
        files.append(file.tell())
    weights = [sum(t.numel() * t.element_size() for t in model.state_dict().values()) for model in (plain, ltm)]
    print(f"- checkpoint, LTM / plain: {files[1] / files[0]:.3f} with optimizer, {weights[1] / weights[0]:.3f} without")


def peak(name: str, batch: int) -> float:
    """GiB of resident memory at most, of a process that trains this model, above what it had before."""
    code = f"import training; training.train_alone({name!r}, {batch})"
    folder = Path(__file__).parent
    output = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return float(output.stdout.split()[-1])


def high_water() -> float:
    """GiB of resident memory this process had at most. Linux; getrusage would count its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def train_alone(name: str, batch: int) -> None:
    """The process of :func:`peak`."""
    x, y = torch.randn(batch, *timm.get_pretrained_cfg(name).input_size), torch.randint(CLASSES, (batch,))
    before = high_water()
    model = make(name)
    refresh = timm_ltm.ClusterRefresh(model) if name.startswith("ltm_") else None
    for _ in range(3):
        step(model, x, y, refresh)
    print(high_water() - before)


def memory_of_collecting() -> None:
    """Bytes that one block's running sums hold after 1k, 10k and 100k images."""
    running = RunningClusters(Clusters(64, 512), CLASSES)
    seen = 0
    for images in (1_000, 10_000, 100_000):
        while seen < images:
            running.add(torch.randn(1000, 512), nn.functional.one_hot(torch.randint(CLASSES, (1000,)), CLASSES))
            seen += 1000
        held = sum(t.numel() * t.element_size() for t in vars(running).values() if isinstance(t, torch.Tensor))
        print(f"- {images:>7} images: {held / 2**20:.1f} MiB")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "mobilevit_s"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, cpu, {torch.get_num_threads()} threads")
    for name in args.models:
        times(name, args.batch, args.rounds)
        memory = [peak(model, args.batch) for model in (name, f"ltm_{name}")]
        print(f"- peak memory, LTM / plain: {memory[1]:.2f} / {memory[0]:.2f} GiB = {memory[1] / memory[0]:.3f}")
    print("memory of collecting, one block, 512 features, 1,000 classes")
    memory_of_collecting()


if __name__ == "__main__":
    main()
