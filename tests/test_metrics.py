"""The numbers that say how good a model is, on cases whose answer is known without them."""

from functools import partial

from scratchgen import metrics, vae
from scratchgen.ops import bernoulli_log_likelihood

import numpy as np
import pytest

# ---------------------------------------------------------------------------------------------------- Frechet distance


def gaussian_features(mean, covariance, N=500):
    """Features whose sample mean and covariance are exactly these."""
    F = len(mean)
    x = np.random.default_rng(3).standard_normal((N, F))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_distance_of_a_set_from_itself_is_zero(rng):
    x = rng.standard_normal((50, 7))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_distance_of_diagonal_gaussians(rng):
    """There it is the sum over dimensions of (m_a - m_b)^2 + (s_a - s_b)^2."""
    (m_a, m_b), (s_a, s_b) = rng.standard_normal((2, 5)), rng.random((2, 5)) + 0.1
    a, b = (gaussian_features(m, np.diag(s**2)) for m, s in ((m_a, s_a), (m_b, s_b)))
    expected = ((m_a - m_b) ** 2).sum() + ((s_a - s_b) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_with_covariances_that_do_not_commute(rng):
    """tr (C_a C_b)^1/2 from the eigenvalues of the product itself, which is not symmetric."""
    C_a, C_b = (r @ r.T + 0.1 * np.eye(4) for r in rng.standard_normal((2, 4, 4)))
    assert np.abs(C_a @ C_b - C_b @ C_a).max() > 0.1
    cross = np.sqrt(np.linalg.eigvals(C_a @ C_b).real).sum()
    a, b = gaussian_features(np.zeros(4), C_a), gaussian_features(np.ones(4), C_b)
    expected = 4 + np.trace(C_a) + np.trace(C_b) - 2 * cross
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_distance_with_fewer_images_than_features_and_with_dead_features(rng):
    a, b = rng.standard_normal((5, 9)), rng.standard_normal((200, 9))
    a[:, 2] = b[:, 2] = 0
    assert np.isfinite(metrics.frechet_distance(a, b)) and metrics.frechet_distance(a, b) > 0


# -------------------------------------------------------------------------------------------- importance-weighted bound


@pytest.fixture
def one_dimensional(rng):
    """encode, decode and x of a small model with D = 1, whose log p(x) can be had by quadrature."""
    w, b = rng.standard_normal((1, 12)), rng.standard_normal(12)
    x = (rng.random((4, 12)) < 0.5).astype(float)

    def encode(x):
        return (0.3 * x.sum(axis=1, keepdims=True) - 2).astype(float), np.full((len(x), 1), -0.4)

    z = np.linspace(-12, 12, 20_001)
    log_joint = bernoulli_log_likelihood((z[:, None] * w + b)[:, None], x[None])  # (z, 12) against each x
    log_joint = np.stack([bernoulli_log_likelihood(z[:, None] * w + b, xn) for xn in x], axis=1)
    log_joint += (-0.5 * z**2 - 0.5 * np.log(2 * np.pi))[:, None]
    exact = np.log(np.exp(log_joint).sum(axis=0) * (z[1] - z[0]))
    return encode, lambda z: z @ w + b, x, exact


def generators(N, seed=0):
    return [np.random.default_rng([seed, n]) for n in range(N)]


def iwae(model, K, seed=0, **options):
    encode, decode, x, _ = model
    return metrics.importance_weighted_bound(
        encode, decode, bernoulli_log_likelihood, x, K, generators(len(x), seed), **options
    )


def test_many_samples_give_the_likelihood(one_dimensional):
    np.testing.assert_allclose(iwae(one_dimensional, 20_000), one_dimensional[3], atol=0.02)


def test_one_sample_gives_the_elbo_and_more_give_more(one_dimensional):
    encode, decode, x, exact = one_dimensional
    runs = {K: np.mean([iwae(one_dimensional, K, seed) for seed in range(300)], axis=0) for K in (1, 5)}
    eps = np.random.default_rng(9).standard_normal((100_000, 1))
    for n in range(len(x)):
        one = np.broadcast_to(x[n], (len(eps), 12))
        reconstruction, kl = vae.elbo_terms(encode, decode, (one, eps))
        assert runs[1][n] == pytest.approx((reconstruction - kl).mean(), abs=0.15)
    assert np.all(runs[1] < runs[5]) and np.all(runs[5] < exact + 0.05)


def test_blocks_do_not_matter(one_dimensional):
    whole, parts = (iwae(one_dimensional, 50, block=block) for block in (50, 7))
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


def test_tiny_likelihoods_do_not_underflow(one_dimensional):
    encode, decode, x, _ = one_dimensional
    shifted = metrics.importance_weighted_bound(
        encode, decode, lambda l, x: bernoulli_log_likelihood(l, x) - 5000, x, 20, generators(len(x))
    )
    np.testing.assert_allclose(shifted + 5000, iwae(one_dimensional, 20), rtol=1e-6)


def test_it_takes_the_images_and_networks_of_the_vae(rng):
    init, encode, decode = vae.VAES["mlp"]
    params, x = init(rng, 3), rng.random((2, 28, 28, 1), dtype=np.float32)
    found = metrics.importance_weighted_bound(
        partial(encode, params), partial(decode, params), bernoulli_log_likelihood, x, 6, generators(2), block=4
    )
    assert found.shape == (2,) and np.isfinite(found).all()


def test_active_units():
    mu = np.array([[1.0, 0.0, 5.0], [-1.0, 0.1, 5.0]])
    assert metrics.active_units(mu).tolist() == [True, False, False]


def test_bits_per_dimension():
    assert metrics.bits_per_dimension(8 * 784 * np.log(2), 784) == pytest.approx(8)  # eight bits say one of 256 levels
