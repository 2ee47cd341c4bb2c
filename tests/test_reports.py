"""python -m scratchgen.evaluate: what its numbers are made of, what is refused, and that nothing is lost."""

import errno
import json
import os
import re
import shutil

import run_ddpm
import run_vae
from scratchgen import diffusion, vae
from scratchgen.data import scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, metrics, reports
from scratchgen.evaluate.load import load_run
from scratchgen.machinery import checkpoint, cli, files, plots
from scratchgen.machinery.workers import Workers

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
    flags = ["--latent-dim", 4] if name == "vae" else ["--T", T, "--arch", "mlp"]
    flags += ["--data", small_data, "--epochs", 1, "--train-images", 32, "--workers", 1, "--out", folder / name]
    main_of(module, *flags, "--resume")
    assert json.loads((folder / name / "metrics.json").read_text())["evaluation"] == found
    main_of(module, *flags, "--seed", 1)  # another model, in the same folder
    assert "evaluation" not in json.loads((folder / name / "metrics.json").read_text())


# ----------------------------------------------------------------------------------------------------- diffusion model


def test_the_bound_and_its_exact_sum(folder, measure, x_test):
    found = measure("ddpm", "--bound", 40)  # all of the small test set
    estimate, exact = found["bound_estimate"], found["bound_exact_40"]
    assert exact["bits_per_dimension"] == pytest.approx(sum(exact[p] for p in ("prior", "between", "decoder")))
    difference = abs(estimate["bits_per_dimension"] - exact["bits_per_dimension"])
    assert difference < 4 * estimate["standard_error"]  # and two, in 95 of 100 cases
    schedule = diffusion.make_schedule("linear", T)
    prior = diffusion.prior_kl(schedule, scale(x_test, -1, 1)).mean() / (784 * np.log(2))
    assert exact["prior"] == pytest.approx(prior, rel=1e-5)
    assert (folder / "ddpm" / "bound.png").exists()


def test_the_estimate_counts_each_of_the_T_terms_once(measure, x_test, monkeypatch):
    """With one bit per pixel for every L_{t-1}, whatever the image, there is no chance left."""
    monkeypatch.setattr(metrics, "bound_terms", lambda x_0_theta, s, x_0, t, eps: np.full(len(t), 784 * np.log(2)))
    found = measure("ddpm", "--bound", 5)
    prior = diffusion.prior_kl(diffusion.make_schedule("linear", T), scale(x_test, -1, 1)) / (784 * np.log(2))
    assert found["bound_estimate"]["bits_per_dimension"] == pytest.approx(T + prior.mean(), rel=1e-6)
    assert found["bound_exact_5"]["bits_per_dimension"] == pytest.approx(T + prior[:5].mean(), rel=1e-6)
    assert (found["bound_exact_5"]["between"], found["bound_exact_5"]["decoder"]) == pytest.approx((T - 1, 1))


def test_frechet_distance_beside_that_of_training_images_and_of_the_vae(folder, measure, x_test, monkeypatch):
    seen = {}
    original = plots.distance_over_steps
    monkeypatch.setattr(plots, "distance_over_steps", lambda *args: seen.setdefault("args", args) and original(*args))
    samplers = ("ddpm", "ddim", "dpm++", "sde-dpm++")
    flags = ["--frechet", 10, "--sampler", *samplers, "--sample-steps", 3, T]
    found = measure("ddpm", *flags)["frechet_10"]
    names = {f"{sampler}, {steps} steps" for sampler in samplers for steps in (3, T)}
    assert found.keys() == names | {"training images", "VAE", "seed"} and len(set(found.values())) == 11
    curves, levels, N = seen["args"]
    assert curves == {s: [(n, found[f"{s}, {n} steps"]) for n in (3, T)] for s in samplers}
    assert levels == {name: found[name] for name in ("training images", "VAE")} and N == 10
    assert (folder / "ddpm" / "steps.png").exists()
    assert not (folder / "ddpm" / "bound.png").exists()  # an exact one that was there stays

    ruler = classifier.load_classifier()
    images = reports.draw(load_run(folder / "vae"), 10, 0, Workers(1))
    a, b = (classifier.features(ruler, scale(x, 0, 1)) for x in (images, x_test))
    assert found["VAE"] == pytest.approx(metrics.frechet_distance(a, b), rel=1e-4)
    assert measure("vae", "--frechet", 10)["frechet_10"]["VAE"] == found["VAE"]


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_samples(model, folder, measure, monkeypatch):
    monkeypatch.setattr(reports, "SHARD", 4)
    files = []
    for workers in (1, 2):
        measure(model, "--samples", 11, workers=workers)
        with np.load(folder / model / "samples.npz") as file:
            assert file.files == ["images"]
            files.append(file["images"])
    assert files[0].shape == (11, 28, 28) and files[0].dtype == np.uint8 and files[0].std() > 10
    assert len(np.unique(files[0], axis=0)) == 11  # no two from the same noise
    np.testing.assert_array_equal(*files)


def test_samples_of_ddpm_are_algorithm_2(folder):
    model = load_run(folder / "ddpm")
    rng = np.random.default_rng([5, reports.SAMPLES, 0])
    x_T = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    *_, (_, x_0) = diffusion.sample(model.eps_theta, model.schedule, x_T, rng)
    images = reports.draw(model, 3, 5, Workers(1), "ddpm", T)
    assert np.abs(images - (x_0 + 1) * 127.5).max() <= 0.51


def test_grey_levels():
    assert reports.grey_levels(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    x = np.arange(256, dtype=np.uint8)
    for in_0_to_1 in (scale(x, 0, 1), (scale(x, -1, 1) + 1) / 2):  # of a VAE, and as `DDPMRun.sample` ends
        np.testing.assert_array_equal(reports.grey_levels(in_0_to_1), x)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("vae", ["--bound", 5], "--bound is for a diffusion model"),
        ("vae", ["--sample-steps", 5], "--sample-steps is for a diffusion model"),
        ("vae", ["--frechet", 5, "--sampler", "ddim"], "--sampler is for a diffusion model"),
        ("vae", ["--frechet", 5, "--vae", "elsewhere"], "--vae is for a diffusion model"),
        ("ddpm", ["--iwae", 5], "--iwae is for a VAE"),
        ("ddpm", ["--samples", 5, "--sample-steps", T + 1], "out of range, T is 6"),
        ("ddpm", ["--samples", 5, "--sample-steps", 2, 3], "--samples needs one"),
        ("ddpm", ["--sample-steps", 3], "--sample-steps needs --frechet or --samples"),
        ("ddpm", ["--bound", 5, "--sampler", "ddim"], "--sampler needs --frechet or --samples"),
        ("ddpm", ["--vae", "elsewhere"], "--vae needs --frechet or --samples"),
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
    with pytest.raises(cli.UsageError, match=re.escape(message)):
        if "there are" in message:
            with pytest.warns(UserWarning, match="not the published"):
                evaluate.main(argv)
        else:
            evaluate.main(argv)
    assert before == {path: path.read_bytes() for path in (folder / model).iterdir()}


def test_over_images_keeps_the_order():
    workers = Workers(2)
    x = np.arange(23)
    np.testing.assert_array_equal(reports.over_images(lambda a: a * a, [x], 3, workers, "squares"), x * x)


@pytest.mark.parametrize(
    ("model", "flags"), [("vae", ("--iwae", 3)), ("ddpm", ("--bound", 2, "--frechet", 10, "--samples", 3))]
)
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
    assert not (folder / "vae" / ".lock").exists()
