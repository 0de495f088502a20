"""A page: a photograph, a model, a method and a budget; what is merged block by block, what that saves and changes.

    pip install -e ".[demo]"
    python examples/demo.py vit_small_patch16_224 --pretrained
    python examples/demo.py vit_small_patch14_dinov2.lvd142m --pretrained --img-size 224
    python examples/demo.py my.safetensors --model vit_small_patch14_dinov2 --img-size 224

MODEL is a name of timm's, a checkpoint, or a folder in timm's Hub layout; the page offers it beside other names of
timm's. One that merges already is shown as it was saved. Without --pretrained names have random weights, and nothing is
downloaded. The page loads nothing from elsewhere, and is served to this machine alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.models import is_model, list_models
from torch import Tensor, nn

import timm_ltm
from timm_ltm.cli.common import CommandError, add_model_arguments, load_model
from timm_ltm.cost import gmacs
from timm_ltm.methods.ltmp import calibrate
from timm_ltm.models import ReducedModel
from timm_ltm.models.record import representative_tokens
from timm_ltm.pictures import heat_over, load_photo, rebuilt, sources_over
from timm_ltm.pictures.photos import data_config
from timm_ltm.reduction.settings import nearest, setting_error
from timm_ltm.speed import latencies

NAMES = ("vit_small_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_s")
NOT_OF_OTHERS = {"model": None, "num_classes": None, "img_size": None, "model_kwargs": [], "ema": False}
TOGETHER, MEANS, WEIGHTS = VIEWS = ("what goes together", "means of the merged tokens", "weights of one merged token")
PIXELS = 560  # of the shorter side of a picture on the page
ROUNDS = 5


class Pair(NamedTuple):
    """A plain model and one that merges, which share weights, and what an image costs each."""

    plain: nn.Module
    merging: ReducedModel
    gmacs: tuple[float, float]
    ms: tuple[float, float]


class Answer(NamedTuple):
    """What the page shows: pictures (H, W, 3) with captions, a table in Markdown, and, of models with a head, the
    probabilities of the likeliest classes."""

    pictures: list[tuple[np.ndarray, str]]
    numbers: str
    plain: dict[str, float] | None
    merging: dict[str, float] | None


class Demo:
    """Everything behind the page. Models are kept: a budget that was seen before takes two forward passes.

    Made from what :func:`arguments` returns.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: Callable[[str], nn.Module] = functools.lru_cache(maxsize=4)(self._model)
        self.pair: Callable[..., Pair] = functools.lru_cache(maxsize=64)(self._pair)

    def answer(self, photo: str | None, name: str, method: str, budget: float, view: str = TOGETHER) -> Answer:
        """What the page shows of a photograph's file.

        Raises:
            ValueError: A choice does not fit, or the budget cannot be reached; the reason is told.
        """
        if photo is None:
            raise setting_error("photograph", photo, "an image", "Upload one, or click an example.")
        model = self.model(name)
        image, x = self._images(model, photo)
        depends = "ltmp" in (method, getattr(model, "method", None))  # what it costs on the photograph
        pair = self.pair(name, method, round(budget, 3), photo if depends else photos()[0])
        with torch.no_grad():
            plain, merging = pair.plain(x), pair.merging(x)
        headless = not model.num_classes
        numbers = table(pair, F.cosine_similarity(plain, merging).item(), "pooled features" if headless else "logits")
        pictures = pictures_of(pair.merging, image, x, view)
        return Answer(pictures, numbers, *(None if headless else likeliest(model, y[0]) for y in (plain, merging)))

    def merges(self, name: str) -> bool:
        """Whether it was saved so, with a method and a budget that are its own."""
        return isinstance(self.model(name), ReducedModel)

    def _model(self, name: str) -> nn.Module:
        own = name == self.args.name
        if not own and not is_model(name.partition(".")[0]):
            remedy = nearest(name, list_models()) or "timm.list_models() has them."
            raise setting_error("model", name, "a name of timm's", remedy)
        args = self.args if own else argparse.Namespace(**{**vars(self.args), **NOT_OF_OTHERS})
        try:
            return load_model(name, args)[0]
        except (CommandError, RuntimeError) as error:  # timm's, of names without weights
            raise ValueError(str(error)) from None

    def _pair(self, name: str, method: str, budget: float, photo: str) -> Pair:
        model = self.model(name)
        _, x = self._images(model, photo)
        if isinstance(model, ReducedModel):
            plain, merging = copy.deepcopy(model, {id(p): p for p in model.parameters()}), model
            plain.set_merging(False)
        else:
            plain, merging = model, timm_ltm.convert(model, method, gmacs=budget)
            if method == "ltmp":  # whose thresholds are those of no model yet
                calibrate(merging, x)
        ms = latencies({"plain": plain, "merging": merging}, x, ROUNDS)
        cost = gmacs(plain, inputs=x), gmacs(merging, inputs=x)
        return Pair(plain, merging, cost, (ms["plain"], ms["merging"]))

    @staticmethod
    def _images(model: nn.Module, photo: str) -> tuple[Tensor, Tensor]:
        """(3, H, W), no larger than the page needs, and the model's input (1, C, h, w)."""
        image, x = load_photo(photo, data_config(model))
        scale = PIXELS / min(image.shape[1:])
        if scale < 1:
            image = F.interpolate(image.unsqueeze(0), scale_factor=scale, mode="bilinear", antialias=True)[0]
        return image, x.unsqueeze(0).to(next(model.parameters()).device)


def photos() -> list[str]:
    """Files of the two photographs of scikit-learn."""
    return load_sample_images().filenames


def pictures_of(model: ReducedModel, image: Tensor, x: Tensor, view: str) -> list[tuple[np.ndarray, str]]:
    """A photograph (3, H, W), and over it what every block merges of the input x (1, C, h, w); with captions."""
    masks = model.forward_masks(x)
    pictures = [(image, "photograph")]
    for layer, (block, grid) in enumerate(zip(masks.blocks, masks.grids, strict=True)):
        weights = masks.accumulated[layer][0].float().cpu()  # (h w) P
        if view == WEIGHTS:
            token = int(representative_tokens(model, x, layer))
            picture = heat_over(image, weights[:, token].unflatten(0, grid))  # h w
        else:
            picture = (rebuilt if view == MEANS else sources_over)(image, weights, grid)
        N, P = masks.masks[layer].shape[1:]
        pictures.append((picture, f"block {block + 1}: {N} to {P}"))
    return [((255 * p.clamp(0, 1)).byte().permute(1, 2, 0).numpy(), caption) for p, caption in pictures]  # H W 3


def table(pair: Pair, cosine: float, of: str) -> str:
    """Costs and what they change, in Markdown."""
    (plain, merged), (plain_ms, merged_ms) = pair.gmacs, pair.ms
    return (
        f"| model | GMACs | latency | cosine of the {of} |\n|:---|---:|---:|---:|\n"
        f"| plain | {plain:.3f} | {plain_ms:.1f} ms | |\n"
        f"| {pair.merging.method} | {merged:.3f} ({merged / plain:.3f}) | {merged_ms:.1f} ms"
        f" ({merged_ms / plain_ms:.3f}) | {cosine:.4f} |"
    )


def likeliest(model: nn.Module, logits: Tensor, count: int = 5) -> dict[str, float]:
    """The likeliest classes of logits (K,) by name, or by index where nothing tells names, and their probabilities."""
    cfg, subset = getattr(model, "pretrained_cfg", None) or {}, infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    if cfg.get("label_names") and len(cfg["label_names"]) == len(logits):
        info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    top = logits.softmax(dim=0).topk(min(count, len(logits)))
    return {
        f"{info.index_to_description(k)} ({k})" if info else f"class {k}": p
        for p, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    }


def page(demo: Demo) -> Any:
    """The page as Gradio's Blocks."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # is read at import
    import gradio as gr

    def show(photo: str | None, name: str, method: str, budget: float, view: str) -> list[Any]:
        try:
            answer = demo.answer(photo, name, method, budget, view)
            free = not demo.merges(name)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        labels = [gr.update(value=p, visible=p is not None) for p in (answer.plain, answer.merging)]
        return [answer.pictures, answer.numbers, *labels, *[gr.update(interactive=free)] * 2]

    name, examples = demo.args.name, photos()
    with gr.Blocks(title="timm_ltm", analytics_enabled=False) as blocks:
        gr.Markdown("# Token merging of timm's models")
        if not demo.args.pretrained:
            gr.Markdown("Models by name have **random weights** here. `--pretrained` downloads timm's.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.Image(examples[0], type="filepath", label="photograph", height=260, sources=["upload"])
                gr.Examples(examples, photo, label="examples")
                choices = list(dict.fromkeys((name, *NAMES)))
                model = gr.Dropdown(choices, value=name, label="model", allow_custom_value=True, elem_id="model")
                method = gr.Dropdown(list(timm_ltm.METHODS), value="ltm", label="method", elem_id="method")
                budget = gr.Slider(0.3, 0.95, 0.65, step=0.05, label="budget, share of the GMACs", elem_id="budget")
                view = gr.Radio(VIEWS, value=TOGETHER, label="picture", elem_id="view")
            with gr.Column(scale=3):
                numbers = gr.Markdown(elem_id="numbers")
                gallery = gr.Gallery(label="tokens block by block", columns=4, height="auto", elem_id="blocks")
                with gr.Row():
                    plain = gr.Label(label="plain model", show_heading=False, elem_id="plain")
                    merging = gr.Label(label="merging model", show_heading=False, elem_id="merging")
        given, shown = [photo, model, method, budget, view], [gallery, numbers, plain, merging]
        gr.on(
            [blocks.load, *(each.change for each in given)],
            show,
            given,
            [*shown, method, budget],
            show_progress_on=shown,
            trigger_mode="always_last",
            concurrency_limit=1,  # latencies are of a machine that does nothing else
        )
    return blocks


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default=NAMES[0], metavar="MODEL", help=f"{NAMES[0]} if not given")
    add_model_arguments(parser, merge=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on if not given")
    return parser.parse_args(argv)


def serve(args: argparse.Namespace, **settings: Any) -> tuple[Any, str]:
    """Open the page, in fonts that every machine has; settings are of Gradio's ``launch``. Blocks and address."""
    blocks = page(Demo(args))
    import gradio as gr  # after the page, which sets what it reads

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    launch = dict(server_name=args.host, server_port=args.port, share=False, footer_links=[], theme=theme)
    _, url, _ = blocks.launch(**launch, **settings)
    return blocks, url


if __name__ == "__main__":
    serve(arguments())
