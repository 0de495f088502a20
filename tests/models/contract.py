"""What every merging model has to do. A family's tests subclass :class:`ModelContract`, as in ``test_vit.py``."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import timm.optim
import torch
from small import fill
from timm.layers import set_reentrant_ckpt
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from timm_ltm import METHODS
from timm_ltm.reduction import HardMask
from timm_ltm.reduction.reducer import setting_names

from .exports import ExportContract


def shapes(output):
    """The shapes of the tensors of lists, tuples and dictionaries."""
    return tree_map(lambda t: tuple(t.shape), output)


def is_ours(name):
    return ".reducer." in name or name.startswith("reduction.")


def reducer_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".reducer." in name}


@pytest.mark.filterwarnings("ignore:.*trains without a refresh")
class ModelContract(ExportContract):
    """The tests of one family.

    Attributes:
        name: timm's, of a small model.
        size: (H, W) of the images.
        resized: Arguments of models for images of another size, ``img_size`` among them.
        kwargs: Of merging and of plain models, for speed.
        kinds: Further arguments, by name, of every kind of block that the family has.
        methods: That fit.
        others: Further ones, tested of two kinds by default.
        merging: Settings of all methods: models have to merge at ``size``.
        nothing: Settings with which no block merges.
        learning: Settings of LTM where destinations are not so sharp that their gradients vanish.
        pools: Kinds of global pooling.
        formats: Of intermediates.
        shallow: Added for exporters, whose time grows with depth.
        dropout: Everything random that the family has.
        tolerance: Absolute, between ways to compute the same output.
        gains: Of models of maps, ends of names of the layers through which blocks add to their tokens.
    """

    name = ""
    size = (64, 64)
    resized: ClassVar = {"img_size": (96, 32)}
    kwargs: ClassVar = {"img_size": 64, "num_classes": 10}
    kinds: ClassVar = {"plain": {}}
    methods: ClassVar = ("ltm", "tome")
    others: ClassVar = ()
    merging: ClassVar = {"compression_ratio": 0.75}
    nothing: ClassVar = {"compression_ratio": 1.0}
    learning: ClassVar = {"beta": 20.0}
    pools: ClassVar = ("", "avg")
    formats: ClassVar = ("NCHW", "NLC")
    shallow: ClassVar = {}
    dropout: ClassVar = {"drop_rate": 0.1, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    tolerance = 1e-5
    gains: ClassVar = ("attn.proj", "mlp.fc2")

    def build(self, method="ltm", **kwargs):
        """A model in eval mode whose update is not zero."""
        torch.manual_seed(0)
        name = f"{method}_{kwargs.pop('name', self.name)}"
        return fill(timm.create_model(name, **{**self.kwargs, **self.merging, **kwargs})).eval()

    def build_plain(self, **kwargs):
        torch.manual_seed(0)
        return timm.create_model(kwargs.pop("name", self.name), **{**self.kwargs, **kwargs}).eval()

    def pair(self, method="ltm", **kwargs):
        """A merging model and the plain one with its weights, which are not initial ones: zeros hide much."""
        settings = setting_names(METHODS[method])
        model = self.build(method, **kwargs)
        plain = self.build_plain(**{name: v for name, v in kwargs.items() if name not in settings})
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.load_state_dict(plain.state_dict(), strict=True)
        return model, plain

    def images(self, batch=3, channels=3, size=None):
        g = torch.Generator().manual_seed(2)
        return torch.randn(batch, channels, *(size or self.size), generator=g)

    def resized_images(self):
        size = self.resized["img_size"]
        return self.images(2, size=size if isinstance(size, tuple) else (size, size))

    @pytest.fixture
    def model(self):
        return self.build()

    @pytest.fixture
    def x(self):
        return self.images()

    # The plain model, of every kind

    @pytest.mark.parametrize("off", ["set_merging", "ratio"])
    def test_without_merging_it_is_the_plain_model(self, kind, method, off, x):
        """Bit for bit, with dropout and gradients in training."""
        model, plain = self.pair(
            method, **{**self.dropout, **self.kinds[kind], **(self.nothing if off == "ratio" else {})}
        )
        model.set_merging(False if off == "set_merging" else None)
        for training in (False, True):
            outputs = []
            for m in (model, plain):
                m.train(training)
                torch.manual_seed(3)
                outputs.append(m(x))
            assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
        ours = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            assert torch.equal(ours[name].grad, parameter.grad), name

    def test_a_merge_of_nothing_is_the_plain_model(self, kind, x):
        """Attention that tells its keys is timm's, by fused kernels and without."""
        with pytest.warns(UserWarning, match="merges nothing"):
            model, plain = self.pair("tome", **{**self.kinds[kind], "compression_ratio": 0.9999})
        assert model.merging
        for fused in (True, False):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            assert_close(model(x), plain(x), rtol=1e-4, atol=self.tolerance)

    @pytest.mark.parametrize("resize", [False, True])
    def test_shapes_are_the_plain_models(self, kind, method, resize):
        """At two input sizes. What comes out of ``forward`` is what the head makes of the features."""
        kwargs = {**self.kinds[kind], **(self.resized if resize else {})}
        model, plain = self.pair(method, **kwargs)
        x = self.resized_images() if resize else self.images(2)
        merged, features = model(x), model.forward_features(x)
        assert shapes([merged, features]) == shapes([plain(x), plain.forward_features(x)])
        assert not torch.allclose(merged, plain(x), atol=1e-5), "it merges"
        assert_close(model.forward_head(features), merged, rtol=1e-4, atol=self.tolerance)
        assert shapes(model.forward_head(features, pre_logits=True)) == shapes(plain.forward_head(features, True))
        final = model.forward_intermediates(x, None, False, False, "NCHW")[0]
        assert_close(final, features)
        for output_fmt in self.formats:
            for options in (
                {"indices": [0, 1], "norm": True, "stop_early": True, "intermediates_only": True},
                {"indices": 2, "norm": False},
            ):
                got, expected = (m.forward_intermediates(x, output_fmt=output_fmt, **options) for m in (model, plain))
                assert shapes(got) == shapes(expected)

    def test_every_parameter_learns(self, kind, method, x):
        model = self.build(method, **{**(self.learning if method == "ltm" else {}), **self.kinds[kind]}).train()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        model.zero_grad()
        features = model.forward_features(x)  # every token: a class token sees nothing of the last merge
        (features * torch.randn_like(features)).sum().backward()
        for name, parameter in reducer_parameters(model).items():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} has no gradient"

    # Merging

    def test_initial_weights_are_those_of_the_plain_model(self, method):
        ours, plain = self.build(method).state_dict(), self.build_plain().state_dict()
        assert ours.keys() - plain.keys() == {name for name in ours if is_ours(name)}
        for name, value in plain.items():
            assert torch.equal(ours[name], value), name

    def test_merging_and_the_update_change_the_output(self, x):
        model, plain = self.pair()
        merged = model(x)
        for name, buffer in model.named_buffers():
            if name.endswith("centroids"):
                buffer.zero_()
        assert not torch.allclose(merged, model(x), rtol=0, atol=1e-7)
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))
        model.set_merging(None)
        assert model.merging
        with pytest.raises(ValueError, match="enable: got 1"):
            model.set_merging(1)

    def test_warmup(self, method, x):
        model, plain = self.pair(method, merge_warmup_epochs=2)
        for epoch in range(4):
            model.reduction.epoch.fill_(epoch)
            model.eval()
            assert (model.epoch, model.merging) == (epoch, epoch >= 2)
            assert torch.equal(model(x), plain(x)) == (epoch < 2)
        fresh = self.build(method, merge_warmup_epochs=2)
        fresh.load_state_dict(model.state_dict())
        assert fresh.merging, "the epoch travels in the state dict"

    @pytest.mark.parametrize("training", [False, True])
    def test_merged_tokens_are_put_back(self, method, training, x):
        """Sizes add up, and their weighted mean is that of slots put back; in sequences, in front of the norm."""
        model = self.build(method).train(training)
        if model.maps:
            return self.check_that_tokens_keep_their_own(model, x)
        merged, where = model.forward_merged(x)
        features = model.forward_features(x)
        prefix = model.num_prefix_tokens
        assert features.shape[1] > merged.shape[1]
        assert_close(merged[:, :prefix], features[:, :prefix])
        # a sum of what blocks add, so that putting back goes before the norm
        x, kept = model.forward_blocks(x, keep=True)
        assert_close(model.norm(kept.put_back(x, prefix)), features)
        assert_close(model.norm(x), merged)
        tokens, slots = where.unmerge(merged, prefix)[:, prefix:], merged[:, prefix:]
        assert_close(where.size.sum(dim=1), torch.full((3,), float(tokens.shape[1])))
        assert_close(where.mean(merged, prefix).squeeze(1), tokens.mean(dim=1))
        if METHODS[method].anchored:
            assert_close(torch.stack([t[a] for t, a in zip(tokens, where.anchor, strict=True)]), slots)
        if not training and isinstance(
            getattr(where.masks[-1], "inner", where.masks[-1]), HardMask
        ):  # each token is in one slot: as often as that slot's size says
            same = (tokens.unsqueeze(2) - slots.unsqueeze(1)).abs().amax(dim=3) < 1e-6  # B N P
            assert_close(same.sum(dim=1).float(), where.size)

    def check_that_tokens_keep_their_own(self, model, x):
        """Tokens that gain nothing behind their merge are put back as they were; others are not."""
        merged = model.forward_features(x)
        model.set_merging(False)
        assert not torch.allclose(merged, model.forward_features(x), rtol=0, atol=1e-4), "it merges"
        for name, module in model.named_modules():
            if name.endswith(self.gains):
                for parameter in module.parameters():
                    torch.nn.init.zeros_(parameter)
        plain = model.forward_features(x)
        model.set_merging(True)
        assert_close(model.forward_features(x), plain, rtol=1e-4, atol=self.tolerance)

    def test_masks(self, method, x):
        model = self.build(method, merge_warmup_epochs=1)
        masks = model.forward_masks(x)
        assert masks.blocks == [i for i, amount in enumerate(model.block_amounts) if amount != 1]
        for mask, accumulated, (H, W) in zip(masks.masks, masks.accumulated, masks.grids, strict=True):
            assert accumulated.shape == (3, H * W, mask.shape[2])
            for m in (mask, accumulated):
                assert (m >= 0).all()
                assert_close(m.sum(dim=1), torch.ones(3, m.shape[2]))
        assert not torch.allclose(masks.masks[0][0], masks.masks[0][1]), "masks depend on the image"
        assert not model.merging
        before = {name: value.clone() for name, value in model.named_buffers()}
        assert_close(model.train().forward_masks(x).masks, masks.masks)
        assert all(module.training for module in model.modules())
        assert_close(dict(model.named_buffers()), before)

    def test_an_image_does_not_see_its_batch(self, method):
        model, x = self.build(method), self.images(5)
        together, order = model(x), torch.tensor([3, 0, 4, 1, 2])
        assert_close(model(x[order]), together[order], rtol=0, atol=self.tolerance)
        assert_close(model(x[2:3]), together[2:3], rtol=0, atol=self.tolerance)

    # Heads and inputs

    def test_pooling(self, pool, x):
        model, plain = self.pair(global_pool=pool)
        features = model.forward_features(x)
        assert_close(model.forward_head(features), model(x), rtol=1e-4, atol=self.tolerance)
        assert shapes(model(x)) == shapes(plain(x))
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_reset_classifier(self, pool, x):
        model, plain = self.build(), self.build_plain()
        for m in (model, plain):
            m.reset_classifier(7, *([] if pool == "map" else [pool]))
        assert model.num_classes == 7
        assert shapes(model(x)) == shapes(plain(x))
        assert_close(model.forward_head(model.forward_features(x)), model(x), rtol=1e-4, atol=self.tolerance)

    def test_other_heads_and_channels(self):
        x = self.images(channels=1)
        model, plain = (build(num_classes=0, in_chans=1) for build in (self.build, self.build_plain))
        assert shapes(model(x)) == shapes(plain(x))
        assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True), rtol=1e-4, atol=1e-5)

    def test_set_input_size(self, method):
        model, plain = self.pair(method)
        if not hasattr(plain, "set_input_size"):
            pytest.skip("takes any size")
        for m in (model, plain):
            m.set_input_size(img_size=self.resized["img_size"])
        x = self.resized_images()
        assert shapes(model.forward_features(x)) == shapes(plain.forward_features(x))
        model.set_merging(False)
        assert torch.equal(model(x), plain(x))

    def test_features_only(self, method):
        model, plain = (build(features_only=True) for build in (lambda **k: self.build(method, **k), self.build_plain))
        assert model.feature_info.channels() == plain.feature_info.channels()
        assert model.feature_info.reduction() == plain.feature_info.reduction()
        assert model.output_fmt == plain.output_fmt
        x = self.images(2)
        assert shapes(model(x)) == shapes(plain(x))
        whole = self.build(method).forward_intermediates(x, indices=model.out_indices, intermediates_only=True)
        if model.output_fmt.value == "NHWC":
            whole = [m.movedim(1, 3) for m in whole]
        assert_close(model(x), whole)

    def test_prune_intermediate_layers(self, model, x):
        options = {"indices": [0, 1], "intermediates_only": True}
        kept, state = model.forward_intermediates(x, **options), model.state_dict()
        before = len(list(model.parameters()))
        assert sorted(model.prune_intermediate_layers([0, 1])) == [0, 1]
        assert len(list(model.parameters())) < before
        assert_close(model.forward_intermediates(x, **options), kept)
        assert len(model.forward_masks(x).blocks) == len(list(model.reducers()))
        assert not model.load_state_dict(state, strict=False).missing_keys
        assert_close(model.forward_intermediates(x, **options), kept)

    # Training

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_grad_checkpointing(self, reentrant, x):
        model, gradients = self.build(**self.dropout).train(), []
        calls = [
            lambda: [model(x)],
            lambda: model.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
        ]
        set_reentrant_ckpt(reentrant)
        try:
            for call in calls:
                for enable in (False, True):
                    model.set_grad_checkpointing(enable)
                    model.zero_grad()
                    torch.manual_seed(3)
                    sum(output.square().sum() for output in call()).backward()
                    gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        finally:
            set_reentrant_ckpt(False)
        assert_close(gradients[0], gradients[1])
        assert_close(gradients[2], gradients[3])

    def test_optimizer_groups(self, model):
        if hasattr(model, "no_weight_decay"):
            assert model.no_weight_decay() == self.build_plain().no_weight_decay()
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.75)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
        assert len({group["lr_scale"] for group in groups.values()}) > 2
        for name, parameter in reducer_parameters(model).items():
            block = name.split("reducer.")[0]
            assert len({group["lr_scale"] for other, group in groups.items() if other.startswith(block)}) == 1, name
            assert groups[name]["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype, method, x):
        model = self.build(method)
        reference = model(x)
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        assert output.isfinite().all()
        # of images of noise, which tokens go is decided by little
        assert (output.float() - reference).abs().median() < 0.2 * reference.abs().median()

    def test_autocast(self, model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.train()(x)
        output.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_channels_last(self, model, x):
        expected = model(x)
        output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert_close(output, expected, rtol=1e-4, atol=self.tolerance)
