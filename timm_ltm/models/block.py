"""A family's block that merges: attention, merge, the rest.

torch.fx reads the annotations of forward passes, hence none of them postponed.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from timm.layers import register_notrace_module
from timm.models import checkpoint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from timm_ltm.reduction import Reducer, Seen, Tokens

__all__ = ["ReducedBlock", "ScaledBlock", "run_block"]


class ReducedBlock(nn.Module):
    """Mixin of a family's block, in front of timm's class. The family writes :meth:`attend` and :meth:`rest`.

    Attributes:
        reducer: Merges this block's tokens, None where it does not.
        behind: Tokens may come merged.
        weighs: Attention is in proportion to their sizes then.
        num_prefix_tokens: Class, register and distillation tokens in front.
        parts: As of :class:`~timm_ltm.reduction.Site`.
        first_of_rest: The module that reads what was merged, the first of :meth:`rest`.
    """

    first_of_rest: ClassVar[str] = "norm2"
    reducer: Reducer | None
    behind: bool
    weighs: bool
    num_prefix_tokens: int
    parts: int

    def forward(self, x: Tensor, *args: Any, tokens: Tokens | None = None, observe: bool = False, **kwargs: Any) -> Any:
        """timm's forward without ``tokens``; with them, returns merged features and tokens.

        Args:
            x: As timm's block takes it.
            *args, **kwargs: timm's, or what the family's ``attend`` takes beside.
            tokens: What is known of the tokens.
            observe: Merge nothing, only let the reducer look (warm-up).
        """
        if tokens is None:
            return super().forward(x, *args, **kwargs)
        return self.reduced(x, tokens, observe, **kwargs)

    def reduced(self, x: Tensor, tokens: Tokens, observe: bool, **kwargs: Any) -> tuple[Tensor, Tokens]:
        """:meth:`forward` with tokens: attention, merge, the rest."""
        reducer, prefix = self.reducer, self.num_prefix_tokens
        bias = None
        if self.behind and self.weighs and not observe:
            bias = tokens.log_sizes(prefix, self.parts).to(x.dtype)
        z, seen = self.attend(x, tokens, bias, frozenset() if observe else self.wanted, **kwargs)
        if reducer is not None and "inputs" in reducer.needs:
            seen = seen._replace(inputs=self.as_tokens(x)[:, prefix:])
        if reducer is not None and reducer.where == "between":
            z, tokens = reducer(z, tokens, seen, prefix, observe)
        z = self.rest(z, tokens)
        if reducer is not None and reducer.where == "behind":
            z, tokens = reducer(z, tokens, seen, prefix, observe)
        return z, tokens

    @property
    def wanted(self) -> frozenset[str]:
        """What the reducer needs of attention, fields of :class:`~timm_ltm.reduction.Seen`."""
        return frozenset() if self.reducer is None else self.reducer.needs - {"inputs"}

    def attend(self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str]) -> tuple[Tensor, Seen]:
        """Attention with its shortcut (B, prefix + N, D), and what is wanted of it.

        Args:
            x: The block's input.
            tokens: Of it.
            bias: Added to the attention's logits.
            wanted: Fields of :class:`~timm_ltm.reduction.Seen`.
        """
        raise NotImplementedError

    def rest(self, z: Tensor, tokens: Tokens) -> Tensor:
        """What follows attention in the block, of tokens (B, prefix + P, D), as the block returns it."""
        raise NotImplementedError

    def as_tokens(self, x: Tensor) -> Tensor:
        """The block's input as (B, prefix + N, D)."""
        return x


class ScaledBlock(ReducedBlock):
    """Mixin of blocks whose second layer scale is timm's ``gamma_2``, None for none: EVA's and BEiT's."""

    def rest(self, z: Tensor, tokens: Tokens) -> Tensor:
        y = self.mlp(self.norm2(z))
        return z + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


def run_block(
    block: nn.Module, x: Tensor, tokens: Tokens, checkpointing: bool, observe: bool, **kwargs: Any
) -> tuple[Tensor, Tokens]:
    """One reduced block, its activations recomputed in the backward pass if ``checkpointing``."""
    if not checkpointing:
        return block(x, tokens=tokens, observe=observe, **kwargs)

    def run(x: Tensor, given: Any) -> tuple[Tensor, Tokens]:
        tokens, kwargs = given
        return block(x, tokens=tokens, observe=observe, **kwargs)

    return _recomputed(run, x, (tokens, kwargs))


def _recomputed(run: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, given: Any) -> tuple[Tensor, Any]:
    """``run(x, given)``, whose activations are recomputed in the backward pass.

    Args:
        run: What is run; returns a tensor, and any nest of tuples of tensors and constants.
        x: Its first argument.
        given: Its second, such a nest.
    """
    flat, spec = pytree.tree_flatten(given)
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    after: list[Any] = []

    def of_tensors(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        x, rest = run(x, pytree.tree_unflatten(leaves, spec))
        leaves, after_spec = pytree.tree_flatten(rest)
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        constants = [None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)]
        after[:] = constants, is_tensor, after_spec
        return x, *[leaf for leaf in leaves if isinstance(leaf, Tensor)]

    # flat arguments and results: re-entrant checkpoints lose the gradients of nested ones
    x, *tensors = checkpoint(of_tensors, x, *[flat[i] for i in places])
    constants, is_tensor, after_spec = after
    found = iter(tensors)
    leaves = [next(found) if tensor else leaf for leaf, tensor in zip(constants, is_tensor, strict=True)]
    return x, pytree.tree_unflatten(leaves, after_spec)


for _leaf in (Reducer, ReducedBlock):
    register_notrace_module(_leaf)  # leaves of FX graphs: their shapes are counted, not traced
