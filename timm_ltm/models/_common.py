"""What the LTM models of every timm family share: the settings, the switch, and the epochs of warm-up.

torch.fx reads the annotations of forward passes, hence none of them postponed.
"""

import dataclasses
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath, get_notrace_functions, get_notrace_modules, register_notrace_module, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from timm_ltm.merging import MergeConfig, MergeState, TokenMerger
from timm_ltm.merging.config import PRESETS
from timm_ltm.merging.merge import fixed

__all__ = [
    "LTMModel",
    "MergeMasks",
    "fit_classes",
    "mean_keys",
    "plain_forward",
    "resized",
    "run_block",
    "split_ltm_kwargs",
    "to_map",
]

register_notrace_module(TokenMerger)  # a leaf of FX graphs: its shapes are counted, not traced

_LTM_ARGUMENTS = ("preset", *(field.name for field in dataclasses.fields(MergeConfig)))
_on_created: list[Callable[["LTMModel"], None]] = []  # training.py asks to be told of models to attach to
_on_loaded: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod] = weakref.WeakKeyDictionary()
_on_mode: weakref.WeakKeyDictionary[nn.Module, Callable[[bool], None]] = weakref.WeakKeyDictionary()


class MergeMasks(NamedTuple):
    """The masks of a batch of images, one entry per block that merges.

    Attributes:
        blocks: Their indices among the model's transformer blocks, as in ``compression_ratio``.
        masks: G (B, N, P) of each, columns sum to 1. N of a map is H W, row by row.
        accumulated: (B, H W, P) of each: the weight of every input token in every merged one, columns sum to 1. Input
            tokens are the image's patches; in models with stages, those of the map the stage began with.
        grids: (H, W) of these input tokens.
    """

    blocks: list[int]
    masks: list[Tensor]
    accumulated: list[Tensor]
    grids: list[tuple[int, int]]


def split_ltm_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """LTM's arguments and timm's, apart. ``ltm_defaults`` are a variant's own, which a preset goes before."""
    ltm = {name: value for name, value in kwargs.items() if name in _LTM_ARGUMENTS}
    for name, value in kwargs.pop("ltm_defaults", {}).items():
        if name not in PRESETS.get(ltm.get("preset", "default"), {}):
            ltm.setdefault(name, value)
    return ltm, {name: value for name, value in kwargs.items() if name not in ltm}


def _fill_in(model: "LTMModel", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: a plain timm checkpoint gets the model's own values for what LTM adds, and so loads strictly."""
    if model.num_classes < 2:
        for name, merger in model.mergers():
            saved = state_dict.get(f"{prefix}{name}.clusters.centroids")
            if saved is not None:
                merger.fit_clusters(saved)
    own = {f"{prefix}{name}": value for name, value in model.state_dict().items() if ".merger." in name}
    plain = not any(name in state_dict for name in own)  # else trained with LTM: but for clusters, a gap is an error
    for name, value in own.items():
        if plain or ".clusters." in name:
            state_dict.setdefault(name, value)


def _read_epoch_after_loading(model: "LTMModel", _: Any) -> None:
    model._read_epoch()
    callback = _on_loaded[model]() if model in _on_loaded else None
    if callback is not None:
        callback()


def fit_classes(state_dict: dict[str, Any], model: "LTMModel") -> dict[str, Any]:
    """Pretrained weights for another number of classes: what is tied to it starts anew, as timm's head does."""
    if model.num_classes < 2 and not model.merge_config.num_clusters:
        return state_dict  # nothing to be tied to: the clusters are the checkpoint's
    state_dict, own = dict(state_dict), model.state_dict()
    for name, _ in model.mergers():
        saved = {key: state_dict[key] for key in own if key.startswith(f"{name}.clusters.") and key in state_dict}
        log_q, centroids = f"{name}.clusters.log_q", f"{name}.clusters.centroids"
        if not model.merge_config.num_clusters and centroids in saved and len(saved[centroids]) != model.num_classes:
            state_dict.update({key: own[key] for key in saved})
        elif log_q in saved and saved[log_q].shape[1] != model.num_classes:
            state_dict[log_q] = own[log_q]
    return state_dict


def mean_keys(x: Tensor, qkv: nn.Module, layout: tuple[int, int]) -> Tensor:
    """Keys of tokens x (..., D), averaged over heads by one product: (..., K), without gradient.

    Args:
        qkv: A linear layer or 1 x 1 convolution that projects to queries, keys and values.
        layout: Its outputs' outer axes: (3, heads), or (heads, 3).
    """
    # detach: torch.fx does not record no_grad
    weight, bias = qkv.weight.detach().reshape(*layout, -1, qkv.weight.shape[1]), None
    weight = weight.select(layout.index(3), 1).mean(dim=0)
    if qkv.bias is not None:
        bias = qkv.bias.detach().reshape(*layout, -1).select(layout.index(3), 1).mean(dim=0)
    return F.linear(x.detach(), weight, bias)


def to_map(x: Tensor, state: MergeState) -> Tensor:
    """(B, P, D) -> (B, H', W', D), the tokens of a map as one."""
    grid = state.grid
    assert grid is not None
    return x.reshape(-1, grid[0], grid[1], fixed(x.shape[2]))


def plain_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """``cls.forward`` as a method ``plain_forward`` of a subclass: TorchScript has no super(), and goes by names."""
    fn = cls.forward
    copy = types.FunctionType(fn.__code__, fn.__globals__, "plain_forward", fn.__defaults__, fn.__closure__)
    copy.__annotations__ = fn.__annotations__
    return copy


def resized(now: tuple[Any, ...], *sizes: Any) -> tuple[Any, ...]:
    """Sizes after ``set_input_size``: those given, as pairs, and those of ``now`` where one is None."""
    return tuple(to_2tuple(was if size is None else size) for size, was in zip(sizes, now, strict=True))


def run_block(
    block: nn.Module,
    x: Tensor,
    state: MergeState,
    checkpointing: bool = False,
    observe: bool = False,
    keep_mask: bool = False,
) -> tuple[Tensor, MergeState]:
    """One LTM block, its activations recomputed in the backward pass if ``checkpointing``; the mask, if it is kept."""
    if not checkpointing:
        return block(x, state=state, observe=observe)
    kept: list[Any] = []

    def run(x: Tensor, size: Tensor, cells: Tensor | None, carried: Tensor | None) -> tuple[Any, ...]:
        x, after = block(x, state=MergeState(size, cells, state.grid, carried), observe=observe)
        kept[:] = after.grid, after.mask if keep_mask else None
        return x, after.size, after.cells, after.carried

    # flat arguments: re-entrant checkpoints lose the gradients of nested ones
    x, size, cells, carried = checkpoint(run, x, state.size, state.cells, state.carried)
    return x, MergeState(size, cells, kept[0], carried, kept[1])


class _Tracer(torch.fx.Tracer):
    """timm's rules of what torch.fx looks into."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (DropPath, *get_notrace_modules())  # DropPath asks for the mode
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


class LTMModel(nn.Module):
    """Mixin of every LTM model, in front of timm's class.

    The constructor of the subclass ends with :meth:`_finish_ltm`, which has :meth:`_add_mergers` give blocks their
    :class:`TokenMerger`: after timm's own initialisation, so that its random numbers are those of the plain model.
    """

    merge_config: MergeConfig
    block_ratios: tuple[float, ...]  # of every transformer block
    collecting: bool = False

    def _add_mergers(self, dd: dict[str, Any]) -> None:
        """Set ``block_ratios`` and the blocks' mergers, made on ``dd``, device and dtype."""
        raise NotImplementedError

    def _finish_ltm(self, config: MergeConfig, ltm_kwargs: dict[str, Any], kwargs: dict[str, Any]) -> None:
        self.merge_config, self.ltm_args = config, dict(ltm_kwargs)
        self._add_mergers({name: kwargs.get(name) for name in ("device", "dtype")})
        self._forced: bool | None = None
        self._epoch, self._merging = 0, False
        merging = [i for i, ratio in enumerate(self.block_ratios) if ratio < 1]
        for index, (_, merger) in zip(merging, self.mergers(), strict=True):
            merger.index = index
        if merging and all(merger.num_slots == merger.num_tokens for _, merger in self.mergers()):
            largest = max(
                (1 - 1 / max(merger.tokens)) ** 2 if isinstance(merger.tokens, tuple) else 1 - 1 / merger.tokens
                for _, merger in self.mergers()
            )
            warnings.warn(
                f"compression_ratio: {self.merge_config.compression_ratio} merges nothing at this input size, where "
                f"the number of tokens (of a map, of each side) is rounded up to what it was. Use {largest:.3f} or "
                "less to merge in a block.",
                stacklevel=3,
            )
        self._read_epoch()
        self.register_load_state_dict_pre_hook(_fill_in)
        self.register_load_state_dict_post_hook(_read_epoch_after_loading)
        for callback in _on_created:
            callback(self)

    def mergers(self) -> Iterator[tuple[str, TokenMerger]]:
        """The blocks' mergers by name, in the order they run."""
        for name, module in self.named_modules():
            if isinstance(module, TokenMerger):
                yield name, module

    @property
    def epoch(self) -> int:
        """Epochs of training behind, as last read from the model's buffers."""
        return self._epoch

    @property
    def merging(self) -> bool:
        """Whether a forward pass merges now."""
        return self._merging

    def set_merging(self, enable: bool | None = True) -> None:
        """Switch merging on or off. Off, the model is the plain timm model, bit for bit.

        Args:
            enable: ``None`` returns to the schedule: on after ``merge_warmup_epochs``.
        """
        if enable is not None and not isinstance(enable, bool):
            raise ValueError(f"enable: got {enable!r}, expected True, False, or None for the schedule's.")
        self._forced = enable
        self._read_epoch()

    def set_collecting(self, enable: bool) -> None:
        """Whether training batches leave their features for the clusters' refresh. ``ClusterRefresh`` calls this."""
        self.collecting = enable
        for _, merger in self.mergers():
            merger.collecting = enable and merger.updates
            merger.features = merger.labels = None

    def train(self, mode: bool = True) -> "LTMModel":
        self._read_epoch()  # an EMA copy's buffers change behind its back
        callback = _on_mode.get(self)
        if callback is not None:
            callback(mode)
        return super().train(mode)

    def _read_epoch(self) -> None:
        epoch = next((merger.epoch for _, merger in self.mergers()), None)
        if epoch is not None and not epoch.is_meta:
            self._epoch = int(epoch)
        # a plain flag: torch.compile would compile anew for every value of a counter
        after_warmup = self._epoch >= self.merge_config.merge_warmup_epochs
        self._merging = epoch is not None and (after_warmup if self._forced is None else self._forced)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images this model was made for."""
        return self.patch_embed.img_size

    def _input_grid(self, x: Tensor) -> tuple[int, int]:
        """(H, W) of the patches of images x, where blocks do not say."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_masks(self, x: Tensor) -> MergeMasks:
        """The masks of images (B, C, H, W): of each block that merges, and accumulated back to the input's tokens.

        Merges whether merging is on or not: a model in warm-up shows what it would do. For a model in eval mode.
        """
        masks: list[Tensor] = []
        accumulated: list[Tensor] = []
        grids: list[tuple[int, int]] = []

        def keep(merger: TokenMerger, args: tuple[Any, ...], output: tuple[Tensor, MergeState]) -> None:
            masks.append(output[1].mask.dense())
            starts = merger.first or not accumulated
            accumulated.append(masks[-1] if starts else accumulated[-1] @ masks[-1])  # B (H W) N @ B N P
            grids.append((args[1].grid or self._input_grid(x)) if starts else grids[-1])

        forced, hooks = self._forced, [merger.register_forward_hook(keep) for _, merger in self.mergers()]
        self.set_merging(True)
        try:
            self.forward_features(x)
        finally:
            self.set_merging(forced)
            for hook in hooks:
                hook.remove()
        return MergeMasks([merger.index for _, merger in self.mergers()], masks, accumulated, grids)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        super().reset_classifier(num_classes, *args, **kwargs)
        for _, merger in self.mergers():
            merger.reset_classes(num_classes)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead: the FX graph of this model in its mode, merging as it is now.

        It collects nothing, reads no labels, and attention keeps the dropout of the mode it was scripted in.
        """
        return torch.fx.GraphModule(self, _Tracer().trace(self), type(self).__name__)

    def _check_not_tied(self, now: Any, new: Any) -> None:
        """Before another input size is set."""
        if new != now and any(merger.tied for _, merger in self.mergers()):
            raise ValueError(
                f"img_size, patch_size: got {new}, expected {now}: cluster_grid=0, a first mask f(X) or "
                "mask_mode='batch' tie a model to one input size. Create it with these sizes."
            )

    def _keep_parameters_in_graph(self, x: Tensor) -> Tensor:
        """Add zero times every LTM parameter: DistributedDataParallel wants gradients of all, also in warm-up."""
        if self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            first = [p.flatten()[:1] for _, merger in self.mergers() for p in merger.parameters()]
            if first:
                x = x + 0.0 * torch.cat(first).sum().to(x.dtype)
        return x
