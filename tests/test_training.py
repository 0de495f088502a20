"""ClusterRefresh in one's own loop: what it collects, commits and leaves alone, and who owns a model's refresh."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import SHAPE, cluster_state, make, run_epoch
from timm.utils import ModelEmaV3

import timm_ltm
from timm_ltm.methods.ltm import update
from timm_ltm.methods.ltm.clusters import mean_entropy

FEW = dict(patch_size=2, depth=3, compression_ratio=[0.8, 1.0, 0.7])  # 16 tokens, two blocks that merge them


def moved(before, after):
    """Whether every block's clusters are others."""
    return all(not torch.equal(before[name], after[name]) for name in before if name.endswith("centroids"))


def plain(**kwargs):
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_clusters", "compression_ratio")}
    torch.manual_seed(0)
    return timm.create_model("test_vit", **shape, **kwargs)


def test_no_dead_update_after_a_refresh_on_real_images(digits):
    """The entropy of phi on held-out images, and that the update moves what is merged, in every block."""
    x, y = digits
    model = make()
    refresh = timm_ltm.ClusterRefresh(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        run_epoch(model, refresh, x[:192], y[:192], optimizer=optimizer)
    model.train()
    with torch.no_grad():
        model(x[192:])
    for name, reducer in model.reducers():
        phi = update.assign(reducer.observer.take(), reducer.clusters.centroids, reducer.clusters.temperature)
        assert 0.1 < mean_entropy(phi).item() / math.log(8) < 0.9, name
    model.eval()
    with torch.no_grad():
        with_update = model.forward_masks(x[192:]).masks
        for _, reducer in model.reducers():
            reducer.clusters.reset_parameters()
        without = model.forward_masks(x[192:]).masks
    for block, (a, b) in enumerate(zip(with_update, without, strict=True)):
        assert (a - b).abs().amax() > 1e-3, block


def test_warmup_is_plain_then_starts_with_clusters_and_says_so(digits, caplog):
    x, y = digits
    caplog.set_level(logging.INFO, "timm_ltm.training")
    model = make(merge_warmup_epochs=2)
    refresh = timm_ltm.ClusterRefresh(model)
    assert "merging starts after 2 more epochs" in caplog.text
    assert not model.merging
    assert run_epoch(model, refresh, x[:64], y[:64]) == {}
    assert not model.merging
    report = run_epoch(model, refresh, x, y)
    assert len(report) == 6
    assert all(entry["features"] == 256 for entry in report.values())
    assert model.merging
    assert model.epoch == 2
    assert all(reducer.clusters.centroids.any() for _, reducer in model.reducers())
    assert caplog.text.count("Merging starts, after 2 epochs") == 1
    run_epoch(model, refresh, x[:64], y[:64])
    assert caplog.text.count("Merging starts") == 1


def test_collecting_in_warmup_leaves_training_bit_for_bit(digits):
    """Outputs, gradients and random numbers are those of the plain model."""
    x, y = digits
    kwargs = dict(drop_path_rate=0.2, proj_drop_rate=0.1)
    model, reference = make(merge_warmup_epochs=1, **kwargs), plain(**kwargs)
    refresh, outputs = timm_ltm.ClusterRefresh(model), []
    for one in (model.train(), reference.train()):
        torch.manual_seed(1)
        outputs.append(one(x[:32]))
        F.cross_entropy(outputs[-1], y[:32]).backward()
    assert torch.equal(*outputs)
    refresh.step(y[:32])
    assert {entry["features"] for entry in refresh.epoch_end().values()} == {32.0}
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


def test_collecting_does_not_change_training(digits):
    x, y = digits
    gradients = []
    for collect in (True, False):
        model = make()
        refresh = timm_ltm.ClusterRefresh(model) if collect else None
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a refresh
            F.cross_entropy(model.train()(x[:32]), y[:32]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        del refresh
    assert torch.equal(*gradients)


def test_soft_targets_and_class_indices_agree(digits):
    x, y = digits
    soft, hard = make(**FEW), make(**FEW)
    run_epoch(soft, timm_ltm.ClusterRefresh(soft), x, y, targets=F.one_hot(y, 10).float())
    run_epoch(hard, timm_ltm.ClusterRefresh(hard), x, y)
    for name, value in cluster_state(soft).items():
        torch.testing.assert_close(value, cluster_state(hard)[name])


@pytest.mark.parametrize(("warmup", "stop"), [(0, 1), (3, 1), (3, 2), (2, 3)])
def test_a_resumed_run_is_the_run_never_stopped(digits, warmup, stop):
    x, y = (t[:128] for t in digits)

    def continued(stop_after):
        model = make(merge_warmup_epochs=warmup, **FEW)
        refresh = timm_ltm.ClusterRefresh(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for epoch in range(4):
            if epoch == stop_after:
                saved = {name: value.clone() for name, value in model.state_dict().items()}
                model = make(seed=9, merge_warmup_epochs=warmup, **FEW)
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


def test_parameters_put_back_within_an_epoch_leave_what_was_collected(digits):
    x, y = digits
    model = make(**FEW)
    refresh = timm_ltm.ClusterRefresh(model)
    model.train()
    for i in range(0, 128, 32):
        kept = copy.deepcopy(model.state_dict())
        model(x[i : i + 32])
        model.load_state_dict(kept)  # as sharpness-aware training does
        refresh.step(y[i : i + 32])
    assert {entry["features"] for entry in refresh.epoch_end().values()} == {128.0}


def test_features_with_nan_are_counted_and_warned_about_once(digits):
    x, y = digits
    model = make(**FEW)
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
    assert model.eval()(x[:4]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_exact_under_autocast(digits, dtype):
    """What is collected is added up in float32, whatever autocast says around ``step``."""
    x, y = digits
    states = []
    for enabled in (False, True):
        model = make(**FEW)
        refresh = timm_ltm.ClusterRefresh(model)
        model.train()
        for _ in range(2):
            model(x)
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                refresh.step(y)
                refresh.epoch_end()
        states.append(cluster_state(model))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_stale_labels_are_not_used_again(digits):
    """The printed Eq. 3 reads the batch's labels: those of the batch before, or of another size, are refused."""
    x, y = digits
    model = make_paper()
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x[:32], y[:32], batch=16)
    model.train()
    refresh.labels(y[:8])
    right = model(x[:8])
    refresh.step(y[:8])
    with pytest.raises(ValueError, match="labels: got those of the batch before"):
        model(x[8:16])
    refresh.labels(y[:8])
    model(x[:8])
    with pytest.raises(ValueError, match="labels: got those of the batch before"):  # also without a step between
        model(x[8:16])
    refresh.labels(y[:8])
    with pytest.raises(ValueError, match="labels: got 8 for a batch of 4"):
        model(x[:4])
    refresh.labels((y[:8] + 1) % 10)
    assert not torch.equal(right, model(x[:8]))
    with torch.no_grad():
        before = model.eval()(x[:8])
        refresh.labels(y[:8])
        assert torch.equal(before, model(x[:8]))  # none in eval


def make_paper(**kwargs):
    torch.manual_seed(0)
    shape = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, compression_ratio=0.8)
    return timm.create_model("ltm_vit_test", preset="paper", **{**shape, **kwargs})


def test_more_classes_than_the_heads(digits):
    """Targets of 20 classes on a head of 10: their clusters are fine; the printed form has a cluster per class."""
    x, y = digits
    model = make(**FEW)
    refresh = timm_ltm.ClusterRefresh(model, num_classes=20)
    model.train()
    for _ in range(2):
        model(x)
        refresh.step(y * 2)
        report = refresh.epoch_end()
    assert all(0.1 < entry["entropy"] < 0.9 for entry in report.values())
    assert all(log_q.shape == (8, 20) for log_q in refresh.log_q.values())
    with pytest.raises(ValueError, match=r"num_classes: got 20 for blocks\.\d\.reducer, expected 10"):
        timm_ltm.ClusterRefresh(make_paper(), num_classes=20)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_new_head_after_attaching(digits, preset):
    x, y = digits
    model = make(**FEW) if preset == "default" else make_paper()
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x[:64], y[:64])
    model.reset_classifier(5)
    for _ in range(2):
        run_epoch(model, refresh, x[:64], y[:64] % 5)
    for name, reducer in model.reducers():
        if reducer.collects:
            assert refresh.log_q[name].shape == (8 if preset == "default" else 5, 5)
            assert reducer.clusters.centroids.any()


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (torch.zeros(5, dtype=torch.long), r"targets: got 5 for 4 images"),
        (torch.zeros(4), r"targets: got shape \(4,\) of torch.float32"),
        (torch.zeros(4, 3), r"targets: got shape \(4, 3\)"),
        (None, r"targets: got None"),
        (torch.full((4,), 10), r"targets: got class 10"),
    ],
    ids=str,
)
def test_a_step_that_failed_can_be_made_again(digits, targets, match):
    model = make(**FEW)
    refresh = timm_ltm.ClusterRefresh(model)
    model.train()(digits[0][:4])
    with pytest.raises(ValueError, match=match):
        refresh.step(targets)
    refresh.step(digits[1][:4])
    assert {report["features"] for report in refresh.epoch_end().values()} == {4.0}


def test_a_model_that_cannot_be_refreshed():
    with pytest.raises(ValueError, match=r"got 0 merging models in Linear, expected one"):
        timm_ltm.ClusterRefresh(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"num_classes: got 0"):
        timm_ltm.ClusterRefresh(make(num_classes=0))


def test_a_model_without_merges_has_nothing_to_refresh(digits):
    """The baseline of a comparison, in the same loop."""
    x, y = (t[:32] for t in digits)
    model = make(compression_ratio=1.0, merge_warmup_epochs=2)
    assert run_epoch(model, timm_ltm.ClusterRefresh(model), x, y) == {}
    assert (model.epoch, model.merging) == (1, False)


def test_epoch_end_counts_epochs_that_were_trained(digits):
    x, y = digits
    model = make(**FEW)
    refresh = timm_ltm.ClusterRefresh(model)
    report = run_epoch(model, refresh, x[:64], y[:64])
    state = cluster_state(model)
    assert refresh.epoch_end() == refresh.epoch_end() == report
    assert model.epoch == 1
    assert all(torch.equal(value, cluster_state(model)[name]) for name, value in state.items())


def test_the_refresh_made_last_owns_the_model(digits):
    x, y = digits
    model = make(**FEW)
    first = timm_ltm.ClusterRefresh(model)
    model.train()(x[:8])
    first.step(y[:8])
    second = timm_ltm.ClusterRefresh(model)
    for call in (lambda: first.step(y[:8]), lambda: first.labels(y[:8]), first.epoch_end):
        with pytest.raises(ValueError, match="its refresh is another, made later"):
            call()
    run_epoch(model, second, x[:64], y[:64])
    assert model.epoch == 1


@pytest.mark.parametrize("how", ["deepcopied", "unpickled"])
def test_a_copy_is_a_model_of_its_own(digits, how):
    """Neither follows the other, and the copy is refreshed by its own refresh."""
    x, y = digits
    model = make(**FEW)
    refresh = timm_ltm.ClusterRefresh(model)
    run_epoch(model, refresh, x[:64], y[:64])
    model.train()(x[:8])  # features wait in the model
    other = copy.deepcopy(model) if how == "deepcopied" else pickle.loads(pickle.dumps(model))
    refresh.step(y[:8])
    refresh.epoch_end()
    assert (model.epoch, other.epoch) == (2, 1)
    before, ours = cluster_state(other), cluster_state(model)
    run_epoch(other, timm_ltm.ClusterRefresh(other), x[:64], y[:64])
    assert other.epoch == 2
    assert moved(before, cluster_state(other))
    assert all(torch.equal(value, cluster_state(model)[name]) for name, value in ours.items())


@pytest.mark.parametrize("warmup", [0, 2])
def test_an_ema_copy_in_ones_own_loop_gets_the_committed_clusters(digits, warmup):
    x, y = digits
    model = make(merge_warmup_epochs=warmup, **FEW)
    ema = ModelEmaV3(model, decay=0.9)
    refresh = timm_ltm.ClusterRefresh(model, ema=ema)
    for epoch in range(3):
        model.train()
        for i in range(0, 128, 64):
            model(x[i : i + 64])
            refresh.step(y[i : i + 64])
            ema.update(model)
        refresh.epoch_end()
        assert ema.module.epoch == epoch + 1
        assert ema.module.merging == (epoch + 1 >= warmup)
        for name, value in cluster_state(model).items():
            assert torch.equal(value, ema.module.get_buffer(name)), name
    assert ema(x[:4]).isfinite().all()


def test_forward_masks_between_forward_and_step_leaves_what_awaits_it(digits):
    x, y = digits
    states = []
    for look in (False, True):
        model = make(**FEW)
        refresh = timm_ltm.ClusterRefresh(model)
        model.train()
        model(x[:64])
        if look:
            assert model.forward_masks(x[128:]).masks
        refresh.step(y[:64])
        report = refresh.epoch_end()
        assert {entry["features"] for entry in report.values()} == {64.0}
        states.append(cluster_state(model))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_merging_forced_within_warmup_is_refreshed_at_once(digits):
    x, y = digits
    model = make(merge_warmup_epochs=5, **FEW)
    refresh = timm_ltm.ClusterRefresh(model)
    model.set_merging(True)
    assert all(entry["features"] == 64 for entry in run_epoch(model, refresh, x[:64], y[:64]).values())
