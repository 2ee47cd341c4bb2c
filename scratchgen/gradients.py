"""Reverse-mode differentiation over a tree of parameters, and `op`, which makes primitives for it.

While the loss runs, autograd wraps each array that depends on a parameter in a box. It records each operation on boxes
as a node with its parents and its vector-Jacobian product (VJP). These nodes are the tape. `backward` below is all of
back-propagation: visit the nodes from the loss to the parameters (the roots of the tape), each node after all that
depend on it, and add each parent's share of the gradient to the parent's sum.
"""

from functools import wraps

from scratchgen import tree

import numpy as np
from autograd.core import VJPNode, add_outgrads
from autograd.tracer import getval, isbox, new_box, notrace_primitives, toposort

# All boxes of one call carry this trace number. autograd's own `grad` counts nested traces in a global variable, which
# is not safe in threads; with a fixed number shards share nothing. (A gradient inside a loss would come out wrong.)
TRACE = 0


class Node(VJPNode):
    """autograd's node, with a name to print: the function that made the value, or the path of the parameter."""

    __slots__ = ["name", "shape"]

    def __init__(self, value, fun, *args):
        super().__init__(value, fun, *args)
        self.name = fun.__name__
        self.shape = getattr(value, "shape", "several")  # a list, as from split, has no shape

    def initialize_root(self, name, shape, parents=(), vjp=None):
        self.name = name
        self.shape = shape
        self.parents = parents
        self.vjp = vjp

    def __repr__(self):
        parents = ", ".join(f"{node.name} {node.shape}" for node in self.parents)
        return f"{self.name} {self.shape}" + (f" <- ({parents})" if parents else "")


notrace_primitives[Node] = notrace_primitives[VJPNode]  # functions without a gradient, such as >


def op(forward):
    """Make a primitive of ``forward(*arrays)``, which returns its answer and its vector-Jacobian product.

    ``vjp(g)`` takes g = dL/d(answer) and returns dL/d(array) for each argument, in order; trailing arguments that never
    need a gradient may be left out. A costly gradient may be returned as a function without arguments, which is called
    only if the gradient is needed. If no argument is recorded, neither is the answer. Arguments are positional.
    """

    @wraps(forward)
    @np.errstate(under="ignore")  # underflow gives 0, even if a notebook has called np.seterr(all="raise")
    def primitive(*args):
        recorded = [number for number, arg in enumerate(args) if isbox(arg)]
        if not recorded:
            return forward(*args)[0]
        answer, vjp = forward(*map(getval, args))

        @np.errstate(under="ignore")
        def vjp_of_recorded(g):
            gradients = vjp(g)
            chosen = [gradients[number] for number in recorded]
            return [gradient() if callable(gradient) else gradient for gradient in chosen]

        parents = [args[number]._node for number in recorded]
        # `new_root` is autograd's way to make a node without a function; only nodes without parents are roots.
        node = Node.new_root(forward.__name__, answer.shape, parents, vjp_of_recorded)
        return new_box(answer, args[recorded[0]]._trace, node)

    return primitive


def backward(end_node, g, roots):
    """The gradients at the ``roots``, the nodes where the tape begins, given ``g`` = dL/d(end); None where the end does
    not depend on one."""
    outgrads = {end_node: (g, False)}  # node -> (dL/d(node), may it be added to in place?)
    for node in toposort(end_node):
        if node in roots:
            continue
        g, _ = outgrads.pop(node)
        for parent, ingrad in zip(node.parents, node.vjp(g), strict=True):
            outgrads[parent] = add_outgrads(outgrads.get(parent), ingrad)
        node.vjp = None  # the closure held this operation's inputs: let go of that memory now
    return [outgrads[root][0] if root in outgrads else None for root in roots]


def value_and_grad(loss):
    """From ``loss(params, *args)`` make a function that returns (value, gradient), the gradient a tree like ``params``.

    A loss may return (value, terms), terms a tree of numbers to report; then (value, terms, gradient) is returned.
    ``weight``, a shard's share of the minibatch, multiplies the gradient only, not value and terms. Each leaf is a root
    of the tape. If containers were boxed instead, autograd would build a zero gradient for the whole tree at every
    access to an entry (50 ms a step for 150 small arrays, instead of 10). Do not change gradients in place: if two
    parameters are only added, autograd gives the same array to both.
    """

    def value_and_gradient(params, *args, weight=1.0):
        names = iter(tree.names(params))
        roots = {}  # in the order of the leaves

        def as_root(leaf):
            root = Node.new_root(f"parameter {next(names)}", leaf.shape)
            roots[root] = leaf
            return new_box(leaf, TRACE, root)

        result = loss(tree.map(as_root, params), *args)
        value, *terms = result if isinstance(result, tuple) else [result]
        if not isbox(value) or value.shape != ():
            raise TypeError("the loss must return a scalar that depends on the parameters")
        gradients = iter(backward(value._node, value.dtype.type(weight), roots))

        def gradient_of(leaf):
            g = next(gradients)
            return leaf * 0 if g is None else g.astype(leaf.dtype, copy=False)

        return *tree.map(getval, (value, *terms)), tree.map(gradient_of, params)

    return value_and_gradient
