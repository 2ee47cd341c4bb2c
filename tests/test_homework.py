"""The tests of the functions that the homework asks for. `pytest -k question_7` runs those of question 7 alone.

What a function returns is compared with what it has to be by definition: image by image, by the density of a Gaussian,
by quadrature, by counting draws. No question needs the code of a later one. A test that fails says in one line what was
expected. "Eq." is the sheet's.
"""

import sys
import warnings
from functools import partial
from math import exp, log

from scratchgen import diffusion, plots, tree, vae
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from finite_differences import assert_gradients
from matplotlib.backends.backend_agg import FigureCanvasAgg


def expect(right, words):
    """Fail with these words, and without a traceback, unless ``right``, or all of it, is true."""
    if not np.all(right):
        pytest.fail(words, pytrace=False)


def close(found, expected, rtol=1e-5, atol=1e-6):
    """Whether both are of one shape and nearly equal."""
    return np.shape(found) == np.shape(expected) and np.allclose(found, expected, rtol, atol)


def expect_gradients(f, arrays, words):
    """The gradients of f, as autograd finds them, against finite differences."""
    try:
        assert_gradients(f, arrays)
    except AssertionError:
        pytest.fail(words, pytrace=False)


def expect_normal(noise, words):
    """Whether 4,000 numbers or more may be draws from N(0, 1): mean, variance, and the shares within 1 and 2 of 0."""
    noise = np.ravel(noise)
    error = 4.5 / np.sqrt(len(noise))
    shares = [np.mean(np.abs(noise) < 1), np.mean(np.abs(noise) < 2)]
    expect(abs(noise.mean()) < error and abs(noise.var() - 1) < 1.5 * error, f"{words}: expected mean 0 and variance 1")
    expect(
        np.abs(np.subtract(shares, [0.6827, 0.9545])) < error,
        f"{words}: expected 68 % within 1 of 0, 95 % within 2, as of N(0, 1); found {shares[0]:.0%}, {shares[1]:.0%}",
    )


# ---------------------------------------------------------------------------------------------------------- 4: the VAE


def test_question_4_reparameterise_is_a_draw_of_that_mean_and_variance(rng):
    mu, log_var = rng.standard_normal((2, 4, 5))
    at_0, at_1, at_3 = (vae.reparameterise(mu, log_var, np.full((4, 5), eps)) for eps in (0.0, 1.0, 3.0))
    expect(np.shape(at_0) == (4, 5), "reparameterise: expected z of shape (N, D)")
    expect(close(at_0, mu), "reparameterise: without noise z is mu")
    expect(close(at_3 - mu, 3 * (at_1 - mu)), "reparameterise: three times the noise is three times as far from mu")
    expect(
        not close(at_1 - mu, np.exp(log_var)), "reparameterise: expected eps times the deviation, found the variance"
    )
    expect(close(2 * np.log(np.abs(at_1 - mu)), log_var), "reparameterise: z - mu has the log-variance log_var")
    eps = rng.standard_normal((4, 5))
    words = "reparameterise: expected each dimension of each image to have its own noise, eps at its place"
    expect(close(vae.reparameterise(mu, log_var, eps) - mu, (at_1 - mu) * eps), words)


def test_question_4_reparameterise_lets_gradients_reach_mu_and_log_var(rng):
    mu, log_var, eps = rng.standard_normal((3, 4, 5))
    words = "reparameterise: expected the gradients of mu and log_var that finite differences give"
    expect_gradients(lambda mu, log_var: vae.reparameterise(mu, log_var, eps), [mu, log_var], words)


def kl_by_quadrature(mu, log_var):
    """The integral of q (log q - log p) over a line, q = N(mu, exp(log_var)), p = N(0, 1), for numbers mu, log_var."""
    z = np.linspace(-30, 30, 20_001)
    log_q = log_normal(z, mu, exp(log_var))
    return np.sum(np.exp(log_q) * (log_q - log_normal(z, 0, 1))) * (z[1] - z[0])


def log_normal(x, mean, variance):
    """The logarithm of the density of N(mean, variance) at x, number by number."""
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * np.log(2 * np.pi * variance)


def test_question_4_kl_per_dimension_is_its_integral(rng):
    mu, log_var = rng.standard_normal((2, 3, 4))
    kl = vae.kl_per_dimension(mu, log_var)
    expect(np.shape(kl) == (3, 4), "kl_per_dimension: expected (N, D), a number for each latent dimension, not a sum")
    expected = np.vectorize(kl_by_quadrature)(mu, log_var)
    expect(not close(kl, -expected), "kl_per_dimension: a divergence is never negative; found it with the other sign")
    expect(not close(kl, 2 * expected), "kl_per_dimension: found twice the divergence")
    expect(close(kl, expected), "kl_per_dimension: expected the integral of q (log q - log p), p = N(0, 1)")
    words = "kl_per_dimension: expected the gradients of mu and log_var that finite differences give"
    expect_gradients(vae.kl_per_dimension, [mu, log_var], words)


def pixel(logit, bit):
    """The log-probability of a pixel that is 0 or 1, and 1 with probability 1 / (1 + e^-logit)."""
    p = 1 / (1 + exp(-logit))
    return log(p) if bit else log(1 - p)


def log_likelihood(logits, x):
    """Of one image: a grey pixel is the mean over pixels that are 1 with the probability of its grey, and 0 else."""
    return sum(g * pixel(l, 1) + (1 - g) * pixel(l, 0) for l, g in zip(np.ravel(logits), np.ravel(x), strict=True))


def test_question_4_bernoulli_log_likelihood_is_that_of_each_image(rng):
    logits = 3 * rng.standard_normal((3, 4, 6, 2))
    for x in (rng.random((3, 4, 6, 2)), np.round(rng.random((3, 4, 6, 2)))):
        found = vae.bernoulli_log_likelihood(logits, x)
        expect(np.shape(found) == (3,), "bernoulli_log_likelihood: expected (N,), one number for each image")
        expected = [log_likelihood(*pair) for pair in zip(logits, x, strict=True)]
        expect(not close(found, np.negative(expected)), "bernoulli_log_likelihood: found minus it, the cross-entropy")
        expect(not close(found, np.divide(expected, 48)), "bernoulli_log_likelihood: pixels add up; found their mean")
        expect(close(found, expected), "bernoulli_log_likelihood: expected the sum over pixels of log p(x)")


def test_question_4_bernoulli_log_likelihood_neither_overflows_nor_loses_digits():
    logits = np.array([1000.0, -1000.0, 1000.0, -1000.0]).reshape(4, 1, 1, 1)
    x = np.array([1.0, 0.0, 0.0, 1.0]).reshape(4, 1, 1, 1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = vae.bernoulli_log_likelihood(logits, x)
    words = "bernoulli_log_likelihood: of logits 1000 and -1000 expected 0 where they are right, -1000 where not"
    expect(close(found, [0, 0, -1000, -1000]), words)
    logits = np.concatenate([logits, np.zeros((2, 1, 1, 1))]).astype(np.float32)
    x = np.array([1, 0, 0, 1, 1, 0], np.float32).reshape(6, 1, 1, 1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        _, gradient = value_and_grad(lambda logits: vae.bernoulli_log_likelihood(logits, x).sum())(logits)
    words = (
        "bernoulli_log_likelihood: of logits 1000, -1000 and 0 expected the gradient where they are right 0, 0 and 1/2"
    )
    expect(close(np.ravel(gradient), [0, 0, -1, 1, 0.5, -0.5]), words)


def test_question_4_bernoulli_log_likelihood_has_the_gradient_of_finite_differences(rng):
    """Each image's gradient has its own factor, as in the sum over a batch."""
    logits = 3 * rng.standard_normal((3, 4, 6, 2))
    x = rng.random((3, 4, 6, 2))
    factor = rng.standard_normal(3)
    words = "bernoulli_log_likelihood: expected the gradient of the logits that finite differences give"
    expect_gradients(lambda logits: vae.bernoulli_log_likelihood(logits, x) * factor, [logits], words)


def test_question_4_elbo_terms_are_both_terms_image_by_image(rng):
    """Images of six pixels, two latent dimensions; encoder and decoder are any functions."""
    A, B = rng.standard_normal((2, 6, 2))
    C = rng.standard_normal((2, 6))

    def encode(x):
        return x.reshape(-1, 6) @ A, x.reshape(-1, 6) @ B

    for N in (1, 4):
        x = rng.random((N, 2, 3, 1))
        eps = rng.standard_normal((N, 2))
        terms = vae.elbo_terms(encode, lambda z: (z @ C).reshape(-1, 2, 3, 1), (x, eps))
        expect(len(terms) == 2, "elbo_terms: expected the pair (reconstruction, kl)")
        words = "elbo_terms: expected both terms of shape (N,), one number for each image"
        expect([np.shape(term) == (N,) for term in terms], words)
        mu, log_var = encode(x)
        z = vae.reparameterise(mu, log_var, eps)
        first = [log_likelihood(z[n] @ C, x[n]) for n in range(N)]
        second = [sum(map(kl_by_quadrature, mu[n], log_var[n])) for n in range(N)]
        expect(not close(terms[0], second), "elbo_terms: expected (reconstruction, kl), found them exchanged")
        expect(close(terms[0], first), "elbo_terms: the first is log p(x | z) of the z that mu, log_var and eps give")
        expect(close(terms[1], second), "elbo_terms: the second is the KL of each image, summed over latent dimensions")


def shaken(params, rng):
    """Other parameters near these: what starts at zero is zero no more."""
    return tree.map(lambda p: p + np.float32(0.02) * rng.standard_normal(p.shape, dtype=np.float32), params)


def network(rng, D):
    params = vae.init_mlp_vae(rng, D)
    expect(len(tree.leaves(params)) > 0, "init_mlp_vae: expected a tree of arrays, as init_dense makes")
    return shaken(params, rng)


def curved(f, a, b):
    """Whether f is no affine function: that would map the middle of a and b to the middle of f(a) and f(b)."""
    middle = 0.5 * (f(a) + f(b))
    return np.abs(f(0.5 * (a + b)) - middle).max() > 1e-4 * np.abs(middle).max()


def test_question_4_mlp_encode_gives_mu_and_log_var_of_each_image(rng):
    for D, N in ((3, 6), (7, 1)):
        params = network(rng, D)
        pair = vae.mlp_encode(params, rng.random((N, 28, 28, 1), dtype=np.float32))
        words = f"mlp_encode: expected the pair (mu, log_var), each (N, D) = ({N}, {D})"
        expect(len(pair) == 2 and [np.shape(part) for part in pair] == [(N, D)] * 2, words)
    params = network(rng, 5)
    x = rng.random((6, 28, 28, 1), dtype=np.float32)
    together = vae.mlp_encode(params, x)
    for part, name in enumerate(("mu", "log_var")):
        alone = np.concatenate([vae.mlp_encode(params, x[n : n + 1])[part] for n in range(6)])
        expect(np.ptp(alone, axis=0) > 1e-5, f"mlp_encode: expected {name} to depend on the image, in each dimension")
        expect(close(together[part], alone, 1e-3, 1e-4), f"mlp_encode: {name} must not depend on other images")
        words = f"mlp_encode: expected a network with a nonlinearity between its layers, found {name} affine in x"
        expect(curved(lambda x, part=part: vae.mlp_encode(params, x)[part], x, x[::-1] ** 3), words)


def test_question_4_mlp_encode_has_two_heads(rng):
    """mu and log_var are no functions of each other, and log_var is neither bounded to one sign nor to one value."""
    params = network(rng, 4)
    mu, log_var = vae.mlp_encode(params, rng.random((200, 28, 28, 1), dtype=np.float32))
    for found in (mu, np.abs(mu), np.exp(mu)):
        words = "mlp_encode: log_var has to have weights of its own, found it to follow from mu"
        expect([abs(np.corrcoef(found[:, d], log_var[:, d])[0, 1]) < 0.999 for d in range(4)], words)

    def both(params):  # for a few steps: how high log_var, and how low
        mu, log_var = vae.mlp_encode(params, np.full((1, 28, 28, 1), 0.5, np.float32))
        return (log_var[0, 0] - log_var[0, 1] + 1) ** 2 + (log_var[0, 1] + 1) ** 2 + 0 * mu[0, 0]

    def reaches(params, lr):
        for _ in range(4):
            params = trained(value_and_grad(both), params, 50, lr)
            if both(params) < 0.1:
                return True
        return False

    reached = reaches(params, 3e-3) or reaches(params, 3e-4)
    expect(reached, "mlp_encode: log_var has to be free to be below zero, and another in each dimension")


def trained(loss_and_gradient, params, steps, lr, batch=()):
    params = tree.map(np.copy, params)
    moments = init_moments(params)
    for step in range(1, steps + 1):
        *_, gradient = loss_and_gradient(params, *batch)
        adam_step(params, gradient, moments, step, lr)
    return params


def test_question_4_mlp_decode_gives_the_logits_of_each_image(rng):
    params = network(rng, 5)
    z = 3 * rng.standard_normal((20, 5), dtype=np.float32)
    logits = vae.mlp_decode(params, z)
    expect(np.shape(logits) == (20, 28, 28, 1), "mlp_decode: expected logits of shape (N, 28, 28, 1)")
    expect(np.min(logits) < 0, "mlp_decode: expected logits, which may be negative, found none: probabilities?")
    alone = np.concatenate([vae.mlp_decode(params, z[n : n + 1]) for n in range(20)])
    expect(close(logits, alone, 1e-3, 1e-4), "mlp_decode: the logits of a code must not depend on the other codes")
    for d in range(5):
        other = z.copy()
        other[:, d] += 1
        expect(not close(vae.mlp_decode(params, other), logits), f"mlp_decode: expected z_{d} to change the image")
    words = "mlp_decode: expected a network with a nonlinearity between its layers, found it affine in z"
    expect(curved(partial(vae.mlp_decode, params), z, z[::-1] + 1), words)


def test_question_4_init_mlp_vae_makes_parameters_that_all_get_a_gradient(rng):
    params = network(rng, 3)
    x = rng.random((8, 28, 28, 1), dtype=np.float32)
    z = rng.standard_normal((8, 3), dtype=np.float32)
    u, v = rng.standard_normal((2, 8, 3), dtype=np.float32)
    w = rng.standard_normal((8, 28, 28, 1), dtype=np.float32)

    def loss(params):
        mu, log_var = vae.mlp_encode(params, x)
        return (u * mu).sum() + (v * log_var).sum() + (w * vae.mlp_decode(params, z)).sum()

    _, gradient = value_and_grad(loss)(params)
    for name, g in zip(tree.names(gradient), tree.leaves(gradient), strict=True):
        expect(np.any(g != 0), f"init_mlp_vae: no output depends on the parameter {name}")
    others = (vae.init_mlp_vae(np.random.default_rng(seed), 3) for seed in (1, 1, 2))
    one, same, other = (np.concatenate([leaf.ravel() for leaf in tree.leaves(params)]) for params in others)
    expect(np.array_equal(one, same), "init_mlp_vae: expected the same weights for the same seed of rng")
    expect(not np.array_equal(one, other), "init_mlp_vae: expected other weights for another seed of rng")


# ----------------------------------------------------------------------------------------------------- 5: its training


def small_vae(params, batch, *beta):
    """The loss of linear networks: six pixels, two latent dimensions."""
    encode = lambda x: (x.reshape((-1, 6)) @ params["mu"], x.reshape((-1, 6)) @ params["log_var"])  # noqa: E731
    return vae.negative_elbo(encode, lambda z: (z @ params["decode"]).reshape((-1, 1, 6, 1)), batch, *beta)


def small_vae_params(rng):
    shapes = {"mu": (6, 2), "log_var": (6, 2), "decode": (2, 6)}
    return {name: 0.5 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_question_5_negative_elbo_is_minus_the_mean_of_the_bound(rng):
    params = small_vae_params(rng)
    for N in (1, 5):
        x = rng.random((N, 1, 6, 1))
        eps = rng.standard_normal((N, 2))
        found = small_vae(params, (x, eps))
        words = 'negative_elbo: expected the pair (loss, {"reconstruction": .., "kl": ..})'
        expect(isinstance(found, tuple) and len(found) == 2 and set(found[1]) == {"reconstruction", "kl"}, words)
        loss, terms = found
        expect(np.shape(loss) == (), "negative_elbo: expected one number, the mean over the batch")
        first, second = 0.0, 0.0
        for n in range(N):
            mu, log_var = (x[n].ravel() @ params[name] for name in ("mu", "log_var"))
            z = vae.reparameterise(mu[None], log_var[None], eps[n : n + 1])[0]
            first += log_likelihood(z @ params["decode"], x[n]) / N
            second += sum(map(kl_by_quadrature, mu, log_var)) / N
        expect(not close(loss, first - second), "negative_elbo: found the bound itself; the loss is minus it")
        expect(close(terms["reconstruction"], first), "negative_elbo: expected the first term as a mean over the batch")
        expect(close(terms["kl"], second), "negative_elbo: expected the KL as a mean over the batch")
        expect(close(loss, second - first), "negative_elbo: expected minus the mean of (first term - KL)")


def test_question_5_negative_elbo_has_the_gradient_of_finite_differences(rng):
    batch = rng.random((4, 1, 6, 1)), rng.standard_normal((4, 2))
    params = tree.map(np.float64, small_vae_params(rng))

    def loss(*leaves):
        return small_vae(dict(zip(params, leaves, strict=True)), batch)[0]

    words = "negative_elbo: expected the gradient of both networks that finite differences give"
    expect_gradients(loss, list(params.values()), words)


def test_question_5_negative_elbo_of_the_networks_falls(rng):
    """Twenty images with a bright half, left or right: 120 steps with the networks of question 4."""
    x = np.full((20, 28, 28, 1), 0.05, np.float32)
    x[:10, :, :14] = 0.95
    x[10:, :, 14:] = 0.95
    batch = x, rng.standard_normal((20, 3), dtype=np.float32)

    def loss(params, batch):
        return vae.negative_elbo(partial(vae.mlp_encode, params), partial(vae.mlp_decode, params), batch)

    params = vae.init_mlp_vae(rng, 3)
    before, _ = loss(params, batch)
    after, _ = loss(trained(value_and_grad(loss), params, 120, 1e-3, (batch,)), batch)
    expect(after < 0.7 * before, f"the networks: 120 steps should lower the loss by 30 %; {before:.0f}, {after:.0f}")


# ----------------------------------------------------------------------------------------------------- 6: plot_latents


def drawn(paint, i=4, j=1, colours=False, **options):
    """The picture that `plot_latents` draws of z_i and z_j, as grey levels (height, width); paint(images, z) lights
    pixels. A white and a black pixel are in every image, whatever it shows: so grey stays grey if colours are scaled.
    """

    def decode(z):
        z = np.asarray(z)
        images = np.zeros((len(z), 28, 28, 1), np.float32)
        paint(images, z)
        images[:, 0, 0] = 1
        images[:, 0, 1] = 0
        return images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = plots.plot_latents(decode, 6, i, j, **options)
        expect(hasattr(figure, "savefig"), "plot_latents: expected a matplotlib figure")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    return picture if colours else picture.mean(axis=-1)


def place(picture, dark):
    """Where a picture differs from the dark one: the mean row and the mean column, counted from the top left."""
    difference = np.abs(picture - dark)
    expect(difference.max() > 50, "plot_latents: expected to see in the figure what is decoded")
    rows, columns = np.nonzero(difference > 0.5 * difference.max())
    return np.array([rows.mean(), columns.mean()])


@pytest.mark.parametrize(("n", "extent"), [(None, None), (4, 1.5)])
def test_question_6_plot_latents_decodes_an_even_grid_with_all_other_dimensions_zero(n, extent):
    asked = []
    drawn(lambda images, z: asked.append(z.copy()), **({} if n is None else {"n": n, "extent": extent}))
    z = np.concatenate(asked)
    given = f"n = {n or 10} and extent = {extent or 3}"
    expect(z.shape[1:] == (6,), "plot_latents: expected codes of shape (N, latent_dim)")
    expect(z[:, [0, 2, 3, 5]] == 0, "plot_latents: expected all dimensions but i and j to be zero")
    ticks = np.linspace(-(extent or 3), extent or 3, n or 10)
    for d, name in ((4, "z_i"), (1, "z_j")):
        words = f"plot_latents: for {given} expected {name} to take n values evenly from -extent to extent"
        expect(close(np.unique(np.round(z[:, d], 4)), ticks, atol=1e-3), words)
    pairs = {(round(float(a), 3), round(float(b), 3)) for a, b in z[:, [4, 1]]}
    expect(len(pairs) == len(ticks) ** 2, f"plot_latents: for {given} expected each pair of values (z_i, z_j) once")


def place_of(part, chosen, dark, **options):
    """Where one sees a part of the images whose z are chosen."""

    def paint(images, z):
        images[(chosen(z), *part)] = 1

    return place(drawn(paint, **options), dark)


@pytest.mark.parametrize(("i", "j"), [(4, 1), (1, 4)])
def test_question_6_plot_latents_shows_z_i_to_the_right_and_z_j_upwards(i, j):
    options = {"n": 3, "extent": 1.5, "i": i, "j": j}
    dark = drawn(lambda images, z: None, **options)

    def of_code(z_i, z_j):
        return place_of((), lambda z: np.isclose(z[:, i], z_i) & np.isclose(z[:, j], z_j), dark, **options)

    start = of_code(-1.5, -1.5)
    for code, axis, sign, way in (
        ((1.5, -1.5), 1, 1, "z_i grows to the right"),
        ((-1.5, 0), 0, -1, "z_j grows upwards"),
    ):
        step = of_code(*code) - start
        words = f"plot_latents: expected that {way}"
        expect(abs(step[1 - axis]) < 0.2 * abs(step[axis]), words + ", found the other axis to change")
        expect(sign * step[axis] > 10, words)


def test_question_6_plot_latents_shows_0_and_1_as_black_and_white():
    """Or the other way round; and if it shows colours, these may be any."""

    def paint(images, z):
        images[:, 8:20, 8:20] = 1

    dark, lit = (drawn(p, n=3, colours=True) for p in (lambda images, z: None, paint))
    change = np.abs(lit - dark).max(axis=-1)
    dark, lit = (picture[change > 0.5 * change.max()] for picture in (dark, lit))
    if np.ptp(dark, axis=-1).max() < 3 and np.ptp(lit, axis=-1).max() < 3:
        words = f"plot_latents: expected 0 black and 1 white; found greys {dark.mean():.0f} and {lit.mean():.0f} of 255"
        expect(min(dark.mean(), lit.mean()) < 60 and max(dark.mean(), lit.mean()) > 195, words)


def test_question_6_plot_latents_shows_images_upright():
    """Two squares: one at the top right of each image, one at the bottom left."""
    options = {"n": 3, "extent": 1.5}
    dark = drawn(lambda images, z: None, **options)
    high, low = np.s_[4:10], np.s_[18:24]
    above, below = (place_of(part, lambda z: slice(None), dark, **options) for part in ((high, low), (low, high)))
    words = "plot_latents: expected each image upright, found it turned, mirrored or transposed"
    expect(below[0] - above[0] > 5 and above[1] - below[1] > 5, words)


# ----------------------------------------------------------------------------------------------------- 7: q(x_t | x_0)


def schedule_of(name, T):
    """The schedule that is written in question 7; what it divides by zero at t = 0 is its own affair."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return diffusion.make_schedule(name, T)


def both_schedules(T=200):
    return [schedule_of(name, T) for name in diffusion.SCHEDULES]


def survivals(schedule):
    """For each t the share of the variance of x_0 that is left in x_t, from the betas alone, step by step."""
    left = [1.0]
    for beta in schedule["beta"][1:]:
        left.append(left[-1] * (1 - beta))
    return np.array(left)


def test_question_7_make_schedule_holds_what_its_names_say():
    for name in diffusion.SCHEDULES:
        for T in (200, 7):
            schedule = schedule_of(name, T)
            for key in ("T", "beta", "alpha", "alpha_bar"):
                expect(key in schedule, f'make_schedule: expected the key "{key}"')
            expect(schedule["T"] == T, "make_schedule: T is the number of steps")
            for key in ("beta", "alpha", "alpha_bar"):
                expect(len(schedule[key]) == T + 1, f"make_schedule: expected {key} for t = 0 to T")
            expect(schedule["beta"][0] == 0, "make_schedule: beta_0 is 0, as index 0 is the clean image")
            expect(schedule["alpha"][0] == 1, "make_schedule: alpha_0 is 1, as index 0 is the clean image")
            expect(close(schedule["beta"][1:], diffusion.SCHEDULES[name](T)), "make_schedule: beta_1 .. beta_T by name")
            left = survivals(schedule)
            shares = left[1:] / left[:-1]
            expect(close(schedule["alpha"][1:], shares, 1e-12, 1e-15), "make_schedule: expected alpha_t = 1 - beta_t")
            words = "make_schedule: alpha_bar_t is the product of alpha_1 .. alpha_t, in float64, and alpha_bar_0 = 1"
            expect(close(schedule["alpha_bar"], left, 1e-10, 1e-15), words)


def test_question_7_q_sample_has_the_mean_and_the_variance_of_equation_3():
    """At every t, of one pixel: the factor of the image, and the variance of the noise."""
    one = np.ones((1, 1, 1, 1))
    for schedule in both_schedules():
        left = survivals(schedule)
        for t in range(1, 201):
            factor, variance = np.sqrt(left[t]), 1 - left[t]
            image, noise = (diffusion.q_sample(schedule, k * one, np.array([t]), (1 - k) * one) for k in (1, 0))
            expect(np.shape(image) == (1, 1, 1, 1), "q_sample: expected x_t of the shape of x_0")
            image, noise = float(np.ravel(image)[0]), float(np.ravel(noise)[0])
            expect(noise > 0, "q_sample: expected the noise to be added")
            if not np.isclose(noise, np.sqrt(variance), 1e-5, 1e-9):
                words = "q_sample: the variance is (1 - alpha_bar_t) I, found its square: the noise lacks a root"
                expect(not np.isclose(noise, variance, 1e-5), words)
                expect(False, f"q_sample: expected the noise with variance 1 - alpha_bar_t, at t = {t}")
            if not np.isclose(image, factor, 1e-5, 1e-9):
                words = "q_sample: x_0 is multiplied by sqrt(alpha_bar_t), found it without the root"
                expect(not np.isclose(image, factor**2, 1e-5), words)
                expect(False, f"q_sample: expected x_0 times sqrt(alpha_bar_t), at t = {t}")


def test_question_7_q_sample_gives_each_image_its_own_t(rng):
    schedule = schedule_of("linear", 200)
    x_0, eps = rng.standard_normal((2, 3, 2, 5, 1))
    t = np.array([1, 200, 60])
    together = diffusion.q_sample(schedule, x_0, t, eps)
    alone = [diffusion.q_sample(schedule, x_0[n : n + 1], t[n : n + 1], eps[n : n + 1])[0] for n in range(3)]
    expect(close(together, alone), "q_sample: each image has its own t and its own noise, whatever the others have")
    x_0 *= 3
    before = x_0.copy(), eps.copy()
    found = np.copy(diffusion.q_sample(schedule, x_0, t, eps))
    expect([np.array_equal(*pair) for pair in zip(before, (x_0, eps), strict=True)], "q_sample: it changes x_0 or eps")
    one = np.ones((3, 1, 1, 1))
    image, noise = (diffusion.q_sample(schedule, k * one, t, (1 - k) * one) for k in (1, 0))
    words = "q_sample: expected each pixel of x_t from that pixel of x_0 and of eps, whatever their values are"
    expect(close(found, image * x_0 + noise * eps), words)


# -------------------------------------------------------------------------------- 8: the KL of q(x_T | x_0) to N(0, I)


def schedule_with(betas):
    """The schedule with these beta_1 .. beta_T, made by `make_schedule`, too."""
    diffusion.SCHEDULES["of this test"] = lambda T: np.array(betas)
    try:
        return schedule_of("of this test", len(betas))
    finally:
        del diffusion.SCHEDULES["of this test"]


def test_question_8_prior_kl_is_the_general_formula_image_by_image(rng):
    """By matrices, with the formula of question 8; and for the first image by the mean of log q - log p over draws."""
    for betas in ([0.3, 0.1, 0.2], [0.05] * 40):
        schedule = schedule_with(betas)
        left = survivals(schedule)[-1]
        x_0 = rng.uniform(-1, 1, (3, 2, 3, 2)) * np.array([1, 0.2, 2]).reshape(3, 1, 1, 1)
        found = diffusion.prior_kl(schedule, x_0)
        expect(np.shape(found) == (3,), "prior_kl: expected (N,), one number for each image")
        S = (1 - left) * np.eye(12)
        means = np.sqrt(left) * x_0.reshape(3, 12)
        expected = [0.5 * (np.trace(S) + m @ m - 12 - np.linalg.slogdet(S)[1]) for m in means]
        expect(close(found, expected), "prior_kl: expected the formula of question 8, for q(x_T | x_0)")
        expect(close(diffusion.prior_kl(schedule, x_0[1:2]), expected[1:2]), "prior_kl: one image is a batch, too")
        draws = means[0] + np.sqrt(1 - left) * rng.standard_normal((50_000, 12))
        log_ratio = (log_normal(draws, means[0], 1 - left) - log_normal(draws, 0, 1)).sum(axis=1)
        words = "prior_kl: expected the mean of log q - log p over draws from q(x_T | x_0)"
        expect(abs(found[0] - log_ratio.mean()) < 5 * log_ratio.std() / np.sqrt(len(draws)), words)


def test_question_8_prior_kl_falls_to_zero(rng):
    x_0 = rng.uniform(-1, 1, (1, 28, 28, 1)).astype(np.float32)
    values = [diffusion.prior_kl(schedule_with([0.5] * T), x_0)[0] for T in (1, 3, 7, 14, 20)]
    expect(np.diff(values) < 0, "prior_kl: the less of the image is left in x_T, the smaller it is")
    S = (1 - 0.5**20) * np.eye(784)
    expected = 0.5 * (np.trace(S) + 0.5**20 * np.sum(x_0.astype(np.float64) ** 2) - 784 - np.linalg.slogdet(S)[1])
    words = "prior_kl: where nearly nothing of the image is left it is nearly 0; expected it to be computed in float64"
    expect(close(values[-1], expected, 1e-3, 1e-9), words)


# ------------------------------------------------------------------------------------------------- 9: the reverse step


def bayes(schedule, t, x_0, x_t, mean, variance):
    """How far N(mean, variance) is from q(x_{t-1} | x_t, x_0), in logarithms of densities, for numbers x_0 and x_t.

    Bayes' rule: q(x_{t-1} | x_t, x_0) q(x_t | x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0), whatever x_{t-1} is, and all
    but the first are Eqs. (2) and (3).
    """
    left = survivals(schedule)
    beta = schedule["beta"][t]
    x = mean + np.sqrt(variance) * np.array([-2.0, 0.0, 1.5])
    forward = log_normal(x_t, np.sqrt(1 - beta) * x, beta) + log_normal(x, np.sqrt(left[t - 1]) * x_0, 1 - left[t - 1])
    backward = log_normal(x, mean, variance) + log_normal(x_t, np.sqrt(left[t]) * x_0, 1 - left[t])
    return np.abs(forward - backward).max()


def test_question_9_q_posterior_is_by_bayes_rule_what_the_forward_steps_leave_open(rng):
    t = np.array([2, 3, 17, 80, 150, 200])
    for schedule in both_schedules():
        x_0 = rng.uniform(-1, 1, (6, 2, 3, 1))
        x_t = rng.standard_normal((6, 2, 3, 1))
        pair = diffusion.q_posterior(schedule, x_0, x_t, t)
        expect(len(pair) == 2, "q_posterior: expected the pair (mean, variance)")
        mean, variance = pair
        expect(np.shape(mean) == (6, 2, 3, 1), "q_posterior: expected the mean of the shape of x_t, (N, H, W, C)")
        words = "q_posterior: expected the variance as (N, 1, 1, 1), a number for each image"
        expect(np.shape(variance) in [(6, 1, 1, 1), (6, 2, 3, 1)], words)
        for n in range(6):
            v = float(np.ravel(variance[n])[0])
            expect(v > 0, "q_posterior: the variance is above zero for t > 1")
            far = max(
                bayes(schedule, t[n], *(float(a[n, h, w, 0]) for a in (x_0, x_t, mean)), v)
                for h in range(2)
                for w in range(3)
            )
            words = f"q_posterior: expected the Gaussian of Eqs. (4) to (6), which Bayes' rule confirms; at t = {t[n]}"
            expect(far < 5e-3, words + f" of {list(map(int, t))} it is another one")


def test_question_9_q_posterior_at_t_1_is_the_clean_image(rng):
    x_0, x_1 = rng.uniform(-1, 1, (2, 3, 2, 5, 1))
    for schedule in both_schedules():
        mean, variance = diffusion.q_posterior(schedule, x_0, x_1, np.ones(3, int))
        expect(close(mean, x_0), "q_posterior: at t = 1 the mean is x_0, since alpha_bar_0 = 1")
        expect(np.ravel(variance) == 0, "q_posterior: at t = 1 the variance is 0, since alpha_bar_0 = 1")


# -------------------------------------------------------------------------------------- 10: the KL of the reverse step


def test_question_10_gaussian_kl_is_its_integral_for_each_component(rng):
    m_1, m_2 = rng.standard_normal((2, 5))
    v_1, v_2 = np.exp(rng.standard_normal((2, 5)))
    found = diffusion.gaussian_kl(m_1, v_1, m_2, v_2)
    expect(np.shape(found) == (5,), "gaussian_kl: expected a number for each component, not their sum")
    y = np.linspace(-40, 40, 80_001)
    for name, w in (("", v_2), (" with equal variances", v_1)):
        p, q = (log_normal(y[:, None], m, v) for m, v in ((m_1, v_1), (m_2, w)))
        expected = np.sum(np.exp(p) * (p - q), axis=0) * (y[1] - y[0])
        reverse = np.sum(np.exp(q) * (q - p), axis=0) * (y[1] - y[0])
        found = diffusion.gaussian_kl(m_1, v_1, m_2, w)
        expect(close(reverse, expected) or not close(found, reverse), "gaussian_kl: found it with p and q exchanged")
        expect(close(found, expected), f"gaussian_kl: expected the divergence of two Gaussians{name}, as an integral")


def test_question_10_gaussian_kl_broadcasts_a_variance_for_each_image(rng):
    m_1, m_2 = rng.standard_normal((2, 3, 2, 4, 1))
    v_1, v_2 = np.exp(rng.standard_normal((2, 3, 1, 1, 1)))
    found = diffusion.gaussian_kl(m_1, v_1, m_2, v_2)
    expect(np.shape(found) == (3, 2, 4, 1), "gaussian_kl: expected means (N, H, W, C) to give (N, H, W, C)")
    each = [diffusion.gaussian_kl(m_1[n], v_1[n, 0, 0, 0], m_2[n], v_2[n, 0, 0, 0]) for n in range(3)]
    expect(close(found, each), "gaussian_kl: expected each image with its own variances")


# ----------------------------------------------------------------------------------------------------- 11: Algorithm 1


def images(rng, N, *shape):
    return np.clip(rng.standard_normal((N, *(shape or (4, 6, 1)))), -1, 1).astype(np.float32)


def test_question_11_draw_batch_draws_each_t_from_1_to_T_evenly(rng):
    """Pearson's chi-squared over the twelve t: mean 11, and above 40 once in 40,000 times."""
    N, T = 12_000, 12
    x_0 = images(rng, N, 1, 2, 1)
    found, t, _ = diffusion.draw_batch(schedule_of("linear", T), x_0.copy(), rng)
    expect(close(found, x_0), "draw_batch: expected x_0 first, as it was given")
    expect(np.shape(t) == (N,) and np.issubdtype(np.asarray(t).dtype, np.integer), "draw_batch: expected t, N integers")
    expect(np.min(t) == 1 and np.max(t) == T, f"draw_batch: expected t from 1 to T, found {np.min(t)} to {np.max(t)}")
    counts = np.bincount(t, minlength=T + 1)[1:]
    expect(np.sum((counts - N / T) ** 2 / (N / T)) < 40, "draw_batch: expected all t equally often")
    of_200 = diffusion.draw_batch(schedule_of("linear", 200), x_0, rng)[1]
    words = f"draw_batch: expected t from 1 to T = 200, found {np.min(of_200)} to {np.max(of_200)}"
    expect(np.min(of_200) == 1 and np.max(of_200) == 200, words)
    words = "draw_batch: expected the t of an image to say nothing of the next image's: drawn, not counted through"
    expect(abs(np.corrcoef(t[:-1], t[1:])[0, 1]) < 0.05 and len(np.unique(np.diff(t))) > T, words)


def test_question_11_draw_batch_draws_normal_noise_for_each_pixel(rng):
    x_0 = images(rng, 3000, 2, 2, 2)
    _, t, eps = diffusion.draw_batch(schedule_of("linear", 12), x_0, rng)
    expect(np.shape(eps) == x_0.shape, "draw_batch: expected eps of the shape of x_0")
    expect_normal(eps, "draw_batch: the noise")
    expect(len(np.unique(eps)) > 0.99 * np.size(eps), "draw_batch: expected each pixel of each image its own noise")
    others = [eps[:, 0, 1, 0], eps[:, 1, 0, 0], eps[:, 0, 0, 1], t, x_0[:, 0, 0, 0], np.roll(eps[:, 0, 0, 0], 1)]
    for other in others:
        words = "draw_batch: expected noise that says nothing of x_0, of t, or of another pixel's or image's noise"
        expect(abs(np.corrcoef(eps[:, 0, 0, 0], other)[0, 1]) < 0.1, words)


def test_question_11_draw_batch_draws_anew_and_from_rng(rng):
    schedule = schedule_of("linear", 200)
    x_0 = images(rng, 20)
    draws = [diffusion.draw_batch(schedule, x_0, np.random.default_rng(seed))[1:] for seed in (1, 1, 2)]
    generator = np.random.default_rng(1)
    draws += [diffusion.draw_batch(schedule, x_0, generator)[1:] for _ in range(2)]
    for part, name in ((0, "t"), (1, "eps")):
        first, same, other, again, later = (draw[part] for draw in draws)
        words = f"draw_batch: expected {name} to be drawn from rng: the same for the same seed"
        expect(np.array_equal(first, same) and np.array_equal(first, again), words)
        expect(not np.array_equal(first, other), f"draw_batch: expected another {name} for another seed of rng")
        expect(not np.array_equal(again, later), f"draw_batch: expected another {name} each time it is called")


def test_question_11_squared_errors_are_a_number_for_each_image(rng):
    for N in (5, 1):
        eps, prediction = rng.standard_normal((2, N, 3, 4, 2))
        found = diffusion.squared_errors(eps, prediction)
        expect(np.shape(found) == (N,), "squared_errors: expected (N,), one number for each image")
        expected = [np.linalg.norm(eps[n].ravel() - prediction[n].ravel()) ** 2 for n in range(N)]
        expect(not close(found, expected), "squared_errors: expected the mean over the pixels, found their sum")
        expect(close(found, np.divide(expected, 24)), "squared_errors: expected the mean over pixels of squared errors")
    words = "squared_errors: expected the gradient of the prediction that finite differences give"
    expect_gradients(lambda prediction: diffusion.squared_errors(eps, prediction), [prediction], words)


def test_question_11_simple_loss_is_its_definition(rng):
    """Eq. (8) as a mean over images and pixels, one by one in float64; the prediction depends on x_t and on t."""
    for schedule in both_schedules():
        for N in (1, 30):
            x_0 = images(rng, N)
            t = rng.integers(1, 201, N)
            eps = rng.standard_normal(x_0.shape, dtype=np.float32)

            def eps_theta(x_t, t, N=N):
                words = "simple_loss: expected eps_theta(x_t, t) to be called with x_t (N, H, W, C) and t (N,)"
                expect(np.shape(x_t) == (N, 4, 6, 1) and np.shape(t) == (N,), words)
                return 0.9 * x_t + 0.002 * t.reshape(-1, 1, 1, 1)

            total = 0.0
            for n in range(N):
                one = (a[n : n + 1].astype(np.float64) for a in (x_0, eps))
                x_t = diffusion.q_sample(schedule, next(one), t[n : n + 1], next(one))
                total += np.linalg.norm((eps[n] - (0.9 * x_t[0] + 0.002 * t[n])).ravel()) ** 2
            found = diffusion.simple_loss(eps_theta, schedule, (x_0, t, eps))
            words = 'simple_loss: expected the pair (loss, {"loss": loss})'
            expect(isinstance(found, tuple) and len(found) == 2 and set(found[1]) == {"loss"}, words)
            expect(np.shape(found[0]) == (), "simple_loss: expected one number")
            words = "simple_loss: expected Eq. (8) as a mean over all images and pixels"
            expect(close(found[0], total / N / 24, 1e-4) and close(found[1]["loss"], found[0]), words)


def test_question_11_simple_loss_can_be_trained_on(rng):
    """Images of one grey level each, and a network of two numbers: how much of x_t it takes for noise, and a shift."""
    schedule = schedule_of("linear", 20)
    params = {"slope": np.zeros(1, np.float32), "shift": np.zeros(1, np.float32)}
    moments = init_moments(params)
    losses = []

    def loss(params, batch):
        return diffusion.simple_loss(lambda x_t, t: params["slope"] * x_t + params["shift"], schedule, batch)

    for step in range(1, 201):
        x_0 = np.full((32, 4, 6, 1), 0.5, np.float32)
        value, _, gradient = value_and_grad(loss)(params, diffusion.draw_batch(schedule, x_0, rng))
        adam_step(params, gradient, moments, step, 0.02)
        losses.append(float(value))
    expect(abs(losses[0] - 1) < 0.15, "simple_loss: predicting no noise at all costs 1")
    expect(np.mean(losses[-20:]) < 0.2, "simple_loss: 200 steps should bring it below 0.2")
    words = "simple_loss: the network should learn that what is noise is above the image's grey"
    expect(params["slope"][0] > 0.8 and params["shift"][0] < -0.05, words)


# ----------------------------------------------------------------------------------------------------- 12: Algorithm 2


def test_question_12_predict_x_0_undoes_q_sample_and_clips(rng):
    x_0 = 1.5 * images(rng, 5)
    eps = rng.standard_normal((5, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 20, 50, 80, 120])
    for schedule in both_schedules():
        x_t = diffusion.q_sample(schedule, x_0, t, eps)
        found = diffusion.predict_x_0(schedule, x_t, t, eps)
        expect(np.shape(found) == x_0.shape, "predict_x_0: expected the shape of x_t")
        expect(np.max(np.abs(found)) < 1.0001, "predict_x_0: expected it clipped to [-1, 1], where images are")
        inside = np.abs(x_0) < 0.999
        words = "predict_x_0: expected the x_0 from which this noise leads to x_t, Eq. (7), each image with its own t"
        expect(np.abs(found - x_0)[inside] < 1e-3, words)
        expect(np.abs(found - np.sign(x_0))[~inside] < 1e-2, "predict_x_0: beyond [-1, 1] expected the nearer end")


def test_question_12_p_sample_draws_from_the_step_to_the_predicted_image(rng):
    """From mean and spread, which the draws for z = 0 and z = 1 tell, to Bayes' rule, as in question 9."""
    for schedule in both_schedules():
        for t in (2, 10, 60, 120):
            x_0 = 0.3 * images(rng, 3)
            x_0[:, :2] *= 5  # some beyond [-1, 1]: the step goes to where they are clipped
            eps = rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
            x_t = diffusion.q_sample(schedule, x_0, np.full(3, t), eps)
            asked = []

            def eps_theta(x, t, eps=eps, asked=asked):
                asked.append((np.array(x), np.array(t)))
                return eps.copy()

            z = rng.standard_normal(x_t.shape, dtype=np.float32)
            mean, above, far = (
                np.asarray(diffusion.p_sample(eps_theta, schedule, x_t.copy(), t, z)) for z in (0 * z, 0 * z + 1, z)
            )
            shown, times = asked[0]
            words = "p_sample: expected eps_theta(x_t, t) with x_t as it is given and t as N equal integers"
            expect(close(shown, x_t) and np.shape(times) == (3,) and np.all(times == t), words)
            expect(np.shape(mean) == x_t.shape, "p_sample: expected x_{t-1} of the shape of x_t")
            spread = above - mean
            words = "p_sample: expected each pixel's z to be added, times a standard deviation"
            expect(close(far - mean, z * spread, 1e-2, 1e-3), words)
            expect(np.ptp(spread) < 1e-3 + 1e-2 * spread.max(), "p_sample: expected the same spread for all pixels")
            expect(spread.mean() > 0, "p_sample: for t > 1 expected noise to be added")
            wrong = [
                bayes(schedule, t, min(1, max(-1, float(a))), float(b), float(m), float(spread.mean()) ** 2)
                for a, b, m in zip(x_0.ravel(), x_t.ravel(), mean.ravel(), strict=True)
            ]
            inside = np.abs(x_0).ravel() < 0.999
            words = (
                f"p_sample: expected a draw from q(x_{{t-1}} | x_t, x_0) with the predicted, clipped x_0; at t = {t}"
            )
            expect(np.array(wrong)[inside] < 0.1, words + " it is another one")
            words += " it is another one where the prediction is beyond [-1, 1]: is it clipped?"
            expect(np.array(wrong) < 0.1, words)


def test_question_12_p_sample_adds_no_noise_in_the_last_step(rng):
    x_1, eps = images(rng, 3), images(rng, 3)
    for schedule in both_schedules():
        a, b = (
            np.array(diffusion.p_sample(lambda *_: eps.copy(), schedule, x_1.copy(), 1, np.full(x_1.shape, z)))
            for z in (0.0, 100.0)
        )
        expect(close(a, b), "p_sample: at t = 1 expected no noise")


def chain(eps_theta, schedule, x_T, seed):
    """What `sample` yields, copied at once: it may work in place."""
    return [(t, np.array(x)) for t, x in diffusion.sample(eps_theta, schedule, x_T.copy(), np.random.default_rng(seed))]


def test_question_12_sample_goes_down_from_x_T_to_t_0(rng):
    schedule = schedule_of("linear", 9)
    x_T = rng.standard_normal((2, 4, 6, 1), dtype=np.float32)
    seen = []

    def eps_theta(x_t, t):
        seen.append((np.array(x_t), int(np.ravel(t)[0])))
        return 0.5 * x_t

    found = chain(eps_theta, schedule, x_T, 3)
    words = "sample: expected the pairs (t, x_t) for t = T - 1, .., 0"
    expect([t for t, _ in found] == list(range(8, -1, -1)), words)
    expect([t for _, t in seen] == list(range(9, 0, -1)), "sample: expected eps_theta to be asked at t = T, .., 1")
    expect(close(seen[0][0], x_T), "sample: expected the first step to start from x_T")
    for (shown, _), (_, x_t) in zip(seen[1:], found, strict=False):
        expect(close(shown, x_t), "sample: expected each step to start where the last one ended")


def test_question_12_sample_draws_fresh_normal_noise_from_rng_at_each_step(rng):
    schedule = schedule_of("linear", 9)
    x_T = rng.standard_normal((4, 12, 12, 1), dtype=np.float32)
    eps_theta = lambda x_t, t: 0.5 * x_t  # noqa: E731
    found, same, other = (chain(eps_theta, schedule, x_T, seed) for seed in (3, 3, 4))
    expect(close(found[0][1], same[0][1]), "sample: expected its noise from rng: the same for the same seed")
    expect(not close(found[0][1], other[0][1]), "sample: expected other noise for another seed of rng")
    noises = []
    before = x_T
    for t, x in found[:-1]:
        mean, above = (
            diffusion.p_sample(eps_theta, schedule, before.copy(), t + 1, np.full(x.shape, z, np.float32))
            for z in (0, 1)
        )
        noises.append(((x - mean) / (above - mean)).ravel())
        before = x
    expect_normal(noises, "sample: the noise of its steps")
    pixels = np.array(noises).reshape(8, 4, 144)
    for name, pair in (
        ("step", (pixels[:-1], pixels[1:])),
        ("image", (pixels[:, :-1], pixels[:, 1:])),
        ("pixel", (pixels[..., :-1], pixels[..., 1:])),
    ):
        correlation = np.corrcoef(*(part.ravel() for part in pair))[0, 1]
        expect(abs(correlation) < 0.1, f"sample: expected fresh noise, which says nothing of that of the next {name}")


def test_question_12_sample_with_a_network_that_knows_the_image_ends_at_it(rng):
    x_0 = images(rng, 2)
    x_T = rng.standard_normal(x_0.shape, dtype=np.float32)
    for schedule in both_schedules():
        left = survivals(schedule)

        def eps_theta(x_t, t, left=left):
            share = left[int(np.ravel(t)[0])]
            return ((x_t - np.sqrt(share) * x_0) / np.sqrt(1 - share)).astype(np.float32)

        t, x = chain(eps_theta, schedule, x_T, 0)[-1]
        expect(t == 0 and close(x, x_0, atol=1e-3), "sample: expected it to end at the image")
