"""The diffusion model: questions 7 to 12. Equations have the numbers of questions.md.

Time runs t = 1 .. T, and index 0 is the clean image: the arrays of a schedule have length T + 1.

    beta_t                       variance of the noise that step t adds
    alpha_t = 1 - beta_t         beta_0 = 0, alpha_0 = 1
    alpha_bar_t                  product of alpha_1 .. alpha_t, alpha_bar_0 = 1

Dimensions: N images, H height, W width, C channels. Images are (N, H, W, C) in [-1, 1], t is (N,) integers in 1 .. T,
each image's own, unless it says otherwise. Images may be float32 or float64, and so may be what is returned.
eps_theta(x_t, t) is any function that predicts the noise in x_t: (N, H, W, C), (N,) -> (N, H, W, C). ``schedule`` is
what `make_schedule` returns.
"""

import math

from scratchgen.ops import mean  # autograd's own turns float32 into float64, which is slow in training

import autograd.numpy as np  # NumPy with functions that autograd can record

# ---------------------------------------------------------------------------------------- two schedules, to choose from


def linear_betas(T):
    """beta_1 .. beta_T, (T,) float64: evenly from 1e-4 to 0.02 as in Ho et al. 2020, scaled by 1000 / T."""
    return np.clip(np.linspace(0.02, 1e-4, T)[::-1] * 1000 / T, 0, 0.999)


def cosine_betas(T):
    """beta_1 .. beta_T, (T,) float64, of Nichol and Dhariwal 2021, Eq. (17)."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - f[1:] / f[:-1], 0, 0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def at(values, t):
    """values[t] for each image, shaped to multiply images: (T + 1,), (N,) -> (N, 1, 1, 1). It is written already."""
    return values[t].reshape(-1, 1, 1, 1)


# --------------------------------------------------------------------------------------------------------- question 7


def make_schedule(name, T):
    """What the functions below need to know of a schedule, as a dict.

    name: a key of SCHEDULES; SCHEDULES[name](T) gives beta_1 .. beta_T. T: the number of steps. The keys: "T", the
    number; "beta", "alpha" and "alpha_bar", float64 arrays of length T + 1 with index t = 0 .. T. You may add more.
    """
    raise NotImplementedError("question 7: write make_schedule")


def q_sample(schedule, x_0, t, eps):
    """x_t of Eq. (7): drawn from q(x_t | x_0) in one step, from the noise eps, each image with its own t.

    x_0: (N, H, W, C). t: (N,). eps: (N, H, W, C), drawn from N(0, I). Returns x_t: (N, H, W, C), a new
    array.
    """
    raise NotImplementedError("question 7: write q_sample")


# --------------------------------------------------------------------------------------------------------- question 8


def prior_kl(schedule, x_0):
    """D_KL(q(x_T | x_0) || N(0, I)) of each image, in nats.

    x_0: (N, H, W, C), which may be float32; compute in float64. Returns (N,).
    """
    raise NotImplementedError("question 8: write prior_kl")


# --------------------------------------------------------------------------------------------------------- question 9


def q_posterior(schedule, x_0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), Eqs. (4) to (6), each image with its own t, from 1 to T.

    x_0, x_t: (N, H, W, C). t: (N,). Returns the pair (mean, variance): (N, H, W, C) and (N, 1, 1, 1). At t = 1, where
    x_{t-1} is x_0 itself, the variance is 0.
    """
    raise NotImplementedError("question 9: write q_posterior")


# -------------------------------------------------------------------------------------------------------- question 10


def gaussian_kl(mean, variance, mean_theta, variance_theta):
    """D_KL(N(mean, variance) || N(mean_theta, variance_theta)) in nats, number by number, not summed.

    Each argument is an array of means or variances of single components, such as pixels. They broadcast. Returns, for
    means (N, H, W, C) and variances (N, 1, 1, 1), an array (N, H, W, C).
    """
    raise NotImplementedError("question 10: write gaussian_kl")


# -------------------------------------------------------------------------------------------------------- question 11


def draw_batch(schedule, x_0, rng):
    """All that is random in one step of training.

    x_0: (N, H, W, C). rng: a numpy.random.Generator; all randomness comes from it. Returns (x_0, t, eps): the images as
    they are; t, (N,) integers, all from 1 to T equally likely; eps, (N, H, W, C), from N(0, I), float32 if you can.
    """
    raise NotImplementedError("question 11: write draw_batch")


def squared_errors(eps, prediction):
    """The squared error of a predicted noise, for each image the mean over its pixels and channels.

    eps, prediction: (N, H, W, C). Returns (N,).
    """
    raise NotImplementedError("question 11: write squared_errors")


def simple_loss(eps_theta, schedule, batch):
    """Eq. (8) for a batch, as a mean over images, pixels and channels.

    eps_theta: the network, called with x_t and t. batch: what `draw_batch` returns. Returns the pair (loss, terms): one
    number, shape (), and the dict {"loss": the same number}, to be reported.
    """
    raise NotImplementedError("question 11: write simple_loss")


# -------------------------------------------------------------------------------------------------------- question 12


def predict_x_0(schedule, x_t, t, eps):
    """The image x_0 for which x_t has this noise in it, by Eq. (7), clipped to [-1, 1], where images are.

    x_t, eps: (N, H, W, C). t: (N,). Returns (N, H, W, C).
    """
    raise NotImplementedError("question 12: write predict_x_0")


def p_sample(eps_theta, schedule, x_t, t, z):
    """One step back: x_{t-1}, drawn from the Gaussian of question 9 with the predicted x_0 in place of the true one.

    The predicted x_0 is the clipped one of `predict_x_0`. x_t: (N, H, W, C). t: one integer from 1 to T, the same for
    all images; eps_theta wants it as an array (N,). z: (N, H, W, C), drawn from N(0, I). Returns (N, H, W, C). At t = 1
    no noise is added, whatever z is.
    """
    raise NotImplementedError("question 12: write p_sample")


def sample(eps_theta, schedule, x_T, rng):
    """From noise to images, as a generator (with ``yield``): the pairs (t, x_t) for t = T - 1, .., 1, 0.

    eps_theta: the network. x_T: (N, H, W, C), drawn from N(0, I). rng: a numpy.random.Generator, for the fresh noise of
    each step.
    """
    raise NotImplementedError("question 12: write sample")
