"""Measure a finished run from its checkpoint: bounds on the likelihood, and the Frechet distance of its samples.

examples:
  python -m scratchgen.evaluate runs/vae                    KL of each latent dimension, and how many are in use
  python -m scratchgen.evaluate runs/vae --iwae 500         a tighter bound than the ELBO
  python -m scratchgen.evaluate runs/ddpm                   the variational bound in bits per dimension
  python -m scratchgen.evaluate runs/ddpm --bound 100       the same without chance in t, and its parts, on 100 images
  python -m scratchgen.evaluate runs/ddpm --frechet 2048    Frechet distance of 2048 samples (needs runs/vae too)
  python -m scratchgen.evaluate runs/ddpm --frechet 2048 --sampler ddpm ddim sde-dpm++ --sample-steps 10 20 50
  python -m scratchgen.evaluate runs/ddpm --samples 10000 --sampler sde-dpm++ --sample-steps 20

Whatever is measured appears on the screen and, under "evaluation", in metrics.json of the run's folder, where figures
go too.
"""

import argparse
from functools import partial
from pathlib import Path

from scratchgen import checkpoint, cli, vae
from scratchgen.data import load_fashion_mnist
from scratchgen.denoisers import DENOISERS
from scratchgen.measurements import SAMPLERS, measure_bound, measure_samples, measure_vae
from scratchgen.runtime import Workers

import numpy as np


def parse_arguments():
    parser = cli.OneLineParser(
        prog="python -m scratchgen.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag, whole = parser.add_argument, partial(cli.number, int)
    flag("run", type=Path, metavar="RUN_FOLDER", help="the --out of a run script, with checkpoint.npz in it")
    help = "VAE: the importance-weighted bound of all test images, with K samples each"
    flag("--iwae", type=whole(1), metavar="K", help=help)
    help = "diffusion: the bound as the exact sum over all t, on the first N test images"
    flag("--bound", type=whole(2), metavar="N", help=help)
    help = "Frechet distance from N samples to all test images, beside that of N training images and of N from a VAE"
    flag("--frechet", type=whole(2), metavar="N", help=help)
    flag("--samples", type=whole(1), metavar="N", help="write samples.npz, with images, uint8 (N, 28, 28)")
    help = (
        "diffusion: ddpm adds noise at each step, ddim none; dpm++ and sde-dpm++ are ddim and ddpm of second order, "
        "for few steps (default: ddpm)"
    )
    flag("--sampler", nargs="+", choices=SAMPLERS, help=help)
    help = "diffusion: the sampler's steps, at most T (default: T); several for a figure"
    flag("--sample-steps", type=whole(1), nargs="+", metavar="S", help=help)
    help = "the VAE run that --frechet compares a diffusion model with (default: vae beside it)"
    flag("--vae", type=Path, metavar="FOLDER", help=help)
    flag("--seed", type=whole(0), default=0, help="decides every random number (default: 0)")
    cli.add_data_flags(parser)
    return parser.parse_args()


def main():
    args = parse_arguments()
    config, params = load_run(args.run)
    is_vae = config["model"] == "vae"
    flags_of_the_other = ("bound", "sampler", "sample_steps", "vae") if is_vae else ("iwae",)
    if wrong := [name for name in flags_of_the_other if getattr(args, name)]:
        kind = "a diffusion model" if is_vae else "a VAE"
        raise cli.UsageError(f"{flag_name(wrong[0])} is for {kind}, which {args.run} is not")
    of_samples = [name for name in ("sampler", "sample_steps", "vae") if getattr(args, name)]
    if of_samples and not (args.frechet or args.samples):
        raise cli.UsageError(f"{flag_name(of_samples[0])} needs --frechet or --samples")
    args.sampler, args.sample_steps = args.sampler or ["ddpm"], args.sample_steps or [config.get("T")]
    if not is_vae and max(args.sample_steps) > config["T"]:
        raise cli.UsageError(f"--sample-steps {max(args.sample_steps)} is out of range, T is {config['T']}")
    if args.samples and len(args.sampler) * len(args.sample_steps) > 1:
        raise cli.UsageError("--samples needs one --sampler and one number of --sample-steps")
    args.vae = args.vae or args.run.resolve().parent / "vae"
    peer = load_vae(args.vae) if args.frechet and not is_vae else None
    data, workers = load_fashion_mnist(args.data), Workers(args.workers)
    check_data(args.run, config, data, args.data)
    if peer:
        check_data(args.vae, peer[0], data, args.data)
    for name, images in ("bound", data["test_images"]), ("frechet", data["train_images"]):
        if (getattr(args, name) or 0) > len(images):
            raise cli.UsageError(f"--{name} {getattr(args, name)} is out of range, there are {len(images)} images")

    if args.iwae or args.bound or not (args.frechet or args.samples):
        (measure_vae if is_vae else measure_bound)(args, config, params, data, workers)
    if args.frechet or args.samples:
        measure_samples(args, config, params, data, workers, peer)


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def check_data(run, config, data, folder):
    """Refuse to measure a model on a test set whose training set it has not seen. Raises UsageError."""
    trained_on = config["train_images"]
    first = data["train_images"][: int(trained_on.split()[0])]
    if checkpoint.fingerprint(first) != trained_on:
        raise cli.UsageError(f"{run} was trained on other images than those in {folder}; --data names their folder")


def load_vae(folder):
    """The run of a VAE in this folder, as `load_run` returns it."""
    if (folder / "checkpoint.npz").exists():
        config, params = load_run(folder)
        if config["model"] == "vae":
            return config, params
    raise cli.UsageError(f"{folder}: expected a run of run_vae.py to compare with; --vae names another folder")


def load_run(folder):
    """The configuration of the run in this folder, and the weights that count. Raises CheckpointError."""
    path = folder / "checkpoint.npz"
    arrays, state = checkpoint.load(path)
    config, rng = state["config"], np.random.default_rng(0)
    try:
        name = {"vae": "best" if config.get("hold_out") else "params", "ddpm": "ema"}[config["model"]]
        if config["model"] == "vae":
            params = vae.VAES[config["arch"]][0](rng, config["latent_dim"])
        else:
            params = DENOISERS[config["arch"]][0](rng)
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path}: expected a run of this version, found no sound {error}") from None
    checkpoint.fill({name: params}, arrays, path)
    if not state["log"]:
        raise checkpoint.CheckpointError(f"{path}: expected a trained model, found one in its first epoch")
    return config, params


if __name__ == "__main__":
    cli.run(main, "stopped: what was measured before is in metrics.json")
