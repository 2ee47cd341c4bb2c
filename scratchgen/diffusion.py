"""The denoising diffusion model of Ho, Jain and Abbeel 2020 ("the paper").

Not in the paper: the cosine schedule, betas scaled by 1000 / T, and the optional ``weights`` and ``groups``.

Time runs t = 1..T as in the paper, and index 0 is the clean image: every array of a schedule has length T + 1.

    beta_t                       variance of the noise that step t adds
    alpha_t = 1 - beta_t         beta_0 = 0, alpha_0 = 1
    alpha_bar_t                  product of alpha_1 .. alpha_t, alpha_bar_0 = 1

Dimensions: N images, H height, W width, C channels. Images are (N, H, W, C) in [-1, 1], t is (N,) integers in 1..T.
eps_theta(x_t, t) is any function that predicts the noise in x_t. Equation numbers are the paper's.
"""

import math

from scratchgen.ops import mean

import autograd.numpy as np  # NumPy with functions that autograd can record

# ------------------------------------------------------------------------------------------------------------ schedules


def linear_betas(T):
    """The paper's schedule, 1e-4 .. 0.02 over 1000 steps, scaled by 1000 / T so that x_T is noise for any T.

    Unscaled, T = 200 would stop at alpha_bar_T = 0.13: a third of the image's amplitude still shows in x_T.
    """
    # Counted from the end, so that T = 1 gets the last beta rather than the first.
    return np.clip(np.linspace(0.02, 1e-4, T)[::-1] * 1000 / T, 0, 0.999)


def cosine_betas(T):
    """Nichol and Dhariwal 2021, Eq. (17): alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + 0.008) / 1.008 pi / 2)."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - f[1:] / f[:-1], 0, 0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def make_schedule(name, T):
    """The constants of q for t = 0..T, computed in float64: a dict of T and of arrays of length T + 1.

    "posterior_x_0" and "posterior_x_t" are the factors of x_0 and x_t in Eq. (7), "posterior_variance" is its beta~_t.
    Arrays that multiply images are float32, like the images; beta, alpha and alpha_bar stay float64.
    """
    beta = np.concatenate([[0.0], SCHEDULES[name](T)])
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    alpha_bar_before = np.concatenate([[1.0], alpha_bar[:-1]])  # alpha_bar_{t-1}
    # At t = 0 the quotients are 0 / 0. Nothing may use them, and NaN makes any use visible.
    one_minus_alpha_bar = np.where(alpha_bar < 1, 1 - alpha_bar, np.nan)
    factors = {
        "sqrt_alpha_bar": np.sqrt(alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
        "posterior_x_0": np.sqrt(alpha_bar_before) * beta / one_minus_alpha_bar,
        "posterior_x_t": np.sqrt(alpha) * (1 - alpha_bar_before) / one_minus_alpha_bar,
        "posterior_variance": (1 - alpha_bar_before) / one_minus_alpha_bar * beta,
    }
    factors = {name: values.astype(np.float32) for name, values in factors.items()}
    return {"T": T, "beta": beta, "alpha": alpha, "alpha_bar": alpha_bar, **factors}


def at(values, t):
    """values[t] for each image, shaped to multiply images: (T + 1,), (N,) -> (N, 1, 1, 1)."""
    return values[t].reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------- q, the way to noise


def q_sample(schedule, x_0, t, eps):
    """x_t ~ q(x_t | x_0) in one step, Eq. (4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, eps ~ N(0, I)."""
    return at(schedule["sqrt_alpha_bar"], t) * x_0 + at(schedule["sqrt_one_minus_alpha_bar"], t) * eps


def q_posterior(schedule, x_0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), Eqs. (6) and (7): (N, H, W, C) and (N, 1, 1, 1)."""
    mean = at(schedule["posterior_x_0"], t) * x_0 + at(schedule["posterior_x_t"], t) * x_t
    return mean, at(schedule["posterior_variance"], t)


def prior_kl(schedule, x_0):
    """D_KL(q(x_T | x_0) || N(0, I)) in nats per image, (N,): how far x_T is from the noise that sampling starts with.

    For N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I) in d dimensions it is
    1/2 (alpha_bar ||x_0||^2 - d alpha_bar - d log(1 - alpha_bar)).
    """
    alpha_bar = schedule["alpha_bar"][-1]
    x = x_0.reshape(len(x_0), -1).astype(np.float64)
    d = x.shape[1]
    return 0.5 * (alpha_bar * (x**2).sum(axis=1) - d * alpha_bar - d * np.log1p(-alpha_bar))


# ----------------------------------------------------------------------------------------- the loss: Algorithm 1


def draw_batch(schedule, x_0, rng):
    """The draws of Algorithm 1, lines 3 and 4: (x_0, t, eps) with t uniform on 1..T and eps ~ N(0, I)."""
    return x_0, rng.integers(1, schedule["T"] + 1, size=len(x_0)), rng.standard_normal(x_0.shape, dtype=np.float32)


def simple_loss(eps_theta, schedule, batch, weights=None):
    """Returns L_simple of Eq. (14) for a batch (x_0, t, eps), per pixel, and the same number as a term to report.

    Predicting zero gives 1 on average. With ``weights``, (T + 1,) float32, the loss is the mean of weights[t] times
    each image's error; the term to report stays unweighted.
    """
    x_0, t, eps = batch
    x_t = q_sample(schedule, x_0, t, eps)
    errors = squared_errors(eps, eps_theta(x_t, t))
    unweighted = mean(errors)
    loss = unweighted if weights is None else mean(weights[t] * errors)
    return loss, {"loss": unweighted}


def squared_errors(eps, prediction):
    """||eps - prediction||^2 as a mean over the pixels of each image: twice (N, H, W, C) -> (N,)."""
    difference = eps - prediction
    return np.sum(difference * difference, axis=(1, 2, 3)) * (1 / eps[0].size)


# --------------------------------------------------------------------------- p, the way back to an image: Algorithm 2


def predict_x_0(schedule, x_t, t, eps):
    """The x_0 from which the noise ``eps`` leads to x_t, Eq. (15), clipped to the range of images, [-1, 1]."""
    x_0 = (x_t - at(schedule["sqrt_one_minus_alpha_bar"], t) * eps) / at(schedule["sqrt_alpha_bar"], t)
    return np.clip(x_0, -1, 1)


def p_sample(eps_theta, schedule, x_t, t, z):
    """Line 4 of Algorithm 2, x_t -> x_{t-1}, with sigma_t^2 = beta~_t; t is one integer, the same for all images.

    As in the authors' code, the mean is Eq. (7) with the predicted x_0, clipped. Where nothing is clipped this equals
    Eq. (11): 1 / sqrt(alpha_t) (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta(x_t, t)).
    z ~ N(0, I); at t = 1 the variance is zero, and so no noise is added.
    """
    times = np.full(len(x_t), t)
    x_0 = predict_x_0(schedule, x_t, times, eps_theta(x_t, times))
    mean, variance = q_posterior(schedule, x_0, x_t, times)
    return mean + np.sqrt(variance) * z


def sample(eps_theta, schedule, x_T, rng):
    """Algorithm 2 as a generator: yield (t, x_t) for t = T - 1 .. 0, starting from the given noise x_T."""
    x = x_T
    for t in range(schedule["T"], 0, -1):
        x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x.shape, dtype=np.float32))
        yield t - 1, x


# ---------------------------------------------------------------- the variational bound, from which the loss is derived
# Eq. (5): -log p(x_0) <= L_T + L_{T-1} + .. + L_0 in expectation over q, with
# L_T = `prior_kl` and, for t = T .. 1,
#
#     L_{t-1} = D_KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) for t > 1,    L_0 = -log p_theta(x_0 | x_1).
#
# p_theta is exactly the distribution that Algorithm 2 draws from: its mean is Eq. (7) with the predicted x_0,
# x_0_theta(x_t, t), and its variance is beta~_t. Only beta~_1 = 0 is replaced, by beta~_2: otherwise a pixel that is
# off by one grey level would cost infinitely many nats.


def gaussian_kl(mean, variance, mean_theta, variance_theta):
    """D_KL(N(mean, variance) || N(mean_theta, variance_theta)) of each component, in nats; arguments broadcast.

    1/2 (tr(S_theta^-1 S) - d + log(det S_theta / det S) + (m_theta - m)^T S_theta^-1 (m_theta - m)) is a sum over
    components if both covariances are diagonal. If they are equal, only the last term is left.
    """
    ratio = variance / variance_theta
    return 0.5 * (ratio - 1 - np.log(ratio) + (mean - mean_theta) ** 2 / variance_theta)


def bound_weights(schedule):
    """w_t for t = 2..T, (T - 1,): where no x_0 is clipped, L_{t-1} = w_t ||eps - eps_theta||^2, Eq. (12)."""
    return schedule["beta"][2:] / (2 * schedule["alpha"][2:] * (1 - schedule["alpha_bar"][1:-1]))


def bound_terms(x_0_theta, schedule, x_0, t, eps, groups=None):
    """L_{t-1} of each image at its own t, in nats, (N,) float64; ``eps``, (N, H, W, C), is the noise in x_t.

    x_0_theta(x_t, t, groups) gets each image's group, or None. With groups these are the terms of the bound on
    -log p(x_0 | group).
    """
    x_t = q_sample(schedule, x_0, t, eps)
    mean, variance = q_posterior(schedule, x_0, x_t, t)
    mean_theta, _ = q_posterior(schedule, x_0_theta(x_t, t, groups), x_t, t)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 at t = 1, replaced by L_0 below
        divergence = gaussian_kl(mean, variance, mean_theta, variance)
    terms = divergence.reshape(len(t), -1).sum(axis=1, dtype=np.float64)
    last = t == 1
    sigma = math.sqrt(schedule["posterior_variance"][min(2, schedule["T"])] or schedule["beta"][1])
    terms[last] = -discretised_log_likelihood(x_0[last], mean_theta[last], sigma)
    return terms


def discretised_log_likelihood(x, mean, sigma, levels=256):
    """log p(x) in nats per image, (N,): the decoder of Sec. 3.3.

    x and mean are (N, H, W, C); the pixels of x are grey levels. A pixel's probability is the mass of N(mean, sigma^2)
    between the midpoints to the next grey levels. The first and the last level, -1 and 1, also get the mass beyond
    them.
    """
    half = 1 / (levels - 1)
    x = x.astype(np.float64)
    above = (x + half - mean) / sigma
    below = (x - half - mean) / sigma
    above[x > 1 - half] = np.inf
    below[x < -1 + half] = -np.inf
    # Phi(above) - Phi(below) = Phi(-below) - Phi(-above): take the side where both are small, so that no digits cancel.
    flip = above + below > 0
    probability = normal_cdf(np.where(flip, -below, above)) - normal_cdf(np.where(flip, -above, below))
    log_p = np.log(np.maximum(probability, 1e-300))  # beyond 37 sigma float64 gives 0
    return log_p.sum(axis=(1, 2, 3))


def normal_cdf(x):
    return 0.5 * erfc(-x / math.sqrt(2))


erfc = np.vectorize(math.erfc, otypes=[float])  # NumPy has none


def bits_per_dimension(nats, dimensions):
    return nats / (dimensions * math.log(2))
