"""What we added to the diffusion model of `diffusion.py`, each addition with its source and its effect.

`run_ddpm.py --additions` takes any of the names in ADDITIONS; with "none", what the network predicts, the loss, the
optimiser and the sampler are the paper's. Two of them are in other files: "muon" is the optimiser in `muon.py`, and
"global" the `global_block` in `layers.py`. docs/quality.md has the ablation, from none to all, one row per addition.

An effect is a change of the Frechet distance between samples and test images (like FID, but of the features of our own
classifier; docs/quality.md), drawn unguided in 20 steps of `samplers.py` unless it says otherwise.

Dimensions: N images, H height, W width. Images are (N, H, W, 1) in [-1, 1], t is (N,) integers in 1..T, and so are
labels, which are None for a network without classes; the label -1 stands for no label.
"""

import math

from scratchgen.diffusion import at, predict_x_0

import autograd.numpy as np  # NumPy with functions that autograd can record

ADDITIONS = {  # name -> what it does, for --help; in the order of the ablation
    "v": "the network predicts v, from which eps follows",
    "black": "the network sees how far each pixel is from black",
    "weights": "noisier steps count more in the loss; without v hardly any other step counts",
    "muon": "Muon steps the smaller matrices, Adam the rest",
    "global": "the U-Net has blocks that see the whole image",
    "guide": "samples are guided away from what the network would have drawn early in its training",
}


def init_denoiser(init, rng, additions, classes=0):
    """The parameters of a network of `denoisers.py`, made by its ``init``, with what the additions ask of it."""
    options = {"global_blocks": True} if "global" in additions else {}
    options |= {"classes": classes} if classes else {}
    return init(rng, inputs=2 if "black" in additions else 1, **options)


class Denoiser:
    """A network as a predictor of the noise in x_t, `eps`, and of the clean image, `x_0`.

    ``network(params, x, t, labels)`` knows nothing of schedules. Without additions its output is eps itself.

    "v" (Salimans and Ho 2022): the output is v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. Together with
    Eq. (4) of Ho et al., x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, that is a rotation of (x_0, eps) by
    an angle whose cosine is sqrt(alpha_bar_t). Rotating back gives both:

        eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v
        x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

    Karras et al. 2022 (Sec. 5) call this preconditioning, and the factors of x_t and v in such an equation c_skip and
    c_out. Where x_t is nearly all noise, a network that predicts eps has to copy x_t, and its error grows by
    1 / sqrt(alpha_bar_t) on the way to x_0. Here c_skip copies x_t, v is nearly -x_0, and its error does not grow.
    Effect: Frechet distance 53 -> 38 (docs/quality.md).

    "black": the network sees `above_black` beside x_t.
    """

    def __init__(self, network, schedule, additions):
        self.network = network
        self.schedule = schedule
        self.additions = additions

    def eps(self, params, x_t, t, labels=None):
        """The predicted noise in x_t, which the loss scores: (N, H, W, 1)."""
        output = self.network(params, self.network_input(x_t, t), t, labels)
        if "v" not in self.additions:
            return output
        c_skip = at(self.schedule["sqrt_one_minus_alpha_bar"], t)
        c_out = at(self.schedule["sqrt_alpha_bar"], t)
        return c_skip * x_t + c_out * output

    def x_0(self, params, x_t, t, labels=None):
        """The predicted clean image, for the samplers: (N, H, W, 1).

        A network that predicts eps: clipped to [-1, 1], as its error grows (`diffusion.predict_x_0`).

        "v": computed from v and not from eps, because where alpha_bar_t is tiny, eps in float32 does not determine
        x_0. It is not clipped. Where x_0 is black, -1, predictions lie a little above or below. A clip leaves only the
        errors upwards, and over the steps of a sampler these add up to a grey instead of cancelling.
        Effect: Frechet distance 6.6 -> 5.4, unguided.
        """
        output = self.network(params, self.network_input(x_t, t), t, labels)
        if "v" not in self.additions:
            return predict_x_0(self.schedule, x_t, t, output)
        c_skip = at(self.schedule["sqrt_alpha_bar"], t)
        c_out = -at(self.schedule["sqrt_one_minus_alpha_bar"], t)
        return c_skip * x_t + c_out * output

    def network_input(self, x_t, t):
        if "black" not in self.additions:
            return x_t
        return np.concatenate([x_t, above_black(self.schedule, x_t, t)], axis=3)


def above_black(schedule, x_t, t):
    """How far each pixel is above where black would be, -sqrt(alpha_bar_t), in units of the noise and within +-3.

    Where x_0 is black, -1, as half of all pixels are, this is eps itself. To get it from x_t alone a network would have
    to amplify x_t by 1 / sqrt(1 - alpha_bar_t), 45 times at t = 1, and its backgrounds stay a little grey. The idea is
    our own. Effect: Frechet distance 38 -> 29.
    """
    distance = (x_t + at(schedule["sqrt_alpha_bar"], t)) / at(schedule["sqrt_one_minus_alpha_bar"], t)
    return np.clip(distance, -3, 3)


def step_weights(schedule):
    """The weight 1 / sqrt(alpha_bar_t) of each t in `diffusion.simple_loss`, (T + 1,) float32: "weights".

    The content of a picture is decided where alpha_bar_t falls from 0.5 to 0.01. There L_simple counts less and less:
    eps - eps_theta = sqrt(alpha_bar_t) (v - v_theta), so that it weighs the squared error of v by alpha_bar_t. Salimans
    and Ho 2022 weigh that error by 1, which gives more to the noisiest steps, at which little can be known. We take
    the geometric mean, sqrt(alpha_bar_t). Divided by alpha_bar_t, it is the weight of the squared error of eps.
    Effect: Frechet distance 29 -> 24.
    """
    return (1 / np.sqrt(schedule["alpha_bar"])).astype(np.float32)


# ----------------------------------------------------------------------------------------------- "guide", and classes

GUIDANCE = 0.5  # w


def early_step(total_steps):
    """The step after which the moving average of the weights is kept to be the guide: an eighth of all."""
    return math.ceil(total_steps / 8)


def guided(x_0, x_0_guide, w):
    """Extrapolate a prediction of x_0 away from the guide's: x_0 + w (x_0 - x_0_guide), clipped to [-1, 1].

    Without the clip it would lead far beyond where the two differ much. Where nothing is clipped that is
    eps + w (eps - eps_guide). The score of x_t is linear in eps. So if both are exact at one t, for densities p_1 and
    p_0 (the guide's) of x_t, the result is exact for p_1 (p_1 / p_0)^w, normalised.

    The guide of "guide" is the network itself early in its training ("autoguidance", Karras et al. 2024, whose w is one
    more): it makes the errors of the network, only larger ones, so the direction away from it leads away from the
    errors of both. Effect: Frechet distance 5 -> 2, and 2.5 -> 0.9 with classes.
    The guide of Ho and Salimans 2022 is the network without the label: what is typical of the class comes out more.
    """
    return np.clip(x_0 + np.float32(w) * (x_0 - x_0_guide), -1, 1)


def drop_labels(labels, rng):
    """The labels with -1, no label, in place of a tenth, so that the network learns both (Ho and Salimans, Alg. 1)."""
    return np.where(rng.random(len(labels)) < 0.1, -1, labels.astype(int))
