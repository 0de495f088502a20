"""Swin, MobileViT and EfficientViT, plain and with LTM, trained with one recipe on scikit-learn's handwritten digits.

    python examples/families.py swin mobilevit efficientvit

The digits are enlarged to the size a family needs. Prints parameters, GMACs and held-out top-1 of both.
"""

from __future__ import annotations

import argparse

import timm
import torch
from quickstart import digits, top1, train
from torch import nn

import timm_ltm  # noqa: F401  registers the models
from timm_ltm.cost import gmacs

COMMON = dict(in_chans=1, num_classes=10)
FAMILIES = {  # timm's model, arguments of both, of LTM, size of images
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(
            img_size=112,
            embed_dim=24,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=0.0,
            weight_init="moco",
        ),
        dict(compression_ratio=(0.73, 1.0, 0.73, 1.0, 0.73, 1.0, 1.0, 1.0)),  # where the default merges
        112,
    ),
    "mobilevit": ("mobilevit_xxs", {}, {}, 96),
    "efficientvit": ("efficientvit_b0", {}, {}, 96),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--merge-warmup-epochs", type=int, default=6, help="epochs of plain training first")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    x, y, x_test, y_test = digits(args.seed)
    rows = []
    for family in args.families:
        name, shape, ltm, size = FAMILIES[family]
        for model_name, settings in (
            (name, {}),
            (f"ltm_{name}", {"merge_warmup_epochs": args.merge_warmup_epochs, **ltm}),
        ):
            torch.manual_seed(args.seed)
            model = timm.create_model(model_name, **COMMON, **shape, **settings)
            enlarged = nn.Sequential(nn.Upsample(size=size, mode="bilinear"), model)
            train(enlarged, x, y, args.epochs, args.seed, model_name)
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            rows.append((model_name, parameters, gmacs(enlarged, x_test.shape[1:]), top1(enlarged, x_test, y_test)))

    print(f"\n{'model':<36}{'params (M)':>12}{'GMACs':>10}{'top-1 (%)':>12}")
    for model_name, parameters, cost, accuracy in rows:
        print(f"{model_name:<36}{parameters:>12.3f}{cost:>10.5f}{accuracy:>12.2f}")


if __name__ == "__main__":
    main()
