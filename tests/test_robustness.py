"""What real runs meet: half precision, a process that is killed, the switch from warm-up to merging, another loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import make
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver

import timm_ltm


def run_epoch(model, refresh, x, y, batch, optimizer):
    model.train()
    for i in range(0, len(x), batch):
        loss = F.cross_entropy(model(x[i : i + batch]), y[i : i + batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        refresh.step(y[i : i + batch])
    refresh.epoch_end()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["ltm_vit_test", "ltm_efficientvit_b0"])
def test_large_features_in_half_precision(family, dtype):
    """Tokens of 1e4, whose squares overflow fp16: masks, clusters and gradients stay finite."""
    torch.manual_seed(0)
    grid = (6, 6)
    tokens = 36 if family == "ltm_vit_test" else grid
    config = timm_ltm.MergeConfig(num_clusters=8, ib_loss_weight=0.1)
    merger = timm_ltm.merging.TokenMerger(64, tokens, 0.5, config, num_classes=10, first=True).train()
    merger.collecting = True
    running = timm_ltm.merging.RunningClusters(merger.clusters, 10)
    for _ in range(2):
        running.clear(0)
        z = (1e4 * torch.randn(4, 36, 64)).to(dtype).requires_grad_()  # whose sums of 64 products overflow too
        state = timm_ltm.merging.initial_state(z, 0, grid, 4, stays_map=family != "ltm_vit_test")
        with torch.autocast("cpu", dtype=dtype):
            merged, _ = merger(z, state, 0, z.detach())
            loss = (merged.float() / 1e4).square().mean() + merger.clusters.label_term(merger.features, torch.arange(4))
        loss.backward()
        assert merged.isfinite().all()
        assert z.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in merger.parameters())
        running.add(merger.features.detach(), F.one_hot(torch.arange(4), 10))
        running.commit()
        assert all(buffer.isfinite().all() for buffer in merger.clusters.buffers())


def test_ib_loss_is_added_from_its_epoch_on(digits):
    """Under a task the loss is criterion plus weight times the bound's label term; its gradient reaches the tokens."""
    x, y = digits
    model = make(ib_loss_weight=0.1, ib_loss_start_epoch=1)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    for epoch in range(2):
        model.train()
        out = task(x[:64], y[:64])
        added = out["loss"] - F.cross_entropy(out["output"], y[:64])
        if epoch == 0:
            assert added == 0
        else:
            assert 0.1 * 0.1 < added < 0.1 * 6 * math.log(8) * 2
        model.eval()
    model.train()
    refresh = timm_ltm.ClusterRefresh(model)
    model(x[:64])
    (gradient,) = torch.autograd.grad(refresh.ib_loss(y[:64]), model.blocks[2].mlp.fc1.weight)
    assert gradient.abs().sum() > 0
    expected = sum(
        -(phi * m.clusters.log_q.t()[y[:64]]).sum(dim=1).mean()
        for m in refresh.mergers.values()
        for phi in [timm_ltm.merging.update.assign(m.features, m.clusters.centroids, m.clusters.temperature)]
    )
    torch.testing.assert_close(refresh.ib_loss(y[:64]), 0.1 * expected)
    one_hot = F.one_hot(y[:64], 10).float()
    torch.testing.assert_close(refresh.ib_loss(one_hot), refresh.ib_loss(y[:64]))


@pytest.mark.parametrize("wrong", [{"ib_loss_weight": -0.1}, {"ib_loss_weight": 0.1, "update": False}])
def test_bad_ib_loss(wrong):
    with pytest.raises(ValueError, match=f"ib_loss_weight: got {wrong['ib_loss_weight']}"):
        make(**wrong)


def test_merging_does_not_throw_training_back(digits):
    """At the switch from warm-up the loss stays near where it was."""
    x, y = digits
    warmup = 16
    model = make(merge_warmup_epochs=warmup, weight_init="moco", patch_size=2, depth=3)
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


def test_a_step_that_failed_can_be_made_again(digits):
    x, y = digits
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    model.train()(x[:8])
    for wrong, message in ((y[:4], "got 4 for 8 images"), (None, "got None"), (y[:8] + 10, r"got class 1\d")):
        with pytest.raises(ValueError, match=message):
            refresh.step(wrong)
    refresh.step(y[:8])
    assert {report["features"] for report in refresh.epoch_end().values()} == {8.0}


@pytest.mark.parametrize("wrong", ["no", 1])
def test_bad_switch(wrong):
    with pytest.raises(ValueError, match="enable: got"):
        make().set_merging(wrong)
