"""The bound: each term against an independent computation, the whole against finite differences and quadrature."""

from functools import partial

from scratchgen import tree, vae
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from finite_differences import assert_directional, assert_gradients

D = 3


def bound(arch, params, batch):
    _, encode, decode = vae.VAES[arch]
    return vae.negative_elbo(partial(encode, params), partial(decode, params), batch)


def make_batch(rng, N, latent_dim=D):
    x = (rng.random((N, 28, 28, 1), dtype=np.float32) * (rng.random((N, 28, 28, 1)) < 0.5)).astype(np.float32)
    return x, rng.standard_normal((N, latent_dim), dtype=np.float32)


def shaken(rng, params):
    return tree.map(lambda p: p + 0.02 * rng.standard_normal(p.shape).astype(p.dtype), params)


@pytest.mark.parametrize("arch", vae.VAES)
def test_the_whole_elbo_against_finite_differences(rng, arch):
    params = shaken(rng, vae.VAES[arch][0](rng, D))
    batch = tree.map(np.float64, make_batch(rng, 2))
    # A step small enough that hardly a ReLU of thousands changes side within it.
    assert_directional(lambda p: bound(arch, p, batch)[0], params, rng, directions=3, h=1e-8, rtol=1e-4)


@pytest.mark.parametrize("arch", vae.VAES)
def test_shapes_and_dtypes(rng, arch):
    init, encode, decode = vae.VAES[arch]
    params, batch = init(rng, D), make_batch(rng, 5)
    mu, log_var = encode(params, batch[0])
    assert mu.shape == log_var.shape == (5, D) and decode(params, mu).shape == (5, 28, 28, 1)
    value, terms, gradient = value_and_grad(partial(bound, arch))(params, batch)
    assert value == terms["kl"] - terms["reconstruction"]
    assert {value.dtype} | {leaf.dtype for leaf in tree.leaves([gradient, terms])} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("arch", "parameters"), [("mlp", 670_424), ("gated", 1_092_824), ("conv", 1_725_676)])
def test_the_networks_have_the_sizes_of_the_documents_and_sigma_starts_at_1(rng, arch, parameters):
    init, encode, _ = vae.VAES[arch]
    assert tree.size(init(rng, 20)) == parameters
    _, log_var = encode(init(rng, 20), make_batch(rng, 3)[0])
    assert not log_var.any()
    many = [init(rng, 20) for _ in range(20)]
    last = "pixels" if arch == "conv" else -1
    for weights in ([params["mu"]["w"] for params in many], [params["decoder"][last]["w"] for params in many]):
        assert np.var(weights) * len(weights[0]) == pytest.approx(1, abs=0.05)  # gain 1


@pytest.mark.parametrize("arch", vae.VAES)
def test_an_image_unlike_all_others_does_not_get_a_boundless_spread(rng, arch):
    params = shaken(rng, vae.VAES[arch][0](rng, D))
    params["log_var"]["b"][:] = [50, -50, 1.5]  # as such an image might bring about; exp(50) is 5e21
    _, log_var = vae.VAES[arch][1](params, make_batch(rng, 2)[0])
    assert vae.MAX_LOG_VAR == 2 and np.all(log_var[:, 0] == 2) and np.all(log_var[:, 1] < -40)
    assert np.all(log_var[:, 2] < vae.MAX_LOG_VAR) and np.ptp(log_var[:, 2]) > 0
    value, _, gradient = value_and_grad(partial(bound, arch))(params, make_batch(rng, 2))
    assert np.isfinite(value) and gradient["log_var"]["b"][0] == 0 != gradient["log_var"]["b"][1]


def test_the_loss_is_minus_the_mean_elbo_of_the_images(rng):
    _, encode, decode = vae.VAES["mlp"]
    params, batch = vae.VAES["mlp"][0](rng, D), make_batch(rng, 5)
    reconstruction, kl = vae.elbo_terms(partial(encode, params), partial(decode, params), batch)
    value, means = bound("mlp", params, batch)
    assert value == pytest.approx(-np.mean(reconstruction - kl), rel=1e-5)
    assert means == pytest.approx({"reconstruction": np.mean(reconstruction), "kl": np.mean(kl)}, rel=1e-5)


def test_kl_against_monte_carlo(rng):
    mu, log_var = np.array([0.7, -1.2, 0.0]), np.array([0.5, -1.0, 0.0])
    z = mu + np.exp(log_var / 2) * rng.standard_normal((400_000, 3))
    log_q = -0.5 * ((z - mu) ** 2 / np.exp(log_var) + log_var)
    log_p = -0.5 * z**2
    estimate, error = (log_q - log_p).mean(axis=0), (log_q - log_p).std(axis=0) / np.sqrt(len(z))
    kl = vae.kl_per_dimension(mu, log_var)
    assert np.all(np.abs(kl - estimate) <= 4 * error) and kl[2] == 0 and kl[0] > 0.3


def test_gradients_of_reparameterise_and_kl(rng):
    mu, log_var, eps = rng.standard_normal((3, 4, 5))
    assert_gradients(lambda mu, log_var: vae.reparameterise(mu, log_var, eps), [mu, log_var])
    assert_gradients(vae.kl_per_dimension, [mu, log_var])


def test_reparameterised_z_has_the_moments_of_q(rng):
    mu, log_var = np.array([[2.0, -1.0]]), np.array([[np.log(4.0), np.log(0.25)]])
    z = vae.reparameterise(mu, log_var, rng.standard_normal((200_000, 2)))
    np.testing.assert_allclose(z.mean(axis=0), mu[0], atol=0.02)
    np.testing.assert_allclose(z.var(axis=0), [4, 0.25], rtol=0.02)


def test_entropy_floor_of_known_pixels():
    x = np.zeros((2, 28, 28, 1), np.float32)
    x[0, :7] = 0.5  # 196 pixels of one bit each
    x[1, :7] = 1
    assert vae.entropy_floor(x) == pytest.approx(196 * np.log(2) / 2)


def test_no_decoder_beats_the_entropy_floor(rng):
    x, _ = make_batch(rng, 4)
    p = np.clip(x.astype(np.float64), 1e-12, 1 - 1e-12)
    best = vae.bernoulli_log_likelihood(np.log(p / (1 - p)), x)
    assert np.mean(best) == pytest.approx(-vae.entropy_floor(x), abs=1e-6)
    worse = vae.bernoulli_log_likelihood(np.log(p / (1 - p)) + 0.1, x)
    assert np.mean(worse) < np.mean(best)


@pytest.mark.parametrize("arch", vae.VAES)
def test_generated_pixels_are_probabilities_even_far_from_the_prior(rng, arch):
    init, _, decode = vae.VAES[arch]
    images = vae.generate(partial(decode, init(rng, D)), 1e4 * rng.standard_normal((10, D), dtype=np.float32))
    assert np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(("arch", "steps"), [("mlp", 150), ("gated", 150), ("conv", 60)])
def test_one_batch_can_be_learned_by_heart(rng, arch, steps):
    params, batch = vae.VAES[arch][0](rng, D), make_batch(rng, 8)
    moments, step_of = init_moments(params), value_and_grad(partial(bound, arch))
    before = float(step_of(params, batch)[0])
    for step in range(1, steps + 1):
        value, _, gradient = step_of(params, batch)
        adam_step(params, gradient, moments, step, lr=3e-3)
    floor = vae.entropy_floor(batch[0])
    assert value - floor < 0.5 * (before - floor)


def test_beta_weighs_the_second_term_alone(rng):
    _, encode, decode = vae.VAES["mlp"]
    params, batch = vae.VAES["mlp"][0](rng, D), make_batch(rng, 5)
    for beta in (0.0, 0.5, 10.0):
        value, means = vae.negative_elbo(partial(encode, params), partial(decode, params), batch, beta)
        assert value == pytest.approx(beta * means["kl"] - means["reconstruction"], rel=1e-6)
        assert means == bound("mlp", params, batch)[1]  # what is reported does not depend on it
