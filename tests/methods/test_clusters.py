"""Running clusters and Q against scikit-learn and against all data at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from timm_ltm.methods.ltm import Clusters, RunningClusters
from timm_ltm.methods.ltm.clusters import fit_temperature, kmeans, kmeans_plus_plus, mean_entropy
from timm_ltm.methods.ltm.information import class_conditional
from timm_ltm.methods.ltm.update import assign, cluster_scores, direction, posterior_scores


@pytest.fixture
def blobs():
    """Features (300, 6) in five groups, and labels that follow the groups."""
    g = torch.Generator().manual_seed(0)
    group = torch.randint(5, (300,), generator=g)
    centres = 4.0 * torch.randn(5, 6, generator=g)
    return centres[group] + torch.randn(300, 6, generator=g), group % 3


def epoch(running, x, y, batch=32, number=0):
    running.clear(number)
    for i in range(0, len(x), batch):
        running.add(x[i : i + batch], F.one_hot(y[i : i + batch], 3))
    return running.commit()


def test_kmeans_finds_what_scikit_learn_finds(blobs):
    x, _ = blobs
    ours = kmeans(x, 5, iterations=50, generator=torch.Generator().manual_seed(1))
    inertia = torch.cdist(x, ours).square().amin(dim=1).sum().item()
    assert inertia <= KMeans(5, n_init=10, random_state=0).fit(x.numpy()).inertia_ * 1.001


def test_running_epoch_is_one_lloyd_iteration(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3)
    epoch(running, x, y)
    before = clusters.centroids.clone()
    epoch(running, x, y, number=1)
    oracle = KMeans(5, init=before.numpy(), n_init=1, max_iter=1, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_allclose(clusters.centroids.numpy(), oracle.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_q_is_equation_8_over_all_batches(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3, normalize=False)
    epoch(running, x, y)
    centroids, T = clusters.centroids.clone(), float(clusters.temperature)
    epoch(running, x, y, batch=7, number=1)
    labels = F.one_hot(y, 3).float()
    log_q = class_conditional(assign(x, centroids, T).t() @ labels, smoothing=1.0).log()
    prior = (labels.sum(dim=0) + 1.0) / (labels.sum(dim=0) + 1.0).sum()
    torch.testing.assert_close(clusters.scores, cluster_scores(log_q, prior), rtol=1e-4, atol=1e-5)


def test_soft_labels_count_as_fractions(blobs):
    x, y = blobs
    soft = 0.7 * F.one_hot(y, 3).float() + 0.3 * F.one_hot(y.roll(1), 3).float()
    running = RunningClusters(Clusters(5, 6), 3)
    running.add(x, soft)
    torch.testing.assert_close(running.classes, soft.sum(dim=0))
    torch.testing.assert_close(running.joint.sum(dim=0), soft.sum(dim=0))


def test_direction_has_unit_root_mean_square_after_refresh(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    epoch(RunningClusters(clusters, 3), x, y)
    assert clusters(x).square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)


def test_entropy_is_fitted(blobs):
    x, y = blobs
    centroids = kmeans(x, 5)
    phi = assign(x, centroids, fit_temperature(x, centroids))
    assert mean_entropy(phi).item() == pytest.approx(0.5 * math.log(5), rel=1e-3)
    report = epoch(RunningClusters(Clusters(5, 6), 3), x, y)
    assert report["entropy"] == pytest.approx(0.25, abs=1e-2)


def test_fixed_temperature_is_kept(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    epoch(RunningClusters(clusters, 3, temperature=1.5), x, y)
    assert clusters.temperature.item() == 1.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_left_out(blobs, bad):
    x, y = blobs
    clusters, clean = Clusters(5, 6), Clusters(5, 6)
    dirty = x.clone()
    dirty[::10, 2] = bad
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[::10] = False
    for number in range(2):
        running, reference = RunningClusters(clusters, 3), RunningClusters(clean, 3)
        report = epoch(running, dirty, y, number=number)
        epoch(reference, x[keep], y[keep], number=number)
        assert report["skipped"] == 30
        assert report["features"] == 270
        assert all(buffer.isfinite().all() for buffer in clusters.buffers())
        torch.testing.assert_close(running.joint, reference.joint)


def test_an_epoch_of_nothing_leaves_clusters_alone(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3)
    epoch(running, x, y)
    before = {name: value.clone() for name, value in clusters.named_buffers()}
    running.clear(1)
    running.add(torch.full((4, 6), float("nan")), F.one_hot(torch.zeros(4, dtype=torch.long), 3))
    running.commit()
    assert all(torch.equal(value, before[name]) for name, value in clusters.named_buffers())


def test_clusters_without_members_are_seeded_anew(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3)
    epoch(running, x, y)
    clusters.centroids[2] = 1e3
    report = epoch(running, x, y, number=1)
    assert report["reseeded"] == 1
    assert clusters.centroids.abs().amax() < 100
    assert clusters.scores.isfinite().all()
    report = epoch(running, x, y, number=2)
    assert report["reseeded"] == 0


def test_reservoir_is_bounded_and_fair():
    running = RunningClusters(Clusters(2, 1), 1, reservoir=100)
    for start in range(0, 2000, 50):
        running.add(torch.arange(start, start + 50).float().unsqueeze(1), torch.ones(50, 1))
    kept = running.features[:100, 0]
    assert running.features.shape == (101, 1)
    assert len(kept.unique()) == 100
    assert 800 < kept.mean() < 1200  # 1000 +- 58, three and a half deviations


def test_same_epoch_draws_the_same_reservoir(blobs):
    x, y = blobs
    first, second = (RunningClusters(Clusters(5, 6), 3, reservoir=20) for _ in range(2))
    for running in (first, second):
        torch.rand(3)
        running.clear(4)
        running.add(x, F.one_hot(y, 3))
    assert torch.equal(first.features[:20], second.features[:20])


def test_the_trainings_random_numbers_are_not_touched(blobs):
    x, y = blobs
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    epoch(RunningClusters(Clusters(5, 6), 3), x, y)
    assert torch.equal(torch.rand(3), expected)


def test_fewer_features_than_clusters():
    centroids = kmeans_plus_plus(torch.randn(3, 4), 6)
    assert centroids.shape == (6, 4)
    assert centroids.isfinite().all()


def test_forward_is_the_direction_of_the_functions(blobs):
    x, y = blobs
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3, normalize=False)
    epoch(running, x, y)
    phi = assign(x, clusters.centroids, clusters.temperature)
    expected = direction(phi, posterior_scores(phi, clusters.scores), clusters.centroids)
    torch.testing.assert_close(clusters(x), expected)
    w = running.log_q.t()[y]
    torch.testing.assert_close(clusters(x, w), direction(phi, w, clusters.centroids))
    assert clusters(x.half()).dtype == torch.float32


def test_label_term_is_the_bound_s_as_loops(blobs):
    x, y = (t[:20] for t in blobs)
    clusters = Clusters(5, 6)
    running = RunningClusters(clusters, 3)
    epoch(running, x, y)
    phi, log_q = clusters.phi(x), running.log_q
    expected = -sum(phi[i, a] * log_q[a, y[i]] for i in range(20) for a in range(5)) / 20
    torch.testing.assert_close(clusters.label_term(x, F.one_hot(y, 3), log_q), expected)


def test_before_the_first_refresh_there_is_no_direction():
    assert torch.equal(Clusters(5, 6)(torch.randn(3, 6)), torch.zeros(3, 6))


def test_kept_features_have_their_own_images_labels():
    """In one write a place of the reservoir is drawn by many images of a batch: one of them has it, as a whole."""
    running = RunningClusters(Clusters(2, 16), 64, reservoir=64)
    code = torch.arange(20_000) % 64
    features, labels = code.float().unsqueeze(1).expand(-1, 16).contiguous(), F.one_hot(code, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for number in range(15):
            running.clear(number)
            running.add(features, labels)
            kept = running.labels[:64]
            assert torch.equal(running.features[:64], kept.argmax(dim=1).float().unsqueeze(1).expand(-1, 16))
            assert (kept.sum(dim=1) == 1).all()
    finally:
        torch.set_num_threads(before)


def test_images_that_are_not_finite_take_nobodys_place():
    running = RunningClusters(Clusters(2, 3), 1, reservoir=8)
    x = torch.randn(20, 3)
    running.add(x, torch.ones(20, 1))
    kept = running.features[:8].clone()
    running.add(torch.full((500, 3), float("nan")), torch.ones(500, 1))
    assert torch.equal(running.features[:8], kept)
    assert running.labels[:8].sum() == 8


def test_a_batch_at_a_time_is_an_image_at_a_time():
    at_once, one_by_one = (RunningClusters(Clusters(2, 3), 5, reservoir=8) for _ in range(2))
    x, y = torch.randn(500, 3), F.one_hot(torch.randint(5, (500,)), 5)
    at_once.add(x, y)
    for i in range(500):
        one_by_one.add(x[i : i + 1], y[i : i + 1])
    assert torch.equal(at_once.features[:8], one_by_one.features[:8])
    assert torch.equal(at_once.labels[:8], one_by_one.labels[:8])


def test_every_batch_size_draws_fairly():
    """One batch far larger than the reservoir: every image is as likely to be kept."""
    kept = []
    for seed in range(40):
        running = RunningClusters(Clusters(2, 1), 1, reservoir=25, seed=seed)
        running.add(torch.arange(1000).float().unsqueeze(1), torch.ones(1000, 1))
        kept.append(running.features[:25, 0])
    kept = torch.cat(kept)
    assert 460 < kept.mean() < 540  # 499.5 +- 9, more than four deviations
    assert 270 < kept.std() < 310  # 288.7
