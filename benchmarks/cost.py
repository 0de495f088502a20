"""GMACs and latency of LTM, of ToMe at the nearest GMACs and of the plain model, as a markdown table.

    python benchmarks/cost.py --batch 8 --rounds 10

Models of a family share one process and take turns in every round, in an order drawn anew: a machine that slows down
slows all of them. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import timm
import torch
from tome import tome_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_ltm  # noqa: F401  registers the models

HALF = {"vit_small_patch16_224": (0.72, 1.0, 1.0) * 4, "vit_base_patch16_224": (0.7, 1.0, 1.0) * 4}  # half the GMACs
MAPS = ["swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224", "mobilevit_xxs", "mobilevit_xs", "mobilevit_s"]
MAPS += ["efficientvit_b1.r224_in1k", "efficientvit_b1.r288_in1k"]
SLACK = {True: 0.03, False: 0.08}  # of the latency ratio over the GMACs ratio: of ViT, of models with maps
WARMUP = 2


@dataclass
class Entry:
    """A row of the table. Latencies are in ms."""

    name: str
    model: nn.Module
    gmacs: float
    latency: float = 0.0

    @property
    def parameters(self) -> float:
        """In millions."""
        return sum(p.numel() for p in self.model.parameters()) / 1e6


def count_gmacs(model: nn.Module, x: Tensor) -> float:
    """10^9 multiply-adds of one image (1, C, H, W), attention's products included."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9


def nearest_tome(name: str, target: float, x: Tensor) -> Entry:
    """ToMe at the r whose GMACs come nearest to ``target``."""
    model = tome_vit(name, 0).to(x).eval()
    best, distance = (0, 0.0), float("inf")
    for r in range(1, 65):
        for block in model.blocks:
            block.r = r
        gmacs = count_gmacs(model, x)
        if abs(gmacs - target) >= distance:
            break  # GMACs fall with r: from here on they move away
        best, distance = (r, gmacs), abs(gmacs - target)
    for block in model.blocks:
        block.r = best[0]
    return Entry(f"ToMe {name}, r={best[0]}", model, best[1])


def family(name: str, x: Tensor) -> tuple[Entry, list[tuple[Entry, Entry | None]]]:
    """The plain model, and LTM at its default ratio; of ViT at about half the GMACs too, each paired with ToMe."""
    model = timm.create_model(name).to(x).eval()
    plain, pairs, is_vit = Entry(name, model, count_gmacs(model, x)), [], "patch16" in name
    for settings in ({}, {"compression_ratio": HALF.get(name, (0.72, 1.0, 1.0) * 4)})[: 1 + is_vit]:
        model = timm.create_model(f"ltm_{name}", **settings).to(x).eval()
        label = f"ltm_{name}"
        if is_vit:
            ratios = model.block_ratios
            period = next(p for p in range(1, len(ratios) + 1) if ratios == ratios[:p] * (len(ratios) // p))
            short = f"{ratios[:period]} * {len(ratios) // period}" if period > 1 else ratios[0]
            label += f", compression_ratio={short}"
        ltm = Entry(label, model, count_gmacs(model, x))
        pairs.append((ltm, nearest_tome(name, ltm.gmacs, x) if is_vit else None))
    return plain, pairs


def measure(entries: list[Entry], x: Tensor, rounds: int, compiled: bool = False, seed: int = 0) -> None:
    """Set each entry's latency: its median over ``rounds`` forward passes of x (B, C, H, W), after warm-up."""
    torch._dynamo.reset()  # its limit of recompilations is per function, which all models of a family share
    models = [torch.compile(entry.model, dynamic=False) if compiled else entry.model for entry in entries]
    times: list[list[float]] = [[] for _ in entries]
    order, rng = list(range(len(entries))), random.Random(seed)

    def wait() -> None:
        if x.device.type != "cpu":
            getattr(torch, x.device.type).synchronize()

    with torch.inference_mode():
        for _ in range(WARMUP + rounds):
            rng.shuffle(order)
            for i in order:
                wait()
                start = time.perf_counter()
                models[i](x)
                wait()
                times[i].append(1e3 * (time.perf_counter() - start))
    for entry, series in zip(entries, times, strict=True):
        entry.latency = statistics.median(series[WARMUP:])


def table(plain: Entry, entries: list[Entry]) -> str:
    """Markdown, ratios to ``plain``."""
    lines = ["| model | GMACs | GMACs ratio | parameters (M) | latency ratio | latency (ms) |"]
    lines.append("|:---" + "|---:" * 5 + "|")
    for entry in entries:
        lines.append(
            f"| {entry.name} | {entry.gmacs:.3f} | {entry.gmacs / plain.gmacs:.3f} | {entry.parameters:.2f} "
            f"| {entry.latency / plain.latency:.3f} | {entry.latency:.1f} |"
        )
    return "\n".join(lines)


def facts(plain: Entry, ltm: Entry, tome: Entry | None) -> str:
    """What the table says of one pair."""
    latency, gmacs, slack = ltm.latency / plain.latency, ltm.gmacs / plain.gmacs, SLACK[tome is not None]
    follows = "yes" if latency <= gmacs + slack else "no"
    lines = [ltm.name, f"- latency ratio <= GMACs ratio + {slack}: {follows} ({latency:.3f}, {gmacs:.3f} + {slack})"]
    if tome is not None:
        no_slower = "yes" if ltm.latency <= tome.latency else "no"
        lines.append(
            f"- no slower than ToMe at equal GMACs: {no_slower} ({ltm.latency:.1f} ms at {ltm.gmacs:.2f} GMACs, "
            f"{tome.latency:.1f} ms at {tome.gmacs:.2f} GMACs)"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*HALF, *MAPS], help="plain timm models that have an ltm_ one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true", help="memory format of the models and images")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    args = parser.parse_args()

    torch.manual_seed(0)
    dd = {"device": torch.device(args.device), "dtype": getattr(torch, args.dtype)}
    threads = f", {torch.get_num_threads()} threads" if dd["device"].type == "cpu" else ""
    mode = ("compiled" if args.compile else "eager") + (", channels last" if args.channels_last else "")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.device}{threads}, {args.dtype}, {mode},")
    print(f"batch {args.batch}. Latency: median of {args.rounds} rounds; its ratio: of medians.")
    for name in args.models:
        size = timm.get_pretrained_cfg(name).input_size
        plain, pairs = family(name, torch.randn(1, *size, **dd))
        entries = [plain, *(entry for pair in pairs for entry in pair if entry is not None)]
        images = torch.randn(args.batch, *size, **dd)
        if args.channels_last:
            images = images.to(memory_format=torch.channels_last)
            for entry in entries:
                entry.model.to(memory_format=torch.channels_last)
        measure(entries, images, args.rounds, args.compile)
        print(f"\n{table(plain, entries)}\n")
        for pair in pairs:
            print(facts(plain, *pair))


if __name__ == "__main__":
    main()
