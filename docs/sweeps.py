"""Draw the Frechet distance that `evaluate` has measured, against the sampler's
steps and against guidance.

    python -m scratchgen.evaluate runs/ddpm --frechet 10000 \\
        --sampler ddim sde-dpm++ --steps 5 10 20
    python -m scratchgen.evaluate runs/ddpm --frechet 10000 \\
        --guidance 0 0.25 0.5 1
    python docs/sweeps.py runs/ddpm --frechet 10000

The numbers come from metrics.json in the run's folder. steps.png is drawn there
if several numbers of steps were measured, and guidance.png if several w were.
"""

from pathlib import Path

from scratchgen import plots  # before NumPy: sets NumPy's threads
from scratchgen.machinery import cli, files
from scratchgen.samplers import GUIDES
from scratchgen.trained import load_run

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter


def main(argv=None):
    parser = cli.OneLineParser("docs/sweeps.py", __doc__)
    parser.flag("run", "the --out of run_ddpm.py", type=Path, metavar="RUN_FOLDER")
    parser.flag("--frechet", "the N of evaluate --frechet N", type=cli.number(int, 4), default=10_000, metavar="N")
    args = parser.parse_args(argv)
    metrics = files.read_metrics(args.run / "metrics.json", load_run(args.run).params)
    measured = metrics.get("evaluation", {}).get(f"frechet_{args.frechet}", {})
    sweeps = [numbers for numbers in measured.values() if isinstance(numbers, dict) and "sampler" in numbers]
    levels = {name: measured[name]["distance"] for name in ("training images", "VAE") if name in measured}
    drawn = []
    if curves := curves_over("steps", sweeps, lambda one: with_guidance(one["sampler"], one)):
        plots.save(distance_over_steps(curves, levels, args.frechet), args.run / "steps.png")
        drawn.append("steps.png")
    curves = {}
    for guide in GUIDES:
        of_guide = [one for one in sweeps if one["guide"] == guide or one["guidance"] == 0]
        curves |= curves_over("guidance", of_guide, lambda one: f"{one['sampler']}, {one['steps']} steps, {guide}")  # noqa: B023
    if curves:
        plots.save(over_guidance(curves, args.frechet), args.run / "guidance.png")
        drawn.append("guidance.png")
    if not drawn:
        words = f"nothing was measured with {args.frechet} samples and several steps or several w"
        raise cli.UsageError(f"{args.run}: {words}")
    print(f"wrote {' and '.join(drawn)} in {args.run}")


def with_guidance(name, numbers):
    return f"{name}, w = {numbers['guidance']:g}, {numbers['guide']}" if numbers["guidance"] else name


def curves_over(setting, sweeps, name_of):
    """{name: measurements in the order of the setting}, for each name that has several values of the setting."""
    curves = {}
    for numbers in sorted(sweeps, key=lambda one: one[setting]):
        curves.setdefault(name_of(numbers), []).append(numbers)
    return {name: points for name, points in curves.items() if len({one[setting] for one in points}) > 1}


def distance_over_steps(curves, levels, N):
    """Frechet distance against steps, and horizontal lines {name: distance}."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(title=f"Fréchet distance of {N:,} samples")
    for name, points in curves.items():
        axes.loglog([one["steps"] for one in points], [one["distance"] for one in points], marker="o", label=name)
    for name, distance in levels.items():
        axes.axhline(distance, color="gray", linestyle=":", linewidth=1)
        axes.annotate(name, (1, distance), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    every_steps = sorted({one["steps"] for points in curves.values() for one in points})
    axes.set_xticks(every_steps, [str(n) for n in every_steps])
    axes.xaxis.minorticks_off()
    axes.margins(y=0.1)  # room for the names of the levels
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="steps of the sampler", ylabel="Fréchet distance to the test images")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def over_guidance(curves, N):
    """Distance, precision, recall and, with classes, agreement against w."""
    panels = ["distance", "precision", "recall"]
    if all("agreement" in one for points in curves.values() for one in points):
        panels.append("agreement")
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    titles = {
        "distance": f"Fréchet distance, {N:,} samples:\nless is nearer to real images",
        "precision": "precision: share of samples\nthat lie among real images",
        "recall": "recall: share of real images\nthat lie among samples",
        "agreement": "agreement: share that is taken\nfor the class that was asked for",
    }
    for axes, name in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, points in curves.items():
            w = [one["guidance"] for one in points]
            values = [one[name] for one in points]
            (line,) = axes.plot(w, values, marker="o", label=label)
            if name == "distance" and all("spread" in one for one in points):  # over several draws
                axes.errorbar(
                    w, values, [one["spread"] for one in points], fmt="none", capsize=3, color=line.get_color()
                )
        axes.set_ylim(0, None if name == "distance" else 1)  # or 0.01 would look like a cliff
        axes.set_xlabel("w: how far samples are guided")
        axes.set_title(titles[name], fontsize="medium")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    cli.run(main, "stopped: the figures that were there are still there")
