"""FashionMNIST from its raw idx files, and shuffled minibatches of it.

The idx format: two zero bytes, one byte for the dtype, one for the rank R, then R big-endian 32-bit sizes, then the
numbers themselves, big-endian, row by row. A header is trusted only if the length of the file agrees with it.
"""

import gzip
import math
import struct
import sys
import warnings
import zlib
from pathlib import Path

from scratchgen import tree

import numpy as np

DATA = Path(__file__).parents[1] / "data"  # beside the run scripts
if not DATA.is_dir():  # the package is installed elsewhere
    DATA = Path("data")
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_RANK = 32  # more than any array has; NumPy stops at 64
READ_BYTES = 1 << 20

# The published files and the CRC-32 of each array's bytes. (Compressed files differ from mirror to mirror.)
FASHION_MNIST = {
    "train-images-idx3-ubyte": 0xAE65DCCD,
    "train-labels-idx1-ubyte": 0x2ED6E46A,
    "t10k-images-idx3-ubyte": 0x12728439,
    "t10k-labels-idx1-ubyte": 0x242BC73F,
}


CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)  # labels 0 to 9

SOURCE = f"--data names the folder of {', '.join(FASHION_MNIST)} (.gz), from github.com/zalandoresearch/fashion-mnist"


class UserError(ValueError):
    """An error that the user can fix. Its message is one line; a notebook shows this line and no traceback."""

    def _render_traceback_(self):  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError):
    """A data file is missing, damaged or of the wrong kind; the message names the file and what was found."""


def load_idx(path):
    """Read one idx file, raw or gzip-compressed, of up to 32 dimensions and any of the format's six dtypes.

    Returns an array of the shape in the header, in native byte order. Raises DataError, one line, for a file that
    cannot be read, is not idx, or is shorter or longer than its header says. Memory is allocated only for bytes that
    exist; reading stops if a gzip file inflates beyond the size in the idx header.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if compressed:
                with gzip.open(raw) as inflated:
                    return read_idx(inflated, path)
            return read_idx(raw, path)
    except EOFError:
        raise DataError(f"{path}: expected a whole gzip file, found that it ends too early") from None
    except zlib.error as error:
        raise DataError(f"{path}: expected a sound gzip file, found damage ({error})") from None
    except OSError as error:  # missing, a folder, unreadable, or gzip's own complaints (a wrong checksum)
        raise DataError(f"{path}: expected a readable idx file, found: {error.strerror or error}") from None


def read_idx(file, path):
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES:
        raise DataError(
            f"{path}: expected an idx file (00 00, a dtype code 08 09 0B 0C 0D 0E, the rank), "
            f"found it to begin with {head.hex(' ').upper() or 'nothing'}"
        )
    dtype = np.dtype(IDX_DTYPES[head[2]])
    rank = head[3]
    if rank > MAX_RANK:
        raise DataError(f"{path}: expected at most {MAX_RANK} dimensions, found {rank} in the header")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path}: expected {rank} dimensions in the header, found the file to end inside them")
    shape = struct.unpack(f">{rank}I", sizes)

    # A size of 0 counts as 1: NumPy has this limit for empty arrays, too.
    if math.prod(size or 1 for size in shape) > sys.maxsize // dtype.itemsize:
        raise DataError(f"{path}: expected sizes that fit into memory, found {shape} in the header")
    expected = math.prod(shape) * dtype.itemsize
    content = bytearray()
    while len(content) <= expected and (block := file.read(min(READ_BYTES, expected + 1 - len(content)))):
        content += block
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(content):,}"
        raise DataError(f"{path}: expected {expected:,} bytes after the header, for shape {shape}, found {found}")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def class_number(name):
    """The label of a class, from its number or its name; case and plural do not matter. Raises UserError."""
    found = int(name) if str(name) in [*"0123456789"] else LABELS.get(letters(str(name)))
    if found is None:
        raise UserError(f"{name}: expected a class by number or name: {NUMBERED_CLASSES}")
    return found


def letters(name):
    return "".join(letter for letter in name.lower() if letter.isalnum())


NUMBERED_CLASSES = ", ".join(f"{label} {name}" for label, name in enumerate(CLASSES))
LABELS = {name: label for label, name in enumerate(CLASSES)} | {
    "T-shirt/top": 0,
    "ankle boot": 9,
}  # the data set's names
LABELS = {letters(name) + plural: label for name, label in LABELS.items() for plural in ("", "s", "es")}


def find_file(folder, name):
    for candidate in (f"{name}.gz", name, f"{dotted(name)}.gz", dotted(name)):
        if (folder / candidate).exists():
            return folder / candidate
    raise DataError(f"{folder / name}.gz: expected this file (or the same without .gz), found neither; {SOURCE}")


def dotted(name):  # some copies of the data set name their files so
    return name.replace("-idx", ".idx")


def load_fashion_mnist(folder=DATA, labels=True):
    """The files in ``folder``, as a dict of uint8 arrays.

    "train_images" and "test_images" are (N, 28, 28, 1), "train_labels" and "test_labels" are (N,) in 0..9; without
    ``labels`` their files are not read. Raises DataError; warns if the files are valid but are not the published
    FashionMNIST.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with the FashionMNIST files, found no such folder; {SOURCE}")
    arrays = {}
    strangers = []
    for name, checksum in FASHION_MNIST.items():
        part = "train" if name.startswith("train") else "test"
        kind = "images" if "images" in name else "labels"
        if kind == "labels" and not labels:
            continue
        path = find_file(folder, name)
        array = load_idx(path)
        size = (28, 28) if kind == "images" else ()
        if array.dtype != np.uint8 or array.ndim == 0 or array.shape[1:] != size:
            wanted = "uint8 (N, 28, 28)" if kind == "images" else "uint8 (N,)"
            raise DataError(f"{path}: expected {kind}, {wanted}, found {array.dtype} {array.shape}")
        if len(array) == 0:
            raise DataError(f"{path}: expected {kind}, at least one, found none")
        if zlib.crc32(array) != checksum:
            strangers.append(path.name)
        if kind == "images":
            arrays[f"{part}_images"] = array[..., None]
            continue
        if array.max() > 9:
            raise DataError(f"{path}: expected labels 0 to 9, found {array.max()}")
        count = len(arrays[f"{part}_images"])
        if len(array) != count:
            raise DataError(f"{path}: expected a label for each of {count:,} images, found {len(array):,}")
        arrays[f"{part}_labels"] = array
    if strangers:
        warnings.warn(f"{folder}: not the published FashionMNIST (plain MNIST?): {', '.join(strangers)}", stacklevel=2)
    return arrays


def first_images(images, count, flag="--train-images"):
    """The first ``count`` images, or pairs of images and labels; None: all. Raises UserError if there are fewer."""
    there = len(tree.leaves(images)[0])
    if count is not None and count > there:
        raise UserError(f"{flag} {count} is out of range, there are {there} images")
    return tree.map(lambda array: array[:count], images)


def scale(images, low, high):
    """uint8 images to float32 with 0 -> low and 255 -> high; any shape."""
    scaled = images.astype(np.float32)
    scaled *= (high - low) / 255
    scaled += low
    return scaled


def minibatches(images, batch_size, rng, skip=0):
    """Yield all images once, in random order, in (batch_size, H, W, C) arrays; the last one may be smaller.

    For a pair (images, labels) it yields pairs. The order is drawn from ``rng`` when the first batch is requested. The
    first ``skip`` batches are left out, for a run that resumes inside an epoch.
    """
    order = rng.permutation(len(tree.leaves(images)[0]))
    for start in range(skip * batch_size, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield tree.map(lambda array: array[chosen], images)  # noqa: B023  called before the next turn
