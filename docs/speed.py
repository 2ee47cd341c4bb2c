"""Print how many seconds of training lead to a Frechet distance of 20, 10, 5, 3
and 2.

For each row and seed this starts, for example,
  python run_ddpm.py --T 200 --classes --seed 1 --out runs/speed-classes-1
and copies its checkpoint every 90 seconds or so, and at the end. From the
moving average of the weights in each copy it draws 10,000 samples, and measures
their distance to the test images. Time is the run's, without this drawing.

A finished run is not trained again, and a copy is not measured again. Half an
hour for a row and a seed, on two cores with nothing else to do.
"""

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scratchgen import improved, tree  # before NumPy: sets NumPy's threads
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.evaluate import classifier, metrics
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import ranks_for
from scratchgen.trained import DDPM, draw, over_images

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROWS = {  # name -> flags of run_ddpm.py
    "paper": ["--additions", "none"],
    "default": [],
    "classes": ["--classes"],
    "half": ["--epochs", "3"],
    "classes-short": ["--classes", "--epochs", "2"],
}
TARGETS = (20, 10, 5, 3, 2)
SECONDS = 90  # between two copies, at least
SHARD = 32  # images that one rank (a process) measures at a time


def main(argv=None):
    parser = cli.OneLineParser("docs/speed.py", __doc__)
    each = "; ".join(f"{name} ({' '.join(flags) or 'no flags'})" for name, flags in ROWS.items())
    parser.flag("--rows", f"which runs: {each}", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW")
    parser.flag("--seeds", "train each row with these", type=cli.number(int, 0), nargs="+", default=[0, 1, 2])
    parser.flag("--samples", "to draw from each copy", type=cli.number(int, 4), default=10_000, metavar="N")
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    args.runs = args.runs.resolve()  # the scripts are started from another folder
    copies = {(row, seed): train(args, row, seed) for seed in args.seeds for row in args.rows}

    ranks = ranks_for(args.workers)
    params = classifier.load_classifier()

    def features(images):
        return over_images(lambda x: classifier.features(params, scale(x, 0, 1)), [images], SHARD, ranks, "features")

    with ranks:
        real = features(load_fashion_mnist(args.data, labels=False)["test_images"])
        curves = {}
        for (row, seed), paths in copies.items():
            measured = [measure(path, args.samples, real, features, ranks) for path in paths]
            curves[row, seed] = [point for point in measured if point is not None]
            points = ", ".join(f"{seconds:.0f} s {distance:.2f}" for seconds, distance in curves[row, seed])
            print(f"{row}, seed {seed}: {points}")
        print(f"| row | {' | '.join(map(str, TARGETS))} | at the end |", "|---" * (2 + len(TARGETS)) + "|", sep="\n")
        for row in args.rows:
            cells = [of_seeds([seconds_to(curves[row, seed], target) for seed in args.seeds]) for target in TARGETS]
            last = [curves[row, seed][-1] for seed in args.seeds]
            ends = f"{of_seeds([distance for _, distance in last], 2)} after {of_seeds([s for s, _ in last])} s"
            print(f"| {row} | {' | '.join(cells)} | {ends} |")


def train(args, row, seed):
    """The copies of this run's checkpoints, the oldest first. Trains the model first if it is not trained yet."""
    folder = args.runs / f"speed-{row}-{seed}"
    copied = folder / "copies"
    if not (folder / "metrics.json").exists() or not copied.exists():
        command = [ROOT / "run_ddpm.py", "--T", 200, *ROWS[row], "--seed", seed, "--out", folder]
        command += ["--data", args.data.resolve(), "--workers", args.workers]
        command += ["--resume"] if (folder / "checkpoint.npz").exists() else []
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
        seen = None
        try:
            while (status := process.poll()) is None:
                time.sleep(0.2)
                seen = keep_copy(folder / "checkpoint.npz", copied, seen, SECONDS)
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached the child, too: let it end
            raise
        if status:
            sys.exit(status)  # the child has printed what is wrong
        keep_copy(folder / "checkpoint.npz", copied, seen, 0)
    return sorted(copied.glob("*.npz"))


def keep_copy(path, folder, seen, seconds):
    """Copy a checkpoint if it is newer by ``seconds`` than the last copy, of time ``seen``. Returns the time of the
    last copy in nanoseconds, or None."""
    try:
        written = path.stat().st_mtime_ns
    except FileNotFoundError:  # none is there yet
        return seen
    if written == seen or (seen is not None and written - seen < seconds * 1e9):
        return seen
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / f"{written}.npz")
    return written


def has_guide(state):
    """Whether the checkpoint has the guide; False in the first epoch, whose length is not in the log yet."""
    if not state["log"]:
        return False
    total_steps = state["log"][0]["step"] * state["config"]["epochs"]
    return "guide" in state["config"]["additions"] and state["step"] > improved.early_step(total_steps)


def measure(path, samples, real, features, ranks):
    """Seconds of training, and the distance, of one copy of a checkpoint; None before the first step."""
    known = path.with_suffix(f".{samples}.txt")
    if known.exists():
        seconds, distance = map(float, known.read_text().split())
        return seconds, distance
    arrays, state = checkpoint.load(path)
    if state["step"] == 0:
        return None
    model = DDPM(state["config"], tree.nested(arrays))
    images = draw(model, samples, 0, ranks, config=model.sampler_config(guidance=None if has_guide(state) else 0))
    distance = metrics.frechet_distance(features(images), real)
    if ranks.rank == 0:
        with files.replacing(known) as temporary:
            temporary.write_text(f"{state['seconds']} {distance}")
    return state["seconds"], distance


def seconds_to(curve, target):
    """The seconds at which a curve of (seconds, distance) first reaches the target; NaN for never. Between two
    points the logarithm of the distance is interpolated linearly."""
    before = None
    for seconds, distance in curve:
        if distance <= target:
            if before is None:
                return seconds
            fraction = math.log(before[1] / target) / math.log(before[1] / distance)
            return before[0] + fraction * (seconds - before[0])
        before = seconds, distance
    return math.nan


def of_seeds(values, digits=0):
    if any(map(math.isnan, values)):
        return "never"
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    cli.run(main, "stopped: the same command goes on from here")
