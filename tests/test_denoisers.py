"""The networks: shapes, dtypes, the whole loss against finite differences, and that they can learn."""

from functools import partial

from scratchgen import diffusion, improved, tree
from scratchgen.denoisers import DENOISERS, init_mlp_denoiser, init_unet, mlp_denoiser, unet
from scratchgen.gradients import value_and_grad
from scratchgen.machinery.parallel import Ranks, in_parallel, sharded
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from finite_differences import assert_directional

EVERYTHING = {"unet": ["v", "black", "weights", "global"], "mlp": ["v", "black", "weights"]}
WHOLE_UNET = {"inputs": 2, "global_blocks": True}  # as with all additions
each_network = pytest.mark.parametrize(
    ("arch", "additions"), [(arch, names) for arch in DENOISERS for names in ([], EVERYTHING[arch])]
)


def schedule():
    return diffusion.make_schedule("linear", 50)


def make_batch(rng, N, H=28, W=28):
    return diffusion.draw_batch(schedule(), rng.random((N, H, W, 1), dtype=np.float32) * 2 - 1, rng)


def network_input(rng, N, additions=("black",)):
    """x (N, 28, 28, 1 or 2) and t (N,) as they reach a network."""
    x_t, t, _ = make_batch(rng, N)
    return improved.Denoiser(None, schedule(), additions).network_input(x_t, t), t


def loss_of(network, additions=("v", "black", "weights")):
    s = schedule()
    denoiser = improved.Denoiser(network, s, additions)
    weights = improved.step_weights(s) if "weights" in additions else None
    return lambda params, batch: diffusion.simple_loss(partial(denoiser.eps, params), s, batch, weights)[0]


def shaken(rng, params):
    return tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(p.dtype), params)


@pytest.mark.parametrize("additions", [[], EVERYTHING["unet"]], ids=["none", "all"])
def test_the_whole_unet_loss_against_finite_differences(rng, additions):
    init = partial(init_unet, channels=(8, 16), size=(8, 12))
    params = shaken(rng, improved.init_denoiser(init, rng, additions))
    batch = tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, make_batch(rng, 2, H=8, W=12))
    assert_directional(lambda p: loss_of(unet, additions)(p, batch), params, rng, rtol=1e-5)


@pytest.mark.parametrize("additions", [[], EVERYTHING["mlp"]], ids=["none", "all"])
def test_the_whole_mlp_loss_against_finite_differences(rng, additions):
    init = partial(init_mlp_denoiser, hidden=12, depth=2)
    params = shaken(rng, improved.init_denoiser(init, rng, additions))
    batch = make_batch(rng, 3)
    # A step small enough that hardly a ReLU changes side within it.
    assert_directional(lambda p: loss_of(mlp_denoiser, additions)(p, batch), params, rng, h=1e-7, rtol=1e-4)


@each_network
def test_output_is_an_image_and_everything_float32(rng, arch, additions):
    init, network = DENOISERS[arch]
    params = improved.init_denoiser(init, rng, additions)
    batch = make_batch(rng, 3)
    assert network(params, *network_input(rng, 3, additions)).shape == (3, 28, 28, 1)
    value, gradient = value_and_grad(loss_of(network, additions))(params, batch)
    assert {value.dtype} | {g.dtype for g in tree.leaves(gradient)} == {np.dtype(np.float32)}


@each_network
def test_each_image_is_treated_on_its_own(rng, arch, additions):
    init, network = DENOISERS[arch]
    params = shaken(rng, improved.init_denoiser(init, rng, additions))
    x, t = network_input(rng, 6, additions)
    f = partial(network, params)
    with Ranks(2) as ranks:
        found = in_parallel(f, 2, ranks)(x, t)
    np.testing.assert_allclose(found, f(x, t), rtol=1e-3, atol=1e-4)


@each_network
def test_the_time_step_matters(rng, arch, additions):
    init, network = DENOISERS[arch]
    params = shaken(rng, improved.init_denoiser(init, rng, additions))
    x = np.repeat(network_input(rng, 1, additions)[0], 2, axis=0)
    y = network(params, x, np.array([1, 40]))
    assert np.abs(y[0] - y[1]).max() > 1e-3


@pytest.mark.parametrize("additions", [[], EVERYTHING["unet"]], ids=["none", "all"])
def test_with_classes_labels_matter_have_a_gradient_and_none_is_minus_one(rng, additions):
    init = partial(init_unet, channels=(8, 16), size=(8, 12))
    s = schedule()
    params = shaken(rng, improved.init_denoiser(init, rng, additions, classes=3))
    batch = tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, make_batch(rng, 3, H=8, W=12))
    denoiser = improved.Denoiser(unet, s, additions)
    labels = np.array([2, -1, 0])
    nobody = np.full(3, -1)

    def loss(params):
        return diffusion.simple_loss(partial(denoiser.eps, params, groups=labels), s, batch)[0]

    assert_directional(loss, params, rng, rtol=1e-5)
    _, gradient = value_and_grad(loss)(params)
    assert [bool(np.any(row)) for row in gradient["labels"]["w"]] == [True, False, True]  # 1 is no image's label
    for prediction in (denoiser.eps, denoiser.x_0):
        with_labels = prediction(params, batch[0], batch[1], labels)
        without = prediction(params, batch[0], batch[1], nobody)
        np.testing.assert_array_equal(without, prediction(params, batch[0], batch[1]))
        assert (np.abs(with_labels - without).max(axis=(1, 2, 3)) > 1e-4).tolist() == [True, False, True]


@pytest.mark.parametrize("additions", [[], EVERYTHING["unet"]], ids=["none", "all"])
def test_every_parameter_of_the_unet_gets_a_gradient(rng, additions):
    params = shaken(rng, improved.init_denoiser(init_unet, rng, additions))
    _, gradient = value_and_grad(loss_of(unet, additions))(params, make_batch(rng, 2))
    silent = [n for n, g in zip(tree.names(gradient), tree.leaves(gradient), strict=True) if not np.any(g)]
    assert silent == []


@pytest.mark.parametrize("half", ["from below", "skip", "input"])
def test_the_unet_uses_both_halves_of_its_joins(rng, half):
    """Weights that read one half of a concatenation, set to zero, must change the output."""
    params = shaken(rng, init_unet(rng, **WHOLE_UNET))
    x, t = network_input(rng, 2)
    before = unet(params, x, t)
    if half == "input":
        params["conv_out"]["w"][:, :, -8:] = 0
    else:
        channels = slice(0, 32) if half == "from below" else slice(32, 64)
        block = params["up_blocks"][0]
        block["norm1"]["scale"][channels] = block["norm1"]["shift"][channels] = 0
        block["shortcut"]["w"][channels] = 0
    assert np.abs(unet(params, x, t) - before).max() > 1e-3


def test_unet_gradient_has_the_same_bits_for_any_number_of_ranks(rng):
    def loss(params, batch):
        return loss_of(unet)(params, batch), {}

    params = shaken(rng, init_unet(rng, **WHOLE_UNET))
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


@pytest.mark.parametrize("additions", [[], EVERYTHING["unet"]], ids=["none", "all"])
def test_one_batch_can_be_learned_by_heart(rng, additions):
    init = partial(init_unet, channels=(16, 32))
    params = improved.init_denoiser(init, rng, additions)
    batch = make_batch(rng, 4)
    batch = (np.sign(batch[0]) * 0.5, *batch[1:])
    moments = init_moments(params)
    step_of = value_and_grad(loss_of(unet, additions))
    losses = []
    for step in range(1, 81):
        value, gradient = step_of(params, batch)
        adam_step(params, gradient, moments, step, lr=3e-3)
        losses.append(value)
    assert losses[-1] < 0.15 * losses[0]
