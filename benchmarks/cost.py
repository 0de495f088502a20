"""GMACs, parameters and latency of merging models next to the plain one, as a markdown table.

    python benchmarks/cost.py --batch 8 --rounds 10
    python benchmarks/cost.py --models vit_small_patch16_224 --merge ltm --merge "tome r=6"

Models of a row share one process and take turns in every round, in an order drawn anew: a machine that slows down slows
all of them. Weights are random, and so are clusters: as in a trained model, the update is computed.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import timm_ltm
from timm_ltm.cli.common import CommandError, one_line, settings_of
from timm_ltm.cost import gmacs
from timm_ltm.speed import latencies

MODELS = ["vit_small_patch16_224", "vit_base_patch16_224"]
MODELS += ["swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"]
MODELS += ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s", "efficientvit_b1.r224_in1k", "efficientvit_b1.r288_in1k"]


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


def entries(name: str, merges: list[str], dd: dict[str, object]) -> list[Entry]:
    """The plain model, and one for each of ``merges``: a method and its settings, as the command line gives them."""
    plain = timm.create_model(name, **dd).eval()
    size = timm.get_pretrained_cfg(name).input_size
    found = [Entry(name, plain, gmacs(plain, size))]
    for merge in merges:
        method, *settings = merge.split()
        model = with_clusters(timm_ltm.convert(plain, method, **settings_of(settings)))
        found.append(Entry(f"{method}_{name} {' '.join(settings)}".strip(), model, gmacs(model, size)))
    return found


def with_clusters(model: nn.Module) -> nn.Module:
    """As after training: without clusters, inference leaves LTM's update out."""
    for module in model.modules():
        if hasattr(module, "centroids"):
            module.centroids.normal_()
    return model.eval()


def measure(found: list[Entry], x: Tensor, rounds: int, compiled: bool = False, seed: int = 0) -> None:
    """Set each entry's latency: its median over ``rounds`` forward passes of x (B, C, H, W), after warm-up."""
    torch._dynamo.reset()  # its limit of recompilations is per function, which all models of a family share
    models = {e.name: torch.compile(e.model, dynamic=False) if compiled else e.model for e in found}
    bar = functools.partial(tqdm, desc=found[0].name, unit="round", leave=False)
    times = latencies(models, x, rounds, seed, bar)
    for entry in found:
        entry.latency = times[entry.name]


def table(found: list[Entry]) -> str:
    """Markdown, ratios to the first entry."""
    plain = found[0]
    lines = ["| model | GMACs | GMACs ratio | parameters (M) | latency ratio | latency (ms) |"]
    lines.append("|:---" + "|---:" * 5 + "|")
    for entry in found:
        lines.append(
            f"| {entry.name} | {entry.gmacs:.3f} | {entry.gmacs / plain.gmacs:.3f} | {entry.parameters:.2f} "
            f"| {entry.latency / plain.latency:.3f} | {entry.latency:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="plain timm models")
    parser.add_argument("--merge", action="append", metavar='"METHOD NAME=VALUE ..."', help="may be repeated")
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
        try:
            found = entries(name, args.merge or ["ltm", "tome"], dd)
        except (CommandError, ValueError) as error:
            raise SystemExit(one_line("cost", error)) from None
        images = torch.randn(args.batch, *timm.get_pretrained_cfg(name).input_size, **dd)
        if args.channels_last:
            images = images.to(memory_format=torch.channels_last)
            for entry in found:
                entry.model.to(memory_format=torch.channels_last)
        measure(found, images, args.rounds, args.compile)
        print(f"\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
