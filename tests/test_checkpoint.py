"""Checkpoints: what comes back is what was saved, the wrong file is refused, and a failed write loses nothing."""

import io
import json
import struct
import tracemalloc
import zipfile
from contextlib import suppress

from scratchgen import tree
from scratchgen.machinery import checkpoint
from scratchgen.machinery.checkpoint import CheckpointError

import numpy as np
import pytest
from conftest import load, tamper


@pytest.fixture
def arrays(rng):
    params = {"a": [{"w": rng.standard_normal((2, 3), dtype=np.float32)}], "b": np.arange(3, dtype=np.float32)}
    return {"params": params, "moments": {"m": tree.map(np.copy, params)}}


IMAGES = {"train_images": "3 of CRC-32 00000000", "test_images": "3 of CRC-32 00000001"}
CONFIG = {"model": "ddpm", "T": 200, "epochs": 2, "additions": ["v", "black"]} | IMAGES


@pytest.fixture
def path(tmp_path, arrays):
    generator = np.random.default_rng(5)
    state = {"config": CONFIG, "step": 7, "rng": generator.bit_generator.state, "seconds": 0.1 + 0.2}
    state |= {"shard_size": 8, "epoch_means": {"loss": 1 / 3}, "log": [{"epoch": 1}]}
    checkpoint.save(tmp_path / "c.npz", arrays, state)
    return tmp_path / "c.npz"


def test_everything_comes_back_to_the_bit(path, arrays):
    into = tree.map(np.zeros_like, arrays)
    state = checkpoint.resume(path, CONFIG, into)
    tree.map(np.testing.assert_array_equal, into, arrays)
    assert state["step"] == 7 and state["seconds"] == 0.1 + 0.2 and state["epoch_means"] == {"loss": 1 / 3}
    generator = np.random.default_rng()
    generator.bit_generator.state = state["rng"]
    assert generator.random() == np.random.default_rng(5).random()

    named, state = checkpoint.load(path)  # without a tree
    assert list(named) == tree.names(arrays) and state["config"] == CONFIG and state["log"] == [{"epoch": 1}]
    for found, leaf in zip(named.values(), tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(found, leaf, strict=True)


def test_no_pickle_is_needed(path):
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "fU" for name in file.files)
        assert {"params/a/0/w", "params/b", "moments/m/b", "state"} <= set(file.files)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"T": 1000}, "made with T 200, this run has T 1000;"),
        ({"model": "vae"}, "made with model ddpm, this run has model vae;"),
        ({"additions": []}, "made with additions ['v', 'black'], this run has additions [];"),
        ({"epochs": 3}, "made with epochs 2, this run has epochs 3 (by the end of its epochs the learning rate"),
        ({"new": None, "other": 1}, "made with other None, this run has other 1;"),  # of an older version
    ],
)
def test_another_runs_checkpoint_is_refused_in_one_line_and_nothing_read(path, arrays, change, words):
    into = tree.map(np.zeros_like, arrays)
    with pytest.raises(CheckpointError) as error:
        checkpoint.resume(path, CONFIG | change, into)
    assert f"{path}: {words}" in str(error.value) and "\n" not in str(error.value)
    assert not any(leaf.any() for leaf in tree.leaves(into))


@pytest.mark.parametrize(("name", "shape"), [("b", (4,)), ("b", (3, 1)), ("c", (3,))])
def test_an_array_of_another_shape_or_name_is_refused_and_nothing_changed(path, arrays, name, shape):
    into = tree.map(np.zeros_like, arrays)
    into["moments"]["m"][name] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError, match=f"moments/m/{name}"):
        checkpoint.resume(path, CONFIG, into)
    assert not any(leaf.any() for leaf in tree.leaves(into))


def test_missing_and_damaged_checkpoints_are_one_line(path, arrays):
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="expected a sound checkpoint of this version, found: .+"):
            checkpoint.resume(path, CONFIG, arrays)
    path.unlink()
    with pytest.raises(CheckpointError, match="found no such file.*without --resume"):
        checkpoint.resume(path, CONFIG, arrays)
    path.mkdir()
    with pytest.raises(
        CheckpointError, match="expected a sound checkpoint of this version, found: .*directory"
    ) as error:
        checkpoint.resume(path, CONFIG, arrays)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_flipped_byte_gets_through(path, arrays):
    """Each either is noticed, or sits where zip stores nothing of ours, such as a date."""
    content = path.read_bytes()
    _, good_state = checkpoint.load(path)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        into = tree.map(np.zeros_like, arrays)
        try:
            state = checkpoint.resume(path, CONFIG, into)
        except CheckpointError:
            continue
        assert state == good_state
        tree.map(np.testing.assert_array_equal, into, arrays)


def test_a_fingerprint_tells_images_apart():
    images = np.zeros((3, 28, 28, 1), np.uint8)
    other = images.copy()
    other[1, 5, 5] = 1
    assert checkpoint.fingerprint(images).startswith("3 of CRC-32 ")
    assert len({checkpoint.fingerprint(x) for x in (images, other, images[:2])}) == 3
    assert checkpoint.fingerprint([images]) == checkpoint.fingerprint(images)
    labels = [np.array([1, 2, 3], np.uint8), np.array([1, 2, 4], np.uint8)]
    assert len({checkpoint.fingerprint(x) for x in (images, *((images, y) for y in labels))}) == 3


# ---------------------------------------------------------------------- what is in the file is what `save` put there


def test_a_checkpoint_of_another_version_is_refused(path, arrays, monkeypatch):
    named, state = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", checkpoint.VERSION - 1)
        checkpoint.save(path, named, state)
        assert checkpoint.resume(path, CONFIG, arrays) == state
    with pytest.raises(CheckpointError, match="changed, or is of another version"):
        checkpoint.resume(path, CONFIG, arrays)


CHANGES = {  # test_damaged.py makes many more
    "nothing": lambda named, state: (named, state),
    "another step": lambda named, state: (named, state | {"step": 6}),
    "deep JSON": lambda named, state: (named, "[" * 100_000),
    "another number": lambda named, state: (named | {"moments/m/b": np.array([0, 1, 3], np.float32)}, state),
    "another name": lambda named, state: ({name.replace("b", "c"): array for name, array in named.items()}, state),
    "another order": lambda named, state: (dict(reversed(named.items())), state),
    "one less": lambda named, state: ({name: array for name, array in named.items() if name != "params/b"}, state),
}


@pytest.mark.parametrize("keep_checksum", [False, True], ids=["no checksum", "the old checksum"])
@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_what_is_in_the_file_changes_the_checksum(path, arrays, change, keep_checksum):
    tamper(path, *CHANGES[change](*load(path)), keep_checksum)
    into = tree.map(np.zeros_like, arrays)
    if change == "nothing" and keep_checksum:
        assert checkpoint.resume(path, CONFIG, into)["step"] == 7
        return
    with pytest.raises(CheckpointError, match="sound checkpoint of this version.*changed") as error:
        checkpoint.resume(path, CONFIG, into)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not any(leaf.any() for leaf in tree.leaves(into))


# ------------------------------------------------------------------ no file makes us take more memory than it has bytes


def array_of_zeros(path, named, state):
    np.savez_compressed(path, state=json.dumps(state), **named | {"params/b": np.zeros(10**7, np.float32)})


def state_of_blanks(path, named, state):
    np.savez_compressed(path, state=" " * 10**7, **named)


def array_of_4_GB(path, named, state):
    """So its header says, and not the directory of the zip."""
    path.write_bytes(path.read_bytes().replace(b"(3,), }" + 9 * b" ", b"(1000000000,), }"))


def entry_of_4_GB(path, named, state):
    """So the directory says, of both sizes or of the inflated one."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"params/b.npy") - 46  # the fixed part of an entry, its sizes at 20 and 24
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 200)
    path.write_bytes(content)


def member_of_4_GB(path, named, state):
    """So header and directory both say, of the state."""
    np.savez(path, **named)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|S1", "fortran_order": False, "shape": (2**32 - 200,)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("state.npy", header.getvalue())
        member = file.getinfo("state.npy")
        member.file_size = member.compress_size = 2**32 - 200 + len(header.getvalue())
        file.comment = b"\n"  # or the directory would not be written


@pytest.mark.parametrize("keep_checksum", [False, True])
@pytest.mark.parametrize("write", [array_of_zeros, state_of_blanks, array_of_4_GB, entry_of_4_GB, member_of_4_GB])
def test_what_a_file_claims_takes_no_memory(path, arrays, write, keep_checksum):
    with zipfile.ZipFile(path) as file:
        checksum = file.comment
    before = path.read_bytes()
    write(path, *load(path))
    assert path.read_bytes() != before and path.stat().st_size < 20 * len(before)
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path, "a") as file:
        file.comment = checksum if keep_checksum else b""
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="expected a sound checkpoint"):
        checkpoint.resume(path, CONFIG, arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
