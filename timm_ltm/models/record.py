"""What every block merges, merging or not: read from outside, for reports, with the same code for plain models.

One letter per axis: B batch, N tokens, P slots, D width, H W grid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_ltm.models.base import ReducedModel
from timm_ltm.models.block import ReducedBlock
from timm_ltm.models.maps import MapModel
from timm_ltm.reduction import Reducer, Tokens

__all__ = [
    "Merged",
    "as_reduced",
    "block_names",
    "evaluating",
    "record_merged",
    "record_output",
    "representative_tokens",
]


class Merged(NamedTuple):
    """The tokens of one block, without prefix: X~ of Section 3.1, behind attention and merge, in front of the MLP.

    Attributes:
        index: The block's, among the model's transformer blocks, as in ``compression_ratio``.
        inputs: (B parts, N, D) the block's input.
        merged: (B parts, P, D), P = N where it does not merge. Behind the whole block of a method that merges there.
        before: What is known of the N.
        after: What is known of the P.
        parts: Rows in a row that are of one image and merged alike (the pixels of MobileViT's patches).
    """

    index: int
    inputs: Tensor
    merged: Tensor
    before: Tokens
    after: Tokens
    parts: int


def block_names(model: ReducedModel) -> dict[str, ReducedBlock]:
    """The model's transformer blocks by name, in the order of ``compression_ratio``."""
    blocks: list[ReducedBlock] = []

    def put(block: ReducedBlock, dim: int, tokens: Any, first: bool = False, parts: int = 1) -> Any:
        blocks.append(block)
        return tokens if block.reducer is None else block.reducer.slots(tokens)

    model.plan(put)
    names = {module: name for name, module in model.named_modules()}
    return {names[block]: block for block in blocks}


@contextlib.contextmanager
def evaluating(model: ReducedModel) -> Iterator[None]:
    """The model in eval within, without ending an epoch; observers of a refresh see nothing."""
    training = [module for module in model.modules() if module.training]
    observers = [(reducer, reducer.observer) for _, reducer in model.reducers()]
    try:
        for module in training:
            module.training = False
        for reducer, _ in observers:
            reducer.observer = None
        yield
    finally:
        for module in training:
            module.training = True
        for reducer, observer in observers:
            reducer.observer = observer


def record_merged(model: ReducedModel, x: Tensor, keep: Callable[[Merged], None]) -> tuple[Tensor, tuple[int, int]]:
    """Run images (B, C, H, W), and show what every block makes of its tokens.

    As the model is: with merging off, or in warm-up, nothing merges, and every block shows Z itself.

    Args:
        model: In eval, see :func:`evaluating`.
        x: Images.
        keep: Called for every block in order.

    Returns:
        :func:`record_output`'s.
    """
    current: dict[str, Any] = {}

    def enter(block: ReducedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.update(inputs=block.as_tokens(args[0])[:, block.num_prefix_tokens :], before=kwargs["tokens"])

    def show(index: int, block: ReducedBlock, merged: Tensor, after: Tokens) -> None:
        merged = merged if merged.dim() == 3 else merged.flatten(2).transpose(1, 2)  # B D H W -> B (H W) D
        merged = merged[:, block.num_prefix_tokens :]
        keep(Merged(index, current["inputs"], merged, current["before"], after, block.parts))

    hooks = []
    for index, block in enumerate(block_names(model).values()):
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        if block.reducer is not None:

            def reduced(_: nn.Module, args: Any, out: Any, i: int = index, block: ReducedBlock = block) -> None:
                show(i, block, *out)

            hooks.append(block.reducer.register_forward_hook(reduced))
        else:

            def passed(_: nn.Module, args: Any, i: int = index, block: ReducedBlock = block) -> None:
                show(i, block, args[0], current["before"])

            hooks.append(block.get_submodule(block.first_of_rest).register_forward_pre_hook(passed))
    try:
        return record_output(model, x)
    finally:
        for hook in hooks:
            hook.remove()


def record_output(model: ReducedModel, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Merged tokens behind the last block, finished for the head, as copies at the places they stand for: no prefix.

    As the model is, merging or not, through the blocks that :func:`record_merged` watches. What was a token's own and
    a model of sequences puts back beside is not among what it merged; of maps, it is the features.

    Returns:
        (B, H W, D), and H W.
    """
    if not isinstance(model, MapModel):
        x, tokens = model.forward_blocks(x, observe=not model.merging)
        prefix = model.num_prefix_tokens
        return tokens.unmerge(model.norm(x)[:, prefix:]), tokens.start
    with model.watched():
        x = model.forward_features(x)
    x = x if model.channels_last else x.permute(0, 2, 3, 1)  # B H W D
    return x.flatten(1, 2), (x.shape[1], x.shape[2])


def as_reduced(model: nn.Module) -> ReducedModel:
    """A model that merges as it is; a plain timm model, sharing its parameters, as one whose blocks do not merge.

    Raises:
        ValueError: It is of no family that can merge.
    """
    from timm_ltm.models.registry import convert  # which imports the families

    if isinstance(model, ReducedModel):
        return model
    with torch.no_grad():
        return convert(model, "tome", compression_ratio=1.0)


def representative_tokens(model: ReducedModel, x: Tensor, layer: int = 0) -> Tensor:
    """(B,) the merged token of a block that speaks most for the class which the model sees in each image.

    The paper leaves open which one it shows in Figure 5. Here the one whose features times the gradient of the largest
    logit are largest, of those that stand for more than one input token; of a model without a head, the largest.

    Args:
        model: Merging or not at the moment; it merges here.
        x: Images (B, C, H, W).
        layer: Which of the blocks that merge.
    """
    reducers, seen = [reducer for _, reducer in model.reducers()], {}

    def keep(reducer: Reducer, args: tuple[Any, ...], output: tuple[Tensor, Tokens]) -> tuple[Tensor, Tokens]:
        z, seen["tokens"] = output
        seen["z"] = z.detach().requires_grad_()
        return seen["z"], output[1]

    forced, hook = model._forced, reducers[layer].register_forward_hook(keep)
    try:
        with torch.enable_grad(), evaluating(model):
            model.set_merging(True)
            logits = model(x)
            logits = logits[0] if isinstance(logits, tuple) else logits
            size, P = seen["tokens"].size, seen["tokens"].size.shape[1]
            if not model.num_classes:
                return size.argmax(dim=1)
            (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), seen["z"])
    finally:
        model.set_merging(forced)
        hook.remove()
    worth = (seen["z"] * gradient).sum(dim=2)[:, -P:]  # (B parts) P
    worth = worth.detach().reshape(len(x), -1, P).sum(dim=1)
    several = size > 1.5
    return torch.where(several | ~several.any(dim=1, keepdim=True), worth, -torch.inf).argmax(dim=1)
