"""What we added to the diffusion model of `diffusion.py`, each addition with its source and its effect.

`run_ddpm.py --additions` takes any of the names in ADDITIONS; with "none", the network's target, the loss, the
optimiser and the sampler are the paper's. Two names are in other files: "muon" is the optimiser in `muon.py`, and
"global" the `global_block` in `layers.py`. docs/quality.md has the ablation, from none to all, one row per addition.

An effect is a change of the Frechet distance of samples to test images (like FID, with features of our own classifier;
docs/quality.md). Samples are unguided, in 20 steps of `samplers.py`, unless stated otherwise.

Dimensions: N images, H height, W width. Images are (N, H, W, 1) in [-1, 1], t is (N,) integers in 1..T. ``groups``
are (N,) integers: each image's group (`Groups`), or -1 if it has none. If the network takes no groups, they are None.
"""

import math

from scratchgen.data import CLASSES, scale
from scratchgen.diffusion import at, predict_x_0

import autograd.numpy as np  # NumPy with functions that autograd can record

ADDITIONS = {  # name -> what it does, for --help; in the order of the ablation
    "v": "the network predicts v, from which eps follows",
    "black": "the network sees how far each pixel is from black",
    "weights": "noisier steps count more in the loss (without v, almost only the noisiest count)",
    "muon": "Muon updates small matrices, Adam the rest",
    "global": "the U-Net has blocks that see the whole image",
    "guide": "samples are guided away from what the network would have drawn early in its training",
    "groups": "the network sees the mean image of the group that the sample belongs to",
}


def init_denoiser(init, rng, additions, classes=0):
    """Initial parameters of a network of `denoisers.py`, with the inputs and blocks that the additions need."""
    options = {"global_blocks": True} if "global" in additions else {}
    options |= {"classes": classes} if classes else {}
    return init(rng, inputs=1 + ("black" in additions) + ("groups" in additions), **options)


class Denoiser:
    """A network that predicts the noise in x_t, `eps`, and the clean image, `x_0`. ``known`` is the `Groups` object.

    ``network(params, x, t, labels)`` knows nothing of schedules. Without additions its output is eps itself.

    "v" (Salimans and Ho 2022): the output is v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0. By Eq. (4)
    of Ho et al., x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. So (x_t, v) is (x_0, eps) rotated by an angle
    whose cosine is sqrt(alpha_bar_t). Rotating back gives both:

        eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v
        x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

    Karras et al. 2022 (Sec. 5) call this preconditioning: c_skip multiplies x_t, and c_out multiplies v.
    Where x_t is nearly all noise, a network that predicts eps has to copy x_t, and in x_0 its error is divided by
    sqrt(alpha_bar_t). With v, c_skip copies x_t; v is nearly -x_0 there, and x_0 has the error of v.
    Effect: Frechet distance 60 -> 36 (docs/quality.md).

    "black": the network sees `above_black` beside x_t. "groups": it sees the mean image of the group, too.
    """

    def __init__(self, network, schedule, additions, known=None):
        self.network = network
        self.schedule = schedule
        self.additions = additions
        self.known = known

    def eps(self, params, x_t, t, groups=None):
        """The predicted noise in x_t, for the loss: (N, H, W, 1)."""
        output = self.output(params, x_t, t, groups)
        if "v" not in self.additions:
            return output
        c_skip = at(self.schedule["sqrt_one_minus_alpha_bar"], t)
        c_out = at(self.schedule["sqrt_alpha_bar"], t)
        return c_skip * x_t + c_out * output

    def x_0(self, params, x_t, t, groups=None):
        """The predicted clean image, for the samplers: (N, H, W, 1).

        If the network predicts eps, x_0 is clipped to [-1, 1], because at large t its error is much larger than that of
        eps (`diffusion.predict_x_0`).

        "v": x_0 is computed from v and not from eps, because where alpha_bar_t is tiny, eps in float32 does not
        determine x_0. It is not clipped (`guided` clips its own result). Where x_0 is black (-1), predictions lie a
        little above or below. A clip keeps only the upward errors; over the steps they do not cancel, but add up to a
        grey.
        Effect of not clipping, without "groups" (28 November 2026): Frechet distance 6.6 -> 5.4.
        """
        output = self.output(params, x_t, t, groups)
        if "v" not in self.additions:
            return predict_x_0(self.schedule, x_t, t, output)
        c_skip = at(self.schedule["sqrt_alpha_bar"], t)
        c_out = -at(self.schedule["sqrt_one_minus_alpha_bar"], t)
        return c_skip * x_t + c_out * output

    def output(self, params, x_t, t, groups):
        labels = groups if groups is None or self.known is None else self.known.labels(groups)
        return self.network(params, self.network_input(x_t, t, groups), t, labels)

    def network_input(self, x_t, t, groups=None):
        channels = [x_t]
        if "black" in self.additions:
            channels.append(above_black(self.schedule, x_t, t))
        if "groups" in self.additions:
            channels.append(self.known.means_of(groups) if groups is not None else np.zeros_like(x_t))
        return np.concatenate(channels, axis=3) if len(channels) > 1 else x_t


def above_black(schedule, x_t, t):
    """How far each pixel of x_t is above black, in standard deviations of the noise, clipped to [-3, 3].

    Where x_0 is black (-1), as half of all pixels are, x_t has the mean -sqrt(alpha_bar_t), and the result is eps
    itself. A network that sees only x_t has to amplify the difference by 1 / sqrt(1 - alpha_bar_t), 45 times at t = 1,
    and leaves backgrounds a little grey. The idea is our own.
    Effect: Frechet distance 36 -> 26.
    """
    distance = (x_t + at(schedule["sqrt_alpha_bar"], t)) / at(schedule["sqrt_one_minus_alpha_bar"], t)
    return np.clip(distance, -3, 3)


def step_weights(schedule):
    """The weight 1 / sqrt(alpha_bar_t) of each t in `diffusion.simple_loss`, (T + 1,) float32: "weights".

    The content of a picture is decided where alpha_bar_t falls from 0.5 to 0.01. There L_simple gives v little weight:
    eps - eps_theta = sqrt(alpha_bar_t) (v - v_theta), so the squared error of v has the weight alpha_bar_t. Salimans
    and Ho 2022 weigh that error by 1: a high weight for the noisiest steps, which decide little of the picture. We take
    the geometric mean of both weights, sqrt(alpha_bar_t). As a weight of the squared error of eps, this is
    1 / sqrt(alpha_bar_t).
    Effect: Frechet distance 26 -> 22.
    """
    return (1 / np.sqrt(schedule["alpha_bar"])).astype(np.float32)


# ----------------------------------------------------------------------------------------------- "guide", and classes

GUIDANCE = 0.5  # w


def early_step(total_steps):
    """The step after which the moving average of the weights is saved as the guide.

    It is a quarter of all steps, but at most 411. A quarter is best in runs of two minutes. In the default run, an
    eighth is better than a quarter: that is 411.
    """
    return min(math.ceil(total_steps / 4), 411)


def guided(x_0, x_0_guide, w):
    """Extrapolate a prediction of x_0 away from the guide's: x_0 + w (x_0 - x_0_guide), clipped to [-1, 1].

    Unclipped, the result overshoots where the predictions differ much. In terms of eps it is eps + w (eps - eps_guide).
    The score of x_t is linear in eps. So if network and guide have the exact scores of p_1(x_t) and p_0(x_t), the
    result has that of p_1 (p_1 / p_0)^w, normalised, at this t.

    The guide of "guide" is an early checkpoint ("autoguidance", Karras et al. 2024; their w is ours plus one). It makes
    the same errors as the network, only larger: moving away from it reduces them.
    Effect without "groups": Frechet distance 4.6 -> 2.0.

    The guide of Ho and Salimans 2022 is the network without the label: samples become more typical of the class.
    """
    return np.clip(x_0 + np.float32(w) * (x_0 - x_0_guide), -1, 1)


def drop_groups(groups, rng):
    """A copy of the groups, in which each is -1 with probability 0.1. So the network learns to predict with a group and
    without one (Ho and Salimans, Algorithm 1). None stays None.
    """
    return None if groups is None else np.where(rng.random(len(groups)) < 0.1, -1, groups)


# ------------------------------------------------------------------------------------------------------------ "groups"

GROUPS = 300  # unguided, 1,000 are as good and 100 are worse


class Groups:
    """Clusters of images: C classes (1 without labels), each with G groups of similar images.

    ``means``, (C, G, H, W, 1), has each group's mean image, and ``shares``, (C, G), its
    fraction of its class. Group g of class c has the number G c + g. Without the addition "groups" each
    class is one group.

    To draw an image is to draw its group first, and then an image of that group: p(x) = sum over g of p(g) p(x | g),
    with p(g) the share. The network sees the mean image of g as one more channel of its input. So it need not infer
    from noise which kinds of images exist, and how frequent each is: we count them. No label is needed. Conditioning on
    unsupervised clusters improves samples: Bao et al. 2022; Adaloglou et al. 2025. They cluster features of another
    network, and embed the cluster's index. We cluster images by pixels; the network sees the mean.
    Effect: guided Frechet distance 2.0 -> 1.3; unguided distance 4.6 -> 3.1, or 18 -> 6 after two minutes of training.
    """

    def __init__(self, means, shares):
        self.means = means
        self.shares = shares

    def of(self, x_0, classes=None):
        """Each image's group: the one of its class with the nearest mean. (N, H, W, 1), (N,) -> (N,)."""
        C, G = self.shares.shape
        classes = np.zeros(len(x_0), int) if classes is None else classes.astype(int)
        groups = np.empty(len(x_0), int)
        for c in range(C):
            groups[classes == c] = G * c + nearest(self.means[c], x_0[classes == c])
        return groups

    def draw(self, N, classes, rng):
        """A group for each of N images, drawn by the shares of its class; -1 where the class is -1. (N,) -> (N,)."""
        C, G = self.shares.shape
        classes = np.zeros(N, int) if classes is None else classes
        within = (rng.random((N, 1)) > np.cumsum(self.shares, axis=1)[classes]).sum(axis=1)
        return np.where(classes < 0, -1, G * classes + np.minimum(within, G - 1))  # a sum may end a little below 1

    def nats(self, groups):
        """-log p(g | class) of each group: (N,) -> (N,)."""
        return -np.log(self.shares.ravel()[groups])

    def labels(self, groups):
        """The class of each group, -1 for none: (N,) -> (N,); None if there is one class."""
        C, G = self.shares.shape
        return groups // G if C > 1 else None

    def means_of(self, groups):
        """The mean image of each group; grey, 0, for none: (N,) -> (N, H, W, 1)."""
        means = self.means.reshape(-1, *self.means.shape[2:])
        return np.where(groups.reshape(-1, 1, 1, 1) < 0, np.float32(0), means[groups])


def find_groups(images, classes, count, rng):
    """The arrays for `Groups`, from training images, uint8 (N, H, W, 1): ``count`` groups, equally many in each class.

    ``classes`` are (N,), or None. Ten thousand images of a class are enough to find its groups. The shares come from
    all images. Each group counts one extra image (Laplace smoothing), so that no share is zero. Takes seconds.
    """
    of_class = [images] if classes is None else [images[classes == c] for c in range(len(CLASSES))]
    means, shares = [], []
    for images_of_class in of_class:
        x = images_of_class if len(images_of_class) else images  # a small slice may lack a class
        G = count // len(of_class)
        means.append(k_means(scale(x[rng.permutation(len(x))[:10_000]], -1, 1), G, rng))
        shares.append((np.bincount(nearest(means[-1], scale(x, -1, 1)), minlength=G) + 1) / (len(x) + G))
    return {"means": np.array(means), "shares": np.array(shares)}


def k_means(x, K, rng, rounds=20):
    """The means of K groups of images: (N, H, W, 1) -> (K, H, W, 1).

    Each image is in the group whose mean is nearest, by squared distance of pixels. Then each mean is recomputed, and
    so on. Both steps can only lower the sum of the squared distances (Lloyd 1982).
    """
    means = x[rng.choice(len(x), K, replace=len(x) < K)]
    for _ in range(rounds):
        members = nearest(means, x)[:, None] == np.arange(K)  # (N, K)
        size = members.sum(axis=0).reshape(-1, 1, 1, 1)
        sums = np.tensordot(members.astype(np.float32), x, axes=(0, 0))
        means = np.where(size > 0, sums / np.maximum(size, 1), means).astype(np.float32)  # an empty one stays
    return means


def nearest(means, x):
    """The number of the mean that is nearest to each image: (K, H, W, 1), (N, H, W, 1) -> (N,)."""
    means = means.reshape(len(means), -1)
    # ||x - m||^2 = ||x||^2 - 2 (x . m - ||m||^2 / 2)
    return (x.reshape(-1, means.shape[1]) @ means.T - (means**2).sum(axis=1) / 2).argmax(axis=1)
