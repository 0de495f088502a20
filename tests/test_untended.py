"""What happens where nobody refreshes a model, what is logged, and what is left behind."""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import SHAPE, make, run_epoch
from test_tasks import task_of, train
from test_training import FEW
from torch.nn.modules import module as torch_module

import timm_ltm
from timm_ltm import tasks

NO_SETTINGS = {k: v for k, v in SHAPE.items() if k != "num_clusters"}


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("ltm_vit_test", {}, "its clusters are never updated"),
        ("ltm_vit_test", {"merge_warmup_epochs": 3}, "merging, planned after 3 epochs, will never start"),
        ("tome_vit_test", {"merge_warmup_epochs": 3}, "merging, planned after 3 epochs, will never start"),
        ("ltm_vit_test", {"merge_warmup_epochs": 3, "compression_ratio": 1.0}, None),
        ("ltm_vit_test", {"update": False}, None),
        ("tome_vit_test", {}, None),
    ],
)
def test_training_without_a_refresh_says_so_once(digits, name, settings, told):
    x, y = digits
    model = timm.create_model(name, **{**NO_SETTINGS, **settings}).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()(x[:2])
        model.train()
        with torch.no_grad():
            model(x[:2])
        assert not caught
        for _ in range(3):
            F.cross_entropy(model(x[:2]), y[:2]).backward()
    messages = [str(w.message) for w in caught]
    assert len(messages) == (told is not None)
    if told is not None:
        assert told in messages[0]
        assert "timm_ltm.ClusterRefresh(model)" in messages[0]


@pytest.mark.parametrize("how", ["explicit", "task", "off"])
def test_training_that_is_tended_says_nothing(digits, how):
    x, y = (t[:32] for t in digits)
    model = make(merge_warmup_epochs=0 if how == "off" else 1, **FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "explicit":
            run_epoch(model, timm_ltm.ClusterRefresh(model), x, y)
        elif how == "task":
            train(task_of(model), x, y)
        else:
            model.set_merging(False)
            F.cross_entropy(model.train()(x), y).backward()


def test_a_task_says_when_merging_will_start_and_that_it_starts(digits, caplog):
    x, y = (t[:32] for t in digits)
    caplog.set_level(logging.INFO, "timm_ltm")
    model = timm.create_model("tome_vit_test", merge_warmup_epochs=2, **NO_SETTINGS)
    task = task_of(model)
    for _ in range(3):
        train(task, x, y, batch=16)
        model.eval()
    assert model.merging
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Plain training first: merging starts after 2 more epochs.",
        "ClusterRefresh attached to ClassificationTask.",
        "Merging starts, after 2 epochs of plain training.",
    ]


def test_importing_alone_leaves_no_hook():
    code = (
        "import timm, timm_ltm; from torch.nn.modules import module as m;"
        "timm.create_model('ltm_vit_test', update=False), timm.create_model('tome_vit_test');"
        "assert not any(getattr(m, n) for n in dir(m) if n.startswith('_global_') and n.endswith('hooks'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def alone():
    """As if no model of another test were left."""
    gc.collect()
    others = list(tasks._living)
    tasks._living.clear()
    tasks._release()
    yield
    for model in others:
        tasks._watch_for_tasks(model)


@pytest.mark.usefixtures("alone")
def test_the_hook_lives_as_long_as_a_model_that_needs_it(digits):
    hooks = torch_module._global_module_registration_hooks
    assert not hooks
    model = make(**FEW)
    assert len(hooks) == 1
    other = copy.deepcopy(model)
    task = task_of(model)
    task.trainable_module = nn.Linear(2, 2)
    del model
    gc.collect()
    assert len(hooks) == 1
    del other
    gc.collect()
    assert not hooks
    waits = timm.create_model("tome_vit_test", merge_warmup_epochs=2, **NO_SETTINGS).state_dict()
    model = timm.create_model("tome_vit_test", **NO_SETTINGS)
    gc.collect()
    assert not hooks
    model.load_state_dict(waits)  # and takes over its warm-up
    assert len(hooks) == 1
    del model
    gc.collect()
    assert not hooks
