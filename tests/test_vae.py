"""The bound and its networks: against plain definitions, finite differences and quadrature.

Its two terms, each by itself, are tested by test_homework.py, question 4.
"""

from functools import partial

from scratchgen import tree, vae
from scratchgen.gradients import value_and_grad
from scratchgen.ops import bernoulli_log_likelihood

import numpy as np
import plain
import pytest
from finite_differences import assert_directional, shaken

D = 3
each_arch = pytest.mark.parametrize("arch", vae.VAES)


def bound(arch, params, batch, beta=1.0):
    _, encode, decode = vae.VAES[arch]
    return vae.negative_elbo(partial(encode, params), partial(decode, params), batch, beta)


def make_batch(rng, N):
    x = (rng.random((N, 28, 28, 1), dtype=np.float32) * (rng.random((N, 28, 28, 1)) < 0.5)).astype(np.float32)
    return x, rng.standard_normal((N, D), dtype=np.float32)


@each_arch
def test_a_network_is_its_plain_definition_and_sigma_starts_at_1(rng, arch):
    init, encode, decode = vae.VAES[arch]
    x = rng.random((4, 28, 28, 1))
    assert not encode(init(rng, D), x)[1].any()
    params = tree.map(np.float64, shaken(rng, init(rng, D), 0.02))
    mu, log_var = encode(params, x)
    for found, expected in zip((mu, log_var), plain.VAES[arch][0](params, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    z = 2 * rng.standard_normal((4, D))
    np.testing.assert_allclose(decode(params, z), plain.VAES[arch][1](params, z), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(vae.generate(partial(decode, params), z), plain.sigmoid(decode(params, z)))
    far = vae.generate(partial(decode, params), 1e4 * z)
    assert np.isfinite(far).all() and far.min() >= 0 and far.max() <= 1


@each_arch
def test_the_whole_elbo_against_finite_differences(rng, arch):
    params = shaken(rng, vae.VAES[arch][0](rng, D), 0.02)
    batch = tree.map(np.float64, make_batch(rng, 2))
    # A step small enough that hardly a ReLU of thousands changes side within it.
    gradient = assert_directional(lambda p: bound(arch, p, batch)[0], params, rng, directions=3, h=1e-8, rtol=1e-4)
    assert all(np.any(g) for g in tree.leaves(gradient))


@each_arch
def test_an_image_unlike_all_others_does_not_get_a_boundless_spread(rng, arch):
    params = shaken(rng, vae.VAES[arch][0](rng, D), 0.02)
    params["log_var"]["b"][:] = [50, -50, 1.5]  # as such an image might bring about; exp(50) is 5e21
    _, log_var = vae.VAES[arch][1](params, make_batch(rng, 2)[0])
    assert np.all(log_var[:, 0] == 2) and np.all(log_var[:, 1] < -40)
    assert np.all(log_var[:, 2] < 2) and np.ptp(log_var[:, 2]) > 0
    value, _, gradient = value_and_grad(partial(bound, arch))(params, make_batch(rng, 2))
    assert np.isfinite(value) and gradient["log_var"]["b"][0] == 0 != gradient["log_var"]["b"][1]


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5, 10.0])
def test_the_loss_is_the_mean_over_images_and_beta_weighs_the_second_term_alone(rng, beta):
    _, encode, decode = vae.VAES["mlp"]
    params = vae.VAES["mlp"][0](rng, D)
    batch = make_batch(rng, 5)
    reconstruction, kl = vae.elbo_terms(partial(encode, params), partial(decode, params), batch)
    value, means = bound("mlp", params, batch, beta)
    assert value == pytest.approx(np.mean(beta * kl - reconstruction), rel=1e-5)
    assert means == pytest.approx({"reconstruction": np.mean(reconstruction), "kl": np.mean(kl)}, rel=1e-5)


def test_no_decoder_beats_the_entropy_floor(rng):
    x = np.zeros((2, 28, 28, 1), np.float32)
    x[0, :7] = 0.5  # 196 pixels of one bit each
    x[1, :7] = 1
    assert vae.entropy_floor(x) == pytest.approx(196 * np.log(2) / 2)
    x, _ = make_batch(rng, 4)
    p = np.clip(x.astype(np.float64), 1e-12, 1 - 1e-12)
    best = bernoulli_log_likelihood(np.log(p / (1 - p)), x)
    assert np.mean(best) == pytest.approx(-vae.entropy_floor(x), abs=1e-6)
    worse = bernoulli_log_likelihood(np.log(p / (1 - p)) + 0.1, x)
    assert np.mean(worse) < np.mean(best)


# -------------------------------------------------------------------------------------------- importance-weighted bound


def generators(N):
    return [np.random.default_rng([0, n]) for n in range(N)]


def test_many_samples_give_the_likelihood(rng):
    """A small model with D = 1, whose log p(x) can be had by quadrature; then with ten more pixels, each of which costs
    500 nats whatever z is: none of the weights underflows."""
    w = rng.standard_normal((1, 12))
    b = rng.standard_normal(12)
    x = (rng.random((4, 12)) < 0.5).astype(float)

    def encode(x):
        return 0.3 * x[:, :12].sum(axis=1, keepdims=True) - 2, np.full((len(x), 1), -0.4)

    def decode(z):
        return z @ w + b

    def decode_more(z):
        return np.concatenate([decode(z), np.full((len(z), 10), -500.0)], axis=1)

    z = np.linspace(-12, 12, 20_001)
    log_joint = np.stack([bernoulli_log_likelihood(decode(z[:, None]), xn) for xn in x], axis=1)
    log_joint += (-0.5 * z**2 - 0.5 * np.log(2 * np.pi))[:, None]
    exact = np.log(np.exp(log_joint).sum(axis=0) * (z[1] - z[0]))
    found = vae.importance_weighted_bound(encode, decode, x, 20_000, generators(4))
    np.testing.assert_allclose(found, exact, atol=0.02)
    x = np.concatenate([x, np.ones((4, 10))], axis=1)
    shifted = vae.importance_weighted_bound(encode, decode_more, x, 20_000, generators(4))
    np.testing.assert_allclose(shifted + 5000, found, rtol=1e-6)


@pytest.mark.parametrize("first", [0, -5000])
def test_a_block_of_draws_may_be_far_less_likely_than_another(first):
    """By more than float64 can express: of two draws only the better one counts."""
    logits = iter([first, -5000 - first])

    def encode(x):
        return np.zeros((1, 1)), np.zeros((1, 1))

    def decode(z):
        return np.full((1, 1), next(logits), float)

    found = vae.importance_weighted_bound(encode, decode, np.ones((1, 1)), 2, generators(1), block=1)
    assert found == pytest.approx(np.log([0.5 / 2]))


@pytest.mark.parametrize(("K", "block"), [(1, 500), (6, 500), (6, 4)])
def test_the_bound_is_the_mean_of_the_weights_of_each_image_with_its_own_draws(rng, K, block):
    """log 1/K sum p(x | z) p(z) / q(z | x), weight by weight, for images that have nothing in common."""
    mu, log_var = rng.standard_normal((2, 3, 2))
    x = rng.random((3, 2, 2, 1))
    C = rng.standard_normal((2, 4))

    def decode(z):
        return (z @ C).reshape(-1, 2, 2, 1)

    found = vae.importance_weighted_bound(lambda x: (mu, log_var), decode, x, K, generators(3), block)
    for n, rng_of_image in enumerate(generators(3)):
        weights = []
        for eps in rng_of_image.standard_normal((K, 2), dtype=np.float32):
            z = mu[n] + np.exp(log_var[n] / 2) * eps
            p = 1 / (1 + np.exp(-(z @ C)))
            likelihood = np.prod(p ** x[n].ravel() * (1 - p) ** (1 - x[n].ravel()))
            density_q = np.prod(np.exp(-0.5 * eps.astype(float) ** 2) / np.sqrt(2 * np.pi * np.exp(log_var[n])))
            weights.append(likelihood * np.prod(np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)) / density_q)
        assert found[n] == pytest.approx(np.log(np.mean(weights)), rel=1e-5)
