"""Settings: wrong kinds are refused, unknown ones named with the nearest right one, numpy's numbers taken."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

import timm_ltm  # noqa: F401  registers the methods
from timm_ltm.reduction import METHODS, find_method
from timm_ltm.reduction.settings import num_slots


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("ltm", {"compression_ratio": 0.0}, ["compression_ratio", "0.0", "above 0 and at most 1"]),
        ("ltm", {"compression_ratio": [0.9, 1.2]}, ["compression_ratio", "1.2"]),
        ("ltm", {"compression_ratio": True}, ["compression_ratio", "True"]),
        ("ltm", {"compression_ratio": "0.9"}, ["compression_ratio", "'0.9'"]),
        ("ltm", {"compression_ratio": [0.9, True]}, ["compression_ratio", "True"]),
        ("ltm", {"compression_ratio": ["0.9"]}, ["compression_ratio", "'0.9'"]),
        ("ltm", {"compression_ratio": float("nan")}, ["compression_ratio", "nan"]),
        ("ltm", {"compression_ratio": {0.9}}, ["compression_ratio", "{0.9}"]),
        ("ltm", {"compression_ratio": torch.tensor(0.9)}, ["compression_ratio", "tensor"]),
        ("ltm", {"merge_warmup_epochs": -1}, ["merge_warmup_epochs", "-1", "0 or more"]),
        ("ltm", {"merge_warmup_epochs": 1.0}, ["merge_warmup_epochs", "1.0", "whole"]),
        ("ltm", {"merge_warmup_epochs": True}, ["merge_warmup_epochs", "True"]),
        ("ltm", {"num_clusters": 1}, ["num_clusters", "1", "2 or more"]),
        ("ltm", {"cluster_dim": 0}, ["cluster_dim", "0", "1 or more"]),
        ("ltm", {"beta": "300"}, ["beta", "'300'"]),
        ("ltm", {"beta": float("inf")}, ["beta", "inf"]),
        ("ltm", {"beta": 1e39}, ["beta", "1e+39"]),
        ("ltm", {"update": "False"}, ["update", "'False'", "update=False"]),
        ("ltm", {"update": 0}, ["update", "0", "True or False"]),
        ("ltm", {"proportional_attention": "no"}, ["proportional_attention", "'no'"]),
        ("ltm", {"ib_loss_weight": -0.1}, ["ib_loss_weight", "-0.1"]),
        ("ltm", {"ib_loss_weight": 0.1, "update": False}, ["ib_loss_weight", "update=False"]),
        ("ltm", {"ib_loss_start_epoch": 0.5}, ["ib_loss_start_epoch", "0.5"]),
        ("ltm", {"preset": "papper"}, ["preset", "'papper'", "'paper'"]),
        ("ltm", {"preset": ["paper"]}, ["preset", "['paper']"]),
        ("ltm", {"compresion_ratio": 0.9}, ["compresion_ratio", "Did you mean 'compression_ratio'?"]),
        ("ltm", {"preset": "paper", "beta": 300.0}, ["beta", "ltm with preset='paper'", "expected one of"]),
        ("ltm", {"preset": "paper", "update": True}, ["update", "preset='paper'"]),
        ("tome", {"preset": "paper"}, ["preset", "tome has none"]),
        ("tome", {"beta": 300.0}, ["beta", "tome has no such setting"]),
        ("tome", {"r": -1}, ["r", "-1", "0 or more"]),
        ("tome", {"r": [8, "8"]}, ["r", "'8'"]),
        ("tome", {"r": 8, "compression_ratio": 0.9}, ["r", "compression_ratio"]),
        ("tomee", {}, ["method", "'tomee'", "Did you mean 'tome'?"]),
    ],
    ids=str,
)
def test_wrong_settings(method, settings, words):
    with pytest.raises(ValueError, match="expected") as error:
        find_method(method, settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_numbers_of_numpy_are_taken():
    given = dict(
        compression_ratio=np.array([0.5, 1.0], dtype=np.float32),
        merge_warmup_epochs=np.int64(2),
        num_clusters=np.int32(8),
        beta=np.float32(100.0),
        ib_loss_weight=np.float64(0.5),
    )
    _, config = find_method("ltm", given)
    assert config.compression_ratio == (0.5, 1.0)
    assert (config.merge_warmup_epochs, config.num_clusters, config.beta) == (2, 8, 100.0)
    assert all(type(value) in (int, float, tuple) for value in (getattr(config, name) for name in given))
    assert find_method("tome", {"r": np.array([4, 0])})[1].amounts([2], ()) == (-4, 1.0)


def test_presets():
    default, paper = find_method("ltm", {}), find_method("ltm", {"preset": "paper"})
    assert find_method("ltm", {"preset": "default"})[0] is default[0]
    assert paper[0] is not default[0]
    assert paper[0].method == default[0].method == "ltm"


def test_the_default_preset_of_a_method_that_has_no_other(monkeypatch):
    """As a checkpoint of it says; of one whose settings have no preset at all it is an error."""
    cls, config = find_method("ltm", {})

    class Other(cls):
        presets: ClassVar = {}

    monkeypatch.setitem(METHODS, "other", Other)
    assert find_method("other", {"preset": "default"}) == (Other, config)
    with pytest.raises(ValueError, match="preset: got 'paper', expected no preset: other has none"):
        find_method("other", {"preset": "paper"})
    with pytest.raises(ValueError, match="preset: got 'default', expected no preset: tome has none"):
        find_method("tome", {"preset": "default"})


@pytest.mark.parametrize(
    ("given", "depths", "expected"),
    [
        (None, [2, 2], (0.9, 0.8, 0.7, 0.6)),
        (0.5, [2, 2], (0.5,) * 4),
        ([0.5, 0.6], [1, 3], (0.5, 0.6, 0.6, 0.6)),
        ([0.5, 0.6, 0.7, 1.0], [2, 2], (0.5, 0.6, 0.7, 1.0)),
        ([0.5], [2, 2], (0.5,) * 4),
    ],
)
def test_ratios_of_blocks(given, depths, expected):
    config = find_method("ltm", {"compression_ratio": given})[1]
    assert config.amounts(depths, (0.9, 0.8, 0.7, 0.6)) == expected
    again = find_method("ltm", config.setting_of(expected))[1]
    assert again.amounts(depths, ()) == expected


@pytest.mark.parametrize("given", [[0.5, 0.6, 0.7], []])
def test_a_wrong_number_of_ratios(given):
    config = find_method("ltm", {"compression_ratio": given})[1]
    with pytest.raises(ValueError, match=rf"got '{len(given)} numbers', expected one number, 2, one per stage, or 4"):
        config.amounts([2, 2], ())


@pytest.mark.parametrize(
    ("N", "ratio", "P"), [(196, 0.95, 187), (20, 0.95, 19), (10, 0.7, 7), (7, 1.0, 7), (3, 0.01, 1), (19, 0.95, 19)]
)
def test_num_slots(N, ratio, P):
    assert num_slots(N, ratio) == P
