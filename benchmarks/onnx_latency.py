"""Latency of exported ONNX models in onnxruntime on CPU at batch 1: merging models against plain ones.

    python benchmarks/onnx_latency.py

Sessions take turns in one process; a session's threads go on spinning for a while after a run, so there is a pause
and an unmeasured run before three measured ones. Weights are random, clusters are filled: the update is at work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch

import timm_ltm  # noqa: F401  registers the models
from timm_ltm.cost import gmacs

NAMES = ["vit_small_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_s", "efficientvit_b1"]


def exported(model: torch.nn.Module, x: torch.Tensor, file: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session of the model's ONNX file, with a dynamic batch."""
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x.repeat(2, 1, 1, 1),), str(file), input_names=["x"], output_names=["y"], dynamic_axes=axes,
            dynamo=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options)


def fill(model: torch.nn.Module) -> None:
    """Clusters as after a refresh."""
    for _, reducer in model.reducers():
        for module in reducer.children():
            if hasattr(module, "centroids"):
                module.centroids.normal_()
                module.scores.normal_()
                module.temperature.fill_(module.centroids.shape[1] / 4)


def timed(sessions: list[onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> list[float]:
    """The median in ms of each of the sessions, which take turns."""
    series: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, times in zip(sessions, series, strict=True):
            time.sleep(0.05)
            for run in range(4):
                start = time.perf_counter()
                session.run(None, {"x": x})
                if run:
                    times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in series]


def main() -> None:
    """Print a line for each model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, help="timm's models")
    parser.add_argument("--methods", nargs="+", default=["ltm"])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"onnxruntime {onnxruntime.__version__}, cpu, {threads} threads, batch 1, {args.rounds} rounds")
    for name in args.models:
        torch.manual_seed(0)
        x = torch.randn(1, *timm.get_pretrained_cfg(name).input_size)
        sessions, costs, apart = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for method in ("", *args.methods):
                model = timm.create_model(f"{method}_{name}" if method else name).eval()
                if method:
                    fill(model)
                costs.append(gmacs(model, x.shape[1:]))
                sessions.append(exported(model, x, Path(folder) / f"{method}.onnx", threads))
                with torch.no_grad():
                    # of random weights, keys may be so much alike that rounding decides a merge
                    apart.append(np.abs(sessions[-1].run(None, {"x": x.numpy()})[0] - model(x).numpy()).max())
            plain, *merging = timed(sessions, x.numpy(), args.rounds)
        for method, ms, cost, difference in zip(args.methods, merging, costs[1:], apart[1:], strict=True):
            ratio = cost / costs[0]
            verdict = "yes" if ms / plain <= ratio + 0.1 else "no"
            line = f"{method}_{name}: {ms:.1f} / {plain:.1f} ms = {ms / plain:.3f}, GMACs ratio {ratio:.3f}"
            print(f"{line}, at most 0.10 above it: {verdict}; torch's output to {difference:.0e}", flush=True)


if __name__ == "__main__":
    main()
