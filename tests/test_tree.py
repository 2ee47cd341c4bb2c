"""Trees of parameters: leaves, names and map agree on one order, and nesting survives."""

from scratchgen import tree

import numpy as np
import pytest

EXAMPLE = {"w": 1, "b": [2, (3, {"c": 4})], "empty": {}, "a": 5}


def test_leaves_and_names_come_in_the_same_order():
    assert tree.leaves(EXAMPLE) == [1, 2, 3, 4, 5]
    assert tree.names(EXAMPLE) == ["w", "b/0", "b/1/0", "b/1/1/c", "a"]


def test_map_keeps_structure_and_pairs_leaves_by_place():
    doubled = tree.map(lambda x: 2 * x, EXAMPLE)
    assert doubled == {"w": 2, "b": [4, (6, {"c": 8})], "empty": {}, "a": 10}
    shuffled_keys = {"a": 50, "empty": {}, "b": [20, (30, {"c": 40})], "w": 10}
    assert tree.leaves(tree.map(lambda x, y: x + y, EXAMPLE, shuffled_keys)) == [11, 22, 33, 44, 55]


def test_map_refuses_trees_of_different_length():
    with pytest.raises(ValueError):
        tree.map(lambda x, y: x, [1, 2], [1])


PART = {"w": 1, "b": [None, (None, {"c": 4})], "empty": {}, "a": None}  # of EXAMPLE: None in place of three leaves


def test_none_is_a_tree_without_leaves():
    assert tree.leaves(None) == tree.names(None) == [] and tree.size(None) == 0
    assert tree.map(lambda x: 1 / 0, None, "anything") is None
    assert tree.leaves(PART) == [1, 4] and tree.names(PART) == ["w", "b/1/1/c"]


def test_map_passes_over_none_and_leaves_it_where_it_is():
    seen = []

    def add(x, y):
        seen.append((x, y))
        return x + y

    assert tree.map(add, PART, EXAMPLE) == {"w": 2, "b": [None, (None, {"c": 8})], "empty": {}, "a": None}
    assert seen == [(1, 1), (4, 4)]  # in the order of the leaves, each with its own
    nothing = tree.map(lambda x, y: 1 / 0, [None, None], [{"a": 1}, 2])  # whatever stands beside it
    assert nothing == [None, None]


def test_size_counts_elements():
    assert tree.size({"w": np.zeros((2, 3)), "b": [np.zeros(4)]}) == 10
    assert tree.size({"w": np.zeros((2, 3)), "b": [None, np.zeros(4)]}) == 10
