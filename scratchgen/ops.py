"""The primitives: every operation whose gradient is written by hand, forward and backward in one function.

Dimensions: N images, H height, W width, C channels in, O channels out, G groups, P = H * W positions.
Images are (N, H, W, C). Every primitive works in the dtype of its input: float32 in training, float64 in the tests.

How to read one. L is the loss, y the answer, and g = dL/dy, of the shape of y, the gradient that comes from above. A
function under ``@op`` (gradients.py) returns y and ``vjp``. In the backward pass ``vjp(g)`` returns dL/dx for each
argument x that may need it. If dL/dx is costly and often not needed, it returns a function that computes dL/dx: an
input image needs no gradient. ``vjp`` uses the variables of the forward pass. The equations stand above each function.

``product(a, b)`` is a @ b, in tiles where that is faster (machinery/blas.py). Sums over positions are products with a
row of ones: BLAS computes them seven times faster than ``np.sum`` over an axis.
"""

from functools import cache

from scratchgen.gradients import op
from scratchgen.machinery.blas import product

import numpy as np

# ---------------------------------------------------------------------------------------------------------------- dense
# y = x w + b, so dL/dx = g w^T, dL/dw = x^T g, dL/db = sum of the rows of g.


@op
def dense(x, w, b):  # (..., C), (C, O), (O,) -> (..., O)
    x2 = x.reshape(-1, len(w))  # in two dimensions: (N, H, W, C) @ (C, O) would be N H small products
    y = product(x2, w).reshape(*x.shape[:-1], len(b))
    y += along_row(b, x.shape[-2]) if x.ndim > 2 else b

    def vjp(g):
        g2 = g.reshape(-1, len(b))

        def dx():
            return product(g2, w.T).reshape(x.shape)

        return dx, product(x2.T, g2), sum_rows(g2)

    return y, vjp


def sum_rows(x):
    """The sum of the rows of each matrix in a stack, for example over an image's positions: (.., M, C) -> (.., C)."""
    return np.ones(x.shape[-2], x.dtype) @ x


def along_row(v, W):  # (.., C) -> (.., W, C)
    """Repeats v for all W positions of a row: NumPy's inner loops run over W C numbers, not C, in half the time."""
    return np.repeat(v[..., None, :], W, axis=-2)


# --------------------------------------------------------------------------------------------------------- convolution
# y[n, h, w, o] = b[o] + sum_{i, j, c} x[n, h + i - r, w + j - r, c] k[i, j, c, o],  x zero outside, r = (K - 1) / 2.
#
# Lay out the K x K x C neighbourhood of every position as a row of a matrix (im2col). Then this is a dense layer,
# y = windows(x) k + b.  For x, substitute h' = h + i - r, and likewise w':
# dL/dx[n, h', w', c] = sum_{i, j, o} g[n, h' - i + r, w' - j + r, o] k[i, j, c, o]. This is a convolution of g with
# the kernel flipped in both directions and its channel axes exchanged.  For the kernel the same substitution gives
# dL/dk[i, j, c, o] = sum_{n, h', w'} x[n, h', w', c] g[n, h' - i + r, w' - j + r, o]. So the windows of g are used for
# both gradients, and those of x need not be built again.


@op
def conv2d(x, k, b):
    """Convolution, stride 1, "same" zero padding: (N, H, W, C), (K, K, C, O), (O,) -> (N, H, W, O), K odd.

    As everywhere in deep learning it is a cross-correlation: the kernel is not flipped.
    """
    N, H, W, C = x.shape
    K, _, _, O = k.shape
    if k.shape[:3] != (K, K, C) or K % 2 == 0:
        raise ValueError(f"conv2d needs a kernel (K, K, C, O), K odd, C = {C}; found {k.shape}")
    y = np.empty((N, H, W, O), np.result_type(x, k))
    for start in range(0, N, 16):  # the windows of 16 images stay in the cache: 1.1 times faster
        images = slice(start, start + 16)
        correlate(windows(x[images], K), k, y[images])
    y += along_row(b, W)

    def vjp(g):
        windows_g = windows(g, K)

        def dx():
            return correlate(windows_g, flipped(k), np.empty(x.shape, g.dtype))

        # For each w, multiply the C channels of x by the windows at the same positions; then sum over w.
        dk = product(x.reshape(N * H, W, C).transpose(1, 2, 0), windows_g).sum(axis=0).reshape(C, K, K, O)
        # Entry (j', i') of a window is g at h' + i' - r, but k[i, j] needs it at h' - i + r: i' = 2 r - i, so flip.
        dk = np.ascontiguousarray(flipped(dk.transpose(2, 1, 3, 0)))  # (C, j, i, O) -> (i, j, O, C) -> (i, j, C, O)
        return dx, dk, sum_rows(g.reshape(-1, O))

    return y, vjp


def windows(x, K):
    """All K x K neighbourhoods, one matrix for each column of positions: (N, H, W, C) -> (W, N H, K K C).

    Row (n, h) of matrix w is x[n, h - r : h + r + 1, w - r : w + r + 1], column by column, zero outside x. Adjacent
    neighbourhoods share all columns but one. So each column of K pixels is stored only once, just before its right
    neighbour, and the windows are overlapping views.
    """
    N, H, W, C = x.shape
    r = K // 2
    strips = np.zeros((N, H, W + 2 * r, K, C), x.dtype)  # strips[n, h, r + w, i] = x[n, h + i - r, w]
    for i in range(K):
        top = max(0, r - i)
        bottom = max(top, min(H, H + r - i))
        strips[:, top:bottom, r : r + W, i] = x[:, top + i - r : bottom + i - r]
    _, row, column, _, number = strips.strides
    # A view of the same memory. The next row (n, h) is always `row` bytes further on, also at the next image. The K K C
    # numbers of a window are contiguous: K columns of strips.
    return np.ndarray((W, N * H, K * K * C), x.dtype, strips, strides=(column, row, number))


def correlate(windows, k, y):
    """Writes the product of the windows and a kernel (K, K, C, O) to the images y, (N, H, W, O), and returns y."""
    N, H, W, O = y.shape
    matrix = k.swapaxes(0, 1).reshape(-1, O)  # its rows are ordered (j, i, c), like a window's numbers
    product(windows, matrix, out=y.reshape(N * H, W, O).swapaxes(0, 1))
    return y


def flipped(k):  # (K, K, C, O) -> (K, K, O, C)
    return k[::-1, ::-1].swapaxes(2, 3)


# ------------------------------------------------------------------------------------ space to depth, depth to space
# Each is a permutation and the inverse of the other. The transpose of a permutation is its inverse, so each is the VJP
# of the other. A dense layer after `space_to_depth` is a convolution with a stride equal to its kernel size, as in a
# patch embedding. A dense layer before `depth_to_space` is a transposed convolution, and makes an image larger.


@op
def space_to_depth(x, p):  # (N, H, W, C) -> (N, H / p, W / p, p p C)
    N, H, W, C = x.shape
    y = x.reshape(N, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, H // p, W // p, p * p * C)
    return y, lambda g: (depth_to_space(g, p),)


@op
def depth_to_space(x, p):  # (N, H, W, p p C) -> (N, H p, W p, C)
    N, H, W, C = x.shape
    y = x.reshape(N, H, W, p, p, C // p**2).transpose(0, 1, 3, 2, 4, 5).reshape(N, H * p, W * p, C // p**2)
    return y, lambda g: (space_to_depth(g, p),)


# ------------------------------------------------------------------------------------------------- activation functions


@op
def relu(x):
    y = np.clip(x, 0, np.inf)  # takes a third of the time of np.maximum(x, 0)
    return y, lambda g: (g * (y > 0),)


def sigmoid(x):
    """1 / (1 + exp(-x)) of a plain array, not recorded by autograd. Where exp overflows, 1 / infinity = 0 is right."""
    s = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(s, out=s)
    s += 1
    return np.reciprocal(s, out=s)


# y = x s with s = sigmoid(x) and s' = s (1 - s), so dy/dx = s + x s (1 - s) = s + y (1 - s) = s (1 - y) + y.


@op
def silu(x):
    """x sigmoid(x), element by element (Elfwing et al. 2018, "swish" elsewhere)."""
    s = sigmoid(x)
    y = x * s

    def vjp(g):
        dx = 1 - y
        dx *= s
        dx += y
        dx *= g
        return (dx,)

    return y, vjp


# y = a s with x = (a, b) and s = sigmoid(b): dy/da = s and dy/db = a s (1 - s) = y (1 - s).


@op
def glu(x):
    """The first half of the channels times the sigmoid of the second, (.., 2 C) -> (.., C) (Dauphin et al. 2017)."""
    a, b = np.split(x, 2, axis=-1)
    s = sigmoid(b)
    y = a * s
    return y, lambda g: (np.concatenate([g * s, g * y * (1 - s)], axis=-1),)


# ------------------------------------------------------------------------------------------------ group norm with SiLU
# Over the positions and channels of each group of an image, with m their mean and r = 1 / sqrt(variance + epsilon):
# xhat = (x - m) r, h = scale xhat + shift, y = h s with s = sigmoid(h). For one image and channel h = a x + (shift -
# m a) with a = scale r: one multiplication and one addition per element. One primitive for norm and SiLU saves passes.
#
# Gradient, with g = dL/dy: q = dL/dh = g (s + h s (1 - s)) = g (s (1 - y) + y). Let s1 be the mean over the group of
# scale q, and s2 the mean over the group of scale q xhat. m and r depend on each of the n numbers x of the group:
# dm/dx = 1 / n and dr/dx = -r^2 xhat / n. So
# dL/dx = r (scale q - s1 - xhat s2) = a q - (r^2 s2) x + r (m r s2 - s1).


@op
def norm_silu(x, scale, shift, groups, epsilon=1e-5):
    """Group normalisation (Wu and He 2018), then SiLU: (N, H, W, C), scale, shift -> (N, H, W, C).

    Scale and shift are both (C,), or both (N, C), a row for each image: in a residual block these come from the
    time step. SiLU is y = h sigmoid(h), computed with sigmoid(h) = (1 + tanh(h / 2)) / 2, which saves three passes.
    """
    N, H, W, C = x.shape
    m, r = group_moments(x, groups, epsilon)
    half_a = 0.5 * scale * r
    y = x * along_row(half_a[:, None], W)  # h / 2, here and in the next line
    y += along_row((0.5 * shift - m * half_a)[:, None], W)
    s = np.tanh(y)
    s += 1
    y *= s
    s *= 0.5

    def vjp(g):
        q = 1 - y
        q *= s
        q += y
        q *= g
        sum_q = sum_rows(q.reshape(N, H * W, C))
        qx = q * x
        sum_qxhat = r * (sum_rows(qx.reshape(N, H * W, C)) - m * sum_q)
        mean = group_means(C, groups, H * W, x.dtype)
        s1 = (scale * sum_q) @ mean
        s2 = (scale * sum_qxhat) @ mean
        dx = q  # reuse q's memory
        dx *= along_row((scale * r)[:, None], W)
        dx += np.multiply(x, along_row((-(r**2) * s2)[:, None], W), out=qx)
        dx += along_row((r * (m * r * s2 - s1))[:, None], W)
        if scale.ndim == 1:  # one scale and shift for all images
            return dx, sum_qxhat.sum(axis=0), sum_q.sum(axis=0)
        return dx, sum_qxhat, sum_q

    return y, vjp


def group_moments(x, groups, epsilon):  # (N, H, W, C) -> m and r of each channel's group, 2 x (N, C)
    N, H, W, C = x.shape
    x3 = x.reshape(N, H * W, C)
    mean = group_means(C, groups, H * W, x.dtype)
    m = sum_rows(x3) @ mean
    # One pass fewer than the mean of (x - m)^2. In float32 five digits are left if |m| is ten standard deviations,
    # three if |m| is a hundred; |m| of a network's activations stays far below that.
    variance = sum_rows(x3 * x3) @ mean - m * m
    return m, 1 / np.sqrt(np.maximum(variance, 0) + epsilon)


@cache
def group_means(C, groups, P, dtype):
    """The matrix that turns sums over P positions, (N, C), into means over each channel's group, (N, C)."""
    return np.kron(np.eye(groups), np.full((C // groups, C // groups), groups / (C * P))).astype(dtype)


# ---------------------------------------------------------------------------------------------------------------- mean
# y = sum(x) / n, so dL/dx = g / n for each of the n numbers. (autograd's own mean turns float32 into float64.)


@op
def mean(x):  # (..) -> scalar
    share = x.dtype.type(1 / x.size)
    return np.sum(x) * share, lambda g: (np.full(x.shape, g * share, x.dtype),)


# ------------------------------------------------------------------------------------------- Bernoulli log-likelihood
# With p = sigmoid(l): log p(x) = x log p + (1 - x) log(1 - p) = x l - log(1 + exp(l)), and its derivative is x - p.
# log(1 + exp(l)) = max(l, 0) + log(1 + exp(-|l|)) never overflows.


@op
def bernoulli_log_likelihood(logits, x):
    """log p(x) of independent pixels from Bernoulli(sigmoid(logits)): 2 x (N, ...) -> (N,), nats per image.

    x needs no gradient.
    """
    softplus = np.exp(-np.abs(logits))
    softplus += 1
    np.log(softplus, out=softplus)  # log1p would be six times slower, to gain 1e-7 nats a pixel
    softplus += np.clip(logits, 0, np.inf)
    terms = x * logits
    terms -= softplus

    def vjp(g):
        d = x - sigmoid(logits)
        d *= g.reshape(-1, *[1] * (d.ndim - 1))
        return (d,)

    return terms.reshape(len(terms), -1).sum(axis=1), vjp
