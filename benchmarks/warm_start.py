"""Weights of a plain model in a merging one: top-1 without any training, and after fine-tuning.

    python benchmarks/warm_start.py

A plain ViT (64 tokens, 6 blocks) learns to find a small handwritten digit among fragments of others, and to tell which
it is and in which quadrant (40 classes, made from scikit-learn's digits). Its weights go into LTM and into ToMe, at
equal GMACs, untrained; then all are fine-tuned. A plain MobileViT does the same for maps (which digit, 10 classes),
against resizing the map. Prints markdown tables; takes about half an hour.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
import torch.nn.functional as F
from cost import count_gmacs
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tome import tome_vit
from torch import Tensor, nn

import timm_ltm
from timm_ltm.merging import DenseMask, GridMask, TokenMerger

SIDE, CLASSES = 32, 40
SHAPE = dict(img_size=SIDE, patch_size=4, in_chans=1, num_classes=CLASSES, weight_init="moco")


class Clutter:
    """Images (n, 1, 32, 32): a digit of 10 pixels in one quadrant, fragments of others everywhere, noise."""

    def __init__(self, train: bool) -> None:
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
        images, labels = (split[0], split[2]) if train else (split[1], split[3])
        self.images = F.interpolate(torch.tensor(images / 16).float().view(-1, 1, 8, 8), size=10, mode="bilinear")
        self.labels = torch.tensor(labels)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images with mean about 0 and their labels, 10 quadrant + digit."""

        def random(high: int, *size: int) -> Tensor:
            return torch.randint(high, size, generator=generator)

        canvas = torch.zeros(n, SIDE, SIDE)
        for _ in range(6):  # fragments of 5 x 5
            which, cut, place = random(len(self.images), n), random(6, 2, n), random(SIDE - 5, 2, n)
            for i in range(n):
                piece = self.images[which[i], 0, cut[0, i] : cut[0, i] + 5, cut[1, i] : cut[1, i] + 5]
                canvas[i, place[0, i] : place[0, i] + 5, place[1, i] : place[1, i] + 5] += 0.6 * piece
        which, quadrant, place = random(len(self.images), n), random(4, n), random(7, 2, n)
        for i in range(n):
            row, column = place[0, i] + 16 * (quadrant[i] // 2), place[1, i] + 16 * (quadrant[i] % 2)
            view = canvas[i, row : row + 10, column : column + 10]
            torch.maximum(view, self.images[which[i], 0], out=view)
        target = 10 * quadrant + self.labels[which]
        canvas = canvas + 0.1 * torch.randn(n, SIDE, SIDE, generator=generator)
        return ((canvas - 0.15) / 0.3).unsqueeze(1), target


def train(model: nn.Module, data: Clutter, steps: int, lr: float, seed: int) -> nn.Module:
    """AdamW, one cycle; clusters are refreshed every 100 steps where the model is LTM."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    refresh = timm_ltm.ClusterRefresh(model) if any(isinstance(m, TokenMerger) for m in model.modules()) else None
    model.train()
    for step in range(steps):
        x, y = data.draw(64, generator)
        output = model(x)
        y = y % output.shape[1]
        loss = F.cross_entropy(output, y, label_smoothing=0.1)
        if refresh is not None:
            loss = loss + refresh.ib_loss(y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if refresh is not None:
            refresh.step(y)
            if step % 100 == 99:
                refresh.epoch_end()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    right = [(model.eval()(a).argmax(dim=1) == b).sum() for a, b in zip(x.split(200), y.split(200), strict=True)]
    return 100.0 * torch.stack(right).sum().item() / len(y)


def ltm_vit(weights: dict[str, Tensor], ratio: float, every: int = 1, **kwargs: object) -> nn.Module:
    """LTM with a plain model's weights; block 0, ``every``, 2 ``every`` ... merge."""
    ratios = [ratio if i % every == 0 else 1.0 for i in range(6)]
    model = timm.create_model("ltm_vit_test", compression_ratio=ratios, **SHAPE, **kwargs)
    model.load_state_dict(weights)
    return model.eval()


def at_gmacs(build, target: float, x: Tensor) -> nn.Module:
    """The model among ``build(ratio)`` whose GMACs are the largest not above ``target``."""
    low, high = 0.1, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if count_gmacs(build(middle), x) <= target else (low, middle)
    return build(low)


def resizing(merger: TokenMerger) -> None:
    """Replace what a merger of maps does by averages over areas, of the same sizes."""

    def areas(n: int, P: int, like: Tensor) -> DenseMask:
        weights = F.interpolate(torch.eye(n).unsqueeze(0), size=P, mode="area")[0]  # n P, columns sum to 1
        return DenseMask(*(weights.to(like).expand(len(like), -1, -1),) * 2)

    def lines(z, state, slots, unit, observe):
        (H, W), (H_, W_) = state.grid, slots
        rows, columns = areas(W, W_, unit.new_zeros(len(unit) * H)), areas(H, H_, unit.new_zeros(len(unit) * W_))
        mask = GridMask(rows, columns, state.grid)
        size = state.size.new_ones(len(unit), H_ * W_)
        return mask, state._replace(size=size, cells=None, grid=slots, mask=mask)

    merger._lines = lines


def vit(args: argparse.Namespace, data: Clutter, x: Tensor, y: Tensor) -> None:
    """Tables of ViT."""
    torch.manual_seed(0)
    plain = train(timm.create_model("test_vit", **SHAPE), data, args.steps, 2e-3, 0)
    weights, whole = plain.state_dict(), count_gmacs(plain, x[:1])
    print(f"\nplain ViT, {args.steps} steps: {top1(plain, x, y):.1f} %\n", flush=True)

    def tome(r: int) -> nn.Module:
        model = tome_vit("test_vit", r, **SHAPE).eval()
        model.load_state_dict(weights)
        return model

    print("| GMACs ratio | ToMe, r | LTM, every block | every 2nd | every 3rd | beta 30 | beta 1000 | dense mask |")
    print("|---" * 8 + "|")
    pairs = []
    for r in (2, 4, 6, 8, 10):
        reference = tome(r)
        target = count_gmacs(reference, x[:1])
        ways = [
            dict(every=1),
            dict(every=2),
            dict(every=3),
            dict(beta=30.0),
            dict(beta=1000.0),
            dict(mask_form="dense"),
        ]
        models = [at_gmacs(lambda ratio, way=way: ltm_vit(weights, ratio, **way), target, x[:1]) for way in ways]
        cells = [f"{top1(model, x, y):.1f}" for model in models]
        print(f"| {target / whole:.3f} | {top1(reference, x, y):.1f}, {r} | " + " | ".join(cells) + " |", flush=True)
        pairs.append((r, target))

    print(f"\nfine-tuned for {args.fine} steps\n")
    print("| GMACs ratio | plain | ToMe | LTM, anchors | LTM, update | + 0.1 IB loss |")
    print("|---" * 6 + "|")
    for r, target in (pairs[1], pairs[3]):
        cells = []
        for seed in range(args.seeds):
            options = (dict(update=False), {}, dict(ib_loss_weight=0.1))
            models = [timm.create_model("test_vit", **SHAPE), tome(r)]
            models[0].load_state_dict(weights)
            ratio = at_gmacs(lambda ratio: ltm_vit(weights, ratio), target, x[:1]).block_ratios[0]
            models += [ltm_vit(weights, ratio, **option) for option in options]
            cells.append([top1(train(m, data, args.fine, 5e-4, 1 + seed), x, y) for m in models])
        row = [" / ".join(f"{value:.1f}" for value in column) for column in zip(*cells, strict=True)]
        print(f"| {target / whole:.3f} | " + " | ".join(row) + " |", flush=True)


def maps(args: argparse.Namespace, data: Clutter, x: Tensor, y: Tensor) -> None:
    """The table of MobileViT."""
    torch.manual_seed(0)

    def build(name: str, **kwargs: object) -> nn.Module:
        model = timm.create_model(name, in_chans=1, num_classes=10, **kwargs)
        model.stem.conv.stride = model.stages[1][0].conv2_kxk.conv.stride = (1, 1)  # 32 pixels as if they were 128
        return model

    y = y % 10
    plain = train(build("mobilevit_xxs"), data, args.steps // 4, 2e-3, 0)
    weights, whole = plain.state_dict(), count_gmacs(plain, x[:1])
    print(f"\nplain MobileViT-XXS, {args.steps // 4} steps: {top1(plain, x, y):.1f} %\n", flush=True)
    print("| patches left, first stage | GMACs ratio | areas | lines of their own | straight | even | dense |")
    print("|---" * 7 + "|")
    for ratio in (0.765, 0.5625, 0.39):
        cells, gmacs = [], 0.0
        for way in ("areas", "own", "straight", "even", "dense"):
            form = dict(mask_form="dense") if way == "dense" else dict(map_lines="own" if way == "areas" else way)
            model = build(
                "ltm_mobilevit_xxs", compression_ratio=(ratio,) + (1.0,) * 8, cluster_dim=16, img_size=128, **form
            )
            model.load_state_dict(weights)
            if way == "areas":
                for _, merger in model.mergers():
                    resizing(merger)
            else:
                gmacs = gmacs or count_gmacs(model.eval(), x[:1])
            cells.append(f"{top1(model, x, y):.1f}")
        print(f"| {ratio} | {gmacs / whole:.3f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="of the plain model")
    parser.add_argument("--fine", type=int, default=500, help="steps of fine-tuning")
    parser.add_argument("--seeds", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--test", type=int, default=3000, help="test images")
    parser.add_argument("--only", choices=["vit", "maps"])
    args = parser.parse_args()
    start, data = time.time(), Clutter(train=True)
    x, y = Clutter(train=False).draw(args.test, torch.Generator().manual_seed(99))
    for name, run in (("vit", vit), ("maps", maps)):
        if args.only in (None, name):
            run(args, data, x, y)
    print(f"\n{(time.time() - start) / 60:.0f} minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
