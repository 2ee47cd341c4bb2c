"""The schedules at every length, and the bound, against independent derivations.

q, its posterior, the loss and Algorithm 2 are tested by test_homework.py, questions 7 to 12, and test_answers.py.
"""

from scratchgen import diffusion
from scratchgen.diffusion import make_schedule

import numpy as np
import pytest


def images(rng, N, *shape):
    return np.clip(rng.standard_normal((N, *(shape or (4, 6, 1)))), -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("T", [1, 2, 3, 5, 10, 50, 200, 1000])
@pytest.mark.parametrize("name", diffusion.SCHEDULES)
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


def test_the_schedules_are_the_papers():
    """The linear one at a thousand steps, and at 200 with five times the betas; the cosine one by its formula."""
    for T in (1000, 200):
        betas = np.linspace(1e-4, 0.02, T) * 1000 / T
        np.testing.assert_allclose(make_schedule("linear", T)["beta"][1:], betas)
    f = np.cos((np.arange(200) / 200 + 0.008) / 1.008 * np.pi / 2) ** 2  # the last beta is clipped
    np.testing.assert_allclose(make_schedule("cosine", 200)["alpha_bar"][:-1], f / f[0], rtol=1e-9)


# --------------------------------------------------------------------------------------------------- loss and reverse


def of_x_t(x_t, t):
    """Some eps_theta that depends on x_t and t, and leads to some x_0 that are clipped and some that are not."""
    return 0.9 * x_t + 0.002 * t.reshape(-1, 1, 1, 1).astype(np.float32)


def test_true_noise_recovers_x_0_at_every_t(schedule, rng):
    x_0 = images(rng, 200)
    t = np.arange(1, 201)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    error = np.abs(diffusion.predict_x_0(schedule, x_t, t, eps) - x_0).max(axis=(1, 2, 3))
    assert np.all(error < 3e-6 / np.sqrt(schedule["alpha_bar"][1:]))  # float32 rounding of x_t, magnified on the way


# --------------------------------------------------------------------------------------- the bound of a diffusion model


def x_0_of(eps_theta, schedule):
    """x_0_theta as the bound asks it, which may be told labels: the x_0 that the noise of eps_theta implies."""
    return lambda x_t, t, labels=None: diffusion.predict_x_0(schedule, x_t, t, eps_theta(x_t, t))


def test_a_term_is_the_divergence_from_the_step_that_algorithm_2_takes(rng, schedule):
    """Of Gaussians of equal variance: half the squared distance of their means, in units of it."""
    x_0 = images(rng, 3)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    t = np.array([2, 57, 200])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    mean, variance = diffusion.q_posterior(schedule, x_0, x_t, t)
    steps = [diffusion.p_sample(of_x_t, schedule, x_t[[n]], t[n], 0 * x_t[[n]])[0] for n in range(3)]  # z = 0
    expected = ((mean - np.array(steps)).astype(float) ** 2 / (2 * variance)).sum(axis=(1, 2, 3))
    found = diffusion.bound_terms(x_0_of(of_x_t, schedule), schedule, x_0, t, eps)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_bound_tells_the_network_the_label_of_each_image(rng, schedule):
    """A network whose answer is the label: the divergence is that of an x_0 of this grey, also where it is beyond 1."""
    x_0 = images(rng, 3)
    eps = images(rng, 3)
    t = np.array([1, 60, 200])
    labels = np.array([4, 0, 9])

    def x_0_theta(x_t, t, labels):
        return np.broadcast_to((labels / 5).astype(np.float32).reshape(-1, 1, 1, 1), x_t.shape)

    found = diffusion.bound_terms(x_0_theta, schedule, x_0, t, eps, labels)
    variance = schedule["posterior_variance"][t[1:]].reshape(-1, 1, 1, 1)
    factor = schedule["posterior_x_0"][t[1:]].reshape(-1, 1, 1, 1)
    difference = factor * (x_0[1:] - np.array([0.0, 1.8]).reshape(-1, 1, 1, 1))
    np.testing.assert_allclose(found[1:], (difference**2 / (2 * variance)).sum(axis=(1, 2, 3)), rtol=1e-3)
    other = diffusion.bound_terms(x_0_theta, schedule, x_0, t, eps, np.array([5, 0, 9]))
    assert (other != found).tolist() == [True, False, False]


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
    x = levels[[0, 255]].reshape(1, 2, 1, 1)  # pixels add up: the first is hopeless, and finite; the second certain
    both = diffusion.discretised_log_likelihood(x, np.ones_like(x), 1e-3)
    assert both[0] == pytest.approx(np.log(1e-300), abs=1e-3)


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
    nats = 8 * 784 * np.log(2)  # eight bits say one of 256 levels
    assert diffusion.bits_per_dimension(nats, 784) == pytest.approx(8)
