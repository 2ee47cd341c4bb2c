"""The ablation: from the paper to the default, one addition at a time, each
trained three times and measured.

For each row and seed this runs, from the folder of the run scripts (here for
the third, with seed 1):
  python run_ddpm.py --T 200 --batch-size 64 --additions v black --seed 1
      --out runs/ablation-2-1
  python -m scratchgen.evaluate runs/ablation-2-1 --bound 100 --frechet 10000
      --sampler sde-dpm++ --steps 20

The addition guide changes no training: the sixth run is measured without and
with it. The seventh has minibatches of 128 images, and the eighth, with groups,
is the default run. A finished run is not trained again, and one that was
stopped is resumed; `python run_vae.py` must have been run. Five hours or so on
two cores. Prints the table of quality.md, the mean over the seeds and how far
they differ, and writes ddpm_ablation.png.
"""

import subprocess
import sys
from pathlib import Path

from scratchgen import improved, plots  # before NumPy, whose threads it sets up
from scratchgen.machinery import cli, files
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TRAINED = [list(improved.ADDITIONS)[:count] for count in (0, 1, 2, 3, 4, 6, 6, 7)]
BATCH_SIZE = [64, 64, 64, 64, 64, 64, 128, 128]
UNGUIDED = SamplerConfig("sde-dpm++", 20)
GUIDED = SamplerConfig("sde-dpm++", 20, improved.GUIDANCE)
COLUMNS = ("test loss", "bits per dimension", "Frechet distance", "precision", "recall")


def main(argv=None):
    parser = cli.OneLineParser("docs/ablation.py", __doc__)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    parser.flag("--figure", "where the figure goes", type=Path, default=ROOT / "docs" / "figures" / "ddpm_ablation.png")
    parser.flag("--seeds", "train each row with these", type=cli.number(int, 0), nargs="+", default=[0, 1, 2])
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    plots.check_figure(args.figure)
    args.runs = args.runs.resolve()  # the scripts are started from another folder
    if not (args.runs / "vae" / "checkpoint.npz").exists():
        raise cli.UsageError(f"{args.runs / 'vae'}: expected a finished run of run_vae.py to compare with")
    measured = {}  # (row, seed) -> what metrics.json has
    for seed in args.seeds:  # whoever stops early has all rows of the first seeds
        for number in range(len(TRAINED)):
            measured[number, seed] = train_and_measure(args, number, seed)

    *names, last = ["none", *(f"+ {name}" for name in improved.ADDITIONS)]
    names += ["+ batch of 128", last]
    drawn = [*((number, UNGUIDED) for number in range(6)), (5, GUIDED), (6, GUIDED), (7, GUIDED)]
    rows = [[numbers_of(measured[number, seed], config) for seed in args.seeds] for number, config in drawn]
    print(f"| additions | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|", sep="\n")
    for name, row in zip(names, rows, strict=True):
        print(f"| {name} | {' | '.join(map(mean_and_spread, zip(*row, strict=True), (4, 2, 1, 3, 3)))} |")
    for peer in ("VAE", "training images"):
        found = measured[0, args.seeds[0]]["evaluation"]["frechet_10000"][peer]
        print(f"| {peer} | | | {found['distance']:.1f} | {found['precision']:.3f} | {found['recall']:.3f} |")

    images = []
    for number, config in drawn:
        model = load_run(folder_of(args, number, args.seeds[0]))
        images.append(model.sample(10, np.random.default_rng(0), config=config))  # for each row from the same noise
    plots.save(plots.grid(np.concatenate(images), 10, "samples by additions", row_labels=names), args.figure)


def folder_of(args, number, seed):
    return args.runs / f"ablation-{number}-{seed}"


def train_and_measure(args, number, seed):
    """What metrics.json has of this row, trained and measured as far as it is not yet."""
    folder, more = folder_of(args, number, seed), ["--data", args.data.resolve(), "--workers", args.workers]
    additions, batch_size = TRAINED[number], BATCH_SIZE[number]
    train = [ROOT / "run_ddpm.py", "--T", 200, "--batch-size", batch_size, "--additions", *(additions or ["none"])]
    train += ["--seed", seed, "--out", folder]
    if not (folder / "metrics.json").exists():
        run(*train, *more, *(["--resume"] if (folder / "checkpoint.npz").exists() else []))
    model = load_run(folder)
    expected = {"additions": additions, "batch_size": batch_size, "T": 200, "epochs": 7, "lr": 1e-2, "seed": seed}
    expected |= {"classes": False}
    if other := [name for name, value in expected.items() if model.config[name] != value]:
        raise cli.UsageError(f"{folder}: expected the run of this row, found one with another {other[0]}")

    def metrics():
        found = files.read_metrics(path := folder / "metrics.json", model.params)
        if "test_loss" not in found:
            raise cli.UsageError(f"{path}: expected the numbers of this run; run_ddpm.py --resume writes them again")
        return found

    wanted = {str(UNGUIDED)}
    flags = ["--sampler", "sde-dpm++", "--steps", 20]
    if "guide" in additions:
        wanted.add(str(GUIDED))
        flags += ["--guidance", 0, improved.GUIDANCE]
    evaluation = metrics().get("evaluation", {})
    if not wanted <= evaluation.get("frechet_10000", {}).keys() or "bound_exact_100" not in evaluation:
        measure = ["-m", "scratchgen.evaluate", folder, "--bound", 100, "--frechet", 10000]
        run(*measure, "--vae", args.runs / "vae", *flags, *more)
    return metrics()


def numbers_of(metrics, config):
    found = metrics["evaluation"]["frechet_10000"][str(config)]
    bits = metrics["evaluation"]["bound_exact_100"]["bits_per_dimension"]
    return metrics["test_loss"], bits, found["distance"], found["precision"], found["recall"]


def mean_and_spread(values, digits):
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def run(*command):
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has been told, too, and saves what it has
        raise
    if status:
        sys.exit(status)  # it has said what is wrong


if __name__ == "__main__":
    cli.run(main, "stopped: the same command goes on from here")
