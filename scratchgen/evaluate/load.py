"""A finished run, loaded again as functions: where a notebook starts.

    from scratchgen.evaluate.load import load_run  # before NumPy, whose threads it sets up
    import numpy as np

    model = load_run("runs/ddpm")  # or load_trained("ddpm"), whose weights came with the package
    images = model.sample(4, np.random.default_rng(0))  # (4, 28, 28, 1) in [0, 1]

Dimensions: N images, H = W = 28, one channel; D latent dimensions; T steps from image to noise.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scratchgen import diffusion, improved, tree, vae
from scratchgen.data import CLASSES
from scratchgen.denoisers import DENOISERS
from scratchgen.diffusion import SCHEDULES, make_schedule
from scratchgen.machinery import checkpoint

import numpy as np


@dataclass(frozen=True)
class VAERun:
    """A trained VAE. ``encode`` takes images in [0, 1], (N, H, W, 1), to mu and log_var, each (N, D); ``decode`` takes
    codes (N, D) to logits (N, H, W, 1). ``config`` has the settings of the run."""

    config: dict
    params: dict = field(repr=False)
    encode: Callable = field(repr=False)
    decode: Callable = field(repr=False)

    def sample(self, N, rng):
        """Images decoded from z ~ N(0, I): (N, H, W, 1) in [0, 1]."""
        z = rng.standard_normal((N, self.config["latent_dim"]), dtype=np.float32)
        return vae.generate(self.decode, z)


@dataclass(frozen=True)
class DDPMRun:
    """A trained diffusion model. ``eps_theta`` and ``x_0_theta`` take images (N, H, W, 1) in [-1, 1] and time steps
    (N,) in 1..T to the noise, and to the clean image, that the model sees in them; ``x_0_early`` does as the model did
    early in its training (None: nobody kept that). A model of a run with --classes takes labels (N,), too."""

    config: dict
    schedule: dict = field(repr=False)
    params: dict = field(repr=False)
    eps_theta: Callable = field(repr=False)
    x_0_theta: Callable = field(repr=False)
    x_0_early: Callable | None = field(repr=False)

    def way(self, sampler=None, steps=None, guidance=None, guide="early"):
        """How to draw, (sampler, steps, w, guide). What is None is as in `improved.best_sampler` or, for a sampler that
        is named, T steps and w = 0. Raises ValueError for what this model cannot do."""
        T, additions = self.config["T"], self.config["additions"]
        default = improved.best_sampler(additions, T) if sampler is None else (sampler, T, 0.0)
        sampler, steps, w = (b if a is None else a for a, b in zip((sampler, steps, guidance), default, strict=True))
        if not 1 <= steps <= T:
            raise ValueError(f"expected 1 to T = {T} steps, found {steps}")
        if w > 0 and guide == "early" and self.x_0_early is None:
            raise ValueError("expected no guidance, this run was trained without the addition guide")
        if guide == "unlabelled" and not self.config["classes"]:
            raise ValueError("expected no guide without labels, this run was trained without --classes")
        return sampler, steps, w, guide

    def path(self, x_T, rng, labels=None, **how):
        """From the noise x_T, (N, H, W, 1), to images: yield (s, x_s) for each s after T at which the sampler stops.

        Those at the end, s = 0, may still be a little beyond [-1, 1], where `sample` clips them.
        ``labels`` are what to draw, by default of a model with classes one after the other; ``how`` is said as for
        `way`: ``sampler`` is one of `improved.SAMPLERS`, ``guidance`` the w of `improved.guided`, and ``guide`` what
        leads away from itself: "early" or "unlabelled". Raises ValueError.
        """
        T, additions, (sampler, steps, w, guide) = self.config["T"], self.config["additions"], self.way(**how)
        if labels is not None and not self.config["classes"]:
            raise ValueError("expected no labels, this run was trained without --classes")
        if self.config["classes"] and labels is None:
            labels = np.arange(len(x_T)) % len(CLASSES)
        labels = [] if labels is None else [labels]
        eps_theta, x_0_theta = (improved.told(f, *labels) for f in (self.eps_theta, self.x_0_theta))
        if (sampler, steps, w) == ("ddpm", T, 0) and "v" not in additions:
            return diffusion.sample(eps_theta, self.schedule, x_T, rng)  # the paper's; with v see `improved.x_0_from_v`
        if w > 0:
            nobody = [np.full(len(x_T), -1)]
            other = (self.x_0_early, labels) if guide == "early" else (self.x_0_theta, nobody)
            x_0_theta = improved.guided(x_0_theta, improved.told(other[0], *other[1]), w)
        return improved.sample(x_0_theta, self.schedule, x_T, rng, steps, *improved.SAMPLERS[sampler])

    def sample(self, N, rng, labels=None, **how):
        """Images from noise that ``rng`` draws; ``how`` is said as for `path`. (N, H, W, 1), clipped to [0, 1]."""
        x_T = rng.standard_normal((N, 28, 28, 1), dtype=np.float32)
        *_, (_, x_0) = self.path(x_T, rng, labels, **how)
        return np.clip((x_0 + 1) / 2, 0, 1)


def ddpm_run(config, arrays):
    """A run with this configuration and the arrays of its checkpoint."""
    schedule, (_, network) = make_schedule(config["schedule"], config["T"]), DENOISERS[config["arch"]]
    eps_theta, x_0_theta = improved.denoiser(network, schedule, config["additions"])
    ema, early = arrays["ema"], arrays.get("early")
    x_0_early = partial(x_0_theta, early) if early else None
    return DDPMRun(config, schedule, ema, partial(eps_theta, ema), partial(x_0_theta, ema), x_0_early)


TRAINED = {name: Path(__file__).with_name(f"{name}.npz") for name in ("vae", "ddpm", "ddpm-classes")}
SETTINGS = {  # that a network is built from, as the flags allow them
    "vae": {"arch": vae.VAES.__contains__, "latent_dim": checkpoint.whole(2, 10_000)},
    "ddpm": {
        "arch": DENOISERS.__contains__,
        "T": checkpoint.whole(1, 100_000),
        "schedule": SCHEDULES.__contains__,
        "additions": lambda names: isinstance(names, list) and set(names) <= improved.ADDITIONS.keys(),
        "classes": lambda told: isinstance(told, bool),
    },
}


def load_run(folder):
    """The run in this folder: a VAERun, or a DDPMRun with the moving average of its weights. Raises CheckpointError."""
    path = Path(folder) / "checkpoint.npz"
    state = checkpoint.load_state(path)
    run, arrays = run_to_fill(state["config"], path)
    checkpoint.fill(arrays, path, constant=True)
    if not state["log"]:
        raise checkpoint.CheckpointError(f"{path}: expected a trained model, found one in its first epoch")
    return run


def load_trained(name):
    """The run whose weights came with the package: one of TRAINED. Raises CheckpointError.

    They are those of the default runs of seed 0, rounded so that they take a sixth of the space (docs/pack.py): to
    float16, and in large matrices to whole numbers times one scale for each column.
    """
    path = TRAINED[name]
    with checkpoint.opened(path), np.load(path) as file:
        run, arrays = run_to_fill(json.loads(str(file["config"])), path)
        for place, leaf in zip(tree.names(arrays), tree.leaves(arrays), strict=True):
            scale = f"{place}/scale"
            leaf[...] = file[place] * file[scale].astype(np.float32) if scale in file else file[place]
            leaf.flags.writeable = False
    return run


def run_to_fill(config, path):
    """A run with this configuration, and the tree of its arrays, to be filled. Raises CheckpointError, of ``path``."""
    rng = np.random.default_rng(0)
    try:
        checkpoint.check(config, SETTINGS.get(config["model"], {}))
        if config["model"] == "vae":
            init, encode, decode = vae.VAES[config["arch"]]
            arrays = {"params": (params := init(rng, config["latent_dim"]))}
            run = VAERun(config, params, partial(encode, params), partial(decode, params))
        elif config["model"] == "ddpm":
            init, _ = DENOISERS[config["arch"]]
            kept = ["ema", "early"] if "guide" in config["additions"] else ["ema"]
            classes = len(CLASSES) if config["classes"] else 0
            arrays = {name: improved.init_denoiser(init, rng, config["additions"], classes) for name in kept}
            run = ddpm_run(config, arrays)
        else:
            raise KeyError(f"model, {config['model']}")
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{path}: expected a run of this version, found this missing or invalid: {error}"
        ) from None
    return run, arrays
