"""Under timm's tasks the refresh attaches itself: to whatever is trained, however it came there, once."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from small import cluster_state, make, run_epoch
from test_training import FEW, make_paper, moved
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3

import timm_ltm


def task_of(model):
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def train(task, x, y, batch=32, optimizer=None, each=lambda: None):
    """A training epoch as timm's train.py has it; ``each`` is called before every batch."""
    task.get_trainable_module().train()
    optimizer = optimizer or torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3)
    for i in range(0, len(x), batch):
        each()
        task(x[i : i + batch], y[i : i + batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_follows_the_epochs_of_timms_train_script(digits):
    """Model into a task, train(), task(input, target), eval(), save, train() ..., and --val-interval 2."""
    x, y = (t[:128] for t in digits)
    model = make(merge_warmup_epochs=1, **FEW)
    task = task_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for epoch in range(4):
        train(task, x, y, optimizer=optimizer)
        assert model.epoch == epoch
        if epoch % 2 == 0:  # an epoch without validation ends at the next train()
            for _ in range(2):
                model.eval()
                assert model.epoch == epoch + 1
    assert all(reducer.clusters.centroids.any() for _, reducer in model.reducers())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_before_every_batch_is_one_epoch(digits, accumulate):
    x, y = (t[:128] for t in digits)
    model = make(merge_warmup_epochs=2, **FEW)
    task = task_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for epoch in range(3):
        for i in range(4):
            task.train()
            for _ in range(accumulate):
                task(x[32 * i : 32 * i + 32], y[32 * i : 32 * i + 32])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            assert model.epoch == epoch
        model.eval()
        assert model.epoch == epoch + 1
    assert model.merging


def test_attached_and_explicit_refresh_agree(digits):
    x, y = (t[:128] for t in digits)
    explicit, attached = make(**FEW), make(**FEW)
    run_epoch(explicit, timm_ltm.ClusterRefresh(explicit), x, y)
    task = task_of(attached)
    attached.train()
    for i in range(0, 128, 64):
        task(x[i : i + 64], target=y[i : i + 64])
    attached.eval()
    for name, value in cluster_state(explicit).items():
        assert torch.equal(value, cluster_state(attached)[name]), name


@pytest.mark.parametrize("first", ["task", "refresh"])
def test_a_task_beside_an_explicit_refresh_counts_once(digits, first):
    """2 after 2, whichever was made first: the explicit one is asked for features and epochs."""
    x, y = (t[:64] for t in digits)
    model = make(**FEW)
    task = task_of(model) if first == "task" else None
    refresh = timm_ltm.ClusterRefresh(model)
    task = task or task_of(model)
    for epoch in range(2):
        model.train()
        for i in range(0, 64, 32):
            task(x[i : i + 32], y[i : i + 32])
            refresh.step(y[i : i + 32])
        model.eval()
        assert model.epoch == epoch
        assert {entry["features"] for entry in refresh.epoch_end().values()} == {64.0}
        assert model.epoch == epoch + 1


def test_a_task_goes_on_where_an_explicit_refresh_ended(digits):
    x, y = (t[:64] for t in digits)
    model = make(**FEW)
    refresh, task = timm_ltm.ClusterRefresh(model), task_of(model)
    run_epoch(model, refresh, x, y)
    del refresh
    train(task, x, y)
    model.eval()
    assert model.epoch == 2


def _second(model):
    first = task_of(model)
    return first, task_of(model), model


def _copied(model):
    other = copy.deepcopy(model)
    return model, task_of(other), other


def _unpickled(model):
    other = pickle.loads(pickle.dumps(model))
    del model
    gc.collect()
    return None, task_of(other), other


def _copied_task(model):
    task = task_of(model)
    other = copy.deepcopy(task)
    return task, other, other.get_trainable_module()


def _given_later(model):
    task = task_of(timm.create_model("test_vit", img_size=8, patch_size=2, in_chans=1, num_classes=10, depth=1))
    task.trainable_module = model
    return None, task, model


def _given_another(model):
    task = task_of(make(seed=1, **FEW))
    task.trainable_module = model
    return None, task, model


def _compiled(model):
    task = task_of(model)
    task.compile(backend="eager")
    return None, task, model


HOW = {
    "a second task": _second,
    "a copy": _copied,
    "unpickled": _unpickled,
    "a copied task": _copied_task,
    "given later": _given_later,
    "given another": _given_another,
    "compiled": _compiled,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("when", ["made", "trained"])
def test_the_refresh_is_found_again(digits, how, when):
    """Warm-up ends and clusters move, also where the model was trained under another task before."""
    x, y = (t[:64] for t in digits)
    model = make(merge_warmup_epochs=2, **FEW)
    before = None
    if when == "trained":
        before = task_of(model)
        train(before, x, y)
        model.eval()
    done = model.epoch
    kept, task, model = HOW[how](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(done, 2):
            assert not model.merging
            train(task, x, y)
            model.eval()
            assert model.epoch == epoch + 1
        assert model.merging
        state = cluster_state(model)
        assert all(value.any() for name, value in state.items() if name.endswith("centroids"))
        train(task, x, y)
        model.eval()
    assert model.epoch == 3
    assert moved(state, cluster_state(model))
    if how in ("a copy", "a copied task"):
        assert (kept if how == "a copy" else kept.get_trainable_module()).epoch == done
    del before


def test_two_tasks_in_turn_share_the_models_refresh(digits):
    x, y = (t[:128] for t in digits)
    model = make(**FEW)
    tasks = [task_of(model), task_of(model)]
    model.train()
    for i in range(0, 128, 32):
        tasks[i // 32 % 2](x[i : i + 32], y[i : i + 32])
    alone = make(**FEW)
    model.eval()
    run_epoch(alone, timm_ltm.ClusterRefresh(alone), x, y, batch=32)
    assert model.epoch == 1
    for name, value in cluster_state(alone).items():
        assert torch.equal(value, cluster_state(model)[name]), name


@pytest.mark.parametrize("kind", [LogitDistillationTask, FeatureDistillationTask])
@pytest.mark.parametrize("in_training", ["the task", "the student"])
def test_of_a_distillation_the_student_is_refreshed_only(digits, kind, in_training):
    x, y = (t[:64] for t in digits)
    student, teacher = make(**FEW), make(seed=1, merge_warmup_epochs=1, **FEW)
    before = copy.deepcopy(teacher.state_dict())
    task = kind(student, teacher, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for epoch in range(2):
        (task if in_training == "the task" else task.get_trainable_module()).train()
        for i in range(0, 64, 32):
            task(x[i : i + 32], y[i : i + 32])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        student.eval()
        assert student.epoch == epoch + 1
    assert all(reducer.clusters.centroids.any() for _, reducer in student.reducers())
    assert teacher.epoch == 0
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("explicit", [False, True])
def test_an_ema_copy_follows_and_is_not_taken_for_the_model(digits, explicit):
    x, y = (t[:64] for t in digits)
    model = make(merge_warmup_epochs=1, **FEW)
    task = task_of(model)
    task.setup_ema(decay=0.5)
    refresh = timm_ltm.ClusterRefresh(model, ema=task.get_trainable_module(ema=True)) if explicit else None
    for epoch in range(3):
        task.train()  # the averaged copy too
        for i in range(0, 64, 32):
            task(x[i : i + 32], y[i : i + 32])
            task.update_ema(step=1)
            if refresh is not None:
                refresh.step(y[i : i + 32])
        if refresh is not None:
            refresh.epoch_end()
        model.eval()
        ema = task.get_eval_model(ema=True)
        assert isinstance(ema, ModelEmaV3)
        assert ema.module.merging
        assert ema.module.epoch == epoch + 1
        for name, value in cluster_state(model).items():  # those of the epoch, not a mean of old and new ones
            assert torch.equal(value, ema.module.get_buffer(name)), name
    assert ema.eval()(x[:4]).isfinite().all()


def test_the_printed_form_gets_its_labels_from_the_task(digits):
    x, y = (t[:32] for t in digits)
    model = make_paper()
    task = task_of(model)
    for _ in range(2):
        train(task, x, y, batch=16)
        model.eval()
    assert model.epoch == 2
    assert all(r.clusters.log_q.any() for _, r in model.reducers() if r.collects)


def test_validation_in_inference_mode_leaves_the_ib_loss_trainable(digits):
    x, y = (t[:64] for t in digits)
    model = make(ib_loss_weight=0.1, **FEW)
    task = task_of(model)
    for _ in range(2):
        train(task, x, y)
        with torch.inference_mode():
            model.eval()(x)
    assert model.epoch == 2


def test_a_task_without_labels_is_told(digits):
    class Unlabelled(timm.task.TrainingTask):
        def __init__(self, model):
            super().__init__()
            self.trainable_module = model

        def forward(self, x):
            return {"loss": self.trainable_module(x).square().mean()}

    with pytest.raises(ValueError, match="targets: got None, expected a tensor of labels"):
        Unlabelled(make(**FEW).train())(digits[0][:4])
