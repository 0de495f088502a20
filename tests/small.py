"""A small model, of 64 tokens, for what does not depend on the model; clusters as after a refresh; an epoch."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F

import timm_ltm  # noqa: F401  registers the models

SHAPE = dict(img_size=8, patch_size=1, in_chans=1, num_classes=10, num_clusters=8, compression_ratio=0.8)


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("ltm_vit_test", **{**SHAPE, **kwargs})


def fill(model):
    """Clusters as after a refresh: before it they are zero, and with them the update."""
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "centroids") and not module.centroids.is_meta:
            for buffer in module.buffers():
                buffer.copy_(torch.randn(buffer.shape, generator=g))
            module.temperature.fill_(module.centroids.shape[1])  # phi neither one-hot nor uniform
    return model.train(model.training)  # which makes it look at its buffers


def run_epoch(model, refresh, x, y, batch=64, targets=None, optimizer=None):
    """An epoch of one's own loop; returns the refresh's report."""
    model.train()
    for i in range(0, len(x), batch):
        target = y[i : i + batch]
        refresh.labels(target)
        loss = F.cross_entropy(model(x[i : i + batch]), target)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        refresh.step(target if targets is None else targets[i : i + batch])
    return refresh.epoch_end()


def cluster_state(model):
    """What refreshes write, by name."""
    own = ("clusters.", "reduction.epoch")
    return {name: value.clone() for name, value in model.named_buffers() if any(part in name for part in own)}
