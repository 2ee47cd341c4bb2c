"""Shared by all tests. scratchgen is imported before NumPy, as in the run scripts."""

import struct
from pathlib import Path

from scratchgen import diffusion
from scratchgen.data import load_fashion_mnist

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=diffusion.SCHEDULES)
def schedule(request):
    return diffusion.make_schedule(request.param, 200)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The first images of FashionMNIST as idx files: 200 to train on, 40 to test with."""
    arrays, folder = load_fashion_mnist(ROOT / "data"), tmp_path_factory.mktemp("data")
    for part, name, count in (("train", "train", 200), ("test", "t10k", 40)):
        images, labels = arrays[f"{part}_images"][:count, ..., 0], arrays[f"{part}_labels"][:count]
        header = bytes([0, 0, 8, 3]) + struct.pack(">III", *images.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", count) + labels.tobytes()
        )
    return folder
