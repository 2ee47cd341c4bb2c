"""Draw images with a trained model: one of those that came with the package, or
a run of your own.

examples: (in front of each comes python -m scratchgen.draw)
  (nothing)                          64 garments of the diffusion model
  --model vae                        ... of the variational autoencoder
  --class boot                       64 boots
  --class coat 3                     32 coats, and 32 of class 3, dresses
  --class bag --guidance 2 --guide unlabelled     clearer, less diverse
  --sampler ddpm                     Algorithm 2 of Ho et al., all T steps
  runs/ddpm --seed 1                 from the checkpoint of your own run
  runs/ddpm -n 10000 --samples       for a metric of your own
"""

import argparse
import math
from pathlib import Path

from scratchgen import plots
from scratchgen.data import NUMBERED_CLASSES, UserError, class_number
from scratchgen.machinery import cli, files
from scratchgen.machinery.parallel import ranks_for
from scratchgen.trained import (
    CONFIG,
    VAE,
    add_sampler_flags,
    draw,
    load_run,
    load_trained,
    refuse,
    run_folder,
    sampler_configs,
)

import numpy as np

SHOWN = 400  # images in the figure, at most


def a_class(text):
    """An argparse type: a class by its name or its number."""
    try:
        return class_number(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(error) from None


def parse_arguments(argv):
    parser = cli.OneLineParser("python -m scratchgen.draw", __doc__)
    help = "the --out of a run script (default: weights of the package)"
    parser.flag("run", help, type=run_folder, nargs="?", metavar="RUN_FOLDER")
    parser.flag("--model", "which weights of the package (default: ddpm)", choices=["vae", "ddpm"])
    help = f"diffusion: what to draw, by name or number, if the run was trained with --classes: {NUMBERED_CLASSES}"
    parser.flag("--class", help, type=a_class, nargs="+", metavar="NAME")
    add_sampler_flags(parser, nargs=1)
    parser.flag("--seed", "decides every random number", type=cli.number(int, 0), default=0)
    parser.flag("-n", "how many images", type=cli.number(int, 1), default=64, metavar="N")
    parser.flag("--out", "the figure", type=Path, default=Path("drawn.png"), metavar="FILE")
    parser.flag("--samples", "also write the images, uint8 (N, 28, 28), as .npz beside the figure", action="store_true")
    cli.add_workers_flag(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.run and args.model:
        raise cli.UsageError(f"--model is for the weights of the package, and {args.run} has its own")
    if args.n < len(getattr(args, "class") or ()):
        raise cli.UsageError(f"-n {args.n}: expected an image or more for each class")
    plots.check_figure(args.out)
    if args.samples:
        files.check_output(args.out.with_suffix(".npz"))
    if not args.run:
        args.model = args.model or "ddpm"
    name = "ddpm-classes" if getattr(args, "class") and args.model == "ddpm" else args.model
    model = load_run(args.run) if args.run else load_trained(name)
    title = f"seed {args.seed}"
    options = {}
    if isinstance(model, VAE):
        refuse(args, ["class", *CONFIG], "a diffusion model")
    else:
        [options["config"]] = sampler_configs(model, args)
        title = f"{options['config']}, {title}"
        if classes := getattr(args, "class"):
            options["labels"] = np.array(classes)[np.arange(args.n) * len(classes) // args.n]
    with ranks_for(args.workers) as ranks:
        images = draw(model, args.n, args.seed, ranks, **options)
    columns = math.ceil(math.sqrt(min(args.n, SHOWN)))
    shown = images[:SHOWN]
    shown = np.pad(shown, [(0, -len(shown) % columns), (0, 0), (0, 0), (0, 0)])  # the last row is black at its end
    plots.save(plots.grid(shown, columns, title, 0, 255), args.out)
    print(f"wrote {args.out}")
    if args.samples:
        save_images(args.out.with_suffix(".npz"), images[..., 0])


@files.by_rank_0
def save_images(path, images):
    with files.replacing(path) as temporary:
        np.savez(temporary, images=images)
    print(f"wrote {len(images):,} images to {path}")


if __name__ == "__main__":
    cli.run(main, "stopped: nothing was drawn")
