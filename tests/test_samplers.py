"""The samplers of fewer steps against theory: Song et al.'s step, Algorithm 2, and the order of their errors."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

from scratchgen import diffusion, samplers
from scratchgen.data import UserError
from scratchgen.diffusion import at, make_schedule
from scratchgen.samplers import SAMPLERS, SamplerConfig
from scratchgen.trained import DDPM

import numpy as np
import pytest
from test_diffusion import images, of_x_t, x_0_of


def test_a_config_says_what_it_is_cannot_be_changed_and_equal_ones_are_one_key():
    """eta is 1 with fresh noise at each step and 0 without, and ++ is of second order."""
    assert SAMPLERS == {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}
    assert str(SamplerConfig("ddim", 7)) == "ddim, 7 steps"
    assert str(SamplerConfig("sde-dpm++", 20, 0.5)) == "sde-dpm++, 20 steps, w = 0.5"
    assert str(SamplerConfig("dpm++", 20, 2.0, "unlabelled")) == "dpm++, 20 steps, w = 2, unlabelled"
    assert str(SamplerConfig("dpm++", 20, guide="unlabelled")) == "dpm++, 20 steps"  # which then has no say
    config = SamplerConfig("ddpm", 200)
    with pytest.raises(FrozenInstanceError):
        config.steps = 20
    assert {config: "found"}[SamplerConfig("ddpm", 200, 0.0, "early")] == "found"
    assert config != SamplerConfig("ddpm", 199)


@pytest.mark.parametrize(
    ("additions", "chosen", "w"),
    [
        ([], {}, 0),
        (["v"], {}, 0),
        (["guide"], {}, 0.5),
        (["v", "guide", "groups"], {}, 0.5),
        (["v", "guide"], {"guidance": 0.2, "guide": "early"}, 0.2),
        (["guide"], {"guidance": 0.2, "guide": "unlabelled"}, 0.2),
        (["v", "black"], {"guidance": 0.2, "guide": "unlabelled"}, 0.2),
        *((["v", "guide"], {"sampler": name, "steps": 4}, 0) for name in SAMPLERS),
        (["guide"], {"sampler": "ddpm"}, 0),
    ],
)
def test_each_image_is_drawn_by_its_own_label(additions, chosen, w, rng):
    """A network whose answer is the label: x_0 is a tenth of it, and half of that early in training."""
    shares = np.full((10, 2), 0.5)
    arrays = {"ema": 0.1, "groups": {"means": np.zeros((10, 2, 4, 6, 1), np.float32), "shares": shares}}
    if "guide" in additions:
        arrays["early"] = 0.05
    model = DDPM({"arch": "unet", "T": 30, "schedule": "linear", "additions": additions, "classes": True}, arrays)

    def network(weight, x, t, labels):  # eps or v, from the x_0 that it stands for
        a, b = (at(model.schedule[name], t) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        x_0 = np.float32(weight) * labels.astype(np.float32).reshape(-1, 1, 1, 1)
        return (a * x[..., :1] - x_0) / b if "v" in additions else (x[..., :1] - a * x_0) / b

    model.denoiser.network = network
    labels = np.array([7, -1, 0, 3, 9])
    x_T = rng.standard_normal((5, 4, 6, 1), dtype=np.float32)
    config = model.sampler_config(**chosen)
    assert (config.sampler == "ddpm") == (additions == [] or chosen.get("sampler") == "ddpm")
    *_, (s, x_s) = model.trajectory(x_T, rng, labels, config)
    guide = -0.1 if chosen.get("guide") == "unlabelled" else labels / 20
    expected = np.clip(labels / 10 + w * (labels / 10 - guide), -1, 1).reshape(-1, 1, 1, 1)
    assert s == 0 and x_s.dtype == np.float32
    np.testing.assert_allclose(x_s, np.broadcast_to(expected, x_s.shape), atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_adds_noise_of_the_variance_that_eta_asks_for(schedule, eta):
    """Song et al., Eq. (16), for the first of two steps from t = 200 of an x_0 and a draw that are known."""
    alpha_bar = schedule["alpha_bar"]
    half = 81  # 200 / 2^1.3
    x_0 = np.full((1, 2, 2, 1), 0.3, np.float32)
    x_T = np.full((1, 2, 2, 1), -0.6, np.float32)
    draws = SimpleNamespace(standard_normal=lambda shape, dtype: np.full(shape, 0.8, dtype))
    (s, x_s), *_ = samplers.sample(lambda x_t, t: x_0, schedule, x_T, draws, 2, eta)
    sigma = eta * np.sqrt((1 - alpha_bar[half]) / (1 - alpha_bar[200])) * np.sqrt(1 - alpha_bar[200] / alpha_bar[half])
    eps = (-0.6 - np.sqrt(alpha_bar[200]) * 0.3) / np.sqrt(1 - alpha_bar[200])
    expected = np.sqrt(alpha_bar[half]) * 0.3 + np.sqrt(1 - alpha_bar[half] - sigma**2) * eps + sigma * 0.8
    assert s == half
    np.testing.assert_allclose(x_s, expected, rtol=1e-5)


def test_timesteps():
    assert samplers.timesteps(200, 200) == list(range(200, -1, -1))
    assert samplers.timesteps(200, 1) == [200, 0]
    for T, steps in ((200, 7), (200, 20), (200, 150), (200, 199), (10, 9), (1000, 50)):
        times = samplers.timesteps(T, steps)
        assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
        gaps = -np.diff(times)
        assert gaps.min() >= 1 and np.all(gaps[1:] <= gaps[:-1] + 1)  # shorter and shorter, but for rounding
        assert gaps[0] > gaps[-1] or gaps.max() <= 2
    assert samplers.timesteps(1000, 4) == [1000, 688, 406, 165, 0]  # 1000 (i / 4)^1.3
    for steps in (0, 201):
        with pytest.raises(UserError, match=f"a sampler takes 1 to T = 200 steps, not {steps}"):
            samplers.timesteps(200, steps)


@pytest.mark.parametrize("how", [(), (200, 1.0)], ids=["default", "said"])
def test_with_eta_1_and_every_step_it_is_algorithm_2(rng, schedule, how):
    x_T = rng.standard_normal((2, 4, 6, 1), dtype=np.float32)
    by_2 = diffusion.sample(of_x_t, schedule, x_T, np.random.default_rng(1))
    by_ours = samplers.sample(x_0_of(of_x_t, schedule), schedule, x_T, np.random.default_rng(1), *how)
    for (t, a), (s, b) in zip(by_2, by_ours, strict=True):
        assert t == s
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize(("T", "first", "second"), [(10, 6, 2), (3, 2, 1)])
@pytest.mark.parametrize(("before", "now"), [(0.2, 0.3), (0.2, 0.95), (-0.1, -0.9)])
def test_order_2_goes_on_as_the_last_step_did(before, now, T, first, second):
    """In the middle of the second of three steps, measured in lambda, x_0 is as far on as it would be by then."""
    s = make_schedule("cosine", T)
    predictions = iter([before, now, 0.0])
    signal = s["sqrt_alpha_bar"]
    noise = s["sqrt_one_minus_alpha_bar"]
    assert samplers.timesteps(T, 3) == [T, first, second, 0]

    def x_0_theta(x_t, t):
        return np.full_like(x_t, next(predictions))

    x_T = np.full((1, 1, 1, 1), 0.7, np.float32)
    (_, x), (_, found), _ = samplers.sample(x_0_theta, s, x_T, None, 3, eta=0.0, order=2)
    expected = signal[first] * before + noise[first] * (0.7 - signal[T] * before) / noise[T]
    assert x.item() == pytest.approx(expected, rel=1e-5)
    ratio = {t: np.log(signal[t] / noise[t]) for t in (T, first, second)}
    half = 0.5 * (ratio[second] - ratio[first]) / (ratio[first] - ratio[T])
    x_0 = now + half * (now - before)  # also beyond where images are
    assert abs(x_0 - now) > 0.01
    expected = signal[second] * x_0 + noise[second] * (x.item() - signal[first] * x_0) / noise[first]
    assert found.item() == pytest.approx(expected, rel=1e-4)


def where_all_is_known(T):
    """x_0 ~ N(0, 0.04 I), so E[x_0 | x_t] is linear in x_t: the schedule, Var[x_t] for each t, the best x_0_theta."""
    schedule = make_schedule("linear", T)
    variance = schedule["alpha_bar"] * 0.2**2 + 1 - schedule["alpha_bar"]

    def x_0_theta(x_t, t):
        return 0.2**2 * schedule["sqrt_alpha_bar"][t[0]] / variance[t[0]] * x_t

    return schedule, variance, x_0_theta


def test_order_of_the_samplers():
    """The equation dx_t/dt = f(x_t, t) that DDIM solves keeps x_t / sqrt(Var[x_t]) as it is at T. Twice the steps make
    the error 2 or 4 times smaller."""
    T, s = 6400, 1056  # a quarter of the steps before the end: 6400 / 4^1.3
    schedule, variance, x_0_theta = where_all_is_known(T)
    spread = np.sqrt(variance)

    def error(order, steps):
        x_T = np.full((1, 1, 1, 1), 1.5)
        x_s = dict(samplers.sample(x_0_theta, schedule, x_T, None, steps, 0.0, order))[s]
        return abs(x_s.item() - 1.5 * spread[s] / spread[T])

    for order in (1, 2):
        ratios = [error(order, steps) / error(order, 2 * steps) for steps in (16, 32, 64)]
        assert ratios == pytest.approx([2**order] * 3, rel=0.2)
    assert error(2, 32) < error(1, 32) / 5


def test_order_of_the_samplers_with_fresh_noise():
    """All is linear: x_s = c_0 x_T + c_1 z_1 + c_2 z_2 + .., and where image k of the batch gets draw k alone, its x_s
    is c_k: the sum of their squares is Var[x_s] as the sampler has it."""
    T, s = 6400, 1056
    schedule, variance, x_0_theta = where_all_is_known(T)

    class OneImageAtATime:
        def __init__(self, draws):
            self.rows = iter(np.eye(draws).reshape(draws, draws, 1, 1, 1))

        def standard_normal(self, shape, dtype):
            return next(self.rows)

    def error(order, steps):
        rng = OneImageAtATime(steps + 1)
        x_T = np.sqrt(variance[T]) * rng.standard_normal((steps + 1, 1, 1, 1), np.float64)
        c = dict(samplers.sample(x_0_theta, schedule, x_T, rng, steps, 1.0, order))[s]
        return abs((c**2).sum() - variance[s])

    for order in (1, 2):
        ratios = [error(order, steps) / error(order, 2 * steps) for steps in (32, 64, 128)]
        assert ratios == pytest.approx([2**order] * 3, rel=0.1)


# ------------------------------------------------------------------------------------------------------- flow matching


def test_x_t_over_its_scale_lies_on_the_straight_path(rng, schedule):
    scale, tau = samplers.flow_path(schedule)
    assert scale.dtype == tau.dtype == np.float32
    assert (scale[0], tau[0]) == (1, 0) and tau[-1] > 0.99 and np.all(np.diff(tau) > 0)
    x_0 = images(rng, 3)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    for t in (1, 50, 200):
        x_t = diffusion.q_sample(schedule, x_0, np.full(3, t), eps)
        x_tau = x_t / scale[t]
        np.testing.assert_allclose(x_tau, (1 - tau[t]) * x_0 + tau[t] * eps, atol=1e-6)
        found = samplers.velocity(lambda x, times: x_0, schedule, x_tau, t)  # noqa: B023  called at once
        np.testing.assert_allclose(found, eps - x_0, atol=2e-4)
        assert x_tau.dtype == found.dtype == np.float32


@pytest.mark.parametrize("steps", [None, 20, 1])
def test_eulers_steps_are_ddims_in_other_coordinates(steps, rng, schedule):
    """For a network that knows nothing of either: its prediction is not even consistent from t to t."""
    scale, _ = samplers.flow_path(schedule)

    def x_0_theta(x_t, t):
        return np.tanh(2 * x_t[..., ::-1, :] + np.sin(t).reshape(-1, 1, 1, 1))

    x_T = rng.standard_normal((2, 4, 6, 1))  # float64
    ddim = samplers.sample(x_0_theta, schedule, x_T, None, steps, eta=0.0)
    flow = samplers.euler(x_0_theta, schedule, x_T / scale[-1], steps)
    for (t, x_t), (s, x_tau) in zip(ddim, flow, strict=True):
        assert t == s
        np.testing.assert_allclose(scale[s] * x_tau, x_t, atol=2e-5)
