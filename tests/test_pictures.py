"""Pictures of what was merged, and charts."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small import fill, make
from timm.data import create_transform

from timm_ltm.information import Information
from timm_ltm.models.record import representative_tokens
from timm_ltm.pictures import (
    blocks_figure,
    curves_figure,
    heat_over,
    information_figure,
    load_photo,
    mask_figure,
    rebuilt,
    sources_over,
    tradeoff_figure,
)
from timm_ltm.pictures.charts import read_summary, read_table
from timm_ltm.pictures.photos import data_config

SWIN = dict(img_size=32, window_size=4, depths=(2, 2), embed_dim=8, patch_size=2, num_heads=(1, 1), num_classes=5)


def swin(*ratios):
    return timm.create_model("ltm_swin_tiny", compression_ratio=list(ratios), **SWIN).eval()


def groups(home):
    """Weights (h w, P) that average each group of patches, given where each patch goes."""
    to = torch.nn.functional.one_hot(home).float()
    return to / to.sum(dim=0)


def test_patches_become_the_means_of_their_groups():
    """Of two patches that go together both become their mean, pixel by pixel; one on its own stays as it is."""
    photo = torch.rand(3, 6, 8)
    weights = groups(torch.tensor([0, 1, 2, 0]))  # of a 2 x 2 grid
    picture = rebuilt(photo, weights, (2, 2))
    mean = (photo[:, :3, :4] + photo[:, 3:, 4:]) / 2
    torch.testing.assert_close(picture[:, :3, :4], mean)
    torch.testing.assert_close(picture[:, 3:, 4:], mean)
    torch.testing.assert_close(picture[:, :3, 4:], photo[:, :3, 4:])
    torch.testing.assert_close(picture[:, 3:, :4], photo[:, 3:, :4])


def test_lines_lie_between_groups_and_nowhere_else():
    weights = groups(torch.tensor([0, 0, 1, 2]))
    picture = sources_over(torch.full((3, 40, 40), 0.5), weights, (2, 2))
    assert picture.shape == (3, 400, 400)  # of a small image, for lines to be thin
    assert sources_over(torch.zeros(3, 401, 500), weights, (2, 2)).shape == (3, 402, 500)
    assert (picture[:, 200, :] < 0.1).all()
    assert (picture[:, 200:, 200] < 0.1).all()
    assert (picture[:, :200] > 0.1).all()  # the two above go together
    upper, left, right = picture[:, 50, 50], picture[:, 300, 50], picture[:, 300, 350]
    torch.testing.assert_close(upper, picture[:, 50, 350])
    assert not torch.allclose(upper, left)
    torch.testing.assert_close(left, right)  # patches on their own have no colour


def test_heat_is_brightest_where_weights_are_largest():
    photo = torch.full((3, 10, 10), 0.5)
    picture = heat_over(photo, torch.tensor([[0.0, 0.1], [0.2, 0.7]])).mean(dim=0)
    corners = picture[2, 2], picture[2, 7], picture[7, 2], picture[7, 7]
    assert corners[0] < corners[1] < corners[2] < corners[3]


@pytest.mark.parametrize("family", ["sequence", "map"])
def test_a_figure_of_masks(tmp_path, family):
    """A column per photograph, at its own resolution, whatever the models'."""
    if family == "sequence":
        model, x = fill(make(in_chans=3)).eval(), torch.randn(2, 3, 8, 8)
    else:
        model, x = swin(0.5, 1.0, 1.0, 1.0), torch.randn(2, 3, 32, 32)
    photos = [torch.rand(3, 64, 80), torch.rand(3, 50, 40)]
    with torch.no_grad():
        masks = model.forward_masks(x)
    figure = mask_figure(photos, masks, tmp_path / "masks.png", layer=0, labels=["a", "b"])
    axes = np.reshape(figure.axes[:8], (4, 2))
    P = masks.accumulated[0].shape[2]
    assert f"{P} merged tokens" in axes[3, 0].get_ylabel()
    assert [axis.get_xlabel() for axis in axes[3]] == ["a", "b"]
    for column, photo in enumerate(photos):
        pictures = [torch.tensor(axis.get_images()[0].get_array()).permute(2, 0, 1) for axis in axes[:, column]]
        torch.testing.assert_close(pictures[0], photo)
        assert pictures[1].shape == photo.shape
        weights, grid = masks.accumulated[0][column], masks.grids[0]
        assert any(torch.allclose(pictures[1], heat_over(photo, w.unflatten(0, grid)).clamp(0, 1)) for w in weights.t())
        torch.testing.assert_close(pictures[3], rebuilt(photo, weights, grid).clamp(0, 1))
    picture = matplotlib.image.imread(tmp_path / "masks.png")
    assert picture.shape[1] > 2 * 80

    figure = blocks_figure(photos, masks, tmp_path / "blocks.png")
    assert len(figure.axes) == 2 * (1 + len(masks.blocks))
    assert figure.axes[1].get_title() == f"block {masks.blocks[0] + 1}, {P} tokens"


def test_mistakes_with_masks_are_told():
    model = make(compression_ratio=1.0).eval()
    with pytest.raises(ValueError, match="masks: got none, expected a model that merges"):
        mask_figure(torch.zeros(1, 1, 8, 8), model.forward_masks(torch.zeros(1, 1, 8, 8)))
    masks = make().eval().forward_masks(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="layer: got 6, expected one of the 6 blocks"):
        mask_figure(torch.zeros(2, 1, 8, 8), masks, layer=6)
    with pytest.raises(ValueError, match="images: got 1, expected 2"):
        blocks_figure(torch.zeros(1, 1, 8, 8), masks)


@pytest.mark.parametrize("family", ["sequence", "map"])
def test_the_representative_token_speaks_for_the_class(family):
    """Taking it away lowers the largest logit more than taking away the average one, over some images."""
    torch.manual_seed(0)
    if family == "sequence":
        model, x = fill(make(compression_ratio=0.5, in_chans=3)).eval(), torch.randn(8, 3, 8, 8)
    else:
        model, x = swin(0.5, 1.0, 1.0, 1.0), torch.randn(8, 3, 32, 32)
    model.requires_grad_(False)
    tokens = representative_tokens(model, x, layer=0)
    masks = model.forward_masks(x)
    assert tokens.shape == (8,)
    sizes = masks.accumulated[0].gt(0).sum(dim=1)
    assert (sizes.gather(1, tokens.unsqueeze(1)) > 1).all()
    reducer = next(reducer for _, reducer in model.reducers())
    before = model(x).amax(dim=1)
    which = model(x).argmax(dim=1, keepdim=True)

    def without(chosen):
        def zero(_, args, output):
            z, after = output
            prefix = z.shape[1] - after.size.shape[1]
            keep = torch.ones_like(z)
            keep[torch.arange(8), chosen + prefix] = 0
            return z * keep, after

        hook = reducer.register_forward_hook(zero)
        with torch.no_grad():
            after = model(x).gather(1, which)[:, 0]
        hook.remove()
        return (before - after).mean()

    others = [without(torch.full((8,), p)) for p in range(0, masks.masks[0].shape[2], 5)]
    assert without(tokens) > torch.stack(others).mean()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("shape", [(300, 200), (150, 400)])
def test_a_photograph_is_what_timm_shows(tmp_path, mode, shape):
    """The model's input is that of timm's own transform, up to how edges are rounded; the photograph is not resized."""
    pixels = torch.rand(1, 3, 8, 8)
    pixels = torch.nn.functional.interpolate(pixels, size=shape, mode="bicubic").clamp(0, 1)[0]
    Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    config = {**data_config(make(img_size=64, in_chans=3)), "crop_pct": 0.8, "crop_mode": mode}
    photo, x = load_photo(tmp_path / "photo.png", config)
    expected = create_transform(**config, is_training=False)(Image.open(tmp_path / "photo.png"))
    assert x.shape == expected.shape == (3, 64, 64)
    assert (x - expected).abs().mean() < 0.05
    side = round(0.8 * min(shape))
    assert photo.shape == ((3, side, side) if mode == "center" else (3, round(0.8 * shape[0]), round(0.8 * shape[1])))
    (tmp_path / "words.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"image: got '.*words.txt', expected an image file"):
        load_photo(tmp_path / "words.txt", config)


def test_information_by_layer(tmp_path):
    """The whole model's entry is no point."""
    found = [Information(f"b{i}", i, 4, 0.3 / i, 0.1, 1.0, 0.5 / i, -1.0) for i in (1, 2, 3)]
    found.append(Information("model", None, 4, 9.0, 0.0, 1.0, 9.0, -1.0))
    figure = information_figure({"plain": found, "ltm": found[1:]}, tmp_path / "ib.png")
    bound, loss = figure.axes
    assert [line.get_label() for line in bound.get_lines()] == ["plain", "ltm"]
    np.testing.assert_allclose(bound.get_lines()[0].get_xydata(), [[1, 0.5], [2, 0.25], [3, 0.5 / 3]])
    np.testing.assert_allclose(loss.get_lines()[1].get_xydata(), [[2, 0.05], [3, 0.0]], atol=1e-12)
    assert "nats" in bound.get_ylabel()
    assert (tmp_path / "ib.png").stat().st_size > 1000


def test_curves_of_runs(tmp_path):
    """A resumed run repeats its header and an epoch; a run without top-1 has no line there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1\n0,2.0,1.9,30\n1,1.5,1.6,40\n"
        "epoch,train_loss,eval_loss,eval_top1\n1,1.4,1.5,45\n2,1.0,1.2,50\n"
    )
    (tmp_path / "b.csv").write_text("epoch,train_loss,eval_loss\n0,3.0,2.9\n")
    rows = read_summary(tmp_path / "a")
    assert [row["train_loss"] for row in rows] == [2.0, 1.4, 1.0]
    figure = curves_figure({"a": rows, "b": read_summary(tmp_path / "b.csv")}, tmp_path / "curves.png")
    assert [axis.get_ylabel() for axis in figure.axes] == ["training loss", "test loss", "test top-1 (%)"]
    assert [len(axis.get_lines()) for axis in figure.axes] == [2, 2, 1]
    np.testing.assert_allclose(figure.axes[2].get_lines()[0].get_xydata(), [[0, 30], [1, 45], [2, 50]])
    (tmp_path / "empty.csv").write_text("epoch,train_loss\n")
    for path, message in (("empty.csv", "without a row"), ("none.csv", "No such file")):
        with pytest.raises(ValueError, match=message):
            read_summary(tmp_path / path)
    with pytest.raises(ValueError, match="runs: got none with"):
        curves_figure({"a": [{"epoch": 1.0}]})


def test_accuracy_against_cost(tmp_path):
    """Sorted by cost, with intervals where there are some."""
    (tmp_path / "compare.csv").write_text(
        "method,gmacs,ratio,top1,top1_low,top1_high\nplain,6.1,1,74,72,76\n"
        "ltm,4,.65,72,70,74\nltm,5,.8,73,71,75\ntome,5,.8,71,,\n"
    )
    figure = tradeoff_figure(read_table(tmp_path / "compare.csv"), tmp_path / "tradeoff.png")
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"plain", "ltm", "tome"}
    drawn = [tuple(map(tuple, line.get_xydata())) for line in axis.get_lines()]
    assert ((4.0, 72.0), (5.0, 73.0)) in drawn
    assert len(axis.containers) == 2  # errors of plain and ltm
    assert axis.get_xlabel() == "GMACs per image"
    with pytest.raises(ValueError, match=r"rows: got none with \['top1'\]"):
        tradeoff_figure([{"method": "a", "gmacs": 1}])
