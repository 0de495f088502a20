"""ClusterRefresh: explicit, under timm's task, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import SHAPE, make
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch.nn.modules import module as torch_module

import timm_ltm
from timm_ltm import training


def run_epoch(model, refresh, x, y, batch=64, targets=None, optimizer=None):
    model.train()
    for i in range(0, len(x), batch):
        target = y[i : i + batch]
        refresh.labels(target)
        loss = F.cross_entropy(model(x[i : i + batch]), target)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        refresh.step(target if targets is None else targets[i : i + batch])
    return refresh.epoch_end()


def cluster_state(model):
    return {name: value.clone() for name, value in model.named_buffers() if ".merger." in name}


def test_no_dead_update_after_a_refresh_on_real_images(digits):
    """The entropy of phi on held-out images, and that the masks move, in every block."""
    x, y = digits
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        run_epoch(model, refresh, x[:192], y[:192], optimizer=optimizer)
    model.train()
    with torch.no_grad():
        model(x[192:])
    for name, merger in model.mergers():
        phi = timm_ltm.merging.update.assign(merger.features, merger.clusters.centroids, merger.clusters.temperature)
        entropy = timm_ltm.merging.clusters.mean_entropy(phi).item() / math.log(8)
        assert 0.1 < entropy < 0.9, name
    model.eval()
    with torch.no_grad():
        moved = model.forward_masks(x[192:]).masks
        for _, merger in model.mergers():
            merger.clusters.reset_parameters()
        still = model.forward_masks(x[192:]).masks
    for block, (a, b) in enumerate(zip(moved, still, strict=True)):
        assert (a - b).abs().amax() > 1e-3, block


def test_warmup_is_plain_then_starts_with_clusters(digits):
    x, y = digits
    model = make(merge_warmup_epochs=2)
    refresh = timm_ltm.ClusterRefresh(model)
    assert not model.merging
    assert not model.collecting
    assert run_epoch(model, refresh, x, y) == {}
    assert model.collecting  # the last epoch of warm-up
    assert not model.merging
    report = run_epoch(model, refresh, x, y)
    assert len(report) == 6
    assert all(entry["features"] == 256 for entry in report.values())
    assert model.merging
    assert model.epoch == 2
    assert all(merger.clusters.centroids.any() for _, merger in model.mergers())


def test_collecting_in_warmup_leaves_training_bit_for_bit(digits):
    x, _ = digits
    kwargs = dict(drop_path_rate=0.2, proj_drop_rate=0.1)
    model = make(merge_warmup_epochs=1, **kwargs)
    torch.manual_seed(0)
    plain = timm.create_model(
        "test_vit", **{k: v for k, v in SHAPE.items() if k not in ("num_clusters", "compression_ratio")}, **kwargs
    )
    timm_ltm.ClusterRefresh(model)
    assert model.collecting
    model.train(), plain.train()
    torch.manual_seed(1)
    ours = model(x[:32])
    torch.manual_seed(1)
    assert torch.equal(ours, plain(x[:32]))


def test_collecting_does_not_change_training(digits):
    x, y = digits
    states = []
    for collect in (True, False):
        model = make()
        if collect:
            timm_ltm.ClusterRefresh(model)
        torch.manual_seed(0)
        model.train()
        F.cross_entropy(model(x[:32]), y[:32]).backward()
        states.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*states)


def test_soft_targets_and_class_indices_agree(digits):
    x, y = digits
    soft, hard = make(), make()
    run_epoch(soft, timm_ltm.ClusterRefresh(soft), x, y, targets=F.one_hot(y, 10).float())
    run_epoch(hard, timm_ltm.ClusterRefresh(hard), x, y)
    for name, value in cluster_state(soft).items():
        torch.testing.assert_close(value, cluster_state(hard)[name])


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_resumed_run_is_the_run_never_stopped(digits, warmup, stop):
    x, y = digits

    def continued(stop_after):
        model = make(merge_warmup_epochs=warmup)
        refresh = timm_ltm.ClusterRefresh(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for epoch in range(4):
            if epoch == stop_after:
                saved = {name: value.clone() for name, value in model.state_dict().items()}
                model = make(seed=9, merge_warmup_epochs=warmup)
                refresh = timm_ltm.ClusterRefresh(model)  # as under timm's train.py, before the checkpoint is loaded
                model.load_state_dict(saved)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            torch.manual_seed(epoch)
            run_epoch(model, refresh, x, y, optimizer=optimizer)
        return model

    whole, resumed = continued(None), continued(stop)
    assert resumed.epoch == whole.epoch == 4
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], rtol=0, atol=0)


def test_features_with_nan_are_counted_and_warned_about_once(digits):
    x, y = digits
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    dirty = x.clone()
    dirty[::64] = float("nan")
    with pytest.warns(UserWarning, match="4 images had features that are not finite"):
        run_epoch(model, refresh, dirty, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run_epoch(model, refresh, dirty, y)
    assert all(entry["skipped"] == 4 for entry in report.values())
    assert refresh.skipped == 8
    assert all(value.isfinite().all() for value in cluster_state(model).values())
    model.eval()
    assert model(x[:4]).isfinite().all()


def test_true_labels_in_training_and_none_in_eval(digits):
    x, y = digits
    model = make(preset="paper", temperature="fit", mask_mode="sample", num_clusters=0)
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x, y)
    model.train()
    with torch.no_grad():
        refresh.labels(y[:8])
        right = model(x[:8])
        refresh.labels((y[:8] + 1) % 10)
        wrong = model(x[:8])
        model.eval()
        assert not torch.equal(right, wrong)
        before = model(x[:8])
        refresh.labels(y[:8])
        assert torch.equal(before, model(x[:8]))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (torch.zeros(5, dtype=torch.long), r"targets: got 5 for 4 images"),
        (torch.zeros(4), r"targets: got shape \(4,\) of torch.float32"),
        (torch.zeros(4, 3), r"targets: got shape \(4, 3\)"),
    ],
)
def test_bad_targets(digits, targets, match):
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    model.train()(digits[0][:4])
    with pytest.raises(ValueError, match=match):
        refresh.step(targets)


def test_a_model_without_ltm():
    with pytest.raises(ValueError, match=r"got 0 LTM models in Linear, expected one"):
        timm_ltm.ClusterRefresh(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"num_classes: got 0"):
        timm_ltm.ClusterRefresh(make(num_classes=0))


def test_attaches_to_a_timm_task_and_follows_its_epochs(digits):
    """timm's train.py: model into a task, train(), task(input, target), eval(), save, train() ..."""
    x, y = digits
    model = make(merge_warmup_epochs=1)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    assert model not in training._pending
    for epoch in range(3):
        task.get_trainable_module().train()
        for i in range(0, 256, 64):
            task(x[i : i + 64], y[i : i + 64])["loss"].backward()
        assert model.epoch == epoch
        if epoch != 1:  # --val-interval 2: an epoch without validation ends at the next train()
            model.eval()
            assert model.epoch == epoch + 1
            model.eval()
            assert model.epoch == epoch + 1
    assert all(merger.clusters.centroids.any() for _, merger in model.mergers())


def test_attached_and_explicit_refresh_agree(digits):
    x, y = digits
    explicit, attached = make(), make()
    run_epoch(explicit, timm_ltm.ClusterRefresh(explicit), x, y)
    task = ClassificationTask(attached, nn.CrossEntropyLoss(), verbose=False)
    attached.train()
    for i in range(0, 256, 64):
        task(x[i : i + 64], target=y[i : i + 64])
    attached.eval()
    for name, value in cluster_state(explicit).items():
        assert torch.equal(value, cluster_state(attached)[name]), name


def test_an_ema_copy_follows(digits):
    x, y = digits
    model = make(merge_warmup_epochs=1)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    for epoch in range(2):
        model.train()
        task(x[:64], y[:64])
        task.update_ema(step=1)
        model.eval()
        ema = task.get_eval_model(ema=True).eval()
        assert isinstance(ema, ModelEmaV3)
        assert ema.module.merging
        assert ema.module.epoch == epoch + 1
        for name, value in cluster_state(model).items():
            if "clusters" in name:  # those of the epoch, not a mean of old and new ones
                assert torch.equal(value, ema.module.get_buffer(name)), name
    assert ema(x[:4]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_exact_under_autocast(digits, dtype):
    x, y = digits
    torch.manual_seed(0)
    features = torch.randn(len(x), 16 * 16)
    reports = []
    for enabled in (False, True):
        model = make()
        refresh = timm_ltm.ClusterRefresh(model)
        model.train()
        for _ in range(2):
            for _, merger in model.mergers():
                merger.features = features
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                refresh.step(y)
            refresh.epoch_end()
        reports.append(cluster_state(model))
    for name, value in reports[0].items():
        assert torch.equal(value, reports[1][name]), name


def test_a_new_head_after_attaching(digits):
    x, y = digits
    model = make(num_clusters=0)
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x, y)
    model.reset_classifier(5)
    run_epoch(model, refresh, x, y % 5)
    for _, merger in model.mergers():
        assert merger.clusters.centroids.shape[0] == 5
        assert merger.clusters.centroids.any()


@pytest.mark.parametrize("name", timm.list_models("ltm_vit_*"))
def test_the_papers_preset_goes_before_a_variants_defaults(name):
    model = timm.create_model(name, preset="paper", num_classes=3, device="meta")
    for field, value in timm_ltm.PAPER.items():
        assert getattr(model.merge_config, field) == value, field
    ratio = timm.create_model(name, preset="paper", compression_ratio=0.8, num_classes=3, device="meta").merge_config
    assert ratio.compression_ratio == 0.8


def test_patch_dropout_keeps_cells_by_position(digits):
    x, _ = digits
    model = make(patch_drop_rate=0.5).train()
    torch.manual_seed(0)
    _, state, _ = model._embed(x[:8])
    assert state.cells.shape == (8, 32)
    assert all(row.unique().numel() > 10 for row in state.cells)
    assert model(x[:8]).isfinite().all()


def test_importing_leaves_no_hook_and_attaching_takes_it_away():
    gc.collect()
    training._pending.clear()
    training._release()
    hooks = torch_module._global_module_registration_hooks
    forward = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    assert not hooks
    model = make()
    assert len(hooks) == 1
    assert not any(forward)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    assert not hooks
    explicit = make()
    assert len(hooks) == 1
    timm_ltm.ClusterRefresh(explicit)
    assert not hooks
    lost = make()
    assert len(hooks) == 1
    del lost
    gc.collect()
    assert not hooks
    assert not any(forward)
    del task


def test_import_alone_touches_nothing_global():
    import subprocess
    import sys

    code = (
        "import timm, timm_ltm; from torch.nn.modules import module as m;"
        "assert not any(getattr(m, n) for n in dir(m) if n.startswith('_global_') and n.endswith('hooks'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_deepcopy_is_a_model_of_its_own(digits):
    x, y = digits
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x, y)
    other = copy.deepcopy(model)
    before = cluster_state(other)
    run_epoch(model, refresh, x, y)
    assert all(torch.equal(value, before[name]) for name, value in cluster_state(other).items())
    assert other.epoch == 1
    assert model.epoch == 2
