"""A trained model: what a notebook can do with it, what it draws, and what is refused."""

import argparse
import re
from functools import partial
from types import SimpleNamespace

import run_ddpm
from scratchgen import denoisers, diffusion, improved, plots, samplers, trained, tree, vae
from scratchgen.data import CLASSES, UserError, load_fashion_mnist, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import checkpoint
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.parallel import Ranks
from scratchgen.machinery.run import SAMPLES, rng_for
from scratchgen.ops import bernoulli_log_likelihood
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import DDPM, VAE, draw, load_run, load_trained

import numpy as np
import pytest
from conftest import ROOT, T, load, main_of, script, tamper


def test_the_session_of_the_docstring_works_as_it_stands(small_data, tmp_path):
    flags = ["--T", 20, "--arch", "mlp", "--epochs", 1, "--train-images", 32, "--workers", 1]
    main_of(run_ddpm, "--data", small_data, *flags, "--out", tmp_path / "ddpm")
    session = "\n".join(line[4:] for line in trained.__doc__.splitlines() if line.startswith("    "))
    assert '"runs/ddpm"' in session and "# (4, 28, 28, 1) in [0, 1]" in session
    names = {}
    exec(session.replace('"runs/ddpm"', repr(str(tmp_path / "ddpm"))), names)
    assert names["images"].shape == (4, 28, 28, 1)
    assert 0 <= names["images"].min() < names["images"].max() <= 1


def test_the_functions_of_a_run_have_its_weights(runs, rng):
    model = load_run(runs / "vae")
    x = rng.random((3, 28, 28, 1), dtype=np.float32)
    mu, log_var = model.encode(x)
    assert mu.shape == log_var.shape == (3, 4) and model.decode(mu).shape == x.shape
    np.testing.assert_array_equal(mu, vae.mlp_encode(model.params, x)[0])
    with np.load(runs / "vae" / "checkpoint.npz") as file:
        np.testing.assert_array_equal(model.params["mu"]["w"], file["params/mu/w"])

    model = load_run(runs / "ddpm")
    x_t = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    t = np.array([1, 3, T])
    additions = ["v", "black", "weights", "muon", "guide", "groups"]
    assert model.config["additions"] == additions
    expected = improved.Denoiser(denoisers.mlp_denoiser, diffusion.make_schedule("linear", T), additions, model.groups)
    groups = np.array([3, -1, 299])
    for found, f in ((model.eps_theta, expected.eps), (model.x_0_theta, expected.x_0)):
        np.testing.assert_array_equal(found(x_t, t, groups), f(model.params, x_t, t, groups))
        assert np.any(found(x_t, t) != found(x_t, t, groups))
    with np.load(runs / "ddpm" / "checkpoint.npz") as file:  # sampling and measuring are for the averaged weights
        np.testing.assert_array_equal(model.params["mlp"][0]["w"], file["ema/mlp/0/w"])
        np.testing.assert_array_equal(model.early["mlp"][0]["w"], file["early/mlp/0/w"])
        assert np.any(file["ema/mlp/0/w"] != file["params/mlp/0/w"])
    assert np.any(model.early["mlp"][0]["w"] != model.params["mlp"][0]["w"])
    assert np.any(model.denoiser.x_0(model.early, x_t, t) != model.x_0_theta(x_t, t))


# ------------------------------------------------------------------------------------------------ how samples are drawn

CHOICES = [
    {},
    {"guidance": 0},
    {"guidance": 2, "steps": 4},
    {"sampler": "ddpm"},
    {"sampler": "ddim", "steps": 3},
    {"sampler": "dpm++", "steps": 3, "guidance": 0.3},
]


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_samples_of_a_diffusion_model_are_those_of_its_sampler_in_0_to_1(runs, chosen):
    model = load_run(runs / "ddpm")
    assert isinstance(model, DDPM) and model.config["T"] == T
    sample = partial(model.sample, 5, config=model.sampler_config(**chosen))
    images = sample(np.random.default_rng(3))
    assert images.shape == (5, 28, 28, 1) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, sample(np.random.default_rng(3)))
    assert np.any(images != sample(np.random.default_rng(4)))

    w = chosen.get("guidance", 0 if "sampler" in chosen else improved.GUIDANCE)
    eta, order = {"ddpm": (1, 1), "ddim": (0, 1), "dpm++": (0, 2), "sde-dpm++": (1, 2)}[
        chosen.get("sampler", "sde-dpm++")
    ]

    def guided(x_t, t):
        return improved.guided(unguided(x_t, t), model.denoiser.x_0(model.early, x_t, t, groups), w)

    rng = np.random.default_rng(3)
    x_T = rng.standard_normal((5, 28, 28, 1), dtype=np.float32)
    groups = model.groups.draw(5, None, rng)
    unguided = partial(model.x_0_theta, groups=groups)
    steps = chosen.get("steps", T)  # which is below 20
    x_0_theta = guided if w else unguided
    path = list(samplers.sample(x_0_theta, model.schedule, x_T, rng, steps, eta, order))
    assert len(path) == steps
    x_0 = path[-1][1]
    assert (np.abs(x_0).max() > 1) == (w == 0)  # what is guided is clipped at each step
    np.testing.assert_allclose(images, np.clip((x_0 + 1) / 2, 0, 1), atol=1e-6)


def model_of(additions, T, classes=False):
    """A diffusion model that was never trained."""
    config = {"arch": "mlp", "T": T, "schedule": "linear", "additions": additions, "classes": classes}
    params = denoisers.init_mlp_denoiser(np.random.default_rng(0), inputs=2 if "black" in additions else 1)
    return DDPM(config, {"ema": params} | ({"early": params} if "guide" in additions else {}))


@pytest.mark.parametrize(
    ("additions", "T", "chosen", "expected"),
    [
        ([], 200, {}, SamplerConfig("ddpm", 200)),
        (["v"], 200, {}, SamplerConfig("sde-dpm++", 20)),
        (["v", "guide"], 200, {}, SamplerConfig("sde-dpm++", 20, improved.GUIDANCE)),
        (["v", "guide"], 6, {}, SamplerConfig("sde-dpm++", 6, improved.GUIDANCE)),
        (["v", "guide"], 200, {"sampler": "ddim"}, SamplerConfig("ddim", 200)),
        (["v", "guide"], 200, {"sampler": "sde-dpm++", "steps": 7}, SamplerConfig("sde-dpm++", 7)),
        (["v", "guide"], 200, {"steps": 7, "guidance": 0}, SamplerConfig("sde-dpm++", 7)),
        (["v", "guide"], 200, {"sampler": None, "steps": None}, SamplerConfig("sde-dpm++", 20, improved.GUIDANCE)),
    ],
)
def test_what_is_not_chosen_has_a_default(additions, T, chosen, expected):
    assert model_of(additions, T).sampler_config(**chosen) == expected


@pytest.mark.parametrize(
    ("additions", "chosen", "message"),
    [
        (["v", "guide"], {"steps": 201}, "a sampler takes 1 to T = 200 steps, not 201"),
        (["v", "guide"], {"steps": 0}, "a sampler takes 1 to T = 200 steps, not 0"),
        (["v"], {"guidance": 1}, "trained without the addition guide"),
        (["v", "guide"], {"guidance": 1, "guide": "unlabelled"}, "trained without labels or groups"),
        (["v", "guide"], {"sampler": "euler"}, "euler: expected one of ddpm, ddim"),
        (["v", "guide"], {"guide": "late"}, "late: expected one of early, unlabelled"),
    ],
)
def test_a_model_is_not_asked_for_what_it_cannot_do(additions, chosen, message):
    model = model_of(additions, 200)
    with pytest.raises(UserError, match=message):
        model.sampler_config(**chosen)
    if chosen.get("sampler") or chosen.get("guide") == "late":
        return  # there is no such SamplerConfig
    config = SamplerConfig(**{"sampler": "ddim", "steps": 5} | chosen)
    with pytest.raises(UserError, match=message):  # in a notebook the config may come from elsewhere
        model.sample(2, np.random.default_rng(0), config=config)


def test_a_model_without_classes_is_asked_for_none(runs):
    with pytest.raises(UserError, match="trained without --classes"):
        load_run(runs / "ddpm").sample(2, np.random.default_rng(0), np.array([1, 2]))


def test_the_default_of_a_run_without_additions_is_the_papers_sampler(small_data, tmp_path):
    flags = ["--T", 4, "--epochs", 1, "--train-images", 16, "--additions", "none", "--workers", 1]
    main_of(run_ddpm, *flags, "--data", small_data, "--out", tmp_path)
    model = load_run(tmp_path)
    rng = np.random.default_rng(3)
    x_T = rng.standard_normal((5, 28, 28, 1), dtype=np.float32)
    *_, (_, x_0) = diffusion.sample(model.eps_theta, model.schedule, x_T, rng)
    for chosen in ({}, {"sampler": "ddpm"}, {"steps": 4}):
        images = model.sample(5, np.random.default_rng(3), config=model.sampler_config(**chosen))
        np.testing.assert_array_equal(images, (x_0 + 1) / 2)
    np.testing.assert_array_equal(model.sample(5, np.random.default_rng(3)), (x_0 + 1) / 2)


def test_a_model_with_classes_draws_what_is_asked_for(small_data, tmp_path, monkeypatch):
    grids = {}
    monkeypatch.setattr(plots, "grid", lambda *args, real=plots.grid: grids.update({args[2]: args}) or real(*args))
    flags = ["--T", 4, "--epochs", 1, "--train-images", 48, "--batch-size", 16, "--classes", "--workers", 1]
    main_of(run_ddpm, *flags, "--data", small_data, "--out", tmp_path)
    (title,) = (title for title in grids if title.startswith("by class: "))
    images, columns, _, low, high, _, names = grids[title]  # classes.png, a column a class
    assert names == CLASSES
    np.testing.assert_array_equal(images, draw(load_run(tmp_path), 100, 0, Ranks(1), labels=np.arange(100) % 10))
    assert (columns, low, high) == (10, 0, 255) and (tmp_path / "classes.png").stat().st_size > 1000
    model = load_run(tmp_path)
    x_T = np.random.default_rng(3).standard_normal((11, 28, 28, 1), dtype=np.float32)

    def end(labels=None, **chosen):
        config = model.sampler_config(sampler="dpm++", **chosen)
        *_, (_, x_0) = model.trajectory(x_T, np.random.default_rng(4), labels, config)
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
    *_, (_, expected) = samplers.sample(clipped, model.schedule, x_T, None, eta=0, order=2)
    led_by_itself = end(nothing, guidance=3, guide="unlabelled")  # nowhere, but it is clipped
    np.testing.assert_allclose(led_by_itself, expected, atol=1e-5)


def test_samples_of_a_vae_are_decoded_from_the_prior(runs):
    model = load_run(runs / "vae")
    assert isinstance(model, VAE)
    images = model.sample(5, np.random.default_rng(3))
    assert images.shape == (5, 28, 28, 1) and 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, model.sample(5, np.random.default_rng(3)))
    z = np.random.default_rng(3).standard_normal((5, 4), dtype=np.float32)
    np.testing.assert_array_equal(images, model.generate(z))
    np.testing.assert_array_equal(images, vae.generate(model.decode, z))


def test_labels_are_numbers_or_names_and_others_are_refused():
    boots = ["boot", "Boots", "ankle boot", "Ankle Boots", 9, "9", np.int64(9)]
    assert trained.labels_for(7, boots, classes=True).tolist() == [9] * 7
    for one in (9, "boot", [9], np.array([9])):
        assert trained.labels_for(3, one, classes=True).tolist() == [9, 9, 9]
    assert trained.labels_for(4, ["T-shirt/top", "tshirt", "trousers", "dresses"], True).tolist() == [0, 0, 1, 3]
    assert trained.labels_for(2, [-1, 3], True).tolist() == [-1, 3] and trained.labels_for(2, None, False) is None
    for wrong in (12, -3, [1, 10], "hat", "", "-", 9.5, None, [None, 1]):
        if wrong is not None:
            with pytest.raises(ValueError, match="expected a class by number or name: 0 T-shirt, .*9 boot"):
                trained.labels_for(2, wrong, True)
    with pytest.raises(ValueError, match="a label for each of 4 images, or one for all, found 3"):
        trained.labels_for(4, [1, 2, 3], True)


def test_each_wrong_name_is_answered_with_the_choices(runs):
    with pytest.raises(ValueError, match="gan: expected one of vae, ddpm, ddpm-classes"):
        load_trained("gan")
    model = load_run(runs / "ddpm")
    with pytest.raises(ValueError, match="sampler euler: expected one of ddpm, "):
        model.sampler_config(sampler="euler")
    with pytest.raises(ValueError, match="guide late: expected one of early, unlabelled"):
        model.sampler_config(guide="late")
    images = np.full((2, 28, 28, 1), 200, np.uint8)
    for wrong in (images, images.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\], found 200"):
            load_run(runs / "vae").encode(wrong)


def test_in_a_notebook_no_generator_is_needed_and_a_model_has_its_log(runs):
    for name in ("vae", "ddpm"):
        model = load_run(runs / name / "checkpoint.npz")  # as good as its folder
        images = model.sample(3)
        assert images.shape == (3, 28, 28, 1) and np.any(images != model.sample(3))
        assert [row["epoch"] for row in model.log] == [1]


# ----------------------------------------------------------------------------------------------- drawn by several ranks


def algorithm_2(model, x_t, rng):
    """{t: x_t}, line 4 as printed, Eq. (11): where the network predicts v, no x_0 is clipped (`Denoiser.x_0`)."""
    s = model.schedule
    groups = model.groups.draw(len(x_t), None, rng)
    path = {T: x_t}
    for t in range(T, 0, -1):
        z = rng.standard_normal(x_t.shape, dtype=np.float32)
        eps = model.eps_theta(x_t, np.full(len(x_t), t), groups)
        mean = (x_t - s["beta"][t] / s["sqrt_one_minus_alpha_bar"][t] * eps) / np.sqrt(s["alpha"][t])
        path[t - 1] = x_t = (mean + np.sqrt(s["posterior_variance"][t]) * z).astype(np.float32)
    return path


def test_samples_of_ddpm_are_algorithm_2(runs):
    model = load_run(runs / "ddpm")
    rng = np.random.default_rng([5, SAMPLES, 0])
    x_T = rng.standard_normal((trained.SHARD, 28, 28, 1), dtype=np.float32)
    x_0 = np.clip(algorithm_2(model, x_T, rng)[0], -1, 1)[:3]
    images = draw(model, 3, 5, Ranks(1), config=model.sampler_config(sampler="ddpm"))
    assert np.abs(images - (x_0 + 1) * 127.5).max() <= 0.51


def test_drawn_images_have_the_nearest_grey_levels():
    class Known:
        config = {}

        def sample(self, N, rng):
            return np.tile(self.x.reshape(1, 28, 28, 1), (N, 1, 1, 1))

    model = Known()
    x = np.arange(784) % 256
    for in_0_to_1 in (scale(x, 0, 1), (scale(x, -1, 1) + 1) / 2):  # of a VAE, and as `DDPM.sample` ends
        model.x = in_0_to_1
        found = draw(model, 1, 0, Ranks(1))
        assert found.dtype == np.uint8 and found.ravel().tolist() == x.tolist()
    model.x = np.full(784, 0.5)
    assert np.all(draw(model, 1, 0, Ranks(1)) == 128)


def test_over_images_keeps_the_order():
    x = np.arange(23)
    with Ranks(2) as ranks:
        found = trained.over_images(lambda a, nothing: a * a, [x, None], 3, ranks, "squares")
    np.testing.assert_array_equal(found, x * x)


@pytest.mark.parametrize("sampler", [None, "ddpm", "ddim", "vae"])
def test_an_image_depends_on_seed_and_place_alone(sampler, runs):
    """To the bit, however many others are drawn: a part of a shard, a shard, or one and the start of a second."""
    shard = trained.SHARD
    model = load_run(runs / ("vae" if sampler == "vae" else "ddpm"))
    options = {} if sampler == "vae" else {"config": model.sampler_config(sampler=sampler)}
    with Ranks(2) as ranks:
        many = draw(model, 2 * shard + 8, 1, ranks, **options)
    for few in (1, 5, shard, shard + 1, 2 * shard + 1):
        np.testing.assert_array_equal(draw(model, few, 1, Ranks(1), **options), many[:few])
    assert len(np.unique(many, axis=0)) == 2 * shard + 8
    assert np.any(many[0] != draw(model, 1, 2, Ranks(1), **options))


@pytest.mark.parametrize("labels", [None, [9, 1, 1]])
def test_the_first_images_of_a_model_with_classes_have_labels_of_their_own(labels, monkeypatch):
    class Model:
        config = {"classes": True}

        def sample(self, N, rng, labels):
            assert N == len(labels) == trained.SHARD
            return np.broadcast_to(labels.reshape(-1, 1, 1, 1) / 255, (N, 28, 28, 1))

    if labels is None:
        for N in (1, trained.SHARD, trained.SHARD + 7):
            assert draw(Model(), N, 0, Ranks(1))[:, 0, 0, 0].tolist() == [n % 10 for n in range(N)]
    else:
        assert draw(Model(), 3, 0, Ranks(1), np.array(labels))[:, 0, 0, 0].tolist() == labels


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_notebook_that_makes_numpy_raise_can_draw(name):
    """An exponential that is too small for float32 is 0, and nothing to stop for."""
    model = load_trained(name)
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"):
        images = model.sample(3, rng)
    np.testing.assert_array_equal(images, model.sample(3, np.random.default_rng(0)))


def test_a_guide_that_none_of_the_samplers_uses_is_refused(runs):
    model = load_run(runs / "ddpm")
    flags = {"sampler": None, "steps": [3], "guidance": [0, 0.5], "guide": ["early"]}
    names = [str(config) for config in trained.sampler_configs(model, argparse.Namespace(**flags))]
    assert names == ["sde-dpm++, 3 steps", "sde-dpm++, 3 steps, w = 0.5"]
    for change in ({"sampler": ["ddim"], "guidance": None}, {"guidance": [0]}):
        with pytest.raises(UserError, match="--guide needs a --guidance above 0"):
            trained.sampler_configs(model, argparse.Namespace(**flags | change))


class Sure:
    """A model with classes that draws one class per label, black for 0 to nearly white for 9, and nothing by chance."""

    config = {"classes": True, "T": 5}

    def sample(self, N, rng, labels=None):
        labels = np.arange(N) % 10 if labels is None else labels
        return np.broadcast_to(labels.reshape(-1, 1, 1, 1) / 10, (N, 28, 28, 1))

    def trajectory(self, x_T, rng, config):
        assert rng.random() == np.random.default_rng(1).random()  # the same groups for each row
        assert np.ptp(x_T, axis=0).max() == 0 and config.sampler == "dpm++"
        yield 0, np.full_like(x_T, config.guidance / 8 if config.guide == "early" else -config.guidance / 8)


def test_classes_are_drawn_equally_often():
    levels = draw(Sure(), 12, 0, Ranks(1))[:, 0, 0, 0].tolist()
    assert levels == [round(25.5 * k) for k in [*range(10), 0, 1]]
    several_shards = np.arange(40)[::-1] % 7  # the label of an image, not of its place in a shard
    found = draw(Sure(), 40, 0, Ranks(1), labels=several_shards)[:, 0, 0, 0]
    np.testing.assert_array_equal(found, np.round(several_shards / 10 * 255))
    asked = draw(Sure(), 3, 0, Ranks(1), labels=np.array([4, 4, 2]))[:, 0, 0, 0].tolist()
    assert asked == [round(25.5 * k) for k in (4, 4, 2)]


@pytest.mark.parametrize(("guide", "seen"), [("early", ("early", 3)), ("unlabelled", ("ema", -1))])
def test_the_guide_is_the_early_network_or_the_same_without_the_label(guide, seen):
    class Marked:
        """Its x_0 is a number for the parameters plus one for the label."""

        def x_0(self, params, x_t, t, groups):
            return np.full(x_t.shape, {"ema": 0.1, "early": 0.2}[params] + groups[0] / 100, np.float32)

    model = model_of(["v", "guide"], 5, classes=True)
    model.params, model.early, model.denoiser = "ema", "early", Marked()
    x_t = np.zeros((2, 28, 28, 1), np.float32)
    x_0 = model.x_0_guided(x_t, np.full(2, 4), np.full(2, 3), SamplerConfig("ddim", 5, 2.0, guide))
    x_0_guide = {"ema": 0.1, "early": 0.2}[seen[0]] + seen[1] / 100
    np.testing.assert_allclose(x_0, 0.13 + 2 * (0.13 - x_0_guide), rtol=1e-5)


def test_the_figure_of_classes_and_guides():
    (axes,) = script("docs/figures.py").classes(Sure()).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(CLASSES)
    image = axes.images[0]
    assert image.norm.vmin == -1 and image.norm.vmax == 1
    picture = np.pad(np.asarray(image.get_array()), [(0, 1), (0, 1)]).reshape(5 + 9, 29, 10, 29)[:, :28, :, :28]
    assert np.all(np.ptp(picture, axis=(1, 3)) == 0)  # each image of this model is of one grey
    grey = picture[:, 0, :, 0]
    np.testing.assert_allclose(grey[:5], np.tile(np.arange(10) / 5 - 1, (5, 1)), atol=1e-6)  # a column a class
    values = [0, 0.5, 1, 2, 4]
    rows = [(1, 0), *((sign, w) for sign in (1, -1) for w in values[1:])]  # no row twice
    np.testing.assert_allclose(grey[5:, 3], [sign * w / 8 for sign, w in rows])
    names = [f"{guide}, w = {w:g}" for guide in ("early", "unlabelled") for w in values[1:]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *(f"sample {number}, default" for number in range(1, 6)),
        "unguided",
        *names,
    ]


def test_the_strips_are_q_of_one_image_and_algorithm_2_from_noise(runs, tmp_path, x_test, monkeypatch):
    rows = []
    gifs = []
    monkeypatch.setattr(plots, "row_of_times", lambda *args: rows.append(args))
    monkeypatch.setattr(plots, "save", lambda figure, path: rows.append(path.name))
    monkeypatch.setattr(plots, "save_gif", lambda *args: gifs.append(args))
    model = load_run(runs / "ddpm")
    x_0 = scale(x_test[:1], -1, 1)
    run_ddpm.draw_trajectories(model, x_0, 3, tmp_path)
    (noisy, times, _), name, (path, reverse_times, _), other_name = rows
    assert (name, other_name) == ("forward.png", "trajectory.png")
    assert times[::-1] == reverse_times == [6, 3, 2, 1, 0]  # 1, 1/2, 1/4, 1/10, 1/20 of T = 6, and 0
    rng = rng_for(3, SAMPLES)
    eps = rng.standard_normal((1, 28, 28, 1), dtype=np.float32)
    a = model.schedule["alpha_bar"][times].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(noisy, np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, atol=1e-6)
    x_T = rng.standard_normal((16, 28, 28, 1), dtype=np.float32)
    expected = algorithm_2(model, x_T, rng)
    assert np.abs(expected[0]).max() > 1.01  # so that a clip on the way would be seen
    for x_t, t in zip(path, reverse_times, strict=True):
        np.testing.assert_allclose(x_t, expected[t][0], atol=5e-3)
    (frames, columns, file), *_ = gifs
    assert file == tmp_path / "sampling.gif" and columns == 4
    assert list(frames) == [6, 5, 4, 3, 2, 1, 0]
    np.testing.assert_allclose(frames[0], expected[0], atol=5e-3)


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
        ("ddpm", "additions", MISSING),
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
@pytest.mark.parametrize("keep_checksum", [True, False])
def test_a_state_that_was_changed(keep_checksum, name, key, value, folder):
    path = folder / name / "checkpoint.npz"
    arrays, state = load(path)
    state["config"][key] = value
    if value is MISSING:
        del state["config"][key]
    tamper(path, arrays, state, keep_checksum)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ") + ".*it was changed") as error:
        load_run(folder / name)
    assert "\n" not in str(error.value)


def test_a_run_of_another_script(folder):
    """docs/published_protocol.py: its pixels are others, and it has two sets of weights, of which one counts."""
    path = folder / "vae" / "checkpoint.npz"
    arrays, state = load(path)
    state["config"]["model"] = "vae on binarised pixels"
    checkpoint.save(path, arrays, state)
    with pytest.raises(CheckpointError, match="expected a run of run_vae.py or run_ddpm.py, found another"):
        load_run(folder / "vae")


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_run_that_never_finished_an_epoch(name, folder):
    path = folder / name / "checkpoint.npz"
    arrays, state = load(path)
    checkpoint.save(path, arrays, state | {"log": []})
    with pytest.raises(CheckpointError, match="first epoch"):
        load_run(folder / name)


def test_a_run_with_classes_of_before_there_were_groups(folder):
    path = folder / "ddpm" / "checkpoint.npz"
    arrays, state = load(path)
    state["config"]["classes"] = True
    checkpoint.save(path, {name: array for name, array in arrays.items() if not name.startswith("groups/")}, state)
    with pytest.raises(CheckpointError, match="expected a run of this version"):
        load_run(folder / "ddpm")


# ---------------------------------------------------------------------------------------------- weights of the package


@pytest.mark.parametrize("name", trained.WEIGHTS)
def test_the_weights_of_the_package_are_of_a_run_on_fashion_mnist(name):
    model = load_trained(name)
    data = load_fashion_mnist(ROOT / "data")
    evaluate.check_data(name, model, data, SimpleNamespace(data="data"))  # those and no others
    assert model.config["seed"] == 0 and model.config["model"] == name.split("-")[0]
    assert model.config.get("classes", False) == (name == "ddpm-classes")
    assert {leaf.dtype for leaf in tree.leaves(model.params)} == {np.dtype(np.float32)}


def test_the_weights_of_the_package_are_small_and_good():
    sizes = [path.stat().st_size for path in trained.WEIGHTS.values()]
    assert sum(sizes) < 8e6
    data = load_fashion_mnist(ROOT / "data")
    x = scale(data["test_images"][:500], 0, 1)
    model = load_trained("vae")
    mu, log_var = model.encode(x)
    elbo = bernoulli_log_likelihood(model.decode(mu), x) - vae.kl_per_dimension(mu, log_var).sum(axis=1)
    assert -245 < elbo.mean() < -230
    for name in ("ddpm", "ddpm-classes"):
        named, _ = load(trained.WEIGHTS[name])
        assert {place.split("/")[0] for place in named} == {"ema", "early", "groups"}  # the last weights draw nothing
        model = load_trained(name)
        x_0 = scale(data["test_images"][:100], -1, 1)
        groups = model.groups_of(x_0, data["test_labels"][:100] if name == "ddpm-classes" else None)
        t = np.arange(1, 201, 2)
        eps = np.random.default_rng(0).standard_normal(x_0.shape, dtype=np.float32)
        x_t = diffusion.q_sample(model.schedule, x_0, t, eps)
        assert diffusion.squared_errors(eps, model.eps_theta(x_t, t, groups)).mean() < 0.045
        now = diffusion.squared_errors(x_0, model.x_0_theta(x_t, t, groups)).mean()
        early = diffusion.squared_errors(x_0, model.denoiser.x_0(model.early, x_t, t, groups)).mean()
        assert early > now  # the guide makes larger errors


def test_packed_weights_are_those_of_the_run_but_for_rounding(monkeypatch, tmp_path):
    pack = script("docs/pack.py")
    monkeypatch.setattr(pack, "LARGE", 300)
    w = np.random.default_rng(0).standard_normal((30, 20), dtype=np.float32)
    b = np.float32([0.1, -2, 3])
    w[:, 3] = 0
    packed = dict(pack.pack("early/0/w", w)) | dict(pack.pack("early/0/b", b))
    assert packed.keys() == {"early/0/w", "early/0/w/scale", "early/0/b"}
    assert list(pack.pack("moments/first/w", w)) == []
    assert packed["early/0/w"].dtype == np.int8 and packed["early/0/b"].dtype == np.float16
    assert np.abs(packed["early/0/w"]).max(axis=0).tolist() == [7] * 3 + [0] + [7] * 16

    config = model_of(["guide"], 5).config | {"model": "ddpm"}
    checkpoint.save(tmp_path / "packed.npz", packed | {"ema/0/b": b.astype(np.float16)}, {"config": config})
    monkeypatch.setitem(trained.WEIGHTS, "packed", tmp_path / "packed.npz")
    (layer,) = load_trained("packed").early
    assert layer.keys() == {"w", "b"} and {leaf.dtype for leaf in layer.values()} == {np.dtype(np.float32)}
    assert np.all(np.abs(layer["w"] - w) <= np.abs(w).max(axis=0) * 0.51 / 7)
    np.testing.assert_allclose(layer["b"], b, rtol=1e-3)


@pytest.mark.parametrize("damage", ["short", "changed", "missing"])
def test_damaged_weights_of_the_package_are_not_used(damage, tmp_path, monkeypatch):
    path = tmp_path / "vae.npz"
    content = trained.WEIGHTS["vae"].read_bytes()
    if damage == "short":
        path.write_bytes(content[:-1000])
    elif damage == "changed":
        path.write_bytes(content[:200_000] + bytes(1000) + content[201_000:])
    monkeypatch.setitem(trained.WEIGHTS, "vae", path)
    with pytest.raises(CheckpointError) as error:
        load_trained("vae")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
