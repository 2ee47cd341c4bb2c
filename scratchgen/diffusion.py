"""The denoising diffusion model of Ho, Jain and Abbeel 2020 ("the paper"): q, p, the loss and the samplers.

Time runs t = 1..T as in the paper, and index 0 is the clean image: every array of a schedule has length T + 1.

    beta_t                       variance of the noise that step t adds
    alpha_t = 1 - beta_t         beta_0 = 0, alpha_0 = 1
    alpha_bar_t                  product of alpha_1 .. alpha_t, alpha_bar_0 = 1

Images are (N, H, W, C) in [-1, 1], t is (N,) integers in 1..T. The network is passed in as a function
eps_theta(x_t, t); nothing here knows what it is made of. Equation numbers are the paper's.
"""

import math

import numpy as np


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
    """The constants of q for t = 0..T, worked out in float64: a dict of arrays of length T + 1.

    "signal" = sqrt(alpha_bar_t) and "noise" = sqrt(1 - alpha_bar_t) are the factors of Eq. (4), "posterior_x0" and
    "posterior_xt" those of Eq. (7), and "posterior_variance" is its beta~_t.
    """
    beta = np.concatenate([[0.0], SCHEDULES[name](T)])
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    before = np.concatenate([[1.0], alpha_bar[:-1]])  # alpha_bar_{t-1}
    # At t = 0 the quotients are 0 / 0; nothing may use them, and NaN makes sure that nobody does unnoticed.
    rest = np.where(alpha_bar < 1, 1 - alpha_bar, np.nan)
    return {
        "beta": beta,
        "alpha": alpha,
        "alpha_bar": alpha_bar,
        "signal": np.sqrt(alpha_bar),
        "noise": np.sqrt(1 - alpha_bar),
        "posterior_x0": np.sqrt(before) * beta / rest,
        "posterior_xt": np.sqrt(alpha) * (1 - before) / rest,
        "posterior_variance": (1 - before) / rest * beta,
    }


def at(values, t):
    """values[t] for each image, float32 from here on, shaped to multiply images: (T + 1,), (N,) -> (N, 1, 1, 1)."""
    return values[t].astype(np.float32).reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------- q, the way to noise


def q_sample(schedule, x_0, t, eps):
    """x_t ~ q(x_t | x_0) in one step, Eq. (4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, eps ~ N(0, I)."""
    return at(schedule["signal"], t) * x_0 + at(schedule["noise"], t) * eps


def q_posterior(schedule, x_0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), Eqs. (6) and (7): (N, H, W, C) and (N, 1, 1, 1)."""
    mean = at(schedule["posterior_x0"], t) * x_0 + at(schedule["posterior_xt"], t) * x_t
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


# ----------------------------------------------------------------------------------------------------------- training


def draw_batch(schedule, x_0, rng):
    """Every random choice of one step of Algorithm 1: (x_0, t, eps) with t uniform on 1..T and eps ~ N(0, I)."""
    T = len(schedule["beta"]) - 1
    return x_0, rng.integers(1, T + 1, size=len(x_0)), rng.standard_normal(x_0.shape, dtype=np.float32)


def eps_from_v(schedule, v, x_t, t):
    """The noise that a predicted v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 implies (Salimans and Ho 2022).

    With Eq. (4), eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t and x_0 = sqrt(alpha_bar_t) x_t -
    sqrt(1 - alpha_bar_t) v. Where x_t is nearly all noise, a network that predicts eps has to hand x_t through, and
    what it misses grows by 1 / sqrt(alpha_bar_t) on the way to x_0; one that predicts v says what x_0 is, and its
    mistakes do not grow. In terms of v, the squared error in eps is alpha_bar_t ||v - v_theta||^2.
    """
    return at(schedule["signal"], t) * v + at(schedule["noise"], t) * x_t


def above_black(schedule, x_t, t):
    """How far each pixel is above where black would be, -sqrt(alpha_bar_t), in units of the noise and within +-3.

    Where x_0 is black, -1, as half of all pixels are, this is eps itself. To get it from x_t alone a network would have
    to amplify x_t by 1 / sqrt(1 - alpha_bar_t), 45 times at t = 1, and its backgrounds stay a little grey.
    """
    distance = (x_t + at(schedule["signal"], t)) / at(schedule["noise"], t)
    return np.clip(distance, -3, 3, out=distance)


def predict_noise(network, schedule, x_t, t):
    """eps_theta(x_t, t) by a network that sees x_t and `above_black`, (N, H, W, 2), and t, and predicts v."""
    seen = np.concatenate([x_t, above_black(schedule, x_t, t)], axis=3)
    return eps_from_v(schedule, network(seen, t), x_t, t)


def squared_errors(eps_theta, schedule, batch):
    """The eps-loss of each image, (N,): its expectation, 1 for a network that predicts no noise, is L_simple / d.

    L_simple is the loss of Eq. (14), and d the number of pixels.
    """
    x_0, t, eps = batch
    difference = eps_theta(q_sample(schedule, x_0, t, eps), t) - eps
    return (difference * difference).reshape((len(t), -1)).sum(axis=1) * (1 / eps[0].size)


def weighted_loss(eps_theta, schedule, batch):
    """What training minimises, L_simple / d with weights 1 / sqrt(alpha_bar_t), and L_simple / d itself to report.

    What a picture shows is decided where alpha_bar_t is between 0.5 and 0.01, and there L_simple, in terms of v
    alpha_bar_t ||v - v_theta||^2, hardly counts. Scoring v itself would count little but the noisiest steps, at which
    hardly anything can be known. This is half-way, the geometric mean of both: sqrt(alpha_bar_t) ||v - v_theta||^2.
    """
    errors, t = squared_errors(eps_theta, schedule, batch), batch[1]
    weights = (1 / schedule["signal"][t]).astype(np.float32)
    return (errors * weights).sum() * (1 / len(t)), {"loss": errors.sum() * (1 / len(t))}


# ----------------------------------------------------------------------------------------- p, the way back to an image


def predict_x_0(schedule, x_t, t, eps):
    """The x_0 from which this noise leads to x_t, Eq. (15), clipped to where images are: [-1, 1]."""
    x_0 = (x_t - at(schedule["noise"], t) * eps) / at(schedule["signal"], t)
    return np.clip(x_0, -1, 1, out=x_0)


def p_sample(eps_theta, schedule, x_t, t, noise):
    """One step of Algorithm 2, x_t -> x_{t-1}, with variance beta~_t and the predicted x_0 clipped.

    Put the clipped x_0 into the posterior mean, Eq. (7); where nothing is clipped that is Eq. (11). At t = 1 the
    variance is zero and so is the noise. t is one integer: all images are at the same step.
    """
    t = np.full(len(x_t), t)
    x_0 = predict_x_0(schedule, x_t, t, eps_theta(x_t, t))
    mean, variance = q_posterior(schedule, x_0, x_t, t)
    return mean + np.sqrt(variance) * noise


def sample(eps_theta, schedule, x_T, rng):
    """Algorithm 2 as a generator: yield (t, x_t) for t = T - 1 .. 0, starting after the given noise x_T."""
    x = x_T
    for t in range(len(schedule["beta"]) - 1, 0, -1):
        x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x.shape, dtype=np.float32))
        yield t - 1, x


def ddim_times(T, steps):
    """The t at which a sampler of fewer steps stops: T = t_0 > t_1 > .. > t_steps = 0, as evenly as integers can be."""
    return [round(T * (steps - i) / steps) for i in range(steps + 1)]


def ddim_sample(eps_theta, schedule, x_T, steps, eta=0.0, rng=None, order=1):
    """Song, Meng and Ermon 2021 as a generator: yield (s, x_s) for the ``steps`` times s of `ddim_times` after T.

    From x_t, any earlier x_s is drawn at once (their Eqs. 12 and 16): predict x_0 and clip it, derive again the eps
    that leads from it to x_t, and put both into Eq. (4) at time s,

        x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma noise,
        sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s).

    With eta = 0 nothing is random after x_T: this is DDIM. With eta = 1 and s = t - 1 it is Algorithm 2 once more.

    With eta = 0 these are steps along the solution of a differential equation, and would be exact if the predicted x_0
    stayed the same from t to s. ``order`` = 2 allows for its change: it takes x_0 as it will be in the middle of the
    step, if it goes on as it did in the last one. Middle and change are measured in lambda = log(sqrt(alpha_bar) /
    sqrt(1 - alpha_bar)). This is DPM-Solver++(2M) of Lu et al. 2022: errors shrink with the square of the step, not
    with the step, and the network is asked no more often. With eta = 1 it is their SDE-DPM-Solver++(2M): fresh noise at
    each step covers up some of what the network got wrong before.
    """
    alpha_bar = schedule["alpha_bar"]

    def lam(t):
        return math.log(schedule["signal"][t] / schedule["noise"][t])

    times, x, last = ddim_times(len(alpha_bar) - 1, steps), x_T, None
    for t, s in zip(times, times[1:], strict=False):
        t_of_each = np.full(len(x), t)
        x_0 = predicted = predict_x_0(schedule, x, t_of_each, eps_theta(x, t_of_each))
        if order == 2 and last is not None and s > 0:  # lambda is infinite at s = 0
            r, predicted_at_r = last
            half_a_step = (lam(s) - lam(t)) / 2 / (lam(t) - lam(r))  # as a fraction of the last step, from r to t
            x_0 = np.clip(predicted + np.float32(half_a_step) * (predicted - predicted_at_r), -1, 1)
        last = t, predicted
        eps = (x - np.float32(schedule["signal"][t]) * x_0) / np.float32(schedule["noise"][t])
        variance = eta**2 * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / alpha_bar[s])
        direction = math.sqrt(max(0.0, 1 - alpha_bar[s] - variance))
        x = np.float32(schedule["signal"][s]) * x_0 + np.float32(direction) * eps
        if variance > 0:
            x += np.float32(math.sqrt(variance)) * rng.standard_normal(x.shape, dtype=np.float32)
        yield s, x
