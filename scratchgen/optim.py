"""Adam, the learning-rate schedule, and the exponential moving average of the weights. (muon.py has another optimiser.)

Functions with names that end in ``_step`` update arrays in place: parameters, moments and averages. This saves a pass
over memory for each array, and keeps one copy of everything. Steps count from 1.
"""

import math

from scratchgen import tree

import numpy as np


def init_moments(params):
    """The state of the optimisers, zero at the start: two trees like ``params``."""
    return {"m": tree.map(np.zeros_like, params), "v": tree.map(np.zeros_like, params)}


def adam_step(params, gradient, moments, step, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place. Leaves with gradient None do not change.

    m <- beta1 m + (1 - beta1) g = m + (1 - beta1) (g - m), and likewise v with g^2. Both start at zero; corrected for
    this, m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step):  params <- params - lr m^ / (sqrt(v^) + epsilon).
    """
    # sqrt(v^) = sqrt(v) / correction. Multiply through by correction: then only scalars are corrected, no arrays.
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)

    def update(g, p, m, v):
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        # p -= rate * m / (sqrt(v) + epsilon * correction), all in one array: otherwise it takes 1.07 times as long.
        change = np.sqrt(v)
        change += epsilon * correction
        np.divide(m, change, out=change)
        change *= rate
        p -= change

    tree.map(update, gradient, params, moments["m"], moments["v"])


def flush_denormals(arrays):
    """Set to 0, in place, all numbers of magnitude below 1.2e-38, the smallest normal number of float32.

    If a ReLU is off for all images, the gradients of the weights behind it stay 0. Their moments decay to denormal
    numbers and stay there. A processor can take a hundred cycles for one denormal number, and whole layers of them
    halve the speed. One call every hundred steps is enough.
    """
    for array in tree.leaves(arrays):
        array[np.abs(array) < np.finfo(np.float32).tiny] = 0


def cosine_decay(step, total_steps, peak):
    """The learning rate of ``step``: half a cosine from ``peak`` to 0, times a linear warm-up.

    The warm-up takes 100 steps, in which Adam's moments become reliable, or a tenth of a shorter run.
    """
    warm_up = min(1.0, step / max(1, min(100, total_steps // 10)))
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / total_steps)))


def ema_step(ema, params, step, decay):
    """ema <- d ema + (1 - d) params, in place.

    d rises from 2/11 to ``decay`` as (1 + step) / (10 + step), so that the random start is soon forgotten.
    """
    d = min(decay, (1 + step) / (10 + step))

    def update(average, p):
        average += (1 - d) * (p - average)

    tree.map(update, ema, params)
