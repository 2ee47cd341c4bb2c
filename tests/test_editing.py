"""What a trained model can do besides drawing, on Gaussian data, of which the answers are known."""

from scratchgen import editing
from scratchgen.data import UserError
from scratchgen.diffusion import at, make_schedule, q_sample
from scratchgen.samplers import ddim_step, sample, timesteps

import numpy as np
import pytest

MEAN = np.array([0.2, -0.3, 0.1])
COVARIANCE = 0.02 * np.array([[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.2]])


def gaussian(schedule):
    """E[x_0 | x_t] of images (N, 1, 3, 1) whose pixels are Gaussian and know of each other; nothing is clipped."""

    def x_0_theta(x_t, t):
        alpha_bar = schedule["alpha_bar"][t[0]]
        gain = np.sqrt(alpha_bar) * COVARIANCE @ np.linalg.inv(alpha_bar * COVARIANCE + (1 - alpha_bar) * np.eye(3))
        x_0 = MEAN + (x_t.reshape(-1, 3) - np.sqrt(alpha_bar) * MEAN) @ gain.T
        return x_0.reshape(x_t.shape).astype(np.float32)

    return x_0_theta


def gaussian_images(rng, N):
    return rng.multivariate_normal(MEAN, COVARIANCE, N).reshape(N, 1, 3, 1).astype(np.float32)


def end(trajectory):
    *_, (_, x) = trajectory
    return x


# -------------------------------------------------------------------------------------------- from a given noisy image


@pytest.mark.parametrize("t", [1, 40, 120])
def test_from_a_noisy_image_come_images_that_it_can_have_come_from(t, schedule, rng):
    """p(x_0 | x_t) of Gaussian data, whose mean is what the model predicts and whose covariance is known."""
    x_t = np.repeat(q_sample(schedule, gaussian_images(rng, 1), np.array([t]), np.float32(0.5)), 20_000, axis=0)
    drawn = end(sample(gaussian(schedule), schedule, x_t, rng, start=t)).reshape(-1, 3)
    alpha_bar = schedule["alpha_bar"][t]
    covariance = np.linalg.inv(np.linalg.inv(COVARIANCE) + alpha_bar / (1 - alpha_bar) * np.eye(3))
    expected = gaussian(schedule)(x_t[:1], np.array([t])).ravel()
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.005)
    if t > 1:  # the last step adds no noise, and the others a little too little
        np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.25 * np.diag(covariance).max())


def test_a_start_takes_as_many_steps_as_are_left_or_as_are_asked_for(schedule, rng):
    x_t = gaussian_images(rng, 2)
    times = [s for s, _ in sample(gaussian(schedule), schedule, x_t, rng, start=5)]
    assert times == [4, 3, 2, 1, 0]
    times = [s for s, _ in sample(gaussian(schedule), schedule, x_t, rng, 3, start=120)]
    assert times == timesteps(120, 3)[1:]
    with pytest.raises(UserError, match="1 to T = 5 steps, not 6"):
        next(sample(gaussian(schedule), schedule, x_t, rng, 6, start=5))


# ------------------------------------------------------------------------------------------------------- interpolation


def test_interpolated_images_are_drawn_from_between_two(schedule, rng):
    """At t the mixture of both images, with noise up to t, is known; so is what a Gaussian model draws from there."""
    x_0, other = gaussian_images(rng, 2)[:, None]
    weights = np.array([0, 0.25, 1] * 8000)
    t = 60
    found = editing.interpolate(gaussian(schedule), schedule, x_0, other, weights, t, np.random.default_rng(5))
    assert found.dtype == np.float32
    eps = np.random.default_rng(5).standard_normal(x_0.shape, dtype=np.float32)
    for weight in (0, 0.25, 1):
        a, b = (schedule[k][t] for k in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        expected = gaussian(schedule)(a * ((1 - weight) * x_0 + weight * other) + b * eps, np.array([t]))
        np.testing.assert_allclose(found[weights == weight].mean(axis=0), expected[0], atol=0.01)


def test_without_noise_an_interpolation_ends_at_its_images(schedule, rng):
    x_0, other = gaussian_images(rng, 2)[:, None]
    found = editing.interpolate(gaussian(schedule), schedule, x_0, other, [0, 1], 1, rng, eta=0.0)
    np.testing.assert_allclose(found, np.concatenate([x_0, other]), atol=0.05)


def test_the_options_of_an_interpolation_are_the_samplers(schedule, rng):
    x_0, other = gaussian_images(rng, 2)[:, None]
    asked, x_0_theta = [], gaussian(schedule)
    predict = lambda x_t, t: asked.append(t[0]) or x_0_theta(x_t, t)  # noqa: E731
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    editing.interpolate(predict, schedule, x_0, other, [0.5], 120, rngs[0], steps=3, eta=0.0)
    assert asked == timesteps(120, 3)[:-1]
    rngs[1].standard_normal(x_0.shape, dtype=np.float32)  # for x_t, and with eta = 0 no more
    assert rngs[0].random() == rngs[1].random()


# -------------------------------------------------------------------------------------------- predicted, along the way


def test_the_predictions_along_a_trajectory_are_of_each_x_t(schedule, rng):
    x_0_theta = gaussian(schedule)
    x_T = rng.standard_normal((4, 1, 3, 1), dtype=np.float32)
    trajectory = list(sample(x_0_theta, schedule, x_T, rng, 10))
    found = list(editing.predicted(x_0_theta, trajectory))
    assert [t for t, _ in found] == timesteps(200, 10)[1:-1]  # at t = 0 there is nothing to predict
    for (t, x_0), (_, x_t) in zip(found, trajectory, strict=False):
        np.testing.assert_array_equal(x_0, x_0_theta(x_t, np.full(4, t)))
    spread = [x_0.std() for _, x_0 in found]
    assert spread[0] < spread[-1]  # early on the mean of all images, at the end each its own


# ---------------------------------------------------------------------------------------------------------- inpainting


def test_what_is_drawn_beside_a_known_part_knows_of_it(rng):
    """The first of three pixels is known; of the others, mean and covariance given it are, too. Repeats bring both
    near; without, the mean goes only half the way."""
    schedule = make_schedule("linear", 200)
    known = np.full((8000, 1, 3, 1), 0.45, np.float32)
    where = np.array([True, False, False]).reshape(1, 1, 3, 1)
    gain = COVARIANCE[1:, 0] / COVARIANCE[0, 0]
    mean = MEAN[1:] + gain * (0.45 - MEAN[0])
    covariance = COVARIANCE[1:, 1:] - np.outer(gain, COVARIANCE[0, 1:])
    errors = {}
    for repeats in (1, 10):
        x_T = rng.standard_normal(known.shape, dtype=np.float32)
        drawn = end(editing.inpaint(gaussian(schedule), schedule, known, where, x_T, rng, 100, repeats)).reshape(-1, 3)
        assert drawn.dtype == np.float32 and np.all(drawn[:, 0] == np.float32(0.45))
        errors[repeats] = np.abs(drawn[:, 1:].mean(axis=0) - mean)
    way = np.abs(mean - MEAN[1:])  # from what is drawn if nothing is known
    assert np.all(errors[10] < 0.2 * way) and np.all(errors[1] > 0.3 * way)
    np.testing.assert_allclose(np.cov(drawn[:, 1:].T), covariance, atol=0.4 * covariance.max())


def test_where_all_is_known_all_stays_and_where_nothing_is_it_is_the_sampler(schedule, rng):
    known = gaussian_images(rng, 3)
    x_T = rng.standard_normal((3, 1, 3, 1), dtype=np.float32)
    asked, x_0_theta = [], gaussian(schedule)
    predict = lambda x_t, t: asked.append(t[0]) or x_0_theta(x_t, t)  # noqa: E731
    trajectory = list(editing.inpaint(predict, schedule, known, np.True_, x_T, rng, 7))
    assert [s for s, _ in trajectory] == timesteps(200, 7)[1:]
    np.testing.assert_array_equal(trajectory[-1][1], known)
    assert asked == [t for t in timesteps(200, 7)[:-1] for _ in range(5)]  # five times each, by default
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    unknown = end(editing.inpaint(x_0_theta, schedule, known, np.False_, x_T, rngs[0], 7, repeats=1))
    np.testing.assert_array_equal(unknown, end(sample(x_0_theta, schedule, x_T, rngs[1], 7, eta=1.0)))


# ----------------------------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize("steps", [None, 50])
def test_ddim_draws_from_the_inverse_of_an_image_the_same_image(steps, schedule, rng):
    x_0 = gaussian_images(rng, 2000)
    x_0_theta = gaussian(schedule)
    trajectory = list(editing.invert(x_0_theta, schedule, x_0, steps))
    assert [t for t, _ in trajectory] == timesteps(200, steps or 200)[-2::-1]
    x_T = trajectory[-1][1]
    assert x_T.dtype == np.float32
    back = end(sample(x_0_theta, schedule, x_T, None, steps, eta=0.0))
    assert np.abs(back - x_0).max() < 2e-3
    once = end(editing.invert(x_0_theta, schedule, x_0, steps, rounds=1))
    assert np.abs(end(sample(x_0_theta, schedule, once, None, steps, eta=0.0)) - x_0).max() > 0.01


def test_the_inverse_is_that_of_each_step_of_ddim(schedule, rng):
    """Of Gaussian data DDIM is linear: along each axis of the covariance a step is a factor, which is known."""
    variances, axes = np.linalg.eigh(COVARIANCE)
    x_0 = gaussian_images(rng, 100)
    factor = 1.0
    times = timesteps(200, 50)
    for t, s in zip(times, times[1:], strict=False):
        a_t, a_s = schedule["sqrt_alpha_bar"][[t, s]]
        b_t = schedule["sqrt_one_minus_alpha_bar"][t]
        gain = a_t * variances / (a_t**2 * variances + b_t**2)
        factor = factor * (a_s * gain + schedule["sqrt_one_minus_alpha_bar"][s] * (1 - a_t * gain) / b_t)
    along_axes = (x_0.reshape(-1, 3) - MEAN) @ axes / factor
    x_T = schedule["sqrt_alpha_bar"][200] * MEAN + along_axes @ axes.T
    found = end(editing.invert(gaussian(schedule), schedule, x_0, 50, rounds=10))
    np.testing.assert_allclose(found.reshape(-1, 3), x_T, atol=0.02)
    assert 0.9 < found.std() < 1.2  # noise, nearly as much as x_T has


def test_a_ddim_step_forwards_undoes_one_backwards(schedule, rng):
    x_0 = gaussian_images(rng, 5)
    eps = rng.standard_normal((5, 1, 3, 1), dtype=np.float32)
    x_t = q_sample(schedule, x_0, np.full(5, 120), eps)
    x_s = ddim_step(schedule, x_t, x_0, 120, 50)
    a, b = (at(schedule[k], np.full(5, 50)) for k in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    np.testing.assert_allclose(x_s, a * x_0 + b * eps, atol=1e-5)  # the same image and noise, at s
    np.testing.assert_allclose(ddim_step(schedule, x_s, x_0, 50, 120), x_t, atol=1e-5)
