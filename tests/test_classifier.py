"""The classifier: its gradient, its weights as they lie in the repository, and that it can be made again."""

from scratchgen import tree
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.evaluate import classifier
from scratchgen.gradients import value_and_grad

import numpy as np
import pytest
from conftest import ROOT, load, script
from finite_differences import assert_directional

training = script("docs/train_classifier.py")


def test_gradient_of_the_cross_entropy(rng):
    params = tree.map(lambda p: p + 0.02 * rng.standard_normal(p.shape), training.init_classifier(rng))
    batch = rng.random((2, 28, 28, 1)), np.array([3, 9])
    assert_directional(lambda p: training.cross_entropy(p, batch)[0], params, rng, directions=3, h=1e-7, rtol=1e-4)


def test_cross_entropy_is_minus_the_log_of_a_softmax(rng):
    params = training.init_classifier(rng)
    x = rng.random((4, 28, 28, 1), dtype=np.float32)
    labels = np.arange(4)
    p = np.exp(classifier.logits(params, classifier.features(params, x)).astype(float))
    expected = -np.log(p[np.arange(4), labels] / p.sum(axis=1)).mean()
    value, terms = training.cross_entropy(params, (x, labels))
    assert value == pytest.approx(expected, rel=1e-5) and terms == {}


def test_it_works_in_float32(rng):
    batch = rng.random((3, 28, 28, 1), dtype=np.float32), np.array([0, 1, 2])
    value, _, gradient = value_and_grad(training.cross_entropy)(training.init_classifier(rng), batch)
    assert {value.dtype} | {leaf.dtype for leaf in tree.leaves(gradient)} == {np.dtype(np.float32)}


def test_the_weights_in_the_repository_are_small_and_good():
    assert classifier.WEIGHTS.stat().st_size < 2**20
    params = classifier.load_classifier()
    data = load_fashion_mnist(ROOT / "data")
    x = scale(data["test_images"], 0, 1)
    labels = data["test_labels"]
    features = np.concatenate([classifier.features(params, x[i : i + 500]) for i in range(0, 10_000, 500)])
    assert features.shape == (10_000, 64)
    assert (classifier.logits(params, features).argmax(axis=1) == labels).mean() >= 0.91


def test_training_writes_weights_that_load(small_data, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "weights"  # a folder that is not there, a name that np.savez would change
    monkeypatch.setattr(training, "EPOCHS", 2)
    with pytest.warns(UserWarning, match="not the published"):
        training.main(["--data", str(small_data), "--out", str(out), "--workers", "1"])
    assert "test accuracy" in capsys.readouterr().out
    params = training.init_classifier(np.random.default_rng([0, 0]))
    arrays, state = load(out)
    assert np.any(arrays["classes/w"] != params["classes"]["w"]) and 0 <= state["test_accuracy"] <= 1
    with pytest.warns(UserWarning, match="not the published"):
        training.main(["--data", str(small_data), "--out", str(tmp_path / "again"), "--workers", "2"])
    again, _ = load(tmp_path / "again")
    for name in arrays:
        np.testing.assert_array_equal(again[name], arrays[name], err_msg=name)
    monkeypatch.setattr(classifier, "WEIGHTS", out)
    np.testing.assert_array_equal(classifier.load_classifier()["classes"]["w"], arrays["classes/w"])


def test_a_folder_in_the_place_of_the_weights_is_refused_before_any_work(small_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(["--data", str(small_data), "--out", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_drawn_and_real_images_are_learned_from_alike(small_data, monkeypatch, tmp_path, capsys):
    """Here what is "drawn" of a class is a bright stripe, from which nothing about garments can be learned."""
    asked = []

    def stripes(model, N, seed, ranks, labels):
        asked.append((model, N, labels.tolist()))
        images = np.zeros((N, 28, 28, 1), np.uint8)
        images[np.arange(N), 2 * labels] = 255
        return images

    trained_on = []

    def train(images_and_labels, data, seed, workers, real=training.train):
        trained_on.append((seed, *images_and_labels))
        return real(images_and_labels, data, seed, workers)

    monkeypatch.setattr(training, "EPOCHS", 1)
    monkeypatch.setattr(training, "draw", stripes)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "load_trained", lambda name: name)
    figure, out = tmp_path / "bars.png", tmp_path / "weights.npz"
    flags = ["--drawn", "30", "--figure", str(figure), "--out", str(out), "--data", str(small_data), "--workers", "1"]
    with pytest.warns(UserWarning, match="not the published"):
        training.main(flags)
    assert asked == [("ddpm-classes", 30, [*range(10)] * 3)]
    assert [seed for seed, *_ in trained_on] == [0, 1, 2] * 2
    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(small_data)
    for _, images, labels in trained_on[3:]:
        np.testing.assert_array_equal(images, data["train_images"][:30])
        np.testing.assert_array_equal(labels, data["train_labels"][:30])
    words = capsys.readouterr().out
    assert "trained on 30 drawn images, right about" in words and "trained on 30 real images, right about" in words
    assert figure.stat().st_size > 1000 and not out.exists()


def test_each_class_has_a_pair_of_bars():
    labels = np.array([0, 0, 3, 3])
    right = {"drawn": np.array([[1, 0, 1, 1], [0, 0, 1, 1]]), "real": np.ones((2, 4))}
    labels = np.concatenate([labels, np.arange(10)])
    right = {name: np.concatenate([of, np.ones((2, 10))], axis=1) for name, of in right.items()}
    axes = training.by_class(right, labels, 7).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[0] == pytest.approx(50) and heights[1:10] == [100] * 9 and heights[10:] == [100] * 10
    assert "7 images" in axes.get_title()
