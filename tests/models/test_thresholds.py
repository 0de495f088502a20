"""What every merging model has to do, by a method whose number of tokens depends on the image."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from timm_ltm import ClusterRefresh
from timm_ltm.methods.ltmp import LTMP

from .contract import ModelContract, reducer_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*trains without a refresh")


class TestLTMP(ModelContract):
    """ViT by LTMP: dropped in eval, padded to the longest image, masked in training and in graphs."""

    test_a_merge_of_nothing_is_the_plain_model = None  # told by its own tests
    test_merging_and_the_update_change_the_output = None
    name = "test_vit"
    methods: ClassVar = ("ltmp",)
    kinds: ClassVar = {"plain": {}, "registers": {"reg_tokens": 4}}
    merging: ClassVar = {"gmacs": 0.6}
    nothing: ClassVar = {"gmacs": 1.0}
    any_size: ClassVar = {"dynamic_img_size": True}
    pools: ClassVar = ("", "avg", "token")
    shallow: ClassVar = {"depth": 2}

    def build(self, method="ltmp", **kwargs):
        """Thresholds with which images of noise lose some tokens, and not all as many."""
        model = super().build(method, **kwargs)
        with torch.no_grad():
            for reducer in model.modules():
                if isinstance(reducer, LTMP):
                    reducer.merge_threshold.fill_(0.35)
                    reducer.prune_thousandths.fill_(40.0 if kwargs.get("reg_tokens") else 55.0)
        return model

    def pair(self, method="ltmp", **kwargs):
        return super().pair(method, **kwargs)

    def default_ratios(self):
        return {}

    def test_images_lose_different_numbers(self, model, x):
        left = (model.forward_merged(self.images(5))[1].size > 0).sum(dim=1)
        assert len(left.unique()) > 1
        assert 1 < left.float().mean() < 15

    def test_every_parameter_learns(self, kind, method, x):
        """From the budget, in the last block too; and none is left out where nobody adds it."""
        model = self.build(method, **self.kinds[kind]).train()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()
        refresh = ClusterRefresh(model)
        model(x)
        refresh.loss(torch.arange(3)).backward()
        for name, parameter in reducer_parameters(model).items():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} has no gradient"

    def test_compile(self):
        self.check_compiled("ltmp")
        x, y, gradients = self.images(), torch.arange(3), []
        for compiled in (False, True):
            model = self.build(**self.shallow).train()
            refresh = ClusterRefresh(model)
            run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
            loss = run(x).square().sum() + refresh.loss(y)
            loss.backward()
            gradients.append({name: p.grad for name, p in reducer_parameters(model).items()})
        assert_close(*gradients, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore")
    def test_export(self):
        self.check_export("ltmp")

    def test_merged_tokens_are_put_back(self, method, x):
        """Of what is left, without what fills up; in training all tokens are there."""
        model = self.build(method)
        prefix, outputs = model.num_prefix_tokens, []
        for training in (False, True):
            model.train(training)
            merged, where = model.forward_merged(x)
            features = model.forward_features(x)
            z, kept = model.forward_blocks(x, keep=True)
            assert_close(model.norm(kept.put_back(z, prefix)), features)
            assert_close(where.size.sum(dim=1), torch.full((3,), 16.0))
            tokens = where.unmerge(merged, prefix)[:, prefix:]
            assert_close(where.mean(merged, prefix).squeeze(1), tokens.mean(dim=1))
            there = where.size > 0
            assert torch.equal(there, where.weight > 0)
            slots = merged[:, prefix:]
            for b in range(3):
                assert_close(tokens[b][where.anchor[b][there[b]]], slots[b][there[b]])
                same = (tokens[b].unsqueeze(1) - slots[b][there[b]]).abs().amax(dim=2) < 1e-6  # N P
                assert_close(same.sum(dim=0).float(), where.size[b][there[b]])
            outputs.append(features)
        assert_close(*outputs, rtol=1e-4, atol=1e-5)
