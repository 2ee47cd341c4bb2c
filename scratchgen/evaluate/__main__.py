"""Measure a finished run from its checkpoint: bounds on the likelihood, and how far its samples are from real images.

examples:
  python -m scratchgen.evaluate runs/vae                    KL of each latent dimension, and how many are in use
  python -m scratchgen.evaluate runs/vae --iwae 500         a tighter bound than the ELBO
  python -m scratchgen.evaluate runs/ddpm                   the variational bound in bits per dimension
  python -m scratchgen.evaluate runs/ddpm --bound 100       the same without chance in t, and its parts, on 100 images
  python -m scratchgen.evaluate runs/ddpm --frechet 10000   Frechet distance, precision, recall, and a table by class
  python -m scratchgen.evaluate runs/ddpm --frechet 10000 --draws 3                   ... and how far draws differ
  python -m scratchgen.evaluate runs/ddpm --frechet 10000 --guidance 0 0.25 0.5 1     ... against w, with a figure
  python -m scratchgen.evaluate runs/ddpm --frechet 10000 --sampler ddpm ddim sde-dpm++ --sample-steps 10 20 50

Whatever is measured appears on the screen and, under "evaluation", in metrics.json of the run's folder, where figures
go too.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

from scratchgen.data import load_fashion_mnist
from scratchgen.evaluate.load import VAERun, load_run
from scratchgen.evaluate.reports import measure_bound, measure_samples, measure_vae
from scratchgen.improved import SAMPLERS
from scratchgen.machinery import cli, files
from scratchgen.machinery.checkpoint import fingerprint
from scratchgen.machinery.parallel import ranks_for


def parse_arguments(argv):
    prog, formatter = "python -m scratchgen.evaluate", argparse.RawDescriptionHelpFormatter
    parser = cli.OneLineParser(prog, description=__doc__, formatter_class=formatter)
    flag, whole = parser.flag, partial(cli.number, int)
    flag("run", "the --out of a run script, with checkpoint.npz in it", type=Path, metavar="RUN_FOLDER")
    help = "VAE: the importance-weighted bound of all test images, with K samples each"
    flag("--iwae", help, type=whole(1), metavar="K")
    help = "diffusion: the bound as the exact sum over all t, on the first N test images"
    flag("--bound", help, type=whole(2), metavar="N")
    help = (
        "Frechet distance from N samples to all test images, precision and recall (k = 3), and what a classifier takes "
        "them for, all beside N training images and N samples of a VAE"
    )
    flag("--frechet", help, type=whole(4), metavar="N")
    flag("--draws", "draw that often, with the noise of seed, seed + 1, ..", type=whole(1), default=1, metavar="D")
    help = (
        "diffusion: ddpm adds noise at each step, ddim none; dpm++ and sde-dpm++ are ddim and ddpm of second order, "
        "for few steps (default: sde-dpm++, 20 steps, guided; T steps of ddpm for a run without additions)"
    )
    flag("--sampler", help, nargs="+", choices=SAMPLERS)
    help = "diffusion: the sampler's steps, at most T (default: T for a --sampler that is named); several for a figure"
    flag("--sample-steps", help, type=whole(1), nargs="+", metavar="S")
    help = (
        "diffusion: how far to go away from the guide (default: 0 for a --sampler that is named); several for a figure"
    )
    flag("--guidance", help, type=cli.number(float, 0, high=100), nargs="+", metavar="W")
    help = (
        "diffusion: the guide is the network early in its training or, with --classes, without labels (default: early)"
    )
    flag("--guide", help, nargs="+", choices=["early", "unlabelled"])
    help = "the VAE run that --frechet compares a diffusion model with (default: vae beside it)"
    flag("--vae", help, type=Path, metavar="FOLDER")
    flag("--seed", "decides every random number", type=whole(0), default=0)
    cli.add_data_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    with files.holding(args.run):
        measure(args)


def measure(args):
    model, args.unwritten = load_run(args.run), []
    is_vae = isinstance(model, VAERun)
    of_sampler = ("sampler", "sample_steps", "guidance", "guide", "vae")
    flags_of_the_other = ("bound", *of_sampler) if is_vae else ("iwae",)
    if wrong := [name for name in flags_of_the_other if getattr(args, name)]:
        kind = "a diffusion model" if is_vae else "a VAE"
        raise cli.UsageError(f"{flag_name(wrong[0])} is for {kind}, which {args.run} is not")
    of_samples = [name for name in of_sampler if getattr(args, name)]
    if of_samples and not args.frechet:
        raise cli.UsageError(f"{flag_name(of_samples[0])} needs --frechet")
    args.ways = {"VAE": {}} if is_vae else ways_to_draw(args, model)
    args.vae = args.vae or args.run.resolve().parent / "vae"
    peer = load_vae(args.vae) if args.frechet and not is_vae else None
    data = load_fashion_mnist(args.data, labels=model.config.get("classes", False))
    check_data(args.run, model, data, args.data)
    if peer:
        check_data(args.vae, peer, data, args.data)
    for name, images in ("bound", data["test_images"]), ("frechet", data["train_images"]):
        if (getattr(args, name) or 0) > len(images):
            raise cli.UsageError(f"--{name} {getattr(args, name)} is out of range, there are {len(images)} images")

    with ranks_for(args.workers) as ranks:
        if args.iwae or args.bound or not args.frechet:
            (measure_vae if is_vae else measure_bound)(args, model, data, ranks)
        if args.frechet:
            measure_samples(args, model, data, ranks, peer)
    if args.unwritten:
        raise args.unwritten[0]


def ways_to_draw(args, model):
    """{name: settings of `DDPMRun.path`}, one for each combination of the flags. Raises UsageError."""
    ways, guides = {}, args.guide or ["early"]
    flags = [args.sampler or [None], args.sample_steps or [None], args.guidance or [None], guides]
    for flags_of_one in itertools.product(*flags):
        try:
            sampler, steps, w, guide = model.way(*flags_of_one)
        except ValueError as error:
            raise cli.UsageError(f"{args.run}: {error}") from None
        name = f"{sampler}, {steps} steps" + (f", w = {w:g}" if w else "") + (f", {guide}" if len(guides) > 1 else "")
        ways[name] = {"sampler": sampler, "steps": steps, "guidance": w, "guide": guide}
    return ways


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def check_data(folder, model, data, data_folder):
    """Raise UsageError unless these are the images (and labels) that the model was trained on, and tested with."""
    config = model.config
    count, kinds = int(config["train_images"].split()[0]), ["images", "labels"][: 1 + config.get("classes", False)]
    train, test = (
        fingerprint([data[f"{part}_{kind}"][:n] for kind in kinds]) for part, n in (("train", count), ("test", None))
    )
    if (train, test) != (config["train_images"], config["test_images"]):
        raise cli.UsageError(
            f"{folder} was trained on other images than those in {data_folder}, or tested on others; "
            "--data names their folder"
        )


def load_vae(folder):
    """The run of a VAE in this folder. Raises UsageError if there is none."""
    if (folder / "checkpoint.npz").exists() and isinstance(run := load_run(folder), VAERun):
        return run
    raise cli.UsageError(f"{folder}: expected a run of run_vae.py to compare with; --vae names another folder")


if __name__ == "__main__":
    cli.run(main, "stopped: what was measured before is in metrics.json")
