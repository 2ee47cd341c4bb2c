"""Measure a finished run from its checkpoint: bounds on the likelihood, and the
distance between its samples and real images.

examples: (in front of each comes python -m scratchgen.evaluate)
  runs/vae                       KL of each latent dimension, how many are used
  runs/vae --iwae 500            a tighter bound than the ELBO
  runs/ddpm                      the variational bound in bits per dimension
  runs/ddpm --bound 100          its exact sum over t, on 100 images
  runs/ddpm --frechet 10000      Frechet distance, precision, recall, classes
  runs/ddpm --frechet 10000 --draws 3               how much draws differ
  runs/ddpm --frechet 10000 --guidance 0 0.25 0.5   one row for each w
  runs/ddpm --frechet 10000 --sampler ddpm ddim --steps 20 50   all pairs

Results are printed, and written to the run's folder: numbers under "evaluation"
in metrics.json, and figures.
"""

from scratchgen.data import first_images, load_fashion_mnist
from scratchgen.evaluate.reports import Report, measure_bound, measure_samples, measure_vae
from scratchgen.machinery import cli, files
from scratchgen.machinery.checkpoint import fingerprint
from scratchgen.machinery.parallel import ranks_for
from scratchgen.trained import CONFIG, VAE, add_sampler_flags, load_run, refuse, run_folder, sampler_configs


def parse_arguments(argv):
    parser = cli.OneLineParser("python -m scratchgen.evaluate", __doc__)
    parser.flag("run", "the --out of a run script, with checkpoint.npz in it", type=run_folder, metavar="RUN_FOLDER")
    help = "VAE: the importance-weighted bound of all test images, with K samples each"
    parser.flag("--iwae", help, type=cli.number(int, 1), metavar="K")
    help = "diffusion: the bound as the exact sum over all t, on the first N test images"
    parser.flag("--bound", help, type=cli.number(int, 2), metavar="N")
    help = (
        "Frechet distance from N samples to all test images, precision and recall (k = 3), and the samples' classes by "
        "a classifier; the same for N training images and N samples of a VAE"
    )
    parser.flag("--frechet", help, type=cli.number(int, 4), metavar="N")
    help = "with --frechet: the number of draws, with noise of seed, seed + 1, .. (default: 1)"
    parser.flag("--draws", help, type=cli.number(int, 1), metavar="D")
    add_sampler_flags(parser, nargs="+")
    help = "the VAE run that --frechet compares a diffusion model with (default: vae beside it)"
    parser.flag("--vae", help, type=run_folder, metavar="FOLDER")
    parser.flag("--seed", "decides every random number", type=cli.number(int, 0), default=0)
    cli.add_data_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    model = load_run(args.run)
    with files.holding(args.run):
        measure(args, model)


def measure(args, model):
    is_vae = isinstance(model, VAE)
    of_samples = [*CONFIG, "vae"]
    if is_vae:
        refuse(args, ["bound", *of_samples], "a diffusion model")
    else:
        refuse(args, ["iwae"], "a VAE")
    for name in [*of_samples, "draws"]:
        if getattr(args, name) and not args.frechet:
            raise cli.UsageError(f"--{name} needs --frechet")
    configs = [] if is_vae else sampler_configs(model, args)
    data = load_fashion_mnist(args.data, labels=model.config.get("classes", False))
    check_data(args.run, model, data, args)
    peer = None
    if args.frechet and not is_vae:
        folder = args.vae or args.run.resolve().parent / "vae"
        peer = load_run(folder) if (folder / "checkpoint.npz").exists() else None
        if not isinstance(peer, VAE):
            raise cli.UsageError(f"{folder}: expected a run of run_vae.py to compare with; --vae names a folder")
        check_data(folder, peer, data, args)
    needed = 4 if args.frechet else 2
    if len(data["test_images"]) < needed:
        raise cli.UsageError(f"{args.data}: expected {needed} test images or more to measure with")
    first_images(data["test_images"], args.bound, "--bound")
    first_images(data["train_images"], args.frechet, "--frechet")

    report = Report(args.run, model, args.seed)
    with ranks_for(args.workers) as ranks:
        if args.iwae or args.bound or not args.frechet:
            if is_vae:
                measure_vae(report, model, data, ranks, args.iwae)
            else:
                measure_bound(report, model, data, ranks, args.bound)
        if args.frechet:
            measure_samples(report, model, data, ranks, args.frechet, args.draws or 1, configs, peer)
    if report.unwritten:
        raise report.unwritten[0]


def check_data(folder, model, data, args):
    """Raise UsageError unless these are the images (and labels) that the model was trained on, and tested with."""
    for part in ("train", "test"):
        expected = model.config[f"{part}_images"]
        first = slice(int(expected.split()[0]))  # a run may have been trained on the first images only
        labels = data[f"{part}_labels"][first] if model.config.get("classes") else None
        if fingerprint([data[f"{part}_images"][first], labels]) != expected:
            raise cli.UsageError(
                f"{folder} was trained on other images than those in {args.data}, or tested on others; "
                "--data names their folder"
            )


if __name__ == "__main__":
    cli.run(main, "stopped: what was measured before is in metrics.json")
