"""The primitives: every operation whose gradient is written by hand, with its vector-Jacobian product beneath it.

Dimensions: N images, H height, W width, C channels in, O channels out, G groups, P = H * W positions.
Images are (N, H, W, C). Every primitive works in the dtype of its input: float32 in training, float64 in the tests.

How to read one. Write L for the loss and g = dL/d(ans) for the gradient that arrives from above, of the shape of the
answer ``ans``. A VJP maker runs during the *forward* pass and returns a function of g that runs during the *backward*
pass; so all heavy work stands inside that inner function. Where one argument is differentiated it is registered by
``defvjp`` and called as ``f_vjp(ans, *args)``; where several share their work, by ``defvjp_argnums``, and called as
``f_vjp(argnums, ans, args, kwargs)``. ``argnums`` names those that need a gradient; an input image, say, needs none.

Sums over positions are products with a row of ones: BLAS is seven times faster at that than ``np.sum`` over an axis.
"""

import itertools
import math
from functools import cache

import numpy as np
from autograd.extend import defvjp, defvjp_argnums, primitive
from autograd.tracer import getval

# ----------------------------------------------------------------------------------------------------- matrix products
# OpenBLAS copies ("packs") the operands of a product into a layout of its own. Its kernels for AVX-512 read them where
# they lie instead, if rows x inner x columns is at most a million; and if the right operand is transposed, if rows x
# columns is at most 1200 and the inner dimension 32 or more. So there a product is cut into such tiles, all of them in
# one call of np.matmul, which loops over stacks of matrices: 1.1 to 2 times faster (docs/performance.md). Elsewhere it
# stays whole. The processor decides, never the clock: on one machine the sums, and so the bits, are always the same.


def has_small_kernels():
    config = np.show_config(mode="dicts")
    features = {*config["SIMD Extensions"].get("baseline", ()), *config["SIMD Extensions"].get("found", ())}
    new_name, old_name = "X86_V4", "AVX512_SKX"  # of the same, since NumPy 2.4 and before
    return bool(features & {new_name, old_name}) and "openblas" in config["Build Dependencies"]["blas"]["name"]


SMALL_KERNELS = has_small_kernels()


@cache
def tile(M, K, N, transposed):
    """How much of (M, K) @ (K, N) to take at a time: (rows, columns) that divide M and N. The largest such tile; of
    several one of 32 columns or more, as rows of b are read in such pieces, and then the squarest. No single rows, and
    no few columns, which are slower than the whole: where that leaves none, as M is prime, say, it stays whole."""
    if not SMALL_KERNELS or (transposed and K < 32) or 0 in (M, K, N):
        return M, N
    limit = min(10**6 // K, 1200) if transposed else 10**6 // K
    sizes = itertools.product(*([d for d in range(1, side + 1) if side % d == 0] for side in (M, N)))
    sizes = [(r, c) for r, c in sizes if 64 <= r * c <= limit and (r > 1 or M == 1) and (c >= 16 or c == N)]
    return max(sizes, key=lambda size: (math.prod(size), min(size[1], 32), min(size)), default=(M, N))


def product(a, b, out=None):
    """a @ b for (.., M, K) and (.., K, N), or one b (K, N) for all: (.., M, N), written to ``out`` if it is given."""
    M, K, N = a.shape[-2:] + b.shape[-1:]
    transposed = b.strides[-1] != b.itemsize
    if transposed and M > 512:  # where the copy is much smaller than the product, a b that lies in rows is read faster
        b, transposed = np.ascontiguousarray(b), False
    rows, columns = tile(M, K, N, transposed)
    if (rows, columns) == (M, N):
        return np.matmul(a, b, out=out)
    if out is None:
        out = np.empty((*a.shape[:-1], N), np.result_type(a, b))
    # Two axes more, of the tiles: (.., M / rows, 1, rows, K) @ (.., 1, N / columns, K, columns). None of this copies.
    a = a.reshape(*a.shape[:-2], M // rows, 1, rows, K)
    b = b.reshape(*b.shape[:-1], N // columns, columns).swapaxes(-3, -2)[..., None, :, :, :]
    np.matmul(a, b, out=out.reshape(*out.shape[:-2], M // rows, rows, N // columns, columns).swapaxes(-3, -2))
    return out


def sum_rows(x):
    """The sum of all rows of a matrix, or of each in a stack, as of an image's positions: (.., M, C) -> (.., C)."""
    return np.ones(x.shape[-2], x.dtype) @ x


def along_row(v, W):  # (.., C) -> (.., W, C)
    """The same for all positions of a row: NumPy's inner loops then run over W C numbers, not C, in half the time."""
    return np.repeat(v[..., None, :], W, axis=-2)


def sigmoid(x):
    """1 / (1 + exp(-x)) of a plain array, not recorded by autograd. Where exp overflows, 1 / infinity = 0 is right."""
    s = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(s, out=s)
    s += 1
    return np.reciprocal(s, out=s)


# ---------------------------------------------------------------------------------------------------------------- dense
# y = x w + b, so dL/dx = g w^T, dL/dw = x^T g, dL/db = sum of the rows of g.


@primitive
def dense(x, w, b):  # (..., C), (C, O), (O,) -> (..., O)
    # In two dimensions: (N, H, W, C) @ (C, O) would be N H small products.
    y = product(x.reshape(-1, len(w)), w).reshape(*x.shape[:-1], len(b))
    y += along_row(b, x.shape[-2]) if x.ndim > 2 else b
    return y


def dense_vjp(argnums, ans, args, kwargs):
    x, w, b = args

    def vjp(g):
        g2 = g.reshape(-1, len(b))
        dx = product(g2, w.T).reshape(x.shape) if 0 in argnums else None
        gradients = dx, product(x.reshape(-1, len(w)).T, g2), sum_rows(g2)
        return [gradients[argnum] for argnum in argnums]

    return vjp


defvjp_argnums(dense, dense_vjp)


# --------------------------------------------------------------------------------------------------------- convolution
# y[n, h, w, o] = b[o] + sum_{i, j, c} x[n, h + i - r, w + j - r, c] k[i, j, c, o],  x zero outside, r = (K - 1) / 2.
#
# With the K x K x C neighbourhood of every position laid out as a row of a matrix (im2col) this is a dense layer:
# y = windows(x) k + b.  For x: substituting h' = h + i - r (and w' alike) shows that
# dL/dx[n, h', w', c] = sum_{i, j, o} g[n, h' - i + r, w' - j + r, o] k[i, j, c, o], which is again a convolution, of g,
# with the kernel flipped in both directions and its channel axes exchanged.  The same substitution for the kernel,
# dL/dk[i, j, c, o] = sum_{n, h', w'} x[n, h', w', c] g[n, h' - i + r, w' - j + r, o], shows that the windows of g serve
# both, and those of x need not be built again.


def windows(x, K):
    """All neighbourhoods of an image, one matrix for each column of positions: (N, H, W, C) -> (W, N H, K K C).

    Row (n, h) of matrix w is x[n, h - r : h + r + 1, w - r : w + r + 1], zero outside of x, column by column.
    Neighbourhoods side by side share all columns but one. So each column of K pixels is copied once, beside its
    neighbour to the right, and the windows are views that overlap.
    """
    N, H, W, C = x.shape
    r = K // 2
    strips = np.zeros((N, H, W + 2 * r, K, C), x.dtype)  # strips[n, h, r + w, i] = x[n, h + i - r, w]
    for i in range(K):
        top = max(0, r - i)
        bottom = max(top, min(H, H + r - i))
        strips[:, top:bottom, r : r + W, i] = x[:, top + i - r : bottom + i - r]
    _, row, column, _, number = strips.strides
    # A view of the same memory. In it the next row (n, h) is always `row` bytes further on, from image to image, too,
    # and the K K C numbers of a window lie one after the other, K columns of strips.
    return np.ndarray((W, N * H, K * K * C), x.dtype, strips, strides=(column, row, number))


def correlate(windows, k, shape):
    """The sums of the windows times a kernel (K, K, C, O), as images of this shape (N, H, W, O)."""
    N, H, W, O = shape
    y = np.empty(shape, np.result_type(windows, k))
    matrix = k.swapaxes(0, 1).reshape(-1, O)  # its rows are (j, i, c), as a window's numbers are
    product(windows, matrix, out=y.reshape(N * H, W, O).swapaxes(0, 1))
    return y


@primitive
def conv2d(x, k, b):
    """Convolution, stride 1, "same" zero padding: (N, H, W, C), (K, K, C, O), (O,) -> (N, H, W, O), K odd.

    As everywhere in deep learning it is a cross-correlation: the kernel is not flipped.
    """
    if k.shape[0] != k.shape[1] or k.shape[0] % 2 == 0 or x.shape[-1] != k.shape[2]:
        raise ValueError(f"conv2d needs a kernel (K, K, C, O), K odd, C = {x.shape[-1]}; found {k.shape}")
    y = correlate(windows(x, len(k)), k, (*x.shape[:3], len(b)))
    y += along_row(b, x.shape[2])
    return y


def flipped(k):  # (K, K, C, O) -> (K, K, O, C)
    return k[::-1, ::-1].swapaxes(2, 3)


def conv2d_vjp(argnums, ans, args, kwargs):
    x, k, b = args
    K, _, C, O = k.shape
    N, H, W, _ = x.shape

    def vjp(g):
        windows_g = windows(g, K)
        dx = correlate(windows_g, flipped(k), x.shape) if 0 in argnums else None
        # For each w the product of C channels of x with the windows at the same positions, and then the sum over w.
        dk = product(x.reshape(N * H, W, C).transpose(1, 2, 0), windows_g).sum(axis=0).reshape(C, K, K, O)
        # Window (j', i') holds g at h' + i' - r, and k[i, j] wants it at h' - i + r: i' = 2 r - i, so flip back.
        dk = np.ascontiguousarray(flipped(dk.transpose(2, 1, 3, 0)))  # (C, j, i, O) -> (i, j, O, C) -> (i, j, C, O)
        gradients = dx, dk, sum_rows(g.reshape(-1, O))
        return [gradients[argnum] for argnum in argnums]

    return vjp


defvjp_argnums(conv2d, conv2d_vjp)


# ------------------------------------------------------------------------------------ space to depth, depth to space
# Both only move numbers, each undoes the other, and the transpose of a permutation is its inverse: so each one's VJP
# is the other. A dense layer after `space_to_depth` is a convolution whose stride is as large as its kernel, as in a
# patch embedding; a dense layer before `depth_to_space` is the transpose of one, and makes an image larger.


@primitive
def space_to_depth(x, p):  # (N, H, W, C) -> (N, H / p, W / p, p p C)
    N, H, W, C = x.shape
    return x.reshape(N, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, H // p, W // p, p * p * C)


@primitive
def depth_to_space(x, p):  # (N, H, W, p p C) -> (N, H p, W p, C)
    N, H, W, C = x.shape
    return x.reshape(N, H, W, p, p, C // p**2).transpose(0, 1, 3, 2, 4, 5).reshape(N, H * p, W * p, C // p**2)


defvjp(space_to_depth, lambda ans, x, p: lambda g: depth_to_space(g, p))
defvjp(depth_to_space, lambda ans, x, p: lambda g: space_to_depth(g, p))


# ------------------------------------------------------------------------------------------------- activation functions
# What the backward pass would have to compute a second time is worked out once, on the plain value of x (`getval`
# takes it out of autograd's box), and handed to the primitive as a further argument: s = sigmoid(x) here, everything in
# `norm_silu` below. To autograd that argument is a constant. The VJP takes its dependence on x into account: it is the
# derivative of the whole function of x.


@primitive
def relu(x):
    return np.clip(x, 0, np.inf)  # takes a third of the time of np.maximum(x, 0)


defvjp(relu, lambda ans, x: lambda g: g * (ans > 0))


@primitive
def times_sigmoid(x, s):
    return x * s


def times_sigmoid_vjp(ans, x, s):
    # y = x s(x) and s' = s (1 - s), so dy/dx = s + x s (1 - s) = s + y (1 - s) = s (1 - y) + y.
    def vjp(g):
        d = 1 - ans
        d *= s
        d += ans
        d *= g
        return d

    return vjp


defvjp(times_sigmoid, times_sigmoid_vjp)


def silu(x):
    """x sigmoid(x), element by element (Elfwing et al. 2018, "swish" elsewhere)."""
    return times_sigmoid(x, sigmoid(getval(x)))


@primitive
def times_gate(x, gate):
    return x[..., : gate.shape[-1]] * gate


def times_gate_vjp(ans, x, gate):
    # y = a s(b) with x = (a, b): dy/da = s and dy/db = a s (1 - s) = y (1 - s).
    return lambda g: np.concatenate([g * gate, g * ans * (1 - gate)], axis=-1)


defvjp(times_gate, times_gate_vjp)


def glu(x):
    """The first half of the channels times the sigmoid of the second, (.., 2 C) -> (.., C) (Dauphin et al. 2017)."""
    return times_gate(x, sigmoid(getval(x)[..., x.shape[-1] // 2 :]))


# ------------------------------------------------------------------------------------------------ group norm with SiLU
# Over the positions and channels of each group of an image, with m their mean and r = 1 / sqrt(variance + epsilon):
# xhat = (x - m) r, h = scale xhat + shift, y = h s with s = sigmoid(h). For one image and channel h = a x + (shift -
# m a) with a = scale r: one multiplication and one addition per element. One operation for both saves passes.
#
# Gradient: with g = dL/dy, dL/dh = g (s + h s (1 - s)) = g (s (1 - y) + y); call it q. Write s1 = mean over the group
# of scale q, s2 = mean over the group of scale q xhat. m and r depend on every x of the group, dm/dx = 1 / n and
# dr/dx = -r^2 xhat / n for the n numbers of a group, so that
# dL/dx = r (scale q - s1 - xhat s2) = a q - (r^2 s2) x + r (m r s2 - s1).


@cache
def group_means(C, groups, P, dtype):
    """The matrix that turns sums over P positions, (N, C), into means over each channel's group, (N, C)."""
    return np.kron(np.eye(groups), np.full((C // groups, C // groups), groups / (C * P))).astype(dtype)


def group_moments(x, groups, epsilon):  # (N, H, W, C) -> m and r of each channel's group, 2 x (N, C)
    N, H, W, C = x.shape
    x3, mean = x.reshape(N, H * W, C), group_means(C, groups, H * W, x.dtype)
    m = sum_rows(x3) @ mean
    # One pass fewer than the mean of (x - m)^2. In float32 five digits are left where |m| is ten standard deviations,
    # three where it is a hundred; activations of a network stay far below that.
    variance = sum_rows(x3 * x3) @ mean - m * m
    return m, 1 / np.sqrt(np.maximum(variance, 0) + epsilon)


@primitive
def with_gradient(x, scale, shift, y, s, m, r, groups):
    return y


def with_gradient_vjp(argnums, ans, args, kwargs):
    x, scale, shift, y, s, m, r, groups = args  # the last five depend on the first three, which dx takes into account

    def vjp(g):
        N, H, W, C = x.shape
        q = 1 - y
        q *= s
        q += y
        q *= g
        sum_q = sum_rows(q.reshape(N, H * W, C))
        qx = q * x
        sum_qxhat = r * (sum_rows(qx.reshape(N, H * W, C)) - m * sum_q)
        mean = group_means(C, groups, H * W, x.dtype)
        s1, s2 = (scale * sum_q) @ mean, (scale * sum_qxhat) @ mean
        dx = q  # which is no longer needed
        dx *= along_row((scale * r)[:, None], W)
        dx += np.multiply(x, along_row((-(r**2) * s2)[:, None], W), out=qx)
        dx += along_row((r * (m * r * s2 - s1))[:, None], W)
        if scale.ndim == 1:  # one scale and shift for all images
            sum_qxhat, sum_q = sum_qxhat.sum(axis=0), sum_q.sum(axis=0)
        gradients = dx, sum_qxhat, sum_q
        return [gradients[argnum] for argnum in argnums]

    return vjp


defvjp_argnums(with_gradient, with_gradient_vjp)


def norm_silu(x, scale, shift, groups, epsilon=1e-5):
    """Group normalisation (Wu and He 2018), then SiLU: (N, H, W, C), scale, shift -> (N, H, W, C).

    Scale and shift are both (C,), or both (N, C) to differ from image to image: that is how the time step enters a
    residual block. SiLU is y = h sigmoid(h), by sigmoid(h) = (1 + tanh(h / 2)) / 2, which costs three passes fewer.
    """
    plain_x, plain_scale, plain_shift, W = getval(x), getval(scale), getval(shift), x.shape[2]
    m, r = group_moments(plain_x, groups, epsilon)
    half_a = 0.5 * plain_scale * r
    y = plain_x * along_row(half_a[:, None], W)  # h / 2, here and in the next line
    y += along_row((0.5 * plain_shift - m * half_a)[:, None], W)
    s = np.tanh(y)
    s += 1
    y *= s
    s *= 0.5
    return with_gradient(x, scale, shift, y, s, m, r, groups)


# ------------------------------------------------------------------------------------------- Bernoulli log-likelihood
# With p = sigmoid(l): log p(x) = x log p + (1 - x) log(1 - p) = x l - log(1 + exp(l)), and its derivative is x - p.
# log(1 + exp(l)) = max(l, 0) + log(1 + exp(-|l|)) never overflows.


@primitive
def bernoulli_log_likelihood(logits, x):  # 2 x (N, ...) -> (N,), nats per image
    softplus = np.exp(-np.abs(logits))
    softplus += 1
    np.log(softplus, out=softplus)  # log1p would be six times slower, to gain 1e-7 nats a pixel
    softplus += np.clip(logits, 0, np.inf)
    terms = x * logits
    terms -= softplus
    return terms.reshape(len(terms), -1).sum(axis=1)


def bernoulli_log_likelihood_vjp(ans, logits, x):
    def vjp(g):
        d = x - sigmoid(logits)
        d *= g.reshape(-1, *[1] * (d.ndim - 1))
        return d

    return vjp


defvjp(bernoulli_log_likelihood, bernoulli_log_likelihood_vjp)
