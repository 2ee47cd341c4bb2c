"""Each primitive: its value against a plain definition, its gradient against finite differences, its dtype."""

import warnings

from scratchgen import ops
from scratchgen.gradients import op, value_and_grad

import autograd.numpy as anp
import numpy as np
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


def naive_group_norm(x, scale, shift, groups, epsilon=1e-5):
    y = np.zeros_like(x)
    width = x.shape[-1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, :, :, g * width : (g + 1) * width]
            y[n, :, :, g * width : (g + 1) * width] = (part - part.mean()) / np.sqrt(part.var() + epsilon)
        y[n] = y[n] * (scale[n] if scale.ndim == 2 else scale) + (shift[n] if shift.ndim == 2 else shift)
    return y


def away_from_zero(rng, *shape):
    """Random numbers of size 0.1 and more, for functions with a kink at zero."""
    x = rng.standard_normal(shape)
    return x + 0.1 * np.sign(x)


# ------------------------------------------------------------------------------------------------------------ values


def test_no_images_are_no_trouble(both_kinds):
    arrays = [np.zeros((0, H, W, C)), np.ones((3, 3, C, O)), np.ones(O)]
    value, (dx, dk, db) = value_and_grad(lambda a: ops.conv2d(*a).sum())(arrays)
    assert value == 0 and dx.shape == arrays[0].shape and not dk.any() and not db.any()


def test_windows_are_the_neighbourhoods_of_every_position(rng):
    x = rng.standard_normal((N, H, W, C))
    K = 3
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    found = ops.windows(x, K)
    assert found.shape == (W, N * H, K * K * C)
    for n, h, w in np.ndindex(N, H, W):
        expected = padded[n, h : h + K, w : w + K].swapaxes(0, 1)  # column, row, channel
        np.testing.assert_array_equal(found[w, n * H + h], expected.ravel())


@pytest.mark.parametrize("K", [1, 3, 5, 11])  # the last is larger than the images
def test_convolution_equals_the_naive_loop(rng, both_kinds, K):
    x = rng.standard_normal((N, H, W, C))
    k = rng.standard_normal((K, K, C, O))
    b = rng.standard_normal(O)
    np.testing.assert_allclose(ops.conv2d(x, k, b), naive_conv2d(x, k, b), atol=1e-12)


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


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_norm_silu_equals_its_definition(rng, groups, per_image):
    x = rng.standard_normal((N, H, W, C)) * 3 + 2
    scale, shift = rng.standard_normal((2, N, C) if per_image else (2, C))
    h = naive_group_norm(x, scale, shift, groups)
    np.testing.assert_allclose(ops.norm_silu(x, scale, shift, groups), h / (1 + np.exp(-h)), rtol=1e-6, atol=1e-12)


def test_norm_silu_of_a_constant_image_is_the_silu_of_its_shift():
    x = np.full((1, H, W, C), 1000.0, np.float32)
    shift = np.arange(C, dtype=np.float32) - C // 2
    found = ops.norm_silu(x, np.ones(C, np.float32), shift, 2)[0, 0, 0]
    np.testing.assert_allclose(found, shift / (1 + np.exp(-shift)), atol=1e-2)


def test_norm_silu_of_extreme_scales_is_finite(rng):
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    scale = np.full(C, 1e4, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradients = value_and_grad(lambda a: ops.norm_silu(*a, 2).sum())([x, scale, 0 * scale])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_space_to_depth_holds_the_pixels_of_one_square_and_depth_to_space_puts_them_back(rng):
    x = rng.standard_normal((N, H, W, C))
    p = ops.space_to_depth(x, 2)
    assert p.shape == (N, H // 2, W // 2, 4 * C)
    np.testing.assert_array_equal(p[1, 1, 2].reshape(2, 2, C), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(ops.depth_to_space(p, 2), x)


def test_activations_equal_their_definitions(rng):
    x = rng.standard_normal((N, C)) * 5
    np.testing.assert_allclose(ops.silu(x), x / (1 + np.exp(-x)))
    np.testing.assert_array_equal(ops.relu(x), np.where(x > 0, x, 0))
    a, b = rng.standard_normal((2, N, C)) * 5
    np.testing.assert_allclose(ops.glu(np.concatenate([a, b], axis=1)), a / (1 + np.exp(-b)))
    a, b = rng.standard_normal((2, 2, 3, 4, 5))  # images: the last axis is halved, whatever their size
    np.testing.assert_allclose(ops.glu(np.concatenate([a, b], axis=-1)), a / (1 + np.exp(-b)))


def test_mean_equals_its_definition_and_is_a_scalar(rng):
    for x in (rng.standard_normal((N, H, W)), rng.standard_normal(N), np.array(2.5)):
        found = ops.mean(x)
        assert found.shape == () and found == pytest.approx(sum(x.ravel().tolist()) / x.size, rel=1e-12)


def test_bernoulli_log_likelihood_equals_its_definition(rng):
    logits = rng.standard_normal((N, H, W, 1)) * 3
    x = rng.random((N, H, W, 1))
    p = 1 / (1 + np.exp(-logits))
    expected = (x * np.log(p) + (1 - x) * np.log(1 - p)).reshape(N, -1).sum(axis=1)
    np.testing.assert_allclose(ops.bernoulli_log_likelihood(logits, x), expected)


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


# --------------------------------------------------------------------------------------------------------- gradients


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


def test_dense_gradients(rng):
    assert_gradients(ops.dense, [rng.standard_normal((N, C)), rng.standard_normal((C, O)), rng.standard_normal(O)])
    assert_gradients(
        ops.dense, [rng.standard_normal((2, 3, 4, C)), rng.standard_normal((C, O)), rng.standard_normal(O)]
    )
    x = rng.standard_normal((2, 5, C))
    w = rng.standard_normal((C, O))
    b = rng.standard_normal(O)
    np.testing.assert_allclose(ops.dense(x, w, b), x @ w + b, rtol=1e-12)
    assert_gradients(lambda x: ops.dense(x, w, b), [x])  # of an argument alone
    assert_gradients(lambda w, b: ops.dense(x, w, b), [w, b])


@pytest.mark.parametrize("K", [1, 3])
def test_convolution_gradients_of_images_in_another_memory_order(rng, K):
    x = rng.standard_normal((N, 2, H, W))
    k = rng.standard_normal((K, K, 2, 3))
    b = rng.standard_normal(3)
    assert_gradients(lambda x, k, b: ops.conv2d(x.transpose((0, 2, 3, 1)), k, b), [x, k, b])


def test_group_norm_of_numbers_far_from_zero(rng):
    x = (rng.standard_normal((N, H, W, C)) + 10).astype(np.float32)
    _, found = ops.group_moments(x, 2, 1e-5)
    _, expected = ops.group_moments(x.astype(np.float64), 2, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_group_norm_of_constant_images_is_finite():
    constants = np.linspace(1, 1000, 50, dtype=np.float32)  # rounding makes E[x^2] - m^2 negative for some of them
    x = np.broadcast_to(constants[:, None, None, None], (50, H, W, C)).copy()
    _, r = ops.group_moments(x, 2, 1e-5)
    assert np.isfinite(r).all() and np.all(r <= 1.001 / np.sqrt(1e-5))


@pytest.mark.parametrize("K", [1, 3, 5])
def test_convolution_gradients(rng, both_kinds, K):
    arrays = [rng.standard_normal((N, H, W, 2)), rng.standard_normal((K, K, 2, 3)), rng.standard_normal(3)]
    assert_gradients(ops.conv2d, arrays)
    x, k, b = arrays  # the images of a network's first layer need none
    assert_gradients(lambda k, b: ops.conv2d(x, k, b), [k, b])
    assert_gradients(lambda x, b: ops.conv2d(x, k, b), [x, b])


def test_space_to_depth_and_depth_to_space_gradients(rng):
    assert_gradients(lambda x: ops.space_to_depth(x, 2), [rng.standard_normal((N, H, W, 3))])
    assert_gradients(lambda x: ops.depth_to_space(x, 2), [rng.standard_normal((N, 2, 3, 8))])


def test_activation_gradients(rng):
    assert_gradients(ops.silu, [rng.standard_normal((N, C)) * 3])
    assert_gradients(ops.glu, [rng.standard_normal((N, 2 * C)) * 3])
    assert_gradients(ops.glu, [rng.standard_normal((2, 3, 4))])
    assert_gradients(ops.relu, [away_from_zero(rng, N, C)])


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_norm_silu_gradients(rng, groups, per_image):
    x = rng.standard_normal((2, H, W, C)) * 2 + 1
    scale, shift = rng.standard_normal((2, 2, C) if per_image else (2, C))
    assert_gradients(lambda *a: ops.norm_silu(*a, groups), [x, scale, shift], atol=1e-6)


def test_mean_gradients(rng):
    assert_gradients(ops.mean, [rng.standard_normal((N, H, W))])
    assert_gradients(lambda x: ops.mean(x) ** 2, [rng.standard_normal(N)])


def test_bernoulli_log_likelihood_gradient(rng):
    x = rng.random((N, H, W, 1))
    assert_gradients(lambda logits: ops.bernoulli_log_likelihood(logits, x), [rng.standard_normal((N, H, W, 1)) * 3])


def test_the_checker_catches_a_wrong_vjp(rng):
    @op
    def square(x):
        return x * x, lambda g: (g * x,)  # 2 x is right

    with pytest.raises(AssertionError, match="argument 0"):
        assert_gradients(square, [rng.standard_normal((N, C))])


def test_the_checker_catches_a_kernel_that_is_not_flipped(rng, monkeypatch):
    """The commonest mistake in a convolution's VJP, put in on purpose."""
    monkeypatch.setattr(ops, "flipped", lambda k: k.swapaxes(2, 3))
    arrays = [rng.standard_normal((N, H, W, 2)), rng.standard_normal((3, 3, 2, 3)), rng.standard_normal(3)]
    with pytest.raises(AssertionError, match="argument 0"):
        assert_gradients(ops.conv2d, arrays)


# ------------------------------------------------------------------------------------------------------------- dtype

F32 = np.float32
CASES = {
    "dense": (ops.dense, [(N, C), (C, O), (O,)]),
    "conv2d": (ops.conv2d, [(N, H, W, C), (3, 3, C, O), (O,)]),
    "conv2d 1x1": (ops.conv2d, [(N, H, W, C), (1, 1, C, O), (O,)]),
    "space_to_depth": (lambda x: ops.space_to_depth(x, 2), [(N, H, W, C)]),
    "depth_to_space": (lambda x: ops.depth_to_space(x, 2), [(N, H, W, C)]),
    "relu": (ops.relu, [(N, C)]),
    "silu": (ops.silu, [(N, C)]),
    "glu": (ops.glu, [(N, 2 * C)]),
    "norm_silu": (lambda *a: ops.norm_silu(*a, 2), [(N, H, W, C), (C,), (C,)]),
    "norm_silu per image": (lambda *a: ops.norm_silu(*a, 2), [(N, H, W, C), (N, C), (N, C)]),
    "mean": (ops.mean, [(N, H, W, C)]),
    "bernoulli": (lambda logits: ops.bernoulli_log_likelihood(logits, np.zeros((N, C), F32)), [(N, C)]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_keep_their_dtype(rng, name, dtype):
    f, shapes = CASES[name]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    value, gradients = value_and_grad(lambda a: f(*a).sum())(arrays)
    assert f(*arrays).dtype == value.dtype == dtype
    assert [g.dtype for g in gradients] == [dtype] * len(arrays)
    assert [g.shape for g in gradients] == shapes


def test_convolution_of_mixed_dtypes_does_not_lose_precision(rng):
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    k = rng.standard_normal((3, 3, C, O))
    y = ops.conv2d(x, k, np.zeros(O))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, naive_conv2d(x, k, np.zeros(O)), rtol=1e-12, atol=1e-12)


def test_inputs_are_left_as_they_were(rng):
    for f, shapes in CASES.values():
        arrays = [rng.standard_normal(shape) for shape in shapes]
        before = [a.copy() for a in arrays]
        value_and_grad(lambda a, f=f: f(*a).sum())(arrays)
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_answers_and_incoming_gradients_are_left_as_they_were_too(rng):
    """Others may have them as well: where two arrays are added, both get the same gradient."""
    seen = []

    @op
    def watch(x):
        return x, lambda g: (seen.append((g, g.copy())) or g,)

    def loss(arrays, f):
        y = f(*arrays)
        seen.append((y._value, y._value.copy()))
        return anp.sum(watch(y) ** 2)

    for f, shapes in CASES.values():
        value_and_grad(loss)([rng.standard_normal(shape) for shape in shapes], f)
    assert len(seen) == 2 * len(CASES)
    for after, before in seen:
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("f", "shapes", "part"),
    [(ops.dense, [(N, C), (C, O), (O,)], "product"), (ops.conv2d, [(N, H, W, C), (3, 3, C, O), (O,)], "correlate")],
)
def test_the_costly_gradient_of_an_input_that_needs_none_is_not_computed(rng, f, shapes, part, monkeypatch):
    x, *weights = (rng.standard_normal(shape) for shape in shapes)
    calls = []
    original = getattr(ops, part)
    monkeypatch.setattr(ops, part, lambda *args, **more: calls.append(args) or original(*args, **more))
    counts = []
    gradients = []
    for with_x in (True, False):
        arrays = [x, *weights] if with_x else weights
        _, found = value_and_grad(lambda a, with_x=with_x: f(*a).sum() if with_x else f(x, *a).sum())(arrays)
        counts.append(len(calls))
        gradients.append(found[-2:])
        calls.clear()
    assert counts[0] == counts[1] + 1
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_array_equal(a, b)
