"""Each layer's gradient with respect to its parameters and its input, and what its initial state promises."""

from functools import partial

from scratchgen import layers, ops, tree
from scratchgen.gradients import value_and_grad

import numpy as np
import pytest
from finite_differences import assert_directional

N, H, W, C, O, E = 2, 4, 6, 8, 16, 10


def shaken(rng, params):
    """The parameters plus noise, so that no zero initialisation hides a gradient."""
    return tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(p.dtype), params)


CASES = {
    "dense": (lambda r: layers.init_dense(r, C, O), layers.dense, [(N, C)]),
    "mlp": (lambda r: layers.init_mlp(r, [C, 7, 5, O]), layers.mlp, [(N, C)]),
    "gated mlp": (
        lambda r: layers.init_mlp(r, [C, 7, 5, O], gated=True),
        partial(layers.mlp, activation=ops.glu),
        [(N, C)],
    ),
    "conv": (lambda r: layers.init_conv(r, C, O), layers.conv, [(N, H, W, C)]),
    "conv 1x1": (lambda r: layers.init_conv(r, C, O, kernel_size=1), layers.conv, [(N, H, W, C)]),
    "norm_silu": (lambda r: layers.init_norm(O), layers.norm_silu, [(N, H, W, O)]),
    "res_block": (lambda r: layers.init_res_block(r, C, O, E), layers.res_block, [(N, H, W, C), (N, E)]),
    "res_block same width": (lambda r: layers.init_res_block(r, C, C, E), layers.res_block, [(N, H, W, C), (N, E)]),
    "global_block": (
        lambda r: layers.init_global_block(r, (H, W), C, 3, 7, E),
        layers.global_block,
        [(N, H, W, C), (N, E)],
    ),
    "label_embedding": (
        lambda r: layers.init_label_embedding(r, 3, E),
        lambda params, x: x * layers.label_embedding(params, np.array([2, -1])),
        [(N, E)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_parameters_and_inputs(rng, name):
    init, apply, shapes = CASES[name]
    params = shaken(rng, init(rng)), [rng.standard_normal(shape) for shape in shapes]
    u = rng.standard_normal(apply(params[0], *params[1]).shape)
    assert_directional(lambda p: (u * apply(p[0], *p[1])).sum(), params, rng, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_float32_in_float32_out(rng, name):
    init, apply, shapes = CASES[name]
    params = init(rng), [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    value, gradient = value_and_grad(lambda p: apply(p[0], *p[1]).sum())(params)
    assert {value.dtype} | {g.dtype for g in tree.leaves(gradient)} == {np.dtype(np.float32)}


def test_he_initialisation_keeps_the_mean_square_through_relu_layers(rng):
    x = rng.standard_normal((500, 300), dtype=np.float32)
    h = layers.mlp(layers.init_mlp(rng, [300] * 6), x)
    assert 0.5 < np.mean(h**2) < 2


def test_a_residual_block_starts_as_its_shortcut(rng):
    params = layers.init_res_block(rng, C, C, E)
    assert "shortcut" not in params  # of equal width it is the input itself
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    np.testing.assert_array_equal(layers.res_block(params, x, rng.standard_normal((N, E), dtype=np.float32)), x)


def test_a_residual_block_is_what_its_docstring_says(rng):
    """Norm, SiLU, convolution; norm scaled and shifted by the time, SiLU, convolution; plus the shortcut."""

    def norm(x):
        groups = x.reshape(N, H * W, layers.GROUPS, -1)
        mean = groups.mean(axis=(1, 3), keepdims=True)
        variance = groups.var(axis=(1, 3), keepdims=True)
        return ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)

    def silu(x):
        return x / (1 + np.exp(-x))

    p = tree.map(np.float64, shaken(rng, layers.init_res_block(rng, C, O, E)))
    x = rng.standard_normal((N, H, W, C))
    time = rng.standard_normal((N, E))
    h = layers.conv(p["conv1"], silu(norm(x) * p["norm1"]["scale"] + p["norm1"]["shift"]))
    scale = 1 + time @ p["time_scale"]["w"] + p["time_scale"]["b"]
    shift = time @ p["time_shift"]["w"] + p["time_shift"]["b"]
    h = layers.conv(p["conv2"], silu(norm(h) * scale[:, None, None] + shift[:, None, None]))
    expected = h + x @ p["shortcut"]["w"] + p["shortcut"]["b"]
    np.testing.assert_allclose(layers.res_block(p, x, time), expected, atol=1e-9)


def test_a_residual_block_depends_on_the_time(rng):
    params = shaken(rng, layers.init_res_block(rng, C, C, E))
    x = np.repeat(rng.standard_normal((1, H, W, C), dtype=np.float32), 2, axis=0)
    y = layers.res_block(params, x, rng.standard_normal((2, E), dtype=np.float32))
    assert np.abs(y[0] - y[1]).max() > 0.01


def test_a_global_block_starts_as_the_identity_and_is_what_its_docstring_says(rng):
    S = 3
    p = layers.init_global_block(rng, (H, W), C, S, 7, E)
    x = rng.standard_normal((N, H, W, C))
    time = rng.standard_normal((N, E))
    np.testing.assert_array_equal(layers.global_block(p, x, time), x)

    def affine(layer, x):
        return np.einsum("...i,io->...o", x, layer["w"]) + layer["b"]

    def silu(x):
        return x / (1 + np.exp(-x))

    p = tree.map(np.float64, shaken(rng, p))
    mean = x.mean(axis=(1, 2), keepdims=True)  # C = 8: groups of one
    variance = x.var(axis=(1, 2), keepdims=True)
    h = (x - mean) / np.sqrt(variance + 1e-5) * p["norm"]["scale"] + p["norm"]["shift"]
    h = affine(p["squeeze"], silu(h))
    to_unit = p["mix_in"]["w"].reshape(H, W, S, 7)
    units = np.einsum("nhws,hwsu->nu", h, to_unit) + p["mix_in"]["b"]
    units = silu(units * (1 + affine(p["time_scale"], time)) + affine(p["time_shift"], time))
    from_unit = p["mix_out"]["w"].reshape(7, H, W, S)
    back = np.einsum("nu,uhws->nhws", units, from_unit) + p["mix_out"]["b"].reshape(H, W, S)
    np.testing.assert_allclose(layers.global_block(p, x, time), x + affine(p["expand"], back), atol=1e-9)


def test_in_a_global_block_each_position_depends_on_every_other(rng):
    params = shaken(rng, layers.init_global_block(rng, (H, W), C, 3, 7, E))
    x = rng.standard_normal((1, H, W, C))
    time = rng.standard_normal((1, E))
    corner = x.copy()
    corner[0, 0, 0] = rng.standard_normal(C)
    difference = layers.global_block(params, corner, time) - layers.global_block(params, x, time)
    assert np.abs(difference).max(axis=3).min() > 1e-3


def test_time_embedding_follows_its_formula_and_tells_steps_apart():
    e = layers.time_embedding(np.arange(1001), 32)
    assert e.shape == (1001, 32) and e.dtype == np.float32
    np.testing.assert_allclose(e[7, 0], np.sin(7), rtol=1e-5)
    np.testing.assert_allclose(e[700, 31], np.cos(700 / 10_000), rtol=1e-5)
    distance = np.linalg.norm(e[1:, None] - e[None, 1:], axis=2) + np.eye(1000) * 9
    assert distance.min() > 0.05


def test_a_label_embedding_is_a_row_of_its_table_and_nothing_for_no_label(rng):
    params = layers.init_label_embedding(rng, 3, E)
    found = layers.label_embedding(params, np.array([2, 0, -1, 2], np.int8))
    np.testing.assert_array_equal(found, [params["w"][2], params["w"][0], np.zeros(E), params["w"][2]])
    assert layers.init_label_embedding(rng, 1000, 100)["w"].std() == pytest.approx(1, rel=0.02)
