"""Adam against the algorithm on plain numbers, and the two schedules at their ends."""

import math

from scratchgen import optim, tree
from scratchgen.optim import adam_step, cosine_decay, ema_step, init_adam

import numpy as np
import pytest


def test_adam_follows_the_algorithm_on_scalars(rng):
    p = {"w": np.array([0.5]), "b": [np.array([-2.0])]}
    expected, m, v = [0.5, -2.0], [0.0, 0.0], [0.0, 0.0]
    adam = init_adam(p)
    for step in range(1, 6):
        g = rng.standard_normal(2)
        adam_step(p, {"w": g[:1].copy(), "b": [g[1:].copy()]}, adam, step, lr=0.1)
        for i in range(2):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            expected[i] -= 0.1 * (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
        assert [p["w"][0], p["b"][0][0]] == pytest.approx(expected, rel=1e-12)


def test_adam_works_in_place_and_in_float32():
    p = {"w": np.ones(3, np.float32)}
    w, adam = p["w"], init_adam(p)
    adam_step(p, {"w": np.ones(3, np.float32)}, adam, 1, lr=0.1)
    assert p["w"] is w and w[0] == pytest.approx(0.9, rel=1e-5)  # the first step has size lr, whatever the gradient
    assert adam["m"]["w"].dtype == adam["v"]["w"].dtype == w.dtype == np.float32


@pytest.mark.parametrize("step_of", [adam_step, optim.muon_step])
def test_moments_of_a_dead_unit_end_at_zero_and_not_just_above(step_of):
    p, g = {"w": np.ones((8, 8), np.float32)}, {"w": np.eye(8, dtype=np.float32)}
    moments = init_adam(p)
    for step in range(1, 2001):
        step_of(p, g, moments, step, lr=1e-3, beta2=0.95)
        g["w"][:4] = 0  # four of the eight units die after the first step
    assert not moments["m"]["w"][:4].any() and not moments["v"]["w"][:4].any()
    assert np.all(np.diag(moments["m"]["w"])[4:] > 0.9)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [cosine_decay(step, 1000, 0.01) for step in range(1001)]
    assert rates[0] == pytest.approx(0.0001) and np.argmax(rates) == 99
    assert rates[500] == pytest.approx(0.005) and rates[1000] == 0
    assert np.all(np.diff(rates[100:]) < 0)
    assert np.argmax([cosine_decay(step, 50, 1.0) for step in range(50)]) == 4  # a short run rises for a tenth of it
    assert cosine_decay(0, 1, 1.0) == 1


def test_ema_forgets_its_start_before_it_reaches_its_decay():
    ema = {"w": np.ones(1)}
    for step, d in ((1, 2 / 11), (2, 3 / 12), (3, 0.26)):
        before = ema["w"][0]
        ema_step(ema, {"w": np.zeros(1)}, step, decay=0.26)
        assert ema["w"][0] == pytest.approx(d * before)


def test_ema_of_constant_weights_arrives_and_then_averages_slowly():
    ema, params = {"w": np.zeros(2)}, {"w": np.ones(2)}
    for step in range(1, 60):
        ema_step(ema, params, step, decay=0.99)
    np.testing.assert_allclose(ema["w"], 1, atol=1e-6)
    ema_step(ema, {"w": np.zeros(2)}, 10_000, decay=0.99)
    np.testing.assert_allclose(ema["w"], 0.99, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (16, 16)])
def test_orthogonalise_keeps_singular_vectors_and_evens_out_singular_values(rng, shape):
    U, _, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    s = np.geomspace(30, 3, len(Vt))  # divided by their norm, all are above 0.01
    X = optim.orthogonalise(U * s @ Vt)
    diagonal = U.T @ X @ Vt.T
    assert np.abs(diagonal - np.diag(np.diag(diagonal))).max() < 1e-9
    assert np.diag(diagonal).min() > 0.6 and np.diag(diagonal).max() < 1.3
    assert optim.orthogonalise((U * s @ Vt).astype(np.float32)).dtype == np.float32
    assert np.all(optim.orthogonalise(np.zeros(shape)) == 0)


def test_muon_steps_matrices_by_nesterov_momentum_and_the_rest_by_adam(rng):
    params = {"k": rng.standard_normal((3, 3, 2, 12)), "b": rng.standard_normal(12), "narrow": np.ones((20, 4))}
    gradients = [tree.map(lambda p: rng.standard_normal(p.shape), params) for _ in range(3)]
    by_muon, by_adam = (tree.map(np.copy, params) for _ in range(2))
    moments, adam = optim.init_adam(params), optim.init_adam(params)
    m, k = 0, params["k"].copy()
    for step, g in enumerate(gradients, 1):
        optim.muon_step(by_muon, g, moments, step, lr=0.01, beta2=0.99)
        optim.adam_step(by_adam, g, adam, step, lr=0.01, beta2=0.99)
        m = 0.95 * m + g["k"]
        direction = optim.orthogonalise((g["k"] + 0.95 * m).reshape(18, 12)).reshape(3, 3, 2, 12)
        k -= 0.01 * 0.2 * 18**0.5 * direction
    np.testing.assert_allclose(by_muon["k"], k, rtol=1e-12)
    for name in ("b", "narrow"):
        np.testing.assert_array_equal(by_muon[name], by_adam[name])


def test_weight_decay_shrinks_all_matrices_before_the_step_and_no_biases(rng):
    shapes = {"muon": (3, 3, 2, 12), "adam": (20, 4), "bias": (12,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    g = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    shrunk = {name: p * (1 if name == "bias" else 1 - 0.01 * 0.5) for name, p in params.items()}
    optim.muon_step(params, g, optim.init_adam(params), 1, lr=0.01, weight_decay=0.5)
    optim.muon_step(shrunk, g, optim.init_adam(shrunk), 1, lr=0.01)
    for name in shapes:
        np.testing.assert_allclose(params[name], shrunk[name], rtol=1e-12)


def test_a_muon_step_has_entries_of_the_size_lr_times_0_2(rng):
    params = [np.zeros((64, 200), np.float32)]
    g = [rng.standard_normal((64, 200), dtype=np.float32)]
    optim.muon_step(params, g, optim.init_adam(params), 1, lr=1.0)
    assert params[0].dtype == np.float32
    assert np.sqrt((params[0] ** 2).mean()) == pytest.approx(0.2, rel=0.3)
