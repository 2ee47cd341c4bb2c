"""Trees: nested dicts, lists and tuples whose leaves are arrays (or anything else that is not a container).

Parameters, gradients, optimiser moments and minibatches are all trees, so that one ``map`` serves them all. None is a
tree without leaves.
"""


def leaves(tree):
    """The leaves in order: dicts in insertion order, lists and tuples by position."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for child in tree.values() for leaf in leaves(child)]
    if isinstance(tree, (list, tuple)):
        return [leaf for child in tree for leaf in leaves(child)]
    return [tree]


def map(f, tree, *others):  # noqa: A001  always called as tree.map
    """``f`` applied to each leaf of ``tree`` and the leaves at the same place in ``others``; same structure."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: map(f, child, *[other[key] for other in others]) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map(f, *children) for children in zip(tree, *others, strict=True)])
    return f(tree, *others)


def names(tree, prefix=""):
    """The path of each leaf, in the order of ``leaves``: ``{"w": a, "b": [c, d]}`` -> ``["w", "b/0", "b/1"]``."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        return [prefix]
    return [name for key, child in children for name in names(child, f"{prefix}/{key}" if prefix else str(key))]


def nested(named):
    """The tree with these `names` of leaves: ``{"w": a, "b/0": c, "b/1": d}`` -> ``{"w": a, "b": [c, d]}``."""
    children = {}
    for name, leaf in named.items():
        key, _, rest = name.partition("/")
        if rest:
            children.setdefault(key, {})[rest] = leaf
        else:
            children[key] = leaf
    children = {key: nested(child) if isinstance(child, dict) else child for key, child in children.items()}
    return list(children.values()) if "0" in children else children


def size(tree):
    """The number of array elements in all leaves together."""
    return sum(leaf.size for leaf in leaves(tree))
