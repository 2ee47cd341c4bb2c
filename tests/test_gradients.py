"""Differentiation over trees, against autograd's own, and `op`, which makes primitives for it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from scratchgen import denoisers, diffusion, gradients, improved, ops, tree, vae
from scratchgen.gradients import op, value_and_grad
from scratchgen.layers import mlp

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


def assert_same_bits(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_agrees_with_autograd_on_nested_parameters(rng):
    params = {"a": rng.standard_normal(3), "list": [rng.standard_normal(3), {"b": rng.standard_normal((2, 3))}]}
    params["unused"] = rng.standard_normal((2, 2))

    def loss(p):
        shared = p["a"] * p["list"][0]  # "a" is used twice: its two contributions must be added
        return anp.sum(anp.tanh(p["list"][1]["b"] @ shared) ** 2) + anp.sum(p["a"] ** 3)

    value, gradient = value_and_grad(loss)(params)
    expected_value, expected = autograd.value_and_grad(loss)(params)
    assert value == expected_value
    for found, wanted in zip(tree.leaves(gradient), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert gradient["unused"].shape == (2, 2) and not gradient["unused"].any()


def test_further_numbers_come_back_as_plain_values_and_weight_multiplies_the_gradient_alone(problem):
    def loss(params, batch):
        value = mean_square(params, batch)
        return value, {"twice": 2 * value}

    value, more, gradient = value_and_grad(loss)(*problem)
    assert type(value) is np.float32 and type(more["twice"]) is np.float32 and more["twice"] == 2 * value
    assert_same_bits((value, gradient), value_and_grad(mean_square)(*problem))
    same, twice, weighted = value_and_grad(loss)(*problem, weight=0.25)
    assert (same, twice) == (value, more)
    assert_same_bits(weighted, tree.map(lambda g: np.float32(0.25) * g, gradient))


@pytest.mark.parametrize("loss", [lambda p: p, lambda p: 1.0, lambda p: anp.float64(2.0)])
def test_a_loss_that_is_no_scalar_of_the_parameters_is_refused(loss):
    with pytest.raises(TypeError, match="scalar"):
        value_and_grad(loss)(np.ones(2))


def test_a_gradient_has_the_dtype_of_its_parameter_whatever_the_loss_makes_of_it():
    _, gradient = value_and_grad(lambda p: anp.sum(p * anp.arange(2.0)))(np.ones(2, np.float32))
    assert gradient.dtype == np.float32 and gradient.tolist() == [0, 1]


STEPS = [("vae", arch, None) for arch in vae.VAES]
STEPS += [("ddpm", "unet", []), ("ddpm", "unet", [*improved.ADDITIONS])]
STEPS += [("ddpm", "mlp", []), ("ddpm", "mlp", [name for name in improved.ADDITIONS if name != "global"])]


@pytest.mark.parametrize(("model", "arch", "additions"), STEPS)
def test_nothing_on_the_tape_of_a_training_step_is_float64(model, arch, additions, rng, monkeypatch):
    if model == "vae":
        init, encode, decode = vae.VAES[arch]
        params = init(rng, 4)
        batch = rng.random((3, 28, 28, 1), dtype=np.float32), rng.standard_normal((3, 4), dtype=np.float32)

        def loss(p, batch):
            return vae.negative_elbo(partial(encode, p), partial(decode, p), batch)
    else:
        init, network = denoisers.DENOISERS[arch]
        classes = 10 if "global" in additions else 0
        means = rng.random((max(1, classes), 2, 28, 28, 1), dtype=np.float32)
        known = improved.Groups(means, np.full(means.shape[:2], 0.5))
        groups = np.array([1, -1, 0]) if additions else None
        params = improved.init_denoiser(init, rng, additions, classes)
        schedule = diffusion.make_schedule("linear", 10)
        denoiser = improved.Denoiser(network, schedule, additions, known)
        weights = improved.step_weights(schedule) if "weights" in additions else None
        batch = diffusion.draw_batch(schedule, rng.random((3, 28, 28, 1), dtype=np.float32), rng)

        def loss(p, batch):
            return diffusion.simple_loss(partial(denoiser.eps, p, groups=groups), schedule, batch, weights)

    seen = set()
    init_node = VJPNode.__init__
    new_box = gradients.new_box

    def record(node, value, *rest):  # of autograd's own primitives
        seen.add(value.dtype)
        init_node(node, value, *rest)

    def record_box(value, *rest):  # of parameters and ours
        seen.add(value.dtype)
        return new_box(value, *rest)

    monkeypatch.setattr(VJPNode, "__init__", record)
    monkeypatch.setattr(gradients, "new_box", record_box)
    *_, gradient = value_and_grad(loss)(params, batch)
    assert seen | {g.dtype for g in tree.leaves(gradient)} == {np.dtype(np.float32)}


def test_the_nodes_of_the_tape_print_what_made_them_and_from_what(rng):
    params = {"shift": np.zeros((2, 4)), "decoder": [{"w": rng.standard_normal((4, 3)), "b": np.zeros(3)}]}
    x = rng.standard_normal((2, 4))
    nodes = {}

    def loss(p):
        h = x + p["shift"]  # x is a constant: it has no node
        y = ops.dense(h, p["decoder"][0]["w"], p["decoder"][0]["b"])
        value = anp.sum(ops.relu(y) * y)
        nodes.update(w=p["decoder"][0]["w"]._node, h=h._node, y=y._node, value=value._node)
        nodes["of x"] = ops.dense(x, p["decoder"][0]["w"], p["decoder"][0]["b"])._node
        return value

    value_and_grad(loss)(params)
    assert {name: repr(node) for name, node in nodes.items()} == {
        "w": "parameter decoder/0/w (4, 3)",
        "h": "add (2, 4) <- (parameter shift (2, 4))",
        "y": "dense (2, 3) <- (add (2, 4), parameter decoder/0/w (4, 3), parameter decoder/0/b (3,))",
        "value": "sum () <- (multiply (2, 3))",
        "of x": "dense (2, 3) <- (parameter decoder/0/w (4, 3), parameter decoder/0/b (3,))",
    }
    assert repr(nodes["value"].parents[0]) == "multiply (2, 3) <- (relu (2, 3), dense (2, 3))"
    # What an operation has seen is let go of as soon as it is no longer needed, also by whoever keeps a node.
    assert all(nodes[name].vjp is None for name in ("h", "y", "value"))


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


def test_a_function_that_returns_several_arrays_has_its_place_on_the_tape():
    value, gradient = value_and_grad(lambda x: anp.sum(anp.split(x, 2)[0] ** 2))(np.arange(4.0))
    assert value == 1 and gradient.tolist() == [0, 2, 0, 0]


def test_gradients_in_several_threads_at_once_do_not_mix(problem):
    """As where ranks are threads: each has its own tape, although all boxes carry the same trace number."""
    params, batch = problem
    jobs = [(tree.map(lambda p, k=k: p * np.float32(k), params), batch) for k in range(1, 5)]
    barrier = threading.Barrier(4, timeout=10)

    def differentiate(job):
        barrier.wait()
        return [value_and_grad(mean_square)(*job) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(differentiate, jobs))
    assert_same_bits(found, [[value_and_grad(mean_square)(*job)] * 20 for job in jobs])


# ----------------------------------------------------------------------------------------------------------------- op


@pytest.fixture
def product_of_three():
    """x y z as an op, and what it does: each answer that it gives, and each gradient that it works out."""
    done = []

    @op
    def triple(x, y, z, factor=1):
        """A docstring."""
        done.append("answer")

        def vjp(g):
            def dx():
                done.append("dx")
                return factor * g * y * z

            def dy():
                done.append("dy")
                return factor * g * x * z

            return dx, dy, factor * g * x * y

        return factor * x * y * z, vjp

    return triple, done


def test_a_gradient_given_as_a_function_is_called_where_it_is_needed_and_once(rng, product_of_three):
    triple, done = product_of_three
    x, y, z = rng.standard_normal((3, 2, 4))
    for boxed, expected in (
        ({"x"}, ["dx"]),
        ({"y"}, ["dy"]),
        ({"z"}, []),
        ({"x", "z"}, ["dx"]),
        ({"x", "y", "z"}, ["dx", "dy"]),
    ):
        arrays = {"x": x, "y": y, "z": z}
        done.clear()
        _, gradient = value_and_grad(lambda p, arrays=arrays: anp.sum(triple(*(arrays | p).values())))(
            {name: arrays[name] for name in arrays if name in boxed}
        )
        assert done == ["answer", *expected] and gradient.keys() == boxed
        for name, found in gradient.items():
            np.testing.assert_allclose(found, x * y * z / arrays[name], rtol=1e-12)


def test_a_notebook_that_makes_numpy_raise_can_differentiate():
    """What is too small for float32 is 0, forward and backward, and nothing to stop for."""
    x = np.array([-200, -88, -80, 1], np.float32)
    value_and_gradient = value_and_grad(lambda x: ops.mean(ops.silu(x)))
    expected = value_and_gradient(x, weight=1e-35)
    assert expected[1][2] == 0 < expected[1][3]
    with np.errstate(all="raise"):
        assert_same_bits(value_and_gradient(x, weight=1e-35), expected)


def test_an_op_of_plain_arrays_is_a_plain_function(rng, product_of_three):
    triple, done = product_of_three
    x, y, z = rng.standard_normal((3, 2, 4))
    answer = triple(x, y, z, 3)
    assert type(answer) is np.ndarray and done == ["answer"]
    np.testing.assert_array_equal(answer, 3 * x * y * z)
    assert triple.__name__ == "triple" and triple.__doc__ == "A docstring."
    with pytest.raises(TypeError):
        triple(x, y, z, factor=3)  # arguments are positional
    answer, vjp = triple.__wrapped__(x, y, z)  # as it was written
    np.testing.assert_array_equal(answer, x * y * z)
    np.testing.assert_array_equal(vjp(np.ones_like(x))[2], x * y)


def test_an_op_works_inside_autograds_own_grad_and_beside_its_primitives(rng, product_of_three):
    triple, _ = product_of_three
    x = rng.standard_normal((2, 4))
    w = rng.standard_normal((4, 4))

    def loss(x, by):
        return anp.sum(anp.tanh(by(anp.dot(x, w), x, anp.exp(x))) ** 2)

    found, expected = (autograd.grad(loss)(x, by) for by in (triple, lambda x, y, z: x * y * z))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
