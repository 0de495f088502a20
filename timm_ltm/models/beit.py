"""timm's BEiT without tables of relative positions, merging."""

from typing import Any

import torch
import torch.fx
from timm.models.beit import Beit, Block
from torch import Tensor, nn

from timm_ltm.models.attention import attend
from timm_ltm.models.block import ScaledBlock
from timm_ltm.models.sequence import SequenceModel
from timm_ltm.reduction import Seen, Tokens, initial_tokens

__all__ = ["ReducedBeit", "ReducedBeitBlock"]

torch.fx.wrap("initial_tokens")  # makes tensors from shapes


class ReducedBeitBlock(ScaledBlock, Block):
    """timm's block."""

    def attend(self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str]) -> tuple[Tensor, Seen]:
        h, seen, prefix = self.norm1(x), Seen(), self.num_prefix_tokens
        if wanted:
            y, seen = attend(self.attn, h, bias, None, prefix, wanted, tokens)
        else:
            y = self.attn(h, shared_rel_pos_bias=bias)
        return x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y), seen


class ReducedBeit(SequenceModel, Beit):
    """timm's BEiT. Its attention takes no masks."""

    block_class, plain_block = ReducedBeitBlock, Block

    @classmethod
    def check(cls, model: nn.Module) -> None:
        super().check(model)
        if model.rel_pos_bias is not None or any(block.attn.window_size is not None for block in model.blocks):
            raise ValueError(
                "use_rel_pos_bias: got tables of relative positions, expected none: they are of all patches, and "
                "merged tokens are fewer. Use a model with absolute or rotary positions."
            )

    def embed(self, x: Tensor) -> tuple[Tensor, Tokens, list[Any]]:
        grid = self.grid_of(x)
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
        return x, initial_tokens(x, self.num_prefix_tokens, grid), [{}] * len(self.blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's: tokens that were merged are put back where they came from."""
        if self.merging or self._observes():
            return super().forward_features(x)
        return self._keep_parameters_in_graph(Beit.forward_features(self, x))

    def forward(self, x: Tensor) -> Tensor:
        """timm's. What the head does not read is not put back."""
        return super().forward(x) if self.merging else Beit.forward(self, x)
