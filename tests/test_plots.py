"""The figures: panels, titles, what is drawn where; and that files are written whole."""

from scratchgen import plots

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

VAE_LOG = [
    {"epoch": e, "train_elbo": -300 / e, "train_reconstruction": -290 / e, "train_kl": 10 / e}
    | {"test_elbo": -310 / e, "test_reconstruction": -299 / e, "test_kl": 11 / e}
    for e in (1, 2, 3)
]
DDPM_LOG = [{"epoch": e, "train_loss": 0.1 / e, "test_loss": 0.11 / e} for e in (1, 2, 3)]


def picture(axes):
    return np.asarray(axes.images[0].get_array())


def test_mosaic_runs_row_by_row():
    images = np.arange(6).reshape(6, 1, 1, 1) * np.ones((6, 2, 3, 1))
    m = plots.mosaic(images, 2, 3)
    assert m.shape == (5, 11) and m[::3, ::4].tolist() == [[0, 1, 2], [3, 4, 5]]
    lines = np.zeros((5, 11), bool)
    lines[2] = lines[:, [3, 7]] = True
    np.testing.assert_array_equal(np.isnan(m), lines)  # of one pixel, between images and not around them


def test_grid_shows_every_image_with_its_title_and_labels():
    x = np.random.default_rng(0).random((20, 28, 28, 1))
    figure = plots.grid(x, 10, "a title", row_labels=["one", "two"], column_labels=list("abcdefghij"))
    (axes,) = figure.axes
    assert axes.get_title() == "a title" and picture(axes).shape == (2 * 29 - 1, 10 * 29 - 1)
    np.testing.assert_array_equal(picture(axes)[29:57, 58:86], x[12, ..., 0].astype(np.float32))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]
    assert [t.get_text() for t in axes.get_xticklabels()] == list("abcdefghij")
    assert axes.get_yticks().tolist() == [14, 43] and axes.get_xticks()[:2].tolist() == [14, 43]


def test_a_title_longer_than_its_picture_is_not_cut(tmp_path):
    plots.save(
        plots.grid(np.zeros((1, 28, 28, 1)), 1, "sde-dpm++, 20 steps, w = 0.5, unlabelled, seed 0"), tmp_path / "x.png"
    )
    pixels = imread(tmp_path / "x.png")[..., :3].min(axis=2)
    edge = np.concatenate([pixels[:, :3].ravel(), pixels[:, -3:].ravel(), pixels[:3].ravel(), pixels[-3:].ravel()])
    assert edge.min() == 1 and pixels.shape[1] > 400  # nothing but white around it
    below = pixels[np.flatnonzero(pixels.min(axis=1) < 1)[-1] :]
    assert len(below) < 25  # and no band beneath it


def test_reconstructions_stand_beneath_their_images():
    x = np.arange(20).reshape(20, 1, 1, 1) * np.ones((20, 28, 28, 1))
    (axes,) = plots.reconstructions(x, -x).axes
    rows = picture(axes)[::29, ::29]
    assert rows[0].tolist() == list(range(10)) and rows[2].tolist() == list(range(10, 20))
    np.testing.assert_array_equal(rows[1::2], -rows[::2])


def test_interpolation_goes_evenly_from_start_to_end():
    def decode(z):
        return z[:, :1].reshape(-1, 1, 1, 1) * np.ones((1, 28, 28, 1))

    x = np.full((4, 28, 28, 1), 20.0) + np.arange(4).reshape(4, 1, 1, 1)
    (axes,) = plots.interpolation(decode, np.array([[0.0, 5], [9, 5]]), np.array([[9.0, 5], [0, 5]]), x[:2], x[2:]).axes
    expected = [[20, *range(10), 22], [21, *range(9, -1, -1), 23]]
    np.testing.assert_allclose(picture(axes)[::29, ::29], expected, atol=1e-5)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == labels[-1] == "test" and labels[1] == "0.00" and labels[-2] == "1.00"


def test_the_nearest_images_stand_beneath_each_sample():
    others = np.arange(50, dtype=np.uint8).repeat(784).reshape(50, 28, 28, 1)
    (axes,) = plots.nearest(others[[7, 40]] + np.uint8(0), others[::-1]).axes
    shown = picture(axes)[::29, ::29]
    assert shown[:2].tolist() == [[7, 40], [7, 40]]
    assert {*shown[2:, 0]} == {6, 8} and {*shown[2:, 1]} == {39, 41}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sample", "nearest 1", "nearest 2", "nearest 3"]
    assert plots.nearest(others[:1], others[:2]).axes[0].images[0].get_array().shape == (3 * 29 - 1, 28)


def test_codes_are_shown_by_class_in_the_two_dimensions_with_most_kl(rng):
    mu, labels = rng.standard_normal((60, 4)), np.arange(60) % 3
    (axes,) = plots.codes_by_class(mu, np.array([0.1, 3, 0.2, 2]), labels, ["a", "b", "c"]).axes
    assert "_{1}" in axes.get_xlabel() and "_{3}" in axes.get_ylabel()
    points, *keys = axes.collections
    np.testing.assert_allclose(points.get_offsets(), mu[:, [1, 3]])  # in their own order: no class covers the others
    for label, key in enumerate(keys):
        assert (points.get_facecolors()[labels == label][:, :3] == key.get_facecolor()[0][:3]).all()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]


def test_plot_latents_varies_two_dimensions_over_an_even_grid_and_keeps_the_others_at_zero():
    seen = []

    def decode(z):
        seen.append(z)
        return np.zeros((len(z), 28, 28, 1))

    figure = plots.plot_latents(decode, 7, 5, 2)
    (z,) = seen
    assert z.shape == (100, 7)
    assert not z[:, [0, 1, 3, 4, 6]].any()
    even = np.linspace(-3, 3, 10)
    np.testing.assert_allclose(z[:, 5].reshape(10, 10), np.tile(even, (10, 1)), atol=1e-6)  # grows to the right
    np.testing.assert_allclose(z[:, 2].reshape(10, 10), np.tile(even[::-1, None], 10), atol=1e-6)  # and upwards
    (axes,) = figure.axes
    assert picture(axes).shape == (280, 280)
    assert "z_{5}" in axes.get_xlabel() and "z_{2}" in axes.get_ylabel()
    assert "5" in axes.get_title() and "2" in axes.get_title()
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    left, right = axes.images[0].get_extent()[:2]
    for n in (0, 4, 9):  # the middle of each image is where its z is
        assert left + (n + 0.5) * (right - left) / 10 == pytest.approx(even[n])
    (axes,) = plots.plot_latents(decode, 2, 0, 1).axes
    assert axes.get_title() == "decoded from z"  # no other dimensions are zero


def test_vae_loss_has_both_terms_for_train_and_test():
    axes = plots.vae_loss(VAE_LOG, 90).axes
    assert [a.get_title().split(":")[0] for a in axes] == ["ELBO", "first term", "second term"]
    for a, key in zip(axes, ("elbo", "reconstruction", "kl"), strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in a.lines}
        for part in ("train", "test"):
            assert lines[part] == [row[f"{part}_{key}"] for row in VAE_LOG]
    assert -90 in axes[0].lines[2].get_ydata()
    assert [text.get_text() for text in axes[0].texts] == ["no model gets above: minus the entropy of the pixels"]
    low, high = axes[0].get_ylim()
    assert -300 < low < -310 / 2 and high > -90  # the first epoch is cut off
    assert axes[2].get_ylim()[0] == 0 and axes[2].get_ylim()[1] > 11
    legends = [a.get_legend() for a in axes]
    assert legends[:2] == [None, None] and len(legends[2].get_texts()) == 2


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
    assert left.get_title().startswith("loss") and right.get_title() == "test loss over t"
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines == {part: [row[f"{part}_loss"] for row in DDPM_LOG] for part in ("train", "test")}
    x, y = right.lines[0].get_data()
    assert len(x) == min(T, 40)
    size, rest = divmod(2 * T, len(x))
    start = 0
    for part in range(len(x)):
        stop = start + (size + 1 if part < rest else size)  # equal but for one image
        assert (x[part], y[part]) == pytest.approx((t[start:stop].mean(), errors[start:stop].mean()))
        start = stop
    assert start == 2 * T


def test_row_of_times_has_one_titled_panel_each():
    times = [200, 100, 50, 20, 10, 0]
    figure = plots.row_of_times([np.full((28, 28, 1), t / 200) for t in times], times, "strip")
    assert [a.get_title() for a in figure.axes] == [f"t = {t}" for t in times]
    assert [picture(a)[0, 0] for a in figure.axes] == [t / 200 for t in times]
    assert len({round(a.get_position().y0, 6) for a in figure.axes}) == 1  # one row


def test_save_writes_a_png_and_replaces_an_old_one(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")
    plots.save(plots.grid(np.zeros((4, 28, 28, 1)), 2, "t"), path)
    assert imread(path).ndim == 3 and list(tmp_path.iterdir()) == [path]


def test_gif_has_every_frame_and_lingers_on_the_last(tmp_path):
    frames = {1 - v: np.full((4, 28, 28, 1), v) for v in (-1, 0, 1)}
    plots.save_gif(frames, 2, tmp_path / "x.gif", pause=5)
    with Image.open(tmp_path / "x.gif") as gif:
        durations, shades = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shades.append(gif.convert("L").getpixel((50, 100)))
        assert gif.width == pytest.approx(4 * 57, abs=1)  # four times as large as in the data
    assert shades == sorted(shades) and shades[0] < 5 and shades[-1] > 250
    assert sum(durations[-1:]) >= 5 * 80  # equal frames are merged, their times added
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gif"]


def test_latent_use_shows_dimensions_in_falling_order_of_kl():
    kl, variance, active = np.array([0.5, 2.0, 0.0]), np.array([0.4, 0.9, 0.001]), np.array([True, True, False])
    spread = np.array([0.6, 0.2, 0.999])
    left, right = plots.latent_use(kl, variance, spread, active).axes
    assert [bar.get_height() for bar in left.patches] == [2.0, 0.5, 0.0]
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], [0.9, 0.4, 0.001, 0.2, 0.6, 0.999])
    np.testing.assert_allclose([bar.get_y() for bar in right.patches[3:]], [0.9, 0.4, 0.001])  # stands on the other
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "0", "2"]
    assert "2.5 nats" in left.get_title() and "2 of 3" in right.get_title()
    colours = [bar.get_facecolor() for bar in left.patches]
    assert colours[0] == colours[1] != colours[2]


def test_of_many_latent_dimensions_those_with_most_kl_are_shown():
    kl = np.random.default_rng(0).random(4000)
    left, right = plots.latent_use(kl, kl, 1 - kl, kl > 0.5).axes
    assert [bar.get_height() for bar in left.patches] == sorted(kl)[:-61:-1]
    assert len(right.patches) == 120 and len(left.get_xticks()) == 60
    assert f"{kl.sum():.1f} nats" in left.get_title() and "of 4000 active" in right.get_title()
    assert left.get_xlabel().endswith("the first 60")


def test_bound_over_t():
    (axes,) = plots.bound_over_t(np.array([1, 2, 5]), np.array([2.0, 0.5, 0.25]), 4.126, np.array([3.0, 2, 1])).axes
    points = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert points == [([1, 2, 5], [2, 0.5, 0.25]), ([2, 3, 4], [3, 2, 1])]
    assert "4.13" in axes.get_title()


def test_binarised_pixels_have_no_floor_in_the_figure():
    log = [{"epoch": 1} | {f"{p}_{k}": 1.0 for p in ("train", "test") for k in ("elbo", "reconstruction", "kl")}]
    assert all(len(axes.lines) == 2 for axes in plots.vae_loss(log, None).axes)
    assert len(plots.vae_loss(log, 5.0).axes[0].lines) == 3
