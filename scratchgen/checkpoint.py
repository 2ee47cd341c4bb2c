"""Files that survive a crash: written beside and renamed, so that a reader finds the old file or the new, whole.

A checkpoint is one ``.npz`` without pickle: every array under its path in the tree ("params/down/0/conv1/w"), and under
"state" a JSON text with all that is not an array: configuration, step, the generator's state, the log so far.
Beside it lie ``log.csv`` and ``metrics.json``, written in the same way.
"""

import csv
import io
import itertools
import json
import os
import shlex
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

from scratchgen import tree

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run than this one; the message names it in one line."""


@contextmanager
def replacing(path):
    """Give a temporary path in the same folder; when the block ends well, flush it to disk and rename it to ``path``.

    When it does not, whatever was at ``path`` is still there, and the temporary file is not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")  # same suffix: savez and savefig go by it
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the user asked for this file, and never heard of the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path, arrays, state):
    """Write a tree of arrays and a JSON-able ``state`` to ``path``. Raises OSError, and the old file stays."""
    named = dict(zip(tree.names(arrays), tree.leaves(arrays), strict=True))
    with replacing(path) as temporary, open(temporary, "wb") as file:  # a name without .npz would not stay as it is
        np.savez(file, state=np.array(json.dumps(state)), **named)


def load(path, keys=("config", "noise", "step", "seconds", "sums", "log")):
    """The arrays, by name, and the state that ``save`` wrote, which must have these keys. Raises CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint of scratchgen, found no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        state = json.loads(str(arrays.pop("state")))
        if not isinstance(state, dict) or not set(keys) <= state.keys():
            raise ValueError("it lacks part of a run's state")
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
                f"{path}: made with {key} {found}, this run has {key} {wanted}; "
                "resume with the same settings, or start afresh in another --out"
            )
    fill(arrays, saved, path)
    return state


def fill(arrays, saved, path):
    """Copy arrays, by name, into the tree ``arrays``. Raises CheckpointError, and then nothing was changed."""
    names, leaves = tree.names(arrays), tree.leaves(arrays)
    for name, leaf in zip(names, leaves, strict=True):
        if name not in saved or saved[name].shape != leaf.shape or saved[name].dtype != leaf.dtype:
            raise CheckpointError(f"{path}: expected an array {name} {leaf.shape} {leaf.dtype}, found none like it")
    for name, leaf in zip(names, leaves, strict=True):
        leaf[...] = saved[name]


def settings(args):
    """The flags that decide what a run computes, for its checkpoint: a run resumes only with the same ones."""
    others = {"workers", "data", "out", "resume", "latents"}
    return {name: value for name, value in vars(args).items() if name not in others}


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


held = []  # the open folder that this process has locked, if any


def hold(folder):
    """Lock a folder until this process ends, so that two runs cannot overwrite each other's files.

    Raises CheckpointError if another process holds it.
    """
    let_go()
    if fcntl:
        held.append(os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another run is at work there; give this one another --out") from None
        except OSError:  # a file system without locks
            pass


def let_go():
    while held:
        os.close(held.pop())


if fcntl:
    os.register_at_fork(after_in_child=let_go)  # or a worker that outlives its run would hold the folder on


def begin(path, config, arrays, noise, resuming):
    """Start a run, or take one up again: return its ``state`` and a function that saves the whole run to ``path``.

    The run is ``arrays``, a tree that its steps change in place; ``noise``, the generator that they draw from; and
    ``state``, a JSON-able dict: the step (0 at the start), the seconds, the sums of the epoch so far, and the log.
    """
    hold(path.parent)
    if resuming:
        state = resume(path, config, arrays)
        noise.bit_generator.state = state["noise"]
    else:
        put_aside(path)
        state = {"config": config, "step": 0, "seconds": 0.0, "sums": {}, "log": []}

    def save_run():
        save(path, arrays, state | {"noise": noise.bit_generator.state})

    if not resuming:
        save_run()  # a disk that cannot be written is found out now, and from here on there is something to resume
    return state, save_run


def write_log(path, rows):
    """``log.csv``: one row an epoch, the keys of the first row as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_metrics(args, numbers, params, state):
    """``metrics.json``: the model's own numbers, and what it took to get them.

    What `scratchgen.evaluate` added for the same ``params``, under "evaluation", stays.
    """
    about = {
        "seconds": round(state["seconds"], 1),  # of training and its evaluation, over all the sittings of a resumed run
        "epochs": len(state["log"]),
        "seed": args.seed,
        "parameters": tree.size(params),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    path = args.out / "metrics.json"
    earlier = {k: v for k, v in read_metrics(path, params).items() if k in ("weights", "evaluation")}
    write_text(path, json.dumps(numbers | about | earlier, indent=2) + "\n")


def read_metrics(path, params):
    """What metrics.json says of a model with these weights; if it is of others, nothing but their checksum."""
    weights = 0
    for leaf in tree.leaves(params):
        weights = zlib.crc32(leaf, weights)
    weights = f"CRC-32 {weights:08x}"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["weights"] == weights:
            return metrics
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # there is none, or it is not what we wrote
        pass
    return {"weights": weights}
