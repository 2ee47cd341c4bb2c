"""python -m scratchgen.evaluate: what its numbers are made of, what is refused, and that nothing is lost."""

import errno
import json
import math
import os
import re
import shutil

import run_ddpm
import run_vae
from scratchgen import diffusion, improved, vae
from scratchgen.data import CLASSES, UserError, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, metrics, reports
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import Ranks
from scratchgen.trained import draw, load_run

import numpy as np
import pytest
from conftest import T, load, main_of


@pytest.fixture
def measure(folder, small_data):
    def run(model, *flags, workers=1):
        main_of(evaluate, folder / model, "--data", small_data, "--workers", workers, *flags)
        return json.loads((folder / model / "metrics.json").read_text()).get("evaluation", {})

    return run


# ----------------------------------------------------------------------------------------------------------------- VAE


def test_vae_numbers(folder, measure, x_test, capsys):
    before = json.loads((folder / "vae" / "metrics.json").read_text())
    found = measure("vae", "--iwae", 30)
    mu, log_var = vae.mlp_encode(load_run(folder / "vae").params, scale(x_test, 0, 1))
    kl = vae.kl_per_dimension(mu, log_var).mean(axis=0)
    np.testing.assert_allclose(found["latent"]["kl_per_dimension"], kl, atol=1e-4)
    np.testing.assert_allclose(found["latent"]["variance_of_mu"], mu.var(axis=0), atol=1e-4)
    np.testing.assert_allclose(found["latent"]["mean_of_variance"], np.exp(log_var).mean(axis=0), atol=1e-4)
    assert found["latent"]["active_units"] == metrics.active_units(mu).sum()
    after = json.loads((folder / "vae" / "metrics.json").read_text())
    assert {name: after[name] for name in before} == before  # what the run wrote is still there
    assert before["elbo"] < found["iwae_30"]["log_likelihood"] < -before["entropy_floor"]
    assert (folder / "vae" / "latent_use.png").exists()
    assert f"{found['iwae_30']['log_likelihood']:.2f}" in capsys.readouterr().out


def test_measures_add_up_and_workers_change_nothing(folder, measure):
    first = measure("vae", "--iwae", 3)
    second = measure("vae", "--iwae", 7, workers=2)
    assert second.keys() == {"latent", "iwae_3", "iwae_7"} and second["iwae_3"] == first["iwae_3"]
    assert measure("vae", "--iwae", 7)["iwae_7"] == second["iwae_7"]
    assert measure("vae", "--iwae", 7, "--seed", 1)["iwae_7"] != second["iwae_7"]


def test_numbers_of_two_seeds_do_not_mix(folder, measure):
    found = measure("ddpm", "--frechet", 10, "--sampler", "ddim", "--seed", 1)["frechet_10"]
    assert found["seed"] == 1 and "ddim, 6 steps" in found
    found = measure("ddpm", "--frechet", 10, "--sampler", "ddpm")["frechet_10"]
    assert found["seed"] == 0 and "ddim, 6 steps" not in found


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_a_run_on_other_images_is_not_measured_on_these(model, part, folder, measure, small_data, tmp_path):
    before = (folder / model / "metrics.json").read_bytes()
    others = shutil.copytree(small_data, tmp_path / "others")
    path = others / f"{part}-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16 + 31 * 784] ^= 1  # one pixel of the last of the 32 images that both were trained on; or of the tests
    path.write_bytes(content)
    for flags in ([], ["--frechet", 10]):
        with pytest.raises(cli.UsageError, match=f"{model} was trained on other images"):
            measure(model, "--data", others, *flags)
    assert (folder / model / "metrics.json").read_bytes() == before


def test_a_vae_on_other_images_is_no_peer(folder, measure):
    path = folder / "vae" / "checkpoint.npz"
    arrays, state = load(path)
    state["config"]["train_images"] = "32 of CRC-32 00000000"
    checkpoint.save(path, arrays, state)
    with pytest.raises(cli.UsageError, match="vae was trained on other images"):
        measure("ddpm", "--frechet", 10)


def test_numbers_of_other_weights_do_not_stay(folder, measure):
    path = folder / "vae" / "metrics.json"
    measure("vae", "--iwae", 2)
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"weights": "CRC-32 00000000"}))
    assert measure("vae").keys() == {"latent"}
    for damaged in ("", "[1]", "{}"):
        path.write_text(damaged)
        assert measure("vae").keys() == {"latent"}


@pytest.mark.parametrize("module", [run_vae, run_ddpm])
def test_drawing_a_finished_run_again_keeps_what_was_measured(module, folder, measure, small_data):
    name = module.__name__.removeprefix("run_")
    found = measure(name)
    flags = ["--latent-dim", 4] if name == "vae" else ["--T", T, "--arch", "mlp", "--batch-size", 8]
    flags += ["--data", small_data, "--epochs", 1, "--train-images", 32, "--workers", 1, "--out", folder / name]
    main_of(module, *flags, "--resume")
    assert json.loads((folder / name / "metrics.json").read_text())["evaluation"] == found
    main_of(module, *flags, "--seed", 1)  # another model, in the same folder
    assert "evaluation" not in json.loads((folder / name / "metrics.json").read_text())


# ----------------------------------------------------------------------------------------------------- diffusion model


def test_the_bound_and_its_exact_sum(folder, measure, x_test):
    found = measure("ddpm", "--bound", 40)  # all of the small test set
    estimate = found["bound_estimate"]
    exact = found["bound_exact_40"]
    assert exact["bits_per_dimension"] == pytest.approx(sum(exact[p] for p in ("group", "prior", "between", "decoder")))
    difference = abs(estimate["bits_per_dimension"] - exact["bits_per_dimension"])
    assert difference < 4 * estimate["standard_error"]  # and two, in 95 of 100 cases
    schedule = diffusion.make_schedule("linear", T)
    prior = diffusion.prior_kl(schedule, scale(x_test, -1, 1)).mean() / (784 * np.log(2))
    assert exact["prior"] == pytest.approx(prior, rel=1e-5)
    assert exact["group"] == pytest.approx(group_bits(folder, x_test).mean())
    assert (folder / "ddpm" / "bound.png").exists()


def group_bits(folder, x_test):
    """-log2 of the share of the group whose mean is nearest to each image, per pixel: (N,). Of the few training images
    several means are equal, and rounding decides between them."""
    known = load_run(folder / "ddpm").groups
    x = scale(x_test, -1, 1)
    groups = known.of(x)
    squares = ((x.reshape(len(x), 1, -1) - known.means.reshape(1, -1, 784)) ** 2).sum(axis=2)
    np.testing.assert_allclose(squares[np.arange(len(x)), groups], squares.min(axis=1), rtol=1e-4)
    return -np.log2(known.shares[0, groups]) / 784


def test_the_estimate_counts_each_of_the_T_terms_once(measure, folder, x_test, monkeypatch):
    """With one bit per pixel for every L_{t-1}, whatever the image, there is no chance left."""
    one_bit = 784 * np.log(2)
    monkeypatch.setattr(diffusion, "bound_terms", lambda x_0_theta, s, x_0, t, eps, groups: np.full(len(t), one_bit))
    found = measure("ddpm", "--bound", 5)
    prior = diffusion.prior_kl(diffusion.make_schedule("linear", T), scale(x_test, -1, 1)) / (784 * np.log(2))
    prior = prior + group_bits(folder, x_test)
    assert found["bound_estimate"]["bits_per_dimension"] == pytest.approx(T + prior.mean(), rel=1e-6)
    assert found["bound_exact_5"]["bits_per_dimension"] == pytest.approx(T + prior[:5].mean(), rel=1e-6)
    assert (found["bound_exact_5"]["between"], found["bound_exact_5"]["decoder"]) == pytest.approx((T - 1, 1))


def test_samples_beside_training_images_and_those_of_the_vae(folder, measure, x_test):
    samplers = ("ddpm", "ddim", "dpm++", "sde-dpm++")
    found = measure("ddpm", "--frechet", 10, "--sampler", *samplers, "--steps", 3, T)["frechet_10"]
    assert found.pop("seed") == 0
    configs = {f"{sampler}, {steps} steps": (sampler, steps) for sampler in samplers for steps in (3, T)}
    assert found.keys() == configs.keys() | {"training images", "VAE"}
    assert len({each["distance"] for each in found.values()}) == 10
    for name, (sampler, steps) in configs.items():  # docs/sweeps.py reads them
        settings = {key: found[name][key] for key in ("sampler", "steps", "guidance", "guide")}
        assert settings == {"sampler": sampler, "steps": steps, "guidance": 0, "guide": "early"}
    assert "sampler" not in found["VAE"] and "sampler" not in found["training images"]
    assert not (folder / "ddpm" / "bound.png").exists()  # an exact one that was there stays

    params = classifier.load_classifier()
    images = draw(load_run(folder / "vae"), 10, 0, Ranks(1))
    generated, real = (classifier.features(params, scale(x, 0, 1)) for x in (images, x_test))
    taken_for = classifier.logits(params, generated).argmax(axis=1)
    assert found["VAE"]["distance"] == pytest.approx(metrics.frechet_distance(generated, real), rel=1e-3)
    assert found["VAE"]["precision"] == metrics.precision(real, generated)
    assert found["VAE"]["recall"] == metrics.recall(real, generated)
    assert found["VAE"]["variance"] == pytest.approx(metrics.variance_ratio(generated, real), abs=1e-4)
    assert found["VAE"]["share"] == [np.mean(taken_for == k) for k in range(10)]
    assert found["training images"]["nearest"] < 0.2 < 1 < found["VAE"]["nearest"]
    assert measure("vae", "--frechet", 10)["frechet_10"]["VAE"] == found["VAE"]


def test_several_draws_are_several_seeds_and_their_mean_and_spread_are_told(folder, measure, capsys):
    ones = [measure("vae", "--frechet", 10, "--seed", seed)["frechet_10"] for seed in (3, 4, 5)]
    capsys.readouterr()
    found = measure("vae", "--frechet", 10, "--seed", 3, "--draws", 3)["frechet_10"]
    for name in ("VAE", "training images"):
        for key in ("distance", "recall", "share", "confidence"):
            expected = np.mean([one[name][key] for one in ones], axis=0)
            np.testing.assert_allclose(found[name][key], expected, atol=2e-4)
        distances = [one[name]["distance"] for one in ones]
        assert found[name]["draws"] == 3 and found[name]["spread"] == pytest.approx(np.std(distances, ddof=1), rel=1e-3)
    out = capsys.readouterr().out
    (row,) = re.findall(r"^VAE +(\S+) +(\S+) +(\S+) +(\S+) *$", out, re.M)
    keys = ("distance", "spread", "precision", "recall")
    np.testing.assert_allclose([float(cell) for cell in row], [found["VAE"][key] for key in keys], atol=5.1e-3)
    assert "warning: 10 images say little" in out and all(len(line) <= 80 for line in out.splitlines())


def test_guidance_in_numbers(measure):
    found = measure("ddpm", "--frechet", 10, "--guidance", 0, 1.5)["frechet_10"]
    names = [f"sde-dpm++, {T} steps", f"sde-dpm++, {T} steps, w = 1.5"]
    assert found.keys() == {*names, "training images", "VAE", "seed"}
    assert [found[name]["guidance"] for name in names] == [0, 1.5]
    unguided, guided = (found[name] | {"guidance": None} for name in names)
    assert unguided != guided
    assert f"sde-dpm++, {T} steps, w = {improved.GUIDANCE:g}" in measure("ddpm", "--frechet", 10)["frechet_10"]


def test_a_run_with_classes_is_measured_with_its_labels(measure, folder, small_data, capsys):
    flags = ["--T", T, "--epochs", 1, "--train-images", 32, "--batch-size", 8, "--classes", "--workers", 1]
    main_of(run_ddpm, *flags, "--data", small_data, "--out", folder / "classes")
    assert (folder / "classes" / "classes.png").exists()
    capsys.readouterr()
    found = measure("classes", "--bound", 2, "--frechet", 20, "--guidance", 1, "--guide", "early", "unlabelled")
    assert found.keys() == {"bound_estimate", "bound_exact_2", "frechet_20"}
    early, unlabelled = (found["frechet_20"][f"sde-dpm++, {T} steps, w = 1{guide}"] for guide in ("", ", unlabelled"))
    assert (early["guide"], unlabelled["guide"]) == ("early", "unlabelled")
    assert early["distance"] != unlabelled["distance"]
    model = load_run(folder / "classes")
    params = classifier.load_classifier()
    images = draw(model, 20, 0, Ranks(1), config=model.sampler_config(guidance=1, guide="unlabelled"))
    taken_for = classifier.logits(params, classifier.features(params, scale(images, 0, 1))).argmax(axis=1)
    assert unlabelled["agreement"] == pytest.approx(np.mean(taken_for == np.arange(20) % 10))
    out = capsys.readouterr().out
    assert "agreement" not in found["frechet_20"]["VAE"] and f"wrote {folder / 'classes' / 'bound.png'}" in out
    header, train, peer, *rows = out[out.index("20 images each") :].splitlines()
    assert header.split()[-5:] == ["Frechet", "+-", "precision", "recall", "asked"]
    assert rows[1].startswith(f"sde-dpm++, {T} steps, w = 1, unlabelled") and len(peer.split()) == 4
    assert float(rows[1].split()[-1]) == pytest.approx(unlabelled["agreement"], abs=5.1e-4)
    shares = rows[rows.index("What the classifier takes them for, in %, and how sure it is, in %:") + 1 :]
    assert shares[0].split() == [name[:4] for name in CLASSES]
    assert [float(cell) for cell in shares[-2].split()[-10:]] == [100 * share for share in unlabelled["share"]]
    assert not [line for line in out.splitlines() if len(line) > 80 and str(folder) not in line]
    labels = small_data / "t10k-labels-idx1-ubyte"
    before = labels.read_bytes()
    labels.write_bytes(before[:-1] + bytes([(before[-1] + 1) % 10]))  # another label of the last test image
    try:
        with pytest.raises(cli.UsageError, match="trained on other images"):
            measure("classes")
    finally:
        labels.write_bytes(before)


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


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("vae", ["--bound", 5], "--bound is for a diffusion model"),
        ("vae", ["--steps", 5], "--steps is for a diffusion model"),
        ("vae", ["--frechet", 5, "--sampler", "ddim"], "--sampler is for a diffusion model"),
        ("vae", ["--frechet", 5, "--vae", "elsewhere"], "--vae is for a diffusion model"),
        ("ddpm", ["--iwae", 5], "--iwae is for a VAE"),
        ("ddpm", ["--frechet", 5, "--steps", T + 1], "a sampler takes 1 to T = 6 steps, not 7"),
        ("ddpm", ["--guidance", 1], "--guidance needs --frechet"),
        ("vae", ["--frechet", 5, "--guidance", 1], "--guidance is for a diffusion model"),
        ("ddpm", ["--steps", 3], "--steps needs --frechet"),
        ("ddpm", ["--bound", 5, "--sampler", "ddim"], "--sampler needs --frechet"),
        ("ddpm", ["--vae", "elsewhere"], "--vae needs --frechet"),
        ("ddpm", ["--draws", 3], "--draws needs --frechet"),
        ("vae", ["--iwae", 2, "--draws", 3], "--draws needs --frechet"),
        ("ddpm", ["--frechet", 5, "--guide", "early", "--guidance", 0], "--guide needs a --guidance above 0"),
        ("ddpm", ["--frechet", 5, "--guide", "early", "--sampler", "ddim"], "--guide needs a --guidance above 0"),
        ("ddpm", ["--frechet", 201], "--frechet 201 is out of range, there are 200"),
        ("ddpm", ["--bound", 41], "--bound 41 is out of range, there are 40"),
        ("ddpm", ["--frechet", 10, "--vae", "nowhere"], "nowhere: expected a run of run_vae.py"),
        ("ddpm", ["--frechet", 10, "--vae", "DDPM"], "expected a run of run_vae.py"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_any_work(model, flags, message, folder, small_data, monkeypatch):
    flags = [folder / "ddpm" if flag == "DDPM" else flag for flag in flags]
    argv = [str(folder / model), "--data", str(small_data), *map(str, flags)]
    for work in ("measure_vae", "measure_bound", "measure_samples"):
        monkeypatch.setattr(evaluate, work, None)
    before = {path: path.read_bytes() for path in (folder / model).iterdir()}
    with pytest.raises(UserError, match=re.escape(message)):
        if "there are" in message or "run_vae.py" in message:  # known once the data are read
            with pytest.warns(UserWarning, match="not the published"):
                evaluate.main(argv)
        else:
            evaluate.main(argv)
    assert before == {path: path.read_bytes() for path in (folder / model).iterdir()}


@pytest.mark.parametrize("count", [1, 3])
def test_few_test_images_are_measured_or_refused(count, small_data, tmp_path, recwarn, capsys):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    for name, shape in (("images-idx3", (28, 28)), ("labels-idx1", ())):
        path = data / f"t10k-{name}-ubyte"
        header = 8 + 4 * len(shape)
        content = path.read_bytes()
        path.write_bytes(content[:7] + bytes([count]) + content[8 : header + count * math.prod(shape)])
    flags = ["--data", str(data), "--workers", "1"]
    run_flags = [*flags, "--epochs", "1", "--train-images", "16"]
    run_vae.main([*run_flags, "--latent-dim", "2", "--out", str(tmp_path / "vae")])
    run_ddpm.main([*run_flags, "--T", "3", "--arch", "mlp", "--out", str(tmp_path / "ddpm")])
    for run, more, needed in [
        ("vae", [], 2),
        ("vae", ["--iwae", "2"], 2),
        ("vae", ["--frechet", "4"], 4),
        ("ddpm", [], 2),
        ("ddpm", ["--bound", "2"], 2),
        ("ddpm", ["--frechet", "4"], 4),
    ]:
        if count < needed:
            with pytest.raises(UserError, match=f"expected {needed} test images or more"):
                evaluate.main([str(tmp_path / run), *flags, *more])
        else:
            evaluate.main([str(tmp_path / run), *flags, *more])
    for run in ("vae", "ddpm"):
        assert "null" not in (tmp_path / run / "metrics.json").read_text()
    assert "nan" not in capsys.readouterr().out
    ours = [str(warning.message) for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    assert ours and all("not the published" in message for message in ours)


@pytest.mark.parametrize(("model", "flags"), [("vae", ("--iwae", 3)), ("ddpm", ("--bound", 2, "--frechet", 10))])
def test_a_full_disk_loses_no_number(model, flags, folder, measure, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    measure(model, *flags)
    wanted = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote")]
    before = {path.name: path.read_bytes() for path in (folder / model).iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        measure(model, *flags)
    assert capsys.readouterr().out.splitlines() == wanted  # all of them, also those after what could not be written
    assert {path.name: path.read_bytes() for path in (folder / model).iterdir()} == before


def test_a_run_that_is_measured_is_measured_by_nobody_else_and_free_afterwards(folder, measure):
    with files.holding(folder / "vae"), pytest.raises(files.FolderInUse):
        if files.fcntl is None:
            raise files.FolderInUse("no locks here")
        evaluate.main([str(folder / "vae")])
    measure("vae")
    with files.holding(folder / "vae"):
        pass
