"""What we added to the diffusion model of `diffusion.py`, each addition with its source and what it bought.

`run_ddpm.py --additions` takes any of the names in ADDITIONS; with "none", what the network predicts, the loss, the
optimiser and the sampler are the paper's. Two are not in this file: "muon" is the optimiser in `muon.py`, "global" the
`global_block` in `layers.py`. docs/quality.md has the ladder from none to all, one row per addition.

Dimensions: N images, H height, W width. Images are (N, H, W, 1) in [-1, 1], t is (N,) integers in 1..T.
network(params, x, t) is a plain network, which knows nothing of schedules; one made for classes takes labels after t,
(N,) integers, -1 for none, and so do the functions that are made from it here.
"""

import math
import warnings
from functools import partial

from scratchgen.diffusion import at, predict_x_0, q_sample, squared_errors
from scratchgen.ops import mean

import autograd.numpy as np  # NumPy with functions that autograd can record

ADDITIONS = {  # name -> what it does, for --help; in the order of the ladder
    "v": "the network predicts v, from which eps follows",
    "black": "the network sees how far each pixel is from black",
    "weights": "noisier steps count more in the loss",
    "muon": "Muon steps the smaller matrices, Adam the rest",
    "global": "the U-Net has blocks that see the whole image",
    "guide": "samples are guided away from what the network would have drawn early in its training",
}


def init_denoiser(init, rng, additions, classes=0):
    """The parameters of a network of `denoisers.py`, made by its ``init``, with what the additions ask of it."""
    options = {"global_blocks": True} if "global" in additions else {}
    options |= {"classes": classes} if classes else {}
    return init(rng, inputs=2 if "black" in additions else 1, **options)


def denoiser(network, schedule, additions):
    """From a plain network make (eps_theta, x_0_theta), two functions of (params, x_t, t, *labels).

    eps_theta predicts the noise in x_t, and is what the loss scores; x_0_theta predicts the clean image, clipped to
    [-1, 1] only if the network predicts eps, for the samplers below. Without additions eps_theta is the network itself.
    """
    if "black" in additions:
        network = partial(with_black, network, schedule)
    if "v" in additions:
        return partial(eps_from_v, network, schedule), partial(x_0_from_v, network, schedule)
    return network, partial(x_0_from_eps, network, schedule)


def x_0_from_eps(eps_theta, schedule, params, x_t, t, *labels):
    return predict_x_0(schedule, x_t, t, eps_theta(params, x_t, t, *labels))


# ------------------------------------------------------------------------------------------------- "v": preconditioning
# Salimans and Ho 2022 let the network F predict v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. Together with
# Eq. (4) of Ho et al., x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, that is a rotation of (x_0, eps) by an
# angle whose cosine is sqrt(alpha_bar_t), and rotating back gives both:
#
#     eps = c_skip x_t + c_out v,    c_skip = sqrt(1 - alpha_bar_t),    c_out = sqrt(alpha_bar_t)
#     x_0 = c_skip x_t + c_out v,    c_skip = sqrt(alpha_bar_t),        c_out = -sqrt(1 - alpha_bar_t)
#
# Karras et al. 2022 (Sec. 5) call this preconditioning, and c_skip and c_out are their names. Where x_t is nearly all
# noise, a network that predicts eps has to copy x_t, and what it misses grows by 1 / sqrt(alpha_bar_t) on the way to
# x_0. Here c_skip copies x_t, the network says what x_0 is, and its mistakes do not grow.
# Bought: a Frechet distance of 38 instead of 53 (docs/quality.md, "The ladder").


def eps_from_v(network, schedule, params, x_t, t, *labels):
    c_skip, c_out = at(schedule["sqrt_one_minus_alpha_bar"], t), at(schedule["sqrt_alpha_bar"], t)
    return c_skip * x_t + c_out * network(params, x_t, t, *labels)


def x_0_from_v(network, schedule, params, x_t, t, *labels):
    """Directly, not by way of eps: where alpha_bar_t is tiny, eps in float32 no longer determines x_0.

    And not clipped to [-1, 1], unlike `diffusion.predict_x_0`, where mistakes grow. Where x_0 is black, -1, predictions
    lie a little above or below. A clip brings each one nearer, but leaves only mistakes upwards, and over the steps of
    a sampler these add up to a grey instead of cancelling. Bought: a Frechet distance of 5.4 instead of 6.6, unguided.
    """
    c_skip, c_out = at(schedule["sqrt_alpha_bar"], t), -at(schedule["sqrt_one_minus_alpha_bar"], t)
    return c_skip * x_t + c_out * network(params, x_t, t, *labels)


# ------------------------------------------------------------------------------------------ "black": a second channel


def with_black(network, schedule, params, x_t, t, *labels):
    """The network sees `above_black` beside x_t: (N, H, W, 2)."""
    return network(params, np.concatenate([x_t, above_black(schedule, x_t, t)], axis=3), t, *labels)


def above_black(schedule, x_t, t):
    """How far each pixel is above where black would be, -sqrt(alpha_bar_t), in units of the noise and within +-3.

    Where x_0 is black, -1, as half of all pixels are, this is eps itself. To get it from x_t alone a network would have
    to amplify x_t by 1 / sqrt(1 - alpha_bar_t), 45 times at t = 1, and its backgrounds stay a little grey. The idea is
    our own. Bought: a Frechet distance of 29 instead of 38.
    """
    distance = (x_t + at(schedule["sqrt_alpha_bar"], t)) / at(schedule["sqrt_one_minus_alpha_bar"], t)
    return np.clip(distance, -3, 3)


# ---------------------------------------------------------------------------------------------- "weights": of the loss


def weighted_loss(eps_theta, schedule, batch):
    """`diffusion.simple_loss` with each image's error times 1 / sqrt(alpha_bar_t), and without, to report.

    What a picture shows is decided where alpha_bar_t falls from 0.5 to 0.01. In terms of v, L_simple is
    alpha_bar_t ||v - v_theta||^2, and counts less and less there. Scoring v itself (Salimans and Ho 2022) gives more
    weight to the noisiest steps, at which little can be known. This is the geometric mean of both. Bought: a Frechet
    distance of 24 instead of 29.
    """
    x_0, t, eps = batch
    x_t = q_sample(schedule, x_0, t, eps)
    errors = squared_errors(eps, eps_theta(x_t, t))
    weights = (1 / schedule["sqrt_alpha_bar"][t]).astype(np.float32)
    return mean(weights * errors), {"loss": mean(errors)}


# -------------------------------------------------------------------------------------------- samplers with fewer steps

# name -> eta and order of `sample`
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}


def sample_times(T, steps):
    """The t at which a sampler of fewer steps stops, from T to 0: all of them, or fewer and shorter steps at the end.

    With i steps to go t is T (i / steps)^1.3, but at least i, so that there are enough integers for the rest. The last
    steps decide about lines and edges, and evenly spaced ones would jump from t = 10 of 200 to 0. Raises ValueError.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"a sampler takes 1 to T = {T} steps, not {steps}")
    return [max(i, round(T * (i / steps) ** 1.3)) for i in range(steps, -1, -1)]


def move(schedule, x_t, x_0, t, s, eta=0.0, rng=None):
    """x_s from x_t and the x_0 that is seen in it, at once (Song, Meng and Ermon 2021, Eqs. 12 and 16).

    Derive the eps that leads from x_0 to x_t, and put both into Eq. (4) of Ho et al. at time s,

        x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z,    z ~ N(0, I),
        sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s).

    With eta = 0 nothing is random, ``rng`` may be None, and s may be later than t as well as earlier.
    """
    # x_t = a_t x_0 + b_t eps. Entries of these arrays are float64, and would make images float64, too.
    alpha_bar, a, b = (schedule[k] for k in ("alpha_bar", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    eps = (x_t - np.float32(a[t]) * x_0) / np.float32(b[t])
    variance = eta**2 * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / alpha_bar[s])
    direction = math.sqrt(max(0.0, 1 - alpha_bar[s] - variance))
    x_s = np.float32(a[s]) * x_0 + direction * eps
    if variance > 0:
        x_s += math.sqrt(variance) * rng.standard_normal(x_s.shape, dtype=np.float32)
    return x_s


def sample(x_0_theta, schedule, x_t, rng, steps=None, eta=1.0, order=1, start=None):
    """A sampler that need not take all T steps, a generator: yield (s, x_s) for each s of `sample_times` after T.

    Each step predicts x_0 and takes `move` to the next s. With eta = 1 and all T steps this is Algorithm 2 of Ho et al.
    once more. With eta = 0 nothing is random after x_T: that is DDIM, and ``rng`` may be None. ``start`` is the t of
    ``x_t``, by default T: from an image with some noise in it, those like it are drawn (Meng et al. 2022, SDEdit).

    With eta = 0 these are steps along the solution of a differential equation, and would be exact if the predicted x_0
    stayed the same from t to s. ``order`` = 2 allows for its change: it takes x_0 as it will be in the middle of the
    step, if it goes on as it did in the last one. Middle and change are measured in lambda = log(sqrt(alpha_bar) /
    sqrt(1 - alpha_bar)). This is DPM-Solver++(2M) of Lu et al. 2022: errors shrink with the square of the step, not
    with the step, still at one call of the network per step. With eta = 1 it is their SDE-DPM-Solver++(2M): fresh noise
    at each step covers up some of what the network got wrong before. Bought: in 20 steps a Frechet distance of 5, where
    Algorithm 2 has 24, and needs 200 for 7, and DDIM comes to 21.
    """

    def lam(t):
        return math.log(schedule["sqrt_alpha_bar"][t] / schedule["sqrt_one_minus_alpha_bar"][t])

    start = len(schedule["alpha_bar"]) - 1 if start is None else start
    times, x, last = sample_times(start, start if steps is None else steps), x_t, None
    for t, s in zip(times, times[1:], strict=False):
        x_0 = predicted = x_0_theta(x, np.full(len(x), t))
        if order == 2 and last is not None and s > 0:  # lambda is infinite at s = 0
            before, predicted_before = last
            half_a_step = (lam(s) - lam(t)) / 2 / (lam(t) - lam(before))  # as a fraction of the last step
            x_0 = predicted + half_a_step * (predicted - predicted_before)
        last = t, predicted
        x = move(schedule, x, x_0, t, s, eta, rng)
        yield s, x


# ----------------------------------------------------------------------------------------------- "guide", and classes

GUIDANCE = 0.5  # w


def early_step(total_steps):
    """The step after which the moving average of the weights is kept to be the guide: an eighth of all."""
    return math.ceil(total_steps / 8)


def guided(x_0_theta, x_0_guide, w):
    """From two predictions of x_0, functions of (x_t, t), make one: on from the guide's by w of the way between both.

    x_0 + w (x_0 - x_0_guide), clipped to [-1, 1]: where the two differ much, it would lead far beyond. Where nothing is
    clipped that is eps + w (eps - eps_guide). The score of x_t is linear in eps, so if both are exact, for two
    densities p and q of x_t, the result is exact for p (p / q)^w, normalised.

    The guide of "guide" is the network itself early in its training ("autoguidance", Karras et al. 2024, whose w is one
    more): it errs where the network does, only more. What leads away from its mistakes leads away from the network's.
    Bought: a Frechet distance of 2 instead of 5, and of 0.9 instead of 2.5 with classes.
    The guide of Ho and Salimans 2022 is the network without the label: what is typical of the class comes out more.
    """

    def prediction(x_t, t):
        x_0 = x_0_theta(x_t, t)
        return np.clip(x_0 + np.float32(w) * (x_0 - x_0_guide(x_t, t)), -1, 1)

    return prediction


def told(prediction, *labels):
    """prediction(x_t, t, *labels) as a function of x_t and t."""
    return lambda x_t, t: prediction(x_t, t, *labels)


def drop_some(labels, rng):
    """-1, for no label, in place of a tenth of them, so that the network learns both (Ho and Salimans 2022, Alg. 1)."""
    return np.where(rng.random(len(labels)) < 0.1, -1, labels.astype(int))


def best_sampler(additions, T):
    """How samples are drawn where nothing else is said: one of SAMPLERS, its steps and w."""
    if not additions:
        return "ddpm", T, 0.0
    return "sde-dpm++", min(T, 20), GUIDANCE if "guide" in additions else 0.0


# ------------------------------------------------------------------------------------------- the flag --additions


def help_for_additions():
    each = "; ".join(f"{name} ({what})" for name, what in ADDITIONS.items())
    return f"what we added to Ho et al. 2020: none, all, or any of {each} (default: all)"


def chosen(names, arch, error):
    """The additions that the flag --additions names, in the order of ADDITIONS; ``error`` is told what is wrong."""
    if len(names) > 1 and {"none", "all"} & set(names):
        error(f"--additions {' '.join(names)}: none and all stand alone")
    if "global" in names and arch != "unet":
        error(f"--additions global is for --arch unet, not {arch}")
    if "weights" in names and "v" not in names:
        warnings.warn("additions: weights without v leave hardly any step but the noisiest to count", stacklevel=2)
    return [name for name in ADDITIONS if name in names or (names == ["all"] and (name != "global" or arch == "unet"))]
