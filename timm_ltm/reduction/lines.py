"""Maps merge one axis at a time: any reducer of a sequence run along rows and columns.

All rows of an image are merged by one mask and all its columns by another, so that lines of the image stay straight:
measured better than a mask for every line, and than even spacing.

One letter per axis: B batch, N tokens, P slots, K width of the keys, c cells, H W grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timm_ltm.reduction.masks import Mask
from timm_ltm.reduction.matching import unit_vectors
from timm_ltm.reduction.reducer import Reducer, Seen
from timm_ltm.reduction.tokens import Tokens, at_least_float32, fixed, no_autocast, one_hot

__all__ = ["CELLS_PER_SIDE", "GridMask", "Line", "LineReducer"]

CELLS_PER_SIDE = 4  # g of the coarse grid that advice is given on, see LineReducer.advice


class Line(NamedTuple):
    """A sequence of tokens to be merged: the tokens themselves, or the columns (the rows) of a map.

    Attributes:
        unit: (B, n, K) keys of length 1.
        size: (B, n) how many input tokens each stands for.
        advice: (B, n, c) what is added to the log weight of each token in a slot of each cell, None for nothing.
        cells: (B, n) the cell each lies in, of c, where there is advice.
        straight: The tokens are columns or rows.
    """

    unit: Tensor
    size: Tensor
    advice: Tensor | None = None
    cells: Tensor | None = None
    straight: bool = False


class LineReducer(Reducer):
    """A reducer that merges a sequence at once and a map along its lines. A method writes :meth:`choose`."""

    needs = frozenset({"keys"})
    maps = True
    windows = True

    def choose(self, line: Line, num_slots: int) -> Mask:
        """The mask that merges a line of n tokens to ``num_slots``."""
        raise NotImplementedError

    def compared(self, unit: Tensor, tokens: Tokens) -> Tensor:
        """What tokens of a sequence are compared by, vectors of length 1: their keys (B, N, K), or more."""
        return unit

    def advice(self, z: Tensor, tokens: Tokens) -> Tensor | None:
        """What is learned, on the cells of a coarse g x g grid over the input: (B, N, g g), see :class:`Line`."""
        return None

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> Mask:
        assert seen.keys is not None, "tokens are compared by attention keys"
        with no_autocast(z):
            unit = unit_vectors(at_least_float32(self.of_image(seen.keys)))
            advice, N = self.advice(z, tokens), fixed(unit.shape[1])
            if tokens.grid is not None:
                return self._along_lines(unit, tokens, tokens.grid, advice)
            cells = None if advice is None else tokens.cells(CELLS_PER_SIDE)
            return self.choose(Line(self.compared(unit, tokens), tokens.size, advice, cells), self.num_slots(N))

    def _along_lines(self, unit: Tensor, tokens: Tokens, grid: tuple[int, int], advice: Tensor | None) -> GridMask:
        """One mask for all rows, then one for all columns: whole columns merge, then whole rows, as tokens of H K keys.

        Sizes of such maps are products of what their rows and their columns have, and so are cells.
        """
        (H, W), (H_, W_), g, K = grid, self.slots(grid), CELLS_PER_SIDE, fixed(unit.shape[2])
        unit, size = unit.reshape(-1, H, W, K), tokens.size.reshape(-1, H, W)
        of_width, of_height = size.sum(dim=1), size.sum(dim=2)
        total = of_width.sum(dim=1).view(-1, 1, 1)
        to_columns: Tensor | None = None
        to_rows: Tensor | None = None
        of_columns: Tensor | None = None
        of_rows: Tensor | None = None
        if advice is not None:
            cells = tokens.cells(g).reshape(-1, H, W)
            of_rows, of_columns = cells[:, :, 0] // g, cells[:, 0] % g  # B H, B W
            advice = advice.reshape(-1, H, W, g, g)
            # of columns the mean over rows, each for its own row of cells: B 1 1 (H g) @ B W (H g) g -> B W g
            mean = one_hot(of_rows, g, advice.dtype).reshape(-1, 1, 1, H * g) / H
            to_columns = (mean @ advice.transpose(1, 2).reshape(-1, W, H * g, g)).flatten(1, 2)
            mean = one_hot(of_columns, g, advice.dtype).reshape(-1, 1, 1, W * g) / W
            to_rows = (mean @ advice.transpose(3, 4).reshape(-1, H, W * g, g)).flatten(1, 2)  # B H g
        rows: Mask | None = None
        columns: Mask | None = None
        if W_ < W or H_ == H:  # where nothing merges, one mask of weights 1 for the parameters' gradients
            keys = unit.transpose(1, 2).reshape(-1, W, H * K) / H**0.5  # B H W K -> B W (H K)
            rows = self.choose(Line(keys, of_width, to_columns, of_columns, True), W_)
            of_width = rows.size
        if H_ < H:
            keys = unit.reshape(-1, H, W * K) / W**0.5  # B H W K -> B H (W K)
            columns = self.choose(Line(keys, of_height, to_rows, of_rows, True), H_)
            of_height = columns.size
        size = (of_height.unsqueeze(2) * of_width.unsqueeze(1) / total).flatten(1)  # B H' W' -> B (H' W')
        return GridMask(rows, columns, grid, (H_, W_), size)


class GridMask(NamedTuple):
    """The mask of a map that stays a map: all its rows are merged from W to W' tokens by one mask, then all columns.

    Attributes:
        rows: Merges W tokens of every row, None where they stay as they are.
        columns: Merges H tokens of every column, None where they stay as they are.
        start: (H, W).
        grid: (H', W').
        size: (B, H' W') how many input tokens each slot stands for.
    """

    rows: Mask | None
    columns: Mask | None
    start: tuple[int, int]
    grid: tuple[int, int]
    size: Tensor
    keeps_own = True

    @property
    def linear(self) -> bool:
        return all(mask is None or mask.linear for mask in (self.rows, self.columns))

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """G^T x: (B, H W, D) -> (B, H' W', D). A map has no prefix, and no parts that are not tokens of it."""
        assert not num_prefix, "maps have no prefix tokens"
        assert parts == 1, "patches of several pixels are a sequence"
        H, W = self.start
        H_, W_ = self.grid
        D = fixed(x.shape[2])
        if self.rows is not None:
            x = self.rows.merge(x.reshape(-1, W, D), 0, H)  # B (H W) D -> (B H) W' D
        if self.columns is not None and self.columns.linear:  # one vector of all tokens of a row: the faster way
            x = self.columns.merge(x.reshape(-1, H, W_ * D))  # -> B H (W' D) -> B H' (W' D)
        elif self.columns is not None:
            x = x.reshape(-1, H, W_, D).transpose(1, 2).reshape(-1, H, D)  # -> (B W') H D
            x = self.columns.merge(x, 0, W_)  # -> (B W') H' D
            x = x.reshape(-1, W_, H_, D).transpose(1, 2)  # -> B H' W' D
        return x.reshape(-1, H_ * W_, D)

    def unmerge(self, x: Tensor, parts: int = 1) -> Tensor:
        """Slots put back where their tokens came from: (B, H' W', D) -> (B, H W, D)."""
        assert parts == 1, "patches of several pixels are a sequence"
        (H, W), (_, W_), D = self.start, self.grid, fixed(x.shape[2])
        if self.columns is not None:
            x = self.columns.unmerge(x.reshape(x.shape[0], -1, W_ * D))  # B H' (W' D) -> B H (W' D)
        if self.rows is not None:
            x = x.reshape(-1, H, W_, D).transpose(1, 2).flatten(2)  # B H W' D -> B W' (H D)
            x = self.rows.unmerge(x).unflatten(2, (H, D)).transpose(1, 2)  # B W (H D) -> B H W D
        return x.reshape(-1, H * W, D)

    def anchors(self) -> Tensor:
        """(B, H' W') token indices among H W."""
        rows, columns = self._axes("anchors")
        return (columns.unsqueeze(2) * self.start[1] + rows.unsqueeze(1)).flatten(1)

    def dense(self) -> Tensor:
        """G (B, H W, H' W')."""
        return self._product(*self._axes("dense"))

    def destinations(self) -> Tensor:
        """(B, H W, H' W'): the share of each token that goes to each slot, rows sum to 1."""
        return self._product(*self._axes("destinations"))

    def _axes(self, what: str) -> tuple[Tensor, Tensor]:
        """``anchors``, ``dense`` or ``destinations`` of the rows' and the columns' mask: identities where none is."""
        B, device = self.size.shape[0], self.size.device
        found = []
        for mask, n in ((self.rows, self.start[1]), (self.columns, self.start[0])):
            if mask is not None:
                found.append(getattr(mask, what)())
            elif what == "anchors":
                found.append(torch.arange(n, device=device).expand(B, -1))
            else:
                found.append(torch.eye(n, dtype=self.size.dtype, device=device).expand(B, -1, -1))
        return found[0], found[1]

    @staticmethod
    def _product(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.einsum("bwv,bhu->bhwuv", rows, columns).flatten(3, 4).flatten(1, 2)  # B (H W) (H' W')
