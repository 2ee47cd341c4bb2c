"""Differentiation over trees, against autograd's own, and its parallel version, bit for bit."""

import os
from functools import partial
from types import SimpleNamespace

from scratchgen import denoisers, diffusion, improved, muon, ops, tree, vae
from scratchgen.gradients import in_parallel, sharded_training, shards, value_and_grad
from scratchgen.layers import init_mlp, mlp
from scratchgen.machinery import workers as workers_module
from scratchgen.machinery.workers import Workers
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, init_moments

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from autograd.core import VJPNode
from autograd.tracer import isbox


def mean_square(params, batch):
    """A mean over the images of a batch (x, y)."""
    x, y = batch
    return anp.sum((mlp(params, x) - y) ** 2) * (1 / len(x))


@pytest.fixture
def problem(rng):
    params = init_mlp(rng, [5, 7, 3])
    batch = rng.standard_normal((13, 5), dtype=np.float32), rng.standard_normal((13, 3), dtype=np.float32)
    return params, batch


def assert_same_bits(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_agrees_with_autograd_on_nested_parameters(rng):
    params = {"a": rng.standard_normal(3), "list": [rng.standard_normal(3), {"b": rng.standard_normal((2, 3))}]}

    def loss(p):
        shared = p["a"] * p["list"][0]  # "a" is used twice: its two contributions must be added
        return anp.sum(anp.tanh(p["list"][1]["b"] @ shared) ** 2) + anp.sum(p["a"] ** 3)

    value, gradient = value_and_grad(loss)(params)
    expected_value, expected = autograd.value_and_grad(loss)(params)
    assert value == expected_value
    for found, wanted in zip(tree.leaves(gradient), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_parameter_the_loss_ignores_has_gradient_zero(rng):
    params = {"used": rng.standard_normal(3), "unused": rng.standard_normal((2, 2))}
    _, gradient = value_and_grad(lambda p: anp.sum(p["used"] ** 2))(params)
    assert gradient["unused"].shape == (2, 2) and not gradient["unused"].any()


def test_further_numbers_come_back_as_plain_values(problem):
    def loss(params, batch):
        value = mean_square(params, batch)
        return value, {"twice": 2 * value}

    (value, more), _ = value_and_grad(loss)(*problem)
    assert type(value) is np.float32 and more["twice"] == 2 * value


@pytest.mark.parametrize("loss", [lambda p: p, lambda p: 1.0, lambda p: anp.float64(2.0)])
def test_a_loss_that_is_no_scalar_of_the_parameters_is_refused(loss):
    with pytest.raises(TypeError, match="scalar"):
        value_and_grad(loss)(np.ones(2))


def test_float32_stays_float32(problem):
    value, gradient = value_and_grad(mean_square)(*problem)
    assert {value.dtype} | {g.dtype for g in tree.leaves(gradient)} == {np.dtype(np.float32)}


STEPS = [("vae", arch, None) for arch in vae.VAES]
STEPS += [("ddpm", arch, names) for arch in denoisers.DENOISERS for names in (["none"], ["all"])]


@pytest.mark.parametrize(("model", "arch", "additions"), STEPS)
def test_nothing_on_the_tape_of_a_training_step_is_float64(model, arch, additions, rng, monkeypatch):
    if model == "vae":
        init, encode, decode = vae.VAES[arch]
        params = init(rng, 4)
        batch = rng.random((3, 28, 28, 1), dtype=np.float32), rng.standard_normal((3, 4), dtype=np.float32)

        def loss(p, batch):
            return vae.negative_elbo(partial(encode, p), partial(decode, p), batch)
    else:
        additions = improved.chosen(additions, arch, pytest.fail)
        init, network = denoisers.DENOISERS[arch]
        params, schedule = improved.init_denoiser(init, rng, additions), diffusion.make_schedule("linear", 10)
        eps_theta, _ = improved.denoiser(network, schedule, additions)
        batch = diffusion.draw_batch(schedule, rng.random((3, 28, 28, 1), dtype=np.float32), rng)

        def loss(p, batch):
            loss_of = improved.weighted_loss if additions else diffusion.simple_loss
            return loss_of(partial(eps_theta, p), schedule, batch)

    seen, init_node = set(), VJPNode.__init__

    def record(node, value, *rest):
        seen.add(value.dtype)
        init_node(node, value, *rest)

    monkeypatch.setattr(VJPNode, "__init__", record)
    _, gradient = value_and_grad(loss)(params, batch)
    assert seen | {g.dtype for g in tree.leaves(gradient)} == {np.dtype(np.float32)}


def test_the_nodes_of_the_tape_print_what_made_them_and_from_what(rng):
    params = {"shift": np.zeros((2, 4)), "decoder": [{"w": rng.standard_normal((4, 3)), "b": np.zeros(3)}]}
    x, nodes = rng.standard_normal((2, 4)), {}

    def loss(p):
        h = x + p["shift"]  # x is a constant: it has no node
        y = ops.dense(h, p["decoder"][0]["w"], p["decoder"][0]["b"])
        value = anp.sum(ops.relu(y) * y)
        nodes.update(w=p["decoder"][0]["w"]._node, h=h._node, y=y._node, value=value._node)
        return value

    value_and_grad(loss)(params)
    assert {name: repr(node) for name, node in nodes.items()} == {
        "w": "parameter decoder/0/w (4, 3)",
        "h": "add (2, 4) <- (parameter shift (2, 4))",
        "y": "dense (2, 3) <- (add (2, 4), parameter decoder/0/w (4, 3), parameter decoder/0/b (3,))",
        "value": "sum () <- (multiply (2, 3))",
    }
    assert repr(nodes["value"].parents[0]) == "multiply (2, 3) <- (relu (2, 3), dense (2, 3))"


def test_comparisons_of_boxes_give_plain_arrays_and_leave_no_node(rng):
    x = rng.standard_normal((3, 4))

    def loss(x):
        above = x > 0
        assert not isbox(above) and not isbox(anp.argmax(x)) and not isbox(anp.equal(x, x))
        return anp.sum(anp.where(above, x, 0) ** 2) + anp.sum(ops.relu(x))

    value, gradient = value_and_grad(loss)(x)
    positive = np.maximum(x, 0)
    assert value == pytest.approx((positive**2).sum() + positive.sum())
    np.testing.assert_allclose(gradient, 2 * positive + (x > 0))


def test_weight_multiplies_the_gradient_and_not_the_value(problem):
    value, gradient = value_and_grad(mean_square)(*problem)
    same, weighted = value_and_grad(mean_square)(*problem, weight=0.25)
    assert same == value
    assert_same_bits(weighted, tree.map(lambda g: np.float32(0.25) * g, gradient))


def test_shards_cover_the_images_in_order():
    assert shards(13, 4) == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]


def trainer(loss, params, shard_size, workers, update=None):
    """(differentiate, step, arrays); without another ``update``, a step leaves the gradient in arrays["gradient"]."""

    def keep(arrays, gradient):
        tree.map(np.copyto, arrays["gradient"], gradient)

    arrays = {"params": params, "gradient": tree.map(np.zeros_like, params), "moments": init_moments(params)}
    arrays = Workers.share(workers, tree.map(np.copy, arrays))
    return *sharded_training(loss, update or keep, arrays, shard_size, workers), arrays


def sharded_value_and_grad(loss, params, batch, shard_size, workers):
    differentiate, step, arrays = trainer(loss, params, shard_size, Workers(workers))
    value = differentiate(batch)
    step()
    return value, arrays["gradient"]


def test_sharded_gradient_is_the_whole_one_up_to_rounding(problem):
    value, gradient = value_and_grad(mean_square)(*problem)
    found_value, found = sharded_value_and_grad(mean_square, *problem, 4, 1)  # 4 + 4 + 4 + 1 images
    np.testing.assert_allclose(found_value, value, rtol=1e-6)
    for a, b in zip(tree.leaves(found), tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_any_number_of_workers_gives_the_same_bits(problem, workers):
    expected = sharded_value_and_grad(mean_square, *problem, 4, 1)
    differentiate, step, arrays = trainer(mean_square, problem[0], 4, Workers(workers))
    for _ in range(20):
        value = differentiate(problem[1])
        step()
        assert_same_bits((value, arrays["gradient"]), expected)


@pytest.mark.parametrize("optimiser_step", [adam_step, muon_step])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_steps_shared_by_workers_are_those_of_one_optimiser(problem, optimiser_step, workers, monkeypatch):
    """Of two minibatches, the second smaller and of other images; each compared with a plain loop over all weights."""
    monkeypatch.setattr(muon, "MUON_SIDES", range(2, 65))  # these matrices are so small

    def update(arrays, gradient, step, lr):
        optimiser_step(arrays["params"], gradient, arrays["moments"], step, lr)

    params, batch = problem
    differentiate, take_step, arrays = trainer(mean_square, params, 4, Workers(workers), update)
    params, moments = tree.map(np.copy, params), init_moments(params)
    for step, images in enumerate((slice(None), slice(7, None)), 1):
        part = tree.map(lambda array, images=images: array[images], batch)
        gradient = sharded_value_and_grad(mean_square, params, part, 4, 1)[1]
        optimiser_step(params, gradient, moments, step, 0.1)
        differentiate(part)
        take_step(step, 0.1)
        assert_same_bits(arrays["params"], params)
        assert_same_bits(arrays["moments"], moments)


def test_every_tree_of_arrays_must_be_like_params(problem):
    arrays = {"params": problem[0], "steps": np.zeros(1)}
    with pytest.raises(ValueError, match="trees like params"):
        sharded_training(mean_square, None, arrays, 4, Workers(2))


def test_a_minibatch_of_another_dtype_is_not_rounded_to_the_first_ones(problem):
    params, batch = problem
    differentiate, _, _ = trainer(mean_square, params, 4, Workers(2))
    differentiate(batch)
    doubles = tree.map(lambda a: a.astype(np.float64) + 1e-9, batch)
    assert differentiate(doubles) == sharded_value_and_grad(mean_square, params, doubles, 4, 1)[0]


def test_a_larger_minibatch_finds_room(problem):
    params, batch = problem
    differentiate, step, arrays = trainer(mean_square, params, 4, Workers(2))
    for images in (slice(5), slice(None), slice(6, None)):
        part = tree.map(lambda array, images=images: array[images], batch)
        value = differentiate(part)
        step()
        assert_same_bits((value, arrays["gradient"]), sharded_value_and_grad(mean_square, params, part, 4, 1))


def test_room_is_made_for_images_of_another_shape_and_for_larger_minibatches_alone(rng, monkeypatch):
    def loss(params, batch):
        return anp.sum((batch[0] - params["w"]) ** 2) * (1 / len(batch[0]))

    params, workers, shared = {"w": np.ones(1)}, Workers(1), []
    monkeypatch.setattr(workers, "share", lambda arrays: shared.append(arrays) or arrays)
    differentiate, _ = sharded_training(loss, None, {"params": params}, 4, workers)
    for shape, made in (
        ((4, 2), True),
        ((4, 2), False),
        ((3, 2), False),
        ((4, 3), True),
        ((5, 3), True),
        ((4, 3), False),
    ):
        before, batch = len(shared), (rng.standard_normal(shape),)
        assert differentiate(batch) == pytest.approx(loss(params, batch), rel=1e-12)
        assert (len(shared) > before) == made


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_leaf_is_one_workers_and_none_gets_all_the_work(count):
    params = [np.zeros(size) for size in (100_000, 10, 100_000, 10, 20, 20)]  # weights and biases alternate
    taken = []

    def loss(params, batch):
        return anp.sum(params[0]) * anp.sum(batch)

    def update(arrays, gradient, who):
        taken.append([leaf.size for leaf in arrays["params"]])
        assert [leaf.size for leaf in gradient] == taken[-1]

    def each(f, items):
        return [f(item) for item in items]

    in_one_process = SimpleNamespace(
        count=count, share=lambda arrays: arrays, map=each, map_here=each, ranks=Workers(1).ranks
    )
    differentiate, step = sharded_training(loss, update, {"params": params}, 1, in_one_process)
    differentiate(np.ones(4))
    step("anybody")
    assert len(taken) == count and sorted(size for sizes in taken for size in sizes) == [10, 10, 20, 20, *[100_000] * 2]
    assert count == 1 or all(sum(sizes) < 110_000 for sizes in taken)


def test_a_loss_that_changes_between_minibatches_is_the_new_one_for_all_workers(problem):
    params, batch = problem
    factor = 1.0

    def loss(params, batch):
        return factor * mean_square(params, batch)

    differentiate, _, _ = trainer(loss, params, 4, Workers(2))
    before, factor = differentiate(batch), 3.0
    assert differentiate(batch) == pytest.approx(3 * before)


def test_one_worker_stays_in_the_calling_thread(problem):
    import threading

    seen = set()

    def loss(params, batch):
        seen.add(threading.current_thread())
        return mean_square(params, batch)

    sharded_value_and_grad(loss, *problem, 4, 1)
    assert seen == {threading.current_thread()}


def test_an_error_in_a_worker_reaches_the_caller(problem):
    def loss(params, batch):
        raise ZeroDivisionError("in a shard")

    with pytest.raises(ZeroDivisionError, match="in a shard"):
        sharded_value_and_grad(loss, *problem, 4, 2)


def test_in_parallel_returns_the_images_in_order(rng):
    x, y = rng.standard_normal((13, 2)), rng.standard_normal((13, 2))
    np.testing.assert_array_equal(in_parallel(lambda a, b: a - b, 4, Workers(3))(x, y), x - y)


@pytest.mark.skipif(not workers_module.CAN_FORK, reason="workers are threads here")
def test_in_parallel_gives_every_worker_its_part():
    who = in_parallel(lambda x: np.full(len(x), os.getpid()), 2, Workers(2))(np.zeros(8))
    assert who[0] == os.getpid() != who[2] and who.tolist() == [who[0], who[0], who[2], who[2]] * 2


def test_a_function_that_returns_several_arrays_has_its_place_on_the_tape():
    value, gradient = value_and_grad(lambda x: anp.sum(anp.split(x, 2)[0] ** 2))(np.arange(4.0))
    assert value == 1 and gradient.tolist() == [0, 2, 0, 0]
