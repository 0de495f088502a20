"""The mask module of one block (Figure 1 of the paper): from a block's attention output to merged tokens."""

from __future__ import annotations

from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.merging.mask_module import MaskModule, MergeState, count, slots_of
from timm_ltm.merging.merge import (
    AnchoredMask,
    DenseMask,
    GridMask,
    anchored_mask,
    dense_mask,
    even_columns,
    merge,
    order_by_redundancy,
    order_evenly,
    take,
    take_columns,
)
from timm_ltm.merging.update import at_least_float32, mask_update, no_autocast

__all__ = ["TokenMerger"]


class TokenMerger(MaskModule):
    """Merges the tokens of one block: anchors, information-bottleneck update, mask, merge.

    A sequence of tokens is merged at once; a map (a state with a grid) by rows and by columns, and stays a map. A dense
    mask merges either at once.

    Args:
        dim: D.
        tokens: N, or (H, W), this block will see at the model's default input size. Only settings tied to a size use
            it.
        ratio: r of Section 3.1, P = ceil(r N); of a map (ceil(H sqrt r), ceil(W sqrt r)).
        config: The method's settings.
        num_classes: K, where the number of clusters or the literal Eq. 3 depends on it.
        first: Whether this is the first block that merges, of the model or of a stage.
        parts: Rows of the input in a row that are of one image and merged alike (the pixels of MobileViT's patches).

    Raises:
        ValueError: Settings that a map cannot be merged with.
    """

    def forward(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int = 0,
        keys: Tensor | None = None,
        inputs: Tensor | None = None,
        observe: bool = False,
    ) -> tuple[Tensor, MergeState]:
        """Merge one block's tokens.

        Args:
            z: Attention output with its shortcut (B parts, num_prefix + N, D).
            state: Of these tokens.
            keys: (B parts, num_prefix + N, K) mean attention keys, where :attr:`needs_keys`.
            inputs: X (B parts, num_prefix + N, D) the block's input, where the first mask is f(X).
            observe: Leave the tokens as they are; only keep features for the clusters' refresh (warm-up).

        Returns:
            Merged tokens (B parts, num_prefix + P, D) and their state.
        """
        if observe:
            with torch.no_grad():
                return z, self._mask(z, state, num_prefix, keys, inputs, observe)[1]
        mask, after = self._mask(z, state, num_prefix, keys, inputs)
        return merge(z, mask, num_prefix, self.parts), after

    def _mask(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int,
        keys: Tensor | None,
        inputs: Tensor | None,
        observe: bool = False,
    ) -> tuple[Any, MergeState]:
        """The mask of these tokens, and the state of merged ones."""
        tokens = z.shape[1] - num_prefix if state.grid is None else state.grid
        if self.tied and self.tokens != tokens and not observe:
            raise ValueError(
                f"got {tokens} tokens, expected {self.tokens}: cluster_grid=0, first_mask={self.config.first_mask!r} "
                f"or mask_mode={self.config.mask_mode!r} tie a model to one input size. Create the model with this "
                "img_size, or with settings that are not tied to one."
            )
        slots = slots_of(self.tokens if self.tied else tokens, self.ratio)  # in warm-up blocks see more tokens
        unit = None
        if self.needs_keys:
            assert keys is not None, "anchors are compared by attention keys"
            unit = F.normalize(at_least_float32(self._of_image(keys)[:, num_prefix:]), dim=2)
        if self.config.mask_form == "dense":
            X = self._of_image(inputs)[:, num_prefix:] if inputs is not None else None
            return self._dense(z, state, num_prefix, slots, unit, X, observe)
        if isinstance(slots, tuple):
            return self._lines(z, state, slots, unit, observe)
        return self._anchored(z, state, num_prefix, slots, unit, observe)

    def _anchors(self, unit: Tensor, P: int) -> tuple[Tensor, Tensor, Tensor]:
        """The order (anchors, then the others), unit keys in it, and the logits (B, M, P) of others to anchors."""
        with torch.no_grad():
            if self.config.map_lines == "even" and isinstance(self.tokens, tuple):
                order = order_evenly(unit.shape[1], P, unit.device).expand(unit.shape[0], -1)
            else:
                order = order_by_redundancy(unit, P)
        unit = take(unit, order)
        beta = at_least_float32(self.log_beta).exp()
        return order, unit, beta * (unit[:, P:] @ unit[:, :P].transpose(1, 2))

    def _anchored(
        self, z: Tensor, state: MergeState, num_prefix: int, P: int, unit: Tensor, observe: bool
    ) -> tuple[AnchoredMask | None, MergeState]:
        """A selection plus dense rows for the tokens that lose their slot."""
        values, mlp = self._values(z, num_prefix)
        with no_autocast(z):
            order, unit, similarity = self._anchors(unit, P)
            cells = state.cells.gather(1, order[:, :P]) if state.cells is not None else None
            own = rest = carried = None
            if values is not None and mlp is not None:
                merged = merge(values, anchored_mask(order, similarity, state.size)[0]) if cells is None else None
                of_cells = self._direction(values, state, merged) * self._step
                if observe:
                    return None, state
                update = self._batch_mean(mask_update(mlp, of_cells, 1.0))  # of tokens in place: images align
                own, rest = _in_slots(take(update, order), cells, P)
                if self.config.carry_mask and state.carried is not None:
                    query, key = take(state.carried, order).chunk(2, dim=2)
                    own = own + (query[:, :P] * key[:, :P]).sum(dim=2)
                    rest = rest + query[:, P:] @ key[:, :P].transpose(1, 2)
            if observe:
                return None, state
            mask, size = anchored_mask(order, similarity, state.size, own, rest)
            if self.config.carry_mask and mlp is not None:
                # the update as factors: rows (queries) travel by merging, columns (keys) as they are
                carried = torch.cat((merge(mlp, mask), of_cells if cells is None else take(of_cells, cells)), dim=2)
        return mask, MergeState(size, cells, None, carried, mask)

    def _lines(
        self, z: Tensor, state: MergeState, slots: tuple[int, int], unit: Tensor, observe: bool
    ) -> tuple[GridMask | None, MergeState]:
        """A map, its rows from W to W' tokens, its columns from H to H'."""
        values, mlp = self._values(z)
        with no_autocast(z):
            update = None
            if values is not None and mlp is not None:
                of_cells = self._direction(values, state, None)
                if not observe:
                    update = self._batch_mean(mask_update(mlp, of_cells, self._step))  # B (H W) c
            if observe:
                return None, state
            return (self._own if self.config.map_lines == "own" else self._straight)(state, slots, unit, update)

    def _straight(
        self, state: MergeState, slots: tuple[int, int], unit: Tensor, update: Tensor | None
    ) -> tuple[GridMask, MergeState]:
        """One mask for all rows, then one for all columns: whole columns merge, then whole rows, as tokens of H K keys.

        Sizes and cells of such maps are products of what their rows and their columns have.
        """
        assert state.grid is not None
        (H, W), (H_, W_), g = state.grid, slots, self.config.cluster_grid
        unit, size = (t.reshape(-1, H, W, *t.shape[2:]) for t in (unit, state.size))
        total = size.sum(dim=(1, 2)).unsqueeze(1)
        of_rows = of_columns = rows_update = columns_update = None
        if state.cells is not None:
            cells = state.cells.reshape(-1, H, W)
            of_rows, of_columns = cells[:, :, 0] // g, cells[:, 0] % g  # B H, B W
        if update is not None:
            update = update.reshape(-1, H, W, g, g)
            index = of_rows.reshape(-1, H, 1, 1, 1).expand(-1, -1, W, 1, g)
            columns_update = update.gather(3, index).squeeze(3).mean(dim=1)  # B W g: of columns, for columns of cells
            index = of_columns.reshape(-1, 1, W, 1, 1).expand(-1, H, -1, g, 1)
            rows_update = update.gather(4, index).squeeze(4).mean(dim=2)  # B H g
        rows = columns = None
        of_width, of_height = size.sum(dim=1), size.sum(dim=2)
        if W_ < W or H_ == H:
            keys = unit.transpose(1, 2).reshape(unit.shape[0], W, -1) / H**0.5  # B H W K -> B W (H K)
            rows, (_, of_width, of_columns, _) = self._along((keys, of_width, of_columns, columns_update), W_)
        if H_ < H:
            keys = unit.reshape(unit.shape[0], H, -1) / W**0.5  # B H (W K)
            columns, (_, of_height, of_rows, _) = self._along((keys, of_height, of_rows, rows_update), H_)
        size = (of_height.unsqueeze(2) * of_width.unsqueeze(1)).flatten(1) / total  # B (H' W')
        cells = None
        if of_rows is not None and of_columns is not None:
            cells = (of_rows.unsqueeze(2) * g + of_columns.unsqueeze(1)).flatten(1)
        mask = GridMask(rows, columns, state.grid, straight=True)
        return mask, MergeState(size, cells, slots, None, mask)

    def _own(
        self, state: MergeState, slots: tuple[int, int], unit: Tensor, update: Tensor | None
    ) -> tuple[GridMask, MergeState]:
        """Every row by a mask of its own, then every column."""
        assert state.grid is not None
        (H, W), (H_, W_) = state.grid, slots
        tokens: _Tokens = (unit, state.size, state.cells, update)
        rows = columns = None
        if W_ < W or H_ == H:
            rows, tokens = self._along(_folded(tokens, W), W_)  # (B H) W -> (B H) W'
            tokens = _folded(tokens, H * W_)
        if H_ < H:
            columns, tokens = self._along(_folded(_turned(tokens, H), H), H_)  # (B W') H -> (B W') H'
            tokens = _turned(_folded(tokens, W_ * H_), W_)
        _, size, cells, _ = tokens
        mask = GridMask(rows, columns, state.grid)
        return mask, MergeState(size, cells, slots, None, mask)

    def _along(self, tokens: _Tokens, P: int) -> tuple[AnchoredMask, _Tokens]:
        """Lines of n tokens each to P: their mask, and what is known of the merged tokens. A slot is its anchor."""
        unit, size, cells, update = tokens
        order, unit, similarity = self._anchors(unit, P)
        cells = cells.gather(1, order[:, :P]) if cells is not None else None
        own = rest = None
        if update is not None:
            update = take(update, order)
            own, rest = _in_slots(update, cells, P)
            update = update[:, :P]
        mask, size = anchored_mask(order, similarity, size, own, rest)
        return mask, (unit[:, :P], size, cells, update)

    def _dense(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int,
        slots: int | tuple[int, int],
        unit: Tensor | None,
        X: Tensor | None,
        observe: bool,
    ) -> tuple[DenseMask, MergeState]:
        """Every entry of the N x P mask."""
        config, P, device = self.config, count(slots), z.device
        after = slots if isinstance(slots, tuple) else None
        first = self._first_logits(X) if self.starts_mask else None
        values, mlp = self._values(z, num_prefix)
        with no_autocast(z):
            # token i of this block is slot i of the last one: of unmerged tokens (warm-up), slots are the columns
            before = z.shape[1] - num_prefix if state.carried is None else state.carried.shape[2]
            if state.grid is not None and after is not None and before == count(state.grid):
                (H, W), (H_, W_) = state.grid, after
                columns = (even_columns(H, H_, device).unsqueeze(1) * W + even_columns(W, W_, device)).flatten()
            elif unit is not None and state.grid is None:
                with torch.no_grad():
                    columns = order_by_redundancy(unit, P)[:, :P]
            else:
                columns = even_columns(before, P, device)
            if unit is not None:
                anchors = take(unit, columns) if columns.ndim == 2 else unit[:, columns]
                first = at_least_float32(self.log_beta).exp() * (unit @ anchors.transpose(1, 2))
            previous = take_columns(state.carried, columns) if state.carried is not None else None
            if first is not None:
                base = at_least_float32(first)
                mask, size = dense_mask(base, state.size, config.mask_softmax)
                weights = mask.weights
            else:
                assert previous is not None, "a block without a first mask follows one that carries its mask"
                base = weights = previous  # G^(l-1)
            slot_cells = state.cells
            if slot_cells is not None:
                index = columns
                if columns.ndim == 1:
                    index = columns.clamp_max(slot_cells.shape[1] - 1).expand(size.shape[0], -1)
                slot_cells = slot_cells.gather(1, index)
            update = None
            if values is not None and mlp is not None:
                merged = weights.transpose(1, 2) @ values if slot_cells is None else None  # G^T Z
                of_cells = self._direction(values, state, merged)
                of_slots = of_cells if slot_cells is None else take(of_cells, slot_cells)
                if not observe:
                    update = self._batch_mean(mask_update(mlp, of_slots, self._step))  # Eq. 3
            if config.first_mask == "anchors" and previous is not None:
                update = previous if update is None else update + previous
            if update is not None or first is None:
                mask, size = dense_mask(base if update is None else base + update, state.size, config.mask_softmax)
            carried = None
            if config.carry_mask:
                carried = mask.weights if config.first_mask != "anchors" else update
            if observe:
                return mask, state._replace(carried=carried)
            if carried is not None:
                carried = merge(carried, mask)  # rows travel by merging
        return mask, MergeState(size, slot_cells, after, carried, mask)

    def _first_logits(self, X: Tensor | None) -> Tensor:
        """f(X) (B, N, P). ``"printed"`` is Section 3.1's f(X / tau); inside the sigmoid tau sparsifies nothing."""
        assert X is not None, "f(X) needs the block's input"
        if self.config.first_mask == "printed":
            return self.mask_fc(X / self.config.tau).sigmoid()
        return self.mask_fc(X).sigmoid() / self.config.tau


_Tokens = tuple[Tensor, Tensor, Union[Tensor, None], Union[Tensor, None]]  # unit keys, size, cells, update


def _folded(tokens: _Tokens, length: int) -> _Tokens:
    """(L, n, ...) -> (L n / length, length, ...) of each."""
    return tuple(t if t is None else t.reshape(-1, length, *t.shape[2:]) for t in tokens)


def _turned(tokens: _Tokens, height: int) -> _Tokens:
    """(L, H W, ...) -> (L, W H, ...) of each."""
    turned = []
    for t in tokens:
        if t is not None:
            width, rest = t.shape[1] // height, t.shape[2:]
            t = t.reshape(-1, height, width, *rest).transpose(1, 2).reshape(-1, width * height, *rest)
        turned.append(t)
    return tuple(turned)


def _in_slots(update: Tensor, cells: Tensor | None, P: int) -> tuple[Tensor, Tensor]:
    """Eq. 3 where an anchored mask is dense: each anchor in its own slot (B, P), the others in every slot (B, M, P).

    Args:
        update: (B, N, c) of every token for every cell, or every slot: anchors first, then the others.
        cells: (B, P) of the slots, None where every slot has its own.
    """
    columns = torch.arange(P, device=update.device).expand(update.shape[0], -1) if cells is None else cells
    own = update[:, :P].gather(2, columns.unsqueeze(2)).squeeze(2)
    return own, take_columns(update[:, P:], columns)
