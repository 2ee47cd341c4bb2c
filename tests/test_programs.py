"""Programs in docs/ that put other programs together: dry runs, with recorded commands, made-up models and numbers."""

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import run_ddpm
import run_vae
from scratchgen import data, diffusion, improved, plots, samplers
from scratchgen.data import CLASSES, UserError, load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, reports
from scratchgen.machinery import checkpoint, files
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import numpy as np
import pytest
from conftest import ROOT, T, load, main_of, script, tick_labels, tiles

ablation = script("docs/ablation.py")
figures = script("docs/figures.py")
speed = script("docs/speed.py")
sweeps = script("docs/sweeps.py")


# ------------------------------------------------------------------------------------------------------ docs/figures.py


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
            for file in ("checkpoint.npz", "latents_1_2.png", *(f"{of}.png" for of in figures.OF_RUN.get(name, ()))):
                (tmp_path / "runs" / name / file).write_text(f"{name}/{file}")
    older = tmp_path / "runs" / "vae" / "latents_9_8.png"
    older.touch()
    os.utime(older, (1, 1))
    done = []

    def run(command, cwd):
        _, program, *flags = command
        assert cwd == ROOT.resolve()
        program = flags.pop(0) if program == "-m" else Path(program).relative_to(cwd).as_posix()
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
    before = {"vae": {"of": "an earlier run"}, "left-out": {"of": "left-out"}}
    figures.NUMBERS.write_text(json.dumps(before))
    main_of(figures, "--runs", tmp_path / "runs", "--data", small_data, "--workers", 1)

    for program, args in done:
        if program in parsers:  # the flags that the run was made with, and what draws a finished one again
            again = {"resume": True, "out": tmp_path / "runs" / args.out.name, "data": small_data, "workers": 1}
            assert vars(args) == trained[args.out.name] | again | {"command": args.command}
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
    ]
    swept = [flags for program, flags in done if program == "docs/sweeps.py"]
    assert swept == [[str(tmp_path / "runs" / "ddpm"), "--frechet", "3000"]]
    for name, of_run in figures.OF_RUN.items():
        for file in of_run:
            content = (tmp_path / f"{name.replace('-', '_')}_{file}.png").read_text()
            assert content == f"{name}/{'latents_1_2' if file == 'latents' else file}.png"
    with pytest.warns(UserWarning, match="not the published"):
        arrays = load_fashion_mnist(small_data)
    (models_of_beta, x), (x_test,) = saved["homework_beta.png"], saved["homework_prior_kl.png"]
    assert {beta: model.config["beta"] for beta, model in models_of_beta.items()} == {0: 0, 1: 1, 10: 10}
    np.testing.assert_array_equal(x, scale(arrays["test_images"][:10], 0, 1))
    np.testing.assert_array_equal(x_test, scale(arrays["test_images"], -1, 1))
    name, images = saved["ddpm_groups.png"]
    np.testing.assert_array_equal(images, arrays["train_images"])
    assert name == "ddpm" and saved["ddpm_classes_classes.png"] == ("ddpm-classes",)
    assert figures.read_numbers() == {name: {"of": name} for name in [*trained, "left-out"]}

    saved.clear()
    monkeypatch.setattr(figures.subprocess, "run", lambda command, cwd: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match="3"):  # a command that fails ends it
        main_of(figures, "--runs", tmp_path / "runs", "--data", small_data, "--workers", 1)
    assert saved == {}


def pictures(figure, rows, low):
    """The images of a grid of ten columns, (rows, 10, 28, 28), the names of its rows, and of its columns."""
    (axes,) = figure.axes
    shown = tiles(axes, low, 1, columns=10).reshape(rows, 10, 28, 28)
    return shown, tick_labels(axes.yaxis), tick_labels(axes.xaxis)


class Grey:
    """A model whose images are each of one grey, which tells how it was drawn."""

    def __init__(self, level=0):
        self.level = level
        self.schedule = diffusion.make_schedule("linear", 5)
        self.config = {"T": 5}
        self.times = []
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
        self.times.append(t[0])
        return self.groups.means_of(groups) + (np.arange(40) // 10 / 16).reshape(-1, 1, 1, 1)  # each row is brighter


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
    model = Grey()
    shown, rows, _ = pictures(figures.groups(model, train), 6, -1)
    assert model.times == samplers.timesteps(5, 2)[:-1]
    grey = shown[:, :, 0, 0]
    assert len(set(grey[0])) == 10
    np.testing.assert_allclose(grey[1:5] - grey[0], np.tile([[0], [1 / 16], [1 / 8], [3 / 16]], 10), atol=1e-6)
    np.testing.assert_allclose(grey[5], grey[4], atol=1 / 255)  # of all 256 greys, the nearest to the last sample
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


# ------------------------------------------------------------------------------------------------ docs/measure_micro.py

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


# -------------------------------------------------------------------------------------------------------- docs/speed.py


def test_between_two_points_the_logarithm_of_the_distance_is_a_line():
    curve = [(s, 100 * math.exp(-s / 10)) for s in (5, 12, 21, 40)]  # a line in the logarithm
    for target in (50, 20, 3):
        assert speed.seconds_to(curve, target) == pytest.approx(10 * math.log(100 / target))
    assert speed.seconds_to(curve, 70) == 5  # it was there at the first point
    assert math.isnan(speed.seconds_to(curve, 1))
    assert speed.seconds_to([(1, 9), (2, 4), (3, 6), (4, 2)], 4) == 2  # the first time
    assert speed.of_seeds([10.0, 14.0]) == "12 +- 3" and speed.of_seeds([1.234], 2) == "1.23"
    assert speed.of_seeds([10.0, math.nan]) == "never"


@pytest.fixture
def commands(monkeypatch, narrow_runs):
    """The commands that train. Each only writes five checkpoints, one every 40 s of a clock, from before step 1 on."""
    given = []
    arrays, state = load(narrow_runs / "ddpm" / "checkpoint.npz")
    state["config"]["epochs"] = 14  # of 100 steps, so that there is a guide from step 351 on

    class Training:
        def __init__(self, command, cwd):
            assert command[:2] == [sys.executable, str(cwd / "run_ddpm.py")] and cwd == ROOT.resolve()
            self.args = run_ddpm.parse_arguments(command[2:])
            self.written = 0
            given.append(self.args)

        def poll(self):
            path = self.args.out / "checkpoint.npz"
            path.parent.mkdir(exist_ok=True)
            if self.written == 5:
                (path.parent / "metrics.json").touch()
                return 0
            log = [{"step": 100 * n} for n in range(1, 1 + self.written)]
            of_step = {"step": 100 * self.written, "log": log, "seconds": 40.0 * self.written + self.args.seed}
            checkpoint.save(path, arrays, state | of_step)
            at = 10**18 + 40 * 10**9 * self.written
            os.utime(path, ns=(at, at))
            self.written += 1
            return None

    monkeypatch.setattr(speed.subprocess, "Popen", Training)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    return given


def test_each_copy_is_measured_once_by_the_clock_of_its_training(
    commands, small_data, x_test, tmp_path, monkeypatch, capsys
):
    drawn = []
    found = iter([30.0, 1.0, 40.0, 2.0, 9.0, 8.0, 7.0, 6.0, 25.0, 1.0])

    def draw(model, N, seed, ranks, config):
        drawn.append((N, seed, str(config)))
        return np.full((N, 28, 28, 1), len(drawn), np.uint8)

    def distance(generated, real):
        assert generated.shape == (drawn[-1][0], 28) and np.all(generated == scale(np.uint8(len(drawn)), 0, 1))
        np.testing.assert_array_equal(real, scale(x_test[:, 14, :, 0], 0, 1))
        return next(found)

    monkeypatch.setattr(speed, "draw", draw)
    monkeypatch.setattr(speed.classifier, "features", lambda params, x: x[:, 14, :, 0])
    monkeypatch.setattr(speed.metrics, "frechet_distance", distance)
    monkeypatch.setattr(speed, "TARGETS", (20, 5, 1.5))
    monkeypatch.setitem(speed.ROWS, "tiny", ["--classes", "--epochs", "2"])
    flags = ["--rows", "tiny", "--seeds", 3, 5, "--samples", 8]
    flags += ["--runs", tmp_path, "--data", small_data, "--workers", 1]
    main_of(speed, *flags)
    printed = capsys.readouterr().out.splitlines()

    asked = [(args.T, args.classes, args.epochs, args.seed, args.workers, args.resume) for args in commands]
    assert asked == [(200, True, 2, 3, 1, False), (200, True, 2, 5, 1, False)]
    folders = [tmp_path / f"speed-tiny-{seed}" for seed in (3, 5)]
    assert [args.out for args in commands] == folders and {args.data for args in commands} == {small_data}
    # Of 0, 40, .. 160 s there are copies at 0, before step 1, at 120, the first after 90 s, and at the end.
    assert [len(list((folder / "copies").glob("*.npz"))) for folder in folders] == [3, 3]
    assert drawn == [(8, 0, f"sde-dpm++, {T} steps"), (8, 0, f"sde-dpm++, {T} steps, w = 0.5")] * 2
    # Down to 20: at 123 s + 40 s log(30 / 20) / log(30 / 1), and at 125 s + 40 s log(40 / 20) / log(40 / 2).
    assert printed == [
        "tiny, seed 3: 123 s 30.00, 163 s 1.00",
        "tiny, seed 5: 125 s 40.00, 165 s 2.00",
        "| row | 20 | 5 | 1.5 | at the end |",
        "|---|---|---|---|---|",
        "| tiny | 131 +- 5 | 148 +- 6 | never | 1.50 +- 0.71 after 164 +- 1 s |",
    ]

    main_of(speed, *flags)  # neither trained nor measured again
    assert capsys.readouterr().out.splitlines() == printed and len(commands) == 2 and len(drawn) == 4
    main_of(speed, *flags, "--samples", 9)  # not trained again, but measured by other samples
    assert capsys.readouterr().out.startswith("tiny, seed 3: 123 s 9.00, 163 s 8.00") and len(commands) == 2
    assert [N for N, *_ in drawn[4:]] == [9] * 4
    shutil.rmtree(folders[0] / "copies")  # a run without copies, or one that was stopped, is resumed and not begun anew
    (folders[0] / "metrics.json").unlink()
    main_of(speed, *flags)
    assert [args.resume for args in commands[2:]] == [True]
    assert capsys.readouterr().out.splitlines()[0] == "tiny, seed 3: 123 s 25.00, 163 s 1.00"


def test_a_training_that_fails_or_is_stopped_ends_the_measurement(monkeypatch, small_data, tmp_path):
    flags = ["--rows", "paper", "--seeds", "0", "--runs", str(tmp_path), "--data", str(small_data)]
    waited = []
    child = SimpleNamespace(poll=lambda: 4, wait=lambda: waited.append(True))
    monkeypatch.setattr(speed.subprocess, "Popen", lambda command, cwd: child)
    with pytest.raises(SystemExit, match="4"):
        speed.main(flags)
    child.poll = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        speed.main(flags)
    assert waited == [True]  # until the child has saved its state


# ------------------------------------------------------------------------------------------------------- docs/sweeps.py


def measured(distance, config=None):
    """What metrics.json says of samples, as `reports.measure_samples` puts it there."""
    numbers = {"distance": distance, "precision": distance / 100, "recall": distance / 200, "share": [0.1] * 10}
    return {str(config): numbers | asdict(config)} if config else numbers


@pytest.fixture
def add(narrow):
    path = narrow / "ddpm" / "metrics.json"
    params = load_run(narrow / "ddpm").params
    return lambda numbers, N=10, seed=0: files.add_evaluation(path, params, f"frechet_{N}", numbers, seed)


@pytest.fixture
def drawn_by_sweeps(narrow, monkeypatch, capsys):
    """Call the program; {name: figure} of what it wrote into the run's folder."""

    def call(*flags):
        saved = {}
        with monkeypatch.context() as patch:
            patch.setattr(plots, "save", lambda figure, path: saved.update({path: figure}))
            sweeps.main([str(narrow / "ddpm"), "--frechet", "10", *flags])
        assert all(path.parent == narrow / "ddpm" for path in saved)
        names = [path.name for path in saved]
        assert capsys.readouterr().out == f"wrote {' and '.join(names)} in {narrow / 'ddpm'}\n"
        return {path.name: figure for path, figure in saved.items()}

    return call


def curves_of(axes):
    """The points of each curve that the legend names."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_what_was_measured_with_several_steps_and_with_several_w(add, drawn_by_sweeps):
    add({"training images": measured(1.0), "VAE": measured(50.0)})
    for steps, distance in ((200, 3.0), (10, 30.0), (20, 9.0)):  # in any order, and by several calls of `evaluate`
        add(measured(distance, SamplerConfig("ddpm", steps)))
    spread = {1: 0.2, 0: 0.1, 0.5: 0.3}  # of several draws
    for w, distance in ((1, 4.0), (0, 5.0), (0.5, 2.0)):
        of_w = measured(distance, SamplerConfig("sde-dpm++", 20, w))
        add({name: one | {"spread": spread[w]} for name, one in of_w.items()})
    found = drawn_by_sweeps()
    assert list(found) == ["steps.png", "guidance.png"]

    (axes,) = found["steps.png"].axes
    assert curves_of(axes) == {"ddpm": [[10, 30], [20, 9], [200, 3]]}  # what had 20 steps alone is no curve
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "200"]
    assert {text.get_text(): text.xy[1] for text in axes.texts} == {"training images": 1, "VAE": 50}
    levels = [line.get_ydata() for line in axes.lines if len(line.get_xydata()) == 2]
    assert [level[0] for level in levels] == [1, 50] and axes.get_yscale() == axes.get_xscale() == "log"
    assert axes.get_title() == "Fréchet distance of 10 samples"

    panels = found["guidance.png"].axes
    titles = [axes.get_title() for axes in panels]
    assert [title.split(":")[0] for title in titles] == ["Fréchet distance, 10 samples", "precision", "recall"]
    assert [axes.get_ylim()[0] for axes in panels] == [0, 0, 0]
    assert panels[1].get_ylim()[1] == panels[2].get_ylim()[1] == 1
    for axes, divisor in zip(panels, (1, 100, 200), strict=True):
        curve = [[0, 5 / divisor], [0.5, 2 / divisor], [1, 4 / divisor]]
        assert curves_of(axes) == {"sde-dpm++, 20 steps, early": curve}
    (bars,) = panels[0].collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([d - s, d + s]) for d, s in ((5, 0.1), (2, 0.3), (4, 0.2))]
    assert not panels[1].collections


def test_each_sampler_guide_and_w_has_a_curve(add, drawn_by_sweeps):
    every = {}
    for steps in (5, 10, 20):
        for sampler, w in (("ddim", 0), ("dpm++", 0), ("dpm++", 2), ("dpm++", 3)):
            for guide in ("early", "unlabelled") if w else ("early",):
                config = SamplerConfig(sampler, steps, w, guide)
                numbers = measured(steps + w + len(guide), config)
                every |= {name: one | {"agreement": w / 4} for name, one in numbers.items()}
    add(every)
    found = drawn_by_sweeps()
    curves = {"ddim": 5, "dpm++": 5}
    curves |= {f"dpm++, w = {w}, {guide}": w + len(guide) for w in (2, 3) for guide in ("early", "unlabelled")}
    assert curves_of(found["steps.png"].axes[0]) == {
        name: [[steps, steps + more] for steps in (5, 10, 20)] for name, more in curves.items()
    }
    panels = found["guidance.png"].axes
    assert panels[3].get_title().startswith("agreement: ")  # of a model with classes
    agreement = [[0, 0], [2, 0.5], [3, 0.75]]
    names = [f"dpm++, {steps} steps, {guide}" for guide in ("early", "unlabelled") for steps in (5, 10, 20)]
    assert curves_of(panels[3]) == dict.fromkeys(names, agreement)
    assert curves_of(panels[0])["dpm++, 5 steps, unlabelled"] == [[0, 10], [2, 17], [3, 18]]


def test_nothing_measured_is_said_in_one_line(add, narrow, tmp_path):
    def refused(folder, *flags):
        with pytest.raises(UserError) as error:
            sweeps.main([str(folder), *flags])
        return str(error.value)

    run = narrow / "ddpm"
    message = f"{run}: nothing was measured with 10 samples and several steps or several w"
    assert refused(run, "--frechet", "10") == message
    other = load_run(narrow / "classes").params  # numbers of other weights
    for steps in (5, 6):
        numbers = measured(float(steps), SamplerConfig("ddim", steps))
        files.add_evaluation(run / "metrics.json", other, "frechet_10", numbers, 0)
    assert refused(run, "--frechet", "10") == message
    add({"training images": measured(1.0), "VAE": measured(50.0)} | measured(3.0, SamplerConfig("ddim", 5)))
    add(measured(2.0, SamplerConfig("sde-dpm++", 6, 0.5)))
    assert refused(run, "--frechet", "10") == message  # neither two steps of one sampler, nor two w
    add(measured(2.0, SamplerConfig("ddim", 6)), N=20)
    assert refused(run, "--frechet", "10") == message  # of another number of samples
    assert "nothing was measured with 10000 samples" in refused(run)
    vae = narrow / "vae"  # which has no sampler to compare
    files.add_evaluation(vae / "metrics.json", load_run(vae).params, "frechet_10", {"VAE": measured(5.0)}, 0)
    assert "nothing was measured" in refused(vae, "--frechet", "10")
    assert "no such file" in refused(tmp_path)
    assert not list(narrow.glob("*/*.png"))
    add(measured(2.0, SamplerConfig("sde-dpm++", 6, 1)))  # now there is one sweep, for one figure
    sweeps.main([str(run), "--frechet", "10"])
    assert [path.name for path in narrow.glob("*/*.png")] == ["guidance.png"]


# ----------------------------------------------------------------------------------------------------- docs/ablation.py

ADDITIONS = list(improved.ADDITIONS)
EXPECTED = {  # run -> additions, and the decay of the moving average
    "none": ([], 0.998),
    **{ADDITIONS[count - 1]: (ADDITIONS[:count], 0.998) for count in (1, 2, 3, 4, 6, 7)},
    "ema-0": (ADDITIONS, 0),
    "x_0": (["weights"], 0.998),
}
GUIDED_RUNS = {"guide": [0, 0.5], "groups": [0, 0.5], "ema-0": [0.5]}


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """Call the ablation with nothing trained: returns the commands that it starts, and the figure that it draws."""
    (tmp_path / "runs" / "vae").mkdir(parents=True)
    (tmp_path / "runs" / "vae" / "checkpoint.npz").touch()
    (tmp_path / "docs").mkdir()
    text = "before\n<!-- ablation -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "docs" / "quality.md").write_text(text)
    started, drawn = [], []

    def start(python, *command):
        command = list(map(str, command))
        if command[0] == "docs/predict_x_0.py":
            program, by_x_0 = command[1], True
        else:
            program, by_x_0 = command[command[0] == "-m"].removesuffix(".py"), False
        flags = command[command.index(program if by_x_0 or command[0] == "-m" else command[0]) + 1 :]
        assert python == sys.executable
        if program == "run_ddpm":
            args = run_ddpm.parse_arguments(flags)
            args.out.mkdir(exist_ok=True)
            metrics = {"test_loss": len(started) + 0.5 * args.seed}
        else:
            args = evaluate.parse_arguments(flags)
            numbers = {"distance": len(started), "precision": 0.25 + args.seed, "recall": 0.125}
            rows = {f"{w:g}": numbers | {"distance": len(started) + 100 * w} for w in args.guidance or [0]}
            configs = {str(SamplerConfig("sde-dpm++", 20, float(w))): row for w, row in rows.items()}
            metrics = json.loads((args.run / "metrics.json").read_text())
            metrics["evaluation"] = {"frechet_10000": configs, "bound_exact_100": {"bits_per_dimension": 3.5}}
        started.append((program, by_x_0, args))
        folder = args.out if program == "run_ddpm" else args.run
        (folder / "metrics.json").write_text(json.dumps(metrics))

    def load_run(folder):
        def sample(N, rng, config):
            assert np.array_equal(rng.random(3), np.random.default_rng(0).random(3))
            run, seed = folder.name.removeprefix("ablation-").rsplit("-", 1)
            level = (list(EXPECTED).index(run) + config.guidance) / 10 + int(seed)
            return np.full((N, 28, 28, 1), level, np.float32)

        return SimpleNamespace(params=None, sample=sample)

    for name, path in (("FIGURE", "ablation.png"), ("NUMBERS", "ablation.json"), ("TEXT", "quality.md")):
        monkeypatch.setattr(ablation, name, tmp_path / "docs" / path)
    monkeypatch.setattr(ablation, "start", start)
    monkeypatch.setattr(ablation, "load_run", load_run)
    monkeypatch.setattr(files, "read_metrics", lambda path, params: json.loads(path.read_text()))
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))
    monkeypatch.chdir(tmp_path)

    def call(*seeds):
        started.clear()
        drawn.clear()
        ablation.main(["--runs", "runs", "--seeds", *map(str, seeds)])
        return started, drawn

    return call


def test_each_run_of_the_ablation_is_trained_and_measured_once(dry, tmp_path):
    started, [(figure, path)] = dry(3, 1)
    assert len(started) == 2 * 2 * len(EXPECTED)
    for number, (program, by_x_0, args) in enumerate(started):
        seed = (3, 1)[number // (2 * len(EXPECTED))]
        run = list(EXPECTED)[number // 2 % len(EXPECTED)]
        folder = tmp_path / "runs" / f"ablation-{run}-{seed}"
        assert (program, by_x_0) == (("run_ddpm", "scratchgen.evaluate")[number % 2], run == "x_0")
        if number % 2 == 0:
            assert (args.additions, args.ema) == EXPECTED[run] and (args.seed, args.out) == (seed, folder)
            assert (args.T, args.epochs, args.lr, args.batch_size, args.classes) == (200, 7, 0.01, 128, False)
        else:
            assert (args.run, args.frechet, args.bound) == (folder, 10_000, 100) and args.seed == 0
            assert (args.sampler, args.steps) == (["sde-dpm++"], [20]) and args.vae == tmp_path / "runs" / "vae"
            assert args.guidance == GUIDED_RUNS.get(run)

    assert path == tmp_path / "docs" / "ablation.png"
    levels = [0, 1, 2, 3, 4, 5, 5.5, 6.5, 6, 7.5]  # the place of each row's run, and the w that it is drawn with
    shown, names, _ = pictures(figure, len(levels), 0)
    np.testing.assert_allclose(shown[:, 0, 0, 0], np.array(levels) / 10 + 3, atol=1e-6)  # of the first seed
    assert names == [row for row in ablation.ROWS if "x_0" not in row]
    assert dry(3, 1)[0] == []  # all is there


def test_the_table_of_the_ablation_has_the_mean_over_all_seeds_so_far(dry, tmp_path):
    dry(2)
    dry(0)
    before, _, *rows, _, after = (tmp_path / "docs" / "quality.md").read_text().splitlines()
    head, line, *rows = [re.split(r" *\| *", row)[1:-1] for row in rows]
    assert (before, after) == ("before", "after") and head[1:] == [*ablation.COLUMNS, "seeds"]
    assert set(line) == {"---"} and [row[0] for row in rows] == list(ablation.ROWS)
    # Run number n is trained by command 2 n and measured by command 2 n + 1.
    places = [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8]
    for (_, loss, bits, distance, *rest, seeds), n, w in zip(
        rows, places, [0] * 6 + [0.5, 0.5, 0, 0.5, 0], strict=True
    ):
        losses = np.array([2 * n + 1, 2 * n])  # of seeds 2 and 0
        assert loss == f"{losses.mean():.4f} +- {losses.std(ddof=1):.4f}" and bits == "3.50 +- 0.00"
        assert distance == f"{2 * n + 1 + 100 * w:.1f} +- 0.0"
        assert rest == ["0.250 +- 0.000", "0.125 +- 0.000"] and seeds == "0, 2"


def test_a_damaged_metrics_json_is_one_line_of_the_ablation(dry, tmp_path):
    dry(0)
    (tmp_path / "runs" / "ablation-v-0" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="ablation-v-0.*expected the numbers of this run"):
        dry(0)
    shutil.rmtree(tmp_path / "runs" / "vae")
    with pytest.raises(UserError, match="expected a finished run of run_vae.py"):
        dry(0)


def test_a_program_that_fails_or_is_stopped_ends_the_ablation(monkeypatch):
    ablation.start(sys.executable, "-c", "pass")
    with pytest.raises(SystemExit, match="4"):
        ablation.start(sys.executable, "-c", "raise SystemExit(4)")
    wait = Mock(side_effect=[KeyboardInterrupt, 130])
    monkeypatch.setattr(ablation.subprocess, "Popen", lambda command, cwd: SimpleNamespace(wait=wait))
    with pytest.raises(KeyboardInterrupt):
        ablation.start("run_ddpm.py")
    assert wait.call_count == 2  # until the child has saved its state
