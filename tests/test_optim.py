"""Adam against the algorithm on plain numbers, denormals, and the two schedules at their ends."""

import math

from scratchgen import tree
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, cosine_decay, ema_step, flush_denormals, init_moments

import numpy as np
import pytest


def test_adam_follows_the_algorithm_on_scalars(rng):
    p = {"w": np.array([0.5]), "b": [np.array([-2.0])]}
    expected = [0.5, -2.0]
    m = [0.0, 0.0]
    v = [0.0, 0.0]
    moments = init_moments(p)
    for step in range(1, 6):
        g = rng.standard_normal(2)
        adam_step(p, {"w": g[:1].copy(), "b": [g[1:].copy()]}, moments, step, lr=0.1)
        for i in range(2):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            expected[i] -= 0.1 * (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
        assert [p["w"][0], p["b"][0][0]] == pytest.approx(expected, rel=1e-12)


def test_adam_works_in_place_and_in_float32_and_its_first_step_has_size_lr():
    p = {"w": np.ones(3, np.float32)}
    w = p["w"]
    moments = init_moments(p)
    adam_step(p, {"w": np.array([1, -1e-3, 1e-8], np.float32)}, moments, 1, lr=0.1)
    # Whatever the gradient is: only beside 1e-8 it is felt, half of it.
    assert p["w"] is w and w == pytest.approx([0.9, 1.1, 0.95], rel=1e-5)
    assert moments["m"]["w"].dtype == moments["v"]["w"].dtype == w.dtype == np.float32


@pytest.mark.parametrize("step_of", [adam_step, muon_step])
def test_where_the_gradient_is_none_nothing_changes(rng, step_of):
    """A rank steps its own leaves; None stands for those of the others."""
    params = {"mine": rng.standard_normal((12, 16)), "others": [rng.standard_normal((12, 16)), rng.standard_normal(16)]}
    alone = {"mine": params["mine"].copy()}
    before = tree.map(np.copy, params)
    moments, moments_alone = init_moments(params), init_moments(alone)
    for step in (1, 2):
        g = rng.standard_normal((12, 16))
        step_of(params, {"mine": g, "others": [None, None]}, moments, step, 0.1)
        step_of(alone, {"mine": g}, moments_alone, step, 0.1)
    np.testing.assert_array_equal(params["mine"], alone["mine"])
    assert np.all(params["mine"] != before["mine"])
    for name in ("m", "v"):
        np.testing.assert_array_equal(moments[name]["mine"], moments_alone[name]["mine"])
        assert not any(np.any(moment) for moment in moments[name]["others"])
    for found, untouched in zip(params["others"], before["others"], strict=True):
        np.testing.assert_array_equal(found, untouched)


@pytest.mark.parametrize("step_of", [adam_step, muon_step])
def test_moments_of_a_dead_unit_end_at_zero_and_not_just_above(step_of):
    """As the loops of the scripts have it: what is no normal number is set to zero every hundred steps."""
    p = {"w": np.ones((8, 8), np.float32)}
    g = {"w": np.eye(8, dtype=np.float32)}
    moments = init_moments(p)
    for step in range(1, 2001):
        if step % 100 == 0:
            flush_denormals(moments)
        step_of(p, g, moments, step, lr=1e-3, beta2=0.95)
        g["w"][:4] = 0  # four of the eight units die after the first step
    assert not moments["m"]["w"][:4].any() and not moments["v"]["w"][:4].any()
    assert np.all(np.diag(moments["m"]["w"])[4:] > 0.9)


def test_only_what_is_no_normal_number_is_set_to_zero_and_in_place():
    tiny = np.finfo(np.float32).tiny
    numbers = np.array([1, -1, 1e-30, -1e-30, tiny, -tiny, 0.9 * tiny, -0.9 * tiny], np.float32)
    arrays = {"m": {"w": numbers.copy(), "b": [np.zeros((2, 3), np.float32), None]}, "v": numbers.copy()}
    m = arrays["m"]["w"]
    v = arrays["v"]
    flush_denormals(arrays)
    assert arrays["m"]["w"] is m and arrays["v"] is v and m.dtype == np.float32
    np.testing.assert_array_equal(m, [*numbers[:6], 0, 0])
    np.testing.assert_array_equal(v, [*numbers[:6], 0, 0])
    assert arrays["m"]["b"][1] is None and not arrays["m"]["b"][0].any()


def test_learning_rate_rises_then_falls_to_zero():
    rates = [cosine_decay(step, 1000, 0.01) for step in range(1, 1002)]  # one more than there are
    assert rates[0] == pytest.approx(0.0001) and np.argmax(rates) == 99
    assert rates[500] == pytest.approx(0.005) and rates[1000] == 0
    assert np.all(np.diff(rates[100:]) < 0)
    short = [cosine_decay(step, 50, 1.0) for step in range(1, 51)]  # rises for a tenth of it
    assert np.argmax(short) == 4
    assert cosine_decay(1, 1, 1.0) == 1
    assert cosine_decay(50, 10_000, 1.0) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 49 / 10_000)), rel=1e-12)
    assert cosine_decay(1101, 1000, 1.0) == 0  # and stays there


def test_ema_forgets_its_start_before_it_reaches_its_decay_and_passes_over_none():
    w = np.ones(2)
    for step, d in ((1, 2 / 11), (2, 3 / 12), (3, 0.26), (10_000, 0.26)):
        p = np.array([0.0, step])
        expected = d * w + (1 - d) * p
        ema_step({"w": w, "other": [None]}, {"w": p, "other": [np.ones(3)]}, step, decay=0.26)
        np.testing.assert_allclose(w, expected, rtol=1e-12)
