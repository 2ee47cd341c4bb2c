"""Checkpoints: one ``.npz`` without pickle.

It has every array under its path in the tree ("params/down_blocks/0/conv1/w"), and under "state" a JSON text with all
that is not an array: configuration, step, the generator's state, the log so far.
"""

import itertools
import json
import os
import zlib
from pathlib import Path

from scratchgen import tree
from scratchgen.machinery.files import replacing

import numpy as np

STATE = ("config", "shard_size", "rng", "step", "seconds", "epoch_means", "log")  # what the state of a run must have


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run than this one; the message names it in one line."""


def save(path, arrays, state):
    """Write a tree of arrays and a JSON-able ``state`` to ``path``. Raises OSError, and the old file stays."""
    named = dict(zip(tree.names(arrays), tree.leaves(arrays), strict=True))
    with replacing(path) as temporary, open(temporary, "wb") as file:  # a name without .npz would not stay as it is
        np.savez(file, state=np.array(json.dumps(state)), **named)


def load(path, keys=STATE):
    """The arrays, by name, and the state that ``save`` wrote, which must have these keys. Raises CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint of scratchgen, found no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        state = json.loads(str(arrays.pop("state")))
        if not isinstance(state, dict) or not set(keys) <= state.keys():
            raise ValueError("it lacks part of a run's state, or is of another version")
    except Exception as error:  # zipfile, NumPy and json each have several for a damaged file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected a sound checkpoint of scratchgen, found: {reason}") from None
    return arrays, state


def resume(path, config, arrays):
    """Continue from ``path``: copy its arrays into the tree ``arrays`` and return its state.

    ``config`` are the settings that must agree (model, T, ...). Raises CheckpointError, and then nothing was changed.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: nothing to resume, there is no such file; leave --resume out to start")
    saved, state = load(path)
    for key, wanted in config.items():
        found = state["config"].get(key)
        if found != wanted:
            raise CheckpointError(
                f"{path}: made with {key} {shown(found)}, this run has {key} {shown(wanted)}; "
                "resume with the same settings, or start afresh in another --out"
            )
    fill(arrays, saved, path)
    return state


def shown(setting):
    return (" ".join(map(str, setting)) or "none") if isinstance(setting, list) else setting


def fill(arrays, saved, path, constant=False):
    """Copy arrays by name into a tree, for good if ``constant``. Raises CheckpointError, and nothing was changed."""
    names, leaves = tree.names(arrays), tree.leaves(arrays)
    for name, leaf in zip(names, leaves, strict=True):
        if name not in saved or saved[name].shape != leaf.shape or saved[name].dtype != leaf.dtype:
            raise CheckpointError(f"{path}: expected an array {name} {leaf.shape} {leaf.dtype}, found none like it")
    for name, leaf in zip(names, leaves, strict=True):
        leaf[...] = saved[name]
        leaf.flags.writeable = not constant


def fingerprint(images):
    """What tells one set of training images from another: their number and checksum, for the checkpoint."""
    return f"{len(images)} of CRC-32 {zlib.crc32(images):08x}"


def put_aside(path):
    """Rename the checkpoint of an earlier run, if there is one, so that a new run in its folder cannot overwrite it."""
    if path.exists():
        numbers = itertools.count(1)
        aside = next(p for n in numbers if not (p := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())
        os.replace(path, aside)
        print(f"kept the checkpoint of an earlier run as {aside}")
