"""A head fitted to a backbone's features, against scikit-learn's."""

from __future__ import annotations

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from timm_ltm.probe import fit_head


@pytest.mark.parametrize("name", ["test_vit", "mobilevit_xxs", "deit_tiny_distilled_patch16_224"])
def test_fit_head_is_scikit_learns_logistic_regression(name):
    """The head's probabilities of images it has not seen are those of the regression on the same features."""
    torch.manual_seed(0)
    size = {"img_size": 32} if "deit" in name else {}
    model = timm.create_model(name, num_classes=4, **size).eval()
    x, y = torch.randn(40, 3, 32, 32) if size else torch.randn(40, 3, 160, 160), torch.arange(40) % 4
    x += y.view(-1, 1, 1, 1) / 4
    before = {key: value.clone() for key, value in model.state_dict().items()}
    right = fit_head(model, [(x[:16], y[:16]), (x[16:32], y[16:32])], strength=0.3)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True).double().numpy()
        found = model(x).softmax(dim=1)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=10_000, tol=1e-8))
    expected.fit(features[:32], y[:32])
    torch.testing.assert_close(found, torch.tensor(expected.predict_proba(features)).float(), atol=5e-3, rtol=0)
    assert right == pytest.approx(expected.score(features[:32], y[:32]))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    heads = [key for key in before if key.startswith("head") and key.endswith(("weight", "bias")) and "norm" not in key]
    assert changed == set(heads)


def test_what_has_no_head_to_fit():
    model = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(ValueError, match="model: got a classifier Identity, expected a linear one"):
        fit_head(model, [])
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="loader: got no image"):
        fit_head(model, [])
    with pytest.raises(ValueError, match="loader: got labels from 0 to 3, expected 0 to 2"):
        fit_head(model, [(torch.zeros(4, 3, 160, 160), torch.arange(4))])
