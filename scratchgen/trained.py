"""A trained model as an object with methods: where a notebook starts.

    from scratchgen.trained import load_run  # before NumPy: sets NumPy's threads
    import numpy as np

    model = load_run("runs/ddpm")  # or load_trained("ddpm"), with the weights of the package
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

IMPORTANCE = 102  # a purpose for `rng_for`; its number differs from those in `run` and `reports`


class VAE:
    """A trained VAE. ``config`` are its run's settings, ``arrays["params"]`` its weights, ``log`` rows of log.csv."""

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
        """Images decoded from z ~ N(0, I): (N, H, W, 1) in [0, 1]. Without ``rng`` they are different each time."""
        rng = rng or np.random.default_rng()
        return self.generate(rng.standard_normal((N, self.config["latent_dim"]), dtype=np.float32))

    def generate(self, z):
        """Images decoded from codes (N, D): (N, H, W, 1) in [0, 1]."""
        return vae.generate(self.decode, z)

    def importance_weighted_bound(self, x, K, seed, ranks):
        """The mean of `vae.importance_weighted_bound` over images x, in nats per image, computed by all ranks."""

        def bound(x, image):
            rngs = [rng_for(seed, IMPORTANCE, n) for n in image]
            return vae.importance_weighted_bound(self.encode, self.decode, x, K, rngs)

        return float(over_images(bound, [x, np.arange(len(x))], 8, ranks, f"IWAE, K = {K}").mean())


class DDPM:
    """A trained diffusion model. ``config`` has the settings of its run, ``log`` the rows of log.csv. ``arrays["ema"]``
    is the moving average of its weights; with "guide", ``arrays["early"]`` is that average early in training.

    Images x_0 are (N, H, W, 1) in [-1, 1], and so are x_t but for their noise; t is (N,) in 1..T. ``groups``, (N,),
    come from `groups_of` (-1: no group); they are None for a model without groups. Drawing needs no groups, at most
    class labels.
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
        """The group of each image, (N,), an input of the network in training; ``labels`` are the images' classes."""
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
        """A SamplerConfig with the ``chosen`` fields; a field that is None gets its default. Raises UserError.

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
        """Returns the SamplerConfig. Raises UserError if this model cannot draw with it."""
        samplers.timesteps(self.config["T"], config.steps)
        if config.guidance and config.guide == "early" and self.early is None:
            raise UserError("expected no guidance, this run was trained without the addition guide")
        if config.guide == "unlabelled" and self.groups is None:
            raise UserError("expected no guide without labels, this run was trained without labels or groups")
        return config

    def trajectory(self, x_T, rng, labels=None, config=None):
        """Sample from the noise x_T, (N, H, W, 1): yield (s, x_s) for each time s that the sampler visits after T.

        ``labels`` are as in `labels_for`; ``config`` is a SamplerConfig, by default `sampler_config()`. Images at s = 0
        may lie slightly outside [-1, 1]. Raises UserError.
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
        """N images, scaled and clipped to [0, 1], from noise that ``rng`` draws: (N, H, W, 1). ``labels`` and
        ``config`` are as in `trajectory`. Without ``rng`` the images are different each time."""
        rng = rng or np.random.default_rng()
        x_T = rng.standard_normal((N, 28, 28, 1), dtype=np.float32)
        *_, (_, x_0) = self.trajectory(x_T, rng, labels, config)
        return np.clip((x_0 + 1) / 2, 0, 1)


def labels_for(N, labels, classes):
    """The labels of N images to draw, (N,), from class numbers or names (-1: no class), one for each or one for all.

    With ``labels=None`` the classes take turns. The result is None for a model trained without ``classes``. Raises
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
    """The folder of a run, from the path of the folder or of its checkpoint."""
    path = Path(path)
    return path.parent if path.name == "checkpoint.npz" else path


def load_run(folder):
    """The VAE or DDPM of a run; ``folder`` is its folder or the path of its checkpoint. Raises CheckpointError."""
    path = run_folder(folder) / "checkpoint.npz"
    named, state = checkpoint.load(path)
    config = state["config"]
    if config["model"] not in MODELS:
        raise checkpoint.CheckpointError(f"{path}: expected a run of run_vae.py or run_ddpm.py, found another")
    if not state["log"]:
        raise checkpoint.CheckpointError(f"{path}: expected a trained model, found one in its first epoch")
    if config.get("classes") and "groups/shares" not in named:  # labels would be ignored
        raise checkpoint.CheckpointError(f"{path}: expected a run of this version, found an older one")
    return MODELS[config["model"]](config, tree.nested(named), state["log"])


def load_trained(name):
    """A model with weights from the package; ``name`` is one of WEIGHTS. Raises UserError.

    The weights are those of the default runs of seed 0, rounded to take a sixth of the space (docs/pack.py): to
    float16, and in large matrices to integers times one scale for each column.
    """
    if name not in WEIGHTS:
        raise UserError(f"{name}: expected one of {', '.join(WEIGHTS)}")
    arrays, state = checkpoint.load(WEIGHTS[name])
    named = {
        place: array.astype(np.float32) * np.float32(arrays.get(f"{place}/scale", 1))
        for place, array in arrays.items()
        if place.rpartition("/")[0] not in arrays  # otherwise it is the scale of that array
    }
    return MODELS[state["config"]["model"]](state["config"], tree.nested(named))


# ----------------------------------------------------------------------------------------------------------------- draw

SHARD = 32  # images that one rank draws at a time; with 16 drawing takes 1.1 times as long


def draw(model, N, seed, ranks, labels=None, description="samples", **options):
    """N samples of a model as grey levels, uint8 (N, 28, 28, 1), drawn by all ranks; ``options`` go to its ``sample``.

    For one seed the first images do not depend on N, because the last shard is drawn whole, too. Their x_T does not
    depend on the sampler.
    """
    labels = labels_for(N, labels, model.config.get("classes"))

    def from_shard(numbers):
        rng = rng_for(seed, SAMPLES, numbers[0])
        of_shard = {} if labels is None else {"labels": np.resize(labels[numbers[0] :], SHARD)}
        images = model.sample(SHARD, rng, **of_shard, **options)[: len(numbers)]
        return np.round(images * 255).astype(np.uint8)

    return over_images(from_shard, [np.arange(N)], SHARD, ranks, description)


def over_images(f, arrays, shard, ranks, description):
    """``f(*arrays)``, computed by `in_parallel` in several steps, with a progress bar."""
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
    """Add a flag for each field of a SamplerConfig: a list of values, or None if the flag is not given."""
    help = (
        "diffusion: ddpm adds noise at each step, ddim none; sde-dpm++ and dpm++ are their second-order versions, for "
        "few steps (default: sde-dpm++, 20 steps, guided; T steps of ddpm for a run without additions)"
    )
    parser.flag("--sampler", help, choices=SAMPLERS, nargs=nargs, metavar="NAME")
    help = "diffusion: the number of sampling steps, at most T (default: T if --sampler is given)"
    parser.flag("--steps", help, type=cli.number(int, 1), nargs=nargs, metavar="S")
    help = "diffusion: w, how far to extrapolate away from the guide (default: 0 if --sampler is given)"
    parser.flag("--guidance", help, type=cli.number(float, 0, high=100), nargs=nargs, metavar="W")
    help = "diffusion: the guide; early: the network early in training, unlabelled: without labels (default: early)"
    parser.flag("--guide", help, choices=GUIDES, nargs=nargs, metavar="NAME")


def sampler_configs(model, args):
    """One SamplerConfig for each combination of the flags' values. Raises UserError."""
    configs = {}  # by name: with w = 0, configs that differ only in the guide are the same
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
