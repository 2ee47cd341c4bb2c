"""What a trained model draws: from which noise, by which sampler, and what the figures show."""

from scratchgen.data import CLASSES, scale
from scratchgen.evaluate import samples
from scratchgen.evaluate.load import load_run
from scratchgen.machinery import plots, training
from scratchgen.machinery.parallel import Ranks

import numpy as np
import pytest
from conftest import T


def algorithm_2(model, x_t, rng):
    """{t: x_t}, line 4 as printed, Eq. (11): a network that predicts v needs no clipped x_0 (`improved.x_0_from_v`)."""
    s, path = model.schedule, {T: x_t}
    for t in range(T, 0, -1):
        z, eps = rng.standard_normal(x_t.shape, dtype=np.float32), model.eps_theta(x_t, np.full(len(x_t), t))
        mean = (x_t - s["beta"][t] / s["sqrt_one_minus_alpha_bar"][t] * eps) / np.sqrt(s["alpha"][t])
        path[t - 1] = x_t = (mean + np.sqrt(s["posterior_variance"][t]) * z).astype(np.float32)
    return path


def test_samples_of_ddpm_are_algorithm_2(folder):
    model = load_run(folder / "ddpm")
    rng = np.random.default_rng([5, training.SAMPLES, 0])
    x_T = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    x_0 = np.clip(algorithm_2(model, x_T, rng)[0], -1, 1)
    images = samples.draw(model, 3, 5, Ranks(1), sampler="ddpm")
    assert np.abs(images - (x_0 + 1) * 127.5).max() <= 0.51


def test_grey_levels():
    assert samples.grey_levels(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    x = np.arange(256, dtype=np.uint8)
    for in_0_to_1 in (scale(x, 0, 1), (scale(x, -1, 1) + 1) / 2):  # of a VAE, and as `DDPMRun.sample` ends
        np.testing.assert_array_equal(samples.grey_levels(in_0_to_1), x)


def test_over_images_keeps_the_order():
    x = np.arange(23)
    with Ranks(2) as ranks:
        found = samples.over_images(lambda a: a * a, [x], 3, ranks, "squares")
    np.testing.assert_array_equal(found, x * x)


def test_the_noise_of_an_image_depends_on_seed_and_place_alone(runs):
    model = load_run(runs / "ddpm")
    few = samples.draw(model, 16, 1, Ranks(1))
    with Ranks(2) as ranks:
        many = samples.draw(model, 40, 1, ranks)
    np.testing.assert_array_equal(few, many[:16])
    assert len(np.unique(many, axis=0)) == 40
    assert np.any(few != samples.draw(model, 16, 2, Ranks(1)))


class Sure:
    """A model with classes that draws one class per label, black for 0 to nearly white for 9, and nothing by chance."""

    config, x_0_early = {"classes": True, "T": 5}, object()

    def sample(self, N, rng, labels, **how):
        return np.broadcast_to(labels.reshape(-1, 1, 1, 1) / 10, (N, 28, 28, 1))

    def path(self, x_T, rng, sampler, steps, guidance, guide):
        assert rng is None and steps == 5 and np.ptp(x_T, axis=0).max() == 0
        yield 0, np.full_like(x_T, guidance / 8 if guide == "early" else -guidance / 8)


def test_classes_are_drawn_equally_often_and_shown_row_by_row(monkeypatch):
    model, seen = Sure(), {}
    levels = samples.draw(model, 12, 0, Ranks(1))[:, 0, 0, 0].tolist()
    assert levels == [round(25.5 * k) for k in [*range(10), 0, 1]]
    monkeypatch.setattr(plots, "classes", lambda *args: seen.setdefault("args", args))
    samples.classes(model, 0, Ranks(1))
    images, names, rows = seen["args"]
    assert names == CLASSES and len(images) == 100
    assert [images[10 * k : 10 * k + 10].mean() for k in range(10)] == [round(25.5 * k) for k in range(10)]
    values = [0, 0.5, 1, 2, 4]
    assert list(rows) == [f"{guide}, w = {w:g}" for guide in ("early", "unlabelled") for w in values]
    assert [row.mean() for row in rows.values()] == [sign * w / 8 for sign in (1, -1) for w in values]


@pytest.mark.parametrize("early", [True, False])
def test_the_figure_of_classes(early, monkeypatch):
    model = Sure()
    monkeypatch.setattr(Sure, "x_0_early", object() if early else None)
    left, right = samples.classes(model, 0, Ranks(1)).axes
    picture = left.images[0].get_array()
    assert picture.shape == (280, 280) and np.all(np.diff(picture[::28, 0]) > 0) and np.ptp(picture[0]) == 0
    assert right.images[0].get_array().shape == (280 if early else 140, 280)
    assert [label.get_text() for label in left.get_yticklabels()] == list(CLASSES)
    assert right.get_yticklabels()[-1].get_text() == "unlabelled, w = 4"


def test_the_strips_are_q_of_one_image_and_algorithm_2_from_noise(runs, tmp_path, x_test, monkeypatch):
    rows, gifs = [], []
    monkeypatch.setattr(plots, "row_of_times", lambda *args: rows.append(args))
    monkeypatch.setattr(plots, "save", lambda figure, path: rows.append(path.name))
    monkeypatch.setattr(plots, "save_gif", lambda *args: gifs.append(args))
    model, x_0 = load_run(runs / "ddpm"), scale(x_test[:1], -1, 1)
    samples.draw_paths(model, x_0, 3, tmp_path)
    (noisy, times, _), name, (path, reverse_times, _), other_name = rows
    assert (name, other_name) == ("forward.png", "trajectory.png")
    assert times == reverse_times == [6, 3, 2, 1, 0, 0]  # 1, 1/2, 1/4, 1/10, 1/20 of T = 6, and 0
    rng = training.rng_for(3, training.SAMPLES)
    eps = rng.standard_normal((1, 28, 28, 1), dtype=np.float32)
    a = model.schedule["alpha_bar"][times].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(noisy, np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, atol=1e-6)
    x_T = rng.standard_normal((16, 28, 28, 1), dtype=np.float32)
    expected = algorithm_2(model, x_T, rng)
    assert np.abs(expected[0]).max() > 1.01  # so that a clip on the way would be seen
    for x_t, t in zip(path, times, strict=True):
        np.testing.assert_allclose(x_t, expected[t][0], atol=5e-3)
    (frames, columns, file), *_ = gifs
    assert file == tmp_path / "sampling.gif" and columns == 4 and len(frames) == 7
    np.testing.assert_allclose(frames[-1], expected[0], atol=5e-3)
