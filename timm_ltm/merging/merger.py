"""The mask module of one block (Figure 1 of the paper): from a block's attention output to merged tokens.

TorchScript compiles the forward pass, hence no postponed annotations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_ltm.merging.mask_module import MaskModule, MergeState
from timm_ltm.merging.merge import (
    AnchoredMask,
    GridMask,
    anchored_mask,
    dense_mask,
    even_columns,
    fixed,
    merge,
    order_by_redundancy,
    order_evenly,
    take,
    take_columns,
)
from timm_ltm.merging.update import at_least_float32, mask_update, no_autocast, one_hot

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
            inputs: X (B parts, num_prefix + N, D) the block's input, read where the first mask is f(X).
            observe: Leave the tokens as they are; only keep features for the clusters' refresh (warm-up).

        Returns:
            Merged tokens (B parts, num_prefix + P, D) and their state.
        """
        if observe:
            with torch.no_grad():
                return z, self._mask(z, state, num_prefix, keys, inputs, observe)
        after = self._mask(z, state, num_prefix, keys, inputs)
        mask = after.mask
        assert mask is not None
        return merge(z, mask, num_prefix, self.parts), after

    def _mask(
        self,
        z: Tensor,
        state: MergeState,
        num_prefix: int,
        keys: Tensor | None,
        inputs: Tensor | None,
        observe: bool = False,
    ) -> MergeState:
        """The state of merged tokens, with their mask; of these ones, if they are only observed."""
        if self.tied and not observe:
            self._check_size(z.shape[1] - num_prefix, state.grid)
        unit: Tensor | None = None
        if self.needs_keys:
            assert keys is not None, "anchors are compared by attention keys"
            unit = at_least_float32(self._of_image(keys)[:, num_prefix:])
            unit = unit / torch.linalg.vector_norm(unit, dim=2, keepdim=True).clamp_min(1e-12)
        first: Tensor | None = None
        if self.starts_mask:
            assert inputs is not None, "f(X) needs the block's input"
            first = self._first_logits(self._of_image(inputs)[:, num_prefix:])
        values, mlp = self._values(z, num_prefix)
        if torch.jit.is_scripting():
            return self._form(state, unit, values, mlp, first, observe)
        with no_autocast(z):
            return self._form(state, unit, values, mlp, first, observe)

    def _check_size(self, num_tokens: int, grid: tuple[int, int] | None) -> None:
        got, expected = f"{num_tokens}", f"{self.num_tokens}"
        if grid is not None:
            got, expected = f"{grid[0]} x {grid[1]}", f"{self.grid[0]} x {self.grid[1]}"
        if got != expected:
            raise ValueError(
                f"got {got} tokens, expected {expected}: cluster_grid=0, a first mask f(X) or mask_mode='batch' tie a "
                "model to one input size. Create the model with this img_size, or with settings that are not tied to "
                "one."
            )

    def _form(
        self,
        state: MergeState,
        unit: Tensor | None,
        values: Tensor | None,
        mlp: Tensor | None,
        first: Tensor | None,
        observe: bool,
    ) -> MergeState:
        if self.dense:
            return self._dense(state, unit, values, mlp, first, observe)
        else:  # TorchScript compiles what follows a return
            assert unit is not None
            grid = state.grid
            if grid is None:
                return self._anchored(state, unit, values, mlp, observe)
            slots = self._map_slots(grid)
            update: Tensor | None = None
            if self.updates and values is not None and mlp is not None:
                of_cells = self._direction(values, state, None)
                if not observe:
                    update = self._batch_mean(mask_update(mlp, of_cells, self._step()))  # B (H W) c
            if observe:
                return state
            if self.own_lines:
                return self._own(state, grid, slots, unit, update)
            return self._straight(state, grid, slots, unit, update)

    def _anchors(self, unit: Tensor, P: int) -> tuple[Tensor, Tensor, Tensor]:
        """The order (anchors, then the others), unit keys in it, and the logits (B, M, P) of others to anchors."""
        with torch.no_grad():
            if self.even_lines:
                order = order_evenly(unit.shape[1], P, unit.device).expand(unit.shape[0], -1)
            else:
                order = order_by_redundancy(unit, P)
        unit = take(unit, order)
        beta = at_least_float32(self.log_beta).exp()
        return order, unit, beta * (unit[:, P:] @ unit[:, :P].transpose(1, 2))

    def _anchored(
        self, state: MergeState, unit: Tensor, values: Tensor | None, mlp: Tensor | None, observe: bool
    ) -> MergeState:
        """A selection plus dense rows for the tokens that lose their slot."""
        P = self._num_slots(fixed(unit.shape[1]))
        order, unit, similarity = self._anchors(unit, P)
        cells, previous = state.cells, state.carried
        slot_cells: Tensor | None = None
        if cells is not None:
            slot_cells = cells.gather(1, order[:, :P])
        own: Tensor | None = None
        rest: Tensor | None = None
        of_cells: Tensor | None = None
        if self.updates and values is not None and mlp is not None:
            merged: Tensor | None = None
            if slot_cells is None:
                merged = merge(values, anchored_mask(order, similarity, state.size)[0])
            of_cells = self._direction(values, state, merged)
            if not observe:
                update = self._batch_mean(mask_update(mlp, of_cells, self._step()))  # of tokens in place: images align
                own, rest = _in_slots(take(update, order), slot_cells, P)
                if self.carries and previous is not None:
                    query, key = take(previous, order).chunk(2, dim=2)
                    own = own + (query[:, :P] * key[:, :P]).sum(dim=2)
                    rest = rest + query[:, P:] @ key[:, :P].transpose(1, 2)
        if observe:
            return state
        mask, size = anchored_mask(order, similarity, state.size, own, rest)
        carried: Tensor | None = None
        if self.updates and self.carries and mlp is not None and of_cells is not None:
            # the update as factors: rows (queries) travel by merging, columns (keys) as they are
            key = self._step() * of_cells
            carried = torch.cat((merge(mlp, mask), key if slot_cells is None else take(key, slot_cells)), dim=2)
        return MergeState(size, slot_cells, None, carried, mask)

    def _straight(
        self, state: MergeState, grid: tuple[int, int], slots: tuple[int, int], unit: Tensor, update: Tensor | None
    ) -> MergeState:
        """One mask for all rows, then one for all columns: whole columns merge, then whole rows, as tokens of H K keys.

        Sizes and cells of such maps are products of what their rows and their columns have.
        """
        H, W = grid
        H_, W_ = slots
        K, g, cells = fixed(unit.shape[2]), self.cluster_grid, state.cells
        unit, size = unit.reshape(-1, H, W, K), state.size.reshape(-1, H, W)
        of_width, of_height = size.sum(dim=1), size.sum(dim=2)
        total = of_width.sum(dim=1).view(-1, 1, 1)
        of_rows: Tensor | None = None
        of_columns: Tensor | None = None
        rows_update: Tensor | None = None
        columns_update: Tensor | None = None
        if cells is not None:
            cells = cells.reshape(-1, H, W)
            of_rows, of_columns = cells[:, :, 0] // g, cells[:, 0] % g  # B H, B W
            if update is not None:
                update = update.reshape(-1, H, W, g, g)
                # of columns the mean over rows, each for its own row of cells: B 1 1 (H g) @ B W (H g) g -> B W g
                mean = one_hot(of_rows, g, update).reshape(-1, 1, 1, H * g) / H
                columns_update = (mean @ update.transpose(1, 2).reshape(-1, W, H * g, g)).flatten(1, 2)
                mean = one_hot(of_columns, g, update).reshape(-1, 1, 1, W * g) / W
                rows_update = (mean @ update.transpose(3, 4).reshape(-1, H, W * g, g)).flatten(1, 2)  # B H g
        rows: AnchoredMask | None = None
        columns: AnchoredMask | None = None
        if W_ < W or H_ == H:
            keys = unit.transpose(1, 2).reshape(-1, W, H * K) / H**0.5  # B H W K -> B W (H K)
            rows, merged = self._along(_Tokens(keys, of_width, of_columns, columns_update), W_)
            of_width, of_columns = merged.size, merged.cells
        if H_ < H:
            keys = unit.reshape(-1, H, W * K) / W**0.5  # B H W K -> B H (W K)
            columns, merged = self._along(_Tokens(keys, of_height, of_rows, rows_update), H_)
            of_height, of_rows = merged.size, merged.cells
        size = (of_height.unsqueeze(2) * of_width.unsqueeze(1) / total).flatten(1)  # B H' W' -> B (H' W')
        if of_rows is not None and of_columns is not None:
            cells = (of_rows.unsqueeze(2) * g + of_columns.unsqueeze(1)).flatten(1)
        return MergeState(size, cells, slots, None, GridMask(rows, columns, grid, True))

    def _own(
        self, state: MergeState, grid: tuple[int, int], slots: tuple[int, int], unit: Tensor, update: Tensor | None
    ) -> MergeState:
        """Every row by a mask of its own, then every column."""
        H, W = grid
        H_, W_ = slots
        tokens = _Tokens(unit, state.size, state.cells, update)
        rows: AnchoredMask | None = None
        columns: AnchoredMask | None = None
        if W_ < W or H_ == H:
            rows, tokens = self._along(_folded(tokens, W), W_)  # (B H) W -> (B H) W'
            tokens = _folded(tokens, H * W_)
        if H_ < H:
            columns, tokens = self._along(_folded(_turned(tokens, H), H), H_)  # (B W') H -> (B W') H'
            tokens = _turned(_folded(tokens, W_ * H_), W_)
        return MergeState(tokens.size, tokens.cells, slots, None, GridMask(rows, columns, grid))

    def _along(self, tokens: "_Tokens", P: int) -> tuple[AnchoredMask, "_Tokens"]:
        """Lines of n tokens each to P: their mask, and what is known of the merged tokens. A slot is its anchor."""
        cells, update = tokens.cells, tokens.update
        order, unit, similarity = self._anchors(tokens.unit, P)
        if cells is not None:
            cells = cells.gather(1, order[:, :P])
        own: Tensor | None = None
        rest: Tensor | None = None
        if update is not None:
            update = take(update, order)
            own, rest = _in_slots(update, cells, P)
            update = update[:, :P]
        mask, size = anchored_mask(order, similarity, tokens.size, own, rest)
        return mask, _Tokens(unit[:, :P], size, cells, update)

    def _dense(
        self,
        state: MergeState,
        unit: Tensor | None,
        values: Tensor | None,
        mlp: Tensor | None,
        first: Tensor | None,
        observe: bool,
    ) -> MergeState:
        """Every entry of the N x P mask."""
        size, slot_cells, carried, grid = state.size, state.cells, state.carried, state.grid
        # token i of this block is slot i of the last one: of unmerged tokens (warm-up), slots are the columns
        before = size.shape[1] if carried is None else carried.shape[2]
        after: tuple[int, int] | None = None
        if grid is not None:
            after = self._map_slots(grid)
            P = after[0] * after[1]
        else:
            P = self._num_slots(size.shape[1])
        if grid is not None and after is not None and before == grid[0] * grid[1]:
            rows = even_columns(grid[0], after[0], size.device).unsqueeze(1) * grid[1]
            columns = (rows + even_columns(grid[1], after[1], size.device)).flatten()
        elif unit is not None and grid is None:
            with torch.no_grad():
                columns = order_by_redundancy(unit, P)[:, :P]
        else:
            columns = even_columns(before, P, size.device)
        if self.needs_keys and unit is not None:
            anchors = take(unit, columns) if columns.ndim == 2 else unit[:, columns]
            first = at_least_float32(self.log_beta).exp() * (unit @ anchors.transpose(1, 2))
        previous: Tensor | None = None
        if carried is not None:
            previous = take_columns(carried, columns)
        base = previous if first is None else at_least_float32(first)
        assert base is not None, "a block without a first mask follows one that carries its mask"
        mask, size = dense_mask(base, state.size, self.mask_softmax)
        weights = base if first is None else mask.weights  # G^(l-1)
        if slot_cells is not None:
            index = columns
            if columns.ndim == 1:
                index = columns.clamp_max(slot_cells.shape[1] - 1).expand(size.shape[0], -1)
            slot_cells = slot_cells.gather(1, index)
        update: Tensor | None = None
        if self.updates and values is not None and mlp is not None:
            merged: Tensor | None = None
            if slot_cells is None:
                merged = weights.transpose(1, 2) @ values  # G^T Z
            of_cells = self._direction(values, state, merged)
            of_slots = of_cells if slot_cells is None else take(of_cells, slot_cells)
            if not observe:
                update = self._batch_mean(mask_update(mlp, of_slots, self._step()))  # Eq. 3
        if self.needs_keys and previous is not None:
            update = previous if update is None else update + previous
        if update is not None:
            mask, size = dense_mask(base + update, state.size, self.mask_softmax)
        if self.carries:
            carried = update if self.needs_keys else mask.weights
        if observe:
            return MergeState(state.size, state.cells, grid, carried)
        if carried is not None:
            carried = merge(carried, mask)  # rows travel by merging
        return MergeState(size, slot_cells, after, carried, mask)

    def _first_logits(self, X: Tensor) -> Tensor:
        """f(X) (B, N, P). ``"printed"`` is Section 3.1's f(X / tau); inside the sigmoid tau sparsifies nothing."""
        if self.printed:
            return self.mask_fc(X / self.tau).sigmoid()
        return self.mask_fc(X).sigmoid() / self.tau


class _Tokens(NamedTuple):
    """Lines of tokens: unit keys (L, n, K), sizes (L, n), cells (L, n), updates (L, n, c)."""

    unit: Tensor
    size: Tensor
    cells: Tensor | None
    update: Tensor | None


def _folded(tokens: _Tokens, length: int) -> _Tokens:
    """(L, n, ...) -> (L n / length, length, ...) of each."""
    cells, update = tokens.cells, tokens.update
    return _Tokens(
        tokens.unit.reshape(-1, length, tokens.unit.shape[2]),
        tokens.size.reshape(-1, length),
        cells.reshape(-1, length) if cells is not None else None,
        update.reshape(-1, length, update.shape[2]) if update is not None else None,
    )


def _turned(tokens: _Tokens, height: int) -> _Tokens:
    """(L, H W, ...) -> (L, W H, ...) of each."""
    cells, update = tokens.cells, tokens.update
    return _Tokens(
        _transposed(tokens.unit, height),
        _transposed(tokens.size.unsqueeze(2), height).squeeze(2),
        _transposed(cells.unsqueeze(2), height).squeeze(2) if cells is not None else None,
        _transposed(update, height) if update is not None else None,
    )


def _transposed(x: Tensor, height: int) -> Tensor:
    """(L, H W, D) -> (L, W H, D)."""
    L, N, D = x.shape
    return x.reshape(L, height, N // height, D).transpose(1, 2).reshape(L, N, D)


def _in_slots(update: Tensor, cells: Tensor | None, P: int) -> tuple[Tensor, Tensor]:
    """Eq. 3 where an anchored mask is dense: each anchor in its own slot (B, P), the others in every slot (B, M, P).

    Args:
        update: (B, N, c) of every token for every cell, or every slot: anchors first, then the others.
        cells: (B, P) of the slots, None where every slot has its own.
    """
    own, rest = update[:, :P], update[:, P:]
    if cells is None:
        return own.diagonal(dim1=1, dim2=2), rest
    of_slots = one_hot(cells, fixed(update.shape[2]), update)  # B P c
    return (own * of_slots).sum(dim=2), rest @ of_slots.transpose(1, 2)
