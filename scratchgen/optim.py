"""The optimiser: Adam, its learning-rate schedule, and the exponential moving average of the weights.

These are the only functions that change arrays in place: parameters and moments are updated where they lie, which
saves a pass over memory for each and keeps one copy of everything.
"""

import math

from scratchgen import tree

import numpy as np


def init_adam(params):
    """First and second moments, zero: two trees like ``params``."""
    return {"m": tree.map(np.zeros_like, params), "v": tree.map(np.zeros_like, params)}


def adam_step(params, gradient, adam, step, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place; ``step`` counts from 1.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, and with the corrections for their start at zero,
    m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step):  params <- params - lr m^ / (sqrt(v^) + epsilon).
    """
    root = math.sqrt(1 - beta2**step)  # of v's correction: taken out of the square root, it costs no pass over memory
    rate = lr * root / (1 - beta1**step)

    def update(p, g, m, v):
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
