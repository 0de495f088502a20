"""What models with maps have to do beside :class:`ModelContract`."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import Format
from torch.testing import assert_close

from .contract import MODES, ModelContract

MAP_MODES = [mode for mode in MODES if mode not in ("carry", "slots")]  # an anchored mask of a map has neither


class MapContract(ModelContract):
    """The tests of a family with maps: it tells the sizes its maps should have in :meth:`map_sizes`."""

    keeps_maps = False

    def map_sizes(self, height, width):
        """(H, W) of every feature map of the model as built with ``self.ltm``, from an image of this size."""
        raise NotImplementedError

    @settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
    @given(st.integers(64, 512), st.integers(64, 512))
    def test_any_size(self, height, width):
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        if not hasattr(type(self), "_any_size"):
            type(self)._any_size = self.build(**self.extra), self.build(features_only=True, **self.extra)
        model, features = type(self)._any_size
        with torch.no_grad():
            assert model(x).isfinite().all()
            maps = features(x)
        channels = 3 if features.output_fmt == Format.NHWC else 1
        assert [m.shape[channels] for m in maps] == features.feature_info.channels()
        spatial = [(m.shape[1:3] if channels == 3 else m.shape[2:]) for m in maps]
        assert [tuple(s) for s in spatial] == self.map_sizes(height, width)
        assert all(m.isfinite().all() for m in maps)

    @pytest.mark.parametrize("odd", [False, True])
    def test_reductions_are_real(self, odd):
        H, W = (75, 110) if odd else self.size
        model = self.build(features_only=True, **({"img_size": (H, W), **self.extra} if odd else {}))
        expected = [max(H / h, W / w) for h, w in self.map_sizes(H, W)]
        assert model.feature_info.reduction() == expected

    def test_warmup_collects_from_the_plain_model(self):
        model, plain = self.pair(merge_warmup_epochs=1, **self.dropout)
        model.train().set_collecting(True)
        outputs = []
        for m in (model, plain.train()):
            torch.manual_seed(3)
            outputs.append(m(self.images()))
        assert torch.equal(*outputs)
        for name, merger in model.mergers():
            assert merger.features.isfinite().all(), name

    def test_a_block_that_has_nothing_to_merge(self):
        """A ratio that merges none at this size, instead of one that merges: the map keeps its size."""
        with pytest.warns(UserWarning, match="merges nothing"):
            model = self.build(compression_ratio=0.99, **self.extra)
        x = self.images(size=(75, 110))
        merged = model(x)
        model.set_merging(False)
        assert_close(merged, model(x), rtol=1e-4, atol=self.tolerance)

    def test_another_aspect_ratio_of_as_many_tokens(self):
        H, W = self.size[0] // 2, self.size[1] * 2
        model = self.build(mask_mode="batch", **self.extra, img_size=(H, W))
        assert model(self.images(size=(H, W))).isfinite().all()
        with pytest.raises(ValueError, match=r"got \d+ x \d+ tokens, expected \d+ x \d+"):
            model(self.images(size=(W, H)))

    def test_features_in_warmup_leave_no_parameter_out(self, tmp_path):
        """As DistributedDataParallel wants it."""
        model = self.build(features_only=True, merge_warmup_epochs=1).train()
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            sum(m.sum() for m in model(self.images())).backward()
        finally:
            torch.distributed.destroy_process_group()
        assert all(p.grad is not None for name, p in model.named_parameters() if ".merger." in name)

    @pytest.mark.parametrize("setting", [{"carry_mask": True}, {"cluster_grid": 0}])
    def test_settings_that_maps_have_no_form_of(self, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: got .* for a map"):
            self.build(**setting)

    def test_ratio_per_stage(self):
        stages = len(self.ltm_stages)
        model = self.build(compression_ratio=[0.5] + [1.0] * (stages - 1))
        assert model.block_ratios == (0.5,) * self.ltm_stages[0] + (1.0,) * sum(self.ltm_stages[1:])
        with pytest.raises(ValueError, match=rf"expected one number, {stages}, one per stage, or"):
            timm.create_model(self.name, **{**self.kwargs, "compression_ratio": [0.9] * 99})
