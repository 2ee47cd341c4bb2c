"""docs/toy2d.py: the exact denoiser against a closed form, the learned one against the exact one, and the figures."""

from functools import partial
from inspect import signature

from scratchgen import diffusion, samplers

import numpy as np
import pytest
from conftest import lines, script
from matplotlib.colors import to_rgba

toy2d = script("docs/toy2d.py")
SCHEDULE = toy2d.SCHEDULE


@pytest.fixture(scope="module")
def points():
    return toy2d.spirals(np.random.default_rng(0))


@pytest.fixture(scope="module")
def trained(points):
    """eps_theta of the network, and of its guide: ten seconds."""
    params, early = toy2d.train(points, np.random.default_rng(1))
    return partial(toy2d.network, params), partial(toy2d.network, early)


def noisy(points, t, rng, N=1000):
    """x_t and the eps in it, of N points, for a t from 1 to T."""
    eps = toy2d.noise(rng, N)
    return diffusion.q_sample(SCHEDULE, points[:N], np.full(N, t), eps), eps


def log_density(points, x, t):
    """log q(x_t) at one place x: of a sum of Gaussians, one around each point, in float64 and as it is written."""
    a, b = (float(SCHEDULE[name][t]) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    squares = ((x - a * points.reshape(-1, 2).astype(np.float64)) ** 2).sum(axis=1)
    return np.log(np.mean(np.exp(-squares / (2 * b**2)) / (2 * np.pi * b**2)))


def test_the_points_are_on_two_arms_inside_of_the_square(points):
    assert points.shape == (2000, 1, 1, 2) and points.dtype == np.float32
    assert np.abs(points).max() < 1
    first, second = points[::2], points[1::2]
    np.testing.assert_allclose(first.mean(axis=0), -second.mean(axis=0), atol=0.05)  # one is the other, turned
    assert np.median(toy2d.distances(first, second)) > 0.2


@pytest.mark.parametrize("t", [2, 10, 40, 100, 200])
def test_the_exact_score_is_the_gradient_of_the_log_density(t, points, rng):
    """Finite differences of the density know nothing of denoising: Tweedie's formula, a test of both."""
    x_t = noisy(points, t, rng, 20)[0].astype(np.float64)
    score = toy2d.score(partial(toy2d.exact_eps, points), x_t, np.full(20, t)).reshape(20, 2)
    h = 1e-5
    for x, found in zip(x_t.reshape(20, 2), score, strict=True):
        steps = h * np.eye(2)
        expected = [(log_density(points, x + s, t) - log_density(points, x - s, t)) / (2 * h) for s in steps]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_exact_denoiser_of_two_points_is_a_hyperbolic_tangent(rng):
    """Of +m and -m, E[x_0 | x_t] = m tanh(a m x_t / b^2)."""
    m = np.array([0.5, -0.3])
    points = np.stack([m, -m]).reshape(2, 1, 1, 2)
    x_t = rng.standard_normal((6, 1, 1, 2))
    t = np.array([1, 5, 20, 50, 100, 200])
    a, b = (SCHEDULE[name][t].astype(np.float64) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    expected = np.tanh(a * (x_t.reshape(6, 2) @ m) / b**2)[:, None] * m
    np.testing.assert_allclose(toy2d.exact_x_0(points, x_t, t).reshape(6, 2), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("t", "near"), [(1, 1), (5, 0.1), (10, 0.02), (20, 0.005), (50, 0.002), (100, 0.002), (200, 0.005)]
)
def test_what_is_learned_comes_near_the_exact_noise_which_has_the_lowest_loss(t, near, points, trained, rng):
    """Mean square of the difference of two predictions of noise, whose own mean square is 1. The guide is farther."""
    x_t, eps = noisy(points, t, rng, 2000)
    times = np.full(len(x_t), t)
    exact = toy2d.exact_eps(points, x_t, times)
    learned, early = (predict(x_t, times) for predict in trained)
    from_exact = [np.mean((prediction - exact) ** 2) for prediction in (learned, early)]
    assert from_exact[0] < near and (t == 1 or from_exact[0] < from_exact[1] / 2)
    best, *others = (np.mean((eps - prediction) ** 2) for prediction in (exact, learned, early))
    assert best < min(others)


def test_outliers_are_errors_of_the_network_for_the_exact_denoiser_draws_none(points, trained, rng):
    far = {}
    for name, eps, N in (("exact", partial(toy2d.exact_eps, points), 100), ("learned", trained[0], 500)):
        *_, (_, x_0) = samplers.sample(partial(toy2d.x_0_theta, eps), SCHEDULE, toy2d.noise(rng, N), rng)
        far[name] = toy2d.distances(points, x_0)
    assert far["exact"].max() < toy2d.FAR < far["learned"].max()
    assert np.median(far["learned"]) < 0.01


def test_a_guide_takes_the_outliers_away(points, trained):
    outside = {}
    for w in (-1, 0, 1, 2):
        x_0 = toy2d.guided_samples(*trained, w, 600)
        outside[w] = np.mean(toy2d.distances(points, x_0) > toy2d.FAR)
    assert outside[-1] > 0.3 and 0.01 < outside[0] < 0.15
    assert outside[1] < outside[0] / 2 and outside[2] <= outside[1]


def test_the_ways_begin_in_one_noise_and_ddim_is_flow_matching(trained, rng):
    paths = toy2d.paths(trained[0], toy2d.noise(rng, 50), rng)
    scale, _ = samplers.flow_path(SCHEDULE)
    assert {path.shape for path in paths.values()} == {(201, 50, 1, 1, 2)}
    assert np.array_equal(paths["DDIM"][0], paths["Algorithm 2"][0])
    np.testing.assert_allclose(paths["flow matching"] * scale[::-1].reshape(-1, 1, 1, 1, 1), paths["DDIM"], atol=1e-3)
    detours = {name: toy2d.detour(path.reshape(201, 50, 2)) for name, path in paths.items()}
    assert 1 < detours["DDIM"] < 2 and detours["Algorithm 2"] > 10


def test_the_figure_shows_scores_paths_and_guided_samples(monkeypatch, tmp_path, capsys):
    """All of it recomputed, for a network that has hardly learned and few points."""
    figures = {}
    monkeypatch.setattr(toy2d.plots, "save", lambda figure, path: figures.update({path: figure}))
    monkeypatch.setattr(toy2d, "spirals", partial(toy2d.spirals, N=60))
    monkeypatch.setattr(toy2d, "train", partial(toy2d.train, steps=3, early=2))
    assert signature(toy2d.draw_guidance).parameters["N"].default == 1000  # as the title says
    monkeypatch.setattr(toy2d, "draw_guidance", partial(toy2d.draw_guidance, N=40))
    toy2d.main([])
    ((path, figure),) = figures.items()
    assert path == toy2d.FIGURE and capsys.readouterr().out == f"the figure is in {path}\n"

    rng = np.random.default_rng(0)
    points = toy2d.spirals(rng)
    params, early = (partial(toy2d.network, params) for params in toy2d.train(points, rng))
    exact = partial(toy2d.exact_eps, points)
    scores, steps, guidance = figure.subfigs
    assert "score points to where" in scores.get_suptitle() and "noise (orange)" in steps.get_suptitle()
    assert guidance.get_suptitle().startswith("1,000 samples, guidance of strength w; red: farther than 0.05")
    *fields, by_t = scores.axes
    for axes, name, eps in zip(fields, ("exact", "learned"), (exact, params), strict=True):
        assert axes.get_title() == f"{name}, t = 8"
        arrows = axes.collections[1]
        x_t = np.float32(arrows.XY).reshape(-1, 1, 1, 2)
        score = toy2d.score(eps, x_t, np.full(len(x_t), 8)).reshape(-1, 2)
        length = np.sqrt((score**2).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(np.stack([arrows.U, arrows.V], axis=1), score / length, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(arrows.get_array(), length[:, 0], rtol=1e-3)
    losses = {"learned": [], "exact: no loss is lower": []}
    times = by_t.lines[0].get_xdata().tolist()
    for t in times:
        x_0, eps = np.tile(points, (4, 1, 1, 1)), toy2d.noise(rng, 4 * len(points))
        x_t, every_t = diffusion.q_sample(SCHEDULE, x_0, np.full(len(x_0), t), eps), np.full(len(x_0), t)
        for name, predict in zip(losses, (params, exact), strict=True):
            losses[name].append(((eps - predict(x_t, every_t)) ** 2).mean())
    assert (times[0], times[-1]) == (1, 200) and lines(by_t).keys() == losses.keys()
    for name, expected in losses.items():
        np.testing.assert_allclose(lines(by_t)[name][1], expected, rtol=1e-4)

    paths = toy2d.paths(params, toy2d.noise(rng, 200), rng)
    for axes, (name, path) in zip(steps.axes, paths.items(), strict=True):
        x = path.reshape(201, 200, 2)
        assert axes.get_title() == f"{name}: {toy2d.detour(x):.1f} times the distance"
        data, start, end, *_ = axes.collections
        for dots, expected, colour in ((data, points, "silver"), (start, x[0], "C1"), (end, x[-1], "black")):
            np.testing.assert_allclose(dots.get_offsets(), expected.reshape(-1, 2), atol=1e-5)
            assert tuple(dots.get_facecolor()[0]) == to_rgba(colour)
        for n, line in enumerate(axes.lines):
            np.testing.assert_allclose(line.get_xydata(), x[:, n], atol=1e-5)
        assert len(axes.lines) == (3 if name == "Algorithm 2" else 12)

    for axes, (w, title) in zip(
        guidance.axes, enumerate(("the guide alone", "w = 0", "w = 1", "w = 2"), -1), strict=True
    ):
        x_0 = toy2d.guided_samples(params, early, w, 40)
        far = toy2d.distances(points, x_0) > 0.05
        assert axes.get_title() == f"{title}: {far.mean():.1%} red"
        for dots, where, colour in zip(axes.collections[1:], (~far, far), ("C0", "C3"), strict=True):
            np.testing.assert_allclose(dots.get_offsets(), x_0[where].reshape(-1, 2), atol=1e-5)
            assert not where.any() or tuple(dots.get_facecolor()[0]) == to_rgba(colour)


def test_the_animation_has_a_frame_for_each_t_and_is_small(points, rng):
    eps_theta = partial(toy2d.network, toy2d.init_network(rng))
    paths = toy2d.paths(eps_theta, toy2d.noise(rng, 200), rng)
    animation = toy2d.animation(points, paths, frames=5)
    text = animation.to_jshtml()
    assert text.count("data:image/png") == 6
    assert len(text) < 200_000
    figure = animation._fig
    for t in samplers.timesteps(200, 5):
        animation._func(t)
        assert figure.get_suptitle() == f"t = {t}"
        for axes, name in zip(figure.axes, ("Algorithm 2", "DDIM"), strict=True):
            assert axes.get_title() == name
            np.testing.assert_array_equal(axes.collections[1].get_offsets(), paths[name][200 - t].reshape(-1, 2))
