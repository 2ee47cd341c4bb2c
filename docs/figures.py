"""Draw the figures in docs/figures/ from the checkpoints of the runs below. Fill
the texts: their numbers, each between <!-- run name format --> and <!-- -->,
and the code that homework.md shows.

The runs, from the folder of the run scripts:
  python run_vae.py
  python run_vae.py --beta 0 --out runs/vae-beta-0
  python run_vae.py --beta 10 --out runs/vae-beta-10
  python run_ddpm.py --T 200
  python run_ddpm.py --T 200 --additions none --out runs/ddpm-none
  (and with --seed 1 and 2: runs/ddpm-none-1, runs/ddpm-none-2)

Missing runs are left out. All runs take forty minutes on two cores.
(Drawn by other programs: ddpm_ablation.png by ablation.py, scaling.png by
tests/benchmarks/scaling.py, classifier_drawn.png by train_classifier.py,
toy2d.png and unet.png by programs of these names.)
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

from scratchgen import diffusion, improved, plots, samplers  # before NumPy: sets NumPy's threads
from scratchgen.data import CLASSES, load_fashion_mnist, scale
from scratchgen.machinery import cli, files
from scratchgen.trained import load_run, load_trained

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT, FIGURES = HERE.parent, HERE / "figures"
BETAS = {0: "vae-beta-0", 1: "vae", 10: "vae-beta-10"}
TEXTS = [ROOT / "README.md", HERE / "homework.md", HERE / "quality.md"]
NUMBERS = HERE / "numbers.json"  # what the texts say of each run
OF_RUN = {  # the run that a figure of docs/figures/ comes from -> its figures
    "vae": ("loss", "samples", "reconstructions", "latents", "latent_use"),
    "ddpm": ("samples", "forward", "nearest", "bound", "steps", "guidance"),
    "ddpm-none": ("loss", "samples", "trajectory"),
}
NUMBERS_ONLY = ["ddpm-none-1", "ddpm-none-2"]


def parse_arguments(argv):
    parser = cli.OneLineParser("docs/figures.py", __doc__)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    parser.flag("--text", "only put code, and the numbers of numbers.json, into the texts", action="store_true")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    args.runs, args.data = args.runs.resolve(), args.data.resolve()  # the scripts are started from another folder
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.text:
        write_texts()
        return
    runs = [*BETAS.values(), *(run for run in OF_RUN if run not in BETAS.values()), *NUMBERS_ONLY]
    there = [run for run in runs if (args.runs / run / "checkpoint.npz").exists()]
    if not there:
        raise cli.UsageError(f"{args.runs}: expected finished runs in it; --help says which commands make them")
    models = {run: load_run(args.runs / run) for run in there}
    for beta, run in BETAS.items():
        if run in there and models[run].config.get("beta") != beta:
            raise cli.UsageError(f"{args.runs / run}: expected a run of run_vae.py with --beta {beta}")

    # A finished run that is resumed draws its figures again.
    again = ["--resume", "--data", args.data, "--workers", args.workers, "--out"]
    measure = ["-m", "scratchgen.evaluate", "--data", args.data, "--workers", args.workers]
    frechet = ["--frechet", 3000]
    steps = ["--sampler", "ddpm", "sde-dpm++", "--steps", 20, 50, 200]
    commands = {
        "vae": [
            [ROOT / "run_vae.py", *again, args.runs / "vae"],
            [*measure, args.runs / "vae"],
        ],
        "ddpm": [
            [ROOT / "run_ddpm.py", "--T", 200, *again, args.runs / "ddpm"],
            [*measure, args.runs / "ddpm", "--bound", 100],
            [*measure, args.runs / "ddpm", *frechet, *steps],
            [*measure, args.runs / "ddpm", *frechet, "--guidance", 0, 0.25, 0.5, 1],
            [HERE / "sweeps.py", args.runs / "ddpm", *frechet],
        ],
        "ddpm-none": [
            [ROOT / "run_ddpm.py", "--T", 200, "--additions", "none", *again, args.runs / "ddpm-none"],
        ],
    }
    for run in there:
        for command in commands.get(run, []):
            if status := subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
                sys.exit(status)  # the child has printed what is wrong
        for name in OF_RUN.get(run, ()):
            pattern = "latents_*.png" if name == "latents" else f"{name}.png"
            newest = max((args.runs / run).glob(pattern), key=lambda path: path.stat().st_mtime)
            shutil.copyfile(newest, FIGURES / f"{run.replace('-', '_')}_{name}.png")
    data = load_fashion_mnist(args.data)
    x_test = data["test_images"]
    if set(BETAS.values()) <= set(there):
        of_beta = {beta: models[run] for beta, run in BETAS.items()}
        plots.save(beta_rows(of_beta, scale(x_test[:10], 0, 1)), FIGURES / "homework_beta.png")
    plots.save(prior_kl(scale(x_test, -1, 1)), FIGURES / "homework_prior_kl.png")
    plots.save(classes(load_trained("ddpm-classes")), FIGURES / "ddpm_classes_classes.png")
    plots.save(groups(load_trained("ddpm"), data["train_images"]), FIGURES / "ddpm_groups.png")
    numbers = {run: numbers_of(args.runs / run / "metrics.json", model) for run, model in models.items()}
    files.write_text(NUMBERS, json.dumps(read_numbers() | numbers, indent=1, sort_keys=True) + "\n")
    left_out = f"; left out: {', '.join(run for run in runs if run not in there)}" if len(there) < len(runs) else ""
    print(f"figures are in {FIGURES}{left_out}")
    write_texts()


# -------------------------------------------------------------------------------------------- code and numbers in texts


def write_texts():
    numbers = read_numbers()
    for path in TEXTS:
        files.write_text(path, with_numbers(with_code(path.read_text(encoding="utf-8")), numbers))
    print(f"code and numbers are in {', '.join(path.name for path in TEXTS)}")


def read_numbers():
    return json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}


def numbers_of(path, model):
    """The numbers of a run that a text may quote, from its metrics.json and its log."""
    metrics = files.read_metrics(path, model.params)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "seconds"}
    scores = [row.get("test_elbo", row.get("test_loss")) for row in model.log]
    numbers["last_gain"] = abs(scores[-1] - scores[-2]) if len(scores) > 1 else 0.0
    if latent := metrics.get("evaluation", {}).get("latent"):
        mu, noise = (np.array(latent[name]) for name in ("variance_of_mu", "mean_of_variance"))
        active = np.argsort(np.argsort(-mu)) < latent["active_units"]  # those with the largest variances
        ranges = {"mu": mu[active], "noise": noise[active], "sum": mu + noise}
        numbers |= {"active": int(active.sum()), "idle": int((~active).sum())}
        numbers |= {f"{name}_{end.__name__}": float(end(of)) for name, of in ranges.items() for end in (min, max)}
        if not active.all():
            numbers |= {"idle_mu_max": float(mu[~active].max()), "idle_noise_min": float(noise[~active].min())}
    return numbers


def with_numbers(text, numbers):
    """The text with its numbers from the runs: <!-- vae kl .2f -->13.78<!-- --> is "kl" of the run "vae"."""

    def number(match):
        run, name, form = match.groups()
        return f"<!-- {run} {name} {form} -->{numbers[run][name]:{form}}<!-- -->"

    return re.sub(r"<!-- ([\w-]+) (\w+) (,?\.?\d*[dfe]) -->[^<]*<!-- -->", number, text)


def with_code(text):
    """The text with each function that a comment <!-- code: module.name ... --> asks for in the block below it;
    module.name:loop asks for the innermost loop of a function."""

    def block(match):
        return f"<!-- code: {match[1]} -->\n```python\n" + "\n\n\n".join(map(code_of, match[1].split())) + "\n```\n"

    return re.sub(r"<!-- code: ([^\n]+) -->\n(?:```python\n.*?\n```\n)?", block, text, flags=re.DOTALL)


def code_of(place):
    """The source of a function without its docstring, or of its innermost loop."""
    function, _, loop = place.partition(":")
    module, name = function.split(".")
    path = next(path for path in (ROOT / "scratchgen" / f"{module}.py", ROOT / f"{module}.py") if path.exists())
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    if loop:
        *_, node = (inner for inner in ast.walk(node) if isinstance(inner, ast.For))
    elif ast.get_docstring(node):
        docstring = node.body[0]
        for number in range(docstring.lineno - 1, docstring.end_lineno):
            lines[number] = None
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    kept = lines[first - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(line for line in kept if line is not None))


def beta_rows(models, x):
    """Ten test images, and for each beta their reconstructions and ten samples."""
    rows, samples, z = {"test images": x}, {}, np.random.default_rng(0).standard_normal((10, 20), dtype=np.float32)
    for beta, model in models.items():
        mu, _ = model.encode(x)
        rows[f"$\\beta$ = {beta}, from $\\mu$"] = model.generate(mu)
        samples[f"$\\beta$ = {beta}, from $z$"] = model.generate(z)
    rows |= samples
    title = "decoded from the codes $\\mu$ of test images, and from $z \\sim N(0, I)$"
    figure = plots.grid(np.concatenate(list(rows.values())), 10, title, row_labels=list(rows))
    figure.set_size_inches(7.6, 4.4)  # the labels are wide
    return figure


def classes(model):
    """A column for each class: five samples, then samples from one and the same noise for each guide and w."""
    rng = np.random.default_rng(0)
    rows = [2 * model.sample(50, rng) - 1]  # one class after the other
    labels = [f"sample {number}, default" for number in range(1, 6)]
    x_T = np.repeat(rng.standard_normal((1, 28, 28, 1), dtype=np.float32), 10, axis=0)
    guided = {f"{guide}, w = {w:g}": (w, guide) for guide in samplers.GUIDES for w in (0.5, 1, 2, 4)}
    for label, guidance in ({"unguided": ()} | guided).items():
        config = samplers.SamplerConfig("dpm++", 20, *guidance)
        *_, (_, x_0) = model.trajectory(x_T, np.random.default_rng(1), config=config)  # of the same groups each time
        rows.append(x_0)
        labels.append(label)
    title = "by class; below, from one noise: unguided, then away from a guide, w times"
    figure = plots.grid(np.concatenate(rows), 10, title, -1, 1, labels, CLASSES)
    figure.set_size_inches(8.4, 9.6)  # the labels are wide
    return figure


def groups(model, train_images):
    """A column for each of ten groups: its mean, four samples, and the training image nearest to the last sample."""
    rng = np.random.default_rng(0)
    drawn = model.groups.draw(10, None, rng)
    config = model.sampler_config()
    x_T = rng.standard_normal((40, 28, 28, 1), dtype=np.float32)
    x_0_theta = partial(model.x_0_guided, groups=np.tile(drawn, 4), config=config)
    of_config = (config.steps, *samplers.SAMPLERS[config.sampler])
    *_, (_, x_0) = samplers.sample(x_0_theta, model.schedule, x_T, rng, *of_config)
    others = scale(train_images, -1, 1)
    rows = [model.groups.means_of(drawn), x_0, others[improved.nearest(others, x_0[30:])]]
    labels = ["mean of group", *(f"sample {number}" for number in range(1, 5)), "nearest to it"]
    figure = plots.grid(np.concatenate(rows), 10, "by group: its mean, samples, a training image", -1, 1, labels)
    figure.set_size_inches(8.4, 4.8)  # the labels are wide
    return figure


def prior_kl(x):
    """D_KL(q(x_T | x_0) || N(0, I)), mean over images, against T for three schedules."""
    unscaled = {"linear, unscaled": unscaled_betas}
    names = {"linear": "linear, scaled by 1000 / T", "cosine": "cosine"}
    betas_of = unscaled | {names[name]: betas for name, betas in diffusion.SCHEDULES.items()}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(title="how far $x_T$ is from pure noise")
    every_T = np.unique(np.geomspace(20, 1000, 40).round().astype(int))
    for name, betas in betas_of.items():
        kl = [prior_kl_of_betas(betas(T), x) for T in every_T]
        axes.loglog(every_T, kl, label=name)
    axes.axvline(200, color="gray", linestyle=":", linewidth=1)
    axes.annotate("T = 200", (206, 0.95), xycoords=("data", "axes fraction"), color="gray")
    axes.set(xlabel="T", ylabel="$D_{KL}(q(x_T|x_0)\\,||\\,N(0, I))$, nats per image")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def unscaled_betas(T):
    """The paper's betas for 1000 steps, spread over T steps without a factor."""
    return np.linspace(1e-4, 0.02, T)


def prior_kl_of_betas(betas, x):
    return diffusion.prior_kl({"alpha_bar": np.cumprod(1 - betas)}, x).mean()


if __name__ == "__main__":
    cli.run(main, "stopped: the figures that were there are still there")
