"""Checkpoints: what comes back is what was saved, the wrong file is refused, and a failed write loses nothing."""

import io
import json
import tracemalloc
import zipfile

from scratchgen import tree
from scratchgen.machinery import checkpoint
from scratchgen.machinery.checkpoint import CheckpointError

import numpy as np
import pytest
from conftest import load


@pytest.fixture
def arrays(rng):
    params = {"a": [{"w": rng.standard_normal((2, 3), dtype=np.float32)}], "b": np.arange(3, dtype=np.float32)}
    return {"params": params, "moments": {"m": tree.map(np.copy, params)}}


IMAGES = {"train_images": "3 of CRC-32 00000000", "test_images": "3 of CRC-32 00000001"}
CONFIG = {"model": "ddpm", "T": 200, "additions": ["v", "black"]} | IMAGES


@pytest.fixture
def path(tmp_path, arrays):
    generator = np.random.default_rng(5)
    state = {"config": CONFIG, "step": 7, "rng": generator.bit_generator.state, "seconds": 0.1 + 0.2}
    state |= {"shard_size": 8}
    state |= {"epoch_means": {"loss": 1 / 3}, "log": [{"epoch": 1}]}
    checkpoint.save(tmp_path / "c.npz", arrays, state)
    return tmp_path / "c.npz"


def test_everything_comes_back_to_the_bit(path, arrays):
    into = tree.map(np.zeros_like, arrays)
    state = checkpoint.resume(path, CONFIG, into)
    for a, b in zip(tree.leaves(arrays), tree.leaves(into), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state["step"] == 7 and state["seconds"] == 0.1 + 0.2 and state["epoch_means"] == {"loss": 1 / 3}
    generator = np.random.default_rng()
    generator.bit_generator.state = state["rng"]
    assert generator.random() == np.random.default_rng(5).random()


def test_no_pickle_is_needed(path):
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "fU" for name in file.files)
        assert {"params/a/0/w", "params/b", "moments/m/b", "state"} <= set(file.files)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("T", 1000, "T 200, this run has T 1000"),
        ("model", "vae", "model ddpm"),
        ("additions", ["v"], "additions v black, this run has additions v"),
        ("additions", [], "additions v black, this run has additions none"),
        ("T", "a\nb", "this run has T a b"),
    ],
)
def test_another_runs_checkpoint_is_refused_in_one_line(path, arrays, key, value, words):
    with pytest.raises(CheckpointError) as error:
        checkpoint.resume(path, CONFIG | {key: value}, arrays)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_array_of_another_shape_is_refused_and_nothing_changed(path, arrays):
    into = tree.map(np.zeros_like, arrays)
    into["moments"]["m"]["b"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError, match="moments/m/b"):
        checkpoint.resume(path, CONFIG, into)
    assert not any(leaf.any() for leaf in tree.leaves(into))


def test_missing_checkpoint(tmp_path, arrays):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        checkpoint.resume(tmp_path / "none.npz", CONFIG, arrays)


OF_AN_EARLIER_VERSION = {"config": CONFIG, "step": 7, "noise": {}, "seconds": 0.0, "sums": {}, "log": []}


@pytest.mark.parametrize("state", [7, [], {}, {"config": CONFIG}, OF_AN_EARLIER_VERSION])
def test_a_checkpoint_without_a_runs_state_is_refused(path, arrays, state):
    checkpoint.save(path, arrays, state)
    with pytest.raises(CheckpointError, match="state"):
        checkpoint.resume(path, CONFIG, arrays)


@pytest.mark.parametrize("key", ["config", "rng", "step", "seconds", "epoch_means", "log"])
def test_no_part_of_a_runs_state_may_be_missing(path, arrays, key):
    _, state = load(path)
    del state[key]
    checkpoint.save(path, arrays, state)
    with pytest.raises(CheckpointError, match="lacks part of a run's state"):
        checkpoint.resume(path, CONFIG, arrays)


def test_an_array_of_another_dtype_is_refused(path, arrays):
    into = tree.map(lambda a: a.astype(np.float64), arrays)
    with pytest.raises(CheckpointError, match="params/a/0/w"):
        checkpoint.resume(path, CONFIG, into)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "byte", "array", "folder"])
def test_damaged_checkpoint_is_refused_in_one_line(path, arrays, damage):
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        content[content.index(b"NUMPY") + 200] ^= 1
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "text": b"hello", "byte": content}[damage]
        )
    with pytest.raises(CheckpointError) as error:
        checkpoint.resume(path, CONFIG, arrays)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_flipped_byte_gets_through(path, arrays):
    """Each either is noticed, or sits where zip stores nothing of ours, such as a date."""
    content, good_state = path.read_bytes(), checkpoint.load_state(path)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        into = tree.map(np.zeros_like, arrays)
        try:
            state = checkpoint.resume(path, CONFIG, into)
        except CheckpointError:
            continue
        assert state == good_state
        for a, b in zip(tree.leaves(arrays), tree.leaves(into), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_failed_write_leaves_the_old_checkpoint(path, arrays, tmp_path):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(path, arrays, {"config": object()})  # no JSON
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_fingerprint_tells_images_apart():
    images = np.zeros((3, 28, 28, 1), np.uint8)
    other = images.copy()
    other[1, 5, 5] = 1
    assert checkpoint.fingerprint(images).startswith("3 of CRC-32 ")
    assert len({checkpoint.fingerprint(x) for x in (images, other, images[:2])}) == 3
    assert checkpoint.fingerprint([images]) == checkpoint.fingerprint(images)
    labels = [np.array([1, 2, 3], np.uint8), np.array([1, 2, 4], np.uint8)]
    assert len({checkpoint.fingerprint(x) for x in (images, *((images, y) for y in labels))}) == 3


RNG = np.random.default_rng(5).bit_generator.state


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("config", [[], 7, None, {"model": "ddpm"}, CONFIG | {"train_images": 7}, CONFIG | {"test_images": "many"}]),
        ("shard_size", [0, -1, 1.5, "8", True, None, 10**30]),
        ("step", [-1, 1.5, "x", True, 10**30, None, []]),
        ("rng", [{}, 7, None, np.random.Generator(np.random.MT19937(0)).bit_generator.state["bit_generator"]]),
        ("rng", [RNG | {"bit_generator": "MT19937"}, RNG | {"state": {}}, RNG | {"has_uint32": "x"}]),
        ("seconds", [-1, "x", None, True, float("nan"), float("inf"), [1]]),
        ("epoch_means", [[], 7, {"loss": "x"}, {"loss": float("nan")}, {"loss": None}, {"loss": {}}]),
        ("log", [{}, 7, [7], [{"epoch": "1"}], [{"epoch": 1}, {"loss": 1}], [[]], [{"epoch": float("inf")}]]),
    ],
)
def test_no_part_of_a_state_is_believed(path, arrays, key, values):
    _, state = load(path)
    for value in values:
        checkpoint.save(path, arrays, state | {key: value})
        with pytest.raises(CheckpointError, match=f"found: {key} is ") as error:
            checkpoint.resume(path, CONFIG, arrays)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, "{", "NaN", '"x"', ""])
def test_a_state_that_is_no_sound_json_is_refused(path, arrays, text):
    named, _ = load(path)
    np.savez(path, state=np.array(text), **named)
    with pytest.raises(CheckpointError, match="sound checkpoint"):
        checkpoint.resume(path, CONFIG, arrays)


def test_no_header_makes_us_read_more_than_the_model_needs(path, arrays):
    named, state = load(path)
    small = path.stat().st_size
    for name, big in (("params/b", np.zeros(10**7, np.float32)), ("state", np.array(" " * 10**7))):
        np.savez_compressed(path, **(named | {"state": np.array(json.dumps(state)), name: big}))
        assert path.stat().st_size < 20 * small
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            checkpoint.resume(path, CONFIG, arrays)
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


def test_numbers_that_are_not_finite_are_refused_and_nothing_changed(path, arrays):
    named, state = load(path)
    named["moments/m/b"][1] = np.nan
    checkpoint.save(path, named, state)
    into = tree.map(np.zeros_like, arrays)
    with pytest.raises(CheckpointError, match="moments/m/b has numbers that are not finite"):
        checkpoint.resume(path, CONFIG, into)
    assert not any(leaf.any() for leaf in tree.leaves(into))


def test_no_directory_of_a_zip_is_believed_either(path, arrays):
    """A state of 4 GiB, as header and directory both say, in a file of a few KB."""
    named, _ = load(path)
    np.savez(path, **named)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|S1", "fortran_order": False, "shape": (2**32 - 200,)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("state.npy", header.getvalue())
        member = file.getinfo("state.npy")
        member.file_size = member.compress_size = 2**32 - 200 + len(header.getvalue())
    with pytest.raises(CheckpointError, match="state is longer than the file"):
        checkpoint.resume(path, CONFIG, arrays)
