"""Climb from the paper to the default, one addition at a time: train each rung, measure it, and show its samples.

For each rung this runs, from the folder of the run scripts (here for the third, which is runs/ladder-2):
  python run_ddpm.py --T 200 --additions v black --out runs/ladder-2
  python -m scratchgen.evaluate runs/ladder-2 --bound 100 --frechet 10000 --sampler sde-dpm++ --sample-steps 20

A finished rung is not trained again, and one that was stopped is resumed; `python run_vae.py` must have been run. An
hour and a half or so on two cores. Prints the table of quality.md, and writes ddpm_ladder.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from scratchgen import improved  # before NumPy, whose threads it sets up
from scratchgen.evaluate.load import load_run
from scratchgen.machinery import cli, plots

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNGS = [list(improved.ADDITIONS)[:count] for count in range(len(improved.ADDITIONS) + 1)]
PEERS = {"samples of the VAE": "VAE", "training images": "training images"}
FRECHET = ["--frechet", "10000", "--sampler", "sde-dpm++", "--sample-steps", "20"]


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.OneLineParser("docs/ladder.py", description=__doc__, formatter_class=formatter)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    parser.flag("--figure", "where the figure goes", type=Path, default=ROOT / "docs" / "figures" / "ddpm_ladder.png")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    if not (args.runs / "vae" / "checkpoint.npz").exists():
        raise cli.UsageError(f"{args.runs / 'vae'}: expected a finished run of run_vae.py to compare with")
    more = ["--data", args.data.resolve(), "--workers", args.workers]
    rows, images, labels = [], [], []
    for number, additions in enumerate(RUNGS):
        folder = args.runs.resolve() / f"ladder-{number}"
        train = [ROOT / "run_ddpm.py", "--T", 200, "--additions", *(additions or ["none"]), "--out", folder, *more]
        if not (folder / "metrics.json").exists():
            run(*train, *(["--resume"] if (folder / "checkpoint.npz").exists() else []))
        rung = load_run(folder)
        expected = {"additions": additions, "T": 200, "epochs": 8, "lr": 1e-2, "seed": 0}
        if other := [name for name, value in expected.items() if rung.config[name] != value]:
            raise cli.UsageError(f"{folder}: expected the run of this rung, found one with another {other[0]}")
        bound, frechet = measured(folder)
        if "sde-dpm++, 20 steps" not in frechet or not bound:
            run("-m", "scratchgen.evaluate", folder, "--bound", 100, *FRECHET, *more)
            bound, frechet = measured(folder)

        test_loss = json.loads((folder / "metrics.json").read_text())["test_loss"]
        command = f"python run_ddpm.py --T 200 --additions {' '.join(additions) or 'none'} --out runs/ladder-{number}"
        numbers = f"{test_loss:.4f} | {bound['bits_per_dimension']:.2f} | {frechet['sde-dpm++, 20 steps']:.1f}"
        rows.append(f"| `{command}` | {numbers} |")
        images.append(rung.sample(10, np.random.default_rng(0)))  # for each rung from the same noise
        labels.append(f"+ {additions[-1]}" if additions else "none")
    rows += [f"| 10,000 {name} | | | {frechet[key]:.1f} |" for name, key in PEERS.items()]
    print("| command | test loss | bits per dimension | Frechet distance |", "|---|---|---|---|", sep="\n")
    print(*rows, sep="\n")
    figure = plots.grid(np.concatenate(images), 10, "samples after 200 steps, by additions", row_labels=labels)
    plots.save(figure, args.figure)


def run(*command):
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has been told, too, and saves what it has
        raise
    if status:
        sys.exit(status)  # it has said what is wrong


def measured(folder):
    """What metrics.json has of this rung's bound and Frechet distances: two dicts, empty for what is not there."""
    evaluation = json.loads((folder / "metrics.json").read_text()).get("evaluation", {})
    return evaluation.get("bound_exact_100", {}), evaluation.get("frechet_10000", {})


if __name__ == "__main__":
    cli.run(main, "stopped: the same command goes on from here")
