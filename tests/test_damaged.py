"""Files that nobody would write: sound idx files, checkpoints, states and metrics.json, changed at random places.

Each is read or refused in one line, and a refused one has changed nothing. No file makes us take more memory than a few
megabytes. Here a few of each; `pytest tests/test_damaged.py --hypothesis-profile=thorough` tries very many.
"""

import gzip
import json
import struct
import tracemalloc
from contextlib import contextmanager

from scratchgen import tree
from scratchgen.data import DataError, load_idx
from scratchgen.machinery import checkpoint, files

import numpy as np
import pytest
from conftest import load, tamper
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=settings.default.max_examples // 4, deadline=None)  # a busy machine is no mistake of ours

IMAGES = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
IDX = bytes([0, 0, 8, 3]) + struct.pack(">III", *IMAGES.shape) + IMAGES.tobytes()
CONFIG = {"model": "toy", "T": 200, "additions": ["v"], "train_images": "3 of CRC-32 00000000"}
ROW = {"epoch": 1, "step": 3, "train_loss": 0.5, "test_loss": 0.6, "seconds": 1.5}
STATE = {"config": CONFIG, "shard_size": 8, "step": 4, "seconds": 2.5, "epoch_means": {"loss": 0.25}, "log": [ROW]}
STATE |= {"rng": np.random.default_rng(5).bit_generator.state}
ARRAYS = {"params": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)]}

SIZES = [struct.pack(order + "I", size) for order in "<>" for size in (0, 1, 2**31, 2**32 - 1)]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("y" * 10_000),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(), value, max_size=3),
    max_leaves=5,
)


@st.composite
def changed_bytes(draw, content):
    """The same bytes, but for one to three places where some are missing, others, or more."""
    for _ in range(draw(st.integers(1, 3))):
        place, gone = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 4, len(content)]))
        content = content[:place] + draw(st.binary(max_size=8) | st.sampled_from(SIZES)) + content[place + gone :]
    return content


@st.composite
def changed_json(draw, value):
    """The same JSON value, but for one place in it that has something odd, is missing, or is there twice."""
    if value and isinstance(value, (dict, list)) and draw(st.integers(0, 6)):
        value = value.copy()
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.integers(0, 6)):
            value[key] = draw(changed_json(value[key]))
        else:
            del value[key]
        return value
    return draw(ANY_JSON | st.just([value, value]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda file: None)  # what is tried is reading
        yield tmp_path_factory.mktemp("damaged") / "file.npz"


@contextmanager
def read_or_refused(path, refusal):
    tracemalloc.start()
    try:
        yield
    except refusal as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4e6


def resume(path):
    """The state and the arrays that are read, if any are. Refused, none is."""
    into = tree.map(np.zeros_like, ARRAYS)
    try:
        return checkpoint.resume(path, CONFIG, into), into
    except checkpoint.CheckpointError:
        assert not any(leaf.any() for leaf in tree.leaves(into))
        raise


@few
@given(st.sampled_from([IDX, gzip.compress(IDX, 1, mtime=0)]).flatmap(changed_bytes))
def test_idx_files(path, content):
    path.write_bytes(content)
    with read_or_refused(path, DataError):
        found = load_idx(path)
        if content.startswith(b"\x1f\x8b"):  # what gzip lets through has the checksum of what was compressed
            np.testing.assert_array_equal(found, IMAGES)


@few
@given(st.data())
def test_checkpoints(path, data):
    checkpoint.save(path, ARRAYS, STATE)
    path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    with read_or_refused(path, checkpoint.CheckpointError):
        state, arrays = resume(path)
        assert state == STATE  # a change that gets through is of what zip stores beside, such as a date
        tree.map(np.testing.assert_array_equal, arrays, ARRAYS)


@few
@given(changed_json(STATE), st.booleans())
def test_states(path, state, keep_checksum):
    """Of a run that is not where the weights are: with the checksum of before, or with none."""
    checkpoint.save(path, ARRAYS, STATE)
    named, _ = load(path)
    tamper(path, named, state, keep_checksum)
    with read_or_refused(path, checkpoint.CheckpointError):
        resume(path)
        assert keep_checksum and json.dumps(state) == json.dumps(STATE), "it was changed, and yet read"


@few
@given(st.data())
def test_metrics(path, data):
    """What cannot be read is kept beside, and what is measured can always be added."""
    path = path.with_name("metrics.json")
    for earlier in path.parent.glob("metrics*.json"):
        earlier.unlink()
    files.write_metrics(path, {"elbo": -240.0, "epochs": 2}, ARRAYS)
    files.add_evaluation(path, ARRAYS, "iwae_5", {"log_likelihood": -235.0}, 0)
    sound = path.read_bytes()
    as_json = changed_json(json.loads(sound)).map(lambda value: json.dumps(value).encode())
    content = data.draw(changed_bytes(sound) | as_json)
    path.write_bytes(content)
    files.add_evaluation(path, ARRAYS, "bound", {"bits": float("nan")}, 1)
    files.write_metrics(path, {"elbo": -239.0}, ARRAYS)

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["elbo"] == -239.0 and found["evaluation"]["bound"] == {"bits": None, "seed": 1}
    aside = [each.read_bytes() for each in path.parent.glob("metrics-*.json")]
    assert aside in ([], [content])
