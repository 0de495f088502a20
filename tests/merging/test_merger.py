"""The mask module: the paper's preset against loops, and the step it takes against autograd."""

from __future__ import annotations

import pytest
import torch

from timm_ltm.merging import MergeConfig, TokenMerger, initial_state, merge
from timm_ltm.merging.merge import even_columns
from timm_ltm.merging.update import assign, pool_slots

B, D, H, W, K = 3, 6, 4, 5, 4
N = H * W


def fill(merger, seed=0):
    """Clusters as after a refresh, at random."""
    g = torch.Generator().manual_seed(seed)
    c = merger.clusters
    c.centroids.copy_(torch.randn(c.centroids.shape, generator=g))
    c.scores.copy_(torch.randn(c.scores.shape, generator=g))
    c.temperature.fill_(c.centroids[0].numel() / 2)
    if c.log_q is not None:
        c.log_q.copy_(torch.randn(c.log_q.shape, generator=g).log_softmax(dim=0))


def build(ratio=0.6, num_tokens=N, first=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    merger = TokenMerger(D, num_tokens, ratio, MergeConfig.from_kwargs(**kwargs), num_classes=K, first=first)
    if merger.updates:
        for linear in (merger.mlp_fc1, merger.mlp_fc2):
            if isinstance(linear, torch.nn.Linear):
                torch.nn.init.normal_(linear.weight, std=0.5)
        fill(merger, seed)
    return merger.double().eval()


def inputs(prefix=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, prefix + N, D, generator=g).double()
    return z, torch.randn(B, prefix + N, 3, generator=g).double()


def state_of(z, merger, prefix=0, **kwargs):
    return initial_state(z, prefix, (H, W), merger.config.cluster_grid, **kwargs)


MODES = [
    dict(),
    dict(update=False),
    dict(carry_mask=True),
    dict(mask_mode="batch"),
    dict(cluster_grid=0),
    dict(cluster_dim=0),
    dict(labels="true"),
    dict(mask_form="dense"),
    dict(mask_form="dense", mask_softmax="tokens", carry_mask=True),
    dict(mask_form="dense", first_mask="learned"),
    dict(preset="paper"),
    dict(preset="paper", mask_mode="sample", temperature="fit"),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_two_blocks_in_every_mode(mode, prefix):
    first, second = build(**mode), build(ratio=0.75, num_tokens=12, first=False, seed=1, **mode)
    z, keys = inputs(prefix)
    y, state = first(z, state_of(z, first, prefix), prefix, keys, inputs=z)
    masks = [state.mask]
    assert y.shape == (B, prefix + 12, D)
    y, state = second(y, state, prefix, y[..., :3], inputs=y)
    assert y.shape == (B, prefix + 9, D)
    for mask in [*masks, state.mask]:
        G = mask.dense()
        torch.testing.assert_close(G.sum(dim=1), torch.ones_like(G[:, 0]))
        assert (G >= 0).all()
    torch.testing.assert_close(state.size.sum(dim=1), torch.full((B,), float(N)).to(state.size.dtype))


@pytest.mark.parametrize("mode", [m for m in MODES if m.get("mask_mode") != "batch" and m.get("preset") != "paper"])
def test_images_do_not_see_each_other(mode):
    merger = build(**mode)
    z, keys = inputs()
    together, _ = merger(z, state_of(z, merger), 0, keys, inputs=z)
    alone = torch.cat([merger(z[i : i + 1], state_of(z[i : i + 1], merger), 0, keys[i : i + 1], inputs=z[i : i + 1])[0]
                       for i in range(B)])  # fmt: skip
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("mask_mode", ["sample", "batch"])
def test_paper_preset_is_equation_3_as_loops(mask_mode):
    """Two blocks of the paper's form in training, with true labels, from the printed equations alone."""
    kwargs = dict(preset="paper", mask_mode=mask_mode, num_clusters=3, tau=0.5)
    first, second = build(**kwargs).train(), build(ratio=0.75, num_tokens=12, first=False, seed=1, **kwargs).train()
    second.clusters.centroids.mul_(0.3)
    second.clusters.temperature.fill_(1.0)
    y = torch.tensor([2, 0, 3])
    second.labels = y
    X, _ = inputs()
    X = 0.3 * X
    Z1, state = first(X, state_of(X, first), inputs=X)

    # Section 3.1: G^(1) = Softmax(f(X / tau)), f = Linear + Sigmoid; over tokens, Section 4.1
    G1 = torch.sigmoid(X / 0.5 @ first.mask_fc.weight.t() + first.mask_fc.bias).softmax(dim=1)
    expected = torch.stack([G1[i].t() @ X[i] for i in range(B)])
    torch.testing.assert_close(Z1, expected)

    # G^(1) in the second block's shape: token i is slot i of the first, columns at even spacing
    G = torch.stack([G1[i].t() @ G1[i] for i in range(B)])[:, :, even_columns(12, 9)]
    c = second.clusters
    update = torch.zeros(B, 12, 9, dtype=torch.float64)
    for i in range(B):
        merged = (G[i].t() @ Z1[i]).flatten()
        S = torch.stack([torch.exp(-(merged - c.centroids[a]).square().sum()) for a in range(3)])
        gamma, zeta = S.sum(), sum(S[a] * c.centroids[a] for a in range(3))
        hidden = (Z1[i] @ second.mlp_fc1.weight.t() + second.mlp_fc1.bias).relu()
        mlp = hidden @ second.mlp_fc2.weight.t() + second.mlp_fc2.bias
        for a in range(3):
            psi = -c.log_q[a, y[i]]  # the first term of psi cancels
            factor = S[a] / gamma**2 * (gamma * c.centroids[a] - zeta) * psi
            update[i] -= 2.0 * second.eta * mlp @ factor.view(9, D).t()
    if mask_mode == "batch":  # the sum over the minibatch, 1/n in front
        update = update.mean(dim=0).expand_as(update)
    G2 = (G + update).softmax(dim=1)
    Z2, _ = second(Z1, state, inputs=Z1)
    torch.testing.assert_close(Z2, torch.stack([G2[i].t() @ Z1[i] for i in range(B)]), rtol=1e-8, atol=1e-10)
    assert update.abs().amax() > 1e-3


def test_the_update_of_a_pooled_merger_descends_ibb():
    """dir of the module is -T/2 times autograd's gradient of the label-free bound at the pooled merged features."""
    merger = build(cluster_dim=4, cluster_grid=2)
    z, _ = inputs()
    size = torch.rand(B, N, dtype=torch.float64) + 0.5
    state = state_of(z, merger)._replace(size=size)
    features = torch.randn(B, N, 4, dtype=torch.float64)
    of_cells = merger._direction(features, state, None)
    pooled = pool_slots(features, state.cells, 4, size)[0].detach().requires_grad_()
    c = merger.clusters
    phi = assign(pooled.flatten(1), c.centroids, c.temperature)
    bound = -(phi * (phi @ c.scores).detach()).sum()  # w is held, as log Q is
    (gradient,) = torch.autograd.grad(bound, pooled)
    torch.testing.assert_close(of_cells, -0.5 * c.temperature * gradient)


@pytest.mark.parametrize("mode", [dict(), dict(mask_form="dense"), dict(carry_mask=True), dict(mask_mode="batch")])
def test_the_update_changes_the_mask(mode):
    merger, still = build(**mode), build(**mode)
    still.clusters.reset_parameters()
    z, keys = inputs()
    if mode.get("mask_mode") == "batch":
        merger.train(), still.train()
    moved, _ = merger(z, state_of(z, merger), 0, keys)
    unmoved, _ = still(z, state_of(z, still), 0, keys)
    assert (moved - unmoved).abs().amax() > 1e-4


def test_batch_mode_uses_the_running_mean_in_eval():
    merger = build(mask_mode="batch", momentum=1.0).train()
    z, keys = inputs()
    trained, _ = merger(z, state_of(z, merger), 0, keys)
    merger.eval()
    torch.testing.assert_close(merger(z, state_of(z, merger), 0, keys)[0], trained)
    alone, _ = merger(z[:1], state_of(z[:1], merger), 0, keys[:1])
    torch.testing.assert_close(alone, trained[:1])


def test_observing_leaves_tokens_alone_and_keeps_features():
    merger = build().train()
    merger.collecting = True
    z, keys = inputs()
    state = state_of(z, merger)
    same, state_after = merger(z, state, 0, keys, observe=True)
    assert same is z
    assert torch.equal(state_after.size, state.size)
    assert merger.features.shape == (B, 16 * 32)
    assert not merger.features.requires_grad


def test_merging_is_the_mask_times_the_tokens():
    merger = build()
    z, keys = inputs(prefix=1)
    y, state = merger(z, state_of(z, merger, 1), 1, keys)
    torch.testing.assert_close(y[:, 1:], state.mask.dense().to(z.dtype).transpose(1, 2) @ z[:, 1:])
    torch.testing.assert_close(merge(z, state.mask, 1), y)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_float32_at_every_scale(scale):
    merger = build().float()
    z, keys = (scale * tensor.float() for tensor in inputs())
    y, _ = merger(z, state_of(z, merger), 0, keys)
    assert y.isfinite().all()


def test_tied_settings_say_so():
    merger = build(cluster_grid=0)
    z, keys = inputs()
    with pytest.raises(ValueError, match=r"got 18 tokens, expected 20.*img_size"):
        merger(z[:, :18], initial_state(z[:, :18], 0, (H, W), 0), 0, keys[:, :18])


def test_labels_of_another_batch():
    merger = build(labels="true").train()
    merger.labels = torch.zeros(B + 1, dtype=torch.long)
    z, keys = inputs()
    with pytest.raises(ValueError, match=r"labels: got 4 for a batch of 3"):
        merger(z, state_of(z, merger), 0, keys)
