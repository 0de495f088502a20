"""What every LTM model has to do. A family's tests subclass :class:`ModelContract`, as in ``test_ltm_vit.py``."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import timm
import timm.optim
import torch
from timm.layers import Format, set_reentrant_ckpt
from torch.testing import assert_close

from timm_ltm.merging import TokenMerger
from timm_ltm.models._common import split_ltm_kwargs

from .exports import MODES, ExportContract

EXACT = {"rtol": 0, "atol": 0}


def fill(model):
    """Clusters as after a refresh: before it they are zero, and with them the update."""
    g = torch.Generator().manual_seed(1)
    for merger in model.modules():
        if isinstance(merger, TokenMerger) and merger.updates:
            clusters = merger.clusters
            for buffer in (clusters.centroids, clusters.scores, clusters.log_q, merger.running_update):
                if buffer is not None:
                    buffer.copy_(torch.randn(buffer.shape, generator=g))
            clusters.temperature.fill_(clusters.centroids.shape[1] / 4)  # phi neither one-hot nor uniform
    return model


def ltm_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".merger." in name}


class ModelContract(ExportContract):
    """The tests of one family.

    Attributes:
        name: An LTM model's.
        plain: Its plain counterpart's, in timm.
        size: (H, W) of the images.
        kwargs: Of both models, for speed.
        ltm: Of the LTM model: it has to merge at ``size``.
        shallow: Added for exporters, whose time grows with depth.
        dropout: Everything random that the family has.
        sweep: Values of the arguments of these names, in all tests that have one.
        keeps_maps: Whether features lie on the plain model's grid.
        resizes: Whether there is a ``set_input_size``.
        extra: Of both models, for an input size other than their own.
        any_size: Scripted models take images of other sizes too.
        tolerance: Absolute, between ways to compute the same output.
    """

    name = ""
    plain = ""
    size = (64, 64)
    kwargs: ClassVar = {"num_classes": 10}
    ltm: ClassVar = {"compression_ratio": 0.75}
    shallow: ClassVar = {}
    dropout: ClassVar = {"drop_rate": 0.1, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    sweep: ClassVar = {
        "mode": [mode for mode in MODES if mode not in ("own", "straight", "even")],  # of maps
        "pool": ["", "avg"],
        "output_fmt": ["NCHW", "NLC"],
        "other_size": [(96, 64), (32, 48)],
        "carry": [{}, MODES["carry"]],
        "trained": ["plain", "default", "true_labels", "paper"],
    }

    keeps_maps = True
    resizes = True
    extra: ClassVar = {}
    tolerance = 1e-5
    any_size = False

    def build(self, **kwargs):
        """A model in eval mode whose update is not zero."""
        torch.manual_seed(0)
        return fill(timm.create_model(self.name, **{**self.kwargs, **self.ltm, **kwargs})).eval()

    def build_plain(self, **kwargs):
        torch.manual_seed(0)
        return timm.create_model(self.plain, **{**self.kwargs, **kwargs}).eval()

    def pair(self, **kwargs):
        """An LTM model and the plain one with its weights."""
        model, plain = self.build(**kwargs), self.build_plain(**split_ltm_kwargs(kwargs)[1])
        with torch.no_grad():  # initial weights hide much: zero biases, equal class tokens
            for parameter in plain.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.load_state_dict(plain.state_dict(), strict=True)
        return model, plain

    def images(self, batch=3, channels=3, size=None):
        g = torch.Generator().manual_seed(2)
        return torch.randn(batch, channels, *(size or self.size), generator=g)

    @pytest.fixture
    def model(self):
        return self.build()

    @pytest.fixture
    def x(self):
        return self.images()

    # The plain model

    def test_initial_weights_are_those_of_the_plain_model(self, model):
        ours, plain = model.state_dict(), self.build_plain().state_dict()
        assert ours.keys() - plain.keys() == {name for name in ours if ".merger." in name}
        for name, value in plain.items():
            assert torch.equal(ours[name], value), name
        missing, unexpected = model.load_state_dict(plain, strict=False)
        assert all(".merger." in name for name in missing)
        assert not unexpected

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("off", ["set_merging", "ratio"])
    def test_without_merging_it_is_the_plain_model(self, off, training, x):
        model, plain = self.pair(**self.dropout, **({"compression_ratio": 1.0} if off == "ratio" else {}))
        if off == "set_merging":
            model.set_merging(False)
        outputs = []
        for m in (model, plain):
            m.train(training)
            torch.manual_seed(3)
            outputs.append(m(x))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        ours = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            assert torch.equal(ours[name].grad, parameter.grad), name

    def test_merging_and_the_update_change_the_output(self, x):
        model, plain = self.pair()
        merged = model(x)
        assert not torch.allclose(merged, plain(x), atol=1e-4)
        for _, merger in model.mergers():
            merger.clusters.centroids.zero_()
        assert not torch.allclose(merged, model(x), atol=1e-6)
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))
        model.set_merging(None)
        assert model.merging

    def test_warmup(self, x):
        model, plain = self.pair(merge_warmup_epochs=2)
        assert not model.merging
        for epoch in range(4):
            for _, merger in model.mergers():
                merger.epoch.fill_(epoch)
            model.eval()
            assert model.epoch == epoch
            assert torch.equal(model(x), plain(x)) == (epoch < 2)
        fresh = self.build(merge_warmup_epochs=2)
        fresh.load_state_dict(model.state_dict())
        assert fresh.merging, "the epoch travels in the state dict"

    def test_warmup_collects_in_every_mode(self, mode, x):
        """Blocks behind the first see all tokens then, and nothing that training moves is moved."""
        model = self.build(merge_warmup_epochs=1, **MODES[mode]).train()
        model.set_collecting(True)
        before = {name: value.clone() for name, value in model.named_buffers() if ".merger." in name}
        model(x)
        for _, merger in model.mergers():
            assert not merger.updates or merger.features.isfinite().all()
        for name, value in before.items():
            assert torch.equal(value, model.get_buffer(name)), name

    # Inputs and heads

    def test_forward_is_features_and_head(self, model, x):
        features = model.forward_features(x)
        assert_close(model.forward_head(features), model(x))
        assert model(x).shape == (3, 10)
        assert model.forward_head(features, pre_logits=True).shape == (3, model.head_hidden_size)

    def test_no_classifier(self, x):
        model = self.build(num_classes=0)
        assert model(x).shape == self.build_plain(num_classes=0)(x).shape
        assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))

    def test_reset_classifier(self, pool, model, x):
        plain = self.build_plain()
        for m in (model, plain):
            m.reset_classifier(7, pool)
        assert model.num_classes == model(x).shape[-1] == 7
        assert model(x).ndim == plain(x).ndim
        model.set_merging(False)
        assert model(x).shape == plain(x).shape

    def test_channels(self):
        assert self.build(in_chans=1)(self.images(channels=1)).shape == (3, 10)

    @pytest.mark.parametrize("set_size", [False, True])
    def test_other_size(self, other_size, set_size):
        model, plain = self.pair(**({} if set_size else self.extra))
        x = self.images(size=other_size)
        if set_size:
            if not self.resizes:
                assert not hasattr(plain, "set_input_size")
                return
            model.set_input_size(img_size=other_size)
            plain.set_input_size(img_size=other_size)
        assert model(x).isfinite().all()
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    # Features

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("indices", [None, 2, [0, 1]])
    def test_forward_intermediates(self, indices, norm, output_fmt):
        model, plain = self.pair()
        kwargs = {"indices": indices, "norm": norm, "output_fmt": output_fmt}
        x = self.images()
        final, maps = model.forward_intermediates(x, **kwargs)
        assert_close(final, model.forward_features(x))
        expected = plain.forward_intermediates(x, **kwargs, intermediates_only=True)
        if self.keeps_maps:
            assert [m.shape for m in maps] == [m.shape for m in expected], "maps are those of the input's grid"
        else:
            assert [m.shape[1] for m in maps] == [m.shape[1] for m in expected]
        for arguments in ({"intermediates_only": True}, {"intermediates_only": True, "stop_early": True}):
            assert_close(model.forward_intermediates(x, **kwargs, **arguments), maps)
        if self.keeps_maps:
            result = model.forward_intermediates(x, **kwargs, output_dict=True)
            assert_close(result, {"image_intermediates": maps, "image_features": final})
        model.set_merging(False)
        assert_close(model.forward_intermediates(x, **kwargs, intermediates_only=True), expected, **EXACT)

    def test_features_only(self, x):
        model, plain = self.build(features_only=True), self.build_plain(features_only=True)
        channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
        assert channels == plain.feature_info.channels()
        assert model.output_fmt == plain.output_fmt
        if self.keeps_maps:
            assert reduction == plain.feature_info.reduction()
        else:
            assert all(ours >= theirs for ours, theirs in zip(reduction, plain.feature_info.reduction(), strict=True))
            assert reduction[-1] > plain.feature_info.reduction()[-1]
        maps = [m.permute(0, 3, 1, 2) if model.output_fmt == Format.NHWC else m for m in model(x)]
        shapes = [(3, c, *(round(n / r) for n in self.size)) for c, r in zip(channels, reduction, strict=True)]
        assert [m.shape for m in maps] == shapes
        indices = list(model.out_indices)
        assert_close(maps, self.build().forward_intermediates(x, indices=indices, intermediates_only=True))

    def test_prune_intermediate_layers(self, model, x):
        kept = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        parameters = len(list(model.parameters()))
        assert sorted(model.prune_intermediate_layers([0, 1])) == [0, 1]
        masks = model.forward_masks(x)
        assert len(masks.blocks) == len(masks.masks)
        assert len(list(model.parameters())) < parameters
        assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), kept)

    # Training

    def test_every_parameter_of_a_mode_learns(self, mode, x):
        # not so sharp that the similarities saturate
        model, labels = self.build(**{"beta": 20.0, **MODES[mode]}).train(), torch.tensor([0, 1, 2])
        for _, merger in model.mergers():
            merger.labels = labels if model.merge_config.labels == "true" else None
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        features = model.forward_features(x)  # every token: a class token sees nothing of the last merge
        (features * torch.randn_like(features)).sum().backward()
        for name, parameter in ltm_parameters(model).items():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} has no gradient"

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_grad_checkpointing(self, carry, reentrant, x):
        model, gradients = self.build(**self.dropout, **carry).train(), []
        set_reentrant_ckpt(reentrant)
        try:
            for enable in (False, True):
                model.set_grad_checkpointing(enable)
                model.zero_grad()
                torch.manual_seed(3)
                model(x).square().sum().backward()
                gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        finally:
            set_reentrant_ckpt(False)
        assert_close(*gradients)

    def test_optimizer_groups(self, model):
        if hasattr(model, "no_weight_decay"):
            assert model.no_weight_decay() == self.build_plain().no_weight_decay()
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.75)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
        assert len({group["lr_scale"] for group in groups.values()}) > 2
        for name, parameter in ltm_parameters(model).items():
            block = name.split("merger.")[0]
            assert len({group["lr_scale"] for other, group in groups.items() if other.startswith(block)}) == 1, name
            assert groups[name]["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype, x):
        # of maps of noise, many choices of lines are nearly even: here without them
        model = self.build(**({} if self.keeps_maps else {"map_lines": "even", "beta": 20.0}))
        reference = model(x)
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        assert output.isfinite().all()
        assert self.build().to(dtype)(x.to(dtype)).isfinite().all()
        difference = (output.float() - reference).abs()
        if self.keeps_maps:
            assert difference.max() < 0.25 * reference.abs().max()
        else:
            assert difference.median() < 0.1 * reference.abs().median()

    def test_autocast(self, model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.train()(x)
        output.float().square().sum().backward()
        assert output.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    # Construction and checkpoints

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtype_argument(self, dtype, x):
        model = self.build(dtype=dtype)
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
        output = model(x.to(dtype))
        assert output.dtype == dtype
        assert output.isfinite().all()

    def test_meta_device(self):
        model = timm.create_model(self.name, **self.kwargs, **self.ltm, device="meta")
        assert all(t.is_meta for t in model.state_dict().values())
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(77)
        if hasattr(model, "init_weights"):
            model.init_weights()
        for name, merger in model.mergers():
            if not hasattr(model, "init_weights"):
                merger.reset_parameters()
            assert_close(merger.log_beta.exp().item(), merger.config.beta, msg=f"{name}.log_beta", rtol=1e-4, atol=0)
            assert merger.eta == merger.config.eta, f"{name}.eta"
            assert merger.epoch == 0, f"{name}.epoch"
            assert not merger.clusters.centroids.any()

    def test_ratio_per_block(self, model, x):
        count = len(model.block_ratios)
        model = self.build(compression_ratio=[1.0, 0.75] + [1.0] * (count - 2))
        assert len(list(model.mergers())) == len(model.forward_masks(x).masks) == 1
        assert model(x).shape == (3, 10)
        with pytest.raises(ValueError, match=f"got '99 ratios', expected one number.* or {count}, one per block"):
            self.build(compression_ratio=[0.9] * 99)

    def test_checkpoint_of_other_clusters(self, model):
        with pytest.raises(ValueError, match=r"centroids: .* \(64, \d+\), this model's have \(8, \d+\)"):
            self.build(num_clusters=8).load_state_dict(model.state_dict())

    def test_state_dict_round_trip(self, mode, x, tmp_path):
        model, other = self.build(**MODES[mode]), self.build(**MODES[mode])
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(1.1) if tensor.is_floating_point() else tensor.fill_(5)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
        assert torch.equal(other(x), model(x))
        assert other.epoch == 5

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, copied, model, x):
        other = copied(model)
        assert torch.equal(other(x), model(x))
        other.set_merging(False)
        next(iter(ltm_parameters(other).values())).data.zero_()
        assert model.merging
        assert next(iter(ltm_parameters(model).values())).any()

    def test_hub_round_trip(self, mode, x, tmp_path):
        model = self.build(**MODES[mode])
        for classes, safe in ((10, True), (7, False), (0, True)):
            model.reset_classifier(classes)
            timm.models.save_for_hf(model, tmp_path / str(classes), safe_serialization=safe)
            loaded = timm.create_model(f"local-dir:{tmp_path / str(classes)}", pretrained=True).eval()
            assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("classes", [10, 4, 0])
    def test_pretrained(self, trained, classes, x, tmp_path):
        mode = MODES.get(trained, {})
        source = self.build_plain() if trained == "plain" else self.build(**mode)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.01)
        torch.save(source.state_dict(), tmp_path / "model.pth")
        overlay = {"file": str(tmp_path / "model.pth"), "num_classes": 10}
        kwargs = {**self.kwargs, **self.ltm, **mode, "num_classes": classes}
        model = timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
        model.set_merging(trained != "plain")
        if trained != "paper" or classes == 10:  # its clusters are of the classes
            assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert model(x).shape == self.build_plain(num_classes=classes)(x).shape
        assert classes != 10 or torch.equal(model(x), source(x))

    def test_checkpoint_path_of_the_plain_model(self, x, tmp_path):
        plain = self.build_plain()
        torch.save(plain.state_dict(), tmp_path / "model.pth")
        model = self.build(checkpoint_path=str(tmp_path / "model.pth"))
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_channels_last(self, model, x):
        expected = model(x)
        output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert_close(output, expected, rtol=1e-4, atol=self.tolerance)

    def test_registered(self, model):
        assert self.name in timm.list_models("ltm_*")
        resolve = timm.data.resolve_model_data_config
        assert resolve(model) == resolve(self.build_plain())

    # Masks

    def test_masks(self, mode, x):
        model = self.build(**MODES[mode])
        masks = model.forward_masks(x)
        assert len(masks.masks) == len(masks.accumulated) == len(masks.blocks) == len(list(model.mergers()))
        for mask, accumulated, (H, W) in zip(masks.masks, masks.accumulated, masks.grids, strict=True):
            assert accumulated.shape == (3, H * W, mask.shape[2])
            for m in (mask, accumulated):
                assert (m >= 0).all()
                assert_close(m.sum(dim=1), torch.ones(3, m.shape[2]))
        assert not torch.allclose(masks.masks[0][0], masks.masks[0][1]), "masks depend on the image"

    def test_an_image_does_not_see_its_batch(self, mode):
        model, x = self.build(**MODES[mode]), self.images(5)
        together, order = model(x), torch.tensor([3, 0, 4, 1, 2])
        assert_close(model(x[order]), together[order], rtol=0, atol=self.tolerance)
        assert_close(torch.cat([model(image[None]) for image in x]), together, rtol=0, atol=self.tolerance)
