"""Each primitive: its value against a plain definition, its gradient against finite differences, its dtype."""

import warnings

from scratchgen import ops
from scratchgen.gradients import op, value_and_grad

import autograd.numpy as anp
import numpy as np
import plain
import pytest
from finite_differences import assert_directional, assert_gradients

N, H, W, C, O = 3, 4, 6, 8, 5  # all different, so that no two axes can be confused


def naive_conv2d(x, k, b):
    """The definition of a same-padded cross-correlation, one output number at a time."""
    K = k.shape[0]
    r = K // 2
    y = np.zeros((*x.shape[:3], k.shape[3]))
    for n, h, w, o in np.ndindex(y.shape):
        total = b[o]
        for i in range(K):
            for j in range(K):
                row = h + i - r
                column = w + j - r
                if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                    total += x[n, row, column] @ k[i, j, :, o]
        y[n, h, w, o] = total
    return y


def norm_silu(groups):
    def of_each_image(v):  # (C,) or (N, C)
        return v[:, None, None] if v.ndim == 2 else v

    def definition(x, scale, shift):
        return plain.silu(plain.norm(x, groups) * of_each_image(scale) + of_each_image(shift))

    return lambda *arrays: ops.norm_silu(*arrays, groups), definition


def log_likelihood(logits):
    p = plain.sigmoid(logits)
    return (PIXELS * np.log(p) + (1 - PIXELS) * np.log(1 - p)).reshape(N, -1).sum(axis=1)


PIXELS = np.random.default_rng(5).random((N, H, W, 1))
CASES = {  # name -> function, its definition, and the shapes of its arguments
    "dense": (ops.dense, lambda x, w, b: x @ w + b, [(N, C), (C, O), (O,)]),
    "dense of rows": (ops.dense, lambda x, w, b: x @ w + b, [(2, 5, C), (C, O), (O,)]),
    "dense of images": (ops.dense, lambda x, w, b: x @ w + b, [(2, 3, 4, C), (C, O), (O,)]),
    "conv2d": (ops.conv2d, naive_conv2d, [(N, H, W, 2), (3, 3, 2, O), (O,)]),
    "conv2d 1x1": (ops.conv2d, naive_conv2d, [(N, H, W, C), (1, 1, C, O), (O,)]),
    "conv2d 5x5": (ops.conv2d, naive_conv2d, [(N, H, W, 2), (5, 5, 2, 3), (3,)]),
    "conv2d larger than an image": (ops.conv2d, naive_conv2d, [(2, H, W, 1), (11, 11, 1, 2), (2,)]),
    "conv2d in another memory order": (
        lambda x, k, b: ops.conv2d(x.transpose((0, 2, 3, 1)), k, b),
        lambda x, k, b: naive_conv2d(x.transpose(0, 2, 3, 1), k, b),
        [(N, 2, H, W), (3, 3, 2, 3), (3,)],
    ),
    "space_to_depth": (lambda x: ops.space_to_depth(x, 2), plain.squares, [(N, H, W, C)]),
    "depth_to_space": (lambda x: ops.depth_to_space(x, 2), plain.from_squares, [(N, H, W, C)]),
    "relu": (ops.relu, plain.relu, [(N, C)]),
    "silu": (ops.silu, plain.silu, [(N, C)]),
    "glu": (ops.glu, plain.glu, [(N, 2 * C)]),
    "glu of images": (ops.glu, plain.glu, [(2, 3, 4, 10)]),
    "mean": (ops.mean, lambda x: sum(x.ravel().tolist()) / x.size, [(N, H, W, C)]),
    "mean of a row": (ops.mean, lambda x: sum(x.tolist()) / N, [(N,)]),
    "mean of a number": (ops.mean, lambda x: x, [()]),
    "bernoulli": (
        lambda logits: ops.bernoulli_log_likelihood(logits, PIXELS.astype(logits.dtype)),
        log_likelihood,
        [(N, H, W, 1)],
    ),
}
for groups in (1, 2, 8):
    CASES[f"norm_silu, {groups} groups"] = *norm_silu(groups), [(N, H, W, C), (C,), (C,)]
    CASES[f"norm_silu, {groups} groups, per image"] = *norm_silu(groups), [(N, H, W, C), (N, C), (N, C)]
each_case = pytest.mark.parametrize("name", CASES)


# ------------------------------------------------------------------------------------------------- values and gradients


@each_case
def test_a_primitive_is_its_definition_and_has_the_gradients_of_finite_differences(rng, both_kinds, name):
    """For numbers from far below zero to far above; each gradient alone, too, as where an input needs none."""
    f, definition, shapes = CASES[name]
    arrays = [np.asarray(3 * rng.standard_normal(shape) + 1) for shape in shapes]
    rtol, atol = (1e-6, 1e-6) if "norm_silu" in name else (1e-9, 1e-7)  # whose moments lose digits
    np.testing.assert_allclose(f(*arrays), definition(*arrays), rtol=rtol, atol=1e-12)
    assert_gradients(f, arrays, atol=atol)
    _, together = value_and_grad(lambda arrays: f(*arrays).sum())(arrays)
    for i, expected in enumerate(together):
        _, alone = value_and_grad(lambda a, i=i: f(*arrays[:i], a, *arrays[i + 1 :]).sum())(arrays[i])
        np.testing.assert_array_equal(alone, expected)


@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_are_kept_and_all_arrays_left_as_they_were(rng, name, dtype):
    """Of answers and incoming gradients, too, as others may have them: where two arrays are added, both get the same
    gradient."""
    f, _, shapes = CASES[name]
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    seen = [(a, a.copy()) for a in arrays]

    @op
    def watch(x):
        return x, lambda g: (seen.append((g, g.copy())) or g,)

    def loss(arrays):
        y = f(*arrays)
        seen.append((y._value, y._value.copy()))
        return (watch(y) ** 2).sum()

    value, gradients = value_and_grad(loss)(arrays)
    assert f(*arrays).dtype == value.dtype == dtype
    assert [(g.dtype, g.shape) for g in gradients] == [(dtype, shape) for shape in shapes]
    assert len(seen) == len(arrays) + 2
    for after, before in seen:
        np.testing.assert_array_equal(after, before)


def test_gradients_of_layers_so_large_that_their_products_are_cut(rng, both_kinds):
    """Along random directions, against finite differences: here the entries are too many to try each."""
    x = rng.standard_normal((2, 14, 12, 24))
    k = rng.standard_normal((3, 3, 24, 40))
    b = rng.standard_normal(40)
    assert_directional(lambda p: anp.sum(anp.sin(ops.conv2d(*p))), [x, 0.1 * k, b], rng)
    x = rng.standard_normal((60, 784))
    w = rng.standard_normal((784, 300))
    b = rng.standard_normal(300)
    assert_directional(lambda p: anp.sum(anp.sin(ops.dense(*p))), [x, 0.03 * w, b], rng, rtol=1e-5)


@pytest.mark.parametrize("part", ["product", "correlate"])
def test_the_costly_gradient_of_an_input_that_needs_none_is_not_computed(rng, part, monkeypatch):
    f, _, shapes = CASES["dense" if part == "product" else "conv2d"]
    x, *weights = (rng.standard_normal(shape) for shape in shapes)
    calls = []
    original = getattr(ops, part)
    monkeypatch.setattr(ops, part, lambda *args, **more: calls.append(args) or original(*args, **more))
    value_and_grad(lambda a: f(*a).sum())([x, *weights])
    with_x = len(calls)
    value_and_grad(lambda a: f(x, *a).sum())(weights)
    assert len(calls) == with_x + with_x - 1


def test_the_checker_catches_a_wrong_vjp(rng):
    @op
    def square(x):
        return x * x, lambda g: (g * x,)  # 2 x is right

    with pytest.raises(AssertionError, match="argument 0"):
        assert_gradients(square, [rng.standard_normal((N, C))])


def test_the_checker_catches_a_kernel_that_is_not_flipped(rng, monkeypatch):
    """The commonest mistake in a convolution's VJP, put in on purpose."""
    monkeypatch.setattr(ops, "flipped", lambda k: k.swapaxes(2, 3))
    f, _, shapes = CASES["conv2d"]
    with pytest.raises(AssertionError, match="argument 0"):
        assert_gradients(f, [rng.standard_normal(shape) for shape in shapes])


# --------------------------------------------------------------------------------------------------------- convolution


def test_no_images_are_no_trouble(both_kinds):
    arrays = [np.zeros((0, H, W, C)), np.ones((3, 3, C, O)), np.ones(O)]
    value, (dx, dk, db) = value_and_grad(lambda a: ops.conv2d(*a).sum())(arrays)
    assert value == 0 and dx.shape == arrays[0].shape and not dk.any() and not db.any()


@pytest.mark.parametrize("N", [1, 16, 35])
def test_a_convolution_of_many_images_is_that_of_each(rng, both_kinds, N):
    x = rng.standard_normal((N, H, W, C))
    k = rng.standard_normal((3, 3, C, O))
    b = rng.standard_normal(O)
    np.testing.assert_allclose(ops.conv2d(x, k, b), np.concatenate([ops.conv2d(x[n : n + 1], k, b) for n in range(N)]))
    assert_directional(lambda p: anp.sum(anp.sin(ops.conv2d(*p))), [x, 0.1 * k, b], rng, directions=2)


@pytest.mark.parametrize("kernel", [(2, 2, C, O), (3, 1, C, O), (3, 3, C + 1, O)])
def test_convolution_refuses_a_kernel_that_does_not_fit(rng, kernel):
    with pytest.raises(ValueError, match="kernel"):
        ops.conv2d(rng.standard_normal((N, H, W, C)), rng.standard_normal(kernel), np.zeros(O))


def test_convolution_of_mixed_dtypes_does_not_lose_precision(rng):
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    k = rng.standard_normal((3, 3, C, O))
    y = ops.conv2d(x, k, np.zeros(O))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, naive_conv2d(x, k, np.zeros(O)), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- numbers far out


def test_group_norm_of_numbers_far_from_zero(rng):
    x = (rng.standard_normal((N, H, W, C)) + 10).astype(np.float32)
    _, found = ops.group_moments(x, 2, 1e-5)
    _, expected = ops.group_moments(x.astype(np.float64), 2, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_group_norm_of_constant_images_is_finite_and_their_shift():
    constants = np.linspace(1, 1000, 50, dtype=np.float32)  # rounding makes E[x^2] - m^2 negative for some of them
    x = np.broadcast_to(constants[:, None, None, None], (50, H, W, C)).copy()
    _, r = ops.group_moments(x, 2, 1e-5)
    assert np.isfinite(r).all() and np.all(r <= 1.001 / np.sqrt(1e-5))
    shift = np.arange(C, dtype=np.float32) - C // 2
    found = ops.norm_silu(x[-1:], np.ones(C, np.float32), shift, 2)[0, 0, 0]
    np.testing.assert_allclose(found, plain.silu(shift), atol=1e-2)


def test_norm_silu_of_extreme_scales_is_finite(rng):
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    scale = np.full(C, 1e4, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradients = value_and_grad(lambda a: ops.norm_silu(*a, 2).sum())([x, scale, 0 * scale])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits_stay_finite_and_probabilities_within_0_and_1(dtype):
    logits = np.array([[-1e4, -200, -88, 0, 88, 200, 1e4]], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = ops.sigmoid(logits)
        assert np.all((p >= 0) & (p <= 1)) and p[0, 3] == 0.5 and p[0, 0] < 1e-30 and p[0, -1] == 1
        for x in (np.zeros_like(logits), np.ones_like(logits)):
            value, gradient = value_and_grad(lambda v, x=x: ops.bernoulli_log_likelihood(v[0], x).sum())([logits])
            expected = -np.where(x == 1, np.maximum(-logits, 0), np.maximum(logits, 0)).sum() - np.log(2)
            assert np.isclose(value, expected) and np.isfinite(gradient[0]).all()
