"""Latency of exported ONNX models in onnxruntime on CPU at batch 1: LTM against plain.

    python benchmarks/onnx_latency.py

Both sessions take turns in one process; a session's threads go on spinning for a while after a run, so there is a pause
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
from cost import count_gmacs

import timm_ltm  # noqa: F401  registers the models
from timm_ltm.merging import TokenMerger

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


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, help="plain timm models that have an ltm_ one")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"onnxruntime {onnxruntime.__version__}, cpu, {threads} threads, batch 1, {args.rounds} rounds")
    for name in args.models:
        torch.manual_seed(0)
        x = torch.randn(1, *timm.get_pretrained_cfg(name).input_size)
        sessions, gmacs, series = [], [], ([], [])
        with tempfile.TemporaryDirectory() as folder:
            for prefix in ("", "ltm_"):
                model = timm.create_model(prefix + name).eval()
                for merger in (m for m in model.modules() if isinstance(m, TokenMerger)):
                    merger.clusters.centroids.normal_()
                    merger.clusters.scores.normal_()
                    merger.clusters.temperature.fill_(merger.clusters.centroids.shape[1] / 4)
                gmacs.append(count_gmacs(model, x))
                session = exported(model, x, Path(folder) / f"{prefix}{name}.onnx", threads)
                with torch.no_grad():
                    difference = np.abs(session.run(None, {"x": x.numpy()})[0] - model(x).numpy()).max()
                assert difference < 1e-4, difference
                sessions.append(session)
            for _ in range(args.rounds):
                for session, times in zip(sessions, series, strict=True):
                    time.sleep(0.05)
                    for run in range(4):
                        start = time.perf_counter()
                        session.run(None, {"x": x.numpy()})
                        if run:
                            times.append(1e3 * (time.perf_counter() - start))
        plain, ltm = (statistics.median(times) for times in series)
        ratio = gmacs[1] / gmacs[0]
        verdict = "yes" if ltm / plain <= ratio + 0.1 else "no"
        line = f"{name}: {ltm:.1f} / {plain:.1f} ms = {ltm / plain:.3f}, GMACs ratio {ratio:.3f}"
        print(f"{line}, at most 0.10 above it: {verdict}", flush=True)


if __name__ == "__main__":
    main()
