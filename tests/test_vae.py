"""The bound: each term against an independent computation, the whole against finite differences and quadrature."""

from functools import partial

from scratchgen import tree, vae
from scratchgen.gradients import value_and_grad
from scratchgen.ops import bernoulli_log_likelihood
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
    params = init(rng, D)
    batch = make_batch(rng, 5)
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
    params = vae.VAES["mlp"][0](rng, D)
    batch = make_batch(rng, 5)
    reconstruction, kl = vae.elbo_terms(partial(encode, params), partial(decode, params), batch)
    value, means = bound("mlp", params, batch)
    assert value == pytest.approx(-np.mean(reconstruction - kl), rel=1e-5)
    assert means == pytest.approx({"reconstruction": np.mean(reconstruction), "kl": np.mean(kl)}, rel=1e-5)


def test_kl_against_monte_carlo(rng):
    mu = np.array([0.7, -1.2, 0.0])
    log_var = np.array([0.5, -1.0, 0.0])
    z = mu + np.exp(log_var / 2) * rng.standard_normal((400_000, 3))
    log_q = -0.5 * ((z - mu) ** 2 / np.exp(log_var) + log_var)
    log_p = -0.5 * z**2
    estimate = (log_q - log_p).mean(axis=0)
    error = (log_q - log_p).std(axis=0) / np.sqrt(len(z))
    kl = vae.kl_per_dimension(mu, log_var)
    assert np.all(np.abs(kl - estimate) <= 4 * error) and kl[2] == 0 and kl[0] > 0.3


def test_gradients_of_reparameterise_and_kl(rng):
    mu, log_var, eps = rng.standard_normal((3, 4, 5))
    assert_gradients(lambda mu, log_var: vae.reparameterise(mu, log_var, eps), [mu, log_var])
    assert_gradients(vae.kl_per_dimension, [mu, log_var])


def test_reparameterised_z_has_the_moments_of_q(rng):
    mu = np.array([[2.0, -1.0]])
    log_var = np.array([[np.log(4.0), np.log(0.25)]])
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
    params = vae.VAES[arch][0](rng, D)
    batch = make_batch(rng, 8)
    moments = init_moments(params)
    step_of = value_and_grad(partial(bound, arch))
    before = float(step_of(params, batch)[0])
    for step in range(1, steps + 1):
        value, _, gradient = step_of(params, batch)
        adam_step(params, gradient, moments, step, lr=3e-3)
    floor = vae.entropy_floor(batch[0])
    assert value - floor < 0.5 * (before - floor)


def test_beta_weighs_the_second_term_alone(rng):
    _, encode, decode = vae.VAES["mlp"]
    params = vae.VAES["mlp"][0](rng, D)
    batch = make_batch(rng, 5)
    for beta in (0.0, 0.5, 10.0):
        value, means = vae.negative_elbo(partial(encode, params), partial(decode, params), batch, beta)
        assert value == pytest.approx(beta * means["kl"] - means["reconstruction"], rel=1e-6)
        assert means == bound("mlp", params, batch)[1]  # what is reported does not depend on it


# -------------------------------------------------------------------------------------------- importance-weighted bound


@pytest.fixture
def one_dimensional(rng):
    """encode, decode and x of a small model with D = 1, whose log p(x) can be had by quadrature."""
    w = rng.standard_normal((1, 12))
    b = rng.standard_normal(12)
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
    return vae.importance_weighted_bound(encode, decode, x, K, generators(len(x), seed), **options)


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
    """Ten more pixels, each of which costs 500 nats whatever z is."""
    encode, decode, x, exact = one_dimensional
    longer = np.concatenate([x, np.ones((len(x), 10))], axis=1)
    shifted = (
        lambda x: encode(x[:, :12]),
        lambda z: np.concatenate([decode(z), np.full((len(z), 10), -500.0)], axis=1),
        longer,
        exact,
    )
    np.testing.assert_allclose(iwae(shifted, 20, block=7) + 5000, iwae(one_dimensional, 20), rtol=1e-6)


def test_it_takes_the_images_and_networks_of_the_vae(rng):
    init, encode, decode = vae.VAES["mlp"]
    params = init(rng, 3)
    x = rng.random((2, 28, 28, 1), dtype=np.float32)
    model = partial(encode, params), partial(decode, params), x, None
    found = iwae(model, 6, block=4)
    assert found.shape == (2,) and np.isfinite(found).all()


def test_the_bound_is_the_mean_of_the_weights_of_each_image_with_its_own_draws(rng):
    """log 1/K sum p(x | z) p(z) / q(z | x), weight by weight, for images that have nothing in common."""
    mu, log_var = rng.standard_normal((2, 3, 2))
    x = rng.random((3, 2, 2, 1))
    C = rng.standard_normal((2, 4))

    def decode(z):
        return (z @ C).reshape(-1, 2, 2, 1)

    found = vae.importance_weighted_bound(lambda x: (mu, log_var), decode, x, 6, generators(3))
    for n, rng_of_image in enumerate(generators(3)):
        weights = []
        for eps in rng_of_image.standard_normal((6, 2), dtype=np.float32):
            z = mu[n] + np.exp(log_var[n] / 2) * eps
            p = 1 / (1 + np.exp(-(z @ C)))
            likelihood = np.prod(p ** x[n].ravel() * (1 - p) ** (1 - x[n].ravel()))
            density_q = np.prod(np.exp(-0.5 * eps.astype(float) ** 2) / np.sqrt(2 * np.pi * np.exp(log_var[n])))
            weights.append(likelihood * np.prod(np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)) / density_q)
        assert found[n] == pytest.approx(np.log(np.mean(weights)), rel=1e-5)
