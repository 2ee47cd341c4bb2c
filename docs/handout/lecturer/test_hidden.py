"""Tests that are not handed out: what a function has to be on other arguments than those of test_homework.py."""

from math import exp

from scratchgen import diffusion, vae

import numpy as np
import pytest
from test_homework import (
    bayes,
    chain,
    close,
    drawn,
    expect,
    expect_normal,
    images,
    kl_by_quadrature,
    log_likelihood,
    log_normal,
    network,
    schedule_of,
    schedule_with,
    survivals,
)


def test_question_4_reparameterise_of_small_and_large_variances(rng):
    eps = rng.standard_normal((2, 2))
    for v in (-6.0, 0.0, 1.8):
        z = vae.reparameterise(np.full((2, 2), 0.5), np.full((2, 2), v), eps)
        distance = np.sqrt(exp(v)) * np.abs(eps)
        expect(close(np.abs(z - 0.5), distance), f"reparameterise: expected the deviation of log_var = {v}")


def test_question_4_kl_per_dimension_is_zero_at_the_prior_and_grows_from_it():
    kl = vae.kl_per_dimension(np.array([[0.0, 2.0, 0.0, -3.0]]), np.array([[0.0, 0.0, -4.0, 1.5]]))
    expect(abs(kl[0, 0]) < 1e-12, "kl_per_dimension: expected 0 where q is the prior")
    expected = [kl_by_quadrature(*pair) for pair in ((2.0, 0.0), (0.0, -4.0), (-3.0, 1.5))]
    expect(close(kl[0, 1:], expected), "kl_per_dimension: expected the integral of q (log q - log p)")


def test_question_4_bernoulli_log_likelihood_of_any_shape(rng):
    for shape in ((1, 5), (4, 28, 28, 1), (2, 3, 2, 2)):
        logits, x = 2 * rng.standard_normal(shape), rng.random(shape)
        expected = [log_likelihood(*pair) for pair in zip(logits, x, strict=True)]
        expect(close(vae.bernoulli_log_likelihood(logits, x), expected), f"bernoulli_log_likelihood: of shape {shape}")


def test_question_4_elbo_terms_use_the_noise_that_is_given(rng):
    x = rng.random((3, 28, 28, 1))
    mu, log_var = np.full((3, 2), 0.3), np.full((3, 2), -0.7)
    asked = []

    def decode(z):
        asked.append(np.array(z))
        return np.zeros((3, 28, 28, 1)) + z[:, 0].reshape(3, 1, 1, 1)

    for eps in (np.zeros((3, 2)), np.ones((3, 2))):
        vae.elbo_terms(lambda x: (mu, log_var), decode, (x, eps))
    expect(close(asked[0], mu), "elbo_terms: with eps = 0 expected mu to be decoded")
    z = vae.reparameterise(mu, log_var, np.ones((3, 2)))
    expect(close(asked[1], z), "elbo_terms: with eps = 1 expected the z of eps = 1 to be decoded")


def test_question_4_mlp_encode_takes_black_and_white_images(rng):
    for grey in (0, 1):
        mu, log_var = vae.mlp_encode(network(rng, 20), np.full((2, 28, 28, 1), grey, np.float32))
        expect(np.shape(mu) == np.shape(log_var) == (2, 20), "mlp_encode: expected (N, D) for D = 20")
        expect(np.isfinite(mu) & np.isfinite(log_var), "mlp_encode: expected finite numbers")


def test_question_4_mlp_decode_of_20_dimensions(rng):
    logits = vae.mlp_decode(network(rng, 20), rng.standard_normal((3, 20), dtype=np.float32))
    expect(
        np.shape(logits) == (3, 28, 28, 1) and np.isfinite(logits).all(), "mlp_decode: expected (N, 28, 28, 1), finite"
    )


def test_question_4_init_mlp_vae_takes_any_number_of_dimensions(rng):
    for D in (1, 2, 50):
        mu, _ = vae.mlp_encode(vae.init_mlp_vae(rng, D), np.zeros((1, 28, 28, 1), np.float32))
        expect(np.shape(mu) == (1, D), f"init_mlp_vae: expected {D} latent dimensions")


def test_question_5_negative_elbo_is_a_mean_and_no_sum(rng):
    x = rng.random((1, 28, 28, 1))

    def loss(N):
        encode = lambda x: (np.full((len(x), 2), 0.5), np.full((len(x), 2), -1.0))  # noqa: E731
        decode = lambda z: np.zeros((len(z), 28, 28, 1)) + z[:, :1].reshape(-1, 1, 1, 1)  # noqa: E731
        return vae.negative_elbo(encode, decode, (np.repeat(x, N, axis=0), np.ones((N, 2))))[0]

    expect(close(loss(7), loss(1)), "negative_elbo: expected the same loss for seven equal images as for one")


@pytest.mark.parametrize(("n", "extent"), [(2, 1.0), (5, 0.5)])
def test_question_6_plot_latents_of_another_n_and_extent(n, extent):
    asked = []
    drawn(lambda images, z: asked.append(z.copy()), n=n, extent=extent)
    z = np.concatenate(asked)
    for d in (1, 4):
        found = np.unique(np.round(z[:, d], 4))
        words = f"plot_latents: for n = {n} and extent = {extent} expected {n} values from -extent to extent"
        expect(close(found, np.linspace(-extent, extent, n), atol=1e-3), words)


def test_question_7_make_schedule_of_few_steps():
    for T in (1, 2, 50):
        for name in diffusion.SCHEDULES:
            schedule = schedule_of(name, T)
            words = f"make_schedule: alpha_bar for T = {T}"
            expect(close(schedule["alpha_bar"], survivals(schedule), 1e-9, 1e-12), words)


def test_question_7_q_sample_has_the_moments_of_the_chain(rng):
    schedule = schedule_with([0.1, 0.3, 0.2])
    x = np.full(40_000, 0.8)
    for beta in (0.1, 0.3):
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.shape)
    x_0, eps = np.full((40_000, 1, 1, 2), 0.8), rng.standard_normal((40_000, 1, 1, 2))
    found = diffusion.q_sample(schedule, x_0, np.full(40_000, 2), eps)
    right = abs(found.mean() - x.mean()) < 0.02 and abs(found.var() - x.var()) < 0.02
    expect(right, "q_sample: expected mean and variance of draws that take the steps one by one")


def test_question_8_prior_kl_of_float32_images_is_computed_in_float64(rng):
    x_0 = rng.uniform(-1, 1, (4, 28, 28, 1)).astype(np.float32)
    schedule = schedule_of("linear", 200)
    one = diffusion.prior_kl(schedule, x_0)
    expect(close(one, diffusion.prior_kl(schedule, x_0.astype(np.float64)), 1e-3, 1e-5), "prior_kl: expected float64")
    left = survivals(schedule)[-1]
    m, v = np.sqrt(left) * x_0.reshape(4, -1).astype(np.float64), 1 - left
    expected = [sum(kl_of_normal(mean, v) for mean in image) for image in m]
    expect(close(one, expected, 1e-3, 1e-5), "prior_kl: expected the sum over pixels of their divergences")


def kl_of_normal(mean, variance):
    """D_KL(N(mean, variance) || N(0, 1)), as a mean over q by Gauss-Hermite points, which is exact."""
    points, weights = np.polynomial.hermite_e.hermegauss(4)
    y = mean + np.sqrt(variance) * points
    return np.sum(weights * (log_normal(y, mean, variance) - log_normal(y, 0, 1))) / np.sqrt(2 * np.pi)


def test_question_9_q_posterior_of_several_channels_and_any_betas(rng):
    schedule = schedule_with([0.1, 0.5, 0.02, 0.9])
    x_0, x_t = rng.uniform(-1, 1, (2, 3, 2, 2, 3))
    t = np.array([4, 2, 3])
    mean, variance = diffusion.q_posterior(schedule, x_0, x_t, t)
    for n in range(3):
        numbers = (float(a[n, 1, 0, 2]) for a in (x_0, x_t, mean))
        far = bayes(schedule, t[n], *numbers, float(np.ravel(variance[n])[0]))
        expect(far < 1e-4, "q_posterior: expected the Gaussian of Eqs. (4) to (6) for other betas")


def test_question_10_gaussian_kl_is_zero_for_equal_gaussians_only():
    found = diffusion.gaussian_kl(
        np.array([0.3, 0.3]), np.array([2.0, 2.0]), np.array([0.3, 0.4]), np.array([2.0, 2.0])
    )
    expect(abs(found[0]) < 1e-12 and found[1] > 0, "gaussian_kl: expected 0 for equal Gaussians, and only for these")


def test_question_11_draw_batch_of_one_image_and_one_step(rng):
    _, t, eps = diffusion.draw_batch(schedule_of("linear", 1), images(rng, 1, 3, 3, 2), rng)
    expect(np.shape(t) == (1,) and t[0] == 1 and np.shape(eps) == (1, 3, 3, 2), "draw_batch: of one image, with T = 1")


def test_question_11_squared_errors_tell_images_apart(rng):
    eps = rng.standard_normal((3, 4, 4, 1))
    found = diffusion.squared_errors(eps, eps - np.array([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1))
    expect(close(found, [0.0, 1.0, 4.0]), "squared_errors: expected 0, 1 and 4 for errors of 0, 1 and 2 at each pixel")


def test_question_11_simple_loss_is_zero_for_the_true_noise(rng):
    x_0, t, eps = images(rng, 5), np.array([1, 2, 50, 100, 200]), rng.standard_normal((5, 4, 6, 1))
    loss, _ = diffusion.simple_loss(lambda x_t, t: eps, schedule_of("linear", 200), (x_0, t, eps))
    expect(abs(loss) < 1e-8, "simple_loss: expected 0 where the true noise is predicted")


def test_question_12_predict_x_0_of_other_betas(rng):
    schedule = schedule_with([0.1, 0.5, 0.02])
    x_0, eps, t = rng.uniform(-1, 1, (3, 2, 2, 2)), rng.standard_normal((3, 2, 2, 2)), np.array([3, 1, 2])
    found = diffusion.predict_x_0(schedule, diffusion.q_sample(schedule, x_0, t, eps), t, eps)
    expect(close(found, x_0, 1e-4, 1e-4), "predict_x_0: expected the x_0 of Eq. (7) for other betas")


def test_question_12_p_sample_of_other_betas(rng):
    schedule = schedule_with([0.1, 0.5, 0.02])
    x_0, eps = np.full((1, 1, 1, 1), 0.4), np.full((1, 1, 1, 1), -0.7)
    x_3 = diffusion.q_sample(schedule, x_0, np.array([3]), eps)
    steps = (diffusion.p_sample(lambda *_: eps, schedule, x_3.copy(), 3, z * np.ones_like(eps)) for z in (0, 1))
    mean, above, x = (float(np.ravel(step)[0]) for step in (*steps, x_3))
    expect(above > mean, "p_sample: expected noise to be added")
    far = bayes(schedule, 3, 0.4, x, mean, (above - mean) ** 2)
    expect(far < 1e-3, "p_sample: expected a draw from q(x_{t-1} | x_t, x_0) for other betas")


def test_question_12_sample_of_one_step_and_the_spread_of_many(rng):
    x_T = rng.standard_normal((1, 2, 2, 1))
    found = chain(lambda x_t, t: 0.1 * x_t, schedule_of("linear", 1), x_T, 0)
    expect([t for t, _ in found] == [0], "sample: expected one pair for T = 1")
    schedule = schedule_of("linear", 50)
    left = survivals(schedule)
    x_T = rng.standard_normal((50, 10, 10, 1))
    gaussian = lambda x_t, t: np.sqrt(1 - left[int(t[0])]) * x_t / (1 - 0.96 * left[int(t[0])])  # noqa: E731
    _, x = chain(gaussian, schedule, x_T, 1)[-1]  # the noise to expect where pixels of images are N(0, 0.04)
    expect(0.15 < x.std() < 0.21, "sample: expected it to reproduce the spread of Gaussian images, a little below")
    expect_normal(x / x.std(), "sample: of Gaussian images expected Gaussian images")
