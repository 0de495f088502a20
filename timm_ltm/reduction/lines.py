"""Maps merge one axis at a time: any reducer of a sequence run along rows and columns, and maps put back.

All rows of an image are merged by one mask and all its columns by another, so that lines of the image stay straight:
measured better than a mask for every line, and than even spacing.

One letter per axis: B batch, N tokens, P slots, K width of the keys, c cells, H W grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.reduction.masks import Mask
from timm_ltm.reduction.matching import unit_vectors
from timm_ltm.reduction.reducer import Reducer, Seen
from timm_ltm.reduction.tokens import Tokens, at_least_float32, fixed, no_autocast, one_hot

__all__ = ["CELLS_PER_SIDE", "GridMask", "Line", "LineReducer", "Placement"]

CELLS_PER_SIDE = 4  # g of the coarse grid that advice is given on, see LineReducer.advice


class Line(NamedTuple):
    """A sequence of tokens to be merged: the tokens themselves, or the columns (the rows) of a map.

    Attributes:
        unit: (B, n, K) keys of length 1.
        size: (B, n) how many input tokens each stands for.
        advice: (B, n, c) what is added to the log weight of each token in a slot of each cell, None for nothing.
        cells: (B, n) the cell each lies in, of c, where there is advice.
    """

    unit: Tensor
    size: Tensor
    advice: Tensor | None = None
    cells: Tensor | None = None


class LineReducer(Reducer):
    """A reducer that merges a sequence at once and a map along its lines. A method writes :meth:`choose`."""

    needs = frozenset({"keys"})
    maps = True
    windows = True

    def choose(self, line: Line, num_slots: int) -> Mask:
        """The mask that merges a line of n tokens to ``num_slots``."""
        raise NotImplementedError

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
            return self.choose(Line(unit, tokens.size, advice, cells), self.num_slots(N))

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
            rows = self.choose(Line(keys, of_width, to_columns, of_columns), W_)
            of_width = rows.size
        if H_ < H:
            keys = unit.reshape(-1, H, W * K) / W**0.5  # B H W K -> B H (W K)
            columns = self.choose(Line(keys, of_height, to_rows, of_rows), H_)
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
        """G^T x: (B parts, H W, D) -> (B parts, H' W', D). A map has no prefix."""
        assert not num_prefix, "maps have no prefix tokens"
        H, W = self.start
        H_, W_ = self.grid
        D = fixed(x.shape[2])
        if self.rows is not None:
            x = self.rows.merge(x.reshape(-1, W, D), 0, H * parts)  # (B parts) (H W) D -> (B parts H) W' D
        if self.columns is not None and self.columns.linear:  # one vector of all tokens of a row: the faster way
            x = self.columns.merge(x.reshape(-1, H, W_ * D), 0, parts)  # -> (B parts) H (W' D) -> (B parts) H' (W' D)
        elif self.columns is not None:
            x = x.reshape(-1, H, W_, D).transpose(1, 2).reshape(-1, H, D)  # -> (B parts W') H D
            x = self.columns.merge(x, 0, parts * W_)  # -> (B parts W') H' D
            x = x.reshape(-1, W_, H_, D).transpose(1, 2)  # -> (B parts) H' W' D
        return x.reshape(-1, H_ * W_, D)

    def unmerge(self, x: Tensor) -> Tensor:
        """Slots put back where their tokens came from: (B, H' W', D) -> (B, H W, D)."""
        (H, W), (_, W_), D = self.start, self.grid, fixed(x.shape[2])
        if self.columns is not None:
            x = self.columns.unmerge(x.reshape(x.shape[0], -1, W_ * D))  # B H' (W' D) -> B H (W' D)
        if self.rows is not None:
            x = x.reshape(-1, H, W_, D).transpose(1, 2).flatten(2)  # B H W' D -> B W' (H D)
            x = self.rows.unmerge(x).unflatten(2, (H, D)).transpose(1, 2)  # B W (H D) -> B H W D
        return x.reshape(-1, H * W, D)

    def anchors(self) -> Tensor:
        """(B, H' W') token indices among H W."""
        rows, columns = self.axes("anchors")
        return (columns.unsqueeze(2) * self.start[1] + rows.unsqueeze(1)).flatten(1)

    def dense(self) -> Tensor:
        """G (B, H W, H' W')."""
        return self._product(*self.axes("dense"))

    def destinations(self) -> Tensor:
        """(B, H W, H' W'): the share of each token that goes to each slot, rows sum to 1."""
        return self._product(*self.axes("destinations"))

    def axes(self, what: str) -> tuple[Tensor, Tensor]:
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


class Placement(NamedTuple):
    """Where the tokens of a merged map lie on the map that the plain model would have, through stages of a network.

    Rows of the matrices sum to 1. Straight lines need a matrix per axis; any other mask one of whole maps.

    Attributes:
        rows: (B, H, H') of the height, None for a whole one.
        columns: (B, W, W') of the width, None for a whole one.
        grid: (H, W) of the plain model's map.
        merged: (H', W').
        whole: (B, H W, H' W'), None for straight lines.
    """

    rows: Tensor | None
    columns: Tensor | None
    grid: tuple[int, int]
    merged: tuple[int, int]
    whole: Tensor | None = None

    @classmethod
    def identity(cls, batch: int, grid: tuple[int, int], like: Tensor) -> Placement:
        """A map that nothing has merged yet, as precise as sizes are."""
        dtype = at_least_float32(like.new_empty(0)).dtype
        rows, columns = (torch.eye(n, dtype=dtype, device=like.device).expand(batch, -1, -1) for n in grid)
        return cls(rows, columns, grid, grid)

    def then(self, mask: Mask, patch: tuple[int, int] = (1, 1)) -> Placement:
        """After one more merge of the merged map, or of its patches of h x w pixels, pixel by pixel."""
        merged = mask.grid
        assert merged is not None, "a map is merged to a map"
        h, w = patch
        merged = merged[0] * h, merged[1] * w
        if isinstance(mask, GridMask) and self.whole is None:
            columns, rows = mask.axes("destinations")  # a GridMask's rows merge the width
            assert self.rows is not None
            assert self.columns is not None
            rows, columns = self.rows @ _of_pixels(rows, h), self.columns @ _of_pixels(columns, w)
            return Placement(rows, columns, self.grid, merged)
        inner = (torch.eye(n, dtype=mask.size.dtype, device=mask.size.device) for n in patch)
        to = mask.destinations().unflatten(2, mask.grid).unflatten(1, (self.merged[0] // h, self.merged[1] // w))
        to = torch.einsum("bxyuv,ac,de->bxayducve", to, *inner).flatten(1, 4).flatten(2, 5)  # B (H W) (H' W'), pixels
        return Placement(None, None, self.grid, merged, self._whole() @ to)

    def halved(self) -> Placement:
        """After a layer of stride 2, which makes ceil(n / 2) of both maps' sides: means of what becomes one token."""
        grid, merged = (tuple(-(-n // 2) for n in size) for size in (self.grid, self.merged))
        if self.whole is None:
            assert self.rows is not None
            assert self.columns is not None
            return Placement(_halve(self.rows), _halve(self.columns), grid, merged)
        whole = self.whole.unflatten(2, self.merged).unflatten(1, self.grid)  # B H W H' W'
        return Placement(None, None, grid, merged, _halve_whole(whole).flatten(3).flatten(1, 2))

    def stretched(self, merged: tuple[int, int]) -> Placement:
        """After linear interpolation of the merged map to (H', W'): the tokens put back are interpolated back."""
        if merged == self.merged:
            return self
        like = self.rows if self.whole is None else self.whole
        assert like is not None
        back = [_interpolation(n, m, like) for n, m in zip(self.merged, merged, strict=True)]
        if self.whole is None:
            assert self.rows is not None
            assert self.columns is not None
            return Placement(self.rows @ back[0], self.columns @ back[1], self.grid, merged)
        to = torch.einsum("iu,jv->ijuv", *back).flatten(2).flatten(0, 1)
        return Placement(None, None, self.grid, merged, self.whole @ to)

    def unmerge(self, x: Tensor) -> Tensor:
        """A merged map (B, H', W', D) as the plain model's (B, H, W, D)."""
        shape = (x.shape[0], *self.grid, fixed(x.shape[3]))  # with B: -1 is a constant of exported graphs
        if self.whole is not None:
            return (self.whole.to(x.dtype) @ x.flatten(1, 2)).reshape(shape)
        assert self.rows is not None
        assert self.columns is not None
        H_, W_ = self.merged
        x = self.rows.to(x.dtype) @ x.reshape(x.shape[0], H_, -1)  # B H H' @ B H' (W' D)
        x = x.reshape(-1, W_, fixed(x.shape[2]) // W_)  # (B H) W' D
        columns = self.columns.to(x.dtype).repeat_interleave(self.grid[0], dim=0)  # (B H) W W'
        return (columns @ x).reshape(shape)  # (B H) W D -> B H W D

    def mean(self, x: Tensor) -> Tensor:
        """The mean (B, D) of a merged map (B, H', W', D) as if it were put back: weighted by size."""
        if self.whole is not None:
            weights = self.whole.mean(dim=1)  # B (H' W')
        else:
            assert self.rows is not None
            assert self.columns is not None
            weights = (self.rows.mean(dim=1).unsqueeze(2) * self.columns.mean(dim=1).unsqueeze(1)).flatten(1)
        return (weights.to(x.dtype).unsqueeze(1) @ x.flatten(1, 2)).squeeze(1)

    def _whole(self) -> Tensor:
        if self.whole is not None:
            return self.whole
        return torch.einsum("bhu,bwv->bhwuv", self.rows, self.columns).flatten(3, 4).flatten(1, 2)


def _of_pixels(matrix: Tensor, n: int) -> Tensor:
    """(B, H, H') of patches as (B, H n, H' n) of the n pixels of each: the first goes to first ones, and so on."""
    if n == 1:
        return matrix
    inner = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    return torch.einsum("bij,ac->biajc", matrix, inner).flatten(3, 4).flatten(1, 2)  # B (H n) (H' n)


def _halve(matrix: Tensor) -> Tensor:
    """(B, n, m) -> (B, ceil(n / 2), ceil(m / 2)): shares of pairs of slots added, over pairs of tokens averaged."""
    n, m = matrix.shape[1:]
    pairs = F.pad(matrix, (0, m % 2, 0, n % 2)).unflatten(2, (-1, 2)).sum(dim=3).unflatten(1, (-1, 2)).sum(dim=2)
    return pairs / pairs.sum(dim=2, keepdim=True)


def _halve_whole(whole: Tensor) -> Tensor:
    """(B, H, W, H', W') with all sides halved, as :func:`_halve`."""
    H, W, H_, W_ = whole.shape[1:]
    whole = F.pad(whole, (0, W_ % 2, 0, H_ % 2, 0, W % 2, 0, H % 2))
    whole = whole.unflatten(4, (-1, 2)).sum(dim=5).unflatten(3, (-1, 2)).sum(dim=4)
    whole = whole.unflatten(2, (-1, 2)).sum(dim=3).unflatten(1, (-1, 2)).sum(dim=2)
    return whole / whole.sum(dim=(3, 4), keepdim=True)


def _interpolation(n: int, m: int, like: Tensor) -> Tensor:
    """(n, m) the matrix of linear interpolation from m tokens to n."""
    eye = torch.eye(m, dtype=like.dtype, device=like.device).unsqueeze(0)  # 1 m m: channels are what it depends on
    return F.interpolate(eye, size=n, mode="linear", align_corners=False).squeeze(0).t()
