"""Pictures of what was merged."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from small import fill, make

from timm_ltm.pictures import mask_figure


@pytest.mark.parametrize("family", ["sequence", "map"])
def test_a_figure_of_masks(digits, tmp_path, family):
    """A column per image; rebuilt pictures have no more values than merged tokens."""
    x = digits[0][:2]
    if family == "sequence":
        model = fill(make()).eval()
    else:
        model = timm.create_model("ltm_swin_tiny", img_size=32, window_size=4, depths=(2, 2), embed_dim=8, in_chans=1,
                                  num_heads=(1, 1), compression_ratio=[0.5, 1.0, 1.0, 1.0]).eval()  # fmt: skip
        x = torch.nn.functional.interpolate(x, size=32)
    with torch.no_grad():
        masks = model.forward_masks(x)
    figure = mask_figure(x, masks, tmp_path / "masks.png", layer=0)
    axes = np.reshape(figure.axes, (3, 2))
    P = masks.accumulated[0].shape[2]
    assert axes[1, 0].get_ylabel() == f"{P} merged tokens"
    assert P < 64
    for column, image in enumerate(x):
        pictures = [axis.get_images()[0].get_array() for axis in axes[:, column]]
        assert pictures[0].shape == (*image.shape[1:], 3)
        assert pictures[1].shape == (*masks.grids[0], 3)
        assert len(np.unique(pictures[1].round(5).reshape(-1, 3), axis=0)) <= P
        weights = masks.accumulated[0][column]
        assert any(np.allclose(pictures[2].ravel(), weights[:, p]) for p in range(P))
    assert matplotlib.image.imread(tmp_path / "masks.png").shape[2] == 4


def test_a_model_that_merges_nothing():
    model = make(compression_ratio=1.0).eval()
    with pytest.raises(ValueError, match="masks: got none, expected a model that merges"):
        mask_figure(torch.zeros(1, 1, 8, 8), model.forward_masks(torch.zeros(1, 1, 8, 8)))
