"""The optimisers, Adam and Muon, their learning-rate schedule, and the exponential moving average of the weights.

The functions that end in ``_step`` change arrays in place: parameters and moments are updated where they lie, which
saves a pass over memory for each and keeps one copy of everything.
"""

import math

from scratchgen import tree

import numpy as np


def init_adam(params):
    """First and second moments, zero: two trees like ``params``. `muon_step` keeps its momentum in "m" too."""
    return {"m": tree.map(np.zeros_like, params), "v": tree.map(np.zeros_like, params)}


def adam_step(params, gradient, adam, step, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place; ``step`` counts from 1.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, and with the corrections for their start at zero,
    m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step):  params <- params - lr m^ / (sqrt(v^) + epsilon).
    """
    root = math.sqrt(1 - beta2**step)  # of v's correction: taken out of the square root, it costs no pass over memory
    rate = lr * root / (1 - beta1**step)

    def update(p, g, m, v):
        flush(step, m, v)
        change = g - m  # m + (1 - beta1) (g - m) is the same average, in fewer passes; all in one temporary array
        change *= 1 - beta1
        m += change
        np.multiply(g, g, out=change)
        change -= v
        change *= 1 - beta2
        v += change
        np.sqrt(v, out=change)
        change += epsilon * root
        np.divide(m, change, out=change)
        change *= rate
        p -= change

    tree.map(update, params, gradient, adam["m"], adam["v"])


def flush(step, *moments):
    """Set to 0 what is below 1.2e-38, the smallest of float32's usual numbers; every hundredth step is often enough.

    The gradient of a weight behind a ReLU that is off for all images stays 0, and its moments decay to denormal numbers
    and remain there. A processor can take a hundred cycles for one of those, and whole layers of them halve the speed.
    """
    if step % 100 == 0:
        for moment in moments:
            moment[np.abs(moment) < np.finfo(np.float32).tiny] = 0


def muon_step(params, gradient, moments, step, lr, weight_decay=0.0, momentum=0.95, beta2=0.999):
    """One step of Muon (Jordan et al. 2024) for the weights that are matrices, of Adam for all others; in place.

    m <- momentum m + g, and then a step along g + momentum m (Nesterov) with all its singular values made one: the
    gradient of a layer has a few directions that are much steeper than the rest, and here all of them are learned at
    the same speed. A kernel (K, K, C, O) is the matrix (K K C, O) that it is in a convolution. Such a step has entries
    of mean square 1 / max(rows, columns), so times 0.2 sqrt(max(rows, columns)) they are as large as Adam's usually
    are, and one learning rate serves both (Liu et al. 2025, Sec. 2.2).

    Before the step, matrices and kernels shrink by lr weight_decay of themselves (Loshchilov and Hutter 2019): what few
    images ask for, and others do not confirm, fades.
    """

    def update(p, g, m, v):
        if weight_decay and p.ndim >= 2:
            p *= 1 - lr * weight_decay
        if p.ndim < 2 or min(p.size // p.shape[-1], p.shape[-1]) not in MUON_SIDES:
            return adam_step(p, g, {"m": m, "v": v}, step, lr, beta2=beta2)
        flush(step, m)
        m *= momentum
        m += g
        direction = orthogonalise((g + momentum * m).reshape(-1, p.shape[-1]))
        p -= lr * 0.2 * math.sqrt(max(direction.shape)) * direction.reshape(p.shape)

    tree.map(update, params, gradient, moments["m"], moments["v"])


# The shorter side of the matrices that Muon steps: below there is little to make equal, above its products take too
# long. What has 128 in the U-Net hears the time step: with Adam for that, a step of the optimiser takes half the time,
# and samples are as good.
MUON_SIDES = range(8, 65)


def orthogonalise(G, iterations=5):
    """A matrix like G with the same singular vectors, and all singular values somewhere near one.

    For X = U diag(s) V^T, X <- P X with P = a I + b S + c S^2 and S = X X^T only turns each singular value s into
    a s + b s^3 + c s^5. With these a, b, c, found by Jordan et al. by experiment, five turns bring all from 0.01 .. 1
    to about 0.7 .. 1.2: not exact, but a few products instead of a singular value decomposition.

    P X has the small square matrix P S P for its S, so X itself need not be there before the end, when it is multiplied
    by the product of all P. For the 576 x 64 matrix of a 3 x 3 kernel that is 2.5 times faster.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.T if len(G) > G.shape[1] else G  # then X X^T is the smaller of the two products
    X = X / (np.linalg.norm(X) + 1e-7)  # no singular value is larger than the root of the sum of their squares
    S, product = X @ X.T, np.eye(len(X), dtype=X.dtype)
    for _ in range(iterations):
        P = b * S + c * S @ S
        np.fill_diagonal(P, P.diagonal() + a)
        S, product = P @ S @ P, P @ product
    X = product @ X
    return X.T if len(G) > G.shape[1] else X


def cosine_decay(step, total_steps, peak):
    """The learning rate of ``step`` (from 0): half a cosine from ``peak`` to 0, after a linear rise.

    The rise takes 100 steps, in which Adam's moments come to mean something, or a tenth of a shorter run.
    """
    rise = min(1.0, (step + 1) / max(1, min(100, total_steps // 10)))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))


def ema_step(ema, params, step, decay):
    """ema <- d ema + (1 - d) params, in place; ``step`` counts from 1.

    d rises from 2/11 to ``decay`` as (1 + step) / (10 + step), so that the random start is soon forgotten.
    """
    d = min(decay, (1 + step) / (10 + step))

    def update(average, p):
        average += (1 - d) * (p - average)

    tree.map(update, ema, params)
