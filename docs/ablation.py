"""The ablation: from the paper to the default, one addition at a time, each
trained three times and measured. The last rows are the default without its
guide or its moving average, and the row of v with x_0 in its place.

For each row and seed this runs, here for the third row with seed 1:
  python run_ddpm.py --additions v black --seed 1 --out runs/ablation-black-1
  python -m scratchgen.evaluate runs/ablation-black-1 --bound 100
      --frechet 10000 --sampler sde-dpm++ --steps 20

The guide does not change the training: runs "guide" and "groups" are measured
twice, without it and with it. Finished runs are not trained again, and stopped
ones are resumed. `python run_vae.py` must have been run before. Three seeds
take five hours on two cores.

The numbers of each run go to docs/ablation.json, where those of other seeds
stay. The table in quality.md has the mean over all seeds there, and their
standard deviation. ddpm_ablation.png shows samples of the first seed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from scratchgen import improved, plots  # before NumPy: sets NumPy's threads
from scratchgen.machinery import cli, files
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURE, NUMBERS, TEXT = HERE / "figures" / "ddpm_ablation.png", HERE / "ablation.json", HERE / "quality.md"
LADDER = [list(improved.ADDITIONS)[:count] for count in (1, 2, 3, 4, 6, 7)]
RUNS = {additions[-1]: ["--additions", *additions] for additions in (["none"], *LADDER)}  # by what came last
NO_AVERAGE, X_0 = "ema-0", "x_0"
RUNS |= {NO_AVERAGE: [*RUNS["groups"], "--ema", 0], X_0: ["--additions", "weights"]}

UNGUIDED = SamplerConfig("sde-dpm++", 20)
GUIDED = SamplerConfig("sde-dpm++", 20, improved.GUIDANCE)
ROWS = {  # name -> run, and how samples are drawn
    "none": ("none", UNGUIDED),
    **{f"+ {name}": (name, UNGUIDED) for name in ("v", "black", "weights", "muon")},
    "+ global": ("guide", UNGUIDED),
    "+ guide": ("guide", GUIDED),
    "+ groups, the default": ("groups", GUIDED),
    "the default, no guide": ("groups", UNGUIDED),
    "the default, no moving average": (NO_AVERAGE, GUIDED),
    "x_0 in place of v": (X_0, UNGUIDED),
}
COLUMNS = {"test loss": 4, "bits per dimension": 2, "Frechet distance": 1, "precision": 3, "recall": 3}  # and digits


def main(argv=None):
    parser = cli.OneLineParser("docs/ablation.py", __doc__)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    parser.flag("--seeds", "train each row with these", type=cli.number(int, 0), nargs="+", default=[0, 1, 2])
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    plots.check_figure(FIGURE)
    args.runs = args.runs.resolve()  # the scripts are started from another folder
    if not (args.runs / "vae" / "checkpoint.npz").exists():
        raise cli.UsageError(f"{args.runs / 'vae'}: expected a finished run of run_vae.py to compare with")
    measured = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    for seed in args.seeds:  # whoever stops early has all rows of the first seeds
        for run in RUNS:
            found = train_and_measure(args, run, seed)
            for row, (of, config) in ROWS.items():
                if of == run:
                    measured.setdefault(row, {})[str(seed)] = numbers_of(found, config)
            files.write_text(NUMBERS, json.dumps(measured, indent=1) + "\n")
    files.write_text(TEXT, with_table(TEXT.read_text(encoding="utf-8"), measured))

    images = []
    for run, config in ROWS.values():
        if run != X_0:  # load_run would take its output for eps
            model = load_run(folder_of(args, run, args.seeds[0]))
            images.append(model.sample(10, np.random.default_rng(0), config=config))  # all rows from the same noise
    names = [row for row, (run, _) in ROWS.items() if run != X_0]
    plots.save(plots.grid(np.concatenate(images), 10, "samples by additions", row_labels=names), FIGURE)


def folder_of(args, run, seed):
    return args.runs / f"ablation-{run}-{seed}"


def train_and_measure(args, run, seed):
    """The numbers in metrics.json of this run, which is trained and measured first where it is not yet."""
    folder, data = folder_of(args, run, seed), ["--data", args.data.resolve(), "--workers", args.workers]
    train, evaluate = ([sys.executable, *command] for command in (["run_ddpm.py"], ["-m", "scratchgen.evaluate"]))
    if run == X_0:
        train, evaluate = (
            [sys.executable, "docs/predict_x_0.py", name] for name in ("run_ddpm", "scratchgen.evaluate")
        )
    if not (folder / "metrics.json").exists():
        resume = ["--resume"] if (folder / "checkpoint.npz").exists() else []
        start(*train, *RUNS[run], "--seed", seed, "--out", folder, *data, *resume)
    configs = {config for of, config in ROWS.values() if of == run}
    found = files.read_metrics(folder / "metrics.json", load_run(folder).params)
    evaluation = found.get("evaluation", {})
    if not set(map(str, configs)) <= evaluation.get("frechet_10000", {}).keys() or "bound_exact_100" not in evaluation:
        guidance = ["--guidance", *sorted(config.guidance for config in configs)] if GUIDED in configs else []
        sampler = ["--sampler", UNGUIDED.sampler, "--steps", UNGUIDED.steps]
        vae = ["--vae", args.runs / "vae"]
        start(*evaluate, folder, "--bound", 100, "--frechet", 10000, *vae, *sampler, *guidance, *data)
    found = files.read_metrics(folder / "metrics.json", load_run(folder).params)
    if "test_loss" not in found:
        raise cli.UsageError(f"{folder / 'metrics.json'}: expected the numbers of this run; --resume writes them again")
    return found


def numbers_of(metrics, config):
    """Those of COLUMNS, in that order."""
    found = metrics["evaluation"]["frechet_10000"][str(config)]
    bits = metrics["evaluation"]["bound_exact_100"]["bits_per_dimension"]
    return [metrics["test_loss"], bits, found["distance"], found["precision"], found["recall"]]


def with_table(text, measured):
    """A text with the table of what was measured, {row: {seed: numbers}}, between its two comments."""
    lines = [f"| additions | {' | '.join(COLUMNS)} | seeds |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in filter(measured.get, ROWS):
        by_column = zip(*measured[row].values(), strict=True)
        cells = map(mean_and_spread, by_column, COLUMNS.values())
        lines.append(f"| {row} | {' | '.join(cells)} | {', '.join(sorted(measured[row], key=int))} |")
    table = "\n".join(lines)
    return re.sub(r"(<!-- ablation -->\n).*?(\n<!-- end -->)", rf"\g<1>{table}\g<2>", text, flags=re.DOTALL)


def mean_and_spread(values, digits):
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def start(*command):
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached the child, too: let it end
        raise
    if status:
        sys.exit(status)  # the child has printed what is wrong


if __name__ == "__main__":
    cli.run(main, "stopped: the same command goes on from here")
