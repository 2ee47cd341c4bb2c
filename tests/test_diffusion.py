"""q, p and the loss against independent derivations: recursion, Bayes' rule on the joint Gaussian, Monte Carlo."""

from functools import partial

from scratchgen import diffusion, improved, layers, ops, tree
from scratchgen.diffusion import make_schedule
from scratchgen.gradients import value_and_grad

import autograd.numpy as anp
import numpy as np
import pytest
from finite_differences import numerical_gradient

EVERY_T = [1, 2, 3, 5, 10, 50, 200, 1000]
EVERY_SCHEDULE = list(diffusion.SCHEDULES)


def images(rng, N, *shape):
    return np.clip(rng.standard_normal((N, *(shape or (4, 6, 1)))), -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("T", EVERY_T)
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_every_schedule_ends_in_noise(name, T):
    s = make_schedule(name, T)
    assert s["T"] == T
    arrays = {key: values for key, values in s.items() if key != "T"}
    assert all(len(values) == T + 1 for values in arrays.values())
    for key, values in arrays.items():  # what multiplies images is float32, as they are
        assert values.dtype == (np.float64 if key in ("beta", "alpha", "alpha_bar") else np.float32)
    assert s["alpha_bar"][0] == 1 and np.all(np.diff(s["alpha_bar"]) < 0)
    assert np.all((s["beta"][1:] > 0) & (s["beta"][1:] < 1))
    brightest = np.ones((1, 28, 28, 1))
    assert diffusion.prior_kl(s, brightest)[0] < 0.5


def test_at_a_thousand_steps_the_linear_schedule_is_the_papers():
    np.testing.assert_allclose(make_schedule("linear", 1000)["beta"][1:], np.linspace(1e-4, 0.02, 1000))


def test_the_cosine_schedule_follows_its_formula():
    T = 200
    t = np.arange(T)  # the last beta is clipped
    f = np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(make_schedule("cosine", T)["alpha_bar"][:-1], f / f[0], rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ q


def test_iterated_draws_have_the_moments_of_the_closed_form(rng):
    s = make_schedule("linear", 20)
    x = np.full(200_000, 0.8)
    for t in range(1, 8):
        x = np.sqrt(s["alpha"][t]) * x + np.sqrt(s["beta"][t]) * rng.standard_normal(x.shape)
    direct = diffusion.q_sample(
        s, np.full((200_000, 1, 1, 1), 0.8), np.full(200_000, 7), rng.standard_normal((200_000, 1, 1, 1))
    )
    assert x.mean() == pytest.approx(direct.mean(), abs=0.01)
    assert x.var() == pytest.approx(direct.var(), rel=0.02)


def test_posterior_at_t_1_is_the_clean_image(schedule, rng):
    x_0 = images(rng, 3)
    x_t = images(rng, 3)
    mean, variance = diffusion.q_posterior(schedule, x_0, x_t, np.ones(3, int))
    np.testing.assert_allclose(mean, x_0, atol=1e-6)
    assert np.all(variance == 0)


# --------------------------------------------------------------------------------------------------- loss and reverse


def oracle(schedule, x_0):
    """The noise in x_t, known because x_0 is."""

    def eps_theta(x_t, t):
        alpha_bar = schedule["alpha_bar"][t].reshape(-1, 1, 1, 1)
        return ((x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)).astype(np.float32)

    return eps_theta


def of_x_t(x_t, t):
    """Some eps_theta that depends on x_t and t, and leads to some x_0 that are clipped and some that are not."""
    return 0.9 * x_t + 0.002 * t.reshape(-1, 1, 1, 1).astype(np.float32)


def test_draw_batch_takes_every_t_from_1_to_T_and_unit_noise(rng):
    x_0, t, eps = diffusion.draw_batch(make_schedule("linear", 7), images(rng, 2000), rng)
    assert set(t) == set(range(1, 8)) and eps.shape == x_0.shape and eps.dtype == np.float32
    assert eps.mean() == pytest.approx(0, abs=0.02) and eps.std() == pytest.approx(1, abs=0.02)


def test_loss_of_no_prediction_is_the_noises_variance_and_of_an_oracle_zero(schedule, rng):
    batch = diffusion.draw_batch(schedule, images(rng, 400), rng)
    silent, terms = diffusion.simple_loss(lambda x_t, t: 0 * x_t, schedule, batch)
    assert silent == pytest.approx(np.mean(batch[2] ** 2), rel=1e-5)
    assert terms == {"loss": silent}
    # eps is a quotient by sqrt(1 - alpha_bar_t), small at t = 1: that is the rounding allowed for.
    assert diffusion.simple_loss(oracle(schedule, batch[0]), schedule, batch)[0] < 1e-8


def test_weights_multiply_each_images_error_and_the_term_has_none(schedule, rng):
    batch = x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 30), rng)
    weights = rng.random(201).astype(np.float32)
    loss, terms = diffusion.simple_loss(of_x_t, schedule, batch, weights)
    errors = ((eps - of_x_t(diffusion.q_sample(schedule, x_0, t, eps), t)) ** 2).mean(axis=(1, 2, 3))
    assert loss == pytest.approx(np.mean(weights[t] * errors), rel=1e-5) and loss.dtype == np.float32
    assert terms == {"loss": pytest.approx(np.mean(errors), rel=1e-5)}
    assert diffusion.simple_loss(of_x_t, schedule, batch, np.ones(201, np.float32))[0] == terms["loss"]


def test_squared_errors_are_per_image_means_over_pixels(schedule, rng):
    batch = diffusion.draw_batch(schedule, images(rng, 5), rng)
    x_t = diffusion.q_sample(schedule, *batch)
    errors = diffusion.squared_errors(batch[2], x_t)
    assert errors.dtype == np.float32 and errors.shape == (5,)
    np.testing.assert_allclose(errors, ((x_t - batch[2]) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(diffusion.squared_errors(batch[2][:1], x_t[:1]), errors[:1])  # one image is enough


def test_gradient_of_the_simple_loss_through_a_small_network(schedule, rng):
    """Every entry of every parameter, against finite differences."""

    def eps_theta(params, x_t, t):
        time = np.broadcast_to((t / 200).reshape(-1, 1, 1, 1), x_t.shape)
        h = ops.silu(layers.dense(params["in"], anp.concatenate([x_t, time], axis=3)))
        return layers.dense(params["out"], h)

    params = {"in": layers.init_dense(rng, 2, 5), "out": layers.init_dense(rng, 5, 1)}
    params = tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)  # float64
    batch = diffusion.draw_batch(schedule, images(rng, 3), rng)
    weights = rng.uniform(0.5, 2, 201)

    def simple_loss(params):
        return diffusion.simple_loss(partial(eps_theta, params), schedule, batch, weights)

    _, _, gradient = value_and_grad(simple_loss)(params)
    for layer in params:
        for name in params[layer]:

            def loss(leaf, layer=layer, name=name):
                return simple_loss(params | {layer: params[layer] | {name: leaf}})[0]

            expected = numerical_gradient(loss, params[layer][name])
            np.testing.assert_allclose(gradient[layer][name], expected, rtol=1e-6, atol=1e-9)
            assert np.all(expected != 0)


def test_true_noise_recovers_x_0_at_every_t(schedule, rng):
    x_0 = images(rng, 200)
    t = np.arange(1, 201)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    error = np.abs(diffusion.predict_x_0(schedule, x_t, t, eps) - x_0).max(axis=(1, 2, 3))
    assert np.all(error < 3e-6 / np.sqrt(schedule["alpha_bar"][1:]))  # float32 rounding of x_t, magnified on the way


def test_predicted_x_0_is_clipped_to_the_range_of_images(schedule, rng):
    x_t = 5 * rng.standard_normal((4, 4, 6, 1), dtype=np.float32)
    x_0 = diffusion.predict_x_0(schedule, x_t, np.full(4, 100), np.zeros_like(x_t))
    assert x_0.min() == -1 and x_0.max() == 1


def test_one_reverse_step_draws_from_the_posterior(schedule, rng):
    x_0 = images(rng, 3)
    x_t = rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    noise = rng.standard_normal(x_t.shape, dtype=np.float32)
    for t in (2, 50, 150):
        mean, variance = diffusion.q_posterior(schedule, x_0, x_t, np.full(3, t))
        found = diffusion.p_sample(oracle(schedule, x_0), schedule, x_t, t, noise)
        np.testing.assert_allclose(found, mean + np.sqrt(variance) * noise, atol=1e-4)


def test_where_nothing_is_clipped_the_step_is_equation_11(schedule, rng):
    """mean = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), for the whole range of t."""
    for t in (1, 10, 60):
        x_0 = 0.3 * images(rng, 3)
        eps = rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
        x_t = diffusion.q_sample(schedule, x_0, np.full(3, t), eps)
        beta, alpha, alpha_bar = (schedule[key][t] for key in ("beta", "alpha", "alpha_bar"))
        expected = (x_t - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha)
        found = diffusion.p_sample(lambda *_, eps=eps: eps, schedule, x_t, t, np.zeros_like(x_t))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_last_step_adds_no_noise(schedule, rng):
    x_1 = images(rng, 3)
    eps = images(rng, 3)
    a, b = (diffusion.p_sample(lambda *_: eps, schedule, x_1, 1, k * np.ones_like(x_1)) for k in (0, 100))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("T", EVERY_T[:-1])
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_sampling_with_an_oracle_ends_at_its_image(name, T, rng):
    s = make_schedule(name, T)
    x_0 = images(rng, 2)
    x_T = rng.standard_normal(x_0.shape, dtype=np.float32)
    trajectory = list(diffusion.sample(oracle(s, x_0), s, x_T, rng))
    assert [t for t, _ in trajectory] == list(range(T - 1, -1, -1))
    np.testing.assert_allclose(trajectory[-1][1], x_0, atol=1e-5)
    assert {x.dtype for _, x in trajectory} == {np.dtype(np.float32)}


def test_sampling_with_the_exact_denoiser_of_gaussian_data_reproduces_its_variance(rng):
    """For x_0 ~ N(0, s^2), E[eps | x_t] is linear in x_t, so the whole chain is: its variance can be followed by hand.

    It ends a little below s^2, as beta~_t is the reverse variance for a known x_0, the smallest there can be.
    """
    s = make_schedule("linear", 200)
    spread = 0.2  # nearly never clipped

    def eps_theta(x_t, t):
        alpha_bar = schedule_at(t)
        return np.sqrt(1 - alpha_bar) / (alpha_bar * spread**2 + 1 - alpha_bar) * x_t

    def schedule_at(t):
        return s["alpha_bar"][t].astype(np.float32).reshape(-1, 1, 1, 1)

    x_T = rng.standard_normal((100, 10, 10, 1), dtype=np.float32)
    *_, (t, x) = diffusion.sample(eps_theta, s, x_T, rng)

    variance = 1.0
    for step in range(200, 0, -1):  # Eq. (11) with the eps above: x_{t-1} = factor x_t + sqrt(beta~_t) noise
        beta = s["beta"][step]
        alpha_bar = s["alpha_bar"][step]
        before = s["alpha_bar"][step - 1]
        factor = (1 - beta / (alpha_bar * spread**2 + 1 - alpha_bar)) / np.sqrt(1 - beta)
        variance = factor**2 * variance + (1 - before) / (1 - alpha_bar) * beta
    assert 0.9 * spread < np.sqrt(variance) < spread
    assert t == 0 and abs(x.mean()) < 0.01 and x.std() == pytest.approx(np.sqrt(variance), rel=0.03)


# --------------------------------------------------------------------------------------- the bound of a diffusion model


def x_0_of(eps_theta, schedule):
    """x_0_theta as the bound asks it, which may be told labels: the x_0 that the noise of eps_theta implies."""
    return lambda x_t, t, labels=None: diffusion.predict_x_0(schedule, x_t, t, eps_theta(x_t, t))


def test_terms_between_are_the_general_gaussian_divergence(rng, schedule):
    """Against log-density differences averaged over draws of q(x_{t-1} | x_t, x_0), one coordinate at a time."""
    x_0 = images(rng, 1, 2, 2, 1)
    eps = rng.standard_normal((1, 2, 2, 1), dtype=np.float32)
    for t in (2, 57, 200):
        times = np.array([t])
        found = diffusion.bound_terms(x_0_of(of_x_t, schedule), schedule, x_0, times, eps)[0]
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
    x_0 = images(rng, 3)
    eps = rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    v = 3 * rng.standard_normal(x_0.shape, dtype=np.float32)
    t = np.array([20, 57, 199])
    denoiser = improved.Denoiser(lambda params, x, t, labels: v, schedule, ["v"])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    assert np.abs(denoiser.x_0(None, x_t, t)).max(axis=(1, 2, 3)).min() > 1.1
    errors = ((eps - denoiser.eps(None, x_t, t)).astype(float) ** 2).sum(axis=(1, 2, 3))
    found = diffusion.bound_terms(partial(denoiser.x_0, None), schedule, x_0, t, eps)
    np.testing.assert_allclose(found, diffusion.bound_weights(schedule)[t - 2] * errors, rtol=1e-3)


def test_the_divergence_of_gaussians_against_quadrature():
    x = np.linspace(-12, 12, 200_001)
    for mean, variance, mean_theta, variance_theta in ((0.3, 0.5, -0.2, 1.5), (0, 1, 0, 1), (1, 2, -1, 0.7)):
        p = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        log_ratio = (x - mean_theta) ** 2 / (2 * variance_theta) - (x - mean) ** 2 / (2 * variance)
        log_ratio += 0.5 * np.log(variance_theta / variance)
        expected = (p * log_ratio).sum() * (x[1] - x[0])
        found = diffusion.gaussian_kl(mean, variance, mean_theta, variance_theta)
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_network_is_told_the_label_of_each_image(rng, schedule):
    x_0 = images(rng, 3)
    eps = images(rng, 3)
    t = np.array([1, 60, 200])
    labels = np.array([4, 0, 9])

    def x_0_theta(x_t, t, labels):
        return np.broadcast_to((labels / 10).astype(np.float32).reshape(-1, 1, 1, 1), x_t.shape)

    found = diffusion.bound_terms(x_0_theta, schedule, x_0, t, eps, labels)
    each = [diffusion.bound_terms(x_0_theta, schedule, x_0[[n]], t[[n]], eps[[n]], labels[[n]])[0] for n in range(3)]
    np.testing.assert_allclose(found, each, rtol=1e-6)
    other = diffusion.bound_terms(x_0_theta, schedule, x_0, t, eps, np.array([4, 0, 8]))
    assert (other != found).tolist() == [False, False, True]


def test_a_perfect_network_leaves_only_the_decoder(rng, schedule):
    x_0 = np.round(255 * rng.random((6, 4, 6, 1))).astype(np.float32) / 127.5 - 1
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    t = np.array([1, 2, 3, 50, 199, 200])
    terms = diffusion.bound_terms(x_0_of(lambda x_t, t: eps, schedule), schedule, x_0, t, eps)
    np.testing.assert_allclose(terms[1:5], 0, atol=1e-2)
    assert terms[0] > 1  # even so it cannot know the grey level: sigma is wider than one


def test_terms_need_no_image_at_t_1_and_no_t_2(rng):
    x = images(rng, 3)
    for T, t in ((5, [2, 3, 5]), (1, [1, 1, 1])):
        s = make_schedule("linear", T)
        assert np.isfinite(diffusion.bound_terms(x_0_of(of_x_t, s), s, x, np.array(t), x)).all()


def test_the_probabilities_of_all_grey_levels_sum_to_one():
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32).reshape(256, 1, 1, 1)
    for mean, sigma in ((0.0, 0.02), (-0.999, 0.02), (1.0, 0.3), (0.3, 2.0)):
        log_p = diffusion.discretised_log_likelihood(levels, np.full(levels.shape, mean, np.float32), sigma)
        assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-6)


def test_a_grey_level_has_what_the_density_has_over_its_bin():
    """Against the integral of the normal density by quadrature, in the middle and far out in a tail."""
    for level, mean, sigma in ((100, -0.2, 0.05), (100, 0.4, 0.05), (100, -0.9, 0.05)):
        x = level / 127.5 - 1
        grid = np.linspace(x - 1 / 255, x + 1 / 255, 20_001)
        exponents = -0.5 * ((grid - mean) / sigma) ** 2
        top = exponents.max()
        expected = top + np.log(np.exp(exponents - top).mean() * (2 / 255) / (sigma * np.sqrt(2 * np.pi)))
        found = diffusion.discretised_log_likelihood(np.full((1, 1, 1, 1), x), np.full((1, 1, 1, 1), mean), sigma)
        assert found[0] == pytest.approx(expected, rel=1e-4)


def test_pixels_add_up_and_hopeless_ones_stay_finite():
    x = np.array([[-1.0, 1.0]]).reshape(1, 2, 1, 1)
    mean = np.array([[1.0, 1.0]]).reshape(1, 2, 1, 1)
    both = diffusion.discretised_log_likelihood(x, mean, 1e-3)
    assert both[0] == pytest.approx(np.log(1e-300), abs=1e-3)  # the second pixel is certain


def test_at_t_1_the_decoder_stands_on_the_predicted_image_with_the_second_steps_variance(rng, schedule):
    x_0 = np.round(255 * rng.random((1, 4, 6, 1))).astype(np.float32) / 127.5 - 1
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    t = np.array([1])
    x_1 = diffusion.q_sample(schedule, x_0, t, eps)
    mean = diffusion.predict_x_0(schedule, x_1, t, of_x_t(x_1, t))
    alpha_bar = schedule["alpha_bar"]
    beta = schedule["beta"]
    sigma = np.sqrt((1 - alpha_bar[1]) / (1 - alpha_bar[2]) * beta[2])
    expected = -diffusion.discretised_log_likelihood(x_0, mean, sigma)
    found = diffusion.bound_terms(x_0_of(of_x_t, schedule), schedule, x_0, t, eps)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bits_per_dimension():
    assert diffusion.bits_per_dimension(8 * 784 * np.log(2), 784) == pytest.approx(
        8
    )  # eight bits say one of 256 levels
