"""Several processes: gloo on CPU, under torch's DistributedDataParallel."""

from __future__ import annotations

import functools
import os
import socket
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from small import cluster_state
from timm.task import ClassificationTask
from torch.nn.parallel import DistributedDataParallel

import timm_ltm

EPOCHS = 2
SHAPES = {
    "vit": ("ltm_vit_test", dict(img_size=8, patch_size=2, in_chans=1, depth=2, compression_ratio=0.8)),
    "swin": (
        "ltm_swin_tiny",
        dict(
            img_size=32,
            in_chans=1,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(1, 2),
            window_size=4,
            drop_path_rate=0.0,
            compression_ratio=(0.6, 1.0, 0.5, 1.0),
        ),
    ),
}


def digits(size):
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:90] / 8 - 1, dtype=torch.float64).view(-1, 1, 8, 8)
    return x if size == 8 else F.interpolate(x, size=size), torch.tensor(labels[:90])


def make(family, **kwargs):
    torch.manual_seed(0)
    name, shape = SHAPES[family]
    # in float64, so that no hard choice of tokens hangs on how a batch was rounded
    return timm.create_model(name, num_classes=10, num_clusters=8, dtype=torch.float64, **shape, **kwargs)


def train(model, forward, refresh, x, y, batch):
    """Epochs without optimizer steps: what is clustered is then the same however images are dealt out."""
    for _ in range(EPOCHS):
        model.train()
        for i in range(0, len(x), batch):
            output = forward(x[i : i + batch], y[i : i + batch])
            output.backward()
            if refresh is not None:
                refresh.step(y[i : i + batch])
        if refresh is not None:
            refresh.epoch_end()
        else:
            model.eval()  # under a timm task, an epoch ends here


CASES = {  # family, how, broadcast_buffers, epochs of warm-up
    "vit": ("vit", "explicit", True, 0),
    "without broadcast": ("vit", "explicit", False, 1),
    "task": ("vit", "task", True, 1),
    "task without broadcast": ("vit", "task", False, 0),
    "batches of other sizes": ("vit", "uneven", True, 0),
    "a process without finite features": ("vit", "nan", True, 0),
    "a process without batches": ("vit", "nothing", True, 0),
    "swin": ("swin", "task", True, 1),
}


def case(rank, family, how, broadcast, warmup):
    """One process' part of a case: the clusters it ends with."""
    model = make(family, merge_warmup_epochs=warmup)
    x, y = digits(8 if family == "vit" else 32)
    x, y = x[rank::2], y[rank::2]
    if rank == 1 and how == "nan":
        x = torch.full_like(x, float("nan"))
    if rank == 1 and how == "nothing":
        x, y = x[:0], y[:0]
    batch = 45 if rank == 1 and how == "uneven" else 12  # one batch, or four and the last one smaller
    if how == "task":
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        task.prepare_distributed(broadcast_buffers=broadcast)
        train(model, lambda a, b: task(a, b)["loss"], None, x, y, batch)
    elif how in ("nothing", "uneven"):  # processes do different numbers of steps: no gradients to share
        train(model, lambda a, b: F.cross_entropy(model(a), b), timm_ltm.ClusterRefresh(model), x, y, batch)
    else:
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        train(model, lambda a, b: F.cross_entropy(ddp(a), b), timm_ltm.ClusterRefresh(ddp), x, y, batch)
    return cluster_state(model)


def process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save({name: case(rank, *settings) for name, settings in CASES.items()}, f"{folder}/{rank}.pth")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes end with, of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks, name):
    """All ranks end with the same clusters, those of one process that saw the same images."""
    family, how, _, warmup = CASES[name]
    first, second = ranks[0][name], ranks[1][name]
    assert first.keys() == second.keys()
    for buffer, value in first.items():
        assert torch.equal(value, second[buffer]), buffer
    for buffer, value in one_process(family, how in ("nan", "nothing"), warmup).items():
        if buffer.endswith("epoch"):
            assert value == first[buffer] == EPOCHS
        else:
            assert value.any(), buffer
            torch.testing.assert_close(
                first[buffer], value, rtol=2e-3, atol=2e-4, msg=lambda m, buffer=buffer: f"{buffer}: {m}"
            )


@functools.cache
def one_process(family, half, warmup):
    """The clusters of a process that sees all images, or those of the first of two."""
    model = make(family, merge_warmup_epochs=warmup)
    x, y = digits(8 if family == "vit" else 32)
    if half:
        x, y = x[::2], y[::2]
    train(model, lambda a, b: F.cross_entropy(model(a), b), timm_ltm.ClusterRefresh(model), x, y, 40)
    return cluster_state(model)
