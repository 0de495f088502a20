"""What real runs meet: half precision, a process that is killed, the switch from warm-up to merging, another loss."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import cluster_state, make, run_epoch
from test_training import make_paper
from timm.layers import set_reentrant_ckpt
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver

import timm_ltm
from timm_ltm.methods.ltm import LTM, LTMConfig, RunningClusters
from timm_ltm.reduction import Observer, Seen, Site, initial_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_map", [False, True])
def test_large_features_in_half_precision(is_map, dtype):
    """Tokens of 1e4, whose squares overflow fp16: masks, clusters and gradients stay finite."""
    grid = (6, 6)
    config = LTMConfig(num_clusters=8, ib_loss_weight=0.1)
    reducer = LTM(Site(64, grid if is_map else 36, num_classes=10), 0.5, config).train()
    reducer.observer = Observer()
    running = RunningClusters(reducer.clusters, 10)
    one_hot = F.one_hot(torch.arange(4), 10).float()
    for _ in range(2):
        running.clear(0)
        z = (1e4 * torch.randn(4, 36, 64)).to(dtype).requires_grad_()  # whose sums of 64 products overflow too
        tokens = initial_tokens(z, 0, grid, is_map=is_map)
        with torch.autocast("cpu", dtype=dtype):
            merged, _ = reducer(z, tokens, Seen(keys=z.detach()))
            features = reducer.observer.take()
            log_q = running.log_q if running.log_q is not None else torch.zeros(8, 10)
            loss = (merged.float() / 1e4).square().mean() + reducer.clusters.label_term(features, one_hot, log_q)
        loss.backward()
        assert merged.isfinite().all()
        assert z.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in reducer.parameters())
        running.add(features.detach(), one_hot)
        running.commit()
        assert all(buffer.isfinite().all() for buffer in reducer.clusters.buffers())
        assert reducer.clusters.centroids.any()


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_collects_once_and_leaves_gradients(digits, reentrant, warmup):
    """Activations recomputed in the backward pass, also by torch's re-entrant form; tokens are put back."""
    x, y = digits
    gradients, states = [], []
    set_reentrant_ckpt(reentrant)
    try:
        for checkpointing in (False, True):
            model = make(merge_warmup_epochs=warmup)
            model.set_grad_checkpointing(checkpointing)
            refresh = timm_ltm.ClusterRefresh(model)
            model.train()
            features = model.forward_features(x[:32])
            loss = F.cross_entropy(model.forward_head(features), y[:32]) + features[:, 1:].square().mean()
            refresh.step(y[:32])  # before the backward pass, in which blocks run again
            loss.backward()
            assert all(reducer.observer.features is None for _, reducer in model.reducers())
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            assert {entry["features"] for entry in refresh.epoch_end().values()} == {32.0}
            states.append(cluster_state(model))
    finally:
        set_reentrant_ckpt(False)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_patch_dropout_keeps_cells_by_position(digits):
    x, y = digits
    model = make(patch_drop_rate=0.5).train()
    refresh = timm_ltm.ClusterRefresh(model)
    _, tokens, _ = model.embed(x[:8])
    cells = tokens.cells(4)
    assert cells.shape == (8, 32)
    rows, columns = tokens.anchor // 8, tokens.anchor % 8
    assert torch.equal(cells, rows // 2 * 4 + columns // 2)
    assert len({tuple(row.tolist()) for row in tokens.anchor}) > 1
    assert model(x[:8]).isfinite().all()
    refresh.step(y[:8])
    assert {entry["features"] for entry in refresh.epoch_end().values()} == {8.0}


def test_ib_loss_is_added_from_its_epoch_on(digits):
    """Under a task the loss is criterion plus weight times the bound's label term; its gradient reaches the tokens."""
    x, y = (t[:64] for t in digits)
    model = make(ib_loss_weight=0.1, ib_loss_start_epoch=1)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    for epoch in range(2):
        model.train()
        out = task(x, y)
        added = out["loss"] - F.cross_entropy(out["output"], y)
        if epoch == 0:
            assert added == 0
        else:
            assert 0.1 * 0.1 < added < 0.1 * 6 * math.log(8) * 2
        model.eval()
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x, y)
    model.train()(x)
    expected = 0.0
    for name, reducer in model.reducers():
        phi = reducer.clusters.phi(reducer.observer.features)
        expected = expected - (phi * refresh.log_q[name].t()[y]).sum(dim=1).mean()
    torch.testing.assert_close(refresh.ib_loss(y), 0.1 * expected)
    torch.testing.assert_close(refresh.ib_loss(F.one_hot(y, 10).float()), refresh.ib_loss(y))
    (gradient,) = torch.autograd.grad(refresh.ib_loss(y), model.blocks[2].mlp.fc1.weight)
    assert gradient.abs().sum() > 0


def test_the_ib_loss_wants_features_with_gradients(digits):
    """Re-entrant checkpoints run blocks without: the loss would train nothing, silently."""
    x, y = (t[:32] for t in digits)
    model = make(ib_loss_weight=0.1)
    model.set_grad_checkpointing()
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x, y)
    set_reentrant_ckpt(True)
    try:
        model.train()(x)
    finally:
        set_reentrant_ckpt(False)
    with pytest.raises(ValueError, match="ib_loss_weight: got features without gradient"):
        refresh.ib_loss(y)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("later", [{}, {"ib_loss_weight": 0.0}, {"ib_loss_weight": 0.3}])
def test_a_checkpoint_trained_with_the_ib_loss_loads_without(digits, preset, later):
    """For inference, and for another weight: what it learned is the same. One that was told nothing takes it over."""
    x, y = (t[:32] for t in digits)
    made = functools.partial(make, patch_size=2) if preset == "default" else make_paper
    model = made(ib_loss_weight=0.1)
    refresh = timm_ltm.ClusterRefresh(model)
    for _ in range(2):
        run_epoch(model, refresh, x, y)
    loaded = made(**later)
    loaded.load_state_dict(model.state_dict())
    assert loaded.config.ib_loss_weight == later.get("ib_loss_weight", 0.1)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("wrong", [{"ib_loss_weight": -0.1}, {"ib_loss_weight": 0.1, "update": False}])
def test_bad_ib_loss(wrong):
    with pytest.raises(ValueError, match=f"ib_loss_weight: got {wrong['ib_loss_weight']}"):
        make(**wrong)


def test_merging_does_not_throw_training_back(digits):
    """At the switch from warm-up the loss stays near where it was."""
    x, y = digits
    warmup = 12
    model = make(merge_warmup_epochs=warmup, weight_init="moco", patch_size=2, depth=2)
    refresh, optimizer = timm_ltm.ClusterRefresh(model), torch.optim.AdamW(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def loss():
        model.eval()
        return F.cross_entropy(model(x), y).item()

    losses = []
    for _ in range(warmup + 2):
        run_epoch(model, refresh, x, y, batch=32, optimizer=optimizer)
        losses.append(loss())
    learned = losses[0] - losses[warmup - 2]  # the last epoch after which the model is plain
    assert learned > 0.5, losses
    assert losses[warmup - 1] < losses[warmup - 2] + 0.25 * learned, losses  # merges for the first time
    assert losses[warmup + 1] < losses[warmup - 2] + 0.1 * learned, losses


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_process_killed_while_it_saves_loses_nothing(digits, tmp_path, when, monkeypatch):
    """timm's saver writes beside the last checkpoint and replaces it: the one there is loads and goes on."""
    x, y = digits
    model = make()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), task=task)

    def epoch(number):
        model.train()
        task(x[:64], y[:64])["loss"].backward()
        model.eval()
        saver.save_checkpoint(number, metric=float(number))

    epoch(0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    def killed(*args, **kwargs):
        if when == "writing":
            Path(args[1]).write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch if when == "writing" else saver, "save" if when == "writing" else "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        epoch(1)
    monkeypatch.undo()
    resumed = make(seed=5)
    again = ClassificationTask(resumed, nn.CrossEntropyLoss(), verbose=False)
    assert resume_task_checkpoint(again, str(tmp_path / "last.pth.tar")) == 1
    assert resumed.epoch == 1
    for name, value in expected.items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("wrong", ["no", 1])
def test_bad_switch(wrong):
    with pytest.raises(ValueError, match="enable: got"):
        make().set_merging(wrong)
