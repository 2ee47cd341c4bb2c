"""Reverse-mode differentiation over a tree of parameters, and the same over shards of a minibatch, in parallel.

While the loss runs, autograd keeps each array that depends on a parameter in a box, and records each operation on boxes
as a node that knows its parents and its vector-Jacobian product (VJP). Those nodes are the tape. The backward pass,
`backward` below, is all there is to back-propagation: visit the nodes from the loss to the parameters (its roots), each
after all that depend on it, and hand every parent its share of the gradient.
"""

import operator
from functools import partial, reduce

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
        self.name, self.shape = fun.__name__, getattr(value, "shape", "several")  # a list from split, say

    def initialize_root(self, name, shape):
        super().initialize_root()
        self.name, self.shape = f"parameter {name}", shape

    def __repr__(self):
        parents = ", ".join(f"{node.name} {node.shape}" for node in self.parents)
        return f"{self.name} {self.shape}" + (f" <- ({parents})" if parents else "")


notrace_primitives[Node] = notrace_primitives[VJPNode]  # functions without a gradient, such as >


def backward(end_node, g, roots):
    """The gradients at the ``roots`` of the tape, given ``g`` = dL/d(end); None where L does not depend on one."""
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

    ``loss`` returns a scalar, or a scalar and a tree of further numbers to report; then value is that pair.
    Every leaf array becomes a root of the tape of its own: boxing the containers instead would make autograd build a
    zero gradient for the whole tree at every access to an entry (50 ms a step for 150 small arrays, against 10).
    ``weight``, a shard's share of the minibatch, multiplies the gradient, and the gradient only. Do not change
    gradients in place: where two parameters are only added, autograd hands the same array to both.
    """

    def value_and_gradient(params, *args, weight=1.0):
        names = iter(tree.names(params))
        roots = []

        def as_root(leaf):
            roots.append(Node.new_root(next(names), leaf.shape))
            return new_box(leaf, TRACE, roots[-1])

        result = loss(tree.map(as_root, params), *args)
        end = result[0] if isinstance(result, tuple) else result
        if not isbox(end) or end.shape != ():
            raise TypeError("the loss must return a scalar that depends on the parameters")
        gradients = iter(backward(end._node, end.dtype.type(weight), dict.fromkeys(roots)))
        return tree.map(getval, result), tree.map(lambda leaf: zeros_if_none(next(gradients), leaf), params)

    return value_and_gradient


def zeros_if_none(gradient, leaf):
    return leaf * 0 if gradient is None else gradient


def shards(batch, shard_size):
    """Cut a tree of arrays with leading axis N into trees with leading axis ``shard_size`` (or less)."""

    def cut(start):
        return tree.map(lambda array: array[start : start + shard_size], batch)

    return [cut(start) for start in range(0, len(tree.leaves(batch)[0]), shard_size)]


def sharded_value_and_grad(loss, shard_size, workers):
    """``value_and_grad(loss)`` for a loss that is a mean over the images of a minibatch, computed in parallel.

    The shard size alone decides the arithmetic: each shard of ``shard_size`` images is differentiated on its own and
    the parts are added in the order of the shards. Workers only decide who computes which shard, so the result is the
    same to the last bit for any number of them.
    """
    one_shard = value_and_grad(loss)

    def differentiate(job):
        params, shard, weight = job
        value, gradient = one_shard(params, shard, weight=weight)
        return tree.map(lambda number: weight * number, value), gradient

    workers.register(differentiate)

    def value_and_gradient(params, batch):
        N = len(tree.leaves(batch)[0])
        jobs = [(params, shard, len(tree.leaves(shard)[0]) / N) for shard in shards(batch, shard_size)]
        # Added as they come, in order, and not in place: see `value_and_grad`. Without copies: each may be overwritten
        # when the next is asked for.
        return reduce(partial(tree.map, operator.add), workers.map(differentiate, jobs, copy=False))

    return value_and_gradient


def in_parallel(f, shard_size, workers):
    """``f(*arrays)`` computed shard by shard in parallel, for an f that treats each image of its batch on its own.

    Arrays that f refers to and that change between calls must be `Workers.share`d.
    """

    def several_shards(part):
        return [f(*shard) for shard in part]

    workers.register(several_shards)

    def sharded(*arrays):
        cut = shards(arrays, shard_size)
        each = -(-len(cut) // workers.count)  # one question to each worker, rather than one for each shard
        parts = [cut[start : start + each] for start in range(0, len(cut), each)]
        return np.concatenate([result for results in workers.map(several_shards, parts) for result in results])

    return sharded
