"""The metrics against torch-fidelity on the same features, closed forms, and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.spawn import run_ranks
from untwine.evaluation import metrics
from untwine.evaluation.memorisation import neighbours
from untwine.evaluation.neighbours import nearest, radii
from untwine.evaluation.statistics import Gaussian, Moments, frechet_distance


def features(seed: int, count: int = 700, dim: int = 40) -> torch.Tensor:
    """Correlated and not Gaussian, as features are, about a mean far from zero."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(count, dim, generator=draw, dtype=torch.float64)
    return (x @ mix + 0.1 * seed).clamp(min=-1) + 5


@pytest.fixture(scope="module")
def pair():
    return features(1), features(2, 900)


def test_frechet_distance_is_torch_fidelitys(pair):
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    theirs = metric.fid_statistics_to_metric(*(metric.fid_features_to_statistics(x) for x in pair), False)
    ours = frechet_distance(*(Moments.of(x).gaussian() for x in pair))
    assert ours == pytest.approx(theirs[metric.KEY_METRIC_FID], rel=1e-6)


@pytest.mark.parametrize("size,subsets", [(700, 1), (200, 7)])
def test_kid_is_torch_fidelitys(pair, size, subsets):
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    told = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": 2020, "verbose": False}
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    theirs = metric.kid_features_to_metric(*pair, **told, **kernel, kid_kernel_poly_coef0=1)
    ours = metrics.kernel_distance(*pair, subsets=subsets, subset_size=size)
    assert ours.mean == pytest.approx(theirs[metric.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[metric.KEY_METRIC_KID_STD], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("splits", [1, 10, 7])
def test_inception_score_is_torch_fidelitys(pair, splits):
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = metric.isc_features_to_metric(pair[0], splits=splits, shuffle=False)
    ours = metrics.inception_score(pair[0], splits)
    assert ours.mean == pytest.approx(theirs[metric.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[metric.KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-12)


def test_precision_and_recall_are_torch_fidelitys(pair):
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = metric.calculate_precision_recall_part(*pair, neighborhood=3, batch_size=128)
    ours = metrics.precision_recall(*pair, k=3)
    assert 0 < ours[0] < 1
    assert 0 < ours[1] < 1
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_by_hand():
    """Reference 0, 1, 3 and samples 0.5, 9, 10 on a line, k = 1: balls (0 +- 1, 1 +- 1, 3 +- 2), (.5 +- 8.5, ...)."""
    reference, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0], [10.0]])
    assert radii(reference, 1).tolist() == [1, 1, 2]
    precision, recall = metrics.precision_recall(samples, reference, k=1)
    assert precision == pytest.approx(1 / 3)
    assert recall == 1
    density, coverage = metrics.density_coverage(samples, reference, k=1)
    assert density == pytest.approx(2 / 3)  # 0.5 lies in the first two balls
    assert coverage == pytest.approx(2 / 3)


def test_clip_score_by_hand():
    images, texts = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[2.0, 0], [0, 1], [-1, 0]])
    assert metrics.clip_score(images, texts).mean == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="must pair up"):
        metrics.clip_score(images, texts[:2])


def test_frechet_distance_of_known_gaussians():
    """Of commuting covariances: the sum of squared differences of the deviations and of the means."""
    a, b = torch.tensor([4.0, 9.0, 1.0]).double(), torch.tensor([1.0, 1.0, 16.0]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    first = Gaussian(torch.zeros(3).double(), turn @ a.diag() @ turn.T)
    second = Gaussian(torch.tensor([1.0, 2.0, 2.0]).double(), turn @ b.diag() @ turn.T)
    assert frechet_distance(first, second) == pytest.approx(9 + 1 + 4 + 9, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64, 700])
def test_moments_do_not_depend_on_batches(pair, size):
    whole, parts = Moments.of(pair[0]).gaussian(), Moments.of(pair[0].float().double().split(size)).gaussian()
    torch.testing.assert_close(Moments.of(pair[0].split(size)).gaussian().mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-5, atol=1e-5)
    same = Moments.of(pair[0].split(size)).gaussian()
    torch.testing.assert_close(same.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(same.covariance, np.cov(pair[0].T), rtol=1e-12, atol=1e-12)


def test_moments_far_from_zero_keep_their_digits():
    """Sums of squares would lose all of them: the variance is 1e-14 of the squared mean."""
    x = features(3).float().double() + 1e7
    exact = np.cov((x - 1e7).T)
    np.testing.assert_allclose(Moments.of(x.split(13)).gaussian().covariance, exact, rtol=1e-6, atol=1e-6)


def reduced(processes, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of the rows of every process; the last one has none."""
    share = (
        whole[processes.rank :: processes.world_size - 1] if processes.rank < processes.world_size - 1 else whole[:0]
    )
    moments = Moments.of(share.split(50) if len(share) else [])
    found = moments.reduce().gaussian()
    return found.mean, found.covariance, found.count or 0


def test_moments_of_two_processes_are_those_of_one(pair):
    one = Moments.of(pair[0]).gaussian()
    for mean, covariance, count in run_ranks(reduced, 2, pair[0]):
        assert count == len(pair[0])
        torch.testing.assert_close(mean, one.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(covariance, one.covariance, rtol=1e-12, atol=1e-12)


def test_singular_covariances_are_refused_or_projected():
    few, many = Moments.of(features(1, 30)).gaussian(), Moments.of(features(2, 200)).gaussian()
    for sides in ((few, many), (many, few)):
        with pytest.raises(ValueError, match="a covariance of 40 features from 30 pictures is singular"):
            frechet_distance(*sides)
    axes = many.principal_axes(8)
    assert frechet_distance(few.project(axes), many.project(axes)) > 0
    with pytest.raises(ValueError, match="span at most 29 axes, got 30"):
        few.principal_axes(30)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8).double())
    spread = many.project(axes).covariance.diagonal()
    assert (spread[:-1] >= spread[1:]).all()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        Moments().update(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="differ in number: 2 and 3"):
        frechet_distance(*(Gaussian(torch.zeros(n).double(), torch.eye(n).double()) for n in (2, 3)))


def test_too_few_for_subsets_splits_and_neighbours():
    x = features(1, 5)
    with pytest.raises(ValueError, match=r"subset_size must be within \[2, 5\]"):
        metrics.kernel_distance(x, x, subset_size=6)
    with pytest.raises(ValueError, match=r"splits must be within \[1, 5\]"):
        metrics.inception_score(x, 6)
    with pytest.raises(ValueError, match=r"k must be within \[1, 4\]"):
        radii(x, 5)


def test_copies_are_found_among_new_ones():
    reference, new = features(1, 400).float(), features(5, 50).float()
    samples = torch.cat([new, reference[[7, 300]] + 1e-4])
    found = neighbours(samples, reference)
    assert found.position[-2:].tolist() == [7, 300]
    assert found.summary()["copies"] == 2
    assert found.ratio[:-2].min() > 0.3
    held_out = neighbours(features(11, 200).float() - 1, reference)  # the shift of the seed taken back
    assert 0.8 < held_out.summary()["median_ratio"] < 1.25
    with pytest.raises(ValueError, match="at least 2 different pictures"):
        neighbours(samples, reference[:1].expand(3, -1))


def test_nearest_is_exact_and_can_leave_itself_out():
    x = features(1, 300).float()
    distance, position = nearest(x, x)
    assert distance.abs().max() == 0
    assert position.tolist() == list(range(300))
    _, other = nearest(x, x, own=torch.arange(300))
    full = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
    assert (other == full.argmin(1)).float().mean() > 0.99
