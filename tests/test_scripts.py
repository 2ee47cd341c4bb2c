"""What the run scripts compute, print and show, held against the images, the seed and the checkpoint of the run.

The scripts run in this process, with the seed 7 and not the default. Their figures are looked at, and not written. The
networks are narrow, but where it matters how they learn.
"""

import csv
import io
import itertools
import json
import os
import re
import signal
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import run_ddpm
import run_vae
from scratchgen import data, denoisers, diffusion, improved, muon, plots, tree, vae
from scratchgen.data import CLASSES, load_idx
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import blas, checkpoint, cli, files, parallel
from scratchgen.machinery import run as run_module
from scratchgen.machinery.run import INIT, NOISE, ORDER, SAMPLES, TEST, Run, rng_for
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run, load_trained

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from conftest import ROOT, lines, load, main_of, tick_labels, tiles
from matplotlib.colors import to_rgba

SEED = 7
README = (ROOT / "README.md").read_text(encoding="utf-8")


@contextmanager
def narrow_networks():
    """Networks with few units in place of those of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoisers, "GLOBAL_UNITS", 16)
        small = {
            "unet": (partial(denoisers.init_unet, channels=(8, 16)), denoisers.unet),
            "mlp": (partial(denoisers.init_mlp_denoiser, hidden=16), denoisers.mlp_denoiser),
        }
        for arch, network in small.items():
            patch.setitem(denoisers.DENOISERS, arch, network)
        for arch, hidden in {"mlp": (16, 16), "gated": (16, 16), "conv": 16}.items():
            init, *network = vae.VAES[arch]
            patch.setitem(vae.VAES, arch, (partial(init, hidden=hidden), *network))
        yield


@pytest.fixture
def narrow():
    with narrow_networks():
        yield


@pytest.fixture(scope="module")
def train(small_data):
    """Run a script. Returns what is left of it: its model, its figures by their files, its lines on stdout, its folder,
    the rows of log.csv, and metrics.json."""

    def run(module, *flags, out, data=small_data):
        figures, printed = defaultdict(list), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            patch.setattr(plots, "save", lambda figure, path: figures[path.name].append(figure))
            patch.setattr(plots, "save_gif", lambda *args: figures[args[2].name].append(args))
            model = main_of(module, *flags, "--data", data, "--out", out)
        with open(out / "log.csv", newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        printed = printed.getvalue().splitlines()
        return SimpleNamespace(model=model, figures=figures, lines=printed, folder=out, log=rows, metrics=metrics)

    return run


@pytest.fixture
def draws_nothing(monkeypatch):
    """For what is about training: no samples."""
    monkeypatch.setattr(run_ddpm, "draw", lambda model, N, *args, **options: np.zeros((N, 28, 28, 1), np.uint8))
    monkeypatch.setattr(run_ddpm, "draw_trajectories", lambda *args: None)


@pytest.fixture(scope="module")
def images(small_data):
    """Those to train on and those to test with, (N, 28, 28, 1) in 0..255."""
    return [load_idx(small_data / f"{name}-images-idx3-ubyte")[..., None].astype(float) for name in ("train", "t10k")]


@pytest.fixture(scope="module")
def labels(small_data):
    return [load_idx(small_data / f"{name}-labels-idx1-ubyte").astype(int) for name in ("train", "t10k")]


# ------------------------------------------------------------------------------------------------------- the defaults

OF_EVERY_RUN = {"seed": 0, "batch_size": 128, "train_images": None, "resume": False, "data": data.DATA}
DEFAULTS = {
    run_vae: {"arch": "mlp", "epochs": 22, "lr": 3e-3, "latent_dim": 20, "latents": None, "beta": 1.0},
    run_ddpm: {"arch": "unet", "epochs": 7, "lr": 1e-2, "T": 200, "schedule": "linear", "ema": 0.998, "classes": False}
    | {"additions": ["v", "black", "weights", "muon", "global", "guide", "groups"]},
}
EPOCHS = {run_vae: {"mlp": 22, "gated": 12, "conv": 7}, run_ddpm: {"unet": 7, "mlp": 12}}


@pytest.mark.parametrize("module", DEFAULTS)
def test_the_defaults_are_those_of_the_help_and_of_the_runs_that_came_with_the_package(module, capsys):
    name = module.__name__.removeprefix("run_")
    expected = OF_EVERY_RUN | DEFAULTS[module] | {"out": Path("runs") / name, "workers": blas.available_cores()}
    found = vars(module.parse_arguments([]))
    assert found.pop("command") == f"python {module.__name__}.py" and found == expected
    assert {arch: module.parse_arguments(["--arch", arch]).epochs for arch in EPOCHS[module]} == EPOCHS[module]

    with pytest.raises(SystemExit):
        module.parse_arguments(["--help"])
    _, *flags = re.split(r"\n  --", capsys.readouterr().out)
    said = {flag.split()[0].strip(","): re.search(r"\(default: ([^)]*)\)", " ".join(flag.split())) for flag in flags}
    in_words = {
        "epochs": ", ".join(f"{count} for {arch}" for arch, count in EPOCHS[module].items()),
        "additions": "all",
        "train_images": "all",
        "latents": "those with most KL",
        "workers": f"all cores, here {expected['workers']}; under mpiexec N is ignored",
        "data": "data/ beside the run scripts",
    }
    for flag, default in expected.items():
        match = said.pop(flag.replace("_", "-"))
        assert (match and match[1]) == (None if default is False else in_words.get(flag, str(default))), flag
    assert said == {}  # no flag without a line in the table

    for packed in {"vae": ["vae"], "ddpm": ["ddpm", "ddpm-classes"]}[name]:
        config = load_trained(packed).config
        expected["classes"] = packed == "ddpm-classes"
        shared = expected.keys() & config.keys() - {"train_images"}  # there they are a checksum
        assert len(shared) >= 7 and {key: config[key] for key in shared} == {key: expected[key] for key in shared}


def test_the_other_numbers_that_the_documents_name():
    assert "each minute" in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert run_module.SAVE_SECONDS == 60
    assert "one of 300 groups" in README and improved.GROUPS == 300
    assert improved.GUIDANCE == 0.5 and (muon.MUON_SIDES[0], muon.MUON_SIDES[-1]) == (8, 64)
    early = [improved.early_step(steps) for steps in (6, 1000, 1640, 1645, 7 * 469)]
    assert early == [2, 250, 410, 411, 411]  # a quarter, but an eighth of the default run at the most


# --------------------------------------------------------------------------------- the equations, and nothing else


def trained_by_hand(loss, params, batches, peak, decay=1.0, beta2=0.999, by_muon=False):
    """The papers' optimisers, in float64 and on whole minibatches: the weights and their moving average at the start
    and after each step. Muon steps matrices whose shorter side is from 8 to 64."""

    def stepped(p, g, m, v, rate, step):
        columns = p.shape[-1]
        if by_muon and p.ndim > 1 and 8 <= min(p.size // columns, columns) <= 64:
            m = 0.95 * m + g
            direction = muon.orthogonalise((g + 0.95 * m).reshape(-1, columns))
            return p - rate * 0.2 * np.sqrt(max(direction.shape)) * direction.reshape(p.shape), m, v
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
        return p - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8), m, v

    params = tree.map(np.float64, params)
    m, v, average = tree.map(np.zeros_like, params), tree.map(np.zeros_like, params), params
    states, steps = [(params, average)], len(batches)
    for step, batch in enumerate(batches, 1):
        rate = peak * min(1, step / max(1, steps // 10)) * (1 + np.cos(np.pi * (step - 1) / steps)) / 2
        three = tree.map(partial(stepped, rate=rate, step=step), params, grad(loss)(params, batch), m, v)
        params, m, v = (tree.map(lambda _, of_leaf, n=n: of_leaf[n], params, three) for n in range(3))
        d = min(decay, (1 + step) / (10 + step))
        average = tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, params)
        states.append((params, average))
    return states


def orders(count, batch_size, epochs):
    """The numbers of the images in each minibatch of a run."""
    for epoch in range(epochs):
        order = rng_for(SEED, ORDER, epoch).permutation(count)
        yield from (order[start : start + batch_size] for start in range(0, count, batch_size))


def of_epochs(numbers, batches):
    """Numbers of the three minibatches of each of two epochs, as means over images."""
    weights = [len(batch[0]) for batch in batches]
    return [np.average(numbers[start : start + 3], weights=weights[start : start + 3]) for start in (0, 3)]


SHORT = ["--epochs", 2, "--batch-size", 16, "--train-images", 40, "--lr", 0.004, "--seed", SEED, "--workers", 1]
D, BETA, DECAY = 5, 1.5, 0.3


@pytest.fixture(scope="module", params=vae.VAES)
def vae_run(request, train, tmp_path_factory):
    flags = [*SHORT, "--arch", request.param, "--latent-dim", D, "--beta", BETA]
    with narrow_networks():
        return train(run_vae, *flags, out=tmp_path_factory.mktemp(f"vae-{request.param}"))


def test_a_run_of_the_vae_is_its_equations_and_nothing_else(vae_run, narrow, images):
    """A second implementation, in float64 and without shards: the same numbers from the same draws."""
    arch = vae_run.model.config["arch"]
    (x_train, x_test), (init, encode, decode) = (part / 255 for part in images), vae.VAES[arch]
    rng = rng_for(SEED, NOISE)

    def terms(params, x, eps):
        mu, log_var = encode(params, x)
        logits = decode(params, mu + anp.exp(log_var / 2) * eps)
        first = (x * logits - anp.log(1 + anp.exp(logits))).sum() / len(x)
        return first, (mu**2 + anp.exp(log_var) - 1 - log_var).sum() / 2 / len(x)

    def loss(params, batch):
        first, second = terms(params, *batch)
        return BETA * second - first

    batches = [(x_train[n], rng.standard_normal((len(n), D), dtype=np.float32)) for n in orders(40, 16, 2)]
    by_muon = arch != "mlp"
    rounding = 1e-3 * by_muon  # its directions are those of the smallest singular values, too
    states = trained_by_hand(loss, init(rng_for(SEED, INIT), D), batches, 0.004, by_muon=by_muon)
    train = np.array([terms(params, *batch) for (params, _), batch in zip(states, batches, strict=False)])
    eps_test = rng_for(SEED, TEST).standard_normal((40, D), dtype=np.float32)
    for row, after, *means in zip(vae_run.log, (3, 6), *(of_epochs(each, batches) for each in train.T), strict=True):
        for part, (first, second) in (("train", means), ("test", terms(states[after][0], x_test, eps_test))):
            found = row[f"{part}_reconstruction"], row[f"{part}_kl"], row[f"{part}_elbo"]
            assert found == pytest.approx((first, second, first - second), rel=1e-4, abs=rounding)
    both = np.stack([x_test, 1 - x_test])
    floor = -(both * np.log(np.where(both > 0, both, 1))).sum() / 40
    assert vae_run.metrics["entropy_floor"] == pytest.approx(floor)
    assert vae_run.metrics["parameters"] == tree.size(states[0][0])


ADDITIONS = [["none"], ["v"], ["black"], ["weights"], ["muon"], ["guide"], ["groups"], ["all"]]


@pytest.mark.parametrize("additions", ADDITIONS, ids=lambda names: names[0])
def test_a_run_of_the_diffusion_model_is_its_equations_and_nothing_else(
    additions, narrow, train, draws_nothing, images, tmp_path
):
    """Algorithm 1 a second time, in float64 and without shards, with what each addition says of itself."""
    T, N = 30, 40
    flags = [*SHORT, "--T", T, "--arch", "mlp", "--ema", DECAY, "--additions", *additions]
    run = train(run_ddpm, *flags, out=tmp_path)
    arrays, state = load(tmp_path / "checkpoint.npz")
    names = set(additions) if additions != ["all"] else {"v", "black", "weights", "muon", "guide", "groups"}
    assert set(state["config"]["additions"]) == names - {"none"}
    x_train, x_test = (part / 127.5 - 1 for part in images)
    rng = rng_for(SEED, NOISE)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T) * 1000 / T)

    def means_of(x):
        """The mean image that is nearest to each image, 0 in place of a tenth of those to train on."""
        means = arrays["groups/means"].astype(float).reshape(-1, 28, 28, 1)
        squares = ((x.reshape(-1, 1, 784) - means.reshape(1, -1, 784)) ** 2).sum(axis=2)
        return means[squares.argmin(axis=1)]

    def errors(params, x_0, t, eps, means):
        a, b = (np.sqrt(each[t - 1]).reshape(-1, 1, 1, 1) for each in (alpha_bar, 1 - alpha_bar))
        x_t = a * x_0 + b * eps
        seen = [x_t] + [np.clip((x_t + a) / b, -3, 3)] * ("black" in names) + [means] * ("groups" in names)
        out = denoisers.mlp_denoiser(params, np.concatenate(seen, axis=3), t)
        return ((eps - (b * x_t + a * out if "v" in names else out)) ** 2).sum(axis=(1, 2, 3)) / 784

    def loss(params, batch):
        _, t, _, _ = batch
        weights = 1 / np.sqrt(alpha_bar[t - 1]) if "weights" in names else 1
        return (weights * errors(params, *batch)).sum() / len(t)

    batches = []
    for n in orders(N, 16, 2):
        t, eps = rng.integers(1, T + 1, size=len(n)), rng.standard_normal((len(n), 28, 28, 1), dtype=np.float32)
        means = None
        if "groups" in names:
            means = np.where(rng.random(len(n)).reshape(-1, 1, 1, 1) < 0.1, 0, means_of(x_train[n]))
        batches.append((x_train[n], t, eps, means))
    inputs = 1 + len(names & {"black", "groups"})
    init, _ = denoisers.DENOISERS["mlp"]
    muon_and_beta2 = {"by_muon": True, "beta2": 0.99} if "muon" in names else {}
    states = trained_by_hand(loss, init(rng_for(SEED, INIT), inputs), batches, 0.004, DECAY, **muon_and_beta2)
    losses = [errors(params, *batch).mean() for (params, _), batch in zip(states, batches, strict=False)]
    t_test = np.array([1 + n * T // N for n in range(N)])
    eps_test = rng_for(SEED, TEST).standard_normal(x_test.shape, dtype=np.float32)
    test = x_test, t_test, eps_test, means_of(x_test) if "groups" in names else None
    for row, after, mean in zip(run.log, (3, 6), of_epochs(losses, batches), strict=True):
        of_test = errors(states[after][1], *test)  # of the average of the weights, and in the log of each fifth image
        assert (row["train_loss"], row["test_loss"]) == pytest.approx((mean, of_test[::5].mean()), rel=1e-4)
    assert run.metrics["test_loss"] == pytest.approx(of_test.mean(), rel=1e-4)
    assert run.metrics["alpha_bar_T"] == pytest.approx(alpha_bar[-1])
    prior_kl = (alpha_bar[-1] * (x_test**2).sum() / N - 784 * (alpha_bar[-1] + np.log(1 - alpha_bar[-1]))) / 2
    assert run.metrics["prior_kl"] == pytest.approx(prior_kl, rel=1e-4)
    if "groups" in names:
        x = images[0][:N].astype(np.uint8)
        found = improved.find_groups(x, None, improved.GROUPS, rng_for(SEED, INIT, 1))
        np.testing.assert_array_equal(arrays["groups/means"], found["means"])
    early = {name: array for name, array in arrays.items() if name.startswith("early/")}
    if "guide" in names:  # the average after a quarter of the six steps
        for name, expected in zip(tree.names(states[2][1]), tree.leaves(states[2][1]), strict=True):
            np.testing.assert_allclose(early.pop(f"early/{name}"), expected, rtol=1e-3, atol=1e-5)
    assert early == {}


# ---------------------------------------------------------------------------------------------------- what is printed


def without_seconds(lines):
    """A line is printed after the checkpoint is saved, which takes a moment more than log.csv says."""
    return [re.sub(r"(^epoch .*)  \d+ s$", r"\1", line) for line in lines]


def test_the_vae_prints_what_is_in_its_files(vae_run):
    about, m = vae_run.model.config, vae_run.metrics
    assert without_seconds(vae_run.lines) == [
        f"VAE {about['arch']}: {m['parameters']:,} parameters, 40 training images",
        *(
            "epoch {epoch:.0f}/2  ELBO: train {train_elbo:.2f}, test {test_elbo:.2f} = {test_reconstruction:.2f} - "
            "{test_kl:.2f} nats".format(**row)
            for row in vae_run.log
        ),
        f"test ELBO {m['elbo']:.2f} = {m['reconstruction']:.2f} - {m['kl']:.2f} nats per image; no model gets above "
        f"-{m['entropy_floor']:.2f}, which is -(entropy of the grey pixels)",
        f"figures and numbers are in {vae_run.folder}",
    ]
    last = {name: vae_run.log[-1][f"test_{name}"] for name in ("elbo", "reconstruction", "kl")}
    assert {name: m[name] for name in last} == last


def test_the_diffusion_model_prints_what_is_in_its_files(ddpm_run):
    about, m = ddpm_run.model.config, ddpm_run.metrics
    hints = [
        " (predicting no noise at all has a loss of 1: try a smaller --lr)" * (ddpm_run.log[0]["test_loss"] > 0.9),
        "",
    ]
    assert without_seconds(ddpm_run.lines) == [
        f"diffusion {about['arch']}: {m['parameters']:,} parameters, 40 training images",
        f"T = {ddpm_run.T}, alpha_bar_T = {m['alpha_bar_T']:.2e}, prior KL = {m['prior_kl']:.3g} nats per image",
        *(
            "epoch {epoch:.0f}/2  loss: train {train_loss:.5f}, test {test_loss:.5f}".format(**row) + hint
            for row, hint in zip(ddpm_run.log, hints, strict=True)
        ),
        f"test loss {m['test_loss']:.5f}: mean squared error of the predicted noise, per pixel and over all t",
        f"figures and numbers are in {ddpm_run.folder}",
    ]


def constant_network(answer):
    return (lambda rng, inputs: {"w": np.float32([answer])}), (lambda params, x, t, labels: params["w"] + 0 * x)


@pytest.mark.parametrize(("gain", "warned"), [(0.1, False), (0.02, True)])
def test_a_run_that_has_learned_nothing_says_so_after_its_first_epoch(
    gain, warned, train, draws_nothing, monkeypatch, tmp_path
):
    """x_t is noise at almost every t here, so that the loss of this network is (1 - gain)^2: 0.81 or 0.96."""
    copying = (lambda rng, inputs: {"w": np.float32([gain])}), (lambda params, x, t, labels: params["w"] * x)
    monkeypatch.setitem(run_ddpm.DENOISERS, "mlp", copying)
    monkeypatch.setitem(diffusion.SCHEDULES, "linear", lambda T: np.full(T, 0.999))
    flags = ["--T", 5, "--arch", "mlp", "--additions", "none", "--epochs", 2, "--train-images", 16, "--lr", 1e-9]
    run = train(run_ddpm, *flags, out=tmp_path)
    assert [row["test_loss"] > 0.9 for row in run.log] == [warned] * 2
    said = [line.partition("  ")[0] for line in run.lines if "predicting no noise at all has a loss of 1" in line]
    assert said == ["epoch 1/2"] * warned


@pytest.mark.parametrize(("beta", "warned"), [(0.36, False), (0.32, True)])
def test_an_image_that_cannot_become_noise_is_warned_of(beta, warned, train, draws_nothing, monkeypatch, tmp_path):
    monkeypatch.setitem(run_ddpm.DENOISERS, "mlp", constant_network(0.0))
    monkeypatch.setitem(diffusion.SCHEDULES, "linear", lambda T: np.full(T, beta))
    run = train(run_ddpm, "--T", 15, "--arch", "mlp", "--epochs", 1, "--train-images", 16, out=tmp_path)
    assert 0.2 < run.metrics["prior_kl"] < 0.5 if not warned else 0.5 < run.metrics["prior_kl"] < 3
    assert any(line.startswith("warning: x_T still shows the image") for line in run.lines) == warned


# ----------------------------------------------------------------------------------------------- what the figures show


def only(run, name):
    """The figure of this file, which was written once, and its first panel."""
    (figure,) = run.figures[name]
    return figure, figure.axes[0]


def levels(x):
    """Images in [0, 1] as tiles of grey levels."""
    return np.round(255 * x)[..., 0]


def test_the_figures_of_the_vae_are_of_its_weights_and_the_test_images(vae_run, narrow, images, labels, train):
    model, x = load_run(vae_run.folder), np.float32(images[1] / 255)
    mu, log_var = model.encode(x)
    kl = vae.kl_per_dimension(mu, log_var).mean(axis=0)
    i, j = sorted(np.argsort(kl)[-2:])
    assert set(vae_run.figures) == {
        *("loss.png", "reconstructions.png", "interpolation.png", "samples.png", "codes.png", f"latents_{i}_{j}.png")
    }
    _, axes = only(vae_run, "reconstructions.png")
    rows = tiles(axes, 0, 1).reshape(4, 2, 10, 28, 28)
    np.testing.assert_allclose(rows[:, 0].reshape(40, 28, 28), x[..., 0], atol=1e-6)
    np.testing.assert_allclose(rows[:, 1].reshape(40, 28, 28), model.generate(mu)[..., 0], atol=1e-5)
    assert tick_labels(axes.yaxis) == ["test", "decoded"] * 4
    assert axes.get_title() == "test images, and decoded from their $\\mu$"

    _, axes = only(vae_run, "interpolation.png")
    rows = tiles(axes, 0, 1).reshape(8, 12, 28, 28)
    np.testing.assert_allclose(rows[:, [0, 11]], np.stack([x[:8, ..., 0], x[8:16, ..., 0]], axis=1), atol=1e-6)
    between = np.concatenate([mu[n] + np.linspace(0, 1, 10)[:, None] * (mu[8 + n] - mu[n]) for n in range(8)])
    decoded = model.generate(np.float32(between)).reshape(8, 10, 28, 28)
    np.testing.assert_allclose(rows[:, 1:11], decoded, atol=1e-5)
    assert tick_labels(axes.xaxis) == ["test", *(f"{n / 9:.2f}" for n in range(10)), "test"]
    assert axes.get_title() == "from one test image to another, evenly in z"

    _, axes = only(vae_run, "samples.png")
    z = rng_for(SEED, SAMPLES).standard_normal((100, D), dtype=np.float32)
    np.testing.assert_allclose(tiles(axes, 0, 1), model.generate(z)[..., 0], atol=1e-5)
    assert axes.get_title() == f"variational autoencoder, {model.config['arch']}: decoded from $z \\sim N(0, I)$"

    _, axes = only(vae_run, "codes.png")
    np.testing.assert_allclose(axes.collections[0].get_offsets(), mu[:, [i, j]], atol=1e-5)
    assert axes.get_title() == "codes $\\mu$ of test images, in the two dimensions with most KL"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"$\\mu_{{{i}}}$", f"$\\mu_{{{j}}}$") and axes.get_aspect() == 1
    colours = [to_rgba(f"C{label}", 0.5) for label in labels[1]]
    np.testing.assert_allclose(axes.collections[0].get_facecolors(), colours)
    assert [tuple(key.get_facecolor()[0]) for key in axes.collections[1:]] == [to_rgba(f"C{c}") for c in range(10)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CLASSES)

    _, axes = only(vae_run, f"latents_{i}_{j}.png")
    drawn_again = train(
        run_vae, *SHORT, "--arch", model.config["arch"], "--latent-dim", D, "--beta", BETA, "--resume", "--latents",
        3, 1, out=vae_run.folder,
    )  # fmt: skip
    for (a, b), of in (((i, j), axes), ((3, 1), only(drawn_again, "latents_3_1.png")[1])):
        z = np.zeros((10, 10, D), np.float32)
        z[..., a], z[..., b] = np.linspace(-3, 3, 10), np.linspace(3, -3, 10)[:, None]
        decoded = model.generate(z.reshape(100, D))[..., 0]
        np.testing.assert_allclose(tiles(of, 0, 1, line=0), decoded, atol=1e-5)
        assert (of.get_xlabel(), of.get_ylabel()) == (f"$z_{{{a}}}$", f"$z_{{{b}}}$")

    figure, _ = only(vae_run, "loss.png")
    for axes, name in zip(figure.axes, ("elbo", "reconstruction", "kl"), strict=True):
        drawn = lines(axes)
        for part in ("train", "test"):
            assert drawn[part] == ([1, 2], [row[f"{part}_{name}"] for row in vae_run.log])
    assert set(figure.axes[0].lines[2].get_ydata()) == {-vae_run.metrics["entropy_floor"]}


DDPM_RUNS = {  # of T = 30
    "paper": ["--arch", "mlp", "--additions", "none"],
    "all": ["--arch", "mlp", "--schedule", "cosine"],
    "classes": ["--classes"],
}


@pytest.fixture(scope="module", params=DDPM_RUNS)
def ddpm_run(request, train, tmp_path_factory):
    flags = [*SHORT, "--T", 30, "--ema", DECAY, *DDPM_RUNS[request.param]]
    with narrow_networks():
        run = train(run_ddpm, *flags, out=tmp_path_factory.mktemp(f"ddpm-{request.param}"))
    run.T, run.name, run.best = 30, request.param, SamplerConfig("sde-dpm++", 20, 0.5)
    if request.param == "paper":
        run.best = SamplerConfig("ddpm", 30)
    return run


def drawn(model, N, config):
    """N images, 32 at a time, one class after the other if there are any."""
    shards = []
    for start in range(0, N, 32):
        of_shard = {"labels": np.arange(start, start + 32) % 10} if model.config["classes"] else {}
        shards.append(model.sample(32, rng_for(SEED, SAMPLES, start), config=config, **of_shard))
    return levels(np.concatenate(shards)[:N])


def test_the_images_that_a_diffusion_model_shows_are_drawn_with_the_average_of_its_weights(ddpm_run, images):
    run, model = ddpm_run, load_run(ddpm_run.folder)
    arrays, _ = load(run.folder / "checkpoint.npz")
    for name, weights in zip(tree.names(model.params), tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(weights, arrays[f"ema/{name}"])
    assert any(np.any(arrays[f"ema/{name}"] != arrays[f"params/{name}"]) for name in tree.names(model.params))
    assert files.read_metrics(run.folder / "metrics.json", model.params) == run.metrics  # it names these weights
    assert set(run.figures) == {
        *("loss.png", "preview.png", "forward.png", "trajectory.png", "sampling.gif", "samples.png", "nearest.png"),
        *["classes.png"] * (run.name == "classes"),
    }
    assert all(f"`{name}`" in README for name in run.figures)
    _, axes = only(run, "samples.png")
    expected = drawn(model, 100, run.best)
    np.testing.assert_array_equal(tiles(axes, 0, 255, columns=8), expected[:64])
    assert axes.get_title() == f"diffusion model, {model.config['arch']}: {run.best}"
    if run.name == "classes":
        _, axes = only(run, "classes.png")
        np.testing.assert_array_equal(tiles(axes, 0, 255, columns=10)[:96], expected[:96])
        assert axes.get_title() == f"by class: {run.best}" and tick_labels(axes.xaxis) == list(CLASSES)

    _, axes = only(run, "nearest.png")
    assert tick_labels(axes.yaxis) == ["sample", "nearest 1", "nearest 2", "nearest 3"]
    assert axes.get_title() == "samples, and the training images nearest to them, by pixels"
    sample, *rows = tiles(axes, 0, 255, columns=10).reshape(4, 10, 1, 784)
    np.testing.assert_array_equal(sample.reshape(10, 28, 28), expected[:10])
    to_train = np.sort(((sample - images[0][:40].reshape(40, 784)) ** 2).sum(axis=2), axis=1)
    np.testing.assert_array_equal([((sample - row) ** 2).sum(axis=(1, 2)) for row in rows], to_train[:, :3].T)

    unguided = SamplerConfig(run.best.sampler, run.best.steps)
    first, both = (figure.axes[0] for figure in run.figures["preview.png"])
    assert (tick_labels(first.yaxis), tick_labels(both.yaxis)) == (["epoch 1"], ["epoch 1", "epoch 2"])
    np.testing.assert_array_equal(tiles(both, 0, 255)[:10], tiles(first, 0, 255, columns=10))
    np.testing.assert_array_equal(tiles(both, 0, 255, columns=10)[10:], drawn(model, 10, unguided))
    assert both.get_title() == f"previews: {unguided}" and np.any(tiles(both, 0, 255)[:10] != tiles(both, 0, 255)[10:])


def test_the_way_to_noise_and_the_way_back(ddpm_run, images):
    run, model, rng = ddpm_run, load_run(ddpm_run.folder), rng_for(SEED, SAMPLES)
    x_0 = images[1][:1] / 127.5 - 1
    eps = rng.standard_normal((1, 28, 28, 1), dtype=np.float32)
    x_T = rng.standard_normal((16, 28, 28, 1), dtype=np.float32)
    path = {30: x_T} | dict(model.trajectory(x_T, rng, config=SamplerConfig("ddpm", 30)))
    times = [30, 15, 8, 3, 2, 0]
    forward, _ = only(run, "forward.png")
    reverse, _ = only(run, "trajectory.png")
    assert (forward.get_suptitle(), reverse.get_suptitle()) == (plots.FORWARD, plots.REVERSE)
    assert [axes.get_title() for axes in forward.axes] == [f"t = {t}" for t in times[::-1]]
    assert [axes.get_title() for axes in reverse.axes] == [f"t = {t}" for t in times]
    for t, to_noise, back in zip(times, forward.axes[::-1], reverse.axes, strict=True):
        a = model.schedule["alpha_bar"][t]
        np.testing.assert_allclose(tiles(to_noise, -1, 1), (np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps)[..., 0], atol=1e-5)
        np.testing.assert_allclose(tiles(back, -1, 1), path[t][:1, ..., 0], atol=1e-5)
    ((frames, columns, _),) = run.figures["sampling.gif"]
    assert columns == 4 and list(frames) == list(range(30, -1, -1))
    for t, shown in frames.items():
        np.testing.assert_allclose(shown, path[t], atol=1e-5)


def test_the_losses_of_the_diffusion_model_by_epoch_and_by_t(ddpm_run, images, labels):
    run, model = ddpm_run, load_run(ddpm_run.folder)
    figure, left = only(run, "loss.png")
    assert [line.get_ydata().tolist() for line in left.lines] == [
        [row[f"{part}_loss"] for row in run.log] for part in ("train", "test")
    ]
    x_0, t = np.float32(images[1] / 127.5 - 1), 1 + np.arange(40) * 30 // 40
    eps = rng_for(SEED, TEST).standard_normal(x_0.shape, dtype=np.float32)
    groups = model.groups_of(x_0, labels[1] if run.name == "classes" else None)
    x_t = diffusion.q_sample(model.schedule, x_0, t, eps)
    errors = ((eps - model.eps_theta(x_t, t, groups)) ** 2).mean(axis=(1, 2, 3))
    assert run.metrics["test_loss"] == pytest.approx(errors.mean(), rel=1e-5)
    shown_t, shown = figure.axes[1].lines[0].get_data()
    np.testing.assert_allclose(shown_t, [part.mean() for part in np.array_split(t, 30)])
    np.testing.assert_allclose(shown, [part.mean() for part in np.array_split(errors, 30)], rtol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 3, 200])
def test_the_times_of_the_strips_and_the_frames_of_the_animation(T, train, monkeypatch, tmp_path):
    monkeypatch.setitem(run_ddpm.DENOISERS, "mlp", constant_network(0.1))
    flags = ["--T", T, "--arch", "mlp", "--additions", "none", "--epochs", 1, "--train-images", 16]
    run = train(run_ddpm, *flags, out=tmp_path)
    times = [200, 100, 50, 20, 10, 0] if T == 200 else list(range(T, -1, -1))  # those of the sheet
    found = [axes.get_title() for axes in only(run, "trajectory.png")[0].axes]
    assert found == [f"t = {t}" for t in times]
    assert [axes.get_title() for axes in only(run, "forward.png")[0].axes] == found[::-1]
    ((frames, _, _),) = run.figures["sampling.gif"]
    assert list(frames) == (list(range(200, -1, -4)) if T == 200 else times)


def test_previews_are_of_the_last_twelve_epochs_and_one_that_cannot_be_written_ends_no_training(
    narrow, train, monkeypatch, tmp_path
):
    def grid(images, columns, title, *rest, real=plots.grid):
        if title.startswith("previews: ") and len(images) == 40:  # of the fourth epoch: a viewer keeps the file open
            raise PermissionError(13, "Permission denied", "preview.png")
        return real(images, columns, title, *rest)

    monkeypatch.setattr(plots, "grid", grid)
    flags = ["--T", 2, "--arch", "mlp", "--epochs", 14, "--train-images", 16]
    with pytest.warns(UserWarning, match="preview.png: Permission denied, and so it stays as it is"):
        run = train(run_ddpm, *flags, out=tmp_path)
    shown = [figure.axes[0] for figure in run.figures["preview.png"]]
    assert [len(tick_labels(axes.yaxis)) for axes in shown] == [1, 2, 3, *range(5, 13), 12, 12]
    assert tick_labels(shown[-1].yaxis) == [f"epoch {n}" for n in range(3, 15)]
    before, last = (tiles(axes, 0, 255, columns=10) for axes in shown[-2:])
    np.testing.assert_array_equal(last[:110], before[10:])
    previews = load(tmp_path / "checkpoint.npz")[0]["previews"]  # for a run that resumes
    assert previews.shape == (12, 10, 28, 28, 1)
    np.testing.assert_array_equal(previews[14 % 12, ..., 0], last[-10:])


def test_a_rank_that_dies_while_a_preview_is_drawn_is_no_preview_that_cannot_be_written(
    narrow, call, tmp_path, monkeypatch
):
    """ChildProcessError is an OSError, too."""

    def killed(*args, **options):
        raise ChildProcessError(parallel.KILLED)

    monkeypatch.setattr(run_ddpm, "draw", killed)
    with pytest.raises(ChildProcessError, match="was killed"):
        call(run_ddpm, "--T", 2, "--arch", "mlp", "--epochs", 1, "--train-images", 16, "--out", tmp_path)


def test_a_test_set_smaller_than_the_figures(small_data, images, narrow, train, tmp_path):
    for path in small_data.iterdir():
        content = path.read_bytes()
        if path.name.startswith("t10k"):  # 7 of the 40
            head, size = (16, 784) if "images" in path.name else (8, 1)
            content = content[:4] + (7).to_bytes(4, "big") + content[8 : head + 7 * size]
        (tmp_path / path.name).write_bytes(content)
    flags = ["--epochs", 1, "--train-images", 16, "--workers", 1]
    of_vae = train(run_vae, *flags, data=tmp_path, out=tmp_path / "vae")
    x = images[1][np.arange(40) % 7, ..., 0] / 255  # they come again
    shown = tiles(only(of_vae, "reconstructions.png")[1], 0, 1).reshape(4, 2, 10, 28, 28)
    np.testing.assert_allclose(shown[:, 0].reshape(40, 28, 28), x, atol=1e-6)
    shown = tiles(only(of_vae, "interpolation.png")[1], 0, 1, columns=12)
    np.testing.assert_allclose([shown[::12], shown[11::12]], [x[:8], x[8:16]], atol=1e-6)
    of_ddpm = train(run_ddpm, *flags, "--T", 30, "--arch", "mlp", data=tmp_path, out=tmp_path / "ddpm")
    t, _ = only(of_ddpm, "loss.png")[0].axes[1].lines[0].get_data()
    assert t.tolist() == [1, 5, 9, 13, 18, 22, 26]


# --------------------------------------------------------------------------------------------------- labels and groups


def painter(T):
    """A network that takes x_t for noise upon an image of one grey, which its label says: from -0.4 to -0.2."""
    schedule = diffusion.make_schedule("linear", T)

    def network(params, x_t, t, labels):
        x_0 = (labels / 50 - 0.38).astype(np.float32).reshape(-1, 1, 1, 1)
        a, b = (diffusion.at(schedule[name], t) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        return (x_t - a * x_0) / b + params["w"]

    return (lambda rng, inputs, classes: {"w": np.zeros(1, np.float32)}), network


def test_labels_reach_the_network_in_training_in_the_test_loss_and_in_each_figure(
    train, images, labels, monkeypatch, tmp_path
):
    """Its answer is its label, so that each number and each image says which label it was."""
    T = 30
    monkeypatch.setitem(run_ddpm.DENOISERS, "unet", painter(T))
    flags = [*SHORT, "--lr", 1e-9, "--T", T, "--classes", "--additions", "none"]
    run = train(run_ddpm, *flags, out=tmp_path)
    alpha_bar = run.model.schedule["alpha_bar"][1:]

    def errors(x_0, t, labels):  # eps_theta = eps + a / b (x_0 - grey)
        greys = (labels / 50 - 0.38).reshape(-1, 1, 1, 1)
        return (alpha_bar / (1 - alpha_bar))[t - 1] * ((x_0 - greys) ** 2).mean(axis=(1, 2, 3))

    x_train, x_test = (part / 127.5 - 1 for part in images)
    rng, batches, losses = rng_for(SEED, NOISE), [], []
    for n in orders(40, 16, 2):
        t = rng.integers(1, T + 1, size=len(n))
        rng.standard_normal((len(n), 28, 28, 1), dtype=np.float32)
        without = rng.random(len(n)) < 0.1  # others at each step
        batches.append((n,))
        losses.append(errors(x_train[n], t, np.where(without, -1, labels[0][n])).mean())
    by_image = errors(x_test, 1 + np.arange(40) * T // 40, labels[1])
    for row, mean in zip(run.log, of_epochs(losses, batches), strict=True):
        assert (row["train_loss"], row["test_loss"]) == pytest.approx((mean, by_image[::5].mean()), rel=1e-4)
    assert run.metrics["test_loss"] == pytest.approx(by_image.mean(), rel=1e-4)
    greys = np.round(255 * (np.arange(100) % 10 / 100 + 0.31))
    for name, count in {"classes.png": 100, "samples.png": 64}.items():
        shown = tiles(only(run, name)[1], 0, 255)
        np.testing.assert_allclose(shown, greys[:count].reshape(-1, 1, 1) + 0 * shown, atol=1)
    preview = tiles(run.figures["preview.png"][-1].axes[0], 0, 255)
    np.testing.assert_allclose(preview[:, 14, 14], [*greys[:10]] * 2, atol=1)
    ((frames, _, _),) = run.figures["sampling.gif"]
    np.testing.assert_allclose(255 * (frames[0][:, 14, 14, 0] + 1) / 2, greys[:16], atol=1)


def test_classes_need_labels_and_without_them_none_are_read(small_data, draws_nothing, tmp_path):
    for path in small_data.glob("*images*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(data.DataError, match="labels"):
        run_ddpm.main(["--classes", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    flags = ["--T", 5, "--arch", "mlp", "--additions", "none", "--epochs", 1, "--train-images", 16, "--workers", 1]
    main_of(run_ddpm, *flags, "--data", tmp_path, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def call(small_data):
    return lambda module, *flags: main_of(module, *flags, "--data", small_data)


@pytest.mark.parametrize("additions", ["none", "all"])
@pytest.mark.parametrize("arch", denoisers.DENOISERS)
def test_every_network_learns_with_the_default_rate(arch, additions, train, draws_nothing, tmp_path):
    """Without a skip the MLP alone learned nothing but to predict 0, which has a loss of 1."""
    flags = ["--arch", arch, "--additions", additions, "--T", 20, "--batch-size", 8, "--epochs", 2, "--workers", 1]
    run = train(run_ddpm, *flags, "--train-images", 128, out=tmp_path)
    assert run.log[-1]["test_loss"] < 0.5 and run.log[-1]["train_loss"] < 0.5


@pytest.mark.parametrize("arch", vae.VAES)
def test_every_vae_learns_with_the_default_rate(arch, train, tmp_path):
    flags = ["--arch", arch, "--latent-dim", 4, "--batch-size", 16, "--epochs", 4, "--workers", 1]
    assert train(run_vae, *flags, out=tmp_path).log[-1]["test_elbo"] > -400  # 543 are those of grey 1/2


RUNS = {
    "vae": (run_vae, "adam_step", ["--latent-dim", 2]),
    "vae, Muon": (run_vae, "muon_step", ["--latent-dim", 2, "--arch", "gated"]),
    "ddpm": (run_ddpm, "adam_step", ["--T", 5, "--arch", "mlp", "--additions", "none"]),
    "ddpm, Muon": (run_ddpm, "muon_step", ["--T", 5, "--classes", "--additions", "muon"]),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("run", RUNS)
def test_every_hundredth_step_begins_without_denormal_moments_and_none_forks(
    run, workers, narrow, train, monkeypatch, tmp_path
):
    """After every step one is put into each leaf of the moments, and before the next it is looked for: by the rank that
    owns the leaf, whose mistakes come to rank 0. A rank is forked once, at the start."""
    (module, name, flags), steps, denormal, forks = RUNS[run], [], np.float32(1e-40), []
    step_of, fork = getattr(module, name), parallel.Ranks.fork
    monkeypatch.setattr(parallel.Ranks, "fork", lambda *args: forks.append(args) or fork(*args))

    def planting(params, gradient, moments, step, *rest, **more):
        def look(g, *both):
            expected = denormal if step % 100 else 0
            assert step == 1 or [moment.flat[0] for moment in both] == [expected] * 2, f"step {step}"

        def plant(g, *both):
            for moment in both:
                moment.flat[0] = denormal

        tree.map(look, gradient, moments["m"], moments["v"])
        step_of(params, gradient, moments, step, *rest, **more)
        tree.map(plant, gradient, moments["m"], moments["v"])
        steps.append(step)

    monkeypatch.setattr(module, name, planting)
    flags = [*flags, "--batch-size", 2, "--train-images", 104, "--epochs", 2, "--workers", workers]
    train(module, *flags, out=tmp_path)
    assert steps == list(range(1, 105)) and len(forks) == (workers == 2 and parallel.CAN_FORK)


# ------------------------------------------------------------------------------------------ each row of the ablation

ROWS = [list(improved.ADDITIONS)[:count] for count in range(len(improved.ADDITIONS) + 1)]


@pytest.mark.parametrize("additions", ROWS, ids=[" ".join(row) or "none" for row in ROWS])
def test_every_row_stops_resumes_and_is_measured_alike(additions, narrow, train, call, monkeypatch, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    flags = ["--T", 5, "--train-images", 48, "--batch-size", 16, "--epochs", 2, "--workers", 1]
    chosen = ["--additions", *(additions or ["none"])]
    runs = [train(run_ddpm, *flags, *chosen, out=whole)]

    asked, calls = Run.stop_if_asked, itertools.count(1)

    def interrupt(run):
        if next(calls) == 4:  # between steps 4 and 5; an epoch has 3
            os.kill(os.getpid(), signal.SIGINT)
        asked(run)

    with monkeypatch.context() as patch, pytest.raises(cli.Stopped):
        patch.setattr(Run, "stop_if_asked", interrupt)
        call(run_ddpm, *flags, *chosen, "--out", stopped)
    _, half = checkpoint.load(stopped / "checkpoint.npz")
    assert half["step"] == 4 and len(half["log"]) == 1 and half["config"]["additions"] == additions

    others = ROWS[(ROWS.index(additions) + 1) % len(ROWS)]
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(f"this run has additions {others};")):
        call(run_ddpm, *flags, "--additions", *(others or ["none"]), "--out", stopped, "--resume")

    runs.append(train(run_ddpm, *flags, *chosen, "--resume", out=stopped))
    (a, state_a), (b, state_b) = (load(folder / "checkpoint.npz") for folder in (whole, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in state["log"]] for state in (state_a, state_b)]
    assert logs[0] == logs[1]
    np.testing.assert_array_equal(*(tiles(only(run, "samples.png")[1], 0, 255) for run in runs))

    for folder in (whole, stopped):
        call(evaluate, folder, "--workers", 1, "--bound", 2)
    measured = [json.loads((folder / "metrics.json").read_text())["evaluation"] for folder in (whole, stopped)]
    assert measured[0] == measured[1] and measured[0].keys() == {"bound_estimate", "bound_exact_2"}
    assert 0 < measured[0]["bound_exact_2"]["bits_per_dimension"] < 100
