"""The numbers that compare models, on cases whose answer is known without them."""

from scratchgen.evaluate import metrics

import numpy as np
import pytest


def test_active_units():
    mu = np.array([[1.0, 0.0, 5.0, 0.0, 0.0], [-1.0, 0.1, 5.0, 0.199, 0.201]])
    assert metrics.active_units(mu).tolist() == [True, False, False, False, True]  # two numbers 0.2 apart: 0.01
    assert metrics.active_units(np.array([[1.0], [-1.0]]), threshold=1.0).tolist() == [False]  # above, not at


# ---------------------------------------------------------------------------------------------------- Frechet distance


def gaussian_features(mean, covariance, N=500):
    """Features whose sample mean and covariance are exactly these."""
    F = len(mean)
    x = np.random.default_rng(3).standard_normal((N, F))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_distance_of_gaussians_whose_covariances_do_not_commute(rng):
    """tr (C_a C_b)^1/2 from the eigenvalues of the product itself, which is not symmetric."""
    C_a, C_b = (r @ r.T + 0.1 * np.eye(4) for r in rng.standard_normal((2, 4, 4)))
    assert np.abs(C_a @ C_b - C_b @ C_a).max() > 0.1
    cross = np.sqrt(np.linalg.eigvals(C_a @ C_b).real).sum()
    a = gaussian_features(np.zeros(4), C_a)
    b = gaussian_features(np.array([2.0, 0, -3, 1]), C_b)
    expected = 2**2 + 3**2 + 1 + np.trace(C_a) + np.trace(C_b) - 2 * cross
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_with_fewer_images_than_features_and_with_dead_features(rng):
    a = rng.standard_normal((5, 9))
    b = rng.standard_normal((200, 9))
    a[:, 2] = b[:, 2] = 0
    assert np.isfinite(metrics.frechet_distance(a, b)) and metrics.frechet_distance(a, b) > 0


# ---------------------------------------------------------------------------------------------- precision and recall


def test_precision_on_a_line():
    """Real ones at 0, 1, 3 and 7 with k = 1 reach 1, 1, 2 and 4 to either side, so from -1 to 5 and from 3 to 11."""
    real = np.array([0.0, 1, 3, 7])[:, None]
    for points, inside in (([-1.01], 0), ([-1], 1), ([2], 1), ([5], 1), ([11], 1), ([11.01], 0), ([-2, 0, 4, 12], 0.5)):
        assert metrics.precision(real, np.array(points)[:, None], k=1) == inside


def test_by_default_k_is_3_as_help_says():
    """Of 0, 1, 3, 7 and 20 the third nearest are 7, 6, 4, 7 and 19 away: they reach from -7 to 39."""
    real = np.array([0.0, 1, 3, 7, 20])[:, None]
    points = np.array([-7.01, -7, 39, 39.01])[:, None]
    assert metrics.precision(real, points) == metrics.recall(points, real) == 0.5


@pytest.mark.parametrize(("N", "M", "k", "block"), [(13, 17, 3, 500), (13, 17, 3, 4), (5, 30, 2, 7), (30, 5, 4, 5)])
def test_precision_is_its_definition(N, M, k, block, rng):
    generated = rng.standard_normal((N, 3)).astype(np.float32)
    real = 0.7 * rng.standard_normal((M, 3)).astype(np.float32)
    inside = 0
    for point in generated:
        for number, centre in enumerate(real):
            to_the_rest = sorted(np.linalg.norm(centre - rest) for n, rest in enumerate(real) if n != number)
            if np.linalg.norm(point - centre) <= to_the_rest[k - 1]:
                inside += 1
                break
    assert 0 < inside < N
    assert metrics.precision(real, generated, k, block) == pytest.approx(inside / N)


def test_a_missing_kind_costs_recall_alone(rng):
    """Recall is precision the other way round."""
    real = np.concatenate([rng.standard_normal((100, 4)), 20 + rng.standard_normal((100, 4))])
    one_kind = rng.standard_normal((200, 4))
    assert metrics.recall(real, one_kind) == metrics.precision(one_kind, real) < 0.55
    assert metrics.precision(real, one_kind) > 0.8


def test_the_variance_of_samples_is_a_share_of_that_of_real_images(rng):
    """The sum over features counts, not the mean of each one's share; where they are does not."""
    real = rng.standard_normal((50_000, 2)) * [3, 1]
    samples = 7 + rng.standard_normal((40_000, 2)) * [1.5, 2]
    assert metrics.variance_ratio(samples, real) == pytest.approx((1.5**2 + 2**2) / (3**2 + 1), rel=0.03)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_nearest_distance_is_its_definition(block, rng):
    images, others = (rng.integers(0, 256, (N, 4, 6, 1)).astype(np.uint8) for N in (7, 20))
    others[13] = images[5]  # a copy is at no distance
    x, y = images[:, None].astype(float), others[None].astype(float)
    expected = np.sqrt(((x - y) ** 2).mean(axis=(2, 3, 4))).min(axis=1)
    assert expected[5] == 0
    np.testing.assert_allclose(metrics.nearest_distance(images, others, block), expected, rtol=1e-5, atol=0.1)
