"""The primitives: every operation whose gradient is written by hand, with its vector-Jacobian product beneath it.

Dimensions: N images, H height, W width, C channels in, O channels out, G groups, P = H * W positions.
Images are (N, H, W, C). Every primitive works in the dtype of its input: float32 in training, float64 in the tests.

How to read one. Write L for the loss and g = dL/d(ans) for the gradient that arrives from above, of the shape of the
answer ``ans``. A VJP maker runs during the *forward* pass and returns a function of g that runs during the *backward*
pass; so all heavy work stands inside that inner function. Where one argument is differentiated it is registered by
``defvjp`` and called as ``f_vjp(ans, *args)``; where several share their work, by ``defvjp_argnums``, and called as
``f_vjp(argnums, ans, args, kwargs)``. ``argnums`` names those that need a gradient; an input image, for example, needs
none.

Sums over positions are written as products with a row of ones: BLAS is several times faster at that than ``np.sum``
over a leading axis (measured 7 times, 32 x 14 x 14 x 32 float32).
"""

import numpy as np
from autograd.extend import defvjp, defvjp_argnums, primitive
from autograd.tracer import getval

# The columns of a convolution are built for as many images at a time as fit this many bytes, so that the matrix
# product finds them in cache: a U-Net step is 1.15 times faster than with the columns of a whole shard at once.
COLUMN_BYTES = 1 << 20


def sum_rows(x):
    """The sum of all rows of a matrix: (M, C) -> (C,)."""
    return np.ones(len(x), x.dtype) @ x


def sum_positions(x):
    """Sums over the positions of each image: (N, P, C) -> (N, C)."""
    return np.ones(x.shape[1], x.dtype) @ x


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
    y = x.reshape(-1, len(w)) @ w  # two dimensions: (N, H, W, C) @ (C, O) would be N small products
    y += b
    return y.reshape(*x.shape[:-1], len(b))


def dense_vjp(argnums, ans, args, kwargs):
    x, w, b = args

    def vjp(g):
        g2 = g.reshape(-1, len(b))
        by_argument = {
            0: lambda: (g2 @ w.T).reshape(x.shape),
            1: lambda: x.reshape(-1, len(w)).T @ g2,
            2: lambda: sum_rows(g2),
        }
        return [by_argument[argnum]() for argnum in argnums]

    return vjp


defvjp_argnums(dense, dense_vjp)


# --------------------------------------------------------------------------------------------------------- convolution
# y[n, h, w, o] = b[o] + sum_{i, j, c} x[n, h + i - r, w + j - r, c] k[i, j, c, o],  x zero outside, r = (K - 1) / 2.
#
# With the K x K x C neighbourhood of every position laid out as a row of a matrix ("columns", from im2col) this is a
# dense layer: y = columns(x) k + b.  For x: substituting h' = h + i - r (and w' alike) shows that
# dL/dx[n, h', w', c] = sum_{i, j, o} g[n, h' - i + r, w' - j + r, o] k[i, j, c, o], which is again a convolution, of g,
# with the kernel flipped in both directions and its channel axes exchanged.  The same substitution for the kernel,
# dL/dk[i, j, c, o] = sum_{n, h', w'} x[n, h', w', c] g[n, h' - i + r, w' - j + r, o], shows that the columns of g serve
# both and those of x need not be built again: the backward pass becomes 1.06 to 2 times faster.


def columns(x, K):
    """Yield (slice of images, columns of those images): (N, H, W, C) -> (n H W, K K C), a few images at a time.

    The columns live in one buffer that the next turn of the loop overwrites.
    """
    N, H, W, C = x.shape
    n = max(1, min(N, COLUMN_BYTES // (H * W * K * K * C * x.itemsize)))
    r = K // 2
    padded = np.zeros((n, H + 2 * r, W + 2 * r, C), x.dtype)
    # A view on the same memory: windows[n, h, w] is the K x K x C neighbourhood that starts at padded[n, h, w].
    image, row, column, channel = padded.strides
    windows = np.ndarray((n, H, W, K, K, C), x.dtype, padded, strides=(image, row, column, row, column, channel))
    cols = np.empty(windows.shape, x.dtype)
    for start in range(0, N, n):
        images = slice(start, min(start + n, N))
        count = images.stop - start
        padded[:count, r : r + H, r : r + W] = x[images]
        cols[:count] = windows[:count]
        yield images, cols[:count].reshape(count * H * W, K * K * C)


@primitive
def conv2d(x, k, b):
    """Convolution, stride 1, "same" zero padding: (N, H, W, C), (K, K, C, O), (O,) -> (N, H, W, O), K odd.

    As everywhere in deep learning it is a cross-correlation: the kernel is not flipped.
    """
    if k.shape[0] != k.shape[1] or k.shape[0] % 2 == 0 or x.shape[-1] != k.shape[2]:
        raise ValueError(f"conv2d needs a kernel (K, K, C, O), K odd, C = {x.shape[-1]}; found {k.shape}")
    N, H, W, _ = x.shape
    K, _, _, O = k.shape
    y = np.empty((N, H, W, O), np.result_type(x, k))
    for images, cols in columns(x, K):
        np.matmul(cols, k.reshape(-1, O), out=y[images].reshape(-1, O))
    y += b
    return y


def flipped(k):  # (K, K, C, O) -> (K, K, O, C)
    return np.ascontiguousarray(k[::-1, ::-1].swapaxes(2, 3))


def conv2d_vjp(argnums, ans, args, kwargs):
    x, k, b = args
    K, _, C, O = k.shape

    def kernel_alone(g):  # the first layer: its images need no gradient, and their columns are narrow
        dk = np.zeros((K * K * C, O), k.dtype)
        for images, cols in columns(x, K):
            dk += cols.T @ g[images].reshape(-1, O)
        return dk.reshape(k.shape)

    def image_and_kernel(g):
        dx, dk, k_flipped = np.empty(x.shape, x.dtype), np.zeros((C, K * K * O), k.dtype), flipped(k).reshape(-1, C)
        for images, cols in columns(g, K):
            np.matmul(cols, k_flipped, out=dx[images].reshape(-1, C))
            dk += x[images].reshape(-1, C).T @ cols
        # Column (i', j') holds g at h' + i' - r, and k[i, j] wants it at h' - i + r: i' = 2 r - i, so flip back.
        return dx, flipped(dk.reshape(C, K, K, O).transpose(1, 2, 3, 0))  # (K, K, O, C) -> (K, K, C, O)

    def vjp(g):
        dx, dk = image_and_kernel(g) if 0 in argnums else (None, kernel_alone(g))
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
# takes it out of autograd's box), and handed to the primitive as a further argument: s = sigmoid(x) here, m and
# r in `group_norm` below. To autograd that argument is a constant. The VJP takes its
# dependence on x into account: it is the derivative of the whole function of x.


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


# --------------------------------------------------------------------------------------------------------- group norm
# Over the positions and channels of each group of an image, with m their mean and r = 1 / sqrt(variance + epsilon):
# xhat = (x - m) r, y = scale xhat + shift. For one image and channel that is y = a x + (shift - m a) with a = scale r:
# one multiplication and one addition per element.
#
# Gradient: write s1 = mean over the group of scale g, s2 = mean over the group of scale g xhat. m and r depend on every
# x of the group, dm/dx = 1 / n and dr/dx = -r^2 xhat / n for the n numbers of a group, so that
# dL/dx = r (scale g - s1 - xhat s2) = a g - (r^2 s2) x + r (m r s2 - s1).


def group_mean(sums, groups, P):  # sums over the P positions of a channel (N, C) -> means over its group (N, C)
    N, C = sums.shape
    means = sums.reshape(N, groups, -1).sum(axis=2) / (P * C // groups)
    return np.repeat(means, C // groups, axis=1)


def group_moments(x, groups, epsilon):  # (N, H, W, C) -> m and r of each channel's group, 2 x (N, C)
    N, H, W, C = x.shape
    x3 = x.reshape(N, H * W, C)
    m = group_mean(sum_positions(x3), groups, H * W)
    # One pass fewer than the mean of (x - m)^2. In float32 the difference keeps five digits while |m| is at most ten
    # times the standard deviation, three at a hundred times; activations of a network stay far below that.
    variance = group_mean(sum_positions(x3 * x3), groups, H * W) - m * m
    return m, 1 / np.sqrt(np.maximum(variance, 0) + epsilon)


@primitive
def normalise(x, scale, shift, m, r, groups):  # (N, H, W, C), twice (C,) or (N, C), twice (N, C) -> (N, H, W, C)
    a = scale * r
    y = x * a[:, None, None]
    y += (shift - m * a)[:, None, None]
    return y


def normalise_vjp(argnums, ans, args, kwargs):
    x, scale, shift, m, r, groups = args  # m and r depend on x, which dx takes into account

    def vjp(g):
        N, H, W, C = x.shape
        sum_g = sum_positions(g.reshape(N, H * W, C))
        sum_gx = sum_positions((g * x).reshape(N, H * W, C))
        sum_gxhat = r * (sum_gx - m * sum_g)
        s1 = group_mean(scale * sum_g, groups, H * W)
        s2 = group_mean(scale * sum_gxhat, groups, H * W)
        dx = x * (-(r**2) * s2)[:, None, None]
        dx += g * (scale * r)[:, None, None]
        dx += (r * (m * r * s2 - s1))[:, None, None]
        if scale.ndim == 1:  # one scale and shift for all images
            sum_gxhat, sum_g = sum_gxhat.sum(axis=0), sum_g.sum(axis=0)
        gradients = (dx, sum_gxhat, sum_g)
        return [gradients[argnum] for argnum in argnums]

    return vjp


defvjp_argnums(normalise, normalise_vjp)


def group_norm(x, scale, shift, groups, epsilon=1e-5):
    """Group normalisation (Wu and He 2018): (N, H, W, C), scale, shift -> (N, H, W, C).

    Scale and shift are both (C,), or both (N, C) to differ from image to image: that is how the time step enters a
    residual block.
    """
    m, r = group_moments(getval(x), groups, epsilon)
    return normalise(x, scale, shift, m, r, groups)


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
