"""Checkpoints: one ``.npz`` without pickle.

It has every array under its path in the tree ("params/down_blocks/0/conv1/w"), and under "state" a JSON text with all
that is not an array: configuration, step, the generator's state, the log so far.
"""

import json
import math
import os
import re
import zipfile
import zlib
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from reprlib import repr as short

from scratchgen import tree
from scratchgen.data import UserError
from scratchgen.machinery import parallel
from scratchgen.machinery.files import by_rank_0, replacing

import numpy as np


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run than this one; the message names it in one line."""


# ------------------------------------------------------------------------- what the state of a run must have, and how


def whole(low, high=2**53):
    return lambda value: type(value) is int and low <= value <= high


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # which NaN is not, either


def are_numbers(value):  # by name
    return isinstance(value, dict) and all(map(is_number, value.values()))


def are_rows(value):
    return isinstance(value, list) and all(are_numbers(row) and row.keys() == value[0].keys() for row in value)


def is_generator(value):
    try:
        np.random.PCG64(0).state = value
    except Exception:  # NumPy has several
        return False
    return True


def are_settings(value):
    images = [value.get(f"{part}_images") for part in ("train", "test")] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) and re.fullmatch(FINGERPRINT, text) for text in images) and "model" in value


FINGERPRINT = r"[0-9]{1,12} of CRC-32 [0-9a-f]{8}"
STATE = {
    "config": are_settings,
    "shard_size": whole(1),
    "rng": is_generator,
    "step": whole(0),
    "seconds": lambda value: is_number(value) and value >= 0,
    "epoch_means": are_numbers,
    "log": are_rows,
}


def check(state, schema):
    """Raise ValueError unless the state has all that the schema names, and each as it must be."""
    if not isinstance(state, dict) or not schema.keys() <= state.keys():
        raise ValueError("it lacks part of a run's state, or is of another version")
    for name, is_sound in schema.items():
        if not is_sound(state[name]):
            raise ValueError(f"{name} is {short(state[name])}")


# ------------------------------------------------------------------------------------------------------- write and read


@by_rank_0
def save(path, arrays, state):
    """Write a tree of arrays and a JSON-able ``state`` to ``path``. Raises OSError, and the old file stays."""
    named = dict(zip(tree.names(arrays), tree.leaves(arrays), strict=True))
    with replacing(path) as temporary, open(temporary, "wb") as file:  # a name without .npz would not stay as it is
        np.savez(file, state=np.array(json.dumps(state)), **named)


@contextmanager
def opened(path):
    """The checkpoint, as the zip archive that it is; whatever is wrong with it becomes a CheckpointError."""
    if not Path(path).exists():
        raise CheckpointError(f"{path}: expected a checkpoint of scratchgen, found no such file")
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, NumPy and json each have several for a damaged file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected a sound checkpoint of scratchgen, found: {reason}") from None


def read(file, name, like=None):
    """An array of the archive, None if it is not ``like`` that one; no header makes us read more than is there."""
    member = file.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, as no checkpoint is")
    if member.file_size > os.path.getsize(file.filename):
        raise ValueError(f"{name} is longer than the file")
    with file.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} has another version of NumPy's format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError(f"{name} has another length than its header says")
        if like is not None and (shape, dtype) != (like.shape, like.dtype):
            return None
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


def load_state(path):
    """The state that ``save`` wrote, checked. Raises CheckpointError."""
    with opened(path) as file:
        state = json.loads(str(read(file, "state")))
        check(state, STATE)
    return state


def resume(path, config, arrays):
    """Continue from ``path``: copy its arrays into the tree ``arrays`` and return its state.

    ``config`` are the settings that must agree (model, T, ...). Raises CheckpointError, and then nothing was changed.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: nothing to resume, there is no such file; leave --resume out to start")
    state = load_state(path)
    for key, wanted in config.items():
        found = state["config"].get(key)
        if found != wanted:
            raise CheckpointError(
                f"{path}: made with {key} {shown(found)}, this run has {key} {shown(wanted)}; "
                "resume with the same settings, or start afresh in another --out"
            )
    fill(arrays, path)
    return state


def shown(setting):
    words = " ".join(map(str, setting)) or "none" if isinstance(setting, list) else str(setting)
    return " ".join(words.split())[:200]  # whatever stood in the file


def fill(arrays, path, constant=False):
    """Copy arrays by name into a tree, for good if ``constant``. Raises CheckpointError, and nothing was changed."""
    leaves, found = tree.leaves(arrays), []
    with opened(path) as file:
        members = set(file.namelist())
        for name, leaf in zip(tree.names(arrays), leaves, strict=True):
            array = read(file, name, leaf) if f"{name}.npy" in members else None
            if array is None:
                words = f"expected an array {name} {leaf.shape} {leaf.dtype}, found none like it"
                raise CheckpointError(f"{path}: {words}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has numbers that are not finite")
            found.append(array)
    parallel.ranks_for(workers=1).agree(path, fingerprint(found))
    for leaf, array in zip(leaves, found, strict=True):
        leaf[...] = array
        leaf.flags.writeable = not constant


def fingerprint(images):
    """What tells one set of images, or pair of images and labels, from another: their number and checksum."""
    arrays = tree.leaves(images)
    checksum = reduce(lambda checksum, array: zlib.crc32(array, checksum), arrays, 0)
    return f"{len(arrays[0])} of CRC-32 {checksum:08x}"
