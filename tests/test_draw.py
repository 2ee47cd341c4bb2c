"""The program that draws: from the weights of the package and from a run, what is asked for, and what is refused."""

import re
from pathlib import Path

from scratchgen import draw, plots, trained
from scratchgen.data import CLASSES, UserError
from scratchgen.machinery import blas
from scratchgen.machinery.parallel import Ranks
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run, load_trained

import numpy as np
import pytest
from conftest import T, tiles


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Call the program in an empty folder; what it wrote into the .npz, the title of its figure, and what that shows:
    rows of images, with the right limits."""
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))

    def call(*flags):
        draw.main([*map(str, flags), "--samples"])
        (npz,) = tmp_path.glob("*.npz")
        with np.load(npz) as file:
            images = file["images"]
        npz.unlink()
        (axes,) = figures.pop().axes
        shown = tiles(axes, 0, 255)
        return images, axes.get_title(), shown.reshape(-1, axes.images[0].get_array().shape[1] // 29 + 1, 28, 28)

    return call


def test_the_defaults():
    found = vars(draw.parse_arguments([]))
    del found["command"]
    assert found == {
        "run": None, "model": None, "class": None, "sampler": None, "steps": None, "guidance": None, "guide": None,
        "seed": 0, "n": 64, "out": Path("drawn.png"), "samples": False, "workers": blas.available_cores(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_images_of_a_run_are_those_that_evaluation_would_draw(name, runs, drawn, capsys):
    images, title, shown = drawn(runs / name, "-n", 11, "--seed", 3, "--workers", 2)
    expected = trained.draw(load_run(runs / name), 11, 3, Ranks(1))[..., 0]
    np.testing.assert_array_equal(images, expected)
    assert images.dtype == np.uint8 and shown.shape == (3, 4, 28, 28)
    np.testing.assert_array_equal(shown.reshape(12, 28, 28), [*expected, np.zeros((28, 28))])
    assert title == {"vae": "seed 3", "ddpm": f"sde-dpm++, {T} steps, w = 0.5, seed 3"}[name]
    assert capsys.readouterr().out.splitlines() == ["wrote drawn.png", "wrote 11 images to drawn.npz"]


def test_the_sampler_is_the_one_that_is_asked_for(runs, drawn):
    flags = [runs / "ddpm", "-n", 5, "--sampler", "ddim", "--steps", 3, "--seed", 4]
    for guide, name in (({}, ""), ({"guidance": 1.0}, ", w = 1"), ({"guidance": 2.0, "guide": "unlabelled"}, None)):
        more = [word for flag, value in guide.items() for word in (f"--{flag}", value)]
        images, title, _ = drawn(*flags, *more, "--out", "elsewhere.png")
        expected = trained.draw(load_run(runs / "ddpm"), 5, 4, Ranks(1), config=SamplerConfig("ddim", 3, **guide))
        np.testing.assert_array_equal(images, expected[..., 0])
        assert title == f"ddim, 3 steps{', w = 2, unlabelled' if name is None else name}, seed 4"


def test_no_more_images_than_one_can_see_are_shown(runs, drawn):
    images, _, shown = drawn(runs / "vae", "-n", 405)
    assert len(images) == 405 and shown.shape == (20, 20, 28, 28)
    np.testing.assert_array_equal(shown.reshape(400, 28, 28), images[:400])


# ------------------------------------------------------------------------------------------------------ of the package


@pytest.mark.parametrize(
    ("flags", "name"), [((), "ddpm"), (("--model", "vae"), "vae"), (("--class", "boot"), "ddpm-classes")]
)
def test_the_weights_of_the_package(flags, name, drawn, monkeypatch):
    used = []
    monkeypatch.setattr(draw, "load_trained", lambda name: used.append(name) or load_trained(name))
    images, *_ = drawn(*flags, "-n", 4, *([] if name == "vae" else ["--steps", 2]))
    assert used == [name] and images.shape == (4, 28, 28) and images.std() > 30


@pytest.mark.parametrize(
    ("flags", "labels", "config"),
    [
        (["boot"], [9] * 7, ("ddim", 5)),
        (["2", "T-SHIRT", "--guidance", 3], [2] * 4 + [0] * 3, ("ddim", 5, 3.0)),
        (
            ["bag", "bag", "1", "--guidance", 1, "--guide", "unlabelled"],
            [8] * 5 + [1] * 2,
            ("ddim", 5, 1.0, "unlabelled"),
        ),
        (["boot", "--sampler", "dpm++", "--steps", 2], [9] * 7, ("dpm++", 2)),
    ],
)
def test_classes_take_turns_row_by_row_and_the_sampler_is_still_asked(flags, labels, config, drawn, monkeypatch):
    """By a model that draws its labels."""
    configs = []

    class Model:
        config = {"classes": True, "T": 200}

        def sampler_config(self, **chosen):
            return SamplerConfig(**{"sampler": "ddim", "steps": 5} | {k: v for k, v in chosen.items() if v is not None})

        def sample(self, N, rng, labels, config):
            configs.append(config)
            return np.broadcast_to(labels.reshape(-1, 1, 1, 1) / 255, (N, 28, 28, 1))

    monkeypatch.setattr(draw, "load_trained", lambda name: Model())
    images, title, shown = drawn("--class", *flags, "-n", 7)
    assert images[:, 0, 0].tolist() == labels and configs == [SamplerConfig(*config)]
    assert title == f"{configs[0]}, seed 0" and shown[..., 0, 0].ravel().tolist() == [*labels, 0, 0]


def test_every_class_has_a_name_and_a_number():
    for label, name in enumerate(CLASSES):
        assert draw.a_class(name) == draw.a_class(name.upper()) == draw.a_class(str(label)) == label
    plurals = ("T-shirts", "trousers", "dresses", "Bags", "ankle boots")
    assert [draw.a_class(name) for name in plurals] == [0, 1, 3, 8, 9]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RUNS/ddpm", "--model", "ddpm"], "--model is for the weights of the package"),
        (["RUNS/ddpm", "--steps", T + 1], f"a sampler takes 1 to T = {T} steps, not {T + 1}"),
        (["RUNS/ddpm", "--guide", "unlabelled", "--guidance", 0], "--guide needs a --guidance above 0"),
        (["RUNS/vae", "--steps", 5], "--steps is for a diffusion model, which"),
        (["RUNS/vae", "--class", "boot"], "--class is for a diffusion model, which"),
        (["--model", "vae", "--guidance", 0], "--guidance is for a diffusion model, which vae is not"),
        (["--model", "vae", "--guide", "early"], "--guide is for a diffusion model, which vae is not"),
        (["--model", "vae", "--sampler", "ddim"], "--sampler is for a diffusion model"),
        (["--class", "boot", "bag", "coat", "-n", 2], "-n 2: expected an image or more for each class"),
        (["--guide", "early", "--guidance", 0], "--guide needs a --guidance above 0"),
        (["--guide", "early", "--sampler", "ddim"], "--guide needs a --guidance above 0"),
    ],
)
def test_flags_that_do_not_fit(flags, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "draw", None)
    with pytest.raises(UserError, match=re.escape(message)):
        draw.main([str(flag).replace("RUNS", str(runs)) for flag in flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("drawn", "expected a name that ends in one of ."),
        ("drawn.npz", "expected a name that ends in one of ."),
        ("drawn.xyz", "expected a name that ends in one of ."),
        (".png", "expected a name that ends in one of ."),
        ("folder", "expected a name that ends in one of ."),
        ("folder.png", "expected a file or nothing there, found a folder"),
        ("/dev/null", "expected a name that ends in one of ."),
        ("null.png", "expected a file or nothing there, found a folder or a device"),
        ("file.png/x.png", "is no folder"),
        ("n" * 260 + ".png", "too long"),
        ("other.png", "expected a file"),  # whose .npz is a folder
    ],
)
def test_where_the_picture_goes_is_looked_at_before_it_is_drawn(out, message, tmp_path, monkeypatch, finish):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "folder.png", "other.npz"):
        (tmp_path / name).mkdir()
    (tmp_path / "file.png").touch()
    (tmp_path / "null.png").symlink_to("/dev/null")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(draw, "load_trained", None)
    status, error = finish(lambda: draw.main(["--samples", "--out", out]))
    named = {"file.png/x.png": "file.png: ", "other.png": "other.npz: "}.get(out, f"{out}: ")
    assert status in (1, 2) and error.count("\n") == 1 and named in error
    assert message in error or message == "is no folder" and re.search("Not a directory|File exists", error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["new/folder/d.png", "d.PNG", "d.svg", "d.pdf", "n" * 240 + ".png", "link.png"])
def test_where_a_picture_can_go_it_goes(out, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("elsewhere.png")
    draw.main([str(runs / "vae"), "-n", "4", "--out", out])
    assert (tmp_path / out).stat().st_size > 1000
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "elsewhere.png").exists() == (out == "link.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--class", "boot"], "without --classes"), (["--guidance", 1], "without the addition guide")],
)
def test_a_run_without_classes_or_a_guide_is_asked_for_none(flags, message, runs, tmp_path, monkeypatch):
    model = load_run(runs / "ddpm")
    model.early = None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "load_run", lambda folder: model)
    for workers in (1, 2):
        with pytest.raises(UserError, match=f"this run was trained {message}"):
            draw.main([*map(str, [runs / "ddpm", *flags, "--workers", workers])])
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_classes(capsys):
    with pytest.raises(SystemExit):
        draw.main(["--help"])
    text = capsys.readouterr().out
    assert "9 boot" in text and "{" not in text.split("examples")[1].split("positional")[0]
