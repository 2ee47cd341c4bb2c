"""The classifier: its gradient, its weights as they lie in the repository, and that it can be made again."""

from scratchgen import plots, tree
from scratchgen.data import CLASSES, UserError, load_fashion_mnist, scale
from scratchgen.evaluate import classifier
from scratchgen.gradients import value_and_grad
from scratchgen.machinery.run import rng_for
from scratchgen.optim import cosine_decay

import numpy as np
import pytest
from conftest import ROOT, load, main_of, script
from finite_differences import assert_directional

training = script("docs/train_classifier.py")


def test_cross_entropy_and_its_gradient(rng):
    """Minus the log of a softmax."""
    params = tree.map(lambda p: p + 0.02 * rng.standard_normal(p.shape), training.init_classifier(rng))
    x, labels = rng.random((2, 28, 28, 1)), np.array([3, 9])
    p = np.exp(classifier.logits(params, classifier.features(params, x)))
    value, terms = training.cross_entropy(params, (x, labels))
    assert value == pytest.approx(-np.log(p[[0, 1], labels] / p.sum(axis=1)).mean()) and terms == {}
    assert_directional(
        lambda p: training.cross_entropy(p, (x, labels))[0], params, rng, directions=3, h=1e-7, rtol=1e-4
    )
    value, _, gradient = value_and_grad(training.cross_entropy)(training.init_classifier(rng), (np.float32(x), labels))
    assert {value.dtype} | {leaf.dtype for leaf in tree.leaves(gradient)} == {np.dtype(np.float32)}


def test_the_weights_in_the_repository_are_small_and_good():
    assert classifier.WEIGHTS.stat().st_size < 2**20
    params = classifier.load_classifier()
    data = load_fashion_mnist(ROOT / "data")
    x = scale(data["test_images"][:2000], 0, 1)
    features = np.concatenate([classifier.features(params, x[i : i + 500]) for i in range(0, 2000, 500)])
    assert features.shape == (2000, 64) and features.min() == 0  # of ReLUs
    right = classifier.logits(params, features).argmax(axis=1) == data["test_labels"][:2000]
    assert right.mean() == pytest.approx(0.92, abs=0.003)


def test_training_writes_weights_that_load_and_tells_their_accuracy(small_data, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "weights"  # a folder that is not there, a name that np.savez would change
    assert (training.EPOCHS, training.BATCH, training.LR) == (8, 128, 2e-3)  # of those in the repository
    keys, rates, adam_step = [], [], training.adam_step
    monkeypatch.setattr(training, "EPOCHS", 2)
    monkeypatch.setattr(training, "adam_step", lambda *args: rates.append(args[3:]) or adam_step(*args))
    monkeypatch.setattr(training, "rng_for", lambda *key: keys.append(key) or rng_for(*key))
    main_of(training, "--data", small_data, "--out", out, "--workers", 1, "--seed", 4)
    printed = capsys.readouterr().out
    assert keys == [(4, 0), (4, 1, 0), (4, 1, 1)]  # the start, and an order for each epoch
    assert rates == [(step, cosine_decay(step, 4, 2e-3)) for step in (1, 2, 3, 4)]
    arrays, state = load(out)
    main_of(training, "--data", small_data, "--out", tmp_path / "again", "--workers", 2, "--seed", 4)
    again, _ = load(tmp_path / "again")
    for name in arrays:
        np.testing.assert_array_equal(again[name], arrays[name], err_msg=name)
    start = training.init_classifier(rng_for(4, 0))
    assert np.any(arrays["classes/w"] != start["classes"]["w"])

    monkeypatch.setattr(classifier, "WEIGHTS", out)
    params = classifier.load_classifier()
    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(small_data)

    def accuracy(part):
        scores = classifier.logits(params, classifier.features(params, scale(data[f"{part}_images"], 0, 1)))
        return (scores.argmax(axis=1) == data[f"{part}_labels"]).mean()

    assert state["test_accuracy"] == accuracy("test") != accuracy("train")
    assert f"{tree.size(params):,} parameters, test accuracy {accuracy('test'):.2%}: {out}\n" in printed
    assert "epoch 2/2  loss " in printed and printed.count(f"test accuracy {accuracy('test'):.2%}") == 2


def test_a_folder_in_the_place_of_the_weights_is_refused_before_any_work(small_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(["--data", str(small_data), "--out", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_figure_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "load_fashion_mnist", None)
    with pytest.raises(UserError, match="expected a name that ends in"):
        training.main(["--drawn", "10", "--figure", f"{tmp_path / 'x.txt'}", "--out", f"{tmp_path / 'x.npz'}"])


def test_what_is_learned_from_drawn_and_from_real_images_is_told_apart(small_data, monkeypatch, tmp_path, capsys):
    """The drawn images are made up here, and so is what the classifiers are right about: of seed 7 all but one test
    image in ten after drawn images, all but two after real ones, and one more for each further seed."""
    asked = []
    trained_on = []
    figures = []
    made_up = np.random.default_rng(0).integers(0, 256, (30, 28, 28, 1)).astype(np.uint8)

    def draw(model, N, seed, ranks, labels):
        asked.append((model, N, seed, labels.tolist()))
        return made_up

    def train(images_and_labels, data, seed, workers):
        trained_on.append((seed, *images_and_labels))
        wrong = 1 + (len(trained_on) > 3) + seed - 7
        return None, np.arange(40) % 10 >= wrong

    monkeypatch.setattr(training, "draw", draw)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "load_trained", lambda name: name)
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append((figure, path)))
    figure, out = tmp_path / "bars.png", tmp_path / "weights.npz"
    flags = ["--drawn", 30, "--figure", figure, "--out", out, "--data", small_data, "--workers", 1, "--seed", 7]
    main_of(training, *flags)
    assert asked == [("ddpm-classes", 30, 7, [*range(10)] * 3)]
    assert [seed for seed, *_ in trained_on] == [7, 8, 9] * 2
    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(small_data)
    of_kind = [(made_up, np.arange(30) % 10)] * 3 + [(data["train_images"][:30], data["train_labels"][:30])] * 3
    for (_, images, labels), (expected, expected_labels) in zip(trained_on, of_kind, strict=True):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)
    assert capsys.readouterr().out.splitlines() == [
        "trained on 30 drawn images, right about 80.0% +- 10.0 of the test images",
        "trained on 30 real images, right about 70.0% +- 10.0 of the test images",
        f"wrote {figure}",
    ]
    ((bars, path),) = figures
    assert path == figure and not out.exists()
    (axes,) = bars.axes
    assert "30 images" in axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == list(CLASSES)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["drawn: 80.0%", "real: 70.0%"]
    places = [np.flatnonzero(data["test_labels"] == k) % 10 for k in range(10)]  # of each class of the test images
    expected = [100 * np.mean([of >= first + n for n in range(3)]) for first in (1, 2) for of in places]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], expected)
