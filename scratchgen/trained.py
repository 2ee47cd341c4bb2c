"""A trained model as an object with methods: where a notebook starts.

    from scratchgen.trained import load_run  # before NumPy, whose threads it sets up
    import numpy as np

    model = load_run("runs/ddpm")  # or load_trained("ddpm"), whose weights came with the package
    images = model.sample(4, np.random.default_rng(0))  # (4, 28, 28, 1) in [0, 1]

Dimensions: N images, H = W = 28, one channel; D latent dimensions; T steps from image to noise.
"""

import itertools
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from scratchgen import diffusion, improved, samplers, tree, vae
from scratchgen.data import CLASSES, UserError, class_number
from scratchgen.denoisers import DENOISERS
from scratchgen.machinery import checkpoint, cli
from scratchgen.machinery.parallel import images_of, in_parallel
from scratchgen.machinery.run import SAMPLES, rng_for
from scratchgen.samplers import GUIDES, SAMPLERS, SamplerConfig

import numpy as np

IMPORTANCE = 102  # what random numbers are for: another number than those in `run` and `reports`


class VAE:
    """A trained VAE. ``config`` has the settings of its run, ``arrays`` "params", and ``log`` the rows of log.csv."""

    def __init__(self, config, arrays, log=()):
        self.config = config
        self.log = log
        self.params = arrays["params"]
        _, self.encoder, self.decoder = vae.VAES[config["arch"]]

    def encode(self, x):
        """mu and log_var of q(z | x), each (N, D), for images (N, H, W, 1) in [0, 1]. Raises UserError."""
        if np.max(x) > 1:
            raise UserError(f"expected images in [0, 1], found {np.max(x)}: scratchgen.data.scale(images, 0, 1)")
        return self.encoder(self.params, x)

    def decode(self, z):
        """The logits of the pixels, (N, H, W, 1), for codes (N, D); `generate` returns images."""
        return self.decoder(self.params, z)

    def sample(self, N, rng=None):
        """Images decoded from z ~ N(0, I): (N, H, W, 1) in [0, 1]. Without a generator ``rng`` other ones each time."""
        rng = rng or np.random.default_rng()
        return self.generate(rng.standard_normal((N, self.config["latent_dim"]), dtype=np.float32))

    def generate(self, z):
        """Images decoded from codes (N, D): (N, H, W, 1) in [0, 1]."""
        return vae.generate(self.decode, z)

    def importance_weighted_bound(self, x, K, seed, ranks):
        """`vae.importance_weighted_bound`, the mean over images x in nats per image, computed by all ranks."""

        def bound(x, image):
            rngs = [rng_for(seed, IMPORTANCE, n) for n in image]
            return vae.importance_weighted_bound(self.encode, self.decode, x, K, rngs)

        return float(over_images(bound, [x, np.arange(len(x))], 8, ranks, f"IWAE, K = {K}").mean())


class DDPM:
    """A trained diffusion model. ``config`` has the settings of its run, ``arrays`` the moving average "ema" of its
    weights and, with the addition "guide", that average as it was "early" in training; ``log`` the rows of log.csv.

    Images x_t are (N, H, W, 1) in [-1, 1], time steps t (N,) in 1..T. ``groups`` are (N,), as `groups_of` tells them
    (-1: none), and None for a model that knows of none. To draw, no more than labels of classes are needed.
    """

    def __init__(self, config, arrays, log=()):
        _, network = DENOISERS[config["arch"]]
        self.config = config
        self.log = log
        self.schedule = diffusion.make_schedule(config["schedule"], config["T"])
        self.groups = improved.Groups(**arrays["groups"]) if "groups" in arrays else None
        self.denoiser = improved.Denoiser(network, self.schedule, config["additions"], self.groups)
        self.params = arrays["ema"]
        self.early = arrays.get("early")

    def groups_of(self, x_0, labels=None):
        """The group of each image, (N,), which the network sees in training; ``labels`` are their classes."""
        return None if self.groups is None else self.groups.of(x_0, labels)

    def eps_theta(self, x_t, t, groups=None):
        """The predicted noise in x_t."""
        return self.denoiser.eps(self.params, x_t, t, groups)

    def x_0_theta(self, x_t, t, groups=None):
        """The predicted clean image."""
        return self.denoiser.x_0(self.params, x_t, t, groups)

    def x_0_guided(self, x_t, t, groups, config):
        """The predicted clean image, guided as the SamplerConfig says."""
        x_0 = self.x_0_theta(x_t, t, groups)
        if not config.guidance:
            return x_0
        if config.guide == "early":
            x_0_guide = self.denoiser.x_0(self.early, x_t, t, groups)
        else:
            x_0_guide = self.x_0_theta(x_t, t, np.full(len(x_t), -1))
        return improved.guided(x_0, x_0_guide, config.guidance)

    def sampler_config(self, **chosen):
        """A SamplerConfig with the fields that are ``chosen``; None stands for not chosen. Raises UserError.

        Defaults: second order, 20 steps, guided if there is a guide; Algorithm 2 for a run without additions; with an
        explicit sampler, T steps and no guidance.
        """
        T = self.config["T"]
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if "sampler" in chosen or not self.config["additions"]:
            default = SamplerConfig("ddpm", T)
        else:
            default = SamplerConfig("sde-dpm++", min(T, 20), 0.0 if self.early is None else improved.GUIDANCE)
        return self.checked(replace(default, **chosen))

    def checked(self, config):
        """The same SamplerConfig. Raises UserError if this model cannot draw so."""
        samplers.timesteps(self.config["T"], config.steps)
        if config.guidance and config.guide == "early" and self.early is None:
            raise UserError("expected no guidance, this run was trained without the addition guide")
        if config.guide == "unlabelled" and self.groups is None:
            raise UserError("expected no guide without labels, this run was trained without labels or groups")
        return config

    def trajectory(self, x_T, rng, labels=None, config=None):
        """From the noise x_T, (N, H, W, 1), to images: yield (s, x_s) for each s after T at which the sampler stops.

        ``labels`` are as in `labels_for`, ``config`` is a SamplerConfig, by default `sampler_config` of nothing. Images
        at s = 0 may still be a little beyond [-1, 1]. Raises UserError.
        """
        config = self.checked(config or self.sampler_config())
        labels = labels_for(len(x_T), labels, self.config["classes"])
        groups = None if self.groups is None else self.groups.draw(len(x_T), labels, rng)
        if config == SamplerConfig("ddpm", self.config["T"]) and "v" not in self.config["additions"]:
            # The paper's Algorithm 2. With "v", `samplers.sample` takes the same steps, but does not clip x_0.
            return diffusion.sample(partial(self.eps_theta, groups=groups), self.schedule, x_T, rng)
        x_0_theta = partial(self.x_0_guided, groups=groups, config=config)
        return samplers.sample(x_0_theta, self.schedule, x_T, rng, config.steps, *SAMPLERS[config.sampler])

    def sample(self, N, rng=None, labels=None, config=None):
        """Images from noise that ``rng`` draws, as in `trajectory`, but clipped to [0, 1]: (N, H, W, 1). Without a
        generator ``rng`` other ones each time."""
        rng = rng or np.random.default_rng()
        x_T = rng.standard_normal((N, 28, 28, 1), dtype=np.float32)
        *_, (_, x_0) = self.trajectory(x_T, rng, labels, config)
        return np.clip((x_0 + 1) / 2, 0, 1)


def labels_for(N, labels, classes):
    """The N labels of what to draw, (N,), from numbers or names of classes, -1 for none, or from one of these for all.

    None stands for one class after the other or, for a model that was trained without ``classes``, for None. Raises
    UserError.
    """
    if not classes:
        if labels is not None:
            raise UserError("expected no labels, this run was trained without --classes")
        return None
    if labels is None:
        return np.arange(N) % len(CLASSES)
    numbers = [-1 if str(label) == "-1" else class_number(label) for label in np.ravel(labels)]
    if len(numbers) not in (1, N):
        raise UserError(f"expected a label for each of {N} images, or one for all, found {len(numbers)}")
    return np.resize(numbers, N)


# ----------------------------------------------------------------------------------------------------------------- load

MODELS = {"vae": VAE, "ddpm": DDPM}
WEIGHTS = {name: Path(__file__).with_name("weights") / f"{name}.npz" for name in ("vae", "ddpm", "ddpm-classes")}


def run_folder(path):
    """The folder of a run, named by itself or by the checkpoint in it."""
    path = Path(path)
    return path.parent if path.name == "checkpoint.npz" else path


def load_run(folder):
    """The VAE or the DDPM that was trained in this folder, or that is this checkpoint. Raises CheckpointError."""
    path = run_folder(folder) / "checkpoint.npz"
    named, state = checkpoint.load(path)
    config = state["config"]
    if config["model"] not in MODELS:
        raise checkpoint.CheckpointError(f"{path}: expected a run of run_vae.py or run_ddpm.py, found another")
    if not state["log"]:
        raise checkpoint.CheckpointError(f"{path}: expected a trained model, found one in its first epoch")
    if config.get("classes") and "groups/shares" not in named:  # it would draw whatever it likes
        raise checkpoint.CheckpointError(f"{path}: expected a run of this version, found an older one")
    return MODELS[config["model"]](config, tree.nested(named), state["log"])


def load_trained(name):
    """The model whose weights came with the package: one of WEIGHTS. Raises UserError.

    They are those of the default runs of seed 0, rounded so that they take a sixth of the space (docs/pack.py): to
    float16, and in large matrices to whole numbers times one scale for each column.
    """
    if name not in WEIGHTS:
        raise UserError(f"{name}: expected one of {', '.join(WEIGHTS)}")
    arrays, state = checkpoint.load(WEIGHTS[name])
    named = {
        place: array.astype(np.float32) * np.float32(arrays.get(f"{place}/scale", 1))
        for place, array in arrays.items()
        if place.rpartition("/")[0] not in arrays  # or it is the scale of the array in front
    }
    return MODELS[state["config"]["model"]](state["config"], tree.nested(named))


# ----------------------------------------------------------------------------------------------------------------- draw

SHARD = 32  # images that one rank draws at a time; 16 take 1.1 times as long


def draw(model, N, seed, ranks, labels=None, description="samples", **options):
    """N samples of a model as grey levels, uint8 (N, 28, 28, 1), drawn by all ranks; ``options`` go to its ``sample``.

    For the same seed the first images are the same whatever N is, and have the same noise however they are drawn from
    it: the last shard is drawn whole, too.
    """
    labels = labels_for(N, labels, model.config.get("classes"))

    def from_shard(numbers):
        rng = rng_for(seed, SAMPLES, numbers[0])
        of_shard = {} if labels is None else {"labels": np.resize(labels[numbers[0] :], SHARD)}
        images = model.sample(SHARD, rng, **of_shard, **options)[: len(numbers)]
        return np.round(images * 255).astype(np.uint8)

    return over_images(from_shard, [np.arange(N)], SHARD, ranks, description)


def over_images(f, arrays, shard, ranks, description):
    """``f(*arrays)`` as `in_parallel` computes it, but in steps, for a progress bar."""
    in_one_step = in_parallel(f, shard, ranks)
    N = len(arrays[0])
    step = shard * ranks.count * ranks.threads
    results = []
    with cli.progress(N, description, " images") as bar:
        for start in range(0, N, step):
            results.append(in_one_step(*images_of(arrays, slice(start, start + step))))
            bar.update(len(results[-1]))
    return np.concatenate(results)


# ----------------------------------------------------------------------- flags of the programs that draw with a model

CONFIG = [field.name for field in fields(SamplerConfig)]


def add_sampler_flags(parser, nargs):
    """A flag for each field of a SamplerConfig: a list of values, or None where it is not given."""
    help = (
        "diffusion: ddpm adds noise at each step, ddim none; dpm++ and sde-dpm++ are ddim and ddpm of second order, "
        "for few steps (default: sde-dpm++, 20 steps, guided; T steps of ddpm for a run without additions)"
    )
    parser.flag("--sampler", help, choices=SAMPLERS, nargs=nargs, metavar="NAME")
    help = "diffusion: the sampler's steps, at most T (default: T for a --sampler that is named)"
    parser.flag("--steps", help, type=cli.number(int, 1), nargs=nargs, metavar="S")
    help = "diffusion: w, how far to go away from the guide (default: 0 for a --sampler that is named)"
    parser.flag("--guidance", help, type=cli.number(float, 0, high=100), nargs=nargs, metavar="W")
    help = "diffusion: the guide, the network early in its training, or unlabelled: without labels (default: early)"
    parser.flag("--guide", help, choices=GUIDES, nargs=nargs, metavar="NAME")


def sampler_configs(model, args):
    """A SamplerConfig for each combination of the values of these flags. Raises UserError."""
    configs = {}  # by their names: with w = 0 there is no guide
    for each in itertools.product(*(getattr(args, name) or [None] for name in CONFIG)):
        config = model.sampler_config(**dict(zip(CONFIG, each, strict=True)))
        configs[str(config)] = config
    if args.guide and not any(config.guidance for config in configs.values()):
        raise UserError("--guide needs a --guidance above 0")
    return list(configs.values())


def refuse(args, names, kind):
    """Raise UserError if one of these flags is given."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for {kind}, which {args.run or args.model} is not")
