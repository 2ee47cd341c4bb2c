"""The figures: panels, titles, limits, what is drawn where; and that files are written whole.

`conftest.tiles` asserts how dark and how light the pixels of a panel are.
"""

from scratchgen import plots

import numpy as np
import pytest
from conftest import lines, tick_labels, tiles
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from PIL import Image

VAE_LOG = [
    {"epoch": e, "train_elbo": -300 / e, "train_reconstruction": -290 / e, "train_kl": 10 / e}
    | {"test_elbo": -310 / e, "test_reconstruction": -299 / e, "test_kl": 11 / e}
    for e in (1, 2, 3)
]
DDPM_LOG = [{"epoch": e, "train_loss": 0.1 / e, "test_loss": 0.11 / e} for e in (1, 2, 3)]


def legend(owner):
    return [text.get_text() for text in owner.get_legend().get_texts()]


def shades(axes, low, high, columns):
    """The one grey of each image of a panel, row by row."""
    images = tiles(axes, low, high)
    assert (images == images[:, :1, :1]).all()
    return images[:, 0, 0].reshape(-1, columns).tolist()


def test_mosaic_runs_row_by_row():
    images = np.arange(6).reshape(6, 1, 1, 1) * np.ones((6, 2, 3, 1))
    m = plots.mosaic(images, 2, 3)
    assert m.shape == (5, 11) and m[::3, ::4].tolist() == [[0, 1, 2], [3, 4, 5]]
    lines = np.zeros((5, 11), bool)
    lines[2] = lines[:, [3, 7]] = True
    np.testing.assert_array_equal(np.isnan(m), lines)  # of one pixel, between images and not around them


@pytest.mark.parametrize("limits", [(), (-1, 1), (0, 255)])
def test_grid_shows_every_image_with_its_title_and_labels(limits, rng):
    x = rng.random((20, 28, 28, 1), dtype=np.float32)
    names = list("abcdefghij")
    figure = plots.grid(x, 10, "a title", *limits, row_labels=["one", "two"], column_labels=names)
    (axes,) = figure.axes
    np.testing.assert_array_equal(tiles(axes, *(limits or (0, 1)), columns=10), x[..., 0])
    assert axes.get_title() == "a title" and axes.get_facecolor() == to_rgba("silver")  # of the lines between
    assert (tick_labels(axes.yaxis), tick_labels(axes.xaxis)) == (["one", "two"], names)
    assert axes.get_yticks().tolist() == [14, 43] and axes.get_xticks()[:2].tolist() == [14, 43]
    ticks = axes.xaxis.get_major_ticks()
    assert all(tick.label2.get_visible() and not tick.label1.get_visible() for tick in ticks)  # above, not below
    (bare,) = plots.grid(x, 5, "t").axes
    assert len(bare.get_xticks()) == len(bare.get_yticks()) == 0


def test_a_title_longer_than_its_picture_is_not_cut(tmp_path):
    plots.save(
        plots.grid(np.zeros((1, 28, 28, 1)), 1, "sde-dpm++, 20 steps, w = 0.5, unlabelled, seed 0"), tmp_path / "x.png"
    )
    pixels = imread(tmp_path / "x.png")[..., :3].min(axis=2)
    edge = np.concatenate([pixels[:, :3].ravel(), pixels[:, -3:].ravel(), pixels[:3].ravel(), pixels[-3:].ravel()])
    assert edge.min() == 1 and pixels.shape[1] > 400  # nothing but white around it
    below = pixels[np.flatnonzero(pixels.min(axis=1) < 1)[-1] :]
    assert len(below) < 25  # and no band beneath it


def test_plot_latents_varies_two_dimensions_over_an_even_grid_and_keeps_the_others_at_zero():
    seen = []

    def decode(z):
        seen.append(z)
        return np.arange(len(z)).reshape(-1, 1, 1, 1) / 100 * np.ones((1, 28, 28, 1))

    figure = plots.plot_latents(decode, 7, 5, 2)
    (z,) = seen
    assert z.shape == (100, 7)
    assert not z[:, [0, 1, 3, 4, 6]].any()
    even = np.linspace(-3, 3, 10)
    np.testing.assert_allclose(z[:, 5].reshape(10, 10), np.tile(even, (10, 1)), atol=1e-6)  # grows to the right
    np.testing.assert_allclose(z[:, 2].reshape(10, 10), np.tile(even[::-1, None], 10), atol=1e-6)  # and upwards
    (axes,) = figure.axes
    np.testing.assert_array_equal(tiles(axes, 0, 1, line=0, columns=10)[:, 0, 0], np.float32(np.arange(100) / 100))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_{5}$", "$z_{2}$")
    assert axes.get_title() == "decoded from z, all but dimensions 5 and 2 zero"
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    left, right, bottom, top = axes.images[0].get_extent()
    for n in (0, 4, 9):  # the middle of each image is where its z is
        assert left + (n + 0.5) * (right - left) / 10 == pytest.approx(even[n])
    assert (bottom, top) == (left, right)
    (axes,) = plots.plot_latents(decode, 2, 0, 1).axes
    assert axes.get_title() == "decoded from z"  # no other dimensions are zero


STYLES = [("train", "C0", "-"), ("test", "C1", "--")]


def test_vae_loss_has_both_terms_for_train_and_test():
    axes = plots.vae_loss(VAE_LOG, 90).axes
    assert [a.get_title() for a in axes] == [
        *("ELBO", "first term: $E_q[\\log p(x|z)]$", "second term: $D_{KL}(q(z|x)\\,||\\,p(z))$")
    ]
    for a, key in zip(axes, ("elbo", "reconstruction", "kl"), strict=True):
        drawn = lines(a)
        assert [(line.get_label(), line.get_color(), line.get_linestyle()) for line in a.lines[:2]] == STYLES
        for part in ("train", "test"):
            assert drawn[part] == ([1, 2, 3], [row[f"{part}_{key}"] for row in VAE_LOG])
        assert a.get_xlabel() == "epoch" and a.get_ylabel().startswith("nats per image")
        assert a.get_ylabel().endswith(" (from epoch 2 on)") == (key != "kl")
    for a in axes[:2]:  # what no model gets above, with its note below
        assert a.lines[2].get_ydata() == [-90, -90] and a.texts[0].xy == (0.5, -90)
        assert a.texts[0].get_text() == "no model gets above: minus the entropy of the pixels"
    assert len(axes[2].lines) == 2 and len(axes[2].texts) == 0
    low, high = axes[0].get_ylim()
    assert -300 < low < -310 / 2 and high > -90  # the first epoch is cut off
    low, high = axes[1].get_ylim()
    assert -290 < low < -299 / 2 and high > -90
    assert axes[2].get_ylim()[0] == 0 and axes[2].get_ylim()[1] > 11
    assert [a.get_legend() for a in axes[:2]] == [None, None] and legend(axes[2]) == ["train", "test"]


def test_binarised_pixels_have_no_floor_in_the_figure():
    axes = plots.vae_loss(VAE_LOG, None).axes
    assert all(len(a.lines) == 2 and not a.texts for a in axes)
    low, high = axes[0].get_ylim()
    assert -300 < low < -310 / 2 and -100 < high < -50  # by what there is: -100 is the best


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epochs_are_whole_numbers(epochs):
    figures = plots.vae_loss(VAE_LOG[:epochs], 190), plots.ddpm_loss(DDPM_LOG[:epochs], np.arange(9), np.ones(9))
    for axes in (*figures[0].axes, figures[1].axes[0]):
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown == list(range(1, epochs + 1))


@pytest.mark.parametrize("T", [1, 2, 60, 200])
def test_ddpm_loss_second_panel_is_the_mean_error_by_t(T):
    """Each point is of one 40th of the images, or of one t if there are fewer."""
    t = np.repeat(1 + np.arange(T), 2)
    errors = np.random.default_rng(0).random(2 * T)
    left, right = plots.ddpm_loss(DDPM_LOG, t, errors, bins=40).axes
    assert left.get_title() == "loss: mean of $(\\epsilon - \\epsilon_\\theta)^2$"
    assert (right.get_title(), right.get_xlabel(), right.get_yscale()) == ("test loss over t", "t", "log")
    assert lines(left) == {part: ([1, 2, 3], [row[f"{part}_loss"] for row in DDPM_LOG]) for part in ("train", "test")}
    assert [(line.get_label(), line.get_color(), line.get_linestyle()) for line in left.lines] == STYLES
    assert legend(left) == ["train, weights of each step", "test, moving average of the weights"]
    assert {panel.get_ylabel() for panel in (left, right)} == {"squared error per pixel"}
    x, y = right.lines[0].get_data()
    assert len(x) == min(T, 40)
    size, rest = divmod(2 * T, len(x))
    start = 0
    for part in range(len(x)):
        stop = start + (size + 1 if part < rest else size)  # equal but for one image
        assert (x[part], y[part]) == pytest.approx((t[start:stop].mean(), errors[start:stop].mean()))
        start = stop
    assert start == 2 * T


def test_save_writes_a_png_and_replaces_an_old_one(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")
    plots.save(plots.grid(np.zeros((4, 28, 28, 1)), 2, "t"), path)
    assert imread(path).ndim == 3 and list(tmp_path.iterdir()) == [path]
    with Image.open(path) as picture:
        assert picture.info["dpi"] == pytest.approx((120, 120), abs=0.1)


def test_gif_has_every_frame_under_its_t_and_lingers_on_the_last(tmp_path, monkeypatch):
    values = {2: -0.8, 1: 0.1, 0: 0.9}
    ramp = 0.01 * np.arange(4).reshape(4, 1, 1, 1) * np.ones((1, 28, 28, 1))
    grabbed, writer = [], plots.import_matplotlib().animation.PillowWriter

    def grab_frame(self, real=writer.grab_frame):
        grabbed.append((self.fig.axes[0].get_title(), shades(self.fig.axes[0], -1, 1, 2)))
        real(self)

    monkeypatch.setattr(writer, "grab_frame", grab_frame)
    plots.save_gif({t: value + ramp for t, value in values.items()}, 2, tmp_path / "x.gif")
    assert [title for title, _ in grabbed] == ["t = 2", "t = 1"] + ["t = 0"] * 19
    for value, (_, shown) in zip([*values.values(), 0.9], grabbed, strict=False):
        np.testing.assert_allclose(shown, [[value, value + 0.01], [value + 0.02, value + 0.03]], atol=1e-6)
    with Image.open(tmp_path / "x.gif") as gif:
        durations, greys = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            greys.append(gif.convert("L").getpixel((50, 100)))
        assert gif.width == pytest.approx(4 * 57, abs=1)  # four times as large as in the data
    assert greys[:3] == pytest.approx([25, 140, 242], abs=4)
    assert sum(durations[-1:]) >= 18 * 80  # equal frames are merged, their times added
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gif"]


def test_latent_use_shows_dimensions_in_falling_order_of_kl():
    kl, variance, active = np.array([0.5, 0.0, 2.0]), np.array([0.4, 0.001, 0.9]), np.array([True, False, True])
    spread = np.array([0.6, 0.999, 0.2])
    left, right = plots.latent_use(kl, variance, spread, active).axes
    assert [bar.get_height() for bar in left.patches] == [2.0, 0.5, 0.0]
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], [0.9, 0.4, 0.001, 0.2, 0.6, 0.999])
    np.testing.assert_allclose([bar.get_y() for bar in right.patches[3:]], [0.9, 0.4, 0.001])  # stands on the other
    assert tick_labels(left.xaxis) == tick_labels(right.xaxis) == ["2", "0", "1"]
    assert left.get_title() == "KL of each dimension, 2.5 nats in all"
    assert right.get_title() == "2 of 3 active: variance of $\\mu$ above 0.01"
    colours = [to_rgba("C0"), to_rgba("C0"), to_rgba("lightgray")]
    assert [bar.get_facecolor() for bar in [*left.patches, *right.patches]] == [*colours * 2, *[to_rgba("C1", 0.5)] * 3]
    assert list(right.lines[0].get_ydata()) == [1, 1]
    texts = [text.get_text() for text in left.figure.legends[0].get_texts()]
    assert texts == ["variance of the prior", "variance of $\\mu$", "mean of $\\sigma^2$"]


def test_of_many_latent_dimensions_those_with_most_kl_are_shown():
    kl = np.random.default_rng(0).random(4000)
    left, right = plots.latent_use(kl, kl, 1 - kl, kl > 0.5).axes
    assert [bar.get_height() for bar in left.patches] == sorted(kl)[:-61:-1]
    assert len(right.patches) == 120 and len(left.get_xticks()) == 60
    assert f"{kl.sum():.1f} nats" in left.get_title() and "of 4000 active" in right.get_title()
    assert left.get_xlabel().endswith("the first 60")


def test_bound_over_t():
    (axes,) = plots.bound_over_t(np.array([1, 2, 5]), np.array([2.0, 0.5, 0.25]), 4.126, np.array([3.0, 2, 1])).axes
    assert lines(axes) == {
        "of the network": ([1, 2, 5], [2, 0.5, 0.25]),
        "$w_t$, the term of $\\epsilon_\\theta = 0$": ([2, 3, 4], [3, 2, 1]),
    }
    assert axes.get_title() == "the terms of the bound, 4.13 bits per dimension in all" and len(legend(axes)) == 2
    assert axes.texts[0].get_text() == "$L_0$, the decoder" and axes.texts[0].xy == (1, 2)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("t", "$L_{t-1}$, bits per dimension")
    assert axes.get_xscale() == axes.get_yscale() == "log"
