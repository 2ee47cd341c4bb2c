"""The claims of docs/homework.md, question by question: each test would fail were the claim, or our formula, false.

Some check our code, some the mathematics alone; what the questions ask one to write has its tests in test_homework.py.
"Eq." is the sheet's, a number alone the document's.
"""

import importlib
import math
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

from scratchgen import diffusion, tree, vae
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.diffusion import make_schedule
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from conftest import ROOT, script
from test_homework import log_normal, small_vae, small_vae_params

# --------------------------------------------------------------------------------------------------------- 1: the ELBO


def affine(weight, bias):
    """A decoder of two pixels from one latent dimension: everything about it can be integrated on a line."""
    return lambda z: (z * weight + bias).reshape(len(z), 1, 2, 1)


def test_question_1_the_elbo_is_log_p_minus_the_kl_to_the_true_posterior(rng):
    x = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    weight = np.array([1.5, -0.8])
    bias = np.array([0.3, 0.1])
    mu = np.array([[0.4]])
    log_var = np.array([[-0.6]])

    z = np.linspace(-12, 12, 40_001)
    dz = z[1] - z[0]
    p = 1 / (1 + np.exp(-(z[:, None] * weight + bias)))
    joint = (1 - p[:, 0]) * p[:, 1] * np.exp(log_normal(z, 0, 1))
    evidence = np.sum(joint) * dz
    log_q = log_normal(z, mu[0, 0], np.exp(log_var[0, 0]))
    kl_to_posterior = np.sum(np.exp(log_q) * (log_q - np.log(joint / evidence))) * dz

    N = 400_000
    batch = np.repeat(x, N, axis=0), rng.standard_normal((N, 1))
    reconstruction, kl = vae.elbo_terms(lambda x: (mu, log_var), affine(weight, bias), batch)
    elbo = np.mean(reconstruction) - np.mean(kl)
    error = np.std(reconstruction) / np.sqrt(N)
    assert abs(elbo - (np.log(evidence) - kl_to_posterior)) < 4 * error
    assert elbo < np.log(evidence) - 10 * error  # a bound, and with this q a strict one


def test_question_1_the_first_term_alone_wants_a_code_without_spread(rng):
    """log p(x | z) is concave in z for this decoder, so by Jensen's inequality spread about mu can only cost."""
    x = rng.random((50, 1, 2, 1))
    eps = rng.standard_normal((50, 1))
    mu = rng.standard_normal((50, 1))
    decode = affine(np.array([1.5, -0.8]), np.array([0.3, 0.1]))

    def first_term(log_var):
        encode = lambda x: (mu, np.full((50, 1), log_var))  # noqa: E731
        return sum(vae.elbo_terms(encode, decode, (x, sign * eps))[0] for sign in (1, -1)) / 2

    narrow = first_term(-20.0)
    middle = first_term(-1.0)
    wide = first_term(0.0)
    assert np.all(narrow > middle) and np.all(middle > wide)
    # And no q at all gets above the best single z.
    z = np.linspace(-30, 30, 2001).reshape(-1, 1)
    best = [vae.bernoulli_log_likelihood(decode(z), np.broadcast_to(image, (2001, 1, 2, 1))).max() for image in x]
    assert np.all(narrow <= np.array(best) + 1e-4)


def test_question_1_the_second_term_alone_wants_every_code_to_be_the_prior(rng):
    """It is zero for mu = 0 and sigma = 1, and positive elsewhere: then z says nothing about x."""
    mu = rng.standard_normal((1000, 3))
    log_var = rng.standard_normal((1000, 3))
    assert np.all(vae.kl_per_dimension(mu, log_var) > 0)
    assert np.all(vae.kl_per_dimension(np.zeros((1, 3)), np.zeros((1, 3))) == 0)


def test_question_1_beta_trades_one_term_for_the_other(rng):
    """A small VAE learns 64 random images; the larger beta is, the lower both its KL and its first term end."""
    x = (rng.random((64, 1, 6, 1)) < 0.5).astype(np.float32)
    terms = []
    for beta in (0, 1, 20):
        params = small_vae_params(np.random.default_rng(1))
        noise = np.random.default_rng(5)
        moments = init_moments(params)
        for step in range(1, 301):
            batch = x, noise.standard_normal((64, 2), dtype=np.float32)
            _, parts, gradient = value_and_grad(small_vae)(params, batch, beta)
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
    s = rng.random((N, 1)) < 0.5
    z = rng.standard_normal((N, 1))
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
    variance = moments_of_mu[2]
    fourth = moments_of_mu[4]
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


@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
def test_question_2_the_perfect_vae_of_a_gaussian_decodes_its_means_to_too_small_a_variance(s, rng):
    """x = z + eta, eta ~ N(0, s^2). The encoder is Bayes' rule on a grid; the variances are those of draws."""
    z = np.linspace(-12, 12, 20_001)
    for x in (-1.7, 0.4):
        posterior = np.exp(-0.5 * z**2 - 0.5 * (x - z) ** 2 / s**2)
        posterior /= posterior.sum()
        mean = (posterior * z).sum()
        assert mean == pytest.approx(x / (1 + s**2))
        assert (posterior * (z - mean) ** 2).sum() == pytest.approx(s**2 / (1 + s**2))
    N = 400_000
    x = rng.standard_normal(N) + s * rng.standard_normal(N)
    mu = x / (1 + s**2)
    codes = vae.reparameterise(mu, np.log(s**2 / (1 + s**2)), rng.standard_normal(N))
    decoded_codes, decoded_means = (of + s * rng.standard_normal(N) for of in (codes, mu))
    assert codes.var() == pytest.approx(1, rel=0.02)
    assert decoded_codes.var() == pytest.approx(1 + s**2, rel=0.02)  # the data's
    assert decoded_means.var() == pytest.approx(1 / (1 + s**2) + s**2, rel=0.02)


def test_question_2_a_vector_of_means_needs_the_characteristic_function_of_a_vector():
    """Means (a, s a) with a ~ N(0, 1/2) and s = 1 or -1: each of the two is Gaussian, the pair of them is not.

    With sigma^2 = 1/2 each z_j is N(0, 1), but the pair is no N(0, I): u = (1, 1) tells, and no u along an axis does.
    """
    a = np.linspace(-9, 9, 20_001)
    density = np.exp(-(a**2)) / np.sqrt(np.pi) * (a[1] - a[0])

    def of_z(u):  # E[exp(i u z)] = E[exp(i u mu)] exp(-u^T Sigma u / 2)
        of_mu = sum(0.5 * np.sum(np.cos((u[0] + s * u[1]) * a) * density) for s in (1, -1))
        return of_mu * np.exp(-0.25 * (u[0] ** 2 + u[1] ** 2))

    for u in ((1, 0), (0, 1), (0, 2.5)):
        assert of_z(u) == pytest.approx(np.exp(-0.5 * (u[0] ** 2 + u[1] ** 2)), abs=1e-12)
    assert abs(of_z((1, 1)) - np.exp(-1)) > 0.01


def test_question_2_decoded_means_may_vary_less_or_more_than_the_data_or_just_as_they(rng):
    """Codes z = m + sigma eps of means m ~ N(0, 1/4) and sigma^2 = 3/4, and three decoders."""
    m = 0.5 * rng.standard_normal((400_000, 1))
    log_var = np.full((400_000, 1), np.log(0.75))
    z = vae.reparameterise(m, log_var, rng.standard_normal(m.shape))
    assert z.var() == pytest.approx(1, abs=0.01)

    def near_zero(width):  # the variance of 1{|y| < width} for y ~ N(0, 1)
        p = math.erf(width / math.sqrt(2))
        return p * (1 - p)

    assert (round(near_zero(0.1), 3), round(near_zero(0.2), 3)) == (0.073, 0.133)  # |m| < 0.1 is |2 m| < 0.2
    assert (np.abs(z) < 0.1).var() == pytest.approx(near_zero(0.1), abs=0.002)
    assert (np.abs(m) < 0.1).var() == pytest.approx(near_zero(0.2), abs=0.002)
    assert m.var() == pytest.approx(0.25, abs=0.005)  # decoded by the identity
    assert np.sign(z).mean() == pytest.approx(0, abs=0.01) and np.sign(m).mean() == pytest.approx(0, abs=0.01)
    assert set(np.sign(z).ravel()) == set(np.sign(m).ravel()) == {-1, 1}  # two values, each as likely as the other


def test_question_2_codes_drawn_by_the_vaes_own_code_agree_and_the_means_miss_the_distribution_of_the_data(rng):
    """A pixel with s = 1 is its code plus unit noise: of variance 2 from codes, as in the data, but 5/4 from means."""
    N = 400_000
    s, y = draw_counterexample(rng, N)
    mu, log_var = encode_counterexample(s, y)
    z = vae.reparameterise(mu, log_var, rng.standard_normal((N, 1)))
    for n in range(1, 7):
        moment = np.mean(z**n)
        error = np.std(z**n) / np.sqrt(N)
        assert abs(moment - float(gaussian_moment(n, 1))) < 4 * error
    assert np.mean(mu == 0) == pytest.approx(0.5, abs=0.01)
    assert mu.var() == pytest.approx(0.25, abs=0.01)  # var z = var mu + E[sigma^2] = 1/4 + 3/4
    noise = rng.standard_normal((N, 1))
    variances = [y[s].var(), (z + noise).var(), (mu + noise).var()]
    assert variances == pytest.approx([2, 2, 1.25], abs=0.02)


def test_question_2_with_one_sigma_for_all_images_the_means_are_gaussian(rng):
    """The means' characteristic function is that of z over that of the noise: the density which has it is Gaussian.

    Conversely mu ~ N(0, 1 - sigma^2) gives z ~ N(0, 1), and two values of mu with that variance do not."""
    sigma = 0.6
    u = np.linspace(-40, 40, 8001)
    mu = np.linspace(-3, 3, 61)
    of_mu = np.exp(-(u**2) / 2) / np.exp(-((sigma * u) ** 2) / 2)
    density = (np.cos(mu[:, None] * u) @ of_mu) * (u[1] - u[0]) / (2 * np.pi)  # the inverse Fourier transform
    gaussian = np.exp(-0.5 * mu**2 / (1 - sigma**2)) / np.sqrt(2 * np.pi * (1 - sigma**2))
    np.testing.assert_allclose(density, gaussian, atol=1e-9)

    N = 400_000
    spread = np.sqrt(1 - sigma**2)
    log_var = np.full((N, 1), 2 * np.log(sigma))
    gaussian = spread * rng.standard_normal((N, 1))
    two_values = spread * np.sign(rng.standard_normal((N, 1)))

    def moments_of_z(mu):
        z = vae.reparameterise(mu, log_var, rng.standard_normal((N, 1)))
        return [np.mean(z**2), np.mean(z**4)]

    np.testing.assert_allclose(moments_of_z(gaussian), [1, 3], rtol=0.03)
    # The fourth moment of two values is (1 - sigma^2)^2, a Gaussian's three times that.
    np.testing.assert_allclose(moments_of_z(two_values), [1, 3 - 2 * (1 - sigma**2) ** 2], rtol=0.03)


# ----------------------------------------------------------------------------------------------------- 3: autoencoders


def test_question_3_an_autoencoder_may_put_its_codes_anywhere(rng):
    """Move all codes and let the decoder move them back: reconstructions and the loss of beta = 0 do not notice.

    Images whose logits lie in a plane, so that two numbers restore them perfectly."""
    B = rng.standard_normal((2, 6))
    logits = rng.standard_normal((40, 2)) @ B
    x = (1 / (1 + np.exp(-logits))).reshape(40, 1, 6, 1)
    turn = np.array([[0.0, 5.0], [-5.0, 0.0]])
    shift = np.array([30.0, -10.0])
    log_var = np.full((40, 2), -80.0)  # sigma = 4e-18: deterministic

    def plain(z):
        return (z @ B).reshape(len(z), 1, 6, 1)

    def moved(z):
        return plain((z - shift) @ np.linalg.inv(turn))

    code = np.log(x / (1 - x)).reshape(40, 6) @ np.linalg.pinv(B)
    for decode, z in ((plain, code), (moved, code @ turn + shift)):
        np.testing.assert_allclose(vae.generate(decode, z), x, rtol=1e-9)
    first = lambda x: (code, log_var)  # noqa: E731
    second = lambda x: (code @ turn + shift, log_var)  # noqa: E731
    batch = x, rng.standard_normal((40, 2))
    loss = vae.negative_elbo(first, plain, batch, 0)[0]
    other_loss = vae.negative_elbo(second, moved, batch, 0)[0]
    assert other_loss == pytest.approx(loss, rel=1e-9)

    z = rng.standard_normal((2000, 2))
    assert np.abs(vae.generate(plain, z).mean(axis=0) - vae.generate(moved, z).mean(axis=0)).max() > 0.2
    assert vae.negative_elbo(second, moved, batch, 1)[0] > vae.negative_elbo(first, plain, batch, 1)[0] + 100


# ---------------------------------------------------------------------------------------------------------- 4: the VAE


def test_question_4_the_networks_are_dense_layers_with_relus_between(rng):
    params = vae.init_mlp_vae(rng, 3, hidden=(8, 7))
    params = tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape), params)  # log_var starts at 0
    x = rng.random((5, 28, 28, 1))
    z = rng.standard_normal((5, 3))

    def affine(layer, h):
        return h @ layer["w"] + layer["b"]

    h = x.reshape(5, 784)
    for layer in params["encoder"]:
        h = np.maximum(affine(layer, h), 0)
    mu, log_var = vae.mlp_encode(params, x)
    np.testing.assert_allclose(mu, affine(params["mu"], h), rtol=1e-4)
    assert (log_var < vae.MAX_LOG_VAR).mean() > 0.5
    np.testing.assert_allclose(log_var, np.minimum(affine(params["log_var"], h), vae.MAX_LOG_VAR), rtol=1e-4)
    first, second, last = params["decoder"]
    logits = affine(last, np.maximum(affine(second, np.maximum(affine(first, z), 0)), 0))
    assert vae.mlp_decode(params, z).shape == (5, 28, 28, 1)
    np.testing.assert_allclose(vae.mlp_decode(params, z).reshape(5, 784), logits, rtol=1e-4)


@pytest.fixture(scope="module")
def test_images():
    return load_fashion_mnist(ROOT / "data", labels=False)["test_images"]


def test_question_4_the_entropy_of_the_test_images(test_images):
    assert vae.entropy_floor(scale(test_images, 0, 1)) == pytest.approx(189.86, abs=0.005)


# -------------------------------------------------------------------------------- 8: the KL of q(x_T | x_0) to N(0, I)


TYPICAL = np.full((1, 28, 28, 1), 0.824)  # the pixels of the test images have this root mean square


def test_question_7_the_recursion_gives_the_closed_form(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise: follow the factor of x_0 and the variance."""
    factor, variance = 1.0, 0.0
    one = np.ones((1, 1, 1, 1))
    for t in range(1, 201):
        beta = schedule["beta"][t]
        factor = np.sqrt(1 - beta) * factor
        variance = (1 - beta) * variance + beta
        assert abs(np.sqrt(schedule["alpha_bar"][t]) - factor) < 1e-12
        assert abs(1 - schedule["alpha_bar"][t] - variance) < 1e-12
        assert float(schedule["sqrt_alpha_bar"][t]) == pytest.approx(factor, rel=1e-7)  # in float32
        assert float(schedule["sqrt_one_minus_alpha_bar"][t]) == pytest.approx(np.sqrt(variance), rel=1e-7)
        at_t = np.array([t])
        assert diffusion.q_sample(schedule, one, at_t, 0 * one) == pytest.approx(factor, rel=1e-6)
        assert diffusion.q_sample(schedule, 0 * one, at_t, one) == pytest.approx(np.sqrt(variance), rel=1e-6)


def test_question_8_if_the_betas_sum_to_infinity_it_falls_to_zero(rng):
    """Constant ones, and the paper's range over more and more steps: in the end rounding leaves nothing of it."""
    x_0 = rng.uniform(-1, 1, (1, 28, 28, 1))

    def after(betas):
        return diffusion.prior_kl({"alpha_bar": np.cumprod(1 - betas)}, x_0)[0]

    for betas_of in (lambda T: np.full(T, 0.02), lambda T: np.linspace(1e-4, 0.02, T)):
        values = [after(betas_of(T)) for T in (50, 100, 200, 400, 1000)]
        assert np.all(np.diff(values) < 0)  # all above 1e-7, where rounding is below 1e-12
        assert abs(after(betas_of(4000))) < 1e-9  # rounding, in whatever order it is added up
    # -log(1 - a) = a + a^2 / 2 + ..: the terms in d alpha_bar cancel, and alpha_bar ||x_0||^2 / 2 is left.
    assert after(np.full(800, 0.02)) == pytest.approx(0.5 * 0.98**800 * (x_0**2).sum(), rel=1e-3)
    assert after(0.5 ** np.arange(2, 60)) > 100  # a finite sum: most of the image is left for ever


def unscaled(T):
    """The paper's betas of 1000 steps, 1e-4 to 0.02, over T steps as they are; only what `prior_kl` needs."""
    return {"alpha_bar": np.cumprod(1 - script("docs/figures.py").unscaled_betas(T))}


def test_question_8_the_numbers_of_the_text(test_images):
    x = scale(test_images, -1, 1)
    assert np.sqrt(np.mean(x.astype(np.float64) ** 2)) == pytest.approx(0.824, abs=0.0005)
    assert diffusion.prior_kl(unscaled(200), x).mean() == pytest.approx(39, abs=0.5)
    assert diffusion.prior_kl(make_schedule("linear", 200), x).mean() == pytest.approx(0.008, abs=0.0005)
    # The betas of 1000 steps over 200 do not end in noise.
    paper = make_schedule("linear", 1000)
    assert paper["beta"].sum() == pytest.approx(10.05) and paper["alpha_bar"][-1] == pytest.approx(4.0e-5, rel=0.02)
    assert np.linspace(1e-4, 0.02, 200).sum() == pytest.approx(2.01)
    assert unscaled(200)["alpha_bar"][-1] == pytest.approx(0.13, abs=0.005)
    assert np.sqrt(unscaled(200)["alpha_bar"][-1]) == pytest.approx(0.36, abs=0.005)
    assert make_schedule("linear", 200)["alpha_bar"][-1] == pytest.approx(3.0e-5, rel=0.02)
    # Scaled to a fixed sum they leave a little, however large T is; the cosine schedule nothing, but for its clip.
    values = [diffusion.prior_kl(make_schedule("linear", T), TYPICAL)[0] for T in (200, 1000, 10_000, 100_000)]
    left = diffusion.prior_kl({"alpha_bar": np.array([np.exp(-10.05)])}, TYPICAL)[0]
    assert np.all(np.diff(values) > 0) and values[-1] == pytest.approx(left, rel=1e-3)
    assert left == pytest.approx(0.011, abs=0.0006)
    assert (np.cos(np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2 < 1e-30
    assert make_schedule("cosine", 200)["alpha_bar"][-1] == pytest.approx(6e-8, rel=0.05)


# ------------------------------------------------------------------------------------------------- 9: the reverse step
# Data of a few points: then q(x_0 | x_t) is a sum over these, and everything about q(x_{t-1} | x_t) can be computed.


def by_bayes_rule(beta, before, x_0, x_t):
    """Mean and variance of x_{t-1} given x_t and x_0 from their joint Gaussian; ``before`` is alpha_bar_{t-1}."""
    # x_{t-1} = sqrt(before) x_0 + sqrt(1 - before) e_1 and x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e_2.
    A = np.array([[np.sqrt(1 - before), 0], [np.sqrt((1 - beta) * (1 - before)), np.sqrt(beta)]])
    covariance = A @ A.T
    mean = np.sqrt(before) * x_0 * np.array([1, np.sqrt(1 - beta)])
    gain = covariance[0, 1] / covariance[1, 1]
    return mean[0] + gain * (x_t - mean[1]), covariance[0, 0] - gain * covariance[1, 0]


def test_question_9_mean_and_variance_are_bayes_rule_on_the_joint_gaussian(schedule, rng):
    """The mean in terms of the noise, too. Eq. (6) with a bar too many, sqrt(alpha_bar_t) x_t, contradicts it."""
    pixel = np.ones((1, 1, 1, 1))
    for t in range(2, 201):
        beta = schedule["beta"][t]
        before = np.prod(1 - schedule["beta"][1:t])
        alpha = 1 - beta
        x_0, eps = rng.uniform(-1, 1), rng.standard_normal()
        x_t = np.sqrt(alpha * before) * x_0 + np.sqrt(1 - alpha * before) * eps
        mean, variance = by_bayes_rule(beta, before, x_0, x_t)
        found_mean, found_variance = diffusion.q_posterior(schedule, x_0 * pixel, x_t * pixel, np.array([t]))
        assert found_mean == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert found_variance == pytest.approx(variance, rel=1e-5)
        from_factors = float(schedule["posterior_x_0"][t]) * x_0 + float(schedule["posterior_x_t"][t]) * x_t
        assert from_factors == pytest.approx(mean, abs=3e-7)  # the factors are float32
        assert float(schedule["posterior_variance"][t]) == pytest.approx(variance, rel=1e-7)
        assert (x_t - beta / np.sqrt(1 - alpha * before) * eps) / np.sqrt(alpha) == pytest.approx(mean, abs=1e-9)
        of_x_0 = np.sqrt(before) * beta / (1 - alpha * before) * x_0
        of_x_t = (1 - before) / (1 - alpha * before) * x_t
        assert np.sqrt(alpha) * of_x_t + of_x_0 == pytest.approx(mean, abs=1e-9)
        assert abs(np.sqrt(alpha * before) * of_x_t + of_x_0 - mean) > 1e-5 * abs(x_t)
    s = make_schedule("linear", 200)
    assert s["posterior_x_t"][200] == pytest.approx(0.95, abs=0.005)
    with_a_bar = s["posterior_x_t"][200] * s["sqrt_alpha_bar"][200] / np.sqrt(s["alpha"][200])
    assert with_a_bar == pytest.approx(0.006, abs=0.0005)


def normal(x, mean, variance):  # (P, d), (d,) -> (P,)
    return np.exp(-0.5 * ((x - mean) ** 2).sum(axis=1) / variance) / (2 * np.pi * variance) ** (x.shape[1] / 2)


def reverse_step(schedule, t, x_t, points):
    """The parts of q(x_{t-1} | x_t) by `q_posterior`: q(x_0 | x_t) (K,), the means (K, d), and their one variance."""
    K, d = points.shape
    weights = normal(points * schedule["sqrt_alpha_bar"][t], x_t, 1 - schedule["alpha_bar"][t])
    x_0 = points.reshape(K, d, 1, 1)
    shown = np.broadcast_to(x_t.reshape(1, d, 1, 1), (K, d, 1, 1))
    means, variance = diffusion.q_posterior(schedule, x_0, shown, np.full(K, t))
    return weights / weights.sum(), means.reshape(K, d).astype(np.float64), float(variance[0, 0, 0, 0])


THREE_POINTS = np.array([[-1.0, 0.3], [0.8, 1.0], [0.5, -0.9]])
X_T = np.array([0.1, 0.2])


def grid_of_the_plane(half=4.0, n=801):  # -> (n^2, 2), and the area of a cell
    axis = np.linspace(-half, half, n)
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


def test_question_9_mean_and_covariance_of_the_reverse_step():
    """(14), by Bayes' rule on a grid."""
    s = make_schedule("linear", 20)
    t = 5
    x, area = grid_of_the_plane()
    alpha_bar = s["alpha_bar"][t]
    before = s["alpha_bar"][t - 1]
    beta = s["beta"][t]
    prior = sum(normal(x, np.sqrt(before) * point, 1 - before) for point in THREE_POINTS)
    exact = prior * normal(np.sqrt(1 - beta) * x, X_T, beta)
    exact /= exact.sum()
    mean = exact @ x
    covariance = (x - mean).T @ ((x - mean) * exact[:, None])

    weights, _, _ = reverse_step(s, t, X_T, THREE_POINTS)
    expected_x_0 = weights @ THREE_POINTS
    expected_eps = (X_T - np.sqrt(alpha_bar) * expected_x_0) / np.sqrt(1 - alpha_bar)
    np.testing.assert_allclose(
        mean, (X_T - beta / np.sqrt(1 - alpha_bar) * expected_eps) / np.sqrt(1 - beta), atol=1e-5
    )
    of_x_0 = (THREE_POINTS - expected_x_0).T @ ((THREE_POINTS - expected_x_0) * weights[:, None])
    tilde_beta = (1 - before) / (1 - alpha_bar) * beta
    formula = tilde_beta * np.eye(2) + before * beta**2 / (1 - alpha_bar) ** 2 * of_x_0
    np.testing.assert_allclose(covariance, formula, atol=1e-5)
    assert np.trace(covariance) > 1.2 * 2 * tilde_beta and abs(covariance[0, 1]) > 1e-3  # it is not beta~_t I


def test_question_9_without_x_0_the_reverse_step_is_a_mixture_and_no_gaussian():
    """Data of two values, one large step: Bayes' rule on a grid gives the mixture of two `q_posterior`s."""
    s = make_schedule("linear", 20)
    t = 4
    x_t = 0.05
    x_0 = np.array([-1.0, 1.0])
    x = np.linspace(-6, 6, 24_001)
    dx = x[1] - x[0]

    def normal(x, mean, variance):
        return np.exp(log_normal(x, mean, variance))

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
    assert s["alpha_bar"][t] == pytest.approx(0.7, abs=0.02) and kurtosis == pytest.approx(2.0, abs=0.05)
    # 3 for every Gaussian, and nearly that where steps are small, at the same level of noise:
    fine = make_schedule("linear", 1000)
    same_noise = np.argmin(np.abs(fine["alpha_bar"] - s["alpha_bar"][t]))
    assert kurtosis_of_reverse_step(fine, same_noise, x_t) == pytest.approx(3, abs=0.01)


def kurtosis_of_reverse_step(s, t, x_t):
    """Fourth central moment over squared variance of q(x_{t-1} | x_t) for x_0 = -1 or 1, in closed form."""
    p = 1 / (1 + np.exp(-2 * s["sqrt_alpha_bar"][t] * x_t / s["sqrt_one_minus_alpha_bar"][t] ** 2))  # of x_0 = 1
    weights = np.array([p, 1 - p])
    v = s["posterior_variance"][t]
    deviations = s["posterior_x_0"][t] * (np.array([1, -1]) - (2 * p - 1))
    second = weights @ (deviations**2 + v)
    fourth = weights @ (deviations**4 + 6 * deviations**2 * v + 3 * v**2)
    return fourth / second**2


def test_question_9_the_bound_on_the_excess_of_the_variance():
    """beta_t / (alpha_t (1 - alpha_bar_{t-1})) of beta~_t; for data of two values the excess itself is far below."""
    s = make_schedule("linear", 200)
    z = np.linspace(-10, 10, 20_001)
    normal = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    bound = s["beta"][2:] / (s["alpha"][2:] * (1 - s["alpha_bar"][1:-1]))  # for t = 2 .. 200
    assert bound[0] == pytest.approx(2.0, abs=0.01) and 0.111 < bound[18:].max() < 0.112  # t = 2, and from 20 on
    np.testing.assert_allclose(bound, 2 * diffusion.bound_weights(s), rtol=1e-12)
    for t in (2, 5, 11, 12, 20, 50, 150):
        a = s["sqrt_alpha_bar"][t]
        b = s["sqrt_one_minus_alpha_bar"][t]
        x_t = a + b * z  # for x_0 = 1; for -1 all is the same
        conditional = 1 - np.tanh(a * x_t / b**2) ** 2  # Var(x_0 | x_t) for x_0 = -1 or 1
        excess = s["posterior_x_0"][t] ** 2 * (normal @ conditional) / s["posterior_variance"][t]
        assert excess < bound[t - 2]
        assert (excess < 1e-6) == (t <= 11)  # the bound at t = 2 says nothing of it
        assert excess == pytest.approx({20: 0.004, 50: 0.026}.get(t, excess), abs=0.0005)


# -------------------------------------------------------------------------------------- 10: the KL of the reverse step


def general_kl(m_1, S_1, m_2, S_2):
    """D_KL(N(m_1, S_1) || N(m_2, S_2)), by matrices."""
    inverse = np.linalg.inv(S_2)
    log_ratio = np.linalg.slogdet(S_2)[1] - np.linalg.slogdet(S_1)[1]
    return 0.5 * (np.trace(inverse @ S_1) - len(m_1) + (m_2 - m_1) @ inverse @ (m_2 - m_1) + log_ratio)


def test_question_10_gaussian_kl_is_the_general_formula_for_diagonal_covariances(rng):
    m_1, m_2 = rng.standard_normal((2, 5))
    v_1, v_2 = np.exp(rng.standard_normal((2, 5)))
    expected = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_2))
    assert diffusion.gaussian_kl(m_1, v_1, m_2, v_2).sum() == pytest.approx(expected, rel=1e-12)
    equal = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_1))
    assert diffusion.gaussian_kl(m_1, v_1, m_2, v_1).sum() == pytest.approx(equal, rel=1e-12)
    assert equal == pytest.approx((0.5 * (m_1 - m_2) ** 2 / v_1).sum(), rel=1e-12)
    # The VAE's second term is the same divergence, to the prior.
    expected = general_kl(m_1, np.diag(v_1), np.zeros(5), np.eye(5))
    assert vae.kl_per_dimension(m_1, np.log(v_1)).sum() == pytest.approx(expected, rel=1e-12)


def test_question_10_the_kl_is_the_weighted_squared_error_of_the_noise(schedule, rng):
    """w_t ||eps - eps_theta||^2 with w_t = beta_t^2 / (2 beta~_t alpha_t (1 - alpha_bar_t)), by Eq. (6)."""
    x_0 = rng.uniform(-1, 1, (1, 4, 6, 1))
    eps, wrong = rng.standard_normal((2, 1, 4, 6, 1))
    weights = diffusion.bound_weights(schedule)
    assert weights.shape == (199,)
    for t in range(2, 201, 9):
        alpha_bar = schedule["alpha_bar"][t]
        beta = schedule["beta"][t]
        variance = (1 - alpha_bar / (1 - beta)) / (1 - alpha_bar) * beta
        weight = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))
        assert weights[t - 2] == pytest.approx(weight, rel=1e-6)
        if schedule["sqrt_alpha_bar"][t] < 0.01:  # else float32 knows no better
            continue
        x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
        x_0_theta = (x_t - np.sqrt(1 - alpha_bar) * wrong) / np.sqrt(alpha_bar)
        mean, found_variance = diffusion.q_posterior(schedule, x_0, x_t, np.array([t]))
        mean_theta, _ = diffusion.q_posterior(schedule, x_0_theta, x_t, np.array([t]))
        kl = diffusion.gaussian_kl(mean, found_variance, mean_theta, found_variance).sum()
        assert kl == pytest.approx(weight * ((eps - wrong) ** 2).sum(), rel=1e-4)


def test_question_10_the_general_formula_is_the_expected_log_ratio(rng):
    """For covariances that are not diagonal, by Monte Carlo."""
    A, B = rng.standard_normal((2, 3, 3))
    m_1 = rng.standard_normal(3)
    S_1 = A @ A.T + np.eye(3)
    m_2 = rng.standard_normal(3)
    S_2 = B @ B.T + np.eye(3)
    x = m_1 + rng.standard_normal((400_000, 3)) @ np.linalg.cholesky(S_1).T

    def log_density(m, S):
        return -0.5 * np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(S), x - m) - 0.5 * np.linalg.slogdet(S)[1]

    log_ratio = log_density(m_1, S_1) - log_density(m_2, S_2)
    assert abs(general_kl(m_1, S_1, m_2, S_2) - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(x))


def test_question_10_given_x_0_or_not_the_best_model_is_the_same():
    """(17): E over x_0 of the KL given x_0 = the KL without it + I(x_{t-1}; x_0 | x_t), for any Gaussian p_theta."""
    s = make_schedule("linear", 20)
    t = 5
    x, area = grid_of_the_plane()
    weights, means, variance = reverse_step(s, t, X_T, THREE_POINTS)
    densities = np.array([normal(x, mean, variance) for mean in means])
    mixture = weights @ densities
    assert mixture.sum() * area == pytest.approx(1, abs=1e-9)

    def divergence(p, log_ratio):
        return np.sum(p * log_ratio) * area

    log_mixture = np.log(np.maximum(mixture, 1e-300))
    information = sum(
        weight * divergence(p, np.log(np.maximum(p, 1e-300)) - log_mixture)
        for weight, p in zip(weights, densities, strict=True)
    )
    assert information > 0.01

    def both(mean, S):
        """The KL of q(x_{t-1} | x_t) from N(mean, S), and the mean over x_0 of that of q(x_{t-1} | x_t, x_0)."""
        log_p = -0.5 * np.einsum("ni,ij,nj->n", x - mean, np.linalg.inv(S), x - mean)
        log_p -= 0.5 * np.linalg.slogdet(2 * np.pi * S)[1]
        given = sum(w * general_kl(m, variance * np.eye(2), mean, S) for w, m in zip(weights, means, strict=True))
        return divergence(mixture, log_mixture - log_p), given

    best_mean = weights @ means
    total = variance * np.eye(2) + (means - best_mean).T @ ((means - best_mean) * weights[:, None])
    models = [(best_mean, total), (best_mean, variance * np.eye(2)), (best_mean, 1.1 * total), (best_mean, 0.9 * total)]
    models += [(best_mean + shift, total) for shift in ([0.05, 0], [0, -0.05])]
    models += [(best_mean, np.diag(np.diag(total))), (np.array([0.4, -0.2]), np.array([[0.3, 0.1], [0.1, 0.5]]))]
    found = np.array([both(*model) for model in models])
    np.testing.assert_allclose(found[:, 1] - found[:, 0], information, atol=1e-6)
    assert np.all(found[1:] > found[0])  # the best covariance is the total one, the best mean that of the mixture
    # With beta~_t I it is the squared distance of the means over 2 beta~_t, and what theta cannot change.
    apart = both(best_mean + 0.1, variance * np.eye(2))[1] - both(best_mean, variance * np.eye(2))[1]
    assert apart == pytest.approx(2 * 0.1**2 / (2 * variance), rel=1e-6)


def test_question_10_the_weight_that_the_simple_loss_drops_is_large_only_at_small_t():
    w = diffusion.bound_weights(make_schedule("linear", 200))  # for t = 2 .. 200
    assert w[0] == pytest.approx(1.0, abs=0.005) and w[8] == pytest.approx(0.11, abs=0.005)
    assert np.all((w[18:] > 0.02) & (w[18:] < 0.06))  # from t = 20 on


# --------------------------------------------------------------------------------- 13: the latent of a diffusion model


def test_question_13_the_latent_of_the_diffusion_model_tells_next_to_nothing_about_the_image():
    """I(x_0; x_T) is at most the mean of D_KL(q(x_T | x_0) || N(0, I)): under 0.02 nats whatever the images are."""
    s = make_schedule("linear", 200)
    for brightness in np.linspace(-1, 1, 9):
        assert diffusion.prior_kl(s, np.full((1, 28, 28, 1), brightness))[0] < 0.02


def test_question_13_the_bound_of_the_appendix_is_the_elbo(rng):
    """(18) for T = 2, one pixel and some p_theta: by Monte Carlo, log p(x_0, x_1, x_2) - log q(x_1, x_2 | x_0)."""
    s = make_schedule("linear", 2)
    x_0 = 0.4
    N = 400_000
    q = [None, (s["sqrt_alpha_bar"][1] * x_0, 1 - s["alpha_bar"][1])]

    def model(x_t, t):  # its mean and variance, as good as any
        return 0.6 * x_t + 0.1 * t, 0.2 + 0.1 * t

    x_1 = q[1][0] + np.sqrt(q[1][1]) * rng.standard_normal(N)
    x_2 = np.sqrt(s["alpha"][2]) * x_1 + np.sqrt(s["beta"][2]) * rng.standard_normal(N)
    log_q = log_normal(x_1, *q[1]) + log_normal(x_2, np.sqrt(s["alpha"][2]) * x_1, s["beta"][2])
    log_p = log_normal(x_2, 0, 1) + log_normal(x_1, *model(x_2, 2)) + log_normal(x_0, *model(x_1, 1))
    elbo = np.mean(log_p - log_q)
    error = np.std(log_p - log_q) / np.sqrt(N)

    end = diffusion.prior_kl(s, np.full((1, 1, 1, 1), x_0))[0]
    image = -np.mean(log_normal(x_0, *model(x_1, 1)))
    posterior = s["posterior_x_0"][2] * x_0 + s["posterior_x_t"][2] * x_2, s["posterior_variance"][2]
    between = diffusion.gaussian_kl(*posterior, *model(x_2, 2))
    spread = np.std(between - log_normal(x_0, *model(x_1, 1))) / np.sqrt(N)
    assert abs(elbo + end + image + np.mean(between)) < 4 * (error + spread)


# -------------------------------------------------------------------------------------------------------------- errata


def test_errata_eps_t_is_not_the_last_step(rng):
    """Eq. (7) gives back x_0 from the total noise in x_t; from x_t - x_{t-1}, or that step's noise, it does not."""
    s = make_schedule("linear", 200)
    t = 60
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


# -------------------------------------------------------------------------------------------------------- the document


DOCS = ROOT / "docs"
TEXT = (DOCS / "homework.md").read_text(encoding="utf-8")


def test_whatever_the_document_names_exists_and_each_question_names_its_tests():
    tests = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        tests |= set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= tests
    sections = re.split(r"^### ", TEXT, flags=re.M)
    for question in range(1, 14):
        (section,) = (section for section in sections if section.startswith(f"Question {question}:"))
        assert f"*Tests* (`pytest -k question_{question}`): " in section
        assert any(name.startswith(f"test_question_{question}_") for name in tests)
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https:") or (DOCS / link).exists(), link
    parts = {"": "", "machinery": "machinery.", "evaluate": "evaluate."}  # of the package
    for module, name in re.findall(r"`(\w+)\.(\w+)`", TEXT):
        for folder, prefix in parts.items():
            if (ROOT / "scratchgen" / folder / f"{module}.py").exists():
                assert hasattr(importlib.import_module(f"scratchgen.{prefix}{module}"), name), f"{module}.{name}"
    folders = ["", "docs", *(f"scratchgen/{folder}" for folder in parts)]
    sources = "".join(file.read_text(encoding="utf-8") for folder in folders for file in (ROOT / folder).glob("*.py"))
    for name in re.findall(r"`([a-z]\w*_\w+)`", TEXT):
        assert name in tests or re.search(rf"\b{name}\b", sources), name


def test_the_equations_are_numbered_in_order_and_those_referred_to_exist():
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", TEXT)]
    assert numbers == list(range(1, len(numbers) + 1))
    referred_to = {int(number) for number in re.findall(r"(?<![\w}])\((\d+)\)", TEXT)}
    assert referred_to <= set(numbers)


def test_every_question_says_what_is_asked_for_how_many_points_and_opens_with_its_answer():
    sections = re.split(r"^### Question ", TEXT, flags=re.M)[1:]
    assert [section.split(":")[0] for section in sections] == [str(n) for n in range(1, 14)]
    points = [int(re.search(r"^\*Asked \((\d+) points?\):\*", section, re.M)[1]) for section in sections]
    assert points == [1, 1, 1, 6, 1, 4, 2, 1, 1, 1, 6, 2, 2] and sum(points) == 29
    answers = re.sub(r"```python\n.*?\n```", "", TEXT.partition("## Appendix")[0], flags=re.S)
    assert len(answers.split()) < 3_500  # formulas count, code does not
    for section in sections:
        first = section.split("\n\n")[2]  # after the title and what is asked
        assert first.startswith("**"), first


def test_the_code_in_the_document_is_the_code_of_the_package():
    """`python docs/figures.py --text` puts it there."""
    assert script("docs/figures.py").with_code(TEXT) == TEXT
    assert len(re.findall(r"^```python", TEXT, re.M)) == len(re.findall(r"^<!-- code: ", TEXT, re.M)) > 3


def test_the_numbers_in_the_texts_are_those_of_the_runs():
    """`python docs/figures.py` writes numbers.json from metrics.json, and --text both into the texts."""
    figures = script("docs/figures.py")
    numbers = figures.read_numbers()
    marked = 0
    for path in figures.TEXTS:
        text = path.read_text(encoding="utf-8")
        assert figures.with_numbers(text, numbers) == text, path
        marked += text.count("<!-- -->")
        assert not re.search(r"^ *<!-- [\w-]+ \w+ [,.\d]*[dfe] -->", text, re.M)  # it would end the paragraph
    assert marked > 15
    changed = numbers | {"vae": numbers["vae"] | {"kl": 99.991}}
    assert figures.with_numbers(TEXT, changed) != TEXT and "-->99.99<!--" in figures.with_numbers(TEXT, changed)


def test_what_the_texts_say_of_latent_dimensions(tmp_path, monkeypatch):
    """Of two active and two idle ones."""
    figures = script("docs/figures.py")
    latent = {"variance_of_mu": [0.9, 0.0, 1.05, 0.002], "mean_of_variance": [0.05, 0.99, 0.02, 1.0], "active_units": 2}
    metrics = {"kl": 3.5, "weights": "CRC-32", "evaluation": {"latent": latent}}
    monkeypatch.setattr(figures.files, "read_metrics", lambda path, params: metrics)
    model = SimpleNamespace(params=None, log=[{"test_elbo": -9.0}, {"test_elbo": -8.5}])
    found = figures.numbers_of(tmp_path, model)
    assert found.pop("sum_min") == pytest.approx(0.95) and found.pop("sum_max") == pytest.approx(1.07)
    assert found == {
        "kl": 3.5,
        "last_gain": 0.5,
        "active": 2,
        "idle": 2,
        "mu_min": 0.9,
        "mu_max": 1.05,
        "noise_min": 0.02,
        "noise_max": 0.05,
        "idle_mu_max": 0.002,
        "idle_noise_min": 0.99,
    }


def test_the_command_that_remakes_the_figures_says_that_no_run_is_there(tmp_path, finish):
    before = (DOCS / "homework.md").stat().st_mtime_ns
    status, stderr = finish(lambda: script("docs/figures.py").main(["--runs", str(tmp_path)]))
    assert status == 2 and stderr.count("\n") == 1 and "expected finished runs in it" in stderr
    assert (DOCS / "homework.md").stat().st_mtime_ns == before
