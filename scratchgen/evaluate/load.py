"""A finished run, loaded again as functions: where a notebook starts.

    from scratchgen.evaluate.load import load_run  # before NumPy, whose threads it sets up
    import numpy as np

    model = load_run("runs/ddpm")
    images = model.sample(4, np.random.default_rng(0), "sde-dpm++", 20)  # (4, 28, 28, 1) in [0, 1]

Dimensions: N images, H = W = 28, one channel; D latent dimensions; T steps from image to noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scratchgen import improved, vae
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
    (N,) in 1..T to the noise, and to the clean image, that the model sees in them."""

    config: dict
    schedule: dict = field(repr=False)
    params: dict = field(repr=False)
    eps_theta: Callable = field(repr=False)
    x_0_theta: Callable = field(repr=False)

    def sample(self, N, rng, sampler="ddpm", steps=None):
        """Images drawn by one of `improved.SAMPLERS` in this many steps (default: T): (N, H, W, 1) in [0, 1]."""
        x_T = rng.standard_normal((N, 28, 28, 1), dtype=np.float32)
        eta, order = improved.SAMPLERS[sampler]
        *_, (_, x_0) = improved.sample(self.x_0_theta, self.schedule, x_T, rng, steps, eta, order)
        return (x_0 + 1) / 2


SETTINGS = {  # that a network is built from, as the flags allow them
    "vae": {"arch": vae.VAES.__contains__, "latent_dim": checkpoint.whole(2, 10_000)},
    "ddpm": {
        "arch": DENOISERS.__contains__,
        "T": checkpoint.whole(1, 100_000),
        "schedule": SCHEDULES.__contains__,
        "additions": lambda names: isinstance(names, list) and set(names) <= improved.ADDITIONS.keys(),
    },
}


def load_run(folder):
    """The run in this folder: a VAERun, or a DDPMRun with the moving average of its weights. Raises CheckpointError."""
    path = Path(folder) / "checkpoint.npz"
    state = checkpoint.load_state(path)
    config, rng = state["config"], np.random.default_rng(0)
    try:
        checkpoint.check(config, SETTINGS.get(config["model"], {}))
        if config["model"] == "vae":
            init, encode, decode = vae.VAES[config["arch"]]
            name, params = "params", init(rng, config["latent_dim"])
            run = VAERun(config, params, partial(encode, params), partial(decode, params))
        elif config["model"] == "ddpm":
            init, network = DENOISERS[config["arch"]]
            name, params = "ema", improved.init_denoiser(init, rng, config["additions"])
            schedule = make_schedule(config["schedule"], config["T"])
            predictions = improved.denoiser(network, schedule, config["additions"])
            run = DDPMRun(config, schedule, params, *(partial(f, params) for f in predictions))
        else:
            raise KeyError(f"model, {config['model']}")
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{path}: expected a run of this version, found this missing or invalid: {error}"
        ) from None
    checkpoint.fill({name: params}, path, constant=True)  # so that workers need not look for changes
    if not state["log"]:
        raise checkpoint.CheckpointError(f"{path}: expected a trained model, found one in its first epoch")
    return run
