"""Shared by all tests. scratchgen is imported before NumPy, as in the run scripts."""

import scratchgen  # noqa: F401

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)
