"""Reverse-mode differentiation over a tree of parameters, and the same over shards of a minibatch, in parallel.

While the loss runs, autograd keeps each array that depends on a parameter in a box, and records each operation on boxes
as a node that knows its parents and its vector-Jacobian product (VJP). Those nodes are the tape. The backward pass,
`backward` below, is all there is to back-propagation: visit the nodes from the loss to the parameters (its roots), each
after all that depend on it, and hand every parent its share of the gradient.
"""

import operator
from functools import partial, reduce
from itertools import cycle

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
        gradient = tree.map(lambda leaf: leaf * 0 if (g := next(gradients)) is None else g, params)
        return tree.map(getval, result), gradient

    return value_and_gradient


def shards(N, shard_size):
    """The slices that cut N images into shards of ``shard_size``, the last of which may be smaller."""
    return [slice(start, min(start + shard_size, N)) for start in range(0, N, shard_size)]


def images_of(batch, images):  # a tree of arrays with leading axis N -> the same for a slice of the images
    return tree.map(lambda array: array[images], batch)


def sharded_training(loss, update, arrays, shard_size, workers):
    """The two halves of a training step, both shared by all workers: functions ``differentiate`` and ``step``.

    ``differentiate(batch)`` returns ``loss(arrays["params"], batch)``, a mean over the images of the batch, and leaves
    the gradient of each shard in memory that all workers see. ``step(*numbers)`` adds them up in the order of the
    shards and calls ``update(arrays, gradient, *numbers)``, which changes the arrays in place. Every worker does so
    for some of the leaves, so update must treat each on its own. ``arrays`` holds trees like arrays["params"], shared,
    no array twice. The shard size alone decides the arithmetic: for any number of workers the result has the same bits.
    Raises ValueError if ``arrays`` has other leaves.
    """
    one_shard, params = value_and_grad(loss), arrays["params"]
    room, parts, count = {}, [], 0  # of a minibatch; what each worker steps; shards of the last minibatch
    shapes, found = ([leaf.shape for leaf in tree.leaves(trees)] for trees in (params, arrays))
    if found != shapes * (len(found) // len(shapes)):
        raise ValueError("expected nothing in arrays but trees like params, found other leaves")

    def make_room(batch, count):
        room["batch"] = workers.share(tree.map(np.copy, batch))
        room["gradients"] = [workers.share(tree.map(np.zeros_like, params)) for _ in range(count)]
        n = min(workers.count, count)
        owner, number = workers.ranks.shares(params)
        mine = owner == workers.ranks.rank
        everything = arrays, room["gradients"]  # all trees like params, one after the other: hence `cycle`
        parts[:] = [tree.part(everything, cycle(mine & (number % n == k))) for k in range(n)]

    def differentiate_shard(job):
        number, images, N = job
        weight = (images.stop - images.start) / N
        value, gradient = one_shard(params, images_of(room["batch"], images), weight=weight)
        tree.map(np.copyto, room["gradients"][number], gradient)
        return tree.map(lambda value: weight * value, value)

    def differentiate(batch):
        nonlocal count
        N = len(tree.leaves(batch)[0])
        cut = shards(N, shard_size)
        count = len(cut)
        if not room or any(
            old.shape[1:] != new.shape[1:] or old.dtype != new.dtype or len(old) < N
            for old, new in zip(tree.leaves(room["batch"]), tree.leaves(batch), strict=True)
        ):
            make_room(batch, count)
        tree.map(np.copyto, images_of(room["batch"], slice(N)), batch)
        jobs = [(number, images, N) for number, images in enumerate(cut)]
        return reduce(partial(tree.map, operator.add), workers.map(differentiate_shard, jobs))

    def step_part(job):
        part, count, numbers = job
        some_arrays, (gradient, *others) = parts[part]
        for other in others[: count - 1]:
            tree.map(lambda total, term: np.add(total, term, out=total), gradient, other)
        update(some_arrays, gradient, *numbers)

    def step(*numbers):
        workers.ranks.to_owners(room["gradients"][:count])
        workers.map_here(step_part, [(part, count, numbers) for part in range(len(parts))])
        workers.ranks.from_owners(params, params)

    return differentiate, step


def in_parallel(f, shard_size, workers):
    """``f(*arrays)`` computed shard by shard in parallel, for an f that treats each image of its batch on its own."""

    def one_shard(arrays):
        return f(*arrays)

    def sharded(*arrays):
        cut = [images_of(arrays, images) for images in shards(len(arrays[0]), shard_size)]
        return np.concatenate(workers.map(one_shard, cut))

    return sharded
