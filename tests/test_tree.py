"""Trees of parameters: leaves, names and map agree on one order, and nesting survives."""

from scratchgen import tree
from scratchgen.optim import init_moments

import numpy as np
import pytest
from test_layers import NETWORKS

EXAMPLE = {"w": 1, "b": [2, (3, {"c": 4})], "empty": {}, "a": 5}
PART = {"w": 1, "b": [None, (None, {"c": 4})], "empty": {}, "a": None}  # of EXAMPLE: None in place of three leaves


def test_leaves_and_names_come_in_the_same_order_and_none_is_a_tree_without_leaves():
    assert tree.leaves(EXAMPLE) == [1, 2, 3, 4, 5]
    assert tree.names(EXAMPLE) == ["w", "b/0", "b/1/0", "b/1/1/c", "a"]
    assert tree.leaves(PART) == [1, 4] and tree.names(PART) == ["w", "b/1/1/c"]
    assert tree.leaves(None) == tree.names(None) == [] and tree.size(None) == 0
    assert tree.size({"w": np.zeros((2, 3)), "b": [None, np.zeros(4)]}) == 10


def test_map_keeps_structure_and_pairs_leaves_by_place():
    doubled = tree.map(lambda x: 2 * x, EXAMPLE)
    assert doubled == {"w": 2, "b": [4, (6, {"c": 8})], "empty": {}, "a": 10}
    shuffled_keys = {"a": 50, "empty": {}, "b": [20, (30, {"c": 40})], "w": 10}
    assert tree.leaves(tree.map(lambda x, y: x + y, EXAMPLE, shuffled_keys)) == [11, 22, 33, 44, 55]
    with pytest.raises(ValueError):
        tree.map(lambda x, y: x, [1, 2], [1])


def test_map_passes_over_none_and_leaves_it_where_it_is():
    seen = []
    found = tree.map(lambda *pair: seen.append(pair) or sum(pair), PART, EXAMPLE)
    assert found == {"w": 2, "b": [None, (None, {"c": 8})], "empty": {}, "a": None}
    assert seen == [(1, 1), (4, 4)]  # in the order of the leaves, each with its own
    assert tree.map(lambda x, y: 1 / 0, [None, None], [{"a": 1}, 2]) == [None, None]  # whatever stands beside it


# -------------------------------------------------------------------------------------------------------------- nested


def same_structure(one, other):
    """Whether both have the same containers, keys in the same order, and the very same arrays as leaves."""
    if isinstance(one, dict):
        return isinstance(other, dict) and [*one] == [*other] and all(same_structure(one[k], other[k]) for k in one)
    if isinstance(one, list):
        same = isinstance(other, list) and len(one) == len(other)
        return same and all(same_structure(a, b) for a, b in zip(one, other, strict=True))
    return one is other


def test_nested_makes_lists_of_numbers_and_dicts_of_other_names():
    assert tree.nested({"w": 1, "b/0": 2, "b/1": 3}) == {"w": 1, "b": [2, 3]}
    assert tree.nested({"a/0/0/w": 1, "a/0/1/w": 2, "a/1/0/w": 3}) == {"a": [[{"w": 1}, {"w": 2}], [{"w": 3}]]}
    assert tree.nested({"0": 1, "1": 2}) == [1, 2] and tree.nested({}) == {}
    more_than_ten = {f"layers/{number}/w": number for number in range(12)}
    assert tree.nested(more_than_ten) == {"layers": [{"w": number} for number in range(12)]}


@pytest.mark.parametrize("network", NETWORKS)
def test_nested_is_the_inverse_of_names_and_leaves_for_each_network(network, rng):
    params = NETWORKS[network][0](rng)
    arrays = {"params": params, "moments": init_moments(params)}
    found = tree.nested(dict(zip(tree.names(arrays), tree.leaves(arrays), strict=True)))
    assert same_structure(found, arrays)
    assert len(tree.leaves(found)) == len(tree.names(arrays)) > 10
