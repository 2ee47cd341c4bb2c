"""What a trained diffusion model can do besides drawing from noise. None of it needs training.

Dimensions: N images, (N, H, W, 1) in [-1, 1]; samples may lie slightly outside. x_0_theta(x_t, t) predicts x_0, with t
an array (N,); an example is `trained.DDPM.x_0_theta`. Drawing variations of an image needs no function here:
`samplers.sample` with ``start`` begins from a noisy version of the image.
"""

import math

from scratchgen.diffusion import q_sample
from scratchgen.samplers import ddim_step, sample, timesteps

import numpy as np


def interpolate(x_0_theta, schedule, x_0, other, weight, t, rng, **options):
    """Interpolate between images x_0 and ``other``, each (1, H, W, 1) (Ho et al. 2020, Sec. 4.4): (N, H, W, 1).

    Both images get noise up to t. The N weights, from 0 to 1, mix the two x_t. The sampler starts from the mixtures;
    ``options`` go to `samplers.sample`: steps, eta, order. A small t blends the pixels. A large t gives garments
    between the two, less and less like either. Both images get the same noise: a mixture of different noises would
    have less noise than x_t.
    """
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    weight = np.float32(weight).reshape(-1, 1, 1, 1)
    x_t, other_t = (q_sample(schedule, image, np.array([t]), eps) for image in (x_0, other))
    mixed = (1 - weight) * x_t + weight * other_t
    *_, (_, images) = sample(x_0_theta, schedule, mixed, rng, start=t, **options)
    return images


def predicted(x_0_theta, trajectory):
    """The predicted x_0 along a trajectory: yield (t, x_0_theta(x_t, t)) for each of its (t, x_t), t > 0.

    Ho et al. 2020, Sec. 4.3: the outline is decided first, fine structure last.
    """
    return ((t, x_0_theta(x_t, np.full(len(x_t), t))) for t, x_t in trajectory if t > 0)


def inpaint(x_0_theta, schedule, known, where, x_T, rng, steps=None, repeats=5):
    """Draw the unknown part of images, as a generator like `samplers.sample`.

    ``known`` is (N, H, W, 1), and is used only where the boolean array ``where`` is true. Each step puts the known part
    into the predicted x_0. That alone is not enough: the new part would fit badly, because the network sees only a
    noisy version of the known part. So each step is taken ``repeats`` times; in between, noise leads back from x_s to
    x_t (Lugmayr et al. 2022, RePaint). The more steps and repeats, the better the two parts agree.
    """
    times = timesteps(schedule["T"], steps)
    x = x_T
    for t, s in zip(times, times[1:], strict=False):
        left = schedule["alpha_bar"][t] / schedule["alpha_bar"][s]  # share of the variance of x_s left in x_t
        for repeat in range(repeats):
            if repeat > 0:
                z = rng.standard_normal(x.shape, dtype=np.float32)
                x = math.sqrt(left) * x + math.sqrt(1 - left) * z  # q(x_t | x_s)
            x_0 = np.where(where, known, x_0_theta(x, np.full(len(x), t)))
            x = ddim_step(schedule, x, x_0, t, s, 1.0, rng)
        yield s, x


def invert(x_0_theta, schedule, x_0, steps=None, rounds=5):
    """Find the x_T from which DDIM (`samplers.sample`, eta = 0) draws x_0 in ``steps`` steps: yield (t, x_t), x_T last.

    The step from x_t to x_s is a `ddim_step` with the x_0 predicted from x_t. Its inverse needs the same prediction,
    but x_t is not known yet. So x_0 is first predicted from x_s. This gives an x_t, from which x_0 is predicted again,
    ``rounds`` times in all. One round is the inversion of Song, Meng and Ermon 2021 (Sec. 4.3); it leaves errors.
    """
    a = schedule["sqrt_alpha_bar"]
    b = schedule["sqrt_one_minus_alpha_bar"]
    times = timesteps(schedule["T"], steps)[::-1]
    x = x_0
    for s, t in zip(times, times[1:], strict=False):
        x_t = x
        for _ in range(rounds):
            eps = (x_t - a[t] * x_0_theta(x_t, np.full(len(x), t))) / b[t]
            x_t = a[t] / a[s] * (x - b[s] * eps) + b[t] * eps
        x = x_t
        yield t, x
