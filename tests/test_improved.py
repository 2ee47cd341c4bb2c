"""What was added to the diffusion model: each addition against its definition. The samplers are in test_samplers.py."""

import math
from functools import partial
from types import SimpleNamespace

import run_ddpm
from scratchgen import diffusion, improved
from scratchgen.data import scale
from scratchgen.diffusion import at, make_schedule

import numpy as np
import pytest
from conftest import ROOT, main_of
from test_diffusion import images

# -------------------------------------------------------------------------------------------------- which are in force


def refuse(message):
    raise ValueError(message)


def chosen(names, arch):
    return run_ddpm.additions(SimpleNamespace(additions=names, arch=arch), refuse)


@pytest.mark.parametrize(
    ("names", "arch", "expected"),
    [
        (["none"], "unet", []),
        (["all"], "unet", ["v", "black", "weights", "muon", "global", "guide", "groups"]),
        (["all"], "mlp", ["v", "black", "weights", "muon", "guide", "groups"]),  # which has no place for "global"
        (["muon", "v"], "unet", ["v", "muon"]),  # in the order of the ablation, as a checkpoint compares them
        (["global", "black", "v"], "unet", ["v", "black", "global"]),
        (["black", "black", "v", "v"], "mlp", ["v", "black"]),
        (["none", "v"], "unet", "none v: none and all stand alone"),
        (["v", "all"], "unet", "v all: none and all stand alone"),
        (["none", "all"], "mlp", "none all: none and all stand alone"),
        (["global"], "mlp", "--additions global is for --arch unet, not mlp"),
    ],
)
def test_the_flag_names_the_additions_or_is_refused(names, arch, expected):
    if isinstance(expected, list):
        assert chosen(names, arch) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            chosen(names, arch)


@pytest.mark.parametrize(
    ("additions", "classes", "expected"),
    [
        ([], 0, {"inputs": 1}),
        (["v", "weights", "muon", "guide"], 0, {"inputs": 1}),
        (["black"], 0, {"inputs": 2}),
        (["groups"], 0, {"inputs": 2}),
        (["global"], 0, {"inputs": 1, "global_blocks": True}),
        (["black", "groups"], 10, {"inputs": 3, "classes": 10}),
    ],
)
def test_a_network_is_made_as_the_additions_ask(additions, classes, expected):
    assert improved.init_denoiser(lambda rng, **options: options, None, additions, classes) == expected


@pytest.mark.parametrize(
    "additions",
    [
        [],
        ["weights", "muon", "global", "guide"],
        ["v"],
        ["black"],
        ["groups"],
        ["v", "black"],
        ["v", "black", "groups"],
    ],
)
def test_what_the_network_is_shown_and_what_its_answer_stands_for(additions, schedule, rng):
    means = rng.standard_normal((10, 2, 4, 6, 1), dtype=np.float32)
    known = improved.Groups(means, np.full((10, 2), 0.5))
    x_t, answer = rng.standard_normal((2, 3, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 60, 200])
    groups = np.array([3, -1, 18])
    seen = []

    def network(*arguments):
        seen.append(arguments)
        return answer

    denoiser = improved.Denoiser(network, schedule, additions, known)
    eps, x_0 = answer, diffusion.predict_x_0(schedule, x_t, t, answer)
    if "v" in additions:  # x_t and v are eps and x_0, rotated; not clipped
        a, b = (at(schedule[name], t) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        eps, x_0 = b * x_t + a * answer, a * x_t - b * answer
    grey = 0 * means[0, 0]
    for told, labels, mean in ((groups, [1, -1, 9], [means[1, 1], grey, means[9, 0]]), (None, None, [grey] * 3)):
        np.testing.assert_allclose(denoiser.eps("params", x_t, t, told), eps, rtol=1e-6)
        np.testing.assert_allclose(denoiser.x_0("params", x_t, t, told), x_0, rtol=1e-6)
        shown = [x_t]
        shown += [improved.above_black(schedule, x_t, t)] if "black" in additions else []
        shown += [np.stack(mean)] if "groups" in additions else []
        for params, x, times, label in seen:
            assert params == "params" and times is t and (label if label is None else label.tolist()) == labels
            np.testing.assert_array_equal(x, np.concatenate(shown, axis=3))
            assert x.dtype == np.float32
        assert len(seen) == 2
        seen.clear()
    # Without the addition a class is a group, and its mean is not shown.
    one = improved.Denoiser(network, schedule, [], improved.Groups(means[:, :1], np.ones((10, 1))))
    one.eps(None, x_t, t, np.array([3, -1, 9]))
    assert seen[0][1] is x_t and seen[0][3].tolist() == [3, -1, 9]


def test_the_loss_is_that_of_each_images_own_label(schedule, rng):
    """A network whose answer is the label, a tenth of it."""
    batch = x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 3), rng)
    groups = np.array([7, -1, 2])

    def network(params, x, t, labels):
        return np.broadcast_to(labels.astype(np.float32).reshape(-1, 1, 1, 1) / 10, x_0.shape)

    denoiser = improved.Denoiser(network, schedule, [], improved.Groups(None, np.ones((10, 1))))
    loss, _ = diffusion.simple_loss(partial(denoiser.eps, None, groups=groups), schedule, batch)
    assert loss == pytest.approx(np.mean((eps - groups.reshape(-1, 1, 1, 1) / 10) ** 2), rel=1e-5)


def test_the_help_names_every_addition(capsys):
    with pytest.raises(SystemExit):
        run_ddpm.parse_arguments(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} ({what})" in words for name, what in improved.ADDITIONS.items())


# ----------------------------------------------------------------------------------------------------------------- "v"


@pytest.mark.parametrize("T", [8, 10, 15, 200])
def test_eps_and_x_0_from_v_undo_the_definition_of_v_also_where_alpha_bar_is_tiny(T, rng):
    """With few steps of the linear schedule alpha_bar_T is 2e-16 and less: float32 keeps no digit of x_0 in eps, and
    the way over eps leads anywhere."""
    schedule = make_schedule("linear", T)
    x_0 = images(rng, T)
    t = np.arange(1, T + 1)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    alpha_bar = schedule["alpha_bar"][t].reshape(-1, 1, 1, 1)
    v = (np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x_0).astype(np.float32)
    denoiser = improved.Denoiser(lambda params, x_t, t, labels: v, schedule, ["v"])
    found = denoiser.x_0(None, x_t, t), denoiser.eps(None, x_t, t)
    np.testing.assert_allclose(found, (x_0, eps), atol=1e-5)
    assert found[0].dtype == np.float32
    error = np.abs(diffusion.predict_x_0(schedule, x_t, t, found[1]) - x_0).max(axis=(1, 2, 3))
    assert error[0] < 1e-5  # where there is little noise both agree
    assert (error.max() > 0.1) == (T < 200)


# ------------------------------------------------------------------------------------------------------------- "black"


@pytest.mark.parametrize("x_0", [-1, -0.99, 1])
def test_above_black_is_eps_on_black_pixels_and_more_on_others(x_0, schedule):
    t = np.array([1, 2, 20, 150, 200])
    for eps in (-4, -3.5, -2.5, 0, 2.5, 3.5, 4):
        x_t = diffusion.q_sample(schedule, np.full((5, 4, 6, 1), x_0, np.float32), t, np.float32(eps))
        alpha_bar = schedule["alpha_bar"][t].reshape(-1, 1, 1, 1)
        expected = np.clip(eps + (x_0 + 1) * np.sqrt(alpha_bar / (1 - alpha_bar)), -3, 3)
        found = improved.above_black(schedule, x_t, t)
        assert np.all(np.abs(found - expected) <= 1e-6 / np.sqrt(1 - alpha_bar))
        assert np.all((np.abs(found) == 3) == (np.abs(expected) == 3))


# ----------------------------------------------------------------------------------------------------------- "weights"


def test_training_weighs_an_error_in_v_by_the_square_root_of_alpha_bar(schedule, rng):
    batch = x_0, t, eps = diffusion.draw_batch(schedule, images(rng, 50), rng)
    signal, noise = (np.sqrt(a)[t].reshape(-1, 1, 1, 1) for a in (schedule["alpha_bar"], 1 - schedule["alpha_bar"]))
    v = signal * eps - noise * x_0
    v_theta = v + rng.standard_normal(x_0.shape)
    eps_theta = signal * v_theta + noise * (signal * x_0 + noise * eps)
    weights = improved.step_weights(schedule)
    assert weights.dtype == np.float32 and weights.shape == (201,)
    value, reported = diffusion.simple_loss(lambda x_t, t: eps_theta, schedule, batch, weights)
    assert value == pytest.approx(np.mean(signal * (v - v_theta) ** 2), rel=1e-4)
    assert reported["loss"] == pytest.approx(np.mean((eps - eps_theta) ** 2), rel=1e-4)


# ------------------------------------------------------------------------------------------------ "guide", and classes


@pytest.mark.parametrize("t", [5, 60, 120, 200])
@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_guidance_follows_the_score_of_the_guided_density(t, w, schedule):
    """Of p (p / q)^w, by finite differences. Of x_0, p and q are two Gaussians, so they are of x_t, too."""
    p, q = (0.2, 0.01), (-0.1, 0.03)
    a = float(schedule["sqrt_alpha_bar"][t])
    b = float(schedule["sqrt_one_minus_alpha_bar"][t])
    x_t = a * 0.1 + b * np.linspace(-0.3, 0.3, 7)

    def log_density(x, mean, variance):
        return -0.5 * (x - a * mean) ** 2 / (a**2 * variance + b**2)

    def x_0(mean, variance):  # E[x_0 | x_t]
        return mean + a * variance / (a**2 * variance + b**2) * (x_t - a * mean)

    above, below = ((1 + w) * log_density(x, *p) - w * log_density(x, *q) for x in (x_t + 1e-5, x_t - 1e-5))
    expected = (x_t + b**2 * (above - below) / 2e-5) / a  # Tweedie: E[x_0 | x_t], where this is the score
    assert np.any(np.abs(expected) < 1)
    np.testing.assert_allclose(improved.guided(x_0(*p), x_0(*q), w), np.clip(expected, -1, 1), rtol=1e-3, atol=1e-4)


def test_a_guided_prediction_is_extrapolated_clipped_and_in_float32():
    x_0 = np.array([0.9, 0.5, -0.5, -0.9], np.float32)
    guide = np.array([0.1, 0.4, -0.4, -0.1], np.float32)
    for w, expected in ((2, [1, 0.7, -0.7, -1]), (np.float64(0.3), [1, 0.53, -0.53, -1]), (0, x_0)):
        found = improved.guided(x_0, guide, w)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == np.float32


def test_a_tenth_of_the_groups_are_dropped_and_others_at_every_step(rng):
    groups = np.arange(20_000) % 10
    dropped = []
    for _ in range(2):
        found = improved.drop_groups(groups, rng)
        dropped.append(found == -1)
        np.testing.assert_array_equal(found[~dropped[-1]], groups[~dropped[-1]])
        assert dropped[-1].mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 20_000))
        of_each = [dropped[-1][groups == group].mean() for group in range(10)]
        assert of_each == pytest.approx([0.1] * 10, abs=4 * np.sqrt(0.09 / 2000))
    assert (dropped[0] & dropped[1]).mean() == pytest.approx(0.01, abs=4 * np.sqrt(0.01 / 20_000))
    assert improved.drop_groups(None, rng) is None


class Enough(Exception):
    """Ends a training run."""


def test_a_run_drops_others_at_every_step_and_shows_the_network_the_rest(small_data, tmp_path, monkeypatch):
    dropped, shown = [], []
    drop, means_of = improved.drop_groups, improved.Groups.means_of

    def recorded(groups, rng):
        if len(dropped) == 4:
            raise Enough
        dropped.append(drop(groups, rng))
        return dropped[-1]

    monkeypatch.setattr(improved, "drop_groups", recorded)
    monkeypatch.setattr(
        improved.Groups, "means_of", lambda known, groups: shown.append(groups) or means_of(known, groups)
    )
    with pytest.raises(Enough):
        flags = ["--data", small_data, "--T", 2, "--arch", "mlp", "--batch-size", 32, "--workers", 1]
        main_of(run_ddpm, *flags, "--epochs", 1, "--out", tmp_path)
    assert len({tuple(groups == -1) for groups in dropped}) == 4
    np.testing.assert_array_equal(np.sort(np.concatenate(shown)), np.sort(np.concatenate(dropped)))


@pytest.mark.parametrize(("total", "step"), [(1, 1), (4, 1), (5, 2), (938, 235), (7504, 411)])
def test_the_guide_is_kept_after_a_quarter_of_the_training(total, step):
    assert improved.early_step(total) == step


def test_guidance_and_the_number_of_groups_are_those_of_the_document():
    quality = (ROOT / "docs" / "quality.md").read_text()
    assert f"guided, w = {improved.GUIDANCE} (" in quality and f"of the {improved.GROUPS} groups" in quality


# ------------------------------------------------------------------------------------------------------------ "groups"


def kinds(rng, each):
    """Images 4 x 6 of three kinds, as many of each as it says, and which kind each is: a grey level and some noise."""
    kind = rng.permutation(np.repeat([0, 1, 2], each))
    noise = rng.normal(0, 3, (len(kind), 4, 6, 1))
    return (np.array([40, 120, 220])[kind].reshape(-1, 1, 1, 1) + noise).round().astype(np.uint8), kind


@pytest.mark.parametrize("rounds", [0, 1, 2, 20])
def test_k_means_is_lloyds_algorithm(rng, rounds, monkeypatch):
    nearest, made = improved.nearest, []
    monkeypatch.setattr(improved, "nearest", lambda *arrays: made.append(arrays) or nearest(*arrays))
    x = rng.standard_normal((300, 1, 2, 1), dtype=np.float32)
    expected = x[np.random.default_rng(3).choice(300, 7, replace=False)].astype(float)
    for _ in range(rounds):
        members = [[] for _ in expected]
        for image in x:
            members[min(range(7), key=lambda k: ((image - expected[k]) ** 2).sum())].append(image)
        expected = [np.mean(images, axis=0) if images else mean for images, mean in zip(members, expected, strict=True)]
    found = improved.k_means(x, 7, np.random.default_rng(3), *([rounds] if rounds < 20 else []))  # 20 by default
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32 and len(made) == rounds


def test_ten_thousand_images_of_a_class_are_grouped_and_all_are_counted(rng, monkeypatch):
    grouped = []
    monkeypatch.setattr(improved, "k_means", lambda x, K, rng: grouped.append(x) or x[:K])
    images = rng.integers(255, size=(10_500, 1, 1, 1), dtype=np.uint8)
    images[10_000:] = 255
    known = improved.find_groups(images, None, 2, rng)
    counts = np.bincount(improved.nearest(known["means"][0], scale(images, -1, 1)), minlength=2)
    assert [len(x) for x in grouped] == [10_000]
    assert 400 < (grouped[0] == 1).sum() < 500, "any ten thousand, not the first"
    np.testing.assert_allclose(known["shares"], [(counts + 1) / 10_502], rtol=1e-12)


def test_there_may_be_fewer_images_than_groups(rng):
    images, _ = kinds(rng, [1, 2, 1])
    known = improved.Groups(**improved.find_groups(images, None, 6, rng))
    assert known.means.shape == (1, 6, 4, 6, 1) and np.isfinite(known.means).all()
    assert known.shares.sum() == pytest.approx(1) and known.shares.min() > 0
    assert known.draw(50, None, rng).max() < 6
    one = scale(images[:1], -1, 1)
    np.testing.assert_array_equal(improved.k_means(one, 3, rng), np.repeat(one, 3, axis=0))  # an empty group stays
    a_sum_below_1 = improved.Groups(None, np.array([[0.5, 0.4999]]))
    largest = SimpleNamespace(random=lambda shape: np.full(shape, 0.99999))
    assert a_sum_below_1.draw(2, None, largest).tolist() == [1, 1]


def test_each_class_has_groups_of_its_own(rng):
    images, kind = kinds(rng, [30, 50, 20])
    classes = (kind == 2).astype(np.uint8)  # the first has two kinds, the second one; the other eight have no image
    known = improved.Groups(**improved.find_groups(images, classes, 20, rng))
    assert known.means.shape == (10, 2, 4, 6, 1) and known.shares.shape == (10, 2)
    groups = known.of(scale(images, -1, 1), classes)
    np.testing.assert_array_equal(groups // 2, classes)
    np.testing.assert_array_equal(known.labels(groups), classes)
    np.testing.assert_array_equal(known.labels(np.array([-1, 19])), [-1, 9])
    for group in range(4):  # one more image than there are, and of as many in all
        size = np.sum(groups == group) + 1
        assert known.shares.ravel()[group] == pytest.approx(size / (np.sum(classes == group // 2) + 2))
    np.testing.assert_allclose(known.shares.sum(axis=1), 1)
    asked = np.array([1, -1, 0, 9] * 5000)
    drawn = known.draw(20_000, asked, rng)
    assert np.all((drawn == -1) == (asked == -1)) and np.all(known.labels(drawn) == asked)
    for label in (0, 9):
        share = np.bincount(drawn[asked == label] - 2 * label, minlength=2) / 5000
        np.testing.assert_allclose(share, known.shares[label], atol=4 * 0.5 / math.sqrt(5000))
    np.testing.assert_allclose(np.exp(-known.nats(np.arange(20))).reshape(10, 2).sum(axis=1), 1)


def test_without_classes_a_group_is_any_and_there_are_no_labels(rng):
    images, kind = kinds(rng, [30, 50, 20])
    known = improved.Groups(**improved.find_groups(images, None, 3, rng))
    x_0 = scale(images, -1, 1)
    groups = known.of(x_0)
    np.testing.assert_array_equal(groups, improved.nearest(known.means[0], x_0))
    assert known.labels(groups) is None
    drawn = known.draw(20_000, None, rng)
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, known.shares[0], atol=4 * 0.5 / math.sqrt(20_000))
