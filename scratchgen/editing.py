"""What a trained diffusion model can do besides drawing from noise. None of it needs training.

Dimensions: N images, (N, H, W, 1) in [-1, 1], or a little beyond if they are drawn. x_0_theta(x_t, t) predicts x_0,
with t an array (N,): `load.DDPMRun` has one, `improved.guided` makes one of two, `improved.told` one of a model that
takes labels. ``how`` goes to `improved.sample`: steps, eta, order. An image in which t already says how much noise
there is needs none of this file: `improved.sample` with ``start`` draws images like it.
"""

import math

from scratchgen.diffusion import q_sample
from scratchgen.improved import move, sample, sample_times

import numpy as np


def interpolate(x_0_theta, schedule, x_0, other, weight, t, rng, **how):
    """Between images x_0 and ``other``, each (1, H, W, 1), by way of x_t (Ho et al. 2020, Sec. 4.4): (N, H, W, 1).

    Both get noise up to t, the N weights, from 0 to 1, mix the two x_t, and the sampler starts from there. A small t
    blends the pixels; from a large one come garments that lie between the two, less and less like either. Both get the
    same noise, or in the middle there would be less of it than x_t has.
    """
    eps, mix = rng.standard_normal(x_0.shape, dtype=np.float32), np.float32(weight).reshape(-1, 1, 1, 1)
    x_t, other_t = (q_sample(schedule, image, np.array([t]), eps) for image in (x_0, other))
    *_, (_, images) = sample(x_0_theta, schedule, (1 - mix) * x_t + mix * other_t, rng, start=t, **how)
    return images


def predicted(x_0_theta, path):
    """What the model takes x_0 for along the way: yield (t, x_0_theta(x_t, t)) for each (t, x_t) of a path, t > 0.

    Ho et al. 2020, Sec. 4.3: the outline is decided first, fine structure last.
    """
    return ((t, x_0_theta(x_t, np.full(len(x_t), t))) for t, x_t in path if t > 0)


def inpaint(x_0_theta, schedule, known, where, x_T, rng, steps=None, repeats=5):
    """Draw the rest of images of which a part is known, a generator like `improved.sample`.

    ``known`` is (N, H, W, 1), and says something only ``where`` that array of truth values does. Each step takes the
    predicted x_0 with the known part put in. That alone draws a rest that knows too little of the known part: what the
    network sees of it is noisy. So each step is taken ``repeats`` times, and between two of them noise leads back from
    x_s to x_t, until the two parts agree (Lugmayr et al. 2022, RePaint). The more steps and repeats, the more exact.
    """
    T, x = len(schedule["alpha_bar"]) - 1, x_T
    times = sample_times(T, T if steps is None else steps)
    for t, s in zip(times, times[1:], strict=False):
        left = schedule["alpha_bar"][t] / schedule["alpha_bar"][s]  # of x_s in x_t
        for repeat in range(repeats):
            if repeat > 0:
                z = rng.standard_normal(x.shape, dtype=np.float32)
                x = math.sqrt(left) * x + math.sqrt(1 - left) * z  # q(x_t | x_s)
            x_0 = np.where(where, known, x_0_theta(x, np.full(len(x), t)))
            x = move(schedule, x, x_0, t, s, 1.0, rng)
        yield s, x


def invert(x_0_theta, schedule, x_0, steps=None, rounds=5):
    """The x_T from which DDIM, `improved.sample` with eta = 0, draws x_0 in as many steps, a generator: yield (t, x_t).

    What leads from x_t to x_s is known, `move` with the x_0 that is seen in x_t. Its inverse needs the same x_0, which
    is not known before x_t is; so it is predicted from x_s first, then from that x_t, and so on, ``rounds`` times. One
    round is the inversion of Song, Meng and Ermon 2021 (Sec. 4.3 there, "encoding"), in which errors remain.
    """
    T = len(schedule["alpha_bar"]) - 1
    times, x = sample_times(T, T if steps is None else steps)[::-1], x_0
    a, b = schedule["sqrt_alpha_bar"], schedule["sqrt_one_minus_alpha_bar"]
    for s, t in zip(times, times[1:], strict=False):
        x_t = x
        for _ in range(rounds):
            eps = (x_t - np.float32(a[t]) * x_0_theta(x_t, np.full(len(x), t))) / np.float32(b[t])
            x_t = np.float32(a[t] / a[s]) * (x - np.float32(b[s]) * eps) + np.float32(b[t]) * eps
        x = x_t
        yield t, x
