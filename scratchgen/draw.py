"""Draw images with a trained model: one of those that came with the package, or a run of your own.

examples:
  python -m scratchgen.draw                         64 garments of the diffusion model
  python -m scratchgen.draw --model vae             ... of the variational autoencoder
  python -m scratchgen.draw --class boot            64 boots
  python -m scratchgen.draw --class coat 3          32 coats, and 32 of class 3, dresses
  python -m scratchgen.draw --class bag --guidance 2       clearer, and more alike
  python -m scratchgen.draw --sampler ddpm          Algorithm 2 of Ho et al., one step after the other, unguided
  python -m scratchgen.draw runs/ddpm --seed 1      from the checkpoint of your own run
  python -m scratchgen.draw runs/ddpm -n 10000 --samples   for a metric of your own

Classes: {classes}.
"""

import argparse
import math
from pathlib import Path

from scratchgen.data import CLASSES
from scratchgen.evaluate.load import VAERun, load_run, load_trained
from scratchgen.evaluate.samples import draw, save_images
from scratchgen.improved import SAMPLERS
from scratchgen.machinery import cli, plots
from scratchgen.machinery.parallel import ranks_for

import numpy as np

SHOWN = 400  # images in the figure, at most


def a_class(text):
    """An argparse type: a class by its name or its number."""
    names = {name.lower(): label for label, name in enumerate(CLASSES)}
    names |= {str(label): label for label in names.values()}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(CLASSES)}, or its number")
    return names[text.lower()]


def parse_arguments(argv):
    prog, formatter = "python -m scratchgen.draw", argparse.RawDescriptionHelpFormatter
    classes = ", ".join(f"{label} {name}" for label, name in enumerate(CLASSES))
    parser = cli.OneLineParser(prog, description=__doc__.format(classes=classes), formatter_class=formatter)
    flag, whole = parser.flag, cli.number(int, 1)
    help = "the --out of a run script (default: weights of the package)"
    flag("run", help, type=Path, nargs="?", metavar="RUN_FOLDER")
    flag("--model", "which weights of the package (default: ddpm)", choices=["vae", "ddpm"])
    help = "diffusion: what to draw, by name or number; of a run of your own, if it was trained with --classes"
    flag("--class", help, type=a_class, nargs="+", metavar="NAME", dest="classes")
    help = "diffusion: w, how far to go away from the guide (default: 0.5, and 0 for a --sampler that is named)"
    flag("--guidance", help, type=cli.number(float, 0, high=100), metavar="W")
    help = "diffusion: ddpm, ddim, or of second order dpm++, sde-dpm++ (default: sde-dpm++; ddpm without additions)"
    flag("--sampler", help, choices=SAMPLERS)
    help = "diffusion: of the sampler (default: 20, and T for a --sampler that is named)"
    flag("--steps", help, type=whole, metavar="S")
    flag("--seed", "decides every random number", type=cli.number(int, 0), default=0)
    flag("-n", "how many images", type=whole, default=64, metavar="N")
    flag("--out", "the figure", type=Path, default=Path("drawn.png"), metavar="FILE")
    flag("--samples", "write the images, too, uint8 (N, 28, 28), as .npz beside the figure", action="store_true")
    cli.add_workers_flag(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.run and args.model:
        raise cli.UsageError(f"--model is for the weights of the package, and {args.run} has its own")
    name = args.model or "ddpm"
    trained = "ddpm-classes" if args.classes and name == "ddpm" else name
    model = load_run(args.run) if args.run else load_trained(trained)
    how = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    source, title = args.run or f"the {name} of the package", f"seed {args.seed}"
    if isinstance(model, VAERun):
        if wrong := [flag for flag in ("classes", *how) if getattr(args, flag) is not None]:
            flag = wrong[0].replace("classes", "class")
            raise cli.UsageError(f"--{flag} is for a diffusion model, which {source} is not")
        how = {}
    else:
        if args.classes and not model.config["classes"]:
            raise cli.UsageError(f"--class: {source} was trained without --classes")
        try:
            sampler, steps, w, _ = model.way(**how)
        except ValueError as error:
            raise cli.UsageError(f"{source}: {error}") from None
        title = f"{sampler}, {steps} steps" + (f", w = {w:g}" if w else "") + f", {title}"

    labels = None if args.classes is None else np.array(args.classes)[np.arange(args.n) * len(args.classes) // args.n]
    with ranks_for(args.workers) as ranks:
        images = draw(model, args.n, args.seed, ranks, labels, **how)
    shown, columns = images[:SHOWN], math.ceil(math.sqrt(min(args.n, SHOWN)))
    shown = np.pad(shown, [(0, -len(shown) % columns), (0, 0), (0, 0), (0, 0)])  # the last row is black at its end
    plots.save(plots.grid(shown, columns, title, 0, 255), args.out)
    print(f"wrote {args.out}")
    if args.samples:
        save_images(args.out.with_suffix(".npz"), images[..., 0])


if __name__ == "__main__":
    cli.run(main, "stopped: nothing was drawn")
