"""q, p and the loss against independent derivations: recursion, Bayes' rule on the joint Gaussian, Monte Carlo."""

from scratchgen import diffusion
from scratchgen.diffusion import make_schedule

import numpy as np
import pytest

EVERY_T = [1, 2, 3, 5, 10, 50, 200, 1000]
EVERY_SCHEDULE = list(diffusion.SCHEDULES)


def images(rng, N, *shape):
    return np.clip(rng.standard_normal((N, *(shape or (4, 6, 1)))), -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("T", EVERY_T)
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_every_schedule_ends_in_noise(name, T):
    s = make_schedule(name, T)
    assert all(len(values) == T + 1 for values in s.values())
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
    x_0, x_t = images(rng, 3), images(rng, 3)
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


def test_draw_batch_takes_every_t_from_1_to_T_and_unit_noise(rng):
    x_0, t, eps = diffusion.draw_batch(make_schedule("linear", 7), images(rng, 2000), rng)
    assert set(t) == set(range(1, 8)) and eps.shape == x_0.shape and eps.dtype == np.float32
    assert eps.mean() == pytest.approx(0, abs=0.02) and eps.std() == pytest.approx(1, abs=0.02)


def test_loss_of_no_prediction_is_the_noises_variance_and_of_an_oracle_zero(schedule, rng):
    batch = diffusion.draw_batch(schedule, images(rng, 400), rng)
    silent = diffusion.squared_errors(lambda x_t, t: 0 * x_t, schedule, batch).mean()
    assert silent == pytest.approx(np.mean(batch[2] ** 2), rel=1e-5)
    # eps is a quotient by sqrt(1 - alpha_bar_t), small at t = 1: that is the rounding allowed for.
    assert diffusion.squared_errors(oracle(schedule, batch[0]), schedule, batch).mean() < 1e-8


def test_squared_errors_are_per_image_means_over_pixels(schedule, rng):
    batch = diffusion.draw_batch(schedule, images(rng, 5), rng)
    errors = diffusion.squared_errors(lambda x_t, t: x_t, schedule, batch)
    x_t = diffusion.q_sample(schedule, *batch)
    assert errors.dtype == np.float32
    np.testing.assert_allclose(errors, ((x_t - batch[2]) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_training_weighs_an_error_in_v_by_the_square_root_of_alpha_bar(schedule, rng):
    batch = x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 50), rng)
    signal, noise = (np.sqrt(a)[t].reshape(-1, 1, 1, 1) for a in (schedule["alpha_bar"], 1 - schedule["alpha_bar"]))
    v = signal * eps - noise * x_0
    v_theta = v + rng.standard_normal(x_0.shape)
    eps_theta = signal * v_theta + noise * (signal * x_0 + noise * eps)
    value, reported = diffusion.weighted_loss(lambda x_t, t: eps_theta, schedule, batch)
    assert value == pytest.approx(np.mean(signal * (v - v_theta) ** 2), rel=1e-4)
    assert reported["loss"] == pytest.approx(np.mean((eps - eps_theta) ** 2), rel=1e-4)


def test_eps_from_v_undoes_the_definition_of_v(schedule, rng):
    x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 50), rng)
    alpha_bar = schedule["alpha_bar"][t].reshape(-1, 1, 1, 1)
    v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x_0
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    np.testing.assert_allclose(diffusion.eps_from_v(schedule, v, x_t, t), eps, atol=1e-5)


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
    x_0, x_t = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    noise = rng.standard_normal(x_t.shape, dtype=np.float32)
    for t in (2, 50, 150):
        mean, variance = diffusion.q_posterior(schedule, x_0, x_t, np.full(3, t))
        found = diffusion.p_sample(oracle(schedule, x_0), schedule, x_t, t, noise)
        np.testing.assert_allclose(found, mean + np.sqrt(variance) * noise, atol=1e-4)


def test_where_nothing_is_clipped_the_step_is_equation_11(schedule, rng):
    """mean = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), for the whole range of t."""
    for t in (1, 10, 60):
        x_0, eps = 0.3 * images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
        x_t = diffusion.q_sample(schedule, x_0, np.full(3, t), eps)
        beta, alpha, alpha_bar = (schedule[key][t] for key in ("beta", "alpha", "alpha_bar"))
        expected = (x_t - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha)
        found = diffusion.p_sample(lambda *_, eps=eps: eps, schedule, x_t, t, np.zeros_like(x_t))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_last_step_adds_no_noise(schedule, rng):
    x_1, eps = images(rng, 3), images(rng, 3)
    a, b = (diffusion.p_sample(lambda *_: eps, schedule, x_1, 1, k * np.ones_like(x_1)) for k in (0, 100))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("T", EVERY_T[:-1])
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_sampling_with_an_oracle_ends_at_its_image(name, T, rng):
    s, x_0 = make_schedule(name, T), images(rng, 2)
    x_T = rng.standard_normal(x_0.shape, dtype=np.float32)
    path = list(diffusion.sample(oracle(s, x_0), s, x_T, rng))
    assert [t for t, _ in path] == list(range(T - 1, -1, -1))
    np.testing.assert_allclose(path[-1][1], x_0, atol=1e-5)
    assert {x.dtype for _, x in path} == {np.dtype(np.float32)}


def test_sampling_with_the_exact_denoiser_of_gaussian_data_reproduces_its_variance(rng):
    """For x_0 ~ N(0, s^2), E[eps | x_t] is linear in x_t, so the whole chain is: its variance can be followed by hand.

    It ends a little below s^2, as beta~_t is the reverse variance for a known x_0, the smallest there can be.
    """
    s, spread = make_schedule("linear", 200), 0.2  # nearly never clipped

    def eps_theta(x_t, t):
        alpha_bar = schedule_at(t)
        return np.sqrt(1 - alpha_bar) / (alpha_bar * spread**2 + 1 - alpha_bar) * x_t

    def schedule_at(t):
        return s["alpha_bar"][t].astype(np.float32).reshape(-1, 1, 1, 1)

    x_T = rng.standard_normal((100, 10, 10, 1), dtype=np.float32)
    *_, (t, x) = diffusion.sample(eps_theta, s, x_T, rng)

    variance = 1.0
    for step in range(200, 0, -1):  # Eq. (11) with the eps above: x_{t-1} = factor x_t + sqrt(beta~_t) noise
        beta, alpha_bar, before = s["beta"][step], s["alpha_bar"][step], s["alpha_bar"][step - 1]
        factor = (1 - beta / (alpha_bar * spread**2 + 1 - alpha_bar)) / np.sqrt(1 - beta)
        variance = factor**2 * variance + (1 - before) / (1 - alpha_bar) * beta
    assert 0.9 * spread < np.sqrt(variance) < spread
    assert t == 0 and abs(x.mean()) < 0.01 and x.std() == pytest.approx(np.sqrt(variance), rel=0.03)


def test_above_black_is_eps_on_black_pixels_and_more_on_others(schedule, rng):
    x_0, eps = np.full((5, 4, 6, 1), -1, np.float32), rng.standard_normal((5, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 2, 20, 150, 200])
    x_0[:, 0] = 1
    found = diffusion.above_black(schedule, diffusion.q_sample(schedule, x_0, t, eps), t)
    np.testing.assert_allclose(found[:, 1:], np.clip(eps[:, 1:], -3, 3), atol=2e-3)
    assert np.all(found[:2, 0] == 3) and np.all(found[:, 0] >= np.clip(eps[:, 0], -3, 3) - 1e-3)


def test_predict_noise_shows_the_network_both_channels_and_takes_its_answer_for_v(schedule, rng):
    x_0, eps = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 60, 200])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)

    def network(x, times):
        np.testing.assert_array_equal(x, np.concatenate([x_t, diffusion.above_black(schedule, x_t, t)], axis=3))
        assert times is t
        return diffusion.at(schedule["signal"], t) * eps - diffusion.at(schedule["noise"], t) * x_0

    np.testing.assert_allclose(diffusion.predict_noise(network, schedule, x_t, t), eps, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- DDIM


def of_x_t(x_t, t):
    """Some eps_theta that depends on x_t and t, and leads to some x_0 that are clipped and some that are not."""
    return 0.9 * x_t + np.float32(0.002) * t.reshape(-1, 1, 1, 1)


def test_ddim_times():
    assert diffusion.ddim_times(200, 200) == list(range(200, -1, -1))
    assert diffusion.ddim_times(200, 1) == [200, 0]
    for T, steps in ((200, 7), (200, 150), (10, 9)):
        times = diffusion.ddim_times(T, steps)
        assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
        gaps = -np.diff(times)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_with_eta_1_and_every_step_it_is_algorithm_2(rng, schedule):
    x_T = rng.standard_normal((2, 4, 6, 1), dtype=np.float32)
    by_2 = diffusion.sample(of_x_t, schedule, x_T, np.random.default_rng(1))
    by_ddim = diffusion.ddim_sample(of_x_t, schedule, x_T, 200, 1.0, np.random.default_rng(1))
    for (t, a), (s, b) in zip(by_2, by_ddim, strict=True):
        assert t == s
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_step_of_ddim_keeps_the_marginal(rng, schedule):
    """If eps_theta is the true eps, x_s must be distributed as q(x_s | x_0), for any eta: Song et al., Lemma 1."""
    x_0 = np.broadcast_to(np.float32(0.4), (20_000, 1, 1, 1))
    for eta in (0.0, 0.5, 1.0):
        noise = np.random.default_rng(2)
        eps = noise.standard_normal(x_0.shape, dtype=np.float32)
        x_T = diffusion.q_sample(schedule, x_0, np.full(len(x_0), 200), eps)

        def true_eps(x_t, t):
            return (x_t - diffusion.at(schedule["signal"], t) * x_0) / diffusion.at(schedule["noise"], t)

        for s, x_s in diffusion.ddim_sample(true_eps, schedule, x_T, 4, eta, noise):
            signal, spread = schedule["signal"][s], schedule["noise"][s]
            assert x_s.mean() == pytest.approx(0.4 * signal, abs=4 * spread / 20_000**0.5 + 1e-5)
            assert x_s.std() == pytest.approx(spread, rel=0.03, abs=1e-5)


def test_ddim_draws_nothing_and_a_perfect_network_leads_back(rng, schedule):
    x_0, eps = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    x_T = diffusion.q_sample(schedule, x_0, np.full(3, 200), eps)
    for s, x_s in diffusion.ddim_sample(lambda x_t, t: eps, schedule, x_T, 20):  # rng is None
        # x_T shows x_0 only faintly (alpha_bar_T = 3e-5), so float32 gives it back to some digits
        expected = diffusion.q_sample(schedule, x_0, np.full(3, s), eps)
        np.testing.assert_allclose(x_s, expected, atol=0.02)


def test_ddim_takes_eps_from_the_clipped_x_0():
    s = make_schedule("linear", 10)
    x_T = np.full((1, 1, 1, 1), 3.0, np.float32)
    (_, x_s), *_ = diffusion.ddim_sample(lambda x_t, t: -5 * x_t, s, x_T, 2)  # x_0 far above 1, so 1
    eps = (3 - s["signal"][10]) / s["noise"][10]
    assert x_s.item() == pytest.approx(s["signal"][5] + s["noise"][5] * eps, rel=1e-5)


def where_all_is_known(T):
    """x_0 ~ N(0, 0.04 I), so E[x_0 | x_t] is linear in x_t: the schedule, Var[x_t] for each t, the best eps_theta."""
    schedule = make_schedule("linear", T)
    variance = schedule["alpha_bar"] * 0.2**2 + 1 - schedule["alpha_bar"]

    def eps_theta(x_t, t):
        t = t[0]
        x_0 = 0.2**2 * schedule["signal"][t] / variance[t] * x_t
        return (x_t - schedule["signal"][t] * x_0) / schedule["noise"][t]

    return schedule, variance, eps_theta


def test_order_of_the_samplers():
    """The equation dx_t/dt = f(x_t, t) that DDIM solves keeps x_t / sqrt(Var[x_t]) as it is at T. Twice the steps make
    the error 2 or 4 times smaller."""
    T, s = 6400, 1600
    schedule, variance, eps_theta = where_all_is_known(T)
    spread = np.sqrt(variance)

    def error(order, steps):
        x_T = np.full((1, 1, 1, 1), 1.5)
        x_s = dict(diffusion.ddim_sample(eps_theta, schedule, x_T, steps, order=order))[s]
        return abs(x_s.item() - 1.5 * spread[s] / spread[T])

    for order in (1, 2):
        ratios = [error(order, steps) / error(order, 2 * steps) for steps in (16, 32, 64)]
        assert ratios == pytest.approx([2**order] * 3, rel=0.2)
    assert error(2, 32) < error(1, 32) / 5


def test_order_of_the_samplers_with_fresh_noise():
    """All is linear: x_s = c_0 x_T + c_1 z_1 + c_2 z_2 + .., and where image k of the batch gets draw k alone, its x_s
    is c_k: the sum of their squares is Var[x_s] as the sampler has it."""
    T, s = 6400, 1600
    schedule, variance, eps_theta = where_all_is_known(T)

    class OneImageAtATime:
        def __init__(self, draws):
            self.rows = iter(np.eye(draws).reshape(draws, draws, 1, 1, 1))

        def standard_normal(self, shape, dtype):
            return next(self.rows)

    def error(order, steps):
        rng = OneImageAtATime(steps + 1)
        x_T = np.sqrt(variance[T]) * rng.standard_normal((steps + 1, 1, 1, 1), np.float64)
        c = dict(diffusion.ddim_sample(eps_theta, schedule, x_T, steps, 1.0, rng, order))[s]
        return abs((c**2).sum() - variance[s])

    for order in (1, 2):
        ratios = [error(order, steps) / error(order, 2 * steps) for steps in (32, 64, 128)]
        assert ratios == pytest.approx([2**order] * 3, rel=0.1)
