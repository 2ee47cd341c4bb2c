"""What the tests share, and what makes `pytest -k question_1` mean question 1 alone."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    config.option.keyword = re.sub(r"(question_\d+)\b", r"\1_", config.option.keyword)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
