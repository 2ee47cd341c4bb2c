"""The numbers that say how good a model is, on cases whose answer is known without them."""

from functools import partial

from scratchgen import diffusion, improved, vae
from scratchgen.diffusion import make_schedule
from scratchgen.evaluate import metrics
from scratchgen.ops import bernoulli_log_likelihood

import numpy as np
import pytest
from test_diffusion import images, of_x_t
from test_improved import x_0_of

# -------------------------------------------------------------------------------------------- importance-weighted bound


@pytest.fixture
def one_dimensional(rng):
    """encode, decode and x of a small model with D = 1, whose log p(x) can be had by quadrature."""
    w, b = rng.standard_normal((1, 12)), rng.standard_normal(12)
    x = (rng.random((4, 12)) < 0.5).astype(float)

    def encode(x):
        return (0.3 * x.sum(axis=1, keepdims=True) - 2).astype(float), np.full((len(x), 1), -0.4)

    z = np.linspace(-12, 12, 20_001)
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


def test_the_bound_is_the_mean_of_the_weights_of_each_image_with_its_own_draws(rng):
    """log 1/K sum p(x | z) p(z) / q(z | x), weight by weight, for images that have nothing in common."""
    mu, log_var = rng.standard_normal((2, 3, 2))
    x, C = rng.random((3, 2, 2, 1)), rng.standard_normal((2, 4))

    def decode(z):
        return (z @ C).reshape(-1, 2, 2, 1)

    found = metrics.importance_weighted_bound(
        lambda x: (mu, log_var), decode, bernoulli_log_likelihood, x, 6, generators(3)
    )
    for n, rng_of_image in enumerate(generators(3)):
        weights = []
        for eps in rng_of_image.standard_normal((6, 2), dtype=np.float32):
            z = mu[n] + np.exp(log_var[n] / 2) * eps
            p = 1 / (1 + np.exp(-(z @ C)))
            likelihood = np.prod(p ** x[n].ravel() * (1 - p) ** (1 - x[n].ravel()))
            density_q = np.prod(np.exp(-0.5 * eps.astype(float) ** 2) / np.sqrt(2 * np.pi * np.exp(log_var[n])))
            weights.append(likelihood * np.prod(np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)) / density_q)
        assert found[n] == pytest.approx(np.log(np.mean(weights)), rel=1e-5)


def test_active_units():
    mu = np.array([[1.0, 0.0, 5.0, 0.0, 0.0], [-1.0, 0.1, 5.0, 0.199, 0.201]])
    assert metrics.active_units(mu).tolist() == [True, False, False, False, True]  # two numbers 0.2 apart: 0.01
    assert metrics.active_units(np.array([[1.0], [-1.0]]), threshold=1.0).tolist() == [False]  # above, not at


# --------------------------------------------------------------------------------------- the bound of a diffusion model


def test_terms_between_are_the_general_gaussian_divergence(rng, schedule):
    """Against log-density differences averaged over draws of q(x_{t-1} | x_t, x_0), one coordinate at a time."""
    x_0, eps = images(rng, 1, 2, 2, 1), rng.standard_normal((1, 2, 2, 1), dtype=np.float32)
    for t in (2, 57, 200):
        times = np.array([t])
        found = metrics.bound_terms(x_0_of(of_x_t, schedule), schedule, x_0, times, eps)[0]
        x_t = diffusion.q_sample(schedule, x_0, times, eps)
        q_mean, variance = diffusion.q_posterior(schedule, x_0, x_t, times)
        # p_theta's mean, as `p_sample` has it: its step with no noise
        p_mean = diffusion.p_sample(of_x_t, schedule, x_t, t, np.zeros_like(x_t))
        x = q_mean + np.sqrt(variance) * rng.standard_normal((400_000, 2, 2, 1))
        log_ratio = ((x - p_mean) ** 2 - (x - q_mean) ** 2) / (2 * variance)
        values = log_ratio.sum(axis=(1, 2, 3))
        assert found == pytest.approx(values.mean(), abs=5 * values.std() / 400_000**0.5 + 1e-4 * found)


def test_without_a_clip_a_term_is_the_weighted_squared_error(rng, schedule):
    """L_{t-1} = w_t ||eps - eps_theta||^2, for an eps_theta that is made of v: its x_0 is far beyond [-1, 1]."""
    x_0, eps = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    v, t = 3 * rng.standard_normal(x_0.shape, dtype=np.float32), np.array([20, 57, 199])
    eps_theta, x_0_theta = improved.denoiser(lambda params, x_t, t: v, schedule, ["v"])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    assert np.abs(x_0_theta(None, x_t, t)).max(axis=(1, 2, 3)).min() > 1.1
    errors = ((eps - eps_theta(None, x_t, t)).astype(float) ** 2).sum(axis=(1, 2, 3))
    found = metrics.bound_terms(partial(x_0_theta, None), schedule, x_0, t, eps)
    np.testing.assert_allclose(found, metrics.loss_weights(schedule)[t - 2] * errors, rtol=1e-3)


def test_a_perfect_network_leaves_only_the_decoder(rng, schedule):
    x_0 = np.round(255 * rng.random((6, 4, 6, 1))).astype(np.float32) / 127.5 - 1
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    t = np.array([1, 2, 3, 50, 199, 200])
    terms = metrics.bound_terms(x_0_of(lambda x_t, t: eps, schedule), schedule, x_0, t, eps)
    np.testing.assert_allclose(terms[1:5], 0, atol=1e-2)
    assert terms[0] > 1  # even so it cannot know the grey level: sigma is wider than one


def test_terms_need_no_image_at_t_1_and_no_t_2(rng):
    x = images(rng, 3)
    for T, t in ((5, [2, 3, 5]), (1, [1, 1, 1])):
        s = make_schedule("linear", T)
        assert np.isfinite(metrics.bound_terms(x_0_of(of_x_t, s), s, x, np.array(t), x)).all()


def test_the_probabilities_of_all_grey_levels_sum_to_one():
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32).reshape(256, 1, 1, 1)
    for mean, sigma in ((0.0, 0.02), (-0.999, 0.02), (1.0, 0.3), (0.3, 2.0)):
        log_p = metrics.discretised_log_likelihood(levels, np.full(levels.shape, mean, np.float32), sigma)
        assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-6)


def test_a_grey_level_has_what_the_density_has_over_its_bin():
    """Against the integral of the normal density by quadrature, in the middle and far out in a tail."""
    for level, mean, sigma in ((100, -0.2, 0.05), (100, 0.4, 0.05), (100, -0.9, 0.05)):
        x = level / 127.5 - 1
        grid = np.linspace(x - 1 / 255, x + 1 / 255, 20_001)
        exponents = -0.5 * ((grid - mean) / sigma) ** 2
        top = exponents.max()
        expected = top + np.log(np.exp(exponents - top).mean() * (2 / 255) / (sigma * np.sqrt(2 * np.pi)))
        found = metrics.discretised_log_likelihood(np.full((1, 1, 1, 1), x), np.full((1, 1, 1, 1), mean), sigma)
        assert found[0] == pytest.approx(expected, rel=1e-4)


def test_pixels_add_up_and_hopeless_ones_stay_finite():
    x, mean = np.array([[-1.0, 1.0]]).reshape(1, 2, 1, 1), np.array([[1.0, 1.0]]).reshape(1, 2, 1, 1)
    both = metrics.discretised_log_likelihood(x, mean, 1e-3)
    assert both[0] == pytest.approx(np.log(1e-300), abs=1e-3)  # the second pixel is certain


def test_at_t_1_the_decoder_stands_on_the_predicted_image_with_the_second_steps_variance(rng, schedule):
    x_0 = np.round(255 * rng.random((1, 4, 6, 1))).astype(np.float32) / 127.5 - 1
    eps, t = rng.standard_normal(x_0.shape, dtype=np.float32), np.array([1])
    x_1 = diffusion.q_sample(schedule, x_0, t, eps)
    mean = diffusion.predict_x_0(schedule, x_1, t, of_x_t(x_1, t))
    alpha_bar, beta = schedule["alpha_bar"], schedule["beta"]
    sigma = np.sqrt((1 - alpha_bar[1]) / (1 - alpha_bar[2]) * beta[2])
    expected = -metrics.discretised_log_likelihood(x_0, mean, sigma)
    found = metrics.bound_terms(x_0_of(of_x_t, schedule), schedule, x_0, t, eps)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bits_per_dimension():
    assert metrics.bits_per_dimension(8 * 784 * np.log(2), 784) == pytest.approx(8)  # eight bits say one of 256 levels


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


# ---------------------------------------------------------------------------------------------- precision and recall


def test_share_within_on_a_line():
    """The others at 0, 1, 3 and 7 with k = 1 reach 1, 1, 2 and 4 to either side, so from -1 to 5 and from 3 to 11."""
    others = np.array([0.0, 1, 3, 7])[:, None]
    for point, inside in ((-1.01, 0), (-1, 1), (2, 1), (5, 1), (11, 1), (11.01, 0)):
        assert metrics.share_within(np.array([[point]]), others, k=1) == inside
    assert metrics.share_within(np.array([[-2.0], [0], [4], [12]]), others, k=1) == 0.5


@pytest.mark.parametrize(("N", "M", "k", "block"), [(13, 17, 3, 500), (13, 17, 3, 4), (5, 30, 2, 7), (30, 5, 4, 5)])
def test_share_within_is_its_definition(N, M, k, block, rng):
    points, others = (
        rng.standard_normal((N, 3)).astype(np.float32),
        0.7 * rng.standard_normal((M, 3)).astype(np.float32),
    )
    inside = 0
    for point in points:
        for number, other in enumerate(others):
            to_the_rest = sorted(np.linalg.norm(other - rest) for n, rest in enumerate(others) if n != number)
            if np.linalg.norm(point - other) <= to_the_rest[k - 1]:
                inside += 1
                break
    assert 0 < inside < N
    assert metrics.share_within(points, others, k, block) == pytest.approx(inside / N)


def test_torn_pictures_cost_precision_and_a_missing_kind_recall(rng):
    real = np.concatenate([rng.standard_normal((200, 4)), 20 + rng.standard_normal((200, 4))])
    torn, one_kind = rng.standard_normal((200, 4)) + 60, rng.standard_normal((400, 4))
    some_torn = np.concatenate([rng.standard_normal((100, 4)), 20 + rng.standard_normal((100, 4)), torn])
    assert metrics.share_within(some_torn, real) < 0.55 and metrics.share_within(real, some_torn) > 0.8
    assert metrics.share_within(one_kind, real) > 0.8 and metrics.share_within(real, one_kind) < 0.55
