"""The printed form against the paper's equations as loops, and what ties it to labels, classes and one input size."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import timm_ltm
from timm_ltm.methods.ltm.information import class_conditional
from timm_ltm.methods.ltm.update import assign, cluster_scores
from timm_ltm.reduction import Observer, Seen, Site, find_method, initial_tokens

B, D, K = 3, 6, 4
SITES = {"sequence": (20, 12, 9), "map": ((4, 5), (3, 4), (2, 3))}
COLUMNS = {"sequence": [0, 2, 3, 4, 6, 7, 8, 10, 11], "map": [0, 2, 3, 8, 10, 11]}  # at even spacing, on each side


def build(tokens, left, first, parts=1, **settings):
    cls, config = find_method("ltm", {"preset": "paper", **settings})
    ratio = left / tokens if isinstance(tokens, int) else (left[0] / tokens[0]) ** 2
    reducer = cls(Site(D, tokens, first=first, num_classes=K, parts=parts), ratio, config).double().train()
    assert reducer.slots(tokens) == left
    for linear in reducer.children():
        if isinstance(linear, torch.nn.Linear):
            torch.nn.init.normal_(linear.weight, std=0.5)
    if not first:
        reducer.clusters.centroids.normal_().mul_(0.3)
        reducer.clusters.scores.normal_()
        reducer.clusters.log_q.copy_(torch.randn(K, K).log_softmax(dim=0))
        reducer.observer = Observer()
        give_labels(reducer, torch.tensor([2, 0, 3]))
    return reducer


def give_labels(reducer, y):
    reducer.observer.labels, reducer.observer.fresh = F.one_hot(y, K).float(), True


def two_blocks(form, **settings):
    N, P, last = SITES[form]
    return build(N, P, True, **settings), build(P, last, False, **settings)


def start(form, parts=1):
    N = SITES[form][0]
    grid = N if form == "map" else (N, 1)
    X = 0.3 * torch.randn(B * parts, grid[0] * grid[1], D, dtype=torch.float64)
    return X, initial_tokens(X, 0, grid, is_map=form == "map", parts=parts)


@pytest.mark.parametrize("form", SITES)
def test_two_blocks_are_the_printed_equations_as_loops(form):
    first, second = two_blocks(form)
    X, tokens = start(form)
    Z1, between = first(X, tokens, Seen(inputs=X))
    # Section 3.1: G^(1) = Softmax(f(X / tau)), f = Linear + Sigmoid; over tokens, Section 4.1
    G1 = torch.sigmoid(X / 0.1 @ first.mask_fc.weight.t() + first.mask_fc.bias).softmax(dim=1)
    torch.testing.assert_close(Z1, torch.stack([G1[i].t() @ X[i] for i in range(B)]))
    # G^(1) in the second block's shape: token i is slot i of the first, columns at even spacing
    G = torch.stack([G1[i].t() @ G1[i] for i in range(B)])[:, :, COLUMNS[form]]
    c, P, y = second.clusters, G.shape[2], [2, 0, 3]
    update = torch.zeros_like(G[0])
    for i in range(B):
        merged = (G[i].t() @ Z1[i]).flatten()
        S = torch.stack([torch.exp(-(merged - c.centroids[a]).square().sum()) for a in range(K)])
        gamma, zeta = S.sum(), sum(S[a] * c.centroids[a] for a in range(K))
        hidden = (Z1[i] @ second.mlp_fc1.weight.t() + second.mlp_fc1.bias).relu()
        mlp = hidden @ second.mlp_fc2.weight.t() + second.mlp_fc2.bias
        for a in range(K):
            psi = -c.log_q[a, y[i]]  # the first term of psi cancels
            factor = S[a] / gamma**2 * (gamma * c.centroids[a] - zeta) * psi
            update -= 2.0 * second.eta / B * mlp @ factor.view(P, D).t()
    assert update.abs().max() > 1e-3
    G2 = (G + update).softmax(dim=1)
    Z2, after = second(Z1, between, Seen(inputs=Z1))
    torch.testing.assert_close(Z2, torch.stack([G2[i].t() @ Z1[i] for i in range(B)]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(after.masks[-1].dense(), G2)
    assert after.grid == (SITES[form][2] if form == "map" else None)
    # in eval the running mean stands for the minibatch: no labels, no clusters
    torch.testing.assert_close(second.running_update, 0.1 * update)
    second.eval().observer = None
    G2 = (G + 0.1 * update).softmax(dim=1)
    torch.testing.assert_close(second(Z1, between, Seen(inputs=Z1))[0], G2.transpose(1, 2) @ Z1)
    one = second(Z1[:1], between._replace(carried=between.carried[:1], size=between.size[:1]), Seen(inputs=Z1))[0]
    torch.testing.assert_close(one, G2[:1].transpose(1, 2) @ Z1[:1])


@pytest.mark.parametrize(("form", "parts"), [("sequence", 1), ("sequence", 3), ("map", 1)])
def test_masks(form, parts):
    first, second = two_blocks(form, parts=parts)
    X, tokens = start(form, parts)
    Z1, between = first(X, tokens, Seen(inputs=X))
    Z2, after = second(Z1, between, Seen(inputs=Z1))
    for mask in after.masks:
        G, to = mask.dense(), mask.destinations()
        assert len(G) == B
        torch.testing.assert_close(G.sum(dim=1), torch.ones_like(G[:, 0]))
        torch.testing.assert_close(to.sum(dim=2), torch.ones_like(to[..., 0]))
    torch.testing.assert_close(after.size.sum(dim=1), tokens.size.sum(dim=1))
    G = after.masks[0].dense() @ after.masks[1].dense()
    torch.testing.assert_close(Z2, G.repeat_interleave(parts, dim=0).transpose(1, 2) @ X)
    mean = Z1.unflatten(0, (B, parts)).mean(dim=1)
    merged = between.carried[:, :, COLUMNS[form]].transpose(1, 2) @ mean
    torch.testing.assert_close(second.observer.take(), merged.flatten(1))  # (B, P D), of the mean of parts


def test_warm_up_shows_what_the_mask_before_would_merge():
    first, second = two_blocks("sequence")
    X, tokens = start("sequence")
    same, between = first(X, tokens, Seen(inputs=X), observe=True)
    assert same is X
    second(X, between, Seen(inputs=X), observe=True)
    G1 = torch.sigmoid(first.mask_fc(X / 0.1)).softmax(dim=1)
    expected = G1[:, :, COLUMNS["sequence"]].transpose(1, 2) @ X
    torch.testing.assert_close(second.observer.take(), expected.flatten(1))
    assert not second.running_update.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_neither_needs_fresh_labels_nor_moves_the_running_mean(reentrant):
    first, second = two_blocks("sequence")
    X, tokens = start("sequence")
    Z1, between = first(X, tokens, Seen(inputs=X))

    def run(z, carried, size):  # re-entrant checkpoints have gradients of arguments alone
        return second(z, between._replace(carried=carried, size=size), Seen(inputs=z))[0]

    y = checkpoint(run, Z1, between.carried, between.size, use_reentrant=reentrant)
    second.observer.take()
    once, second.observer.fresh = second.running_update.clone(), False  # as the refresh's step does
    y.square().sum().backward()
    assert torch.equal(second.running_update, once)
    assert once.any()
    assert second.observer.features is None
    assert all(p.grad is not None for p in (*first.parameters(), *second.parameters()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o: setattr(o, "labels", None), r"labels: got none, .*refresh.labels"),
        (lambda o: setattr(o, "fresh", False), r"labels: got those of the batch before, .*refresh.labels"),
        (lambda o: setattr(o, "labels", o.labels[:2]), r"labels: got 2 for a batch of 3, .*refresh.labels"),
    ],
)
def test_training_needs_the_labels_of_its_batch(spoil, words):
    first, second = two_blocks("sequence")
    X, tokens = start("sequence")
    Z1, between = first(X, tokens, Seen(inputs=X))
    spoil(second.observer)
    with pytest.raises(ValueError, match=words):
        second(Z1, between, Seen(inputs=Z1))
    second.eval()(Z1, between, Seen(inputs=Z1))


def test_without_a_refresh_the_posterior_stands_for_labels():
    first, second = two_blocks("sequence")
    X, tokens = start("sequence")
    Z1, between = first(X, tokens, Seen(inputs=X))
    merged = (between.carried[:, :, COLUMNS["sequence"]].transpose(1, 2) @ Z1).flatten(1)
    second.observer = None
    y, _ = second(Z1, between, Seen(inputs=Z1))
    second.observer = Observer()
    # labels so soft that log Q is what the posterior expects of it
    second.clusters.log_q.copy_(torch.eye(K))
    second.observer.labels, second.observer.fresh = second.clusters.phi(merged) @ second.clusters.scores, True
    torch.testing.assert_close(second(Z1, between, Seen(inputs=Z1))[0], y)


def test_an_epoch_commits_equation_8_exactly():
    """T stays 1, log Q is kept, and R is not scaled."""
    reducer = build(12, 9, False)
    reducer.clusters.reset_parameters()
    running = reducer.running_sums(K, reservoir=2048, seed=0)
    x, labels = torch.randn(50, 9 * D).double(), F.one_hot(torch.randint(K, (50,)), K).double()
    for number in range(2):
        running.clear(number)
        phi = assign(x, reducer.clusters.centroids, 1.0)  # by which the second epoch's sums are made
        running.add(x, labels)
        running.commit()
    log_q = class_conditional(phi.t() @ labels, smoothing=1.0).log()
    prior = (labels.sum(dim=0) + 1) / (labels.sum(dim=0) + 1).sum()
    assert reducer.clusters.temperature == 1
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(reducer.clusters.log_q, log_q, **near)
    torch.testing.assert_close(reducer.clusters.scores, cluster_scores(log_q, prior), **near)


def test_as_many_clusters_as_classes():
    reducer = build(12, 9, False)
    assert reducer.clusters.centroids.shape == (K, 9 * D)
    reducer.check_classes(K, "block")
    with pytest.raises(ValueError, match=r"num_classes: got 20 for block, expected 4.*reset_classifier"):
        reducer.check_classes(20, "block")
    headless = type(reducer)(reducer.site._replace(num_classes=0), reducer.amount, reducer.config).double()
    headless.load_state_dict(reducer.state_dict())
    assert torch.equal(headless.clusters.log_q, reducer.clusters.log_q)
    running = reducer.running_update.normal_().clone()
    reducer.reset_classes(7)
    assert reducer.clusters.log_q.shape == (7, 7)
    assert not reducer.clusters.centroids.any()
    assert torch.equal(reducer.running_update, running)
    reducer.check_classes(7, "block")


@pytest.mark.parametrize(("form", "got"), [("sequence", "got 20 tokens, expected 12"), ("map", "got 4 x 5.*3 x 4")])
def test_tied_to_one_input_size(form, got):
    _, second = two_blocks(form)
    X, tokens = start(form)
    with pytest.raises(ValueError, match=rf"{got}.*img_size"):
        second.eval()(X, tokens, Seen(inputs=X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("observe", [False, True])
def test_half_precision_and_autocast(dtype, autocast, observe):
    first, second = (reducer.float() for reducer in two_blocks("sequence"))
    X, tokens = start("sequence")
    X, tokens = X.to(dtype), tokens._replace(size=tokens.size.float())
    found = []
    for half in (False, True):
        x, second.observer.fresh = X if half else X.float(), True
        if half and not autocast:
            first.to(dtype), second.to(dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=half and autocast):
            z, between = first(x, tokens, Seen(inputs=x), 0, observe)
            z, after = second(z, between, Seen(inputs=z), 0, observe)
        assert z.dtype == x.dtype
        assert after.size.dtype == torch.float32
        assert second.observer.take().dtype == torch.float32
        found.append(z.float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_models_of_the_paper():
    """0.95 in every block, 0.7 of maps; a refresh trains it; rotary positions refuse it: its slots have no place."""
    model = timm_ltm.convert(timm.create_model("test_vit", num_classes=K), "ltm", preset="paper")
    assert model.block_amounts == (0.95,) * 6
    refresh = timm_ltm.ClusterRefresh(model.train())
    x, y = torch.randn(4, 3, 160, 160), torch.arange(K)
    for _ in range(2):
        refresh.labels(y)
        F.cross_entropy(model(x), y).backward()
        refresh.step(y)
    with pytest.raises(ValueError, match=r"refresh.labels"):
        model(x)
    report = refresh.epoch_end()
    assert [r["features"] for r in report.values()] == [8] * 5
    state = model.state_dict()
    assert all(state[f"{name}.clusters.log_q"].any() for name in report)
    again = timm_ltm.convert(timm.create_model("test_vit", num_classes=K), "ltm", preset="paper")
    again.load_state_dict(copy.deepcopy(state))
    assert torch.equal(again.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"got 20 for blocks.1.reducer, expected 4"):
        timm_ltm.ClusterRefresh(model, num_classes=20)
    for name, ratio in {"efficientvit_b0": 0.7, "mobilevit_xxs": 0.95}.items():  # along lines, and free
        of_maps = timm_ltm.convert(timm.create_model(name, num_classes=K), "ltm", preset="paper")
        assert set(of_maps.block_amounts) == {ratio}
    eva = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=K)
    with pytest.raises(ValueError, match=r"ltm .PaperLTM. for a model with rotary positions"):
        timm_ltm.convert(timm.models.Eva(use_rot_pos_emb=True, **eva), "ltm", preset="paper")
    plain = timm.models.Eva(use_rot_pos_emb=False, **eva).eval()
    merging = timm_ltm.convert(plain, "ltm", preset="paper", compression_ratio=0.5)
    assert merging(torch.randn(2, 3, 32, 32)).shape == (2, K)
