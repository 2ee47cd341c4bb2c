"""The networks: each against its plain definition, the whole loss against finite differences, and the same bits."""

from functools import partial

from scratchgen import diffusion, improved, tree
from scratchgen.denoisers import DENOISERS, init_mlp_denoiser, init_unet, unet
from scratchgen.machinery.parallel import Ranks, sharded

import numpy as np
import plain
import pytest
from finite_differences import assert_directional, shaken

SCHEDULE = diffusion.make_schedule("linear", 50)
ALL = ["v", "black", "weights", "global"]


def make_batch(rng, N, H=28, W=28):
    return diffusion.draw_batch(SCHEDULE, rng.random((N, H, W, 1), dtype=np.float32) * 2 - 1, rng)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("unet", {}),
        ("unet", {"inputs": 2, "global_blocks": True}),
        ("unet", {"classes": 10}),
        ("unet", {"inputs": 3, "global_blocks": True, "classes": 10}),
        ("mlp", {}),
        ("mlp", {"inputs": 3}),
    ],
)
def test_a_network_is_its_plain_definition(rng, arch, options):
    init, network = DENOISERS[arch]
    params = tree.map(lambda p: p.astype(np.float64), shaken(rng, init(rng, **options), 0.05))
    x = rng.standard_normal((3, 28, 28, options.get("inputs", 1)))
    t = np.array([1, 40, 200])
    answers = [network(params, x, t)]  # of float64, but for the embedding of t
    np.testing.assert_allclose(answers[0], plain.NETWORKS[arch](params, x, t), rtol=1e-5, atol=1e-5)
    if "classes" in options:
        labels = np.array([9, -1, 0])
        answers.append(network(params, x, t, labels))
        np.testing.assert_allclose(answers[1], plain.unet(params, x, t, labels), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(network(params, x, t, np.full(3, -1)), answers[0])
        assert (np.abs(answers[1] - answers[0]).max(axis=(1, 2, 3)) > 0.01).tolist() == [True, False, True]


SMALL_UNET = partial(init_unet, channels=(8, 16), size=(8, 12))


@pytest.mark.parametrize(
    ("init", "additions", "classes", "h", "rtol"),
    [
        (SMALL_UNET, [], 0, 1e-5, 1e-5),
        (SMALL_UNET, [], 3, 1e-5, 1e-5),
        (SMALL_UNET, ALL, 3, 1e-5, 1e-5),
        # A step so small that hardly a ReLU changes side within it.
        (partial(init_mlp_denoiser, hidden=12, depth=2), [], 0, 1e-7, 1e-4),
        (partial(init_mlp_denoiser, hidden=12, depth=2), ALL[:3], 0, 1e-7, 1e-4),
    ],
)
def test_the_whole_loss_against_finite_differences(rng, init, additions, classes, h, rtol):
    """And every parameter has a gradient, but for a label that none of the images has."""
    arch, shape = ("unet", (8, 12)) if init is SMALL_UNET else ("mlp", (28, 28))
    params = shaken(rng, improved.init_denoiser(init, rng, additions, classes), 0.05)
    batch = tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, make_batch(rng, 3, *shape))
    denoiser = improved.Denoiser(DENOISERS[arch][1], SCHEDULE, additions)
    groups = np.array([2, -1, 0]) if classes else None
    weights = improved.step_weights(SCHEDULE) if "weights" in additions else None

    def loss(params):
        return diffusion.simple_loss(partial(denoiser.eps, params, groups=groups), SCHEDULE, batch, weights)[0]

    gradient = assert_directional(loss, params, rng, h=h, rtol=rtol)
    assert all(np.any(g) for g in tree.leaves(gradient))
    if classes:
        assert [bool(np.any(row)) for row in gradient["labels"]["w"]] == [True, False, True]


def test_unet_gradient_has_the_same_bits_for_any_number_of_ranks(rng):
    denoiser = improved.Denoiser(unet, SCHEDULE, ALL)

    def loss(params, batch):
        return diffusion.simple_loss(partial(denoiser.eps, params), SCHEDULE, batch)

    params = shaken(rng, init_unet(rng, inputs=2, global_blocks=True, channels=(16, 32)), 0.05)
    batch = make_batch(rng, 11)
    results = []
    for n in (1, 2, 3):
        value_and_gradient = sharded(loss, ranks := Ranks(n), params, 4, 11)
        with ranks:
            value, _, gradient = value_and_gradient(params, batch)
            owned = ranks.all_gather(dict(zip(tree.names(gradient), tree.leaves(gradient), strict=True)))
        assert len(owned) == n and sum(map(len, owned)) == len(tree.leaves(params))  # each leaf is one rank's
        results.append((value, {name: leaf for part in owned for name, leaf in part.items()}))
    for value, gradient in results[1:]:
        assert value == results[0][0]
        for name in tree.names(params):
            np.testing.assert_array_equal(gradient[name], results[0][1][name])
