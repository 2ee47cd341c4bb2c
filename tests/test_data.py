"""The idx reader: what it must read, and every way in which a file can be wrong. Then the dataset and its batches."""

import gzip
import struct
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

from scratchgen import data
from scratchgen.data import DataError, UserError, first_images, load_fashion_mnist, load_idx

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array, code=None, sizes=None):
    """The bytes of an idx file, written from the format's description and not with the code under test."""
    array = np.asarray(array)
    code = CODES[array.dtype.str[1:]] if code is None else code
    sizes = array.shape if sizes is None else sizes
    header = bytes([0, 0, code, len(sizes)]) + b"".join(struct.pack(">I", size) for size in sizes)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def complaint(path, content=None):
    """The message of the one DataError; it must be one line and name the file."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_idx(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and "expected" in message and "found" in message
    return message


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", CODES)
@settings(max_examples=settings.default.max_examples // 10, deadline=None)  # a busy machine is no mistake of ours
@given(st.lists(st.integers(0, 3), max_size=6), st.booleans())
def test_every_dtype_rank_and_shape_raw_and_compressed(tmp_path_factory, dtype, shape, compressed):
    path = tmp_path_factory.mktemp("idx") / "x"
    array = (127 - np.arange(np.prod(shape, dtype=int)).reshape(shape)).astype(dtype)
    array.flat[:1] = 0 if dtype == "u1" else -128
    path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    found = load_idx(path)
    assert found.shape == tuple(shape) and found.dtype == np.dtype(dtype) and found.dtype.isnative
    np.testing.assert_array_equal(found, array)


# ------------------------------------------------------------------------------------------------------------- faults

IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "nothing"),
        (b"\0\0\x08", "00 00 08"),
        (b"\1\0\x08\1\0\0\0\1a", "01 00 08 01"),
        (b"\x89PNG\r\n", "89 50 4E 47"),
        (idx(IMAGE, code=0x0A), "00 00 0A 02"),  # no such dtype
        (idx(IMAGE)[:9], "2 dimensions"),  # ends inside the header
        (idx(IMAGE)[:-1], "12 bytes after the header, for shape (3, 4), found 11"),
        (idx(IMAGE)[:12], "found 0"),
        (idx(IMAGE) + b"\0", "found more"),
        (idx(IMAGE, code=0x0C), "48 bytes"),  # the wrong dtype
        (idx(IMAGE, sizes=(3, 5)), "15 bytes"),
        (idx(IMAGE, sizes=[1] * 200), "200"),
        (idx(IMAGE[:0], sizes=(0, 2**32 - 1, 2**32 - 1, 2**32 - 1)), "fit into memory"),
    ],
)
def test_damaged_content(tmp_path, content, words, compress):
    assert words in complaint(tmp_path / "x", compress(content))


def test_missing_file_and_folder_in_its_place(tmp_path):
    assert "No such file" in complaint(tmp_path / "nowhere")
    assert "directory" in complaint(tmp_path)


NOISE = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)))


@pytest.mark.parametrize("place", [2, 11, 500, -6, -2])  # method, start and middle of the stream, checksum, length
def test_damaged_gzip(tmp_path, place):
    complaint(tmp_path / "x", NOISE[:place])
    complaint(tmp_path / "x", NOISE[:place] + bytes([NOISE[place] ^ 0xFF]) + NOISE[place:][1:])


@pytest.mark.parametrize("compress", [bytes, partial(gzip.compress, compresslevel=1)])
def test_memory_is_taken_for_what_a_header_says_and_the_file_has_and_for_no_more(tmp_path, compress):
    claims, bomb = idx(IMAGE, sizes=(2**31, 2**31, 3)), idx(IMAGE) + bytes(3 * 10**7)
    for content, words in ((claims, "expected"), (bomb, "found more")):
        content = compress(content)
        tracemalloc.start()
        assert words in complaint(tmp_path / "x", content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16e6


# ------------------------------------------------------------------------------------------------------------ dataset

TRAIN, TEST = 5, 3


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))  # one compressed, one not
    return tmp_path


def test_the_files_in_data_are_the_published_ones(recwarn):
    arrays = load_fashion_mnist(Path(__file__).parent.parent / "data")
    assert not recwarn
    assert arrays["train_images"].shape == (60_000, 28, 28, 1) and arrays["test_images"].shape == (10_000, 28, 28, 1)
    assert arrays["test_images"].dtype == np.uint8
    assert arrays["test_labels"][:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # an ankle boot first
    assert np.bincount(arrays["train_labels"]).tolist() == [6000] * 10
    assert arrays["train_images"].mean() / 255 == pytest.approx(0.2860, abs=5e-5)  # as commonly quoted for normalising


def test_files_that_are_not_the_published_ones_are_named_in_one_line_of_warning(folder, monkeypatch, recwarn):
    """Each of the four has a checksum: of its numbers, compressed or not."""
    all_four = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte"
    with pytest.warns(UserWarning, match=f": {all_four}$"):
        load_fashion_mnist(folder)
    sums = {name: zlib.crc32(load_idx(data.find_file(folder, name)).tobytes()) for name in data.FASHION_MNIST}
    monkeypatch.setattr(data, "FASHION_MNIST", sums)
    arrays = load_fashion_mnist(folder)
    assert not recwarn and arrays["train_images"].shape == (TRAIN, 28, 28, 1) and arrays["test_labels"].shape == (TEST,)
    for name in sums:
        path = data.find_file(folder, name)
        sound, array = path.read_bytes(), load_idx(path)
        array.flat[-1] ^= 1
        path.write_bytes(idx(array))
        with pytest.warns(UserWarning) as record:
            load_fashion_mnist(folder)
        assert str(record[0].message) == f"{folder}: not the published FashionMNIST (plain MNIST?): {path.name}"
        assert len(record) == 1
        path.write_bytes(sound)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("train-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8), "label for each of 4 images, found 5"),
        ("t10k-labels-idx1-ubyte", np.zeros(2, np.uint8), "label for each of 3 images, found 2"),
        ("train-images-idx3-ubyte", np.zeros((5, 28, 27), np.uint8), "(5, 28, 27)"),
        ("train-images-idx3-ubyte", np.zeros((5, 784), np.uint8), "(5, 784)"),
        ("train-images-idx3-ubyte", np.zeros((5, 28, 28), np.float32), "float32"),
        ("t10k-images-idx3-ubyte", np.arange(3, dtype=np.uint8), "expected images"),  # labels in the place of images
        ("t10k-labels-idx1-ubyte", np.zeros((3, 28, 28), np.uint8), "expected labels"),
        ("t10k-labels-idx1-ubyte", np.array([1, 10, 2], np.uint8), "labels 0 to 9, found 10"),
        ("t10k-labels-idx1-ubyte", np.array(3, np.uint8), "found uint8 ()"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8), "at least one"),
    ],
)
def test_files_that_do_not_belong_where_they_are(folder, name, array, words):
    for old in folder.glob(f"{name}*"):
        old.unlink()
    (folder / name).write_bytes(idx(array))
    with pytest.raises(DataError) as error:
        load_fashion_mnist(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_missing_file(folder):
    with pytest.raises(DataError, match="no such folder"):
        load_fashion_mnist(folder / "nowhere")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz: .* found neither"):
        load_fashion_mnist(folder)


def test_labels_are_the_published_ones():
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    for label, (name, ours) in enumerate(zip(names, data.CLASSES, strict=True)):
        assert ours.lower() in name.lower()
        assert {data.class_number(word) for word in (name, ours, label, str(label))} == {label}


# ------------------------------------------------------------------------------------------------------------ batches


def test_scale_maps_the_ends_of_the_range():
    pixels = np.array([0, 51, 255], np.uint8)
    np.testing.assert_allclose(data.scale(pixels, -1, 1), [-1, -0.6, 1], atol=1e-6)
    assert data.scale(pixels, 0, 1).dtype == np.float32 and data.scale(pixels, 0, 1).max() == 1


def test_the_first_images_are_all_or_as_many_as_there_are():
    images, labels = np.arange(5), np.arange(5) + 7
    for count, expected in ((None, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (2, [0, 1])):
        assert first_images(images, count).tolist() == expected
        first, told = first_images((images, labels), count)
        assert first.tolist() == expected and (told - 7).tolist() == expected
        assert first_images((images, None), count)[1] is None
    with pytest.raises(UserError, match="^--train-images 6 is out of range, there are 5 images$"):
        first_images(images, 6)
    with pytest.raises(UserError, match="^--bound 6 is"):
        first_images((images, None), 6, "--bound")


@pytest.mark.parametrize("batch_size", [1, 4, 10, 100])
def test_an_epoch_shows_every_image_once_in_another_order_and_with_its_label(batch_size):
    images, labels = np.arange(10), np.arange(10) % 3
    shown, orders = [], []
    for seed in (0, 1):
        pairs = list(data.minibatches((images, labels), batch_size, np.random.default_rng(seed)))
        assert [len(x) for x, _ in pairs[:-1]] == [batch_size] * (len(pairs) - 1)
        for x, told in pairs:
            np.testing.assert_array_equal(told, x % 3)
        shown.append([x.tolist() for x, _ in pairs])
        orders.append(sum(shown[-1], []))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1] != list(range(10))
    alone = data.minibatches(images, batch_size, np.random.default_rng(1))
    assert [x.tolist() for x in alone] == shown[1]
    for skip in (1, 2):  # the rest are as they were
        rest = data.minibatches(images, batch_size, np.random.default_rng(1), skip=skip)
        assert [x.tolist() for x in rest] == shown[1][skip:]


def test_copies_that_are_named_with_a_dot_and_labels_that_nobody_needs(small_data, tmp_path):
    for path in small_data.iterdir():
        if "images" in path.name:
            (tmp_path / path.name.replace("-idx3", ".idx3")).write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(tmp_path, labels=False)
    assert data.keys() == {"train_images", "test_images"} and len(data["test_images"]) == 40
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz: expected this file") as error:
        load_fashion_mnist(tmp_path)
    assert "zalandoresearch/fashion-mnist" in str(error.value) and "\n" not in str(error.value)
