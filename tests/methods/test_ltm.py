"""LTM's reducer: the step it takes against autograd, soft and hard destinations, and what it shows to a refresh."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import fill, make
from torch.utils.checkpoint import checkpoint

from timm_ltm.cost import gmacs
from timm_ltm.methods.ltm.update import pool_slots
from timm_ltm.reduction import Observer, Seen, Site, find_method, initial_tokens
from timm_ltm.reduction.matching import redundancy, unit_vectors

B, D, H, W = 3, 6, 4, 5
N = H * W


def build(amount=0.6, dtype=torch.float64, dim=D, **settings):
    """A reducer with clusters as after a refresh."""
    cls, config = find_method("ltm", {"num_clusters": 5, "cluster_dim": 4, "beta": 10.0, **settings})
    reducer = cls(Site(dim, N), amount, config)
    if config.update:
        torch.nn.init.normal_(reducer.mlp.weight, std=0.5)
        torch.nn.init.normal_(reducer.proj.weight)
        c = reducer.clusters
        c.centroids.normal_()
        c.scores.normal_()
        c.temperature.fill_(c.centroids.shape[1] / 2)
    return reducer.to(dtype).eval()


def inputs(prefix=0, dtype=torch.float64):
    z, keys = torch.randn(B, prefix + N, D, dtype=dtype), torch.randn(B, N, 3, dtype=dtype)
    return z, initial_tokens(z, prefix, (H, W)), Seen(keys)


def test_the_update_descends_the_bound():
    """Eq. 3 with MLP, by autograd: minus T / 2 times the gradient of IBB at the pooled features, w held as log Q is."""
    reducer = build()
    z, tokens, _ = inputs()
    tokens = tokens._replace(size=torch.rand(B, N, dtype=torch.float64) + 0.5)
    values = F.layer_norm(z @ reducer.proj.weight.t(), (4,))
    pooled = pool_slots(values, tokens.cells(4), 16, tokens.size)[0].detach().requires_grad_()
    c = reducer.clusters
    phi = c.phi(pooled.flatten(1))
    bound = -(phi * (phi @ c.scores).detach()).sum()
    (gradient,) = torch.autograd.grad(bound, pooled)
    step = values.relu() @ reducer.mlp.weight.t() + reducer.mlp.bias
    expected = reducer.eta * step @ (-0.5 * c.temperature * gradient).transpose(1, 2)
    torch.testing.assert_close(reducer.advice(z, tokens), expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_two_blocks(train, update, prefix):
    first, second = (build(r, update=update).train(train) for r in (0.6, 0.75))
    z, tokens, seen = inputs(prefix)
    y, tokens = first(z, tokens, seen, prefix)
    assert torch.equal(y[:, :prefix], z[:, :prefix])
    assert y.shape == (B, prefix + 12, D)
    y, tokens = second(y, tokens, Seen(y[:, prefix:, :3]), prefix)
    assert y.shape == (B, prefix + 9, D)
    torch.testing.assert_close(tokens.size.sum(dim=1), torch.full((B,), float(N), dtype=torch.float64))
    assert (tokens.anchor.diff(dim=1) > 0).all()
    expected = z[:, prefix:]
    for mask in tokens.masks:  # means, as long as the tokens they are of
        mean, length = (mask.dense().transpose(1, 2) @ t for t in (expected, expected.norm(dim=2, keepdim=True)))
        expected = mean * length / mean.norm(dim=2, keepdim=True)
    torch.testing.assert_close(y[:, prefix:], expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_attention_counts_slots_by_their_tokens_alignment(train, parts):
    """w' = s' |G^T z| / G^T |z| G^T (w / s), the mean over what is merged alike."""
    first, second = (build(r).train(train) for r in (0.6, 0.75))
    for reducer in (first, second):
        reducer.site = reducer.site._replace(parts=parts)
    prefix = 0 if parts > 1 else 2
    z, keys = torch.randn(B * parts, prefix + N, D).double(), torch.randn(B * parts, N, 3).double()
    tokens, counted = initial_tokens(z, prefix, (H, W), parts=parts), torch.ones(B, N).double()
    for reducer in (first, second):
        before, size = z[:, prefix:].unflatten(0, (B, parts)), tokens.size
        z, tokens = reducer(z, tokens, Seen(keys), prefix)
        keys = keys[:, : z.shape[1] - prefix]
        to_slots = tokens.masks[-1].dense().transpose(1, 2).unsqueeze(1)  # B 1 P N
        aligned = (to_slots @ before).norm(dim=3) / (to_slots @ before.norm(dim=3, keepdim=True)).squeeze(3)
        carried = (to_slots[:, 0] @ (counted / size).unsqueeze(2)).squeeze(2)
        counted = tokens.size * aligned.mean(dim=1) * carried
        torch.testing.assert_close(tokens.weight, counted.detach())
        assert not tokens.weight.requires_grad
    assert (tokens.weight < 0.99 * tokens.size).any()
    torch.testing.assert_close(tokens.log_sizes(0, parts)[::parts, 0, 0].exp(), counted.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_of_half_precision_are_float32(dtype):
    reducer, (z, tokens, seen) = build(dtype=torch.float32, update=False), inputs(dtype=torch.float32)
    _, expected = reducer(z, tokens, seen)
    half = z.to(dtype)
    _, after = reducer(half, initial_tokens(half, 0, (H, W)), seen)
    assert after.weight.dtype == torch.float32
    torch.testing.assert_close(after.weight, expected.weight, rtol=1e-2, atol=1e-2)


def test_where_nothing_merges_counts_stay():
    z, tokens, seen = inputs()
    counted = torch.rand(B, N, dtype=torch.float64) + 0.1
    y, after = build(1.0)(z, tokens._replace(weight=counted), seen)
    assert torch.equal(y, z)
    torch.testing.assert_close(after.weight, counted)


def test_attention_counts_equal_tokens_by_their_number():
    z = torch.randn(B, 1, D).double().expand(-1, N, -1)
    _, tokens = build(0.5)(z, initial_tokens(z, 0, (H, W)), Seen(torch.ones(B, N, 3).double()))
    torch.testing.assert_close(tokens.weight, tokens.size)
    _, tokens = build(0.5, proportional_attention=False)(*inputs())
    assert tokens.weight is None


@pytest.mark.parametrize("train", [False, True])
def test_images_do_not_see_each_other(train):
    reducer = build().train(train)
    z, tokens, seen = inputs()
    together, _ = reducer(z, tokens, seen)
    for i in range(B):
        one = slice(i, i + 1)
        alone, _ = reducer(z[one], initial_tokens(z[one], 0, (H, W)), Seen(seen.keys[one]))
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("train", [False, True])
def test_the_order_of_tokens_does_not_matter(train):
    """Tokens in another order, with their places: the same slots. Of twins the first goes: these keep their order."""
    reducer = build().train(train)
    z, _, seen = inputs()
    z, seen = z[:1], Seen(seen.keys[:1])
    partner = (unit_vectors(seen.keys) @ unit_vectors(seen.keys).transpose(1, 2) - 4 * torch.eye(N)).argmax(dim=2)[0]
    pairs = [(i, int(j)) for i, j in enumerate(partner) if int(partner[j]) == i and i < j]
    assert len(pairs) == int((redundancy(unit_vectors(seen.keys)) < -16).sum())
    order = torch.randperm(N)
    for i, j in pairs:  # swap places where twins changed theirs
        a, b = (int((order == n).nonzero()) for n in (i, j))
        if a > b:
            order[a], order[b] = j, i
    y, after = reducer(z, initial_tokens(z, 0, (H, W)), seen)
    moved = z[:, order]
    moved_y, moved_after = reducer(moved, initial_tokens(moved, 0, (H, W), kept=order[None]), Seen(seen.keys[:, order]))
    back = moved_after.anchor[0].argsort()
    assert torch.equal(moved_after.anchor[0, back], after.anchor[0])
    torch.testing.assert_close(moved_y[:, back], y)


def test_training_nears_eval_as_beta_grows():
    reducer = build()
    z, tokens, seen = inputs()
    hard, _ = reducer(z, tokens, seen)
    reducer.train()
    errors = []
    for log_beta in (0.0, 3.0, 6.0, 13.0):
        reducer.log_beta.data.fill_(log_beta)
        reducer.eval()
        hard, _ = reducer(z, tokens, seen)
        errors.append((reducer.train()(z, tokens, seen)[0] - hard).abs().max().item())
    assert errors[0] > 0.1
    assert errors[-1] < 1e-6
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("train", [False, True])
def test_the_update_changes_the_mask(train):
    reducer = build().train(train)
    z, tokens, seen = inputs()
    moved, _ = reducer(z, tokens, seen)
    reducer.clusters.reset_parameters()
    assert (moved - reducer(z, tokens, seen)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_observing_leaves_tokens_alone_and_keeps_features(weight):
    reducer = build(ib_loss_weight=weight).train()
    reducer.observer = observer = Observer()
    z, tokens, seen = inputs(prefix=1)
    same, after = reducer(z, tokens, seen, 1, observe=True)
    assert same is z
    assert after == tokens
    observed = observer.take()
    assert observed.shape == (B, 16 * 4)
    assert not observed.requires_grad
    reducer(z, tokens, seen, 1)
    assert observer.features.requires_grad == (weight > 0)  # only the loss needs its gradient
    torch.testing.assert_close(observer.take(), observed)  # of this block's tokens, before they are merged
    reducer.eval()(z, tokens, seen, 1)
    assert observer.features is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_features_are_not_observed(reentrant):
    reducer = build().train()
    reducer.observer = observer = Observer()
    z, tokens, seen = inputs()
    y = checkpoint(lambda z: reducer(z, tokens, seen)[0], z.requires_grad_(), use_reentrant=reentrant)
    assert observer.take() is not None
    y.sum().backward()
    assert observer.features is None
    assert reducer.eta.grad is not None


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("train", [False, True])
def test_float32_at_every_scale(scale, train):
    reducer = build(dtype=torch.float32).train(train)
    z, keys = scale * torch.randn(B, N, D), scale * torch.randn(B, N, 3)
    y, _ = reducer(z, initial_tokens(z, 0, (H, W)), Seen(keys))
    y.sum().backward()
    assert y.isfinite().all()
    grads = {name: p.grad for name, p in reducer.named_parameters()}
    assert {name for name, grad in grads.items() if grad is None} == (set() if train else {"log_beta"})
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("observe", [False, True])
def test_half_precision_and_autocast(dtype, autocast, observe):
    """Masks are found in float32, whether the module is of half precision or autocast hands it tokens that are."""
    reducer = build(dtype=torch.float32)
    z, keys = torch.randn(B, N, D).to(dtype), torch.randn(B, N, 3).to(dtype)
    expected, _ = reducer(z.float(), initial_tokens(z, 0, (H, W)), Seen(keys.float()), 0, observe)
    if not autocast:
        reducer.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y, after = reducer(z, initial_tokens(z, 0, (H, W)), Seen(keys), 0, observe)
    assert y.dtype == dtype
    assert after.size.dtype == torch.float32
    if autocast or observe:  # parameters of half precision move tokens between equally near anchors
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("dim", "cluster_dim", "d"), [(192, None, 16), (384, None, 32), (384, 8, 8)])
def test_width_of_clusters(dim, cluster_dim, d):
    assert build(dim=dim, cluster_dim=cluster_dim).clusters.centroids.shape == (5, 16 * d)


def test_without_the_update_there_is_nothing_to_train():
    reducer = build(update=False)
    assert not reducer.state_dict()
    assert not reducer.collects
    assert build().collects


def test_inference_leaves_an_update_out_that_is_zero():
    """Bit for bit the same as with it, fewer products; with clusters it is there again, however they came."""
    model, x = make().eval(), torch.randn(2, 1, 8, 8)
    without, cheap = model(x), gmacs(model)
    for _, reducer in model.reducers():
        assert not reducer.updates
        reducer.updates = True
    assert torch.equal(model(x), without)
    assert gmacs(model) > cheap
    learned = fill(make()).state_dict()
    model.load_state_dict(learned)
    assert all(reducer.updates for _, reducer in model.reducers())
    assert not torch.equal(model(x), without)


@pytest.mark.parametrize("method", ["ltm", "tome"])
def test_places_count_where_positions_rotate(method):
    """By LTM, with the cosine of keys rho^2 (cos dy + cos dx) of places, in the longer side; by ToMe not."""
    cls, config = find_method(method, {})
    keys = F.normalize(torch.randn(2, 6, 5, dtype=torch.float64), dim=2)
    tokens = initial_tokens(torch.zeros(2, 6, 3), 0, (2, 4), kept=torch.tensor([[0, 1, 3, 4, 6, 7]]).expand(2, -1))
    plain, rotary = (cls(Site(3, 6, rotary=rotary), 0.5, config).compared(keys, tokens) for rotary in (False, True))
    assert plain is keys
    if method == "tome":
        assert rotary is keys
        return
    y, x = tokens.anchor[0] // 4 / 4, tokens.anchor[0] % 4 / 4
    near = 9.0 * (torch.cos(y[:, None] - y) + torch.cos(x[:, None] - x))
    torch.testing.assert_close(rotary @ rotary.transpose(1, 2), (keys @ keys.transpose(1, 2) + near) / 19.0)
    assert Site(3, 6).rotary is False
