"""A head for classes of a user's own, without training the backbone: logistic regression on its pooled features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fit_head"]


def fit_head(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    strength: float = 0.1,
    steps: int = 300,
) -> float:
    """Fit a timm model's classifier to what it makes of images, pooled as it pools; all else stays as it is.

    Multinomial logistic regression on features of mean 0 and deviation 1, by L-BFGS; the scaling is then part of the
    classifier's weights.

    Args:
        model: With a linear classifier of as many classes as there are labels, see timm's ``reset_classifier``. It is
            used in eval, and left so.
        loader: Batches of images (B, C, H, W) and labels (B,), each image once.
        strength: C of scikit-learn: the sum of losses counts that much against half the squared length of the weights.
        steps: Of L-BFGS at most.

    Returns:
        The share of these images that it gets right.

    Raises:
        ValueError: The classifier is not linear, the loader is empty, or a label has no class.
    """
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)  # of distilled models two, whose mean is taken
    if not all(isinstance(head, nn.Linear) and head.bias is not None for head in heads):
        raise ValueError(
            f"model: got a classifier {type(heads[0]).__name__}, expected a linear one with a bias. Call "
            "model.reset_classifier(num_classes) before."
        )
    x, y = _features(model.eval(), loader)
    n, K = len(x), heads[0].out_features
    if y.amin() < 0 or y.amax() >= K:
        raise ValueError(f"loader: got labels from {int(y.amin())} to {int(y.amax())}, expected 0 to {K - 1}.")
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.amax(), std, 1.0)
    x = (x - mean) / std
    weight, bias = x.new_zeros(K, x.shape[1]).requires_grad_(), x.new_zeros(K).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2.0 * strength * n)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scaled = weight / std
        for head in heads:
            head.weight.copy_(scaled)
            head.bias.copy_(bias - scaled @ mean)
        return (F.linear(x, weight, bias).argmax(dim=1) == y).float().mean().item()


@torch.no_grad()
def _features(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the classifier reads (n, D), and labels (n,)."""
    device = next(model.parameters()).device
    rows, labels = [], []
    for images, targets in batches:
        rows.append(model.forward_head(model.forward_features(images.to(device)), pre_logits=True).float())
        labels.append(targets.to(device))
    if not rows:
        raise ValueError("loader: got no image, expected some. Give batches of images and labels.")
    return torch.cat(rows), torch.cat(labels)
