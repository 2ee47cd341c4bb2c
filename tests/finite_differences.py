"""Gradients by central differences, to compare the hand-written ones with. Everything in float64."""

from scratchgen import tree
from scratchgen.gradients import value_and_grad

import autograd.numpy as anp
import numpy as np


def numerical_gradient(f, x, h=1e-6):
    """dL/dx for a scalar f, entry by entry: (f(x + h e_i) - f(x - h e_i)) / 2h."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above = x.copy()
        below = x.copy()
        above[index] += h
        below[index] -= h
        gradient[index] = (f(above) - f(below)) / (2 * h)
    return gradient


def assert_gradients(f, arrays, rtol=1e-6, atol=1e-7):
    """Compare the gradients of f(*arrays), an array, with finite differences, for every entry of every argument.

    The scalar differentiated is a random linear combination of the entries of f, so that all of its VJP is seen.
    """
    arrays = [np.asarray(a, np.float64) for a in arrays]
    u = np.random.default_rng(1).standard_normal(np.shape(f(*arrays)))

    def scalar(arguments):
        return anp.sum(u * f(*arguments))

    _, gradients = value_and_grad(scalar)(arrays)
    for i, (found, x) in enumerate(zip(gradients, arrays, strict=True)):
        expected = numerical_gradient(lambda v, i=i: scalar([*arrays[:i], v, *arrays[i + 1 :]]), x)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=f"argument {i} of {f}")


def shaken(rng, params, size):
    """The parameters plus noise, so that no zero among the first ones hides a gradient, or a layer."""
    return tree.map(lambda p: p + size * rng.standard_normal(p.shape).astype(p.dtype), params)


def assert_directional(loss, params, rng, directions=5, h=1e-5, rtol=1e-6):
    """For a whole model: the derivative of loss(params) along random directions, against (L(+h) - L(-h)) / 2h.

    Returns the gradient.
    """
    params = tree.map(lambda p: p.astype(np.float64), params)
    _, gradient = value_and_grad(loss)(params)
    for _ in range(directions):
        d = tree.map(lambda p: rng.standard_normal(p.shape), params)
        expected = (
            loss(tree.map(lambda p, v: p + h * v, params, d)) - loss(tree.map(lambda p, v: p - h * v, params, d))
        ) / (2 * h)
        found = sum(np.sum(g * v) for g, v in zip(tree.leaves(gradient), tree.leaves(d), strict=True))
        np.testing.assert_allclose(found, expected, rtol=rtol)
    return gradient
