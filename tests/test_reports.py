"""python -m scratchgen.evaluate: what its numbers are made of, what it prints, what is refused; nothing is lost."""

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

from scratchgen import diffusion, plots, trained, vae
from scratchgen.data import CLASSES, UserError, load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, metrics, reports
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import Ranks
from scratchgen.machinery.run import SAMPLES, rng_for
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import draw, load_run

import numpy as np
import pytest
from conftest import T, load, main_of


@pytest.fixture
def measure(narrow, small_data):
    def run(model, *flags, workers=1):
        main_of(evaluate, narrow / model, "--data", small_data, "--workers", workers, *flags)
        return json.loads((narrow / model / "metrics.json").read_text()).get("evaluation", {})

    return run


@pytest.fixture
def noise(monkeypatch):
    """All random numbers of the evaluation: {what a generator is for: what it drew}."""
    drawn = {}

    class Recording:
        def __init__(self, *key):
            self.rng = rng_for(*key)
            self.drawn = drawn.setdefault(key, [])

        def __getattr__(self, name):
            def call(*args, **options):
                self.drawn.append(getattr(self.rng, name)(*args, **options))
                return self.drawn[-1]

            return call

    for module in (reports, trained):
        monkeypatch.setattr(module, "rng_for", Recording)
    return drawn


def all_differ(arrays):
    """Whether no two of these are the same noise, not even in part: their first numbers differ."""
    return len({np.ravel(array)[:4].tobytes() for array in arrays}) == len(arrays)


def printed(out, name):
    """(value, remark) of the line that begins with this name."""
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    assert len(line) <= 80
    value, _, remark = line[len(name) :].strip().partition("  ")
    return float(value), remark


# ----------------------------------------------------------------------------------------------------------------- VAE


def test_vae_numbers(narrow, measure, x_test, noise, monkeypatch, capsys):
    drawn = []
    figure = plots.latent_use
    monkeypatch.setattr(plots, "latent_use", lambda *args: drawn.append(args) or figure(*args))
    found = measure("vae", "--iwae", 30, "--seed", 2)
    out = capsys.readouterr().out
    model = load_run(narrow / "vae")
    x = scale(x_test, 0, 1)
    mu, log_var = vae.mlp_encode(model.params, x)
    kl = 0.5 * (mu**2 + np.exp(log_var) - 1 - log_var).mean(axis=0)
    variance, spread = mu.var(axis=0), np.exp(log_var).mean(axis=0)
    active = variance > 0.01
    assert active.tolist() == [True, False, True, True]
    names = ("kl_per_dimension", "variance_of_mu", "mean_of_variance")
    for name, of_figure, expected in zip(names, drawn[0], (kl, variance, spread), strict=False):
        np.testing.assert_allclose(found["latent"][name], expected, atol=1e-4)
        np.testing.assert_allclose(of_figure, expected, rtol=1e-4)
    assert drawn[0][3].tolist() == active.tolist() and found["latent"]["active_units"] == active.sum()
    remark = f"of 4; their KL: {kl[active].sum():.2f} nats"
    assert printed(out, "active latent dimensions") == (active.sum(), remark)
    assert out.count("wrote") == 1 and (narrow / "vae" / "latent_use.png").stat().st_size > 1000

    keys = [(2, trained.IMPORTANCE, n) for n in range(40)]
    assert noise.keys() == set(keys)
    eps = np.concatenate([np.concatenate(noise[key]) for key in keys])
    assert eps.shape == (40 * 30, 4) and all_differ(eps)
    rngs = [rng_for(*key) for key in keys]
    expected = vae.importance_weighted_bound(model.encode, model.decode, x, 30, rngs).mean()
    assert found["iwae_30"]["log_likelihood"] == pytest.approx(expected, rel=1e-6)
    bound, remark = printed(out, "importance-weighted bound, K = 30")
    assert bound == pytest.approx(expected, abs=5.1e-3) and remark == "nats per image"


def test_measures_add_up_and_workers_change_nothing(measure, capsys):
    first = measure("vae", "--iwae", 3)
    second = measure("vae", "--iwae", 7, workers=2)
    assert second.keys() == {"latent", "iwae_3", "iwae_7"} and second["iwae_3"] == first["iwae_3"]
    assert measure("vae", "--iwae", 7)["iwae_7"] == second["iwae_7"]
    flags = ["--bound", 3, "--frechet", 40, "--seed", 1, "--sampler", "ddim", "--steps", 3]
    capsys.readouterr()
    one = measure("ddpm", *flags)
    out = capsys.readouterr().out
    assert measure("ddpm", *flags, workers=2) == one and capsys.readouterr().out == out
    found = measure("ddpm", "--frechet", 40, "--sampler", "ddpm")["frechet_40"]  # numbers of two seeds do not mix
    assert found.keys() == {"training images", "VAE", "ddpm, 6 steps", "seed"} and found["seed"] == 0


def test_a_run_on_other_images_or_labels_is_not_measured_on_these(narrow, measure, small_data, tmp_path):
    (tmp_path / "others").mkdir()
    for name, place, models in (
        ("train-images-idx3", 16 + 31 * 784, ["vae", "ddpm", "classes"]),  # a pixel of the last that it was trained on
        ("t10k-images-idx3", 16 + 39 * 784, ["vae", "ddpm", "classes"]),
        ("train-labels-idx1", 8 + 31, ["classes"]),
        ("t10k-labels-idx1", 8 + 39, ["classes"]),
    ):
        others = shutil.copytree(small_data, tmp_path / "others", dirs_exist_ok=True)
        content = bytearray((small_data / f"{name}-ubyte").read_bytes())
        content[place] ^= 1
        (others / f"{name}-ubyte").write_bytes(content)
        for model in models:
            for flags in ([], ["--frechet", 10]):
                with pytest.raises(cli.UsageError, match=f"{model} was trained on other images"):
                    measure(model, "--data", others, *flags)
            assert not (narrow / model / "metrics.json").exists()
    path = narrow / "vae" / "checkpoint.npz"
    arrays, state = load(path)
    state["config"]["train_images"] = "32 of CRC-32 00000000"
    checkpoint.save(path, arrays, state)
    with pytest.raises(cli.UsageError, match="vae was trained on other images"):  # nor is it compared with others
        measure("ddpm", "--frechet", 10)


# ----------------------------------------------------------------------------------------------------- diffusion model


def group_bits(known, x, labels):
    """Of each image the group of its class whose mean is nearest: -log2 of its share, per pixel, and its number."""
    C, G = known.shares.shape
    classes = np.zeros(len(x), int) if labels is None else labels.astype(int)
    squares = ((x.reshape(len(x), 1, -1) - known.means[classes].reshape(len(x), G, 784)) ** 2).sum(axis=2)
    within = squares.argmin(axis=1)
    return -np.log2(known.shares[classes, within]) / 784, G * classes + within


@pytest.mark.parametrize("name", ["ddpm", "classes", "paper"])
def test_each_term_of_the_bound_is_of_its_image_group_noise_and_t(
    name, narrow, measure, small_data, x_test, noise, monkeypatch, capsys
):
    """With terms t^2 + m, where m is the mean of the image, and 1 - m for the prior, all of it is known."""
    seen = []
    figures = []

    def terms(x_0_theta, schedule, x_0, t, eps, groups):
        of_each = [None] * len(t) if groups is None else groups.tolist()
        seen.extend(zip(x_0, t.tolist(), eps, of_each, strict=True))
        np.testing.assert_array_equal(x_0_theta(x_0, t, groups), model.x_0_theta(x_0, t, groups))
        return 784 * np.log(2) * (t**2 + x_0.mean(axis=(1, 2, 3), dtype=np.float64))

    model = load_run(narrow / name)
    monkeypatch.setattr(diffusion, "prior_kl", lambda schedule, x: 784 * np.log(2) * (1 - x.mean(axis=(1, 2, 3))))
    figure = plots.bound_over_t
    monkeypatch.setattr(diffusion, "bound_terms", terms)
    monkeypatch.setattr(plots, "bound_over_t", lambda *args: figures.append(args) or figure(*args))
    measure(name, "--seed", 2)
    estimated = seen.copy()
    seen.clear()
    capsys.readouterr()
    found = measure(name, "--bound", 5, "--seed", 2)
    out = capsys.readouterr().out
    estimate, exact = found["bound_estimate"], found["bound_exact_5"]

    x = scale(x_test, -1, 1)
    labels = np.frombuffer((small_data / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8)[8:]
    group, numbers = 0 * labels, [None] * 40
    if name != "paper":
        group, numbers = group_bits(model.groups, x, labels if name == "classes" else None)
    mean = x.mean(axis=(1, 2, 3), dtype=np.float64)
    prior = 1 - mean
    place = {image.tobytes(): n for n, image in enumerate(x)}
    assert len(place) == 40
    assert all(numbers[place[x_0.tobytes()]] == g for x_0, _, _, g in estimated + seen)

    t_of = {place[x_0.tobytes()]: t for x_0, t, *_ in estimated}
    assert len(estimated) == len(t_of) == 40 and set(t_of.values()) == set(range(1, T + 1))
    t = np.array([t_of[n] for n in range(40)])
    exactly = seen[40:]
    every_t = range(1, T + 1)
    assert {(place[x_0.tobytes()], t) for x_0, t, *_ in exactly} == {(n, t) for n in range(5) for t in every_t}
    assert len(exactly) == 5 * T
    out = out[out.rindex("bound, 40 images") :]
    for line, numbers, terms in (
        ("bound, 40 images at one t each", estimate, T * (t**2 + mean)),
        ("bound, 5 images at every t", exact, T * mean[:5] + sum(t**2 for t in every_t)),
    ):
        bits = (group + prior)[: len(terms)] + terms
        assert numbers["bits_per_dimension"] == pytest.approx(bits.mean(), rel=1e-6)
        assert numbers["standard_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(len(bits)), rel=1e-6)
        value, remark = printed(out, line)
        assert value == pytest.approx(bits.mean(), abs=5.1e-4)
        assert remark == f"bits per dimension, +- {numbers['standard_error']:.3f}"
    decoder = 1 + mean[:5].mean()
    parts = {"group": group[:5].mean(), "prior": prior[:5].mean(), "decoder": decoder}
    parts["between"] = bits.mean() - sum(parts.values())
    for line, part in (
        ("which group it is", "group"),
        ("L_T, the prior", "prior"),
        ("L_1 to L_5", "between"),
        ("L_0, the decoder", "decoder"),
    ):
        assert exact[part] == pytest.approx(parts[part], rel=1e-5)
        assert printed(out, f"    {line}")[0] == pytest.approx(parts[part], abs=5.1e-4)

    assert all_differ([eps for _, _, eps, _ in estimated + exactly])  # by image and by t
    np.testing.assert_allclose(np.std([eps for _, _, eps, _ in exactly], axis=(1, 2, 3)), 1, atol=0.15)
    assert [key[0] for key in noise] == [2, 2]  # of a generator for each of the two bounds

    at_one_t = [one**2 + mean[t == one].mean() for one in every_t]
    at_all_t = [one**2 + mean[:5].mean() for one in every_t]
    s = model.schedule
    weights = s["beta"][2:] ** 2 / (2 * s["posterior_variance"][2:] * s["alpha"][2:] * (1 - s["alpha_bar"][2:]))
    for args, over_t, numbers in zip(figures, (at_one_t, at_all_t), (estimate, exact), strict=True):
        assert args[0].tolist() == [1, 2, 3, 4, 5, 6] and args[2] == numbers["bits_per_dimension"]
        np.testing.assert_allclose(args[1], over_t, rtol=1e-5)
        np.testing.assert_allclose(args[3], weights / np.log(2), rtol=1e-5)  # Eq. (12) of the paper


# ------------------------------------------------------------------------------------------- samples beside real images


def tables(out):
    """The cells of the three tables: distances, the nearest and the variance, shares and confidences; by name."""
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    header = next(n for n, line in enumerate(lines) if line.startswith("40 images each"))
    assert lines[header].split()[3:] == ["Frechet", "+-", "precision", "recall", "asked"]
    nearest = next(n for n, line in enumerate(lines) if line.split() == ["nearest", "variance"])
    classes = next(n for n, line in enumerate(lines) if line.split() == [name[:4] for name in CLASSES])
    assert lines[classes - 1] == "What the classifier takes them for, in %, and how sure it is, in %:"
    assert all(line.startswith("    how sure") for line in lines[classes + 2 :: 2])
    shares = [line[29:].split() for line in lines[classes + 1 :]]
    return (
        {line[:41].strip(): line[41:].split() for line in lines[header + 1 : nearest - 2]},
        {line[:41].strip(): line[41:].split() for line in lines[nearest + 1 : classes - 1]},
        {line[:29].strip(): row for line, *row in zip(lines[classes + 1 :: 2], shares[::2], shares[1::2], strict=True)},
    )


def test_samples_beside_training_images_and_those_of_the_vae(narrow, measure, small_data, noise, capsys):
    """Of two draws: all that is written from what was drawn, all that is printed from what is written."""
    flags = ["--frechet", 40, "--seed", 3, "--draws", 2, "--guidance", 1.5, "--guide", "early", "unlabelled"]
    configs = [SamplerConfig("sde-dpm++", T, 1.5, guide) for guide in ("early", "unlabelled")]
    found = measure("classes", *flags)["frechet_40"]
    out = capsys.readouterr().out
    assert found.pop("seed") == 3 and list(found) == ["training images", "VAE", *map(str, configs)]
    keys = [(seed, SAMPLES, place) for seed in (3, 4) for place in (0, 32)]
    assert noise.keys() == {*keys, (3, reports.REAL), (4, reports.REAL)}
    assert all_differ([drawn[0] for drawn in noise.values()])
    for key in keys:  # the z of the VAE, and then of each guide x_T, and the noise of its steps
        z, *rest = [array for array in noise[key] if array.dtype == np.float32]
        half = len(rest) // 2
        assert z.shape == (32, 4) and len(rest) == 2 * half and all_differ(rest[:half])
        np.testing.assert_array_equal(rest[:half], rest[half:])

    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(small_data)
    params = classifier.load_classifier()
    model, train = load_run(narrow / "classes"), data["train_images"]
    labels = np.arange(40) % 10
    images = {
        "training images": [train[rng_for(seed, reports.REAL).permutation(200)[:40]] for seed in (3, 4)],
        "VAE": [draw(load_run(narrow / "vae"), 40, seed, Ranks(1)) for seed in (3, 4)],
    }
    for config in configs:
        images[str(config)] = [draw(model, 40, seed, Ranks(1), labels, config=config) for seed in (3, 4)]
        settings = {key: found[str(config)].pop(key) for key in ("sampler", "steps", "guidance", "guide")}
        assert SamplerConfig(**settings) == config  # docs/sweeps.py reads them
    x_of = lambda images: classifier.features(params, scale(images, 0, 1))  # noqa: E731
    for name, drawn in images.items():
        asked = None if name in ("training images", "VAE") else labels
        ones = [reports.sample_metrics(x_of(x), x_of(data["test_images"]), params, asked) for x in drawn]
        expected = {key: np.mean([one[key] for one in ones], axis=0) for key in ones[0]}
        expected |= {"spread": np.std([one["distance"] for one in ones], ddof=1), "draws": 2}
        expected["nearest"] = metrics.nearest_distance(drawn[0], train).mean()
        assert found[name].keys() == expected.keys() and ("agreement" in expected) == (asked is not None)
        for key in expected:
            np.testing.assert_allclose(found[name][key], expected[key], rtol=1e-3, atol=6e-4, err_msg=key)
    assert found["training images"]["nearest"] < 0.2 < 1 < found["VAE"]["nearest"]
    assert found["training images"]["precision"] != found["training images"]["recall"]

    distances, others, shares = tables(out)
    nearest = metrics.nearest_distance(data["test_images"], train).mean()
    assert others.pop("test images") == [f"{nearest:.1f}", "1.000"]
    assert list(distances) == list(others) == list(found)
    for name, numbers in found.items():
        row = [f"{numbers[key]:.2f}" for key in ("distance", "spread")]
        row += [f"{numbers[key]:.3f}" for key in ("precision", "recall", "agreement") if key in numbers]
        assert distances[name] == row
        assert others[name] == [f"{numbers['nearest']:.1f}", f"{numbers['variance']:.3f}"]
        row = [
            [f"{100 * number:.{digits}f}" for number in numbers[key]]
            for key, digits in (("share", 1), ("confidence", 0))
        ]
        assert shares[name[:29].strip()] == row
    assert "2 draws differ" in out and "warning: 40 images say little" in out
    assert out.count("asked: the share that a classifier takes for the class that was asked for") == 1


def test_samples_are_compared_with_the_vae_that_is_named(narrow, measure, small_data, monkeypatch, capsys):
    arrays, state = load(narrow / "vae" / "checkpoint.npz")
    (narrow / "other").mkdir()
    arrays["params/decoder/2/b"] = arrays["params/decoder/2/b"] + 1
    checkpoint.save(narrow / "other" / "checkpoint.npz", arrays, state)
    beside = measure("ddpm", "--frechet", 10)["frechet_10"]
    assert not (narrow / "ddpm" / "bound.png").exists()  # an exact one that was there stays
    assert f"sde-dpm++, {T} steps, w = 0.5" in beside
    named = measure("ddpm", "--frechet", 10, "--vae", narrow / "other")["frechet_10"]
    assert named["VAE"] == measure("other", "--frechet", 10)["frechet_10"]["VAE"] != beside["VAE"]
    assert not {"spread", "draws", "agreement"} & named["VAE"].keys()  # of one draw, without classes
    out = capsys.readouterr().out
    assert "draws" not in out and "asked: " not in out
    monkeypatch.chdir(narrow / "ddpm")  # where the VAE beside it is no part of the path
    main_of(evaluate, ".", "--data", small_data, "--workers", 1, "--frechet", 10, "--steps", 1)
    assert json.loads(Path("metrics.json").read_text())["evaluation"]["frechet_10"]["VAE"] == beside["VAE"]


@pytest.mark.parametrize("N", [999, 1000, 1001])
def test_fewer_than_a_thousand_are_warned_of_and_copies_are_looked_for_among_the_first_thousand(
    N, narrow, monkeypatch, capsys
):
    looked_at = []
    monkeypatch.setattr(classifier, "features", lambda params, x: x.reshape(len(x), -1)[:, 300:364])
    monkeypatch.setattr(metrics, "nearest_distance", lambda images, _: looked_at.append(len(images)) or np.zeros(1))
    images = np.random.default_rng(0).integers(0, 256, (1001, 28, 28, 1)).astype(np.uint8)
    model = load_run(narrow / "vae")
    report = reports.Report(narrow / "vae", model, 0)
    data = {"train_images": images, "test_images": images[:40]}
    reports.measure_samples(report, model, data, Ranks(1), N, 1, [], None)
    assert looked_at == [min(N, 1000)] * 2 + [40]  # training images, samples, test images
    assert (f"warning: {N} images say little" in capsys.readouterr().out) == (N < 1000)


def test_sample_metrics():
    """Of features from which the classifier, all but certain, says class 3 for the first half and 8 for the second."""
    F = 4
    params = {"classes": {"w": np.zeros((F, 10)), "b": np.zeros(10)}}
    params["classes"]["w"][0, [3, 8]] = 50, -50
    features = np.random.default_rng(0).standard_normal((10, F))
    features[:, 0] = np.repeat([1, -1], 5)
    found = reports.sample_metrics(features, features, params, np.array([3, 3, 3, 0, 0, 8, 8, 8, 8, 8]))
    assert found["share"].tolist() == [0, 0, 0, 0.5, 0, 0, 0, 0, 0.5, 0]
    assert found["confidence"] == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0, 1, 0])
    assert found["agreement"] == 0.8 and found["precision"] == found["recall"] == 1
    assert found["distance"] == pytest.approx(0, abs=1e-9)
    others = np.concatenate([features, features + 1e6])  # half of which are like no real ones
    found = reports.sample_metrics(others, features, params)
    assert found["precision"] == 0.5 and found["recall"] == 1 and "agreement" not in found
    assert found["variance"] == pytest.approx(others.var(axis=0).sum() / features.var(axis=0).sum())
    params["classes"]["w"][0, [3, 8]] = 0.5, -0.5  # less certain: of ten classes, one has e^0.5 and one e^-0.5
    found = reports.sample_metrics(features, features, params)
    assert found["confidence"][[3, 8]] == pytest.approx(np.exp(0.5) / (np.exp(0.5) + np.exp(-0.5) + 8))


# ------------------------------------------------------------------------------------------------------ what is refused


OF_SAMPLES = ("--sampler ddim", "--steps 3", "--guidance 1", "--guide early", "--vae elsewhere")
REFUSED = [
    *(("vae", f"--frechet 5 {flag}", f"{flag.split()[0]} is for a diffusion model") for flag in OF_SAMPLES),
    *(("ddpm", flag, f"{flag.split()[0]} needs --frechet") for flag in (*OF_SAMPLES, "--draws 3")),
    ("vae", "--iwae 2 --draws 3", "--draws needs --frechet"),
    ("vae", "--bound 5", "--bound is for a diffusion model"),
    ("ddpm", "--iwae 5", "--iwae is for a VAE"),
    ("ddpm", f"--frechet 5 --steps {T + 1}", "a sampler takes 1 to T = 6 steps, not 7"),
    ("ddpm", "--frechet 5 --guide early --guidance 0", "--guide needs a --guidance above 0"),
    ("ddpm", "--frechet 5 --guide early --sampler ddim", "--guide needs a --guidance above 0"),
    ("ddpm", "--frechet 201", "--frechet 201 is out of range, there are 200"),
    ("ddpm", "--bound 41", "--bound 41 is out of range, there are 40"),
    ("ddpm", "--frechet 10 --vae nowhere", "nowhere: expected a run of run_vae.py"),
    ("ddpm", "--frechet 10 --vae RUNS/ddpm", "expected a run of run_vae.py"),
]


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_flags_that_do_not_fit_are_refused_before_any_work(narrow, small_data, monkeypatch):
    for work in ("measure_vae", "measure_bound", "measure_samples"):
        monkeypatch.setattr(evaluate, work, None)
    for model, flags, message in REFUSED:
        flags = [flag.replace("RUNS", str(narrow)) for flag in flags.split()]
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate.main([str(narrow / model), "--data", str(small_data), *flags])
        assert {path.name for path in (narrow / model).iterdir()} <= {"checkpoint.npz", ".lock"}


@pytest.mark.parametrize("count", [1, 3])
def test_few_test_images_are_measured_or_refused(count, narrow, small_data, tmp_path, measure, capsys):
    data = shutil.copytree(small_data, tmp_path / "data")
    for name, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        path = data / f"t10k-{name}-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:7] + bytes([count]) + content[8 : header + count * size])
    few = np.frombuffer((data / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(count, 28, 28, 1)
    for run, measures in (("vae", ("", "--iwae 2", "--frechet 4")), ("ddpm", ("", "--bound 2", "--frechet 4"))):
        arrays, state = load(narrow / run / "checkpoint.npz")
        state["config"]["test_images"] = checkpoint.fingerprint([few, None])
        checkpoint.save(narrow / run / "checkpoint.npz", arrays, state)
        for flags in measures:
            needed = 4 if "frechet" in flags else 2
            if count < needed:
                with pytest.raises(UserError, match=f"expected {needed} test images or more"):
                    measure(run, "--data", data, *flags.split())
            else:
                measure(run, "--data", data, *flags.split())
                assert "null" not in (narrow / run / "metrics.json").read_text()
    assert "nan" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- what is written and kept


def test_what_was_measured_before_stays_with_the_same_weights_alone(narrow, measure):
    path = narrow / "vae" / "metrics.json"
    files.write_metrics(path, {"elbo": -240.0, "kl": 12.5}, load_run(narrow / "vae").params)
    measure("vae", "--iwae", 2)
    written = json.loads(path.read_text())
    assert (written["elbo"], written["kl"]) == (-240, 12.5)  # what the run wrote
    files.write_metrics(path, {"elbo": -239.0}, load_run(narrow / "vae").params)  # it was resumed: drawn again
    assert json.loads(path.read_text())["evaluation"] == written["evaluation"]
    for damaged in (json.dumps(written | {"weights": "CRC-32 00000000"}), "", "[1]", "{}"):
        path.write_text(damaged)
        assert measure("vae").keys() == {"latent"}


@pytest.mark.parametrize(("model", "flags"), [("vae", ("--iwae", 3)), ("ddpm", ("--bound", 2, "--frechet", 10))])
def test_a_full_disk_loses_no_number(model, flags, narrow, measure, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    measure(model, *flags)
    wanted = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote")]
    before = {path.name: path.read_bytes() for path in (narrow / model).iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        measure(model, *flags)
    assert capsys.readouterr().out.splitlines() == wanted  # all of them, also those after what could not be written
    assert {path.name: path.read_bytes() for path in (narrow / model).iterdir()} == before


def test_a_run_that_is_measured_is_measured_by_nobody_else_and_free_afterwards(narrow, measure):
    with files.holding(narrow / "vae"), pytest.raises(files.FolderInUse):
        if files.fcntl is None:
            raise files.FolderInUse("no locks here")
        evaluate.main([str(narrow / "vae")])
    measure("vae")
    with files.holding(narrow / "vae"):
        pass
