"""benchmarks/resized.py: the baseline of maps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ltm
from timm_ltm.reduction import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture(scope="module", autouse=True)
def module():
    """With the method, which tests of all methods must not find."""
    import resized

    resized.register()
    yield resized
    METHODS.pop("resized")


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), num_slots=st.integers(1, 40))
def test_shares_against_a_finer_line(module, n, num_slots):
    """Each token as so many pieces that each is in one slot, each slot as what it covers of them."""
    num_slots, pieces = min(n, num_slots), 40 * 21
    place = torch.arange(n * pieces * num_slots) // (n * pieces)  # the slot of each of n pieces P equal pieces
    expected = F.one_hot(place, num_slots).double().unflatten(0, (n, -1)).mean(dim=1)
    shares = module.shares(n, num_slots, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(shares, expected, atol=1e-9, rtol=0)


def test_a_map_is_averaged_by_area():
    model = timm.create_model("efficientvit_b0", num_classes=5)
    model = timm_ltm.convert(model, "resized", compression_ratio=0.25).eval()
    reducer, seen = next(reducer for _, reducer in model.reducers()), []
    reducer.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    model(torch.randn(2, 3, 256, 256))
    z, merged = (t.transpose(1, 2).unflatten(2, (side, side)) for t, side in zip(seen[0], (16, 8), strict=True))
    torch.testing.assert_close(merged, F.avg_pool2d(z, 2), rtol=1e-4, atol=1e-5)


def test_sequences_are_refused():
    model = timm_ltm.convert(timm.create_model("test_vit"), "resized", compression_ratio=0.5).eval()
    with pytest.raises(ValueError, match="expected Swin or EfficientViT"):
        model(torch.randn(1, 3, 160, 160))
