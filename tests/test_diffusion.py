"""q, p and the loss against independent derivations: recursion, Bayes' rule on the joint Gaussian, Monte Carlo."""

from scratchgen import diffusion
from scratchgen.diffusion import make_schedule

import numpy as np
import pytest

EVERY_T = [1, 2, 3, 5, 10, 50, 200, 1000]
EVERY_SCHEDULE = list(diffusion.SCHEDULES)


@pytest.fixture(params=EVERY_SCHEDULE)
def schedule(request):
    return make_schedule(request.param, 200)


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


def test_the_unscaled_schedule_cut_to_200_steps_would_not_end_in_noise(monkeypatch):
    """The pixels of the test images have root mean square 0.824."""
    monkeypatch.setitem(diffusion.SCHEDULES, "unscaled", lambda T: np.linspace(1e-4, 0.02, T))
    s = make_schedule("unscaled", 200)
    assert s["alpha_bar"][-1] == pytest.approx(0.13, abs=0.005)
    assert diffusion.prior_kl(s, np.full((1, 28, 28, 1), 0.824))[0] == pytest.approx(38.9, abs=0.2)


def test_the_cosine_schedule_follows_its_formula():
    T = 200
    t = np.arange(T)  # the last beta is clipped
    f = np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(make_schedule("cosine", T)["alpha_bar"][:-1], f / f[0], rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ q


def test_iterating_q_one_step_at_a_time_gives_the_closed_form(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise: follow the factor of x_0 and the variance."""
    factor, variance = 1.0, 0.0
    one = np.ones((1, 1, 1, 1))
    for t in range(1, 201):
        beta = schedule["beta"][t]
        factor, variance = np.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        assert abs(schedule["alpha_bar"][t] - factor**2) < 1e-12
        assert abs(1 - schedule["alpha_bar"][t] - variance) < 1e-12
        at_t = np.array([t])
        assert diffusion.q_sample(schedule, one, at_t, 0 * one) == pytest.approx(factor, rel=1e-6)
        assert diffusion.q_sample(schedule, 0 * one, at_t, one) == pytest.approx(np.sqrt(variance), rel=1e-6)


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


def test_posterior_is_bayes_rule_on_the_joint_gaussian(schedule):
    """Condition the joint of (x_{t-1}, x_t) given x_0 on x_t, by matrix algebra: none of the paper's formulas."""
    x_0, x_t = 0.37, -0.81
    for t in range(2, 201):
        before = np.prod(1 - schedule["beta"][1:t])
        beta = schedule["beta"][t]
        # x_{t-1} = sqrt(before) x_0 + sqrt(1 - before) e1 and x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e2.
        A = np.array([[np.sqrt(1 - before), 0], [np.sqrt((1 - beta) * (1 - before)), np.sqrt(beta)]])
        covariance = A @ A.T
        mean = np.sqrt(before) * x_0 * np.array([1, np.sqrt(1 - beta)])
        expected_mean = mean[0] + covariance[0, 1] / covariance[1, 1] * (x_t - mean[1])
        expected_variance = covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1]

        pixel = np.ones((1, 1, 1, 1))
        found_mean, found_variance = diffusion.q_posterior(schedule, x_0 * pixel, x_t * pixel, np.array([t]))
        assert found_mean == pytest.approx(expected_mean, rel=1e-5, abs=1e-6)
        assert found_variance == pytest.approx(expected_variance, rel=1e-5)
        exact = schedule["posterior_x0"][t] * x_0 + schedule["posterior_xt"][t] * x_t
        assert exact == pytest.approx(expected_mean, rel=1e-9, abs=1e-9)


def test_posterior_at_t_1_is_the_clean_image(schedule, rng):
    x_0, x_t = images(rng, 3), images(rng, 3)
    mean, variance = diffusion.q_posterior(schedule, x_0, x_t, np.ones(3, int))
    np.testing.assert_allclose(mean, x_0, atol=1e-6)
    assert np.all(variance == 0)


def test_prior_kl_against_the_general_formula_and_monte_carlo(rng):
    alpha_bar = 0.3
    s = {"alpha_bar": np.array([1, alpha_bar])}
    x_0 = images(rng, 1, 2, 3, 1)
    x = x_0.ravel().astype(np.float64)
    m, S, d = np.sqrt(alpha_bar) * x, (1 - alpha_bar) * np.eye(6), 6
    general = 0.5 * (np.trace(S) + m @ m - d - np.linalg.slogdet(S)[1])  # D_KL(N(m, S) || N(0, I))
    found = diffusion.prior_kl(s, x_0)[0]
    assert found == pytest.approx(general, rel=1e-12)

    draws = m + np.sqrt(1 - alpha_bar) * rng.standard_normal((300_000, 6))
    log_ratio = 0.5 * (draws**2).sum(axis=1) - 0.5 * ((draws - m) ** 2).sum(axis=1) / (1 - alpha_bar)
    log_ratio -= 0.5 * d * np.log(1 - alpha_bar)
    assert abs(found - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(draws))


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
    silent = diffusion.simple_loss(lambda x_t, t: 0 * x_t, schedule, batch)
    assert silent == pytest.approx(np.mean(batch[2] ** 2), rel=1e-5)
    # eps is a quotient by sqrt(1 - alpha_bar_t), small at t = 1: that is the rounding allowed for.
    assert diffusion.simple_loss(oracle(schedule, batch[0]), schedule, batch) < 1e-8


def test_squared_errors_are_per_image_means_over_pixels(schedule, rng):
    batch = diffusion.draw_batch(schedule, images(rng, 5), rng)
    errors = diffusion.squared_errors(lambda x_t, t: x_t, schedule, batch)
    x_t = diffusion.q_sample(schedule, *batch)
    np.testing.assert_allclose(errors, ((x_t - batch[2]) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)
    assert errors.dtype == np.float32


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
