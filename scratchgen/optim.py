"""Adam, the learning-rate schedule, and the exponential moving average of the weights. (muon.py has another optimiser.)

The functions of this file that end in ``_step`` change arrays in place: parameters and moments are updated where they
lie, which saves a pass over memory for each and keeps one copy of everything. Steps count from 1.
"""

import math

from scratchgen import tree

import numpy as np


def init_moments(params):
    """What the optimisers keep from step to step, zero at the start: two trees like ``params``."""
    return {"m": tree.map(np.zeros_like, params), "v": tree.map(np.zeros_like, params)}


def adam_step(params, gradient, moments, step, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place. Where the gradient is None, all stays as it is.

    m <- beta1 m + (1 - beta1) g = m + (1 - beta1) (g - m), and so v with g^2. With the corrections for their start at
    zero, m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step):  params <- params - lr m^ / (sqrt(v^) + epsilon).
    """
    # sqrt(v^) = sqrt(v) / correction. Multiplied through by it, only numbers are corrected, and no array.
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)

    def update(g, p, m, v):
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        # p -= rate * m / (sqrt(v) + epsilon * correction), in one array: otherwise Adam takes 1.07 times as long.
        change = np.sqrt(v)
        change += epsilon * correction
        np.divide(m, change, out=change)
        change *= rate
        p -= change

    tree.map(update, gradient, params, moments["m"], moments["v"])


def flush_denormals(arrays):
    """Set to 0, in place, what is below 1.2e-38, the smallest of float32's normal numbers.

    The gradient of a weight behind a ReLU that is off for all images stays 0, and its moments decay to denormal numbers
    and remain there. A processor can take a hundred cycles for one of those, and whole layers of them halve the speed.
    Once every hundred steps is often enough.
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
