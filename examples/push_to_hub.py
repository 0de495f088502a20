"""Push a model that examples/train.py or timm's train.py trained to the Hugging Face Hub, and load it again.

    huggingface-cli login
    python examples/push_to_hub.py output/train/model_best.pth.tar USER/MODEL --model ltm_mobilevit_s --num-classes 10

Weights go as safetensors, never as a pickle, and carry method, ratios, settings and clusters; the model card tells what
was measured: parameters and GMACs of this model and of the plain one, and the checkpoint's top-1.
``timm.create_model("hf-hub:USER/MODEL", pretrained=True)`` after ``import timm_ltm`` gives the model back.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.models import load_checkpoint, push_to_hf_hub
from timm.utils import ParseKwargs
from torch import nn

from timm_ltm.cost import gmacs, input_size_of


def cost(model: nn.Module) -> str:
    """Parameters and multiply-adds of one image."""
    _, H, W = input_size_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{parameters / 1e6:.2f} M parameters, {gmacs(model):.3f} GMACs at {H} x {W}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("repository", help="USER/MODEL")
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-classes", type=int, required=True)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="as in training")
    parser.add_argument("--ema", action="store_true", help="push the checkpoint's averaged weights")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs).eval()
    load_checkpoint(model, args.checkpoint, use_ema=args.ema)
    model.set_merging(True)
    merged = cost(model)
    model.set_merging(False)
    lines = [f"- merged: {merged}", f"- the same model without merging: {cost(model)}"]
    model.set_merging(None)
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=False)  # your own file
    if isinstance(saved.get("metric"), float):
        lines.append(f"- held-out top-1 when saved: {saved['metric']:.2f} %, after epoch {saved['epoch']}")
    card = dict(
        description=(
            f"`{args.model}`: timm's model, smaller and faster by merging tokens, with timm_ltm.\n\n"
            "```python\nimport timm, timm_ltm\n\n"
            f'model = timm.create_model("hf-hub:{args.repository}", pretrained=True)\n```\n'
        ),
        details={"Measured": "\n" + "\n".join(lines)},
    )
    push_to_hf_hub(
        model,
        args.repository,
        private=args.private,
        model_args=args.model_kwargs or None,  # timm 1.0.29 does not remember them
        model_card=card,
        safe_serialization=True,
    )


if __name__ == "__main__":
    main()
