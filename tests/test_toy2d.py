"""docs/toy2d.py: the exact denoiser against a closed form, the learned one against the exact one, and the figures."""

from functools import partial

from scratchgen import diffusion, samplers

import numpy as np
import pytest
from conftest import script

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


def test_no_predictor_has_a_lower_loss_than_the_exact_one(points, trained, rng):
    exact, (learned, early) = partial(toy2d.exact_eps, points), trained
    for t in (1, 10, 50, 100, 200):
        x_t, eps = noisy(points, t, rng, 2000)
        times = np.full(2000, t)
        best, *others = (np.mean((eps - predict(x_t, times)) ** 2) for predict in (exact, learned, early))
        assert best < min(others), t


@pytest.mark.parametrize(("t", "near"), [(5, 0.1), (10, 0.02), (20, 0.005), (50, 0.002), (100, 0.002), (200, 0.005)])
def test_what_is_learned_comes_near_the_exact_noise(t, near, points, trained, rng):
    """Mean square of the difference of two predictions of noise, whose own mean square is 1. The guide is farther."""
    x_t, _ = noisy(points, t, rng)
    times = np.full(len(x_t), t)
    exact = toy2d.exact_eps(points, x_t, times)
    learned, early = (np.mean((predict(x_t, times) - exact) ** 2) for predict in trained)
    print(f"t = {t}: learned {learned:.5f}, early {early:.5f}")
    assert learned < near and learned < early / 2


def test_outliers_are_errors_of_the_network_for_the_exact_denoiser_draws_none(points, trained, rng):
    x_T = toy2d.noise(rng, 500)
    far = {}
    for name, eps in (("exact", partial(toy2d.exact_eps, points)), ("learned", trained[0])):
        *_, (_, x_0) = samplers.sample(partial(toy2d.x_0_theta, eps), SCHEDULE, x_T, rng)
        far[name] = toy2d.distances(points, x_0)
    print({name: (np.median(of), of.max()) for name, of in far.items()})
    assert far["exact"].max() < toy2d.FAR < far["learned"].max()
    assert np.median(far["learned"]) < 0.01


def test_a_guide_takes_the_outliers_away(points, trained):
    outside = {}
    for w in (-1, 0, 1, 2):
        x_0 = toy2d.guided_samples(*trained, w, 1000)
        outside[w] = np.mean(toy2d.distances(points, x_0) > toy2d.FAR)
    print(outside)
    assert outside[-1] > 0.3 and 0.01 < outside[0] < 0.15
    assert outside[1] < outside[0] / 2 and outside[2] <= outside[1]


def test_the_ways_begin_in_one_noise_and_ddim_is_flow_matching(trained, rng):
    paths = toy2d.paths(trained[0], toy2d.noise(rng, 50), rng)
    scale, _ = samplers.flow_path(SCHEDULE)
    assert {path.shape for path in paths.values()} == {(201, 50, 1, 1, 2)}
    assert np.array_equal(paths["DDIM"][0], paths["Algorithm 2"][0])
    np.testing.assert_allclose(paths["flow matching"] * scale[::-1].reshape(-1, 1, 1, 1, 1), paths["DDIM"], atol=1e-3)
    detours = {name: toy2d.detour(path.reshape(201, 50, 2)) for name, path in paths.items()}
    print(detours)
    assert 1 < detours["DDIM"] < 2 and detours["Algorithm 2"] > 10


def test_the_program_writes_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy2d, "FIGURE", tmp_path / "toy2d.png")
    monkeypatch.setattr(toy2d, "train", partial(toy2d.train, steps=3, early=2))
    toy2d.main([])
    assert (tmp_path / "toy2d.png").read_bytes().startswith(b"\x89PNG")
    assert "toy2d.png" in capsys.readouterr().out


def test_the_animation_has_a_frame_for_each_t_and_is_small(points, rng):
    eps_theta = partial(toy2d.network, toy2d.init_network(rng))
    paths = toy2d.paths(eps_theta, toy2d.noise(rng, 200), rng)
    text = toy2d.animation(points, paths, frames=5).to_jshtml()
    assert text.count("data:image/png") == 6
    assert len(text) < 200_000
