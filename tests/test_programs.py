"""Programs in docs/ that put other programs together: dry runs, with recorded commands and made-up models."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import run_ddpm
import run_vae
from scratchgen import data, diffusion, improved, plots, samplers
from scratchgen.data import CLASSES, load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, reports

import numpy as np
import pytest
from conftest import ROOT, main_of, script

figures = script("docs/figures.py")


def test_figures_are_remade_by_the_commands_of_the_help(small_data, tmp_path, monkeypatch, capsys):
    """Commands are only parsed, and each file of a run has its own name in it."""
    parsers = {"run_vae.py": run_vae, "run_ddpm.py": run_ddpm}
    trained = {}
    models = {}
    for line in figures.__doc__.splitlines():
        if "python run_" in line:
            program, *flags = shlex.split(line)[1:]
            args = parsers[program].parse_arguments(flags)
            name = args.out.name
            trained[name] = vars(args)
            models[name] = SimpleNamespace(name=name, config=vars(args), params=None, log=[{"test_loss": 0.5}])
            (tmp_path / "runs" / name).mkdir(parents=True)
            for file in ("checkpoint.npz", "latents_9_8.png", *(f"{of}.png" for of in figures.OF_RUN.get(name, ()))):
                (tmp_path / "runs" / name / file).write_text(f"{name}/{file}")
    older = tmp_path / "runs" / "vae" / "latents_1_2.png"
    older.touch()
    os.utime(older, (1, 1))
    done = []

    def run(command, cwd):
        _, program, *flags = command
        assert cwd == ROOT
        program = flags.pop(0) if program == "-m" else Path(program).relative_to(ROOT).as_posix()
        parse = {"scratchgen.evaluate": evaluate.parse_arguments, "docs/sweeps.py": list}
        done.append((program, (parse.get(program) or parsers[program].parse_arguments)(flags)))
        return SimpleNamespace(returncode=0)

    saved = {}
    monkeypatch.setattr(figures.subprocess, "run", run)
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.update({path.name: figure}))
    made_up = {"FIGURES": tmp_path, "NUMBERS": tmp_path / "numbers.json", "TEXTS": []}
    made_up |= {"load_run": lambda path: models[path.name], "load_trained": lambda name: name}
    made_up |= {name: lambda *args: args for name in ("beta_rows", "classes", "groups", "prior_kl")}
    made_up["numbers_of"] = lambda path, model: {"of": path.parent.name}
    for name, value in made_up.items():
        monkeypatch.setattr(figures, name, value)
    main_of(figures, "--runs", tmp_path / "runs", "--data", small_data, "--workers", 1)

    for program, args in done:
        if program in parsers:  # the flags that the run was made with, and what draws a finished one again
            name = args.out.name
            again = {"resume": True, "out": tmp_path / "runs" / name, "data": small_data, "workers": 1}
            assert vars(args) == trained[name] | again | {"command": args.command}
    measured = [
        (args.run.name, args.bound, args.frechet, args.sampler, args.steps, args.guidance, args.guide)
        for program, args in done
        if program == "scratchgen.evaluate"
    ]
    assert measured == [
        ("vae", None, None, None, None, None, None),
        ("ddpm", 100, None, None, None, None, None),
        ("ddpm", None, 3000, ["ddpm", "sde-dpm++"], [20, 50, 200], None, None),
        ("ddpm", None, 3000, None, None, [0, 0.25, 0.5, 1], None),
        ("ddpm-classes", None, 3000, None, None, [0, 0.5, 1, 2], ["early", "unlabelled"]),
    ]
    swept = [flags for program, flags in done if program == "docs/sweeps.py"]
    assert swept == [[str(tmp_path / "runs" / name), "--frechet", "3000"] for name in ("ddpm", "ddpm-classes")]
    for name, files in figures.OF_RUN.items():
        for file in files:
            content = (tmp_path / f"{name.replace('-', '_')}_{file}.png").read_text()
            assert content == f"{name}/{'latents_9_8' if file == 'latents' else file}.png"
    with pytest.warns(UserWarning, match="not the published"):
        arrays = load_fashion_mnist(small_data)
    (models_of_beta, x), (x_test,) = saved["homework_beta.png"], saved["homework_prior_kl.png"]
    assert {beta: model.config["beta"] for beta, model in models_of_beta.items()} == {0: 0, 1: 1, 10: 10}
    np.testing.assert_array_equal(x, scale(arrays["test_images"][:10], 0, 1))
    np.testing.assert_array_equal(x_test, scale(arrays["test_images"], -1, 1))
    name, images = saved["ddpm_groups.png"]
    np.testing.assert_array_equal(images, arrays["train_images"])
    assert name == "ddpm" and saved["ddpm_classes_classes.png"] == ("ddpm-classes",)
    assert figures.read_numbers() == {name: {"of": name} for name in trained}


def pictures(figure, rows, low):
    """The images of a grid of ten columns, (rows, 10, 28, 28), the names of its rows, and of its columns."""
    (axes,) = figure.axes
    (image,) = axes.images
    assert (image.norm.vmin, image.norm.vmax) == (low, 1)
    shown = np.pad(image.get_array(), [(0, 1), (0, 1)]).reshape(rows, 29, 10, 29)[:, :28, :, :28].swapaxes(1, 2)
    return shown, *([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))


class Grey:
    """A model whose images are each of one grey, which tells how it was drawn."""

    def __init__(self, level=0):
        self.level = level
        self.schedule = diffusion.make_schedule("linear", 5)
        self.config = {"T": 5}
        means = np.arange(300, dtype=np.float32).reshape(1, 300, 1, 1, 1) / 300 - 0.5
        self.groups = improved.Groups(np.tile(means, (1, 1, 28, 28, 1)), np.full((1, 300), 1 / 300))

    def encode(self, x):
        return x.mean(axis=(1, 2, 3)).reshape(-1, 1), None

    def generate(self, z):
        return np.broadcast_to((self.level + z[:, :1] / 100).reshape(-1, 1, 1, 1), (len(z), 28, 28, 1))

    def sample(self, N, rng):
        return np.broadcast_to((np.arange(N) % 10).reshape(-1, 1, 1, 1) / 10, (N, 28, 28, 1))

    def trajectory(self, x_T, rng, config):
        assert rng.random() == np.random.default_rng(1).random()  # the same groups for each row
        assert np.ptp(x_T, axis=0).max() == 0 and config.sampler == "dpm++"
        yield 0, np.full_like(x_T, config.guidance / 8 if config.guide == "early" else -config.guidance / 8)

    def sampler_config(self):
        return samplers.SamplerConfig("ddim", 2)

    def x_0_guided(self, x_t, t, groups, config):
        return self.groups.means_of(groups)


def test_the_figures_of_classes_groups_and_betas():
    shown, rows, columns = pictures(figures.classes(Grey()), 14, -1)
    assert np.all(np.ptp(shown, axis=(2, 3)) == 0) and columns == list(CLASSES)
    grey = shown[:, :, 0, 0]
    np.testing.assert_allclose(grey[:5], np.tile(np.arange(10) / 5 - 1, (5, 1)), atol=1e-6)  # a column a class
    guided = [(sign, guide, w) for sign, guide in ((1, "early"), (-1, "unlabelled")) for w in (0.5, 1, 2, 4)]
    np.testing.assert_allclose(grey[5:, 3], [0, *(sign * w / 8 for sign, _, w in guided)])  # no row twice
    assert rows[:5] == [f"sample {number}, default" for number in range(1, 6)]
    assert rows[5:] == ["unguided", *(f"{guide}, w = {w:g}" for _, guide, w in guided)]

    train = (np.arange(256, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8))[::-1]
    shown, rows, _ = pictures(figures.groups(Grey(), train), 6, -1)
    grey = shown[:, :, 0, 0]
    assert len(set(grey[0])) == 10
    np.testing.assert_allclose(grey[:5], np.tile(grey[0], (5, 1)), atol=1e-6)
    np.testing.assert_allclose(grey[5], grey[0], atol=1 / 255)  # the nearest of all 256 greys
    assert rows == ["mean of group", *(f"sample {number}" for number in range(1, 5)), "nearest to it"]

    x = np.linspace(0, 1, 10, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 28, 28, 1), np.float32)
    shown, rows, _ = pictures(figures.beta_rows({beta: Grey(level) for beta, level in ((0, 0.2), (10, 0.6))}, x), 5, 0)
    grey = shown[:, :, 0, 0]
    greys = np.linspace(0, 1, 10)
    np.testing.assert_allclose(grey[:3], [greys, 0.2 + greys / 100, 0.6 + greys / 100], atol=1e-6)
    np.testing.assert_allclose(grey[4] - grey[3], 0.4, atol=1e-6)  # of the same z
    names = [f"$\\beta$ = {beta}, from ${of}$" for of in ("\\mu", "z") for beta in (0, 10)]
    assert rows == ["test images", *names] and len(set(grey[3])) == 10


def test_the_figure_of_the_prior(x_test):
    (axes,) = figures.prior_kl(scale(x_test, -1, 1)).axes
    curves = {line.get_label(): line.get_xydata() for line in axes.lines if line.get_label()[0] != "_"}
    assert list(curves) == ["linear, unscaled", "linear, scaled by 1000 / T", "cosine"]
    for name, points in curves.items():
        T = int(points[20, 0])
        betas = np.linspace(1e-4, 0.02, T) * (1000 / T if "scaled by" in name else 1)
        alpha_bar = np.cumprod(1 - betas)[-1]
        if name == "cosine":
            alpha_bar = diffusion.make_schedule("cosine", T)["alpha_bar"][-1]
        x = scale(x_test, -1, 1).reshape(len(x_test), -1)
        kl = 0.5 * (alpha_bar * (x**2).sum(axis=1) - 784 * (alpha_bar + np.log1p(-alpha_bar))).mean()
        assert points[20, 1] == pytest.approx(kl, rel=1e-3)


ONE_PAGE = """
import numpy as np
D, rng, log_3 = 3, None, 1.0986123
main = lambda data: ("decoder", "network")
sigmoid = lambda x: 1 / (1 + np.exp(-x))
mlp = lambda params, z: (np.full((len(z), 784), (params == "decoder") * log_3 + z[0, 0] / 100), None)
sample = lambda params, n: np.full((n, 784), (params == "network") * -0.5 + rng.standard_normal() / 100)
"""


def test_the_one_page_is_measured_like_the_package(monkeypatch, tmp_path, capsys, x_test):
    """Its models are made up: the pixels of the VAE are about 0.75, those of the other -0.5, which means 0.25."""
    (tmp_path / "scratchgen").mkdir()
    (tmp_path / "scratchgen" / "micro.py").write_text(ONE_PAGE)
    micro = script("docs/measure_micro.py")
    seen = []

    def sample_metrics(features, real, params):
        np.testing.assert_allclose(real, x_test[:, 14, 14] / 255, rtol=1e-6)
        assert len(features) == 1000
        seen.append(features.mean())
        return {"distance": 10.0 * len(seen), "precision": 0.1 * len(seen), "recall": 0.05 * len(seen)}

    monkeypatch.setattr(micro, "ROOT", tmp_path)
    monkeypatch.setattr(micro, "N", 1000)
    monkeypatch.setattr(data, "load_fashion_mnist", lambda folder, labels: {"test_images": x_test})
    monkeypatch.setattr(classifier, "features", lambda params, x: x[:, 14, 14])
    monkeypatch.setattr(reports, "sample_metrics", sample_metrics)
    micro.main([])
    np.testing.assert_allclose(seen, [0.75] * 3 + [0.25] * 3, atol=0.02)
    assert len(set(seen)) == 6  # each draw has noise of its own
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| VAE of `python scratchgen/micro.py` | 20.0 +- 10.0 | 0.200 | 0.100 |",
        "| DDPM of `python scratchgen/micro.py` | 50.0 +- 10.0 | 0.500 | 0.250 |",
    ]
