"""A trained model: what a notebook can do with it, what it draws, and what is refused."""

import argparse
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from scratchgen import denoisers, diffusion, improved, samplers, trained, tree, vae
from scratchgen.data import CLASSES, UserError, load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import classifier, metrics
from scratchgen.machinery import checkpoint
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.parallel import Ranks
from scratchgen.ops import bernoulli_log_likelihood
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import DDPM, VAE, draw, load_run, load_trained

import numpy as np
import pytest
from conftest import ROOT, T, load, main_of, script


def test_the_session_of_the_docstring_works_as_it_stands(narrow_runs):
    session = "\n".join(line[4:] for line in trained.__doc__.splitlines() if line.startswith("    "))
    assert '"runs/ddpm"' in session and "# (4, 28, 28, 1) in [0, 1]" in session
    names = {}
    exec(session.replace('"runs/ddpm"', repr(str(narrow_runs / "ddpm"))), names)
    assert names["images"].shape == (4, 28, 28, 1)
    assert 0 <= names["images"].min() < names["images"].max() <= 1


def test_a_diffusion_model_has_the_moving_averages_of_its_run(narrow_runs, rng):
    model = load_run(narrow_runs / "ddpm" / "checkpoint.npz")  # as good as its folder
    arrays, state = load(narrow_runs / "ddpm" / "checkpoint.npz")
    for weights, of_run in ((model.params, "ema"), (model.early, "early")):
        np.testing.assert_array_equal(weights["mlp"][0]["w"], arrays[f"{of_run}/mlp/0/w"])
    assert model.log == state["log"] and model.config == state["config"]
    x_t = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    t, groups = np.array([1, 3, T]), np.array([3, -1, 19])
    expected = improved.Denoiser(
        denoisers.mlp_denoiser, diffusion.make_schedule("linear", T), model.config["additions"], model.groups
    )
    for found, f in ((model.eps_theta, expected.eps), (model.x_0_theta, expected.x_0)):
        np.testing.assert_array_equal(found(x_t, t, groups), f(model.params, x_t, t, groups))


# ------------------------------------------------------------------------------------------------ how samples are drawn

CHOICES = [
    {},
    {"guidance": 0},
    {"guidance": 2, "steps": 4},
    {"sampler": "ddpm"},
    {"sampler": "ddim", "steps": 3},
    {"sampler": "dpm++", "steps": 3, "guidance": 0.3},
    {"sampler": "dpm++", "steps": 3, "guidance": 2, "guide": "unlabelled"},
]


@pytest.mark.parametrize("name", ["ddpm", "classes"])
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_samples_of_a_diffusion_model_are_those_of_its_sampler_in_0_to_1(chosen, name, narrow_runs):
    model = load_run(narrow_runs / name)
    assert isinstance(model, DDPM) and model.config["T"] == T
    labels = [7, -1, 7] if name == "classes" else None
    sample = partial(model.sample, 3, labels=labels, config=model.sampler_config(**chosen))
    images = sample(np.random.default_rng(3))
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, sample(np.random.default_rng(3)))
    assert np.any(sample() != sample())  # without a generator others each time

    w = chosen.get("guidance", 0 if "sampler" in chosen else improved.GUIDANCE)
    eta, order = {"ddpm": (1, 1), "ddim": (0, 1), "dpm++": (0, 2), "sde-dpm++": (1, 2)}[
        chosen.get("sampler", "sde-dpm++")
    ]

    def x_0_theta(x_t, t):
        x_0 = model.denoiser.x_0(model.params, x_t, t, groups)
        if w == 0:
            return x_0
        by_early = chosen.get("guide", "early") == "early"
        guide = (model.early, x_t, t, groups) if by_early else (model.params, x_t, t, np.full(3, -1))
        return np.clip(x_0 + w * (x_0 - model.denoiser.x_0(*guide)), -1, 1)

    rng = np.random.default_rng(3)
    x_T = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    groups = model.groups.draw(3, None if labels is None else np.array(labels), rng)
    steps = chosen.get("steps", T)  # which is below 20
    path = list(samplers.sample(x_0_theta, model.schedule, x_T, rng, steps, eta, order))
    assert len(path) == steps
    np.testing.assert_allclose(images, np.clip((path[-1][1] + 1) / 2, 0, 1), atol=1e-5)


def model_of(additions, T, classes=False):
    """A diffusion model that was never trained."""
    config = {"arch": "mlp", "T": T, "schedule": "linear", "additions": additions, "classes": classes}
    rng = np.random.default_rng(0)
    params = denoisers.init_mlp_denoiser(rng, inputs=2 if "black" in additions else 1, hidden=16)
    return DDPM(config, {"ema": params} | ({"early": params} if "guide" in additions else {}))


def test_what_is_not_chosen_has_a_default():
    default = SamplerConfig("sde-dpm++", 20, 0.5)
    for additions, steps, chosen, expected in (
        ([], 200, {}, SamplerConfig("ddpm", 200)),
        (["v"], 200, {}, replace(default, guidance=0)),
        (["v", "guide"], 200, {}, default),
        (["v", "guide"], 6, {}, replace(default, steps=6)),
        (["v", "guide"], 200, {"sampler": "ddim"}, SamplerConfig("ddim", 200)),
        (["v", "guide"], 200, {"sampler": "sde-dpm++", "steps": 7}, SamplerConfig("sde-dpm++", 7)),
        (["v", "guide"], 200, {"steps": 7}, replace(default, steps=7)),
        (["v", "guide"], 200, {"guidance": 0, "sampler": None}, replace(default, guidance=0)),
    ):
        assert model_of(additions, steps).sampler_config(**chosen) == expected


@pytest.mark.parametrize(
    ("additions", "chosen", "message"),
    [
        (["v", "guide"], {"steps": 201}, "a sampler takes 1 to T = 200 steps, not 201"),
        (["v", "guide"], {"steps": 0}, "a sampler takes 1 to T = 200 steps, not 0"),
        (["v"], {"guidance": 1}, "trained without the addition guide"),
        (["v", "guide"], {"guidance": 1, "guide": "unlabelled"}, "trained without labels or groups"),
        (["v", "guide"], {"sampler": "euler"}, "sampler euler: expected one of ddpm, ddim"),
        (["v", "guide"], {"guide": "late"}, "guide late: expected one of early, unlabelled"),
    ],
)
def test_a_model_is_not_asked_for_what_it_cannot_do(additions, chosen, message):
    model = model_of(additions, 200)
    with pytest.raises(UserError, match=message):
        model.sampler_config(**chosen)
    if "expected one of" not in message:  # else there is no such SamplerConfig
        config = replace(SamplerConfig("ddim", 5), **chosen)
        with pytest.raises(UserError, match=message):  # in a notebook the config may come from elsewhere
            model.sample(2, np.random.default_rng(0), config=config)


def test_the_default_of_a_run_without_additions_is_the_papers_sampler():
    model = model_of([], 4)
    rng = np.random.default_rng(3)
    x_T = rng.standard_normal((5, 28, 28, 1), dtype=np.float32)
    *_, (_, x_0) = diffusion.sample(model.eps_theta, model.schedule, x_T, rng)
    for config in (None, *(model.sampler_config(**chosen) for chosen in ({}, {"sampler": "ddpm"}, {"steps": 4}))):
        images = model.sample(5, np.random.default_rng(3), config=config)
        np.testing.assert_array_equal(images, (x_0 + 1) / 2)
    assert np.any(images != model.sample(5, np.random.default_rng(3), config=SamplerConfig("ddim", 4)))


def test_each_image_has_the_label_that_is_asked_for_at_every_step(narrow_runs, monkeypatch):
    model = load_run(narrow_runs / "classes")
    seen = []

    def network(params, x, t, labels):
        seen.append(("early" if params is model.early else "ema", t[0], labels.tolist()))
        return np.zeros_like(x[..., :1])

    monkeypatch.setattr(model.denoiser, "network", network)
    asked = [3, 9, -1, 0]
    model.sample(4, labels=asked, config=model.sampler_config(guidance=1))
    both = [(weights, t, asked) for t in samplers.timesteps(T, T)[:-1] for weights in ("ema", "early")]
    assert seen == both
    seen.clear()
    model.sample(12, config=model.sampler_config(guidance=1, guide="unlabelled"))  # one class after the other
    assert [(weights, labels) for weights, _, labels in seen] == [("ema", [*range(10), 0, 1]), ("ema", [-1] * 12)] * T
    seen.clear()
    model.sample(4, labels=asked, config=SamplerConfig("ddpm", T))
    assert [labels for *_, labels in seen] == [asked] * T


def test_samples_of_a_vae_are_decoded_from_the_prior(narrow_runs):
    model = load_run(narrow_runs / "vae")
    assert isinstance(model, VAE)
    images = model.sample(5, np.random.default_rng(3))
    assert images.shape == (5, 28, 28, 1) and 0 <= images.min() < images.max() <= 1
    z = np.random.default_rng(3).standard_normal((5, 4), dtype=np.float32)
    np.testing.assert_array_equal(images, model.generate(z))
    np.testing.assert_array_equal(images, vae.generate(model.decode, z))
    assert np.any(model.sample(5) != model.sample(5))  # without a generator others each time
    images = np.full((2, 28, 28, 1), 200, np.uint8)
    for wrong in (images, images.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\], found 200"):
            model.encode(wrong)


def test_labels_are_numbers_or_names_and_others_are_refused(narrow_runs):
    boots = ["boot", "Boots", "ankle boot", "Ankle Boots", 9, "9", np.int64(9)]
    assert trained.labels_for(7, boots, classes=True).tolist() == [9] * 7
    for one in (9, "boot", [9], np.array([9])):
        assert trained.labels_for(3, one, classes=True).tolist() == [9, 9, 9]
    assert trained.labels_for(4, ["T-shirt/top", "tshirt", "trousers", "dresses"], True).tolist() == [0, 0, 1, 3]
    assert trained.labels_for(2, [-1, 3], True).tolist() == [-1, 3] and trained.labels_for(2, None, False) is None
    for wrong in (12, -3, [1, 10], "hat", "", "-", 9.5, [None, 1]):
        with pytest.raises(ValueError, match="expected a class by number or name: 0 T-shirt, .*9 boot"):
            trained.labels_for(2, wrong, True)
    with pytest.raises(ValueError, match="a label for each of 4 images, or one for all, found 3"):
        trained.labels_for(4, [1, 2, 3], True)
    with pytest.raises(UserError, match="trained without --classes"):
        load_run(narrow_runs / "ddpm").sample(2, np.random.default_rng(0), np.array([1, 2]))


# ----------------------------------------------------------------------------------------------- drawn by several ranks


def test_drawn_images_have_the_nearest_grey_levels():
    x = np.arange(784) % 256
    for of_model, expected in (
        (scale(x, 0, 1), x),  # of a VAE
        ((scale(x, -1, 1) + 1) / 2, x),  # as `DDPM.sample` ends
        (np.full(784, 0.5), np.full(784, 128)),
    ):
        images = np.tile(of_model.reshape(1, 28, 28, 1), (trained.SHARD, 1, 1, 1))
        model = SimpleNamespace(config={}, sample=lambda N, rng, images=images: images)
        found = draw(model, 1, 0, Ranks(1))
        assert found.dtype == np.uint8 and found.ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("sampler", [None, "ddpm", "vae"])
def test_an_image_depends_on_seed_and_place_alone(sampler, narrow_runs):
    """To the bit, however many others are drawn: a part of a shard, a shard, or one and the start of a second."""
    shard = trained.SHARD
    model = load_run(narrow_runs / ("vae" if sampler == "vae" else "ddpm"))
    options = {} if sampler == "vae" else {"config": model.sampler_config(sampler=sampler, steps=3)}
    with Ranks(2) as ranks:
        many = draw(model, 2 * shard + 8, 1, ranks, **options)
    for few in (1, 5, shard, shard + 1, 2 * shard + 1):
        np.testing.assert_array_equal(draw(model, few, 1, Ranks(1), **options), many[:few])
    assert len(np.unique(many, axis=0)) == 2 * shard + 8
    assert np.any(many[0] != draw(model, 1, 2, Ranks(1), **options))


def test_the_label_of_an_image_is_not_that_of_its_place_in_a_shard():
    """Of a model that draws one grey for each label."""

    def sample(N, rng, labels):
        assert N == len(labels) == trained.SHARD
        return np.broadcast_to(labels.reshape(-1, 1, 1, 1) / 255, (N, 28, 28, 1))

    model = SimpleNamespace(config={"classes": True}, sample=sample)
    for N in (1, trained.SHARD, trained.SHARD + 7):
        assert draw(model, N, 0, Ranks(1))[:, 0, 0, 0].tolist() == [n % 10 for n in range(N)]
    for labels in ([4, 4, 2], np.arange(trained.SHARD + 8)[::-1] % 7):
        assert draw(model, len(labels), 0, Ranks(1), labels)[:, 0, 0, 0].tolist() == list(labels)


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_notebook_that_makes_numpy_raise_can_draw(name):
    """An exponential that is too small for float32 is 0, and nothing to stop for."""
    model = load_trained(name)
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"):
        images = model.sample(2, rng)
    np.testing.assert_array_equal(images, model.sample(2, np.random.default_rng(0)))


def test_each_combination_of_flags_is_drawn_once_and_a_guide_that_none_uses_is_refused(narrow_runs):
    model = load_run(narrow_runs / "classes")
    flags = {"sampler": None, "steps": [3, 2], "guidance": [0, 0.5], "guide": list(samplers.GUIDES)}
    configs = trained.sampler_configs(model, argparse.Namespace(**flags))
    drawn = [(0, "unlabelled"), (0.5, "early"), (0.5, "unlabelled")]
    assert configs == [SamplerConfig("sde-dpm++", steps, *how) for steps in (3, 2) for how in drawn]
    assert len({str(config) for config in configs}) == 6
    for change in ({"sampler": ["ddim"], "guidance": None}, {"guidance": [0]}):
        with pytest.raises(UserError, match="--guide needs a --guidance above 0"):
            trained.sampler_configs(model, argparse.Namespace(**flags | change))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_runs_that_are_no_trained_models_of_this_version(narrow):
    """docs/published_protocol.py's pixels are others, and of its two sets of weights one counts. In the first epoch
    nothing is trained. With classes but without groups a model would draw whatever it likes."""
    expected = "expected a run of run_vae.py or run_ddpm.py, found another"
    for name, of_state, of_config, words in (
        ("vae", {}, {"model": "vae on binarised pixels"}, expected),
        ("vae", {"log": []}, {}, "first epoch"),
        ("ddpm", {"log": []}, {}, "first epoch"),
        ("ddpm", {}, {"classes": True}, "expected a run of this version"),
    ):
        arrays, state = load(narrow / name / "checkpoint.npz")
        state = state | of_state | {"config": state["config"] | of_config}
        named = {place: array for place, array in arrays.items() if not place.startswith("groups/")}
        (narrow / words).mkdir(exist_ok=True)
        checkpoint.save(narrow / words / "checkpoint.npz", named, state)
        with pytest.raises(CheckpointError, match=words):
            load_run(narrow / words)


# ---------------------------------------------------------------------------------------------- weights of the package


@pytest.fixture(scope="module")
def data():
    return load_fashion_mnist(ROOT / "data")


@pytest.mark.parametrize("name", trained.WEIGHTS)
def test_the_weights_of_the_package_are_of_a_run_on_fashion_mnist(name, data):
    model = load_trained(name)
    evaluate.check_data(name, model, data, SimpleNamespace(data="data"))  # those and no others
    assert model.config["seed"] == 0 and model.config["model"] == name.split("-")[0]
    assert model.config.get("classes", False) == (name == "ddpm-classes")
    assert {leaf.dtype for leaf in tree.leaves(model.params)} == {np.dtype(np.float32)}
    assert sum(path.stat().st_size for path in trained.WEIGHTS.values()) < 8e6
    with pytest.raises(ValueError, match="gan: expected one of vae, ddpm, ddpm-classes"):
        load_trained("gan")
    if name == "vae":
        x = scale(data["test_images"][:500], 0, 1)
        mu, log_var = model.encode(x)
        elbo = bernoulli_log_likelihood(model.decode(mu), x) - vae.kl_per_dimension(mu, log_var).sum(axis=1)
        assert -245 < elbo.mean() < -230


@pytest.mark.parametrize("name", ["ddpm", "ddpm-classes"])
def test_the_diffusion_models_of_the_package_are_good(name, data):
    """Network, guide and groups, each by itself: a scale that is not applied, or labels in another order, show."""
    model = load_trained(name)
    named, _ = load(trained.WEIGHTS[name])
    assert {place.split("/")[0] for place in named} == {"ema", "early", "groups"}  # the last weights draw nothing
    labels = data["test_labels"][:100] if name == "ddpm-classes" else None
    x_0 = scale(data["test_images"][:100], -1, 1)
    groups = model.groups_of(x_0, labels)
    t = np.arange(1, 201, 2)
    eps = np.random.default_rng(0).standard_normal(x_0.shape, dtype=np.float32)
    x_t = diffusion.q_sample(model.schedule, x_0, t, eps)
    assert diffusion.squared_errors(eps, model.eps_theta(x_t, t, groups)).mean() < 0.045
    now = diffusion.squared_errors(x_0, model.x_0_theta(x_t, t, groups)).mean()
    early = diffusion.squared_errors(x_0, model.denoiser.x_0(model.early, x_t, t, groups)).mean()
    assert now < early < 1.2 * now  # the guide makes larger errors, but not by much

    # The means of the groups, each by its share, are the mean of all images of the class.
    x = scale(data["train_images"], -1, 1)
    of_class = [x] if labels is None else [x[data["train_labels"] == k] for k in range(10)]
    for images, means, shares in zip(of_class, model.groups.means, model.groups.shares, strict=True):
        assert shares.sum() == pytest.approx(1, abs=2e-3)
        found = np.tensordot(shares, means, axes=1)
        np.testing.assert_allclose(found, images.mean(axis=0), atol=0.05)


def test_the_classifier_takes_garments_for_what_they_were_asked_to_be():
    """The names are those that the authors of FashionMNIST have given the labels, in short."""
    names = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
    assert list(CLASSES) == names
    model = load_trained("ddpm-classes")
    asked = [name for name in names for _ in range(4)]
    config = SamplerConfig("dpm++", 6, 2.0, "unlabelled")
    images = model.sample(len(asked), np.random.default_rng(4), asked, config)
    params = classifier.load_classifier()
    taken_for = classifier.logits(params, classifier.features(params, images)).argmax(axis=1).reshape(10, 4)
    assert np.all((taken_for == np.arange(10)[:, None]).sum(axis=1) >= 3)


def test_packed_weights_are_those_of_the_run_but_for_rounding(narrow, small_data, x_test, monkeypatch, capsys):
    """docs/pack.py as a whole, on three small runs: what it writes, what it says, and that it loads again."""
    pack = script("docs/pack.py")
    sizes = {np.dtype(np.int8): [], np.dtype(np.float16): []}
    for path in trained.WEIGHTS.values():  # those in the package
        for place, array in load(path)[0].items():
            if not place.endswith("/scale"):
                sizes[array.dtype].append(array.size)
    rounded, others = sizes.values()
    assert max(others) < pack.LARGE <= min(rounded)
    monkeypatch.setattr(pack, "LARGE", 100)  # numbers in a matrix
    (narrow / "classes").rename(narrow / "ddpm-classes")
    for name in trained.WEIGHTS:
        monkeypatch.setitem(trained.WEIGHTS, name, narrow / f"{name}.npz")
    drawn = []

    def draw_and_record(model, N, seed, ranks):
        drawn.append((N, seed))
        return np.full((N, 28, 28, 1), 10 * len(drawn) + (not model.log), np.uint8)  # what is packed has no log

    def distance(generated, real):
        np.testing.assert_array_equal(real, scale(x_test[:, 14, :, 0], 0, 1))
        return 255 * generated[0, 0]

    monkeypatch.setattr(pack, "draw", draw_and_record)
    monkeypatch.setattr(classifier, "features", lambda params, x: x[:, 14, :, 0])
    monkeypatch.setattr(metrics, "frechet_distance", distance)
    main_of(pack, "--runs", narrow, "--data", small_data, "--workers", 1)
    words = "{:<14} Frechet distance of 40: {}.00 as trained, {}.00 rounded"
    rows = [("vae", 10, 21), ("ddpm", 30, 41), ("ddpm-classes", 50, 61)]
    assert capsys.readouterr().out.splitlines() == [words.format(*row) for row in rows]
    assert drawn == [(40, 0)] * 6  # of the same noise

    for name in trained.WEIGHTS:
        arrays, state = load(narrow / name / "checkpoint.npz")
        packed, _ = load(narrow / f"{name}.npz")
        model = load_trained(name)
        assert model.config == state["config"]
        parts = {"params": model.params}
        if name != "vae":
            parts = {"ema": model.params, "early": model.early, "groups": vars(model.groups)}
        loaded = dict(zip(tree.names(parts), tree.leaves(parts), strict=True))
        assert loaded.keys() == {place for place in arrays if place.split("/")[0] in parts}
        assert packed.keys() == loaded.keys() | {f"{place}/scale" for place in loaded if loaded[place].size >= 100}
        for place, found in loaded.items():
            w = arrays[place]
            assert found.dtype == np.float32 and found.shape == w.shape
            if w.size < 100:
                np.testing.assert_array_equal(found, w.astype(np.float16))
                continue
            of_column = packed[f"{place}/scale"]
            assert (of_column.dtype, packed[place].dtype) == (np.float16, np.int8)
            levels = {"params": 63, "ema": 31, "early": 7, "groups": 31}[place.split("/")[0]]
            largest = np.abs(w).max(axis=tuple(range(w.ndim - 1)))
            np.testing.assert_allclose(of_column, largest / levels, rtol=1e-3, atol=2e-7)  # 0 is the scale of no column
            assert np.abs(packed[place]).max() == levels
            assert np.all(np.abs(found - w) <= 0.5001 * of_column.astype(np.float32))


def test_damaged_weights_of_the_package_are_not_used(tmp_path, monkeypatch):
    content = trained.WEIGHTS["vae"].read_bytes()
    path = tmp_path / "vae.npz"
    monkeypatch.setitem(trained.WEIGHTS, "vae", path)
    for damaged in (b"", content[:-1000], content[:200_000] + bytes(1000) + content[201_000:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: [^\n]+$"):
            load_trained("vae")
