"""Maps merged by rows, then by columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ltm.merging import GridMask, MergeConfig, TokenMerger, initial_state, merge, slots_of, unmerge
from timm_ltm.merging.merge import anchored_mask, order_by_redundancy, take

D, K = 6, 4
shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 0.99), st.integers(0, 2**31)
)


def fill(merger, seed):
    """Clusters as after a refresh, at random."""
    g = torch.Generator().manual_seed(seed)
    c = merger.clusters
    for buffer in (c.centroids, c.scores, c.log_q, merger.running_update):
        if buffer is not None:
            buffer.copy_(torch.randn(buffer.shape, generator=g))
    c.temperature.fill_(c.centroids[0].numel() / 2)


def build(grid, ratio, seed=0, **kwargs):
    torch.manual_seed(seed)
    merger = TokenMerger(D, grid, ratio, MergeConfig.from_kwargs(beta=5.0, **kwargs), num_classes=K, first=True)
    if merger.updates:
        torch.nn.init.normal_(merger.mlp_fc2.weight, std=0.5)
        fill(merger, seed)
    return merger.double().eval()


def inputs(B, grid, seed=0, parts=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B * parts, grid[0] * grid[1], D, generator=g, dtype=torch.float64)
    return z, torch.randn(B * parts, grid[0] * grid[1], 3, generator=g, dtype=torch.float64)


def state_of(z, merger, grid, parts=1):
    return initial_state(z, 0, grid, merger.config.cluster_grid, stays_map=True, parts=parts)


def merged_line(unit, size, cells, update, beta, P):
    """One line (n, ...) by the 1-D merge alone: its mask, and unit keys, size, cells and update of the slots."""
    order = order_by_redundancy(unit[None], P)
    unit, cells, update = unit[order[0]], cells[order[0]], update[order[0]]
    own = torch.stack([update[p, cells[p]] for p in range(P)])
    rest = torch.stack([update[P:, cells[p]] for p in range(P)], dim=1)
    similarity = beta * unit[P:] @ unit[:P].t()
    mask, size = anchored_mask(order, similarity[None], size[None], own[None], rest[None])
    return mask, (unit[:P], size[0], cells[:P], update[:P])


@pytest.mark.parametrize("grid", [(6, 7), (5, 8), (4, 4)])
def test_lines_one_by_one(grid):
    """Every row on its own, then every column on its own, gives what the folded computation gives."""
    (H, W), B = grid, 2
    merger = build(grid, 0.5, map_lines="own")
    H_, W_ = slots_of(grid, 0.5)
    z, keys = inputs(B, grid)
    merged, after = merger(z, state_of(z, merger, grid), keys=keys)
    assert after.grid == (H_, W_)
    state, beta = state_of(z, merger, grid), merger.log_beta.exp()
    values, mlp = merger._values(z)
    update = merger.eta * mlp @ merger._direction(values, state, None).transpose(1, 2)  # B (H W) c
    unit = torch.nn.functional.normalize(keys, dim=2)
    for b in range(B):
        rows = []
        for h in range(H):
            line = slice(h * W, (h + 1) * W)
            mask, tokens = merged_line(
                unit[b, line], state.size[b, line], state.cells[b, line], update[b, line], beta, W_
            )
            rows.append((merge(z[b : b + 1, line], mask)[0], *tokens))
        for w in range(W_):
            x, *tokens = (torch.stack([row[i][w] for row in rows]) for i in range(5))
            mask, (_, size, cells, _) = merged_line(*tokens, beta, H_)
            torch.testing.assert_close(merged[b].view(H_, W_, D)[:, w], merge(x[None], mask)[0])
            torch.testing.assert_close(after.size[b].view(H_, W_)[:, w], size)
            assert torch.equal(after.cells[b].view(H_, W_)[:, w], cells)


@pytest.mark.parametrize("grid", [(6, 7), (5, 8), (4, 4)])
def test_straight_lines_are_merged_as_wholes(grid):
    """Columns are tokens of H D features and H K keys, then rows of W' D and W K: the 1-D merge of wide tokens."""
    (H, W), B = grid, 2
    merger = build(grid, 0.5, map_lines="straight")
    H_, W_ = slots_of(grid, 0.5)
    z, keys = inputs(B, grid)
    state = state_of(z, merger, grid)
    size = torch.rand(B, H, 1, dtype=torch.float64) * torch.rand(B, 1, W, dtype=torch.float64) + 0.0
    state = state._replace(size=(size + 0.1 * size).flatten(1))
    merged, after = merger(z, state, keys=keys)
    beta, g = merger.log_beta.exp(), 4
    values, mlp = merger._values(z)
    update = merger.eta * mlp @ merger._direction(values, state, None).transpose(1, 2)  # B (H W) c
    unit = torch.nn.functional.normalize(keys, dim=2).view(B, H, W, 3)
    cells = state.cells.view(B, H, W)
    for b in range(B):
        u = update[b].view(H, W, g, g)
        of_columns = torch.stack([u[h, :, cells[b, h, 0] // g] for h in range(H)]).mean(dim=0)  # W g
        of_rows = torch.stack([u[:, w, :, cells[b, 0, w] % g] for w in range(W)]).mean(dim=0)  # H g
        sizes = state.size[b].view(H, W)
        wide = unit[b].transpose(0, 1).flatten(1) / H**0.5
        mask, (_, width, cell_columns, _) = merged_line(wide, sizes.sum(dim=0), cells[b, 0] % g, of_columns, beta, W_)
        x = merge(z[b].view(H, W, D).transpose(0, 1).flatten(1)[None], mask)[0]  # W' (H D)
        wide = unit[b].flatten(1) / W**0.5
        mask, (_, height, cell_rows, _) = merged_line(wide, sizes.sum(dim=1), cells[b, :, 0] // g, of_rows, beta, H_)
        x = merge(x.view(W_, H, D).transpose(0, 1).flatten(1)[None], mask)[0]  # H' (W' D)
        torch.testing.assert_close(merged[b], x.view(H_ * W_, D))
        torch.testing.assert_close(after.size[b].view(H_, W_), height[:, None] * width / sizes.sum())
        assert torch.equal(after.cells[b].view(H_, W_), cell_rows[:, None] * g + cell_columns)


@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans(), st.sampled_from(["own", "straight", "even"]))
def test_masks_of_maps(shape, update, lines):
    B, H, W, ratio, seed = shape
    merger = build((H, W), ratio, seed, update=update, map_lines=lines)
    z, keys = inputs(B, (H, W), seed)
    merged, state = merger(z, state_of(z, merger, (H, W)), keys=keys)
    H_, W_ = slots_of((H, W), ratio)
    assert isinstance(state.mask, GridMask)
    assert merged.shape == (B, H_ * W_, D)
    G, to = state.mask.dense(), state.mask.destinations()
    torch.testing.assert_close(G.sum(dim=1), torch.ones_like(G[:, 0]))
    torch.testing.assert_close(to.sum(dim=2), torch.ones_like(to[..., 0]))
    assert (G >= 0).all()
    torch.testing.assert_close(merged, G.transpose(1, 2) @ z)
    torch.testing.assert_close(to.sum(dim=1), state.size)
    torch.testing.assert_close(state.size.sum(dim=1), torch.full((B,), float(H * W), dtype=state.size.dtype))
    ones = torch.ones_like(merged)
    torch.testing.assert_close(unmerge(ones, to), torch.ones_like(z))


MODES = [{"map_lines": lines} for lines in ("own", "straight", "even")]
MODES += [
    {"mask_form": "dense"},
    {"map_lines": "own", "mask_mode": "batch"},
    {"mask_mode": "batch"},
    {"preset": "paper"},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parts_are_merged_alike(mode):
    """MobileViT's pixels: one mask, from the mean of the parts, for every part."""
    grid, parts, B = (4, 6), 3, 2
    merger = build(grid, 0.5, **mode)
    merger.parts = parts
    z, keys = inputs(B, grid, parts=parts)
    merged, state = merger(z, state_of(z, merger, grid, parts), keys=keys, inputs=z)
    G = state.mask.dense()
    assert G.shape[0] == B
    torch.testing.assert_close(merged, G.repeat_interleave(parts, dim=0).transpose(1, 2) @ z)
    if mode != {"preset": "paper"}:  # its clusters hold merged features: their mean, not the mean's
        merger.parts = 1
        mean, mean_keys = (t.unflatten(0, (B, parts)).mean(dim=1) for t in (z, keys))
        of_mean, _ = merger(mean, state_of(mean, merger, grid), keys=mean_keys, inputs=mean)
        torch.testing.assert_close(of_mean, merged.unflatten(0, (B, parts)).mean(dim=1))


@pytest.mark.parametrize("lines", ["own", "straight"])
def test_gradients_reach_both_passes(lines):
    merger = build((5, 5), 0.5, map_lines=lines)
    z, keys = inputs(2, (5, 5))
    z.requires_grad_()
    merger(z, state_of(z, merger, (5, 5)), keys=keys)[0].square().sum().backward()
    assert z.grad.isfinite().all()
    for name in ("log_beta", "eta", "proj.weight", "mlp_fc2.weight"):
        assert merger.get_parameter(name).grad.abs().sum() > 0, name


def test_observing_leaves_maps_alone_and_keeps_features():
    merger = build((5, 6), 0.5).train()
    merger.collecting = True
    z, keys = inputs(2, (5, 6))
    state = state_of(z, merger, (5, 6))
    same, after = merger(z, state, keys=keys, observe=True)
    assert same is z
    assert after is state
    assert merger.features.shape == (2, 16 * 32)


def test_a_map_too_small_to_merge():
    merger = build((2, 2), 0.9)
    z, keys = inputs(2, (2, 2))
    merged, state = merger(z, state_of(z, merger, (2, 2)), keys=keys)
    assert state.grid == (2, 2)
    torch.testing.assert_close(merged, z)


@pytest.mark.parametrize("lines", ["own", "straight"])
def test_rows_agree_with_the_sequence(lines):
    """A map of one row is a sequence."""
    line, sequence = build((1, 9), 0.49, map_lines=lines), build(9, 0.7)
    sequence.load_state_dict(line.state_dict())
    z, keys = inputs(2, (1, 9))
    of_map, state = line(z, state_of(z, line, (1, 9)), keys=keys)
    plain = initial_state(z, 0, (1, 9), 4)
    of_sequence, after = sequence(z, plain, keys=keys)
    torch.testing.assert_close(of_map, of_sequence)
    torch.testing.assert_close(state.mask.dense(), after.mask.dense())
    assert take(z, after.mask.order[:, :1]).shape == (2, 1, D)


@pytest.mark.parametrize(
    ("setting", "got"), [({"carry_mask": True}, "carry_mask: got True"), ({"cluster_grid": 0}, "cluster_grid: got 0")]
)
def test_settings_that_lines_have_no_form_of(setting, got):
    with pytest.raises(ValueError, match=got):
        build((4, 4), 0.5, **setting)
    assert build((4, 4), 0.5, mask_form="dense", **setting)
