"""The claims of docs/homework.md, question by question: each test would fail were the claim, or our formula, false.

Where the package's code is on trial, what it is compared with is worked out here in another way: by matrix algebra on
joint Gaussians, by quadrature, by exact fractions, by Monte Carlo. Some claims are mathematics alone.
"Eq." is the sheet's; the rest of the package has the numbers of the paper.
"""

import importlib
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

from scratchgen import diffusion, vae
from scratchgen.diffusion import make_schedule
from scratchgen.evaluate import metrics
from scratchgen.gradients import value_and_grad
from scratchgen.machinery import plots
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest

SCHEDULES = [make_schedule(name, 200) for name in diffusion.SCHEDULES]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=diffusion.SCHEDULES)


def unscaled(T):
    """The paper's betas of 1000 steps, 1e-4 to 0.02, over T steps as they are; only what `prior_kl` needs."""
    return {"alpha_bar": np.cumprod(1 - np.concatenate([[0], np.linspace(1e-4, 0.02, T)]))}


# ------------------------------------------------------------------------------------------------------- 1: the ELBO


def affine(weight, bias):
    """A decoder of two pixels from one latent dimension: everything about it can be integrated on a line."""
    return lambda z: (z * weight + bias).reshape(len(z), 1, 2, 1)


def test_question_1_the_elbo_is_log_p_minus_the_kl_to_the_true_posterior(rng):
    x = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    weight, bias = np.array([1.5, -0.8]), np.array([0.3, 0.1])
    mu, log_var = np.array([[0.4]]), np.array([[-0.6]])

    z = np.linspace(-12, 12, 40_001)
    dz = z[1] - z[0]
    p = 1 / (1 + np.exp(-(z[:, None] * weight + bias)))
    likelihood = (1 - p[:, 0]) * p[:, 1]
    prior = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    evidence = np.sum(likelihood * prior) * dz
    variance = np.exp(log_var[0, 0])
    q = np.exp(-0.5 * (z - mu[0, 0]) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    kl_to_posterior = np.sum(q * np.log(np.maximum(q, 1e-300) * evidence / (likelihood * prior + 1e-300))) * dz

    N = 400_000
    batch = np.repeat(x, N, axis=0), rng.standard_normal((N, 1))
    reconstruction, kl = vae.elbo_terms(lambda x: (mu, log_var), affine(weight, bias), batch)
    elbo, error = np.mean(reconstruction) - np.mean(kl), np.std(reconstruction) / np.sqrt(N)
    assert abs(elbo - (np.log(evidence) - kl_to_posterior)) < 4 * error
    assert elbo < np.log(evidence) - 10 * error  # a bound, and with this q a strict one


def test_question_1_the_first_term_alone_wants_a_code_without_spread(rng):
    """log p(x | z) is concave in z for this decoder, so by Jensen's inequality spread about mu can only cost."""
    x, eps = rng.random((50, 1, 2, 1)), rng.standard_normal((50, 1))
    mu, decode = rng.standard_normal((50, 1)), affine(np.array([1.5, -0.8]), np.array([0.3, 0.1]))

    def first_term(log_var):
        encode = lambda x: (mu, np.full((50, 1), log_var))  # noqa: E731
        return sum(vae.elbo_terms(encode, decode, (x, sign * eps))[0] for sign in (1, -1)) / 2

    narrow, middle, wide = first_term(-20.0), first_term(-1.0), first_term(0.0)
    assert np.all(narrow > middle) and np.all(middle > wide)


def test_question_1_the_second_term_alone_wants_every_code_to_be_the_prior(rng):
    """It is zero for mu = 0 and sigma = 1, and positive elsewhere: then z says nothing about x."""
    mu, log_var = rng.standard_normal((1000, 3)), rng.standard_normal((1000, 3))
    assert np.all(vae.kl_per_dimension(mu, log_var) > 0)
    assert np.all(vae.kl_per_dimension(np.zeros((1, 3)), np.zeros((1, 3))) == 0)


def test_question_1_beta_trades_one_term_for_the_other(rng):
    """A small VAE learns 64 random images; the larger beta is, the lower both its KL and its first term end."""
    x, eps_seed = (rng.random((64, 1, 6, 1)) < 0.5).astype(np.float32), 5
    terms = []
    for beta in (0, 1, 20):
        start = np.random.default_rng(1)
        params = {
            name: 0.5 * start.standard_normal(shape).astype(np.float32)
            for name, shape in {"mu": (6, 2), "log_var": (6, 2), "decode": (2, 6)}.items()
        }

        def loss(params, batch, beta=beta):
            encode = lambda x: (x.reshape((64, 6)) @ params["mu"], x.reshape((64, 6)) @ params["log_var"])  # noqa: E731
            return vae.negative_elbo(encode, lambda z: (z @ params["decode"]).reshape((64, 1, 6, 1)), batch, beta)

        noise, moments = np.random.default_rng(eps_seed), init_moments(params)
        for step in range(1, 301):
            batch = x, noise.standard_normal((64, 2), dtype=np.float32)
            (_, parts), gradient = value_and_grad(loss)(params, batch)
            adam_step(params, gradient, moments, step, 0.02)
        terms.append((parts["kl"], parts["reconstruction"]))
    (kl_0, first_0), (kl_1, first_1), (kl_20, first_20) = terms
    assert kl_0 > 2 * kl_1 and kl_1 > 2 * kl_20 and kl_20 < 0.05
    assert first_0 > first_1 > first_20


# ------------------------------------------------------------------------------------- 2: means and variances of codes
# The counterexample: z ~ N(0, 1); an image is a coin s and a pixel y, z + N(0, 1) where s = 1 and 0 where s = 0.
# Its exact posterior, and so its perfect encoder, is N(0, 1) for s = 0, and N(y / 2, 1/2) with y / 2 ~ N(0, 1/2) else.


def encode_counterexample(s, y):
    """mu and log sigma^2, as (N, 1) each."""
    return np.where(s, y / 2, 0), np.where(s, np.log(0.5), 0)


def draw_counterexample(rng, N):
    s, z = rng.random((N, 1)) < 0.5, rng.standard_normal((N, 1))
    return s, np.where(s, z + rng.standard_normal((N, 1)), 0)


def test_question_2_the_encoder_of_the_counterexample_is_exact():
    """Bayes' rule on a grid of z, for s = 1: prior times N(y; z, 1)."""
    z = np.linspace(-12, 12, 20_001)
    for y in (-2.3, 0.4, 3.0):
        posterior = np.exp(-0.5 * z**2 - 0.5 * (y - z) ** 2)
        posterior /= posterior.sum()
        mu, log_var = encode_counterexample(True, y)
        assert (posterior * z).sum() == pytest.approx(mu, abs=1e-9)
        assert (posterior * (z - mu) ** 2).sum() == pytest.approx(np.exp(log_var), rel=1e-9)


def gaussian_moment(n, variance):
    """E[y^n] of y ~ N(0, variance): (n - 1)!! variance^(n / 2) for even n."""
    return Fraction(0) if n % 2 else Fraction(variance) ** (n // 2) * math.prod(range(n - 1, 0, -2))


def test_question_2_every_moment_of_z_is_the_priors_and_not_every_one_of_mu():
    """In exact fractions: z = mu + sigma eps of the second half has sum_k (n over k) E[mu^k] E[(sigma eps)^(n - k)]."""
    half = Fraction(1, 2)
    moments_of_mu = []
    for n in range(13):
        second = sum(math.comb(n, k) * gaussian_moment(k, half) * gaussian_moment(n - k, half) for k in range(n + 1))
        assert half * gaussian_moment(n, 1) + half * second == gaussian_moment(n, 1)
        moments_of_mu.append(half * (n == 0) + half * gaussian_moment(n, half))
    variance, fourth = moments_of_mu[2], moments_of_mu[4]
    assert variance == Fraction(1, 4)  # not 1: decoding the means alone covers a quarter of the prior's variance
    assert fourth / variance**2 == 6  # 3 for every Gaussian


def test_question_2_the_characteristic_function_of_z_is_the_priors_and_that_of_mu_tells_of_an_atom():
    mu = np.linspace(-9, 9, 100_001)
    density = np.exp(-(mu**2)) / np.sqrt(np.pi)  # N(0, 1/2)
    for u in (0.1, 0.5, 1.0, 2.0, 5.0, 12.0):
        of_second_mu = np.sum(np.cos(u * mu) * density) * (mu[1] - mu[0])
        of_z = 0.5 * np.exp(-0.5 * u**2) + 0.5 * of_second_mu * np.exp(-0.25 * u**2)
        assert of_z == pytest.approx(np.exp(-0.5 * u**2), abs=1e-12)
    # A Gaussian's falls to 0. This one stays at the mass of the atom at 0, one half.
    assert 0.5 + 0.5 * of_second_mu == pytest.approx(0.5, abs=1e-12)


def test_question_2_codes_drawn_by_the_vaes_own_code_agree(rng):
    N = 400_000
    mu, log_var = encode_counterexample(*draw_counterexample(rng, N))
    z = vae.reparameterise(mu, log_var, rng.standard_normal((N, 1)))
    for n in range(1, 7):
        moment, error = np.mean(z**n), np.std(z**n) / np.sqrt(N)
        assert abs(moment - float(gaussian_moment(n, 1))) < 4 * error
    assert np.mean(mu == 0) == pytest.approx(0.5, abs=0.01)
    assert mu.var() == pytest.approx(0.25, abs=0.01)  # var z = var mu + E[sigma^2] = 1/4 + 3/4


def test_question_2_with_one_sigma_for_all_images_the_means_are_gaussian(rng):
    """mu ~ N(0, 1 - sigma^2) gives z ~ N(0, 1); two values of mu with that variance do not."""
    N, sigma = 400_000, 0.6
    spread, log_var = np.sqrt(1 - sigma**2), np.full((N, 1), 2 * np.log(sigma))
    gaussian, two_values = spread * rng.standard_normal((N, 1)), spread * np.sign(rng.standard_normal((N, 1)))

    def moments_of_z(mu):
        z = vae.reparameterise(mu, log_var, rng.standard_normal((N, 1)))
        return [np.mean(z**2), np.mean(z**4)]

    np.testing.assert_allclose(moments_of_z(gaussian), [1, 3], rtol=0.03)
    # The fourth moment of two values is (1 - sigma^2)^2, a Gaussian's three times that.
    np.testing.assert_allclose(moments_of_z(two_values), [1, 3 - 2 * (1 - sigma**2) ** 2], rtol=0.03)


def test_question_2_decoding_means_alone_misses_the_distribution_of_the_data(rng):
    """A pixel with s = 1 is its code plus unit noise: of variance 2 from codes, as in the data, but 5/4 from means."""
    s, y = draw_counterexample(rng, 400_000)
    mu, log_var = encode_counterexample(s, y)
    z = vae.reparameterise(mu, log_var, rng.standard_normal(mu.shape))
    noise = rng.standard_normal(mu.shape)
    assert y[s].var() == pytest.approx(2, abs=0.03)
    assert (z + noise).var() == pytest.approx(2, abs=0.03)
    assert (mu + noise).var() == pytest.approx(1.25, abs=0.02)


# ------------------------------------------------------------------------------------------------- 3: autoencoders


def test_question_3_an_autoencoder_may_put_its_codes_anywhere(rng):
    """Move all codes and let the decoder move them back: reconstructions and the loss of beta = 0 do not notice."""
    x = rng.random((40, 1, 6, 1))
    A, B = rng.standard_normal((6, 2)), rng.standard_normal((2, 6))
    turn, shift = np.array([[0.0, 5.0], [-5.0, 0.0]]), np.array([30.0, -10.0])
    log_var = np.full((40, 2), -80.0)  # sigma = 4e-18: deterministic

    def plain(z):
        return (z @ B).reshape(len(z), 1, 6, 1)

    def moved(z):
        return plain((z - shift) @ np.linalg.inv(turn))

    code = x.reshape(40, 6) @ A
    first, second = (lambda x: (code, log_var)), (lambda x: (code @ turn + shift, log_var))
    batch = x, rng.standard_normal((40, 2))
    loss, other_loss = vae.negative_elbo(first, plain, batch, 0)[0], vae.negative_elbo(second, moved, batch, 0)[0]
    assert other_loss == pytest.approx(loss, rel=1e-9)

    z = rng.standard_normal((2000, 2))
    assert np.abs(vae.generate(plain, z).mean(axis=0) - vae.generate(moved, z).mean(axis=0)).max() > 0.2
    assert vae.negative_elbo(second, moved, batch, 1)[0] > vae.negative_elbo(first, plain, batch, 1)[0] + 100


# ------------------------------------------------------------------------------------------------- 4 to 6: the VAE
# The networks, their gradients and the training loop have tests of their own, in test_vae.py and test_runs.py.


def test_question_6_all_dimensions_but_two_are_zero_and_those_run_over_the_grid():
    asked = []

    def decode(z):
        asked.append(z)
        return np.zeros((len(z), 28, 28, 1))

    plots.plot_latents(decode, 20, 3, 17)
    z = np.concatenate(asked)
    others = [d for d in range(20) if d not in (3, 17)]
    assert z.shape == (100, 20) and np.all(z[:, others] == 0)
    ticks = np.linspace(-3, 3, 10, dtype=np.float32)
    assert {(a, b) for a, b in z[:, [3, 17]].tolist()} == {(a, b) for a in ticks.tolist() for b in ticks.tolist()}


# -------------------------------------------------------------------------------------------- 7: q(x_t | x_0)


@each_schedule
def test_question_7_the_recursion_gives_the_closed_form(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise: follow the factor of x_0 and the variance."""
    factor, variance = 1.0, 0.0
    one = np.ones((1, 1, 1, 1))
    for t in range(1, 201):
        beta = schedule["beta"][t]
        factor, variance = np.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        assert abs(schedule["sqrt_alpha_bar"][t] - factor) < 1e-12
        assert abs(schedule["sqrt_one_minus_alpha_bar"][t] ** 2 - variance) < 1e-12
        at_t = np.array([t])
        assert diffusion.q_sample(schedule, one, at_t, 0 * one) == pytest.approx(factor, rel=1e-6)
        assert diffusion.q_sample(schedule, 0 * one, at_t, one) == pytest.approx(np.sqrt(variance), rel=1e-6)


# -------------------------------------------------------------------------------- 8: the KL of q(x_T | x_0) to N(0, I)


def test_question_8_the_kl_is_the_general_formula_and_monte_carlo_agrees(rng):
    alpha_bar = 0.3
    s = {"alpha_bar": np.array([1, alpha_bar])}
    x_0 = rng.uniform(-1, 1, (1, 2, 3, 1))
    x, d = x_0.ravel(), 6
    m, S = np.sqrt(alpha_bar) * x, (1 - alpha_bar) * np.eye(6)
    general = 0.5 * (np.trace(S) + m @ m - d - np.linalg.slogdet(S)[1])  # D_KL(N(m, S) || N(0, I))
    found = diffusion.prior_kl(s, x_0)[0]
    assert found == pytest.approx(general, rel=1e-12)

    draws = m + np.sqrt(1 - alpha_bar) * rng.standard_normal((300_000, 6))
    log_ratio = 0.5 * (draws**2).sum(axis=1) - 0.5 * ((draws - m) ** 2).sum(axis=1) / (1 - alpha_bar)
    log_ratio -= 0.5 * d * np.log(1 - alpha_bar)
    assert abs(found - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(draws))


def test_question_8_it_falls_to_zero_as_T_grows(rng):
    """For betas that do not change, as in the question, and for the paper's."""
    x_0 = rng.uniform(-1, 1, (1, 28, 28, 1))
    constant = [diffusion.prior_kl({"alpha_bar": 0.98 ** np.arange(T + 1)}, x_0)[0] for T in (50, 100, 200, 400, 800)]
    paper = [diffusion.prior_kl(unscaled(T), x_0)[0] for T in (50, 200, 500, 1000)]
    for values in (constant, paper):
        assert np.all(np.diff(values) < 0)
    # -log(1 - a) = a + a^2 / 2 + ..: the terms in d alpha_bar cancel, and alpha_bar ||x_0||^2 / 2 is left.
    assert constant[-1] == pytest.approx(0.5 * 0.98**800 * (x_0**2).sum(), rel=1e-3)


def test_question_8_the_betas_of_1000_steps_over_200_do_not_end_in_noise():
    """The pixels of the test images have root mean square 0.824."""
    s, typical = unscaled(200), np.full((1, 28, 28, 1), 0.824)
    assert s["alpha_bar"][-1] == pytest.approx(0.13, abs=0.005)
    assert diffusion.prior_kl(s, typical)[0] == pytest.approx(38.9, abs=0.2)
    assert diffusion.prior_kl(make_schedule("linear", 200), typical)[0] < 0.01


# -------------------------------------------------------------------------------------------- 9: the reverse step


def by_bayes_rule(beta, before, x_0, x_t):
    """Mean and variance of x_{t-1} given x_t and x_0 from their joint Gaussian; ``before`` is alpha_bar_{t-1}."""
    # x_{t-1} = sqrt(before) x_0 + sqrt(1 - before) e_1 and x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e_2.
    A = np.array([[np.sqrt(1 - before), 0], [np.sqrt((1 - beta) * (1 - before)), np.sqrt(beta)]])
    covariance = A @ A.T
    mean = np.sqrt(before) * x_0 * np.array([1, np.sqrt(1 - beta)])
    gain = covariance[0, 1] / covariance[1, 1]
    return mean[0] + gain * (x_t - mean[1]), covariance[0, 0] - gain * covariance[1, 0]


@each_schedule
def test_question_9_mean_and_variance_are_bayes_rule_on_the_joint_gaussian(schedule):
    x_0, x_t, pixel = 0.37, -0.81, np.ones((1, 1, 1, 1))
    for t in range(2, 201):
        mean, variance = by_bayes_rule(schedule["beta"][t], np.prod(1 - schedule["beta"][1:t]), x_0, x_t)
        found_mean, found_variance = diffusion.q_posterior(schedule, x_0 * pixel, x_t * pixel, np.array([t]))
        assert found_mean == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert found_variance == pytest.approx(variance, rel=1e-5)
        exact = schedule["posterior_x_0"][t] * x_0 + schedule["posterior_x_t"][t] * x_t
        assert exact == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert schedule["posterior_variance"][t] == pytest.approx(variance, rel=1e-9)


@each_schedule
def test_question_9_the_mean_in_terms_of_the_noise(schedule, rng):
    """(x_t - beta_t / sqrt(1 - alpha_bar_t) eps_t) / sqrt(alpha_t), with the eps_t of Eq. (7)."""
    pixel = np.ones((1, 1, 1, 1), np.float32)
    for t in range(2, 201):
        alpha, beta, before = 1 - schedule["beta"][t], schedule["beta"][t], np.prod(1 - schedule["beta"][1:t])
        x_0, eps = rng.uniform(-1, 1), rng.standard_normal()
        x_t = np.sqrt(alpha * before) * x_0 + np.sqrt(1 - alpha * before) * eps
        expected, _ = by_bayes_rule(beta, before, x_0, x_t)
        assert (x_t - beta / np.sqrt(1 - alpha * before) * eps) / np.sqrt(alpha) == pytest.approx(expected, abs=1e-9)
        if schedule["sqrt_alpha_bar"][t] > 1e-3:  # else float32 knows no better; `p_sample` takes the same step
            found = diffusion.p_sample(lambda x_t, t, eps=eps: eps * pixel, schedule, x_t * pixel, t, 0 * pixel)
            assert found == pytest.approx(expected, abs=2e-4)


def test_question_9_without_x_0_the_reverse_step_is_a_mixture_and_no_gaussian():
    """Data of two values, one large step: Bayes' rule on a grid gives the mixture of two `q_posterior`s."""
    s = make_schedule("linear", 20)
    t, x_t, x_0 = 4, 0.05, np.array([-1.0, 1.0])
    x = np.linspace(-6, 6, 24_001)
    dx = x[1] - x[0]

    def normal(x, mean, variance):
        return np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)

    before = s["alpha_bar"][t - 1]
    prior = 0.5 * sum(normal(x, np.sqrt(before) * value, 1 - before) for value in x_0)
    exact = prior * normal(x_t, np.sqrt(s["alpha"][t]) * x, s["beta"][t])
    exact /= exact.sum() * dx

    weights = normal(x_t, s["sqrt_alpha_bar"][t] * x_0, s["sqrt_one_minus_alpha_bar"][t] ** 2)
    weights /= weights.sum()
    means, variance = diffusion.q_posterior(s, x_0.reshape(2, 1, 1, 1), np.full((2, 1, 1, 1), x_t), np.full(2, t))
    mixture = sum(w * normal(x, m, variance[0, 0, 0, 0]) for w, m in zip(weights, means.ravel(), strict=True))
    np.testing.assert_allclose(mixture, exact, atol=1e-5)

    mean = np.sum(x * exact) * dx
    second, fourth = (np.sum((x - mean) ** n * exact) * dx for n in (2, 4))
    kurtosis = fourth / second**2
    assert kurtosis == pytest.approx(kurtosis_of_reverse_step(s, t, x_t), abs=1e-3)
    assert kurtosis < 2.5  # 3 for every Gaussian, and nearly that where steps are small, at the same level of noise:
    fine = make_schedule("linear", 1000)
    same_noise = np.argmin(np.abs(fine["alpha_bar"] - s["alpha_bar"][t]))
    assert kurtosis_of_reverse_step(fine, same_noise, x_t) == pytest.approx(3, abs=0.01)


def kurtosis_of_reverse_step(s, t, x_t):
    """Fourth central moment over squared variance of q(x_{t-1} | x_t) for x_0 = -1 or 1, in closed form."""
    p = 1 / (1 + np.exp(-2 * s["sqrt_alpha_bar"][t] * x_t / s["sqrt_one_minus_alpha_bar"][t] ** 2))  # of x_0 = 1
    weights, v = np.array([p, 1 - p]), s["posterior_variance"][t]
    deviations = s["posterior_x_0"][t] * (np.array([1, -1]) - (2 * p - 1))
    second = weights @ (deviations**2 + v)
    fourth = weights @ (deviations**4 + 6 * deviations**2 * v + 3 * v**2)
    return fourth / second**2


# ------------------------------------------------------------------------------ 10: the KL of the reverse step


def general_kl(m_1, S_1, m_2, S_2):
    """D_KL(N(m_1, S_1) || N(m_2, S_2)), by matrices."""
    inverse = np.linalg.inv(S_2)
    log_ratio = np.linalg.slogdet(S_2)[1] - np.linalg.slogdet(S_1)[1]
    return 0.5 * (np.trace(inverse @ S_1) - len(m_1) + (m_2 - m_1) @ inverse @ (m_2 - m_1) + log_ratio)


def test_question_10_the_general_formula_is_the_expected_log_ratio(rng):
    """For covariances that are not diagonal, by Monte Carlo."""
    A, B = rng.standard_normal((2, 3, 3))
    m_1, S_1, m_2, S_2 = rng.standard_normal(3), A @ A.T + np.eye(3), rng.standard_normal(3), B @ B.T + np.eye(3)
    x = m_1 + rng.standard_normal((400_000, 3)) @ np.linalg.cholesky(S_1).T

    def log_density(m, S):
        return -0.5 * np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(S), x - m) - 0.5 * np.linalg.slogdet(S)[1]

    log_ratio = log_density(m_1, S_1) - log_density(m_2, S_2)
    assert abs(general_kl(m_1, S_1, m_2, S_2) - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(x))


def test_question_10_gaussian_kl_is_the_general_formula_for_diagonal_covariances(rng):
    m_1, m_2 = rng.standard_normal((2, 5))
    v_1, v_2 = np.exp(rng.standard_normal((2, 5)))
    expected = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_2))
    assert metrics.gaussian_kl(m_1, v_1, m_2, v_2).sum() == pytest.approx(expected, rel=1e-12)
    equal = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_1))
    assert metrics.gaussian_kl(m_1, v_1, m_2, v_1).sum() == pytest.approx(equal, rel=1e-12)
    assert equal == pytest.approx((0.5 * (m_1 - m_2) ** 2 / v_1).sum(), rel=1e-12)
    # The VAE's second term is the same divergence, to the prior.
    expected = general_kl(m_1, np.diag(v_1), np.zeros(5), np.eye(5))
    assert vae.kl_per_dimension(m_1, np.log(v_1)).sum() == pytest.approx(expected, rel=1e-12)


@each_schedule
def test_question_10_the_kl_is_the_weighted_squared_error_of_the_noise(schedule, rng):
    """beta_t^2 / (2 beta~_t alpha_t (1 - alpha_bar_t)) ||eps - eps_theta||^2, where no predicted x_0 is clipped."""
    x_0 = rng.uniform(-0.4, 0.4, (1, 4, 6, 1)).astype(np.float32)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    for t in range(2, 201, 9):
        if schedule["sqrt_alpha_bar"][t] < 0.1:  # else the error of 1 % in eps would be clipped away
            continue
        times, alpha_bar, beta = np.array([t]), schedule["alpha_bar"][t], schedule["beta"][t]
        wrong = eps + (0.02 * rng.standard_normal(x_0.shape)).astype(np.float32)
        squared_error = ((wrong.astype(float) - eps) ** 2).sum()
        variance = (1 - alpha_bar / (1 - beta)) / (1 - alpha_bar) * beta
        weight = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))

        def x_0_theta(x_t, t, wrong=wrong):
            return diffusion.predict_x_0(schedule, x_t, t, wrong)

        found = metrics.bound_terms(x_0_theta, schedule, x_0, times, eps)[0]
        assert found == pytest.approx(weight * squared_error, rel=1e-2)
        simple = diffusion.simple_loss(lambda x_t, t, wrong=wrong: wrong, schedule, (x_0, times, eps))
        assert simple == pytest.approx(squared_error / eps.size, rel=1e-4)


def test_question_10_the_weight_that_the_simple_loss_drops_is_large_only_at_small_t():
    s = make_schedule("linear", 200)
    before = s["alpha_bar"][1:-1]
    w = s["beta"][2:] / (2 * s["alpha"][2:] * (1 - before))  # for t = 2 .. 200
    assert w[0] == pytest.approx(1.0, abs=0.005) and w[8] == pytest.approx(0.11, abs=0.005)
    assert np.all((w[18:] > 0.02) & (w[18:] < 0.06))  # from t = 20 on


# --------------------------------------------------------------------------------- 11 to 13: the diffusion model
# Algorithms 1 and 2 have their tests in test_diffusion.py, the network in test_denoisers.py.


def test_question_13_the_latent_of_the_diffusion_model_tells_nothing_about_the_image():
    """I(x_0; x_T) is at most the mean of D_KL(q(x_T | x_0) || N(0, I)): under 0.02 nats whatever the images are."""
    s = make_schedule("linear", 200)
    for brightness in np.linspace(-1, 1, 9):
        assert diffusion.prior_kl(s, np.full((1, 28, 28, 1), brightness))[0] < 0.02


# ----------------------------------------------------------------------------------------------------------- errata


@each_schedule
def test_errata_equation_6_as_printed_contradicts_bayes_rule(schedule):
    """With sqrt(alpha_bar_t) where sqrt(alpha_t) belongs, before x_t; they agree at t = 1 only, where it is times 0."""
    x_0, x_t = 0.37, -0.81
    for t in range(2, 201):
        alpha, beta, before = 1 - schedule["beta"][t], schedule["beta"][t], np.prod(1 - schedule["beta"][1:t])
        expected, _ = by_bayes_rule(beta, before, x_0, x_t)
        of_x_0 = np.sqrt(before) * beta / (1 - alpha * before) * x_0
        printed = np.sqrt(alpha * before) * (1 - before) / (1 - alpha * before) * x_t + of_x_0
        mended = np.sqrt(alpha) * (1 - before) / (1 - alpha * before) * x_t + of_x_0
        ours = schedule["posterior_x_t"][t] * x_t + schedule["posterior_x_0"][t] * x_0
        assert mended == pytest.approx(expected, abs=1e-9) and ours == pytest.approx(expected, abs=1e-9)
        assert abs(printed - expected) > 1e-5


def test_errata_eps_t_is_not_the_last_step(rng):
    """Eq. (7) gives back x_0 from the total noise in x_t; from x_t - x_{t-1}, or that step's noise, it does not."""
    s, t = make_schedule("linear", 200), 60
    x_0 = np.full((1, 28, 28, 1), 0.3)
    step_noise = rng.standard_normal((2, 1, 28, 28, 1))
    before = diffusion.q_sample(s, x_0, np.array([t - 1]), step_noise[0])
    x_t = np.sqrt(s["alpha"][t]) * before + np.sqrt(s["beta"][t]) * step_noise[1]
    # Both noises in x_t, as they add up: that of x_{t-1} and that of the last step.
    of_before = np.sqrt(s["alpha"][t]) * s["sqrt_one_minus_alpha_bar"][t - 1]
    total = of_before * step_noise[0] + np.sqrt(s["beta"][t]) * step_noise[1]
    total /= np.sqrt(1 - s["alpha_bar"][t])

    at_t = np.array([t])
    np.testing.assert_allclose(diffusion.predict_x_0(s, x_t, at_t, total), x_0, atol=1e-5)
    assert total.var() == pytest.approx(1, abs=0.2)
    for wrong in (x_t - before, step_noise[1]):
        assert np.abs(diffusion.predict_x_0(s, x_t, at_t, wrong) - x_0).mean() > 0.2


# ------------------------------------------------------------------------------------------------------ the document


def test_whatever_the_document_names_exists_and_it_names_every_test_above():
    docs, tests = Path(__file__).parent.parent / "docs", Path(__file__).parent
    text = (docs / "homework.md").read_text()
    named, ours = (
        set(re.findall(r"`(test_\w+)`", text)),
        set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M)),
    )
    everywhere = {
        name for file in tests.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named <= everywhere
    assert {name for name in ours if re.match("test_(question|errata)", name)} <= named
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https:") or (docs / link).exists(), link
    parts = {"": "", "machinery": "machinery.", "evaluate": "evaluate."}  # of the package
    for module, name in re.findall(r"`(\w+)\.(\w+)`", text):
        for folder, prefix in parts.items():
            if (docs.parent / "scratchgen" / folder / f"{module}.py").exists():
                assert hasattr(importlib.import_module(f"scratchgen.{prefix}{module}"), name), f"{module}.{name}"
    folders = ["", "docs", *(f"scratchgen/{folder}" for folder in parts)]
    sources = "".join(file.read_text() for folder in folders for file in (docs.parent / folder).glob("*.py"))
    for name in re.findall(r"`([a-z]\w*_\w+)`", text):
        assert name in everywhere or re.search(rf"\b{name}\b", sources), name


def test_the_command_that_remakes_the_figures_says_which_run_is_missing(tmp_path):
    script = Path(__file__).parent.parent / "docs" / "figures.py"
    result = subprocess.run([sys.executable, script, "--runs", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "vae-beta-0: expected a finished run" in result.stderr
