"""What was added to the diffusion model: each addition against its definition, and the samplers against theory."""

import math
from functools import partial
from types import SimpleNamespace

from scratchgen import diffusion, improved, tree
from scratchgen.denoisers import init_mlp_denoiser, init_unet
from scratchgen.diffusion import at, make_schedule

import numpy as np
import pytest
from test_diffusion import images, of_x_t


def x_0_of(eps_theta, schedule):
    """From eps_theta(x_t, t) the x_0_theta(x_t, t) that the samplers ask: the x_0 that the noise implies, clipped."""
    return lambda x_t, t: diffusion.predict_x_0(schedule, x_t, t, eps_theta(x_t, t))


# -------------------------------------------------------------------------------------------------- which are in force


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


@pytest.mark.parametrize(
    ("names", "arch", "expected"),
    [
        (["none"], "unet", []),
        (["none"], "mlp", []),
        (["all"], "unet", ["v", "black", "weights", "muon", "global", "guide"]),
        (["all"], "mlp", ["v", "black", "weights", "muon", "guide"]),  # which has no place for "global"
        (["muon", "v"], "unet", ["v", "muon"]),  # in the order of the ladder, as a checkpoint compares them
        (["global", "black", "v"], "unet", ["v", "black", "global"]),
        (["black", "black", "v", "v"], "mlp", ["v", "black"]),
    ],
)
def test_the_flag_names_the_additions_that_are_chosen(names, arch, expected):
    assert improved.chosen(names, arch, refuse) == expected


@pytest.mark.parametrize(
    ("names", "arch", "words"),
    [
        (["none", "v"], "unet", "none v: none and all stand alone"),
        (["v", "all"], "unet", "v all: none and all stand alone"),
        (["none", "all"], "mlp", "none all: none and all stand alone"),
        (["global"], "mlp", "--additions global is for --arch unet, not mlp"),
        (["v", "global"], "mlp", "--additions global is for --arch unet, not mlp"),
    ],
)
def test_additions_that_contradict_each_other_or_the_network_are_refused(names, arch, words):
    with pytest.raises(Refused, match=words):
        improved.chosen(names, arch, refuse)


def test_weights_without_v_are_warned_of_and_with_it_are_not():
    with pytest.warns(UserWarning, match="weights without v") as record:
        assert improved.chosen(["weights", "black"], "unet", refuse) == ["black", "weights"]
    assert record[0].filename == __file__  # whoever chose them
    improved.chosen(["weights", "v"], "unet", refuse)  # a warning would be an error


def test_without_additions_the_network_itself_predicts_the_noise(schedule, rng):
    def network(params, x, t):
        return of_x_t(x, t)

    eps_theta, x_0_theta = improved.denoiser(network, schedule, [])
    assert eps_theta is network
    x_t, t = rng.standard_normal((3, 4, 6, 1), dtype=np.float32), np.array([1, 60, 200])
    expected = diffusion.predict_x_0(schedule, x_t, t, of_x_t(x_t, t))
    np.testing.assert_array_equal(x_0_theta(None, x_t, t), expected)
    assert expected.min() == -1 or expected.max() == 1  # clipped, at t = 200 at least


@pytest.mark.parametrize("additions", [["weights"], ["muon"], ["weights", "muon", "global"]])
def test_what_changes_loss_optimiser_or_network_leaves_the_prediction_alone(additions, schedule):
    assert improved.denoiser(max, schedule, additions)[0] is max


def test_the_parameters_are_those_that_the_additions_ask_for(rng):
    plain, black = (improved.init_denoiser(init_unet, rng, names) for names in ([], ["black"]))
    assert plain["global_down"] == black["global_down"] == [] and plain["global_middle"] == [[], []]
    assert plain["conv_in"]["w"].shape == (3, 3, 4, 32) and black["conv_in"]["w"].shape == (3, 3, 8, 32)
    assert plain["conv_out"]["w"].shape == (3, 3, 36, 4) and black["conv_out"]["w"].shape == (3, 3, 40, 4)
    whole = improved.init_denoiser(init_unet, rng, ["global"])
    assert len(whole["global_down"]) == 1 and [len(two) for two in whole["global_middle"]] == [2, 2]
    assert tree.size(whole) > tree.size(plain) and whole["conv_in"]["w"].shape == plain["conv_in"]["w"].shape
    mlp = [improved.init_denoiser(init_mlp_denoiser, rng, names)[0]["w"].shape[0] for names in ([], ["black"])]
    assert mlp == [784 + 128, 2 * 784 + 128]


def test_the_help_names_every_addition():
    assert all(f"{name} ({what})" in improved.help_for_additions() for name, what in improved.ADDITIONS.items())


# ----------------------------------------------------------------------------------------------------------------- "v"


def true_v(schedule, x_0, eps):
    """A perfect network: v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, known because x_0 and eps are."""

    def network(params, x_t, t):
        return at(schedule["sqrt_alpha_bar"], t) * eps - at(schedule["sqrt_one_minus_alpha_bar"], t) * x_0

    return network


def test_eps_from_v_undoes_the_definition_of_v(schedule, rng):
    x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 50), rng)
    alpha_bar = schedule["alpha_bar"][t].reshape(-1, 1, 1, 1)
    v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x_0
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    found = improved.eps_from_v(lambda params, x_t, t: v, schedule, None, x_t, t)
    np.testing.assert_allclose(found, eps, atol=1e-5)
    found = improved.x_0_from_v(lambda params, x_t, t: v, schedule, None, x_t, t)
    np.testing.assert_allclose(found, x_0, atol=1e-5)


@pytest.mark.parametrize(("eta", "order"), improved.SAMPLERS.values())
def test_mistakes_to_both_sides_of_black_cancel(eta, order, schedule, rng):
    """A network whose mistakes about black are normal, of mean 0 and standard deviation 0.1, draws black on average.
    Clipped to [-1, 1] they would have a mean of 0.1 / sqrt(2 pi), and the image would be as much too grey."""

    def network(params, x_t, t):  # v of the x_0 that it predicts: x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v
        x_0 = -1 + 0.1 * rng.standard_normal(x_t.shape, dtype=np.float32)
        return (at(schedule["sqrt_alpha_bar"], t) * x_t - x_0) / at(schedule["sqrt_one_minus_alpha_bar"], t)

    _, x_0_theta = improved.denoiser(network, schedule, ["v"])
    x_T = rng.standard_normal((20, 28, 28, 1), dtype=np.float32)
    clipped = lambda x_t, t: np.clip(x_0_theta(None, x_t, t), -1, 1)  # noqa: E731
    for prediction, grey in ((partial(x_0_theta, None), 0.0), (clipped, 0.1 / math.sqrt(2 * math.pi))):
        *_, (s, x_s), _ = improved.sample(prediction, schedule, x_T, rng, 20, eta, order)  # the end is one prediction
        found = x_s.mean(dtype=np.float64) / schedule["sqrt_alpha_bar"][s]
        assert found == pytest.approx(-1 + grey, abs=0.005)


@pytest.mark.parametrize("T", [8, 10, 15])
def test_a_perfect_network_recovers_x_0_also_where_alpha_bar_is_tiny(T, rng):
    """With few steps of the linear schedule alpha_bar_T is 2e-16 and less: float32 keeps no digit of x_0 in eps, and
    the way over eps leads anywhere."""
    schedule, x_0 = make_schedule("linear", T), images(rng, T)
    t, eps = np.arange(1, T + 1), rng.standard_normal(x_0.shape, dtype=np.float32)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    eps_theta, x_0_theta = improved.denoiser(true_v(schedule, x_0, eps), schedule, ["v"])
    found = x_0_theta(None, x_t, t)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x_0, atol=1e-5)

    by_eps = diffusion.predict_x_0(schedule, x_t, t, eps_theta(None, x_t, t))
    error = np.sqrt(((by_eps - x_0) ** 2).mean(axis=(1, 2, 3)))
    assert error[0] < 1e-5  # where there is little noise both agree
    assert error.max() > 0.1


# ------------------------------------------------------------------------------------------------------------- "black"


def test_above_black_is_eps_on_black_pixels_and_more_on_others(schedule, rng):
    x_0, eps = np.full((5, 4, 6, 1), -1, np.float32), rng.standard_normal((5, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 2, 20, 150, 200])
    x_0[:, 0] = 1
    found = improved.above_black(schedule, diffusion.q_sample(schedule, x_0, t, eps), t)
    np.testing.assert_allclose(found[:, 1:], np.clip(eps[:, 1:], -3, 3), atol=2e-3)
    assert np.all(found[:2, 0] == 3) and np.all(found[:, 0] >= np.clip(eps[:, 0], -3, 3) - 1e-3)
    black = -schedule["sqrt_alpha_bar"][150] * np.ones((1, 4, 6, 1), np.float32)
    for beside in (-4, -3.5, -2.5, 2.5, 3.5, 4):  # in units of the noise
        x_t = black + np.float32(beside * schedule["sqrt_one_minus_alpha_bar"][150])
        found = improved.above_black(schedule, x_t, np.array([150]))
        np.testing.assert_allclose(found, np.clip(beside, -3, 3), rtol=1e-5)


def test_the_denoiser_shows_the_network_both_channels_and_takes_its_answer_for_v(schedule, rng):
    x_0, eps = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    times = np.array([1, 60, 200])
    x_t = diffusion.q_sample(schedule, x_0, times, eps)

    def network(params, x, t):
        np.testing.assert_array_equal(x, np.concatenate([x_t, improved.above_black(schedule, x_t, t)], axis=3))
        assert t is times and params == "params"
        return true_v(schedule, x_0, eps)(params, x, t)

    eps_theta, x_0_theta = improved.denoiser(network, schedule, ["v", "black"])
    np.testing.assert_allclose(eps_theta("params", x_t, times), eps, atol=1e-5)
    np.testing.assert_allclose(x_0_theta("params", x_t, times), x_0, atol=1e-5)


def test_black_without_v_shows_both_channels_and_takes_the_answer_for_eps(schedule, rng):
    x_t, t = rng.standard_normal((3, 4, 6, 1), dtype=np.float32), np.array([1, 60, 200])
    eps_theta, x_0_theta = improved.denoiser(lambda params, x, t: x[..., 1:], schedule, ["black"])
    seen = improved.above_black(schedule, x_t, t)
    np.testing.assert_array_equal(eps_theta(None, x_t, t), seen)
    np.testing.assert_array_equal(x_0_theta(None, x_t, t), diffusion.predict_x_0(schedule, x_t, t, seen))


# ----------------------------------------------------------------------------------------------------------- "weights"


def test_training_weighs_an_error_in_v_by_the_square_root_of_alpha_bar(schedule, rng):
    batch = x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 50), rng)
    signal, noise = (np.sqrt(a)[t].reshape(-1, 1, 1, 1) for a in (schedule["alpha_bar"], 1 - schedule["alpha_bar"]))
    v = signal * eps - noise * x_0
    v_theta = v + rng.standard_normal(x_0.shape)
    eps_theta = signal * v_theta + noise * (signal * x_0 + noise * eps)
    value, reported = improved.weighted_loss(lambda x_t, t: eps_theta, schedule, batch)
    assert value == pytest.approx(np.mean(signal * (v - v_theta) ** 2), rel=1e-4)
    assert reported["loss"] == pytest.approx(np.mean((eps - eps_theta) ** 2), rel=1e-4)


# ------------------------------------------------------------------------------------------------ "guide", and classes


def gaussians(schedule, weights, means, variance):
    """E[x_0 | x_t] where x_0 is one number, drawn from Gaussians of these weights and means and the same variance.

    Then x_t is drawn from Gaussians, too, and those that x_t is likely from say what x_0 is.
    """

    def log_density(x_t, t):  # of x_t, and of each Gaussian its part in it
        a, b = (schedule[k][t] for k in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        spread = a**2 * variance + b**2
        each = np.log(weights) - 0.5 * (x_t[..., None] - a * np.array(means)) ** 2 / spread - 0.5 * np.log(spread)
        return np.logaddexp.reduce(each, axis=-1), each

    def x_0_theta(x_t, t):
        total, each = log_density(x_t, t[0])
        a = schedule["sqrt_alpha_bar"][t[0]]
        spread = a**2 * variance + schedule["sqrt_one_minus_alpha_bar"][t[0]] ** 2
        of_each = np.array(means) + a * variance / spread * (x_t[..., None] - a * np.array(means))
        return (np.exp(each - total[..., None]) * of_each).sum(axis=-1)

    return log_density, x_0_theta


@pytest.mark.parametrize("t", [5, 60, 120, 200])
@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_guidance_follows_the_score_of_the_guided_density(t, w, schedule):
    """One of two Gaussians is asked for, the guide knows both: p(x | y) (p(x | y) / p(x))^w, by finite differences."""
    asked, x_0_asked = gaussians(schedule, [1.0], [0.2], 0.01)
    both, x_0_both = gaussians(schedule, [0.3, 0.7], [0.2, -0.15], 0.01)
    a, b = (schedule[k][t] for k in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    x_t, h = a * 0.1 + b * np.linspace(-0.3, 0.3, 7).reshape(-1, 1, 1, 1), 1e-5

    def log_guided(x):
        return (1 + w) * asked(x, t)[0] - w * both(x, t)[0]

    score = (log_guided(x_t + h) - log_guided(x_t - h)) / (2 * h)
    expected = (x_t + b**2 * score) / a  # Tweedie: E[x_0 | x_t], where this is the score
    found = improved.guided(x_0_asked, x_0_both, w)(x_t, np.full(7, t))
    inside = np.abs(expected) < 1
    assert inside.any()
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-3, atol=1e-4)
    assert np.all(np.abs(found) <= 1)


def test_guided_samples_are_those_of_the_guided_density(rng):
    """p is N(0.1, 0.05), the guide is wider, N(0, 0.1): by w = 1 the result is narrower than p, and further off.

    p^2 / q has precision 2 / 0.05 - 1 / 0.1 = 30 and mean (2 * 0.1 / 0.05) / 30, if one could draw from it. The path of
    guided steps is not exactly that of p^2 / q with noise, so the test only asks on which side of p it ends."""
    schedule = make_schedule("linear", 200)
    (_, p), (_, q) = (gaussians(schedule, [1.0], [mean], v) for mean, v in ((0.1, 0.05), (0.0, 0.1)))
    x_T = rng.standard_normal((4000, 1, 1, 1), dtype=np.float32)
    ends = []
    for w in (0, 1):
        *_, (_, x_0) = improved.sample(improved.guided(p, q, w), schedule, x_T, rng, 40, 1.0, 2)
        ends.append((x_0.mean(), x_0.var()))
    assert ends[0] == pytest.approx((0.1, 0.05), rel=0.15)
    assert ends[1][0] > 0.11 and ends[1][1] < 0.042


def test_without_guidance_the_guide_has_no_say():
    found = improved.guided(lambda x, t: x / 2, lambda x, t: 0 * x + 7, 0)(np.array([0.5, 1.0]), None)
    np.testing.assert_array_equal(found, [0.25, 0.5])


def test_a_prediction_is_told_the_labels():
    assert improved.told(lambda *given: given, 7)(1, 2) == (1, 2, 7)
    assert improved.told(lambda *given: given)(1, 2) == (1, 2)


def test_a_tenth_of_the_labels_are_dropped(rng):
    labels = np.arange(20_000).astype(np.uint8) % 10
    found = improved.drop_some(labels, rng)
    dropped = found == -1
    assert dropped.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 20_000))
    np.testing.assert_array_equal(found[~dropped], labels[~dropped])
    assert np.bincount(labels[dropped]).min() > 100  # whatever they say


@pytest.mark.parametrize(("total", "step"), [(1, 1), (8, 1), (9, 2), (7504, 938)])
def test_the_guide_is_kept_after_an_eighth_of_the_training(total, step):
    assert improved.early_step(total) == step


def test_the_default_way_to_draw():
    assert improved.best_sampler([], 200) == ("ddpm", 200, 0)
    assert improved.best_sampler(["v"], 200) == ("sde-dpm++", 20, 0)
    assert improved.best_sampler(["v", "guide"], 6) == ("sde-dpm++", 6, improved.GUIDANCE)


# ------------------------------------------------------------------------------------------------------------ samplers


def test_the_samplers_are_the_papers_and_those_with_their_names():
    """eta is 1 with fresh noise at each step and 0 without, and ++ is of second order."""
    assert {
        name: (float(name in ("ddpm", "sde-dpm++")), 1 + name.endswith("++"))
        for name in ("ddpm", "ddim", "dpm++", "sde-dpm++")
    } == improved.SAMPLERS


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_step_adds_noise_of_the_variance_that_eta_asks_for(schedule, eta):
    """Song et al., Eq. (16), for the first of two steps from t = 200 of an x_0 and a draw that are known."""
    alpha_bar, half = schedule["alpha_bar"], 81  # 200 / 2^1.3
    x_0, x_T = np.full((1, 2, 2, 1), 0.3, np.float32), np.full((1, 2, 2, 1), -0.6, np.float32)
    draws = SimpleNamespace(standard_normal=lambda shape, dtype: np.full(shape, 0.8, dtype))
    (s, x_s), *_ = improved.sample(lambda x_t, t: x_0, schedule, x_T, draws, 2, eta)
    sigma = eta * np.sqrt((1 - alpha_bar[half]) / (1 - alpha_bar[200])) * np.sqrt(1 - alpha_bar[200] / alpha_bar[half])
    eps = (-0.6 - np.sqrt(alpha_bar[200]) * 0.3) / np.sqrt(1 - alpha_bar[200])
    expected = np.sqrt(alpha_bar[half]) * 0.3 + np.sqrt(1 - alpha_bar[half] - sigma**2) * eps + sigma * 0.8
    assert s == half
    np.testing.assert_allclose(x_s, expected, rtol=1e-5)


@pytest.mark.parametrize("sampler", improved.SAMPLERS)
def test_samples_stay_in_float32(sampler, schedule, rng):
    x_T = rng.standard_normal((2, 4, 6, 1), dtype=np.float32)
    path = list(improved.sample(x_0_of(of_x_t, schedule), schedule, x_T, rng, 7, *improved.SAMPLERS[sampler]))
    assert {x.dtype for _, x in path} == {np.dtype(np.float32)}


def test_sample_times():
    assert improved.sample_times(200, 200) == list(range(200, -1, -1))
    assert improved.sample_times(200, 1) == [200, 0]
    for T, steps in ((200, 7), (200, 20), (200, 150), (200, 199), (10, 9), (1000, 50)):
        times = improved.sample_times(T, steps)
        assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
        gaps = -np.diff(times)
        assert gaps.min() >= 1 and np.all(gaps[1:] <= gaps[:-1] + 1)  # shorter and shorter, but for rounding
        assert gaps[0] > gaps[-1] or gaps.max() <= 2
    assert improved.sample_times(1000, 4) == [1000, 688, 406, 165, 0]  # 1000 (i / 4)^1.3


@pytest.mark.parametrize("how", [(), (200, 1.0)], ids=["default", "said"])
def test_with_eta_1_and_every_step_it_is_algorithm_2(rng, schedule, how):
    x_T = rng.standard_normal((2, 4, 6, 1), dtype=np.float32)
    by_2 = diffusion.sample(of_x_t, schedule, x_T, np.random.default_rng(1))
    by_ours = improved.sample(x_0_of(of_x_t, schedule), schedule, x_T, np.random.default_rng(1), *how)
    for (t, a), (s, b) in zip(by_2, by_ours, strict=True):
        assert t == s
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_step_of_any_size_keeps_the_marginal(rng, schedule):
    """If eps_theta is the true eps, x_s must be distributed as q(x_s | x_0), for any eta: Song et al., Lemma 1."""
    x_0 = np.broadcast_to(np.float32(0.4), (20_000, 1, 1, 1))
    for eta in (0.0, 0.5, 1.0):
        noise = np.random.default_rng(2)
        eps = noise.standard_normal(x_0.shape, dtype=np.float32)
        x_T = diffusion.q_sample(schedule, x_0, np.full(len(x_0), 200), eps)

        def true_eps(x_t, t):
            signal, spread = (at(schedule[k], t) for k in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
            return (x_t - signal * x_0) / spread

        for s, x_s in improved.sample(x_0_of(true_eps, schedule), schedule, x_T, noise, 4, eta):
            signal, spread = schedule["sqrt_alpha_bar"][s], schedule["sqrt_one_minus_alpha_bar"][s]
            assert x_s.mean() == pytest.approx(0.4 * signal, abs=4 * spread / 20_000**0.5 + 1e-5)
            assert x_s.std() == pytest.approx(spread, rel=0.03, abs=1e-5)


def test_ddim_draws_nothing_and_a_perfect_network_leads_back(rng, schedule):
    x_0, eps = images(rng, 3), rng.standard_normal((3, 4, 6, 1), dtype=np.float32)
    x_T = diffusion.q_sample(schedule, x_0, np.full(3, 200), eps)
    x_0_theta = x_0_of(lambda x_t, t: eps, schedule)
    for s, x_s in improved.sample(x_0_theta, schedule, x_T, None, 20, eta=0.0):
        # x_T shows x_0 only faintly (alpha_bar_T = 3e-5), so float32 gives it back to some digits
        expected = diffusion.q_sample(schedule, x_0, np.full(3, s), eps)
        np.testing.assert_allclose(x_s, expected, atol=0.02)


def test_ddim_takes_eps_from_the_clipped_x_0():
    s = make_schedule("linear", 10)
    x_T = np.full((1, 1, 1, 1), 3.0, np.float32)
    x_0_theta = x_0_of(lambda x_t, t: -5 * x_t, s)  # x_0 far above 1, so 1
    (half, x_s), *_ = improved.sample(x_0_theta, s, x_T, None, 2, eta=0.0)
    signal, noise = s["sqrt_alpha_bar"], s["sqrt_one_minus_alpha_bar"]
    eps = (3 - signal[10]) / noise[10]
    assert half == 4
    assert x_s.item() == pytest.approx(signal[4] + noise[4] * eps, rel=1e-5)


@pytest.mark.parametrize(("T", "first", "second"), [(10, 6, 2), (3, 2, 1)])
@pytest.mark.parametrize(("before", "now"), [(0.2, 0.3), (0.2, 0.95), (-0.1, -0.9)])
def test_order_2_goes_on_as_the_last_step_did(before, now, T, first, second):
    """In the middle of the second of three steps, measured in lambda, x_0 is as far on as it would be by then."""
    s, predictions = make_schedule("cosine", T), iter([before, now, 0.0])
    signal, noise = s["sqrt_alpha_bar"], s["sqrt_one_minus_alpha_bar"]
    assert improved.sample_times(T, 3) == [T, first, second, 0]

    def x_0_theta(x_t, t):
        return np.full_like(x_t, next(predictions))

    x_T = np.full((1, 1, 1, 1), 0.7, np.float32)
    (_, x), (_, found), _ = improved.sample(x_0_theta, s, x_T, None, 3, eta=0.0, order=2)
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
        x_s = dict(improved.sample(x_0_theta, schedule, x_T, None, steps, 0.0, order))[s]
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
        c = dict(improved.sample(x_0_theta, schedule, x_T, rng, steps, 1.0, order))[s]
        return abs((c**2).sum() - variance[s])

    for order in (1, 2):
        ratios = [error(order, steps) / error(order, 2 * steps) for steps in (32, 64, 128)]
        assert ratios == pytest.approx([2**order] * 3, rel=0.1)
