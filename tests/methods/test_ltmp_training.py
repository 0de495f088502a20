"""LTMP: gradients of its thresholds, the budget in the training loss, calibration, settings and files."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_ltmp import TINY, build, images, merging, plain, random_case
from timm.layers import set_reentrant_ckpt
from timm.task import ClassificationTask
from torch.testing import assert_close

import timm_ltm
from timm_ltm.cost import gmacs
from timm_ltm.methods import ltmp
from timm_ltm.methods.ltmp import TAU, calibrate, flops_ratio
from timm_ltm.reduction import Tokens


def loss_of(model, refresh, x, y):
    loss = F.cross_entropy(model(x), y) + refresh.loss(y)
    refresh.step(y)
    return loss


def test_gradients_are_those_of_the_soft_form(monkeypatch):
    """Finite differences: masks moved by eps times the slope of the sigmoid at each threshold, the rest as it was."""
    model, x, y = merging(gmacs=0.5).double().train(), images().double(), torch.arange(4)
    refresh = timm_ltm.ClusterRefresh(model)
    loss = loss_of(model, refresh, x, y)
    loss.backward()
    parameters = [p for _, reducer in model.reducers() for p in (reducer.merge_threshold, reducer.prune_thousandths)]
    assert len({id(p) for p in parameters}) == 6
    gradients = [p.grad.clone() for p in parameters]
    steps = []  # of every mask of a forward pass, in the order they are made: merging and pruning in turn

    def moved(reducer, margin):
        step, soft = steps.pop(0), 1 / (1 + (-margin / TAU).exp())
        return (margin >= 0).to(margin.dtype) + step * soft * (1 - soft) / TAU

    def unmasked(tokens, prefix):
        return None if tokens.weight is None else F.pad((tokens.weight > 0.5).double(), (prefix, 0), value=1.0)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(ltmp.LTMP, "_keeps", moved)
        patch.setattr(Tokens, "unmasked", unmasked)
        for which, gradient in enumerate(gradients):
            values = []
            for step in (1e-6, 0.0):
                steps[:] = [step if i == which else 0.0 for i in range(6)]
                values.append(loss_of(model, refresh, x, y))
            # a mask rises with the threshold of merging, and falls with that of pruning, which is in thousandths
            expected = (values[0] - values[1]) / 1e-6 * (1.0 if which % 2 == 0 else -1e-3)
            assert_close(gradient, expected, rtol=1e-3, atol=0.0)
    assert all(gradient != 0 for gradient in gradients)


def test_thresholds_learn_from_labels_too():
    """Not of the last block, whose masks no attention follows; there the budget's is the only gradient."""
    model, x = merging(budget_weight=0.0).train(), images()
    F.cross_entropy(model(x), torch.arange(4)).backward()
    slopes = [[float(p.grad) for p in reducer.parameters()] for _, reducer in model.reducers()]
    assert all(slope != 0 for block in slopes[:-1] for slope in block)
    assert slopes[-1] == [0.0, 0.0]


def test_no_denormal_numbers_of_masked_tokens():
    """Their attention times gradients as small as trained models have: CPUs took 70 times as long for the backward."""
    z, tokens, seen, _ = random_case(2, 8)
    tokens = build(8, 0.5, 0.1).train()(z.float(), tokens, seen)[1]
    assert not tokens.weight.all()
    attention = tokens.log_sizes().float().softmax(dim=3)
    assert (attention * 1e-15).min() > torch.finfo(torch.float32).tiny


def test_a_task_adds_the_budget_by_itself():
    x, y = images(), torch.arange(4)
    explicit, attached = merging(gmacs=0.3).train(), merging(gmacs=0.3).train()
    expected = loss_of(explicit, timm_ltm.ClusterRefresh(explicit), x, y)
    task = ClassificationTask(attached, torch.nn.CrossEntropyLoss(), verbose=False)
    loss = task(x, y)["loss"]
    assert_close(loss, expected)
    term = 10.0 * (flops_ratio(attached).mean() - 0.3).square()
    assert_close(loss - F.cross_entropy(attached(x), y), term)
    assert term > 0.01
    attached.eval()
    assert attached.epoch == 1


@pytest.mark.filterwarnings("ignore:.*trains without a refresh")
def test_a_model_says_that_nothing_keeps_its_budget():
    model, x = merging().train(), images()
    model(x)
    with pytest.warns(UserWarning, match=r"nothing keeps it to its budget.*refresh.loss\(targets\)"):
        model(x)


def test_checkpointing_counts_once():
    x, y, gradients = images(), torch.arange(4), []
    for enable in (False, True):
        model = merging(gmacs=0.3).train()
        model.set_grad_checkpointing(enable)
        loss_of(model, timm_ltm.ClusterRefresh(model), x, y).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(reducer.observer.features is None for _, reducer in model.reducers())
    assert_close(*gradients)
    set_reentrant_ckpt(True)
    try:
        refresh = timm_ltm.ClusterRefresh(model)
        model(x)
        with pytest.raises(ValueError, match="training loss: got features without gradient"):
            refresh.loss(y)
    finally:
        set_reentrant_ckpt(False)


def test_training_meets_its_budget(digits):
    """Thresholds alone, at one learning rate: from elsewhere to within 2 % of the target, on images it was not told."""
    x, y = digits
    torch.manual_seed(0)
    shape = dict(img_size=8, patch_size=1, in_chans=1, num_classes=10)
    reference = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=4, num_heads=3, **shape).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = timm_ltm.convert(reference, "ltmp", gmacs=0.65, freeze=True)
    thresholds = [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in thresholds] == [()] * 8
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, refresh = torch.optim.Adam(thresholds, lr=2e-2), timm_ltm.ClusterRefresh(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 48)
    with torch.no_grad():
        model.eval()(x[192:])
    assert abs(flops_ratio(model).mean() - 0.65) > 0.1
    model.train()
    for step in range(48):
        batch = slice(32 * (step % 6), 32 * (step % 6) + 32)
        loss_of(model, refresh, x[batch], y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    refresh.epoch_end()
    with torch.no_grad():
        model.eval()(x[192:])
    assert float(flops_ratio(model).mean()) == pytest.approx(0.65, rel=0.02)
    for name, value in model.state_dict().items():
        learned = "threshold" in name or "thousandths" in name or name == "reduction.epoch"
        assert torch.equal(value, before[name]) != learned, name


# Budgets, settings, files


def test_the_count_takes_images():
    """Of each image alone, and it follows r_FLOPs but for what that leaves out."""
    model, reference, x = merging("plain"), plain("plain"), images()
    with torch.no_grad():
        alone = [gmacs(model, inputs=image) for image in x.split(1)]
        assert gmacs(model, inputs=x) == pytest.approx(sum(alone) / 4)
        assert min(alone) < gmacs(reference)
        assert min(alone) < max(alone)
        assert gmacs(reference, inputs=x) == pytest.approx(gmacs(reference))
        model(x)
    cheapest = int(flops_ratio(model).argmin())
    assert alone[cheapest] == min(alone)


def test_calibration_meets_a_budget():
    model, x = merging(merge=0.9, prune=0.0, gmacs=0.7).train(), images()
    found = calibrate(model, x)
    assert all(module.training for module in model.modules())
    assert 0.6 < found <= 0.7
    with torch.no_grad():
        model.eval()(x)
    assert float(flops_ratio(model).mean()) == pytest.approx(found)
    assert len({reducer.merge_threshold.item() for _, reducer in model.reducers()}) == 1
    assert calibrate(model, x, gmacs=0.5) < 0.5
    before = model.state_dict()["blocks.0.reducer.merge_threshold"].clone()
    with pytest.raises(ValueError, match=r"gmacs: got 0\.01, expected at least 0\.\d+"):
        calibrate(model, x, gmacs=0.01)
    assert model.blocks[0].reducer.merge_threshold == before
    for call in (calibrate, lambda model, x: flops_ratio(model)):
        with pytest.raises(ValueError, match="thresholds"):
            call(plain("plain"), x)
    with pytest.raises(ValueError, match="no forward pass that merged"):
        flops_ratio(merging())


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"compression_ratio": 0.9}, "compression_ratio: got 0.9, expected none: thresholds.*Use gmacs"),
        ({"gmacs": 0.0}, "gmacs: got 0.0"),
        ({"budget_weight": -1.0}, "budget_weight: got -1.0"),
        ({"freeze": "True"}, "freeze: got 'True'"),
        ({"r": 8}, "r: ltmp has no such setting"),
    ],
)
def test_bad_settings(settings, got):
    with pytest.raises(ValueError, match=got):
        timm_ltm.convert(plain("plain"), "ltmp", **settings)


def test_it_fits_no_map():
    with pytest.raises(ValueError, match="got ltmp"):
        timm_ltm.convert(timm.create_model("mobilevit_xxs"), "ltmp")
    assert not timm.list_models("ltmp_swin*")


def test_files(tmp_path):
    """Thresholds and the target travel in the state dict, and in timm's Hub layout."""
    model, x = merging(gmacs=0.55, budget_weight=3.0, freeze=True), images()
    other = timm_ltm.convert(plain("plain"), "ltmp")
    other.load_state_dict(model.state_dict())
    assert (other.config.gmacs, other.config.budget_weight) == (0.55, 3.0)
    assert torch.equal(other(x), model(x))
    assert all(p.requires_grad for p in other.parameters()), "freezing is no property of the weights"
    with pytest.warns(UserWarning, match="gmacs 0.7 here, 0.55 there"):
        timm_ltm.convert(plain("plain"), "ltmp", gmacs=0.7).load_state_dict(model.state_dict())
    saved = timm.create_model("ltmp_vit_tiny_patch16_224", gmacs=0.55, **TINY).eval()
    saved.load_state_dict(model.state_dict())
    timm.models.save_for_hf(saved, str(tmp_path), safe_serialization=True, model_args=TINY)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.config.gmacs == 0.55
    assert torch.equal(again(x), saved(x))
    assert math.isclose(again.blocks[0].reducer.merge_threshold.item(), 0.9, rel_tol=1e-6)
