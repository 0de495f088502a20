"""A plain ViT and its LTM variant, trained with one recipe on scikit-learn's 1,797 handwritten digits.

    pip install -e ".[examples]" && python examples/quickstart.py

Nothing is downloaded. Prints parameters, GMACs, latency, held-out top-1 and the IB bound of both; writes a picture of
what was merged; saves the LTM model in timm's Hub layout and loads it again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.methods.ltm.clusters import fit_temperature, kmeans
from timm_ltm.methods.ltm.information import class_conditional, ib_bound
from timm_ltm.methods.ltm.update import assign
from timm_ltm.models import ReducedModel
from timm_ltm.pictures import mask_figure

SHAPE = dict(img_size=24, patch_size=4, in_chans=1, num_classes=10, weight_init="moco")  # 36 tokens


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 24, 24) with mean 0 and deviation 1, and labels: 1,437 to train on, 360 held out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=seed)
    x, x_test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    x, x_test = (F.interpolate(part, scale_factor=3, mode="bilinear") for part in (x, x_test))
    y, y_test = (torch.tensor(part) for part in split[2:])
    mean, std = x.mean(), x.std()
    return (x - mean) / std, y, (x_test - mean) / std, y_test


def shifted(x: Tensor) -> Tensor:
    """Each image moved by up to three pixels."""
    padded = F.pad(x, (3, 3, 3, 3), value=float(x.amin()))
    dx, dy = torch.randint(0, 7, (2, len(x), 1))
    rows, columns = torch.arange(24) + dy, torch.arange(24) + dx  # B 24
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, title: str) -> timm_ltm.ClusterRefresh | None:
    """AdamW, cosine schedule with warm-up, label smoothing; ClusterRefresh where the model is LTM."""
    torch.manual_seed(seed)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=5, warmup_lr_init=1e-4, lr_min=1e-5)
    refresh = timm_ltm.ClusterRefresh(model) if any(isinstance(m, ReducedModel) for m in model.modules()) else None
    bar = tqdm(range(epochs), desc=title, unit="epoch")
    for epoch in bar:
        scheduler.step(epoch)
        model.train()
        losses = []
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(shifted(x[batch])), y[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if refresh is not None:
                refresh.step(y[batch])
        if refresh is not None:
            refresh.epoch_end()
        bar.set_postfix(loss=f"{statistics.mean(losses):.3f}")
    model.eval()
    return refresh


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images classified right."""
    return 100.0 * (model(x).argmax(dim=1) == y).float().mean().item()


@torch.no_grad()
def latency(models: dict[str, nn.Module], x: Tensor, rounds: int = 21) -> dict[str, float]:
    """Median milliseconds for a batch; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def held_out_ib_bound(model: nn.Module, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Held-out IBB (Theorem 3.1) of the last block's features, in nats; clusters and Q are of the training images."""

    def assignments(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        centroids = kmeans(train, 10, generator=torch.Generator().manual_seed(0))
        temperature = fit_temperature(train, centroids)
        return assign(train, centroids, temperature), assign(test, centroids, temperature)

    def features(images: Tensor) -> Tensor:  # the merged tokens, back on the grid, pooled to 4 x 4
        return F.adaptive_avg_pool2d(model.forward_intermediates(images, 1, intermediates_only=True)[0], 4).flatten(1)

    phi, phi_test = assignments(features(x), features(x_test))
    _, phi_input = assignments(x.flatten(1), x_test.flatten(1))
    log_q = class_conditional(phi.t() @ F.one_hot(y).float(), smoothing=1.0).log()
    return ib_bound(phi_test, phi_input, F.one_hot(y_test).float(), log_q).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--merge-warmup-epochs", type=int, default=12, help="epochs of plain training first")
    parser.add_argument(
        "--compression-ratio", type=float, nargs="+", default=[0.7, 1.0] * 3, help="one number, or one per block (6)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many runs; 3 for mean and spread")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    rows = []
    for seed in range(args.seeds):
        x, y, x_test, y_test = digits(seed)
        torch.manual_seed(seed)
        plain = timm.create_model("test_vit", **SHAPE)
        torch.manual_seed(seed)
        ltm = timm.create_model(
            "ltm_test_vit",
            compression_ratio=args.compression_ratio if len(args.compression_ratio) > 1 else args.compression_ratio[0],
            merge_warmup_epochs=args.merge_warmup_epochs,
            **SHAPE,
        )
        models = {"plain": plain, "LTM": ltm}
        for name, model in models.items():
            train(model, x, y, args.epochs, seed, f"{name}, seed {seed}")
        times = latency(models, x_test[:128])
        for name, model in models.items():
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            bound = held_out_ib_bound(model, x, y, x_test, y_test)
            rows.append(
                (name, parameters, gmacs(model, x_test.shape[1:]), times[name], top1(model, x_test, y_test), bound)
            )

    print(f"\n{'model':<8}{'params (M)':>12}{'GMACs':>10}{'ms / 128':>10}{'top-1 (%)':>16}{'IB bound (nats)':>17}")
    for name in ("plain", "LTM"):
        columns = list(zip(*[row[1:] for row in rows if row[0] == name], strict=True))
        accuracy = f"{statistics.mean(columns[3]):.2f}"
        if args.seeds > 1:
            accuracy += f" +- {statistics.stdev(columns[3]):.2f}"
        values = [statistics.mean(column) for column in columns]
        print(f"{name:<8}{values[0]:>12.3f}{values[1]:>10.5f}{values[2]:>10.2f}{accuracy:>16}{values[4]:>17.3f}")
    plain_row, ltm_row = rows[-2], rows[-1]
    if args.epochs <= args.merge_warmup_epochs:
        print(f"Merging never started: all {args.epochs} epochs were plain. Use a smaller --merge-warmup-epochs.")
    print(f"GMACs ratio {ltm_row[2] / plain_row[2]:.3f}, latency ratio {ltm_row[3] / plain_row[3]:.3f} (last seed)")

    mask_figure(x_test[:8], ltm.forward_masks(x_test[:8]), args.output / "masks.png")
    print(
        f"{args.output / 'masks.png'}, in rows: the digits, the weights of one merged token, what goes together, and "
        "every patch replaced by the mean of its merged token"
    )

    saved = args.output / "ltm_vit_digits"
    save_for_hf(ltm, saved, model_args=SHAPE, safe_serialization=True)  # the settings are in the weights
    loaded = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    with torch.no_grad():
        equal = torch.equal(loaded(x_test), ltm(x_test))
    print(f"saved to {saved}, loaded by timm.create_model('local-dir:...'): logits {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()
