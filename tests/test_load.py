"""A finished run, loaded again: what a notebook can do with it, and what is refused."""

import re
from functools import partial

import run_ddpm
from scratchgen import denoisers, diffusion, improved, tree, vae
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import load as load_module
from scratchgen.evaluate.classifier import load_classifier
from scratchgen.evaluate.load import DDPMRun, VAERun, load_run, load_trained
from scratchgen.machinery import checkpoint
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.ops import bernoulli_log_likelihood

import numpy as np
import pytest
from conftest import ROOT, T, load, main_of, script


def test_the_session_of_the_docstring_works_as_it_stands(small_data, tmp_path):
    flags = ["--T", 20, "--arch", "mlp", "--epochs", 1, "--train-images", 32, "--workers", 1]
    main_of(run_ddpm, "--data", small_data, *flags, "--out", tmp_path / "ddpm")
    session = "\n".join(line[4:] for line in load_module.__doc__.splitlines() if line.startswith("    "))
    assert '"runs/ddpm"' in session and "# (4, 28, 28, 1) in [0, 1]" in session
    names = {}
    exec(session.replace('"runs/ddpm"', repr(str(tmp_path / "ddpm"))), names)
    assert names["images"].shape == (4, 28, 28, 1)
    assert 0 <= names["images"].min() < names["images"].max() <= 1


def test_trained_weights_cannot_be_changed_by_accident(runs):
    for params in (load_run(runs / "vae").params, load_run(runs / "ddpm").params, load_classifier()):
        for leaf in tree.leaves(params):
            with pytest.raises(ValueError, match="read-only"):
                leaf += 1


HOWS = [
    {},
    {"guidance": 0},
    {"guidance": 2, "steps": 4},
    {"sampler": "ddpm"},
    {"sampler": "ddim", "steps": 3},
    {"sampler": "dpm++", "steps": 3, "guidance": 0.3},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_samples_of_a_diffusion_model_are_those_of_its_sampler_in_0_to_1(runs, how):
    model = load_run(runs / "ddpm")
    assert isinstance(model, DDPMRun) and model.config["T"] == T
    images = model.sample(5, np.random.default_rng(3), **how)
    assert images.shape == (5, 28, 28, 1) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, model.sample(5, np.random.default_rng(3), **how))
    assert np.any(images != model.sample(5, np.random.default_rng(4), **how))

    sampler = how.get("sampler", "sde-dpm++")
    w = how.get("guidance", 0 if "sampler" in how else improved.GUIDANCE)
    eta, order = {"ddpm": (1, 1), "ddim": (0, 1), "dpm++": (0, 2), "sde-dpm++": (1, 2)}[sampler]
    rng = np.random.default_rng(3)
    x_T = rng.standard_normal((5, 28, 28, 1), dtype=np.float32)
    steps = how.get("steps", T)  # which is below 20
    x_0_theta = improved.guided(model.x_0_theta, model.x_0_early, w) if w else model.x_0_theta
    path = list(improved.sample(x_0_theta, model.schedule, x_T, rng, steps, eta, order))
    assert len(path) == steps
    x_0 = path[-1][1]
    assert (np.abs(x_0).max() > 1) == (w == 0)  # what is guided is clipped at each step
    np.testing.assert_allclose(images, np.clip((x_0 + 1) / 2, 0, 1), atol=1e-6)


def test_a_model_without_classes_is_asked_for_none(runs):
    with pytest.raises(ValueError, match="trained without --classes"):
        load_run(runs / "ddpm").sample(2, np.random.default_rng(0), np.array([1, 2]))


def test_the_default_of_a_run_without_additions_is_the_papers_sampler(small_data, tmp_path):
    flags = ["--T", 4, "--epochs", 1, "--train-images", 16, "--additions", "none", "--workers", 1]
    main_of(run_ddpm, *flags, "--data", small_data, "--out", tmp_path)
    model, rng = load_run(tmp_path), np.random.default_rng(3)
    x_T = rng.standard_normal((5, 28, 28, 1), dtype=np.float32)
    *_, (_, x_0) = diffusion.sample(model.eps_theta, model.schedule, x_T, rng)
    for how in ({}, {"sampler": "ddpm"}, {"steps": 4}):
        np.testing.assert_array_equal(model.sample(5, np.random.default_rng(3), **how), (x_0 + 1) / 2)


def test_a_model_with_classes_draws_what_is_asked_for(small_data, tmp_path):
    flags = ["--T", 4, "--epochs", 1, "--train-images", 48, "--batch-size", 16, "--classes", "--workers", 1]
    main_of(run_ddpm, *flags, "--data", small_data, "--out", tmp_path)
    model, x_T = load_run(tmp_path), np.random.default_rng(3).standard_normal((11, 28, 28, 1), dtype=np.float32)

    def end(labels=None, **how):
        *_, (_, x_0) = model.path(x_T, np.random.default_rng(4), labels, sampler="dpm++", **how)
        return x_0

    one_after_the_other = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    np.testing.assert_array_equal(end(), end(one_after_the_other))
    some = end(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 8, -1]))
    differs = np.abs(some - end()).max(axis=(1, 2, 3)) > 0
    assert differs.tolist() == [False] * 9 + [True] * 2  # where another label was asked for
    for guide in ("early", "unlabelled"):
        np.testing.assert_array_equal(end(guidance=0, guide=guide), end())
        assert np.abs(end(guidance=3, guide=guide) - end()).max() > 0
    nothing = np.full(11, -1)
    clipped = lambda x_t, t: np.clip(model.x_0_theta(x_t, t, nothing), -1, 1)  # noqa: E731
    *_, (_, expected) = improved.sample(clipped, model.schedule, x_T, None, eta=0, order=2)
    led_by_itself = end(nothing, guidance=3, guide="unlabelled")  # nowhere, but it is clipped
    np.testing.assert_allclose(led_by_itself, expected, atol=1e-5)


def test_samples_of_a_vae_are_decoded_from_the_prior(runs):
    model = load_run(runs / "vae")
    assert isinstance(model, VAERun)
    images = model.sample(5, np.random.default_rng(3))
    assert images.shape == (5, 28, 28, 1) and 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, model.sample(5, np.random.default_rng(3)))
    z = np.random.default_rng(3).standard_normal((5, 4), dtype=np.float32)
    np.testing.assert_array_equal(images, vae.generate(model.decode, z))


def test_the_functions_of_a_run_have_its_weights(runs, rng):
    model, x = load_run(runs / "vae"), rng.random((3, 28, 28, 1), dtype=np.float32)
    mu, log_var = model.encode(x)
    assert mu.shape == log_var.shape == (3, 4) and model.decode(mu).shape == x.shape
    np.testing.assert_array_equal(mu, vae.mlp_encode(model.params, x)[0])
    with np.load(runs / "vae" / "checkpoint.npz") as file:
        np.testing.assert_array_equal(model.params["mu"]["w"], file["params/mu/w"])

    model, x_t, t = load_run(runs / "ddpm"), rng.standard_normal((3, 28, 28, 1), dtype=np.float32), np.array([1, 3, T])
    additions = ["v", "black", "weights", "muon", "guide"]
    assert model.config["additions"] == additions
    expected = improved.denoiser(denoisers.mlp_denoiser, diffusion.make_schedule("linear", T), additions)
    for found, f in zip((model.eps_theta, model.x_0_theta), expected, strict=True):
        np.testing.assert_array_equal(found(x_t, t), partial(f, model.params)(x_t, t))
    with np.load(runs / "ddpm" / "checkpoint.npz") as file:  # sampling and measuring are for the averaged weights
        np.testing.assert_array_equal(model.params[0]["w"], file["ema/0/w"])
        assert np.any(file["ema/0/w"] != file["params/0/w"])
        early = {"w": file["early/0/w"], "b": file["early/0/b"]}
    assert np.any(early["w"] != model.params[0]["w"])
    assert np.any(model.x_0_early(x_t, t) != model.x_0_theta(x_t, t))


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_run_prints_its_settings_and_no_weights(runs, name):
    text = repr(load_run(runs / name))
    assert f"'model': '{name}'" in text and "'seed': 0" in text and "array" not in text and "partial" not in text


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_without_a_sound_checkpoint(folder):
    with pytest.raises(CheckpointError, match="no such file"):
        load_run(folder / "nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        load_run(str(folder / "nothing"))  # as in a notebook
    (folder / "vae" / "checkpoint.npz").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match="expected a sound checkpoint"):
        load_run(folder / "vae")


MISSING = object()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ddpm", "model", "gan"),
        ("ddpm", "model", None),
        ("ddpm", "model", MISSING),
        ("ddpm", "arch", "transformer"),
        ("ddpm", "arch", None),
        ("ddpm", "arch", "unet"),  # of which the arrays are not
        ("ddpm", "additions", MISSING),  # as in a checkpoint of an earlier version
        ("ddpm", "additions", None),
        ("ddpm", "additions", []),
        ("ddpm", "classes", MISSING),
        ("ddpm", "classes", 10),
        ("ddpm", "classes", True),  # of which there are no arrays
        ("ddpm", "additions", ["v", "black", "global"]),  # the dense network has no place for it
        ("ddpm", "schedule", "square"),
        ("ddpm", "schedule", MISSING),
        ("ddpm", "T", MISSING),
        ("ddpm", "T", "6"),
        ("vae", "model", "vae on binarised pixels"),  # whose pixels and weights that count are others
        ("vae", "model", "ddpm"),
        ("vae", "arch", "unet"),
        ("vae", "latent_dim", MISSING),
        ("vae", "latent_dim", 5),
        ("vae", "latent_dim", -1),
        ("vae", "latent_dim", 10**30),
        ("vae", "arch", []),
        ("ddpm", "T", 10**30),
        ("ddpm", "T", True),
        ("ddpm", "schedule", {}),
        ("ddpm", "additions", "v black"),
        ("ddpm", "additions", [["v"]]),
    ],
)
def test_a_checkpoint_of_something_else(name, key, value, folder):
    path = folder / name / "checkpoint.npz"
    arrays, state = load(path)
    state["config"][key] = value
    if value is MISSING:
        del state["config"][key]
    checkpoint.save(path, arrays, state)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        load_run(folder / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_run_that_never_finished_an_epoch(name, folder):
    path = folder / name / "checkpoint.npz"
    arrays, state = load(path)
    checkpoint.save(path, arrays, state | {"log": []})
    with pytest.raises(CheckpointError, match="first epoch"):
        load_run(folder / name)


# ---------------------------------------------------------------------------------------------- weights of the package


@pytest.mark.parametrize("name", load_module.TRAINED)
def test_the_weights_of_the_package_are_of_a_run_on_fashion_mnist(name):
    model, data = load_trained(name), load_fashion_mnist(ROOT / "data")
    evaluate.check_data(name, model, data, "data")  # those and no others
    assert model.config["seed"] == 0 and model.config["model"] == name.split("-")[0]
    assert model.config.get("classes", False) == (name == "ddpm-classes")
    for leaf in tree.leaves(model.params):
        assert leaf.dtype == np.float32 and not leaf.flags.writeable


def test_the_weights_of_the_package_are_small_and_good():
    sizes = [path.stat().st_size for path in load_module.TRAINED.values()]
    assert sum(sizes) < 8e6
    data = load_fashion_mnist(ROOT / "data")
    x = scale(data["test_images"][:500], 0, 1)
    model = load_trained("vae")
    mu, log_var = model.encode(x)
    assert (
        -245 < (bernoulli_log_likelihood(model.decode(mu), x) - vae.kl_per_dimension(mu, log_var).sum(1)).mean() < -230
    )
    for name in ("ddpm", "ddpm-classes"):
        model, labels = load_trained(name), [data["test_labels"][:100]] if name == "ddpm-classes" else []
        t = np.arange(1, 201, 2)
        _, _, eps = diffusion.draw_batch(
            model.schedule, scale(data["test_images"][:100], -1, 1), np.random.default_rng(0)
        )
        x_t = diffusion.q_sample(model.schedule, scale(data["test_images"][:100], -1, 1), t, eps)
        assert diffusion.squared_errors(eps, model.eps_theta(x_t, t, *labels)).mean() < 0.045
        early = diffusion.squared_errors(x_t, model.x_0_early(x_t, t, *labels)).mean()
        assert early != diffusion.squared_errors(x_t, model.x_0_theta(x_t, t, *labels)).mean()


def test_packed_weights_are_those_of_the_run_but_for_rounding(small_data, tmp_path, monkeypatch):
    pack = script("docs/pack.py")
    monkeypatch.setattr(pack, "LARGE", 300)
    params = {"w": np.random.default_rng(0).standard_normal((30, 20), dtype=np.float32), "b": np.float32([0.1, -2, 3])}
    params["w"][:, 3] = 0
    packed = dict(pack.pack("early", params))
    assert packed.keys() == {"early/w", "early/w/scale", "early/b"}
    assert packed["early/w"].dtype == np.int8 and packed["early/b"].dtype == np.float16
    assert np.abs(packed["early/w"]).max(axis=0).tolist() == [8] * 3 + [0] + [8] * 16
    error = np.abs(packed["early/w"] * packed["early/w/scale"].astype(np.float32) - params["w"])
    assert np.all(error <= np.abs(params["w"]).max(axis=0) * 0.51 / 8)


@pytest.mark.parametrize("damage", ["short", "changed", "missing"])
def test_damaged_weights_of_the_package(damage, tmp_path, monkeypatch):
    path = tmp_path / "vae.npz"
    content = load_module.TRAINED["vae"].read_bytes()
    if damage == "short":
        path.write_bytes(content[:-1000])
    elif damage == "changed":
        path.write_bytes(content[:200_000] + bytes(1000) + content[201_000:])
    monkeypatch.setitem(load_module.TRAINED, "vae", path)
    with pytest.raises(CheckpointError, match=r"vae\.npz: expected a"):
        load_trained("vae")
