"""Weights of a plain model in a merging one: top-1 without any training, and after fine-tuning.

    python benchmarks/warm_start.py

A plain ViT (64 tokens, 6 blocks) learns which two small digits an image has among fragments of others (100 classes,
made from scikit-learn's digits). Its weights go into LTM and into ToMe, at equal GMACs, untrained; then all are
fine-tuned. A plain MobileViT (one digit) does the same for maps, against resizing the map. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from clutter import SIDE, Digit, Pair
from cost import count_gmacs
from tome import tome_vit
from torch import Tensor, nn

import timm_ltm
from timm_ltm.merging import DenseMask, MergeState, TokenMerger, merger
from timm_ltm.models.ltm_vit import LTMBlock

BLOCKS = 6
SHAPE = dict(img_size=SIDE, patch_size=4, in_chans=1, num_classes=Pair.logits, weight_init="moco")


def train(model: nn.Module, data: Digit, steps: int, lr: float, seed: int) -> nn.Module:
    """AdamW, one cycle; clusters are refreshed every 100 steps where the model is LTM."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    refresh = timm_ltm.ClusterRefresh(model) if any(isinstance(m, TokenMerger) for m in model.modules()) else None
    model.train()
    for step in range(steps):
        x, y = data.draw(64, generator)
        loss = data.loss(model(x), y)
        if refresh is not None:
            loss = loss + refresh.ib_loss(data.targets(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if refresh is not None:
            refresh.step(data.targets(y))
            if step % 100 == 99:
                refresh.epoch_end()
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, data: Digit, x: Tensor, y: Tensor) -> Tensor:
    """(n,) 1 where the answer is right."""
    model.eval()
    return torch.cat([data.right(model(a), b) for a, b in zip(x.split(200), y.split(200), strict=True)])


def at_gmacs(build: Callable[[float], nn.Module], target: float, x: Tensor) -> nn.Module:
    """The model among ``build(share of tokens that go)`` whose GMACs are the largest not above ``target``."""
    low, high = 0.0, 0.9
    for _ in range(11):
        middle = (low + high) / 2
        low, high = (low, middle) if count_gmacs(build(middle), x) <= target else (middle, high)
    model = build(high)
    if count_gmacs(model, x) > target:
        raise ValueError(f"no share up to {high:.2f} comes down to {target:.4f} GMACs.")
    return model


def halves(keys: Tensor, num_slots: int) -> Tensor:
    """ToMe's choice of anchors in place of ``order_by_redundancy``: even tokens go, odd ones stay."""
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    best = torch.full(keys.shape[:2], -4.0)
    best[:, ::2], best[:, 1::2] = similarity.amax(dim=2), similarity.amax(dim=1) - 4.0
    ranked = best.argsort(dim=1)
    return torch.cat((ranked[:, :num_slots].sort(dim=1).values, ranked[:, num_slots:]), dim=1)


def compare_by(metric: str, model: nn.Module) -> nn.Module:
    """What anchors are compared by, in place of attention keys averaged over heads."""

    def of_block(block: LTMBlock) -> Callable[..., tuple]:
        def hook(_: nn.Module, args: tuple) -> tuple:
            z, state, num_prefix, _, x, observe = args
            if metric == "all heads' keys":
                keys = block.attn.qkv(block.norm1(x)).chunk(3, dim=2)[1]
            else:
                keys = z if metric == "features" else block.norm1(x)
            return z, state, num_prefix, keys, x, observe

        return hook

    for block in model.blocks:
        if block.merger is not None:
            block.merger.register_forward_pre_hook(of_block(block))
    return model


def resizing(module: TokenMerger) -> None:
    """Replace what the only merger of a model of maps does by averages over areas, of the same sizes."""

    def areas(n: int, P: int, like: Tensor) -> DenseMask:
        weights = F.interpolate(torch.eye(n).unsqueeze(0), size=P, mode="area")[0]  # n P, columns sum to 1
        return DenseMask(*(weights.to(like).expand(len(like), -1, -1),) * 2)

    def form(state: MergeState, unit: Tensor, values: object, mlp: object, first: object, observe: bool) -> MergeState:
        (H, W), (H_, W_) = state.grid, timm_ltm.merging.slots_of(state.grid, module.ratio)
        rows, columns = areas(W, W_, unit.new_zeros(len(unit) * H)), areas(H, H_, unit.new_zeros(len(unit) * W_))
        both = torch.einsum("bwv,bhu->bhwuv", rows.weights[: len(unit)], columns.weights[: len(unit)])
        both = both.flatten(3, 4).flatten(1, 2)  # B (H W) (H' W')
        size = state.size.new_full((len(unit), H_ * W_), H * W / (H_ * W_))
        return MergeState(size, None, (H_, W_), None, DenseMask(both, both))

    module._form = form


def vit(args: argparse.Namespace) -> None:
    """Tables of ViT."""
    data = Pair(train=True)
    x, y = Pair(train=False).draw(args.test, torch.Generator().manual_seed(99))
    torch.manual_seed(0)
    plain = train(timm.create_model("test_vit", **SHAPE), data, args.steps, 2e-3, 0)
    weights, whole, of_plain = plain.state_dict(), count_gmacs(plain, x[:1]), right(plain, data, x, y)
    print(f"\nplain ViT, {args.steps} steps: {100 * of_plain.mean():.2f} %\n", flush=True)

    def tome(r: int, **kwargs: bool) -> nn.Module:
        model = tome_vit("test_vit", r, **SHAPE, **kwargs).eval()
        model.load_state_dict(weights)
        return model

    def ltm(share: float, every: int = 1, rising: float = 0.0, metric: str = "", **kwargs: object) -> nn.Module:
        """Block 0, ``every``, 2 ``every`` ... merge; a ``rising`` share of the tokens with depth."""
        slopes = [1 + rising * (2 * i / (BLOCKS - 1) - 1) for i in range(BLOCKS)]
        ratios = [max(1 - share * slopes[i], 0.05) if i % every == 0 else 1.0 for i in range(BLOCKS)]
        model = timm.create_model("ltm_vit_test", compression_ratio=ratios, **SHAPE, **kwargs)
        model.load_state_dict(weights)
        return compare_by(metric, model.eval()) if metric else model.eval()

    budgets = [count_gmacs(tome(r), x[:1]) for r in args.r]
    print("| | " + " | ".join(f"{budget / whole:.2f}" for budget in budgets) + " |")
    print("|---" * (1 + len(budgets)) + "|", flush=True)

    def row(name: str, models: list[nn.Module]) -> None:
        gaps = [100 * (right(model, data, x, y) - of_plain) for model in models]
        cells = [f"{gap.mean():+.2f} ± {gap.std() / len(gap) ** 0.5:.2f}" for gap in gaps]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    row("ToMe", [tome(r) for r in args.r])
    row("ToMe, log sizes off", [tome(r, prop_attn=False) for r in args.r])
    ways = {
        "**LTM** (defaults, every block)": {},
        "LTM, anchors alone (`update=False`)": dict(update=False),
        "every 2nd block": dict(every=2),
        "every 3rd block": dict(every=3),
        "a share rising with depth, 0.7 to 1.3 times": dict(rising=0.3),
        "falling, 1.3 to 0.7 times": dict(rising=-0.3),
        "`proportional_attention=False`": dict(proportional_attention=False),
        "ToMe's halves": {},
        "ToMe's halves, every 2nd block": dict(every=2),
        "ToMe's halves, every 3rd block": dict(every=3),
        "`beta=30`": dict(beta=30.0),
        "`beta=1000`": dict(beta=1000.0),
        "`mask_form='dense'`": dict(mask_form="dense"),
        "dense, softmax over tokens": dict(mask_form="dense", mask_softmax="tokens"),
        "compared by all heads' keys": dict(metric="all heads' keys"),
        "compared by features": dict(metric="features"),
    }
    ours = merger.order_by_redundancy
    for name, way in ways.items():
        merger.order_by_redundancy = halves if "halves" in name else ours
        row(name, [at_gmacs(lambda share, way=way: ltm(share, **way), budget, x[:1]) for budget in budgets])
    merger.order_by_redundancy = ours

    print(f"\nfine-tuned for {args.fine} steps\n")
    print("| GMACs ratio | plain, going on | ToMe | LTM, anchors | LTM, update | + 0.1 IB loss |")
    print("|---" * 6 + "|", flush=True)
    for r, budget in list(zip(args.r, budgets, strict=True))[1::2]:
        cells = []
        for seed in range(args.seeds):
            models = [copy.deepcopy(plain), tome(r)]
            for option in (dict(update=False), {}, dict(ib_loss_weight=0.1)):
                models.append(at_gmacs(lambda share, way=option: ltm(share, **way), budget, x[:1]))
            cells.append([100 * right(train(m, data, args.fine, 5e-4, 1 + seed), data, x, y).mean() for m in models])
        line = [" / ".join(f"{value:.1f}" for value in column) for column in zip(*cells, strict=True)]
        print(f"| {budget / whole:.2f} | " + " | ".join(line) + " |", flush=True)


def maps(args: argparse.Namespace) -> None:
    """Tables of MobileViT."""
    data = Digit(train=True)
    x, y = Digit(train=False).draw(args.test // 4, torch.Generator().manual_seed(99))
    torch.manual_seed(0)

    def build(name: str, **kwargs: object) -> nn.Module:
        model = timm.create_model(name, in_chans=1, num_classes=10, **kwargs)
        model.stem.conv.stride = model.stages[1][0].conv2_kxk.conv.stride = (1, 1)  # 32 pixels as if they were 128
        return model

    plain = train(build("mobilevit_xxs"), data, args.steps // 10, 2e-3, 0)
    weights, whole = plain.state_dict(), count_gmacs(plain, x[:1])
    print(
        f"\nplain MobileViT-XXS, {args.steps // 10} steps: {100 * right(plain, data, x, y).mean():.1f} %\n", flush=True
    )
    ways = {
        "areas": dict(map_lines="own"),
        "lines of their own": dict(map_lines="own"),
        "**straight**": {},
        "straight, log sizes off": dict(proportional_attention=False),
        "even": dict(map_lines="even"),
        "dense": dict(mask_form="dense"),
    }

    def ltm(ratio: float, block: int, name: str) -> nn.Module:
        ratios = [ratio if i == block else 1.0 for i in range(9)]
        model = build("ltm_mobilevit_xxs", compression_ratio=ratios, cluster_dim=16, img_size=128, **ways[name])
        model.load_state_dict(weights)
        for _, module in model.mergers() if name == "areas" else ():
            resizing(module)
        return model.eval()

    for fine in (0, args.fine // 3):
        print(f"\nfine-tuned for {fine} steps\n" if fine else "")
        names = ("areas", "**straight**") if fine else tuple(ways)
        print("| patches left of 8 x 8, block | GMACs ratio | " + " | ".join(names) + " |")
        print("|---" * (2 + len(names)) + "|", flush=True)
        for side, block in ((7, 0), (6, 0), (7, 1), (6, 1), (5, 1), (4, 1)) if not fine else ((7, 0), (6, 1), (4, 1)):
            ratio = side**2 / 64 - 0.001
            cells, gmacs = [], count_gmacs(ltm(ratio, block, "**straight**"), x[:1]) / whole
            for name in names:
                model = ltm(ratio, block, name)
                model = train(model, data, fine, 5e-4, 1) if fine else model
                cells.append(f"{100 * right(model, data, x, y).mean():.1f}")
            print(f"| {side} x {side}, {block + 1} | {gmacs:.3f} | " + " | ".join(cells) + " |", flush=True)
        if fine:
            model = train(copy.deepcopy(plain), data, fine, 5e-4, 1)
            print(f"\nplain, going on: {100 * right(model, data, x, y).mean():.1f} %")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of the plain model")
    parser.add_argument("--fine", type=int, default=600, help="steps of fine-tuning")
    parser.add_argument("--seeds", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--test", type=int, default=8000, help="test images")
    parser.add_argument("--r", type=int, nargs="+", default=[4, 7, 10, 12, 14], help="of ToMe: the budgets")
    parser.add_argument("--only", choices=["vit", "maps"])
    args = parser.parse_args()
    start = time.time()
    for name, run in (("vit", vit), ("maps", maps)):
        if args.only in (None, name):
            run(args)
    print(f"\n{(time.time() - start) / 60:.0f} minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
