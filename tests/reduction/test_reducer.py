"""A method is one file: toys of this file's run on every family. And what a reducer hands on from block to block."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import timm_ltm
from timm_ltm.reduction import METHODS, LineReducer, Observer, Reducer, Seen, Site, initial_tokens, register_method
from timm_ltm.reduction.masks import hard_mask
from timm_ltm.reduction.reducer import recomputing


def every_second(size, num_slots):
    """Keeps tokens at even spacing; the others go to the last one kept before them."""
    B, N = size.shape
    kept = torch.arange(num_slots) * N // num_slots
    others = torch.tensor([i for i in range(N) if i not in set(kept.tolist())], dtype=torch.long)
    slot = (kept <= others.unsqueeze(1)).sum(dim=1) - 1
    return hard_mask(torch.cat((kept, others)).expand(B, -1), slot.expand(B, -1), size, num_slots)


@pytest.fixture
def toys():
    """Two toy methods: one of sequences, that merges behind the block and reads its input; one of lines."""

    @register_method("toy_sequence")
    class OfSequences(Reducer):
        where = "behind"
        needs = frozenset({"inputs"})

        def mask(self, z, tokens, seen):
            assert seen.keys is None
            assert seen.inputs.shape == z.shape
            return every_second(tokens.size, self.num_slots(z.shape[1]))

    @register_method("toy_lines")
    class OfLines(LineReducer):
        def choose(self, line, num_slots):
            return every_second(line.size, num_slots)

    yield OfSequences, OfLines
    del METHODS["toy_sequence"], METHODS["toy_lines"]


SMALL = {
    "test_vit": (dict(num_classes=5), 160),
    "vit_small_patch16_dinov3": (dict(num_classes=5, img_size=64, depth=2, embed_dim=48, num_heads=3), 64),
    "swin_tiny_patch4_window7_224": (
        dict(num_classes=5, img_size=64, embed_dim=12, depths=(1, 2), num_heads=(1, 2), window_size=4),
        64,
    ),
    "mobilevit_xxs": (dict(num_classes=5), 64),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["toy_sequence", "toy_lines"])
def test_a_toy_method_runs_on_a_model(toys, name, method):
    kwargs, size = SMALL[name]
    plain = timm.create_model(name, **kwargs).eval()
    if method == "toy_sequence" and type(plain).__name__ not in ("VisionTransformer", "Eva"):
        with pytest.raises(ValueError, match=r"got toy_sequence .OfSequences.*map"):
            timm_ltm.convert(plain, method)
        return
    model = timm_ltm.convert(plain, method, compression_ratio=0.5)
    x = torch.randn(2, 3, size, size)
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == plain.forward_features(x).shape
    assert not torch.equal(model(x), plain(x))
    model.set_merging(False)
    assert torch.equal(model(x), plain(x))


def test_an_unknown_setting_of_a_toy(toys):
    with pytest.raises(ValueError, match="beta: toy_lines has no such setting, expected one of compression"):
        timm_ltm.convert(timm.create_model("test_vit"), "toy_lines", beta=3.0)


def test_sizes_and_places_through_two_blocks(toys):
    _, cls = toys
    first, second = (cls(Site(4, n), 0.5, cls.Config()) for n in (8, 4))
    z = torch.randn(2, 1 + 8, 4)
    tokens = initial_tokens(z, 1, (2, 4))
    y, after = second(*first(z, tokens, Seen(torch.randn(2, 8, 3)), 1), Seen(torch.randn(2, 4, 3)), 1)
    torch.testing.assert_close(y[:, 1:], z[:, 1:].unflatten(1, (2, 4)).mean(dim=2))
    assert torch.equal(y[:, :1], z[:, :1])
    assert after.size.tolist() == [[4.0, 4.0]] * 2
    assert after.anchor.tolist() == [[0, 4]] * 2
    assert torch.equal(after.unmerge(y, 1)[:, 1:], y[:, 1:].repeat_interleave(4, dim=1))


def test_what_is_carried_reaches_the_next_reducer(toys):
    class Carries(toys[1]):
        def carry(self, z, tokens, mask):
            return z.sum(dim=(1, 2))

        def observe(self, z, tokens, seen):
            return z.mean(dim=(1, 2))

    reducer, z = Carries(Site(4, 8), 0.5, Carries.Config()), torch.randn(2, 1 + 8, 4)
    tokens, seen = initial_tokens(z, 1, (2, 4)), Seen(torch.randn(2, 8, 3))
    assert torch.equal(reducer(z, tokens, seen, 1)[1].carried, z[:, 1:].sum(dim=(1, 2)))
    same, after = reducer(z, tokens, seen, 1, observe=True)
    assert same is z
    assert torch.equal(after.carried, z[:, 1:].mean(dim=(1, 2)))
    assert after._replace(carried=None) == tokens


def test_copies_of_a_model_are_not_observed():
    reducer = Reducer(Site(4, 8), 0.5, Reducer.Config())
    reducer.observer = Observer()
    assert copy.deepcopy(reducer).observer is None
    assert pickle.loads(pickle.dumps(reducer)).observer is None
    assert reducer.observer is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_is_known(reentrant):
    seen = []

    def run(x):
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]


@pytest.fixture
def readers():
    """A method that reads the attention tokens receive and keeps what it saw, and one that masks all but the first."""

    @register_method("toy_reader")
    class Reader(Reducer):
        needs = frozenset({"attention"})

        def mask(self, z, tokens, seen):
            self.seen = seen.attention
            return every_second(tokens.size, self.num_slots(z.shape[1]))

    @register_method("toy_masker")
    class Masker(Reducer):
        def __init__(self, site, amount, config, device=None, dtype=None):
            super().__init__(site, amount, config, device, dtype)
            self.weight = torch.nn.Parameter(torch.zeros(site.tokens, device=device, dtype=dtype))

        @classmethod
        def weighs(cls, config):
            return True

        def num_slots(self, num_tokens):
            return num_tokens

        def mask(self, z, tokens, seen):
            first = torch.arange(z.shape[1]) == 0
            whole = every_second(tokens.size, z.shape[1])

            class Masked(type(whole)):
                weight = (self.weight + first).expand(z.shape[0], -1)

            return Masked(*whole)

    yield Reader, Masker
    del METHODS["toy_reader"], METHODS["toy_masker"]


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3"])
def test_the_attention_that_tokens_receive(readers, name):
    torch.manual_seed(0)
    plain = timm.create_model(name, img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5).eval()
    model = timm_ltm.convert(plain, "toy_reader", compression_ratio=[0.75, 1.0]).eval()
    x = torch.randn(2, 3, 64, 64)
    model(x)
    attn = plain.blocks[0].attn
    attn.fused_attn = False
    seen = []
    hook = attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    plain(x)
    hook.remove()
    expected = seen[0].mean(dim=(1, 2))[:, plain.num_prefix_tokens :]
    torch.testing.assert_close(model.blocks[0].reducer.seen, expected)


def test_who_reads_attention_fits_no_family_that_tells_none(readers):
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(ValueError, match=r"reads of a block only \['inputs', 'keys'\]"):
        timm_ltm.convert(timm.create_model(name, **SMALL[name][0]), "toy_reader")


def test_a_masked_token_is_as_if_it_were_not_there(readers):
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    model = timm_ltm.convert(plain, "toy_masker", compression_ratio=[0.99, 1.0]).eval()
    x = torch.randn(2, 3, 64, 64)
    logits = model(x)  # of the class token, behind a block that sees the first patch alone
    z = plain.blocks[0](plain._pos_embed(plain.patch_embed(x)))[:, :2]
    torch.testing.assert_close(logits, plain.forward_head(plain.norm(plain.blocks[1](z))))
    logits.square().sum().backward()
    gradient = model.blocks[0].reducer.weight.grad  # of exp(A) m, renormalised, at m = 0
    assert (gradient[1:] != 0).all()
    step = torch.zeros_like(gradient)
    step[3] = 1e-3
    with torch.no_grad():
        model.blocks[0].reducer.weight.copy_(step)
        rise = (model(x).square().sum() - logits.square().sum()) / 1e-3
    torch.testing.assert_close(gradient[3], rise, rtol=0.02, atol=1e-4)
