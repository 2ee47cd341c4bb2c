"""Checkpoints: one ``.npz`` file with a checksum, without pickle.

It has every array under its path in the tree ("params/down_blocks/0/conv1/w"), a JSON text under "state" with all that
is not an array (configuration, step, the generator's state, the log so far), and a checksum of all of it. A file that
was changed is refused before anything in it is used. So its contents were written by `save`, or by docs/pack.py, and
need no other checks.
"""

import io
import json
import zipfile
import zlib

from scratchgen import tree
from scratchgen.data import UserError
from scratchgen.machinery import parallel
from scratchgen.machinery.files import by_rank_0, crc, replacing

import numpy as np

VERSION = 2  # of the meaning of state and arrays; it is a part of the checksum


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run than this one; the message names it in one line."""


def checksum(archive):
    """The checksum of a zip archive: that of the names, sizes and CRC-32s of its members."""
    members = [(m.filename, m.file_size, m.compress_size, m.compress_type, m.CRC) for m in archive.infolist()]
    return f"scratchgen {VERSION}, CRC-32 {zlib.crc32(str(members).encode()):08x}".encode()


@by_rank_0
def save(path, arrays, state):
    """Write a tree of arrays and a JSON-serialisable ``state`` to ``path``. Raises OSError; then the old file stays."""
    named = dict(zip(tree.names(arrays), tree.leaves(arrays), strict=True))
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:  # savez adds .npz to a name without it
            np.savez(file, state=np.array(json.dumps(state)), **named)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = checksum(archive)


def load(path):
    """The arrays, by name, and the state that `save` wrote. Raises CheckpointError.

    The checksum covers the names, sizes and CRC-32s of the members. zipfile compares each member with its CRC-32 when
    it reads the member. Only then does NumPy parse it, with the sizes in its header.
    """
    if not path.exists():
        command = f"run_vae.py or run_ddpm.py, with --out {path.parent} and without --resume, begins a run"
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file; {command}")
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.comment
            if found != checksum(archive):
                raise ValueError("it was changed, or is of another version")
            named = {m.removesuffix(".npy"): np.load(io.BytesIO(archive.read(m))) for m in archive.namelist()}
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for a damaged file
        words = str(error)[:200] or type(error).__name__  # zipfile quotes a damaged name, of up to 64 KiB
        raise CheckpointError(f"{path}: expected a sound checkpoint of this version, found: {words}") from None
    parallel.ranks_for(workers=1).agree(path, found)
    return named, json.loads(str(named.pop("state")))


def resume(path, config, arrays):
    """Continue from ``path``: copy its arrays into the tree ``arrays`` and return its state.

    ``config`` are the settings that must agree (model, T, ...). Raises CheckpointError, and then nothing was changed.
    """
    named, state = load(path)
    for key, wanted in config.items():
        found = state["config"].get(key)
        if found != wanted:
            why = " (by the end of its epochs the learning rate has fallen to 0)" if key == "epochs" else ""
            raise CheckpointError(
                f"{path}: made with {key} {found}, this run has {key} {wanted}{why}; "
                "resume with the same settings, or start afresh in another --out"
            )
    pairs = list(zip(tree.names(arrays), tree.leaves(arrays), strict=True))
    for name, leaf in pairs:
        if name not in named or named[name].shape != leaf.shape:
            raise CheckpointError(f"{path}: expected an array {name} {leaf.shape}, found none like it")
    for name, leaf in pairs:
        leaf[...] = named[name]
    return state


def fingerprint(images):
    """The number and checksum of images, or of a pair (images, labels), to tell one data set from another."""
    return f"{len(tree.leaves(images)[0])} of CRC-32 {crc(images):08x}"
