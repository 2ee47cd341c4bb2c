"""Atomic writes: a file is written beside its target and renamed, so that a reader finds the old file or the new.

Also the text files of a run, ``log.csv`` and ``metrics.json``, and the lock on its folder.
"""

import csv
import errno
import itertools
import json
import os
import secrets
import shutil
import stat
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from functools import reduce, wraps
from pathlib import Path

from scratchgen import tree
from scratchgen.data import UserError
from scratchgen.machinery import parallel

fcntl = msvcrt = None
with suppress(ImportError):  # Windows has none
    import fcntl
with suppress(ImportError):  # only Windows has it
    import msvcrt


def by_rank_0(write):
    """Make a function that only rank 0 calls: the other ranks run the same lines and would write the same file."""

    @wraps(write)
    def written(*args, **options):
        if parallel.rank == 0:
            write(*args, **options)

    return written


PART = ".part-"  # names of temporary files begin with this
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # errors of a flush that mean: the data is not on the disk


@contextmanager
def replacing(path):
    """Yield a temporary path in the same folder. If the block succeeds, flush that file and rename it to ``path``.

    If the block fails, the old file stays at ``path`` and the temporary file is deleted. If ``path`` is a link, its
    target is replaced. Raises OSError, at once if ``path`` is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    # savez and savefig depend on the suffix. A process id is not unique: two containers can have the same.
    temporary = target.with_name(f"{PART}{secrets.token_hex(8)}{target.suffix}")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise OSError(errno.EEXIST, "expected a file or nothing there, found a folder or a device")
        yield temporary
        with open(temporary, "rb+") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno in LOST:
                    raise
                # else a file system that cannot flush
        replace(temporary, target)
    except OSError as error:
        error.filename = str(path)  # the file the user asked for, not the temporary one
        raise
    except ValueError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # zipfile hides it behind its own error
            raise error.__context__ from None
        raise
    finally:
        with suppress(OSError):  # no such folder, a name that is too long
            temporary.unlink(missing_ok=True)


@contextmanager
def optional():
    """Warn if a file cannot be written, and go on: on Windows a spreadsheet or a viewer may keep it open."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{error.filename}: {error.strerror}, and so it stays as it is", stacklevel=3)


def replace(source, target):
    """os.replace, tried for one second: Windows refuses it while a viewer shows the target."""
    until = time.monotonic() + 1
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def check_output(path):
    """Make the folder of ``path``. Raise OSError now, before any long work, if no file can be written to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError), replacing(path) as temporary:
        temporary.touch()
        temporary.unlink()  # so that nothing replaces ``path``


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@by_rank_0
def write_log(path, rows):
    """Write ``log.csv``: one row for each epoch; the header is the keys of the first row."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@by_rank_0
def write_metrics(path, numbers, params):
    """Write a run's numbers to ``metrics.json``. What `scratchgen.evaluate` added for the same ``params`` stays."""
    earlier = {k: v for k, v in metrics_to_change(path, params).items() if k in ("weights", "evaluation")}
    write_json(path, numbers | earlier)


@by_rank_0
def add_evaluation(path, params, entry, numbers, seed):
    """Add numbers to an entry of "evaluation" in ``metrics.json``; the entry's numbers of another seed are dropped."""
    metrics = metrics_to_change(path, params)
    evaluation = metrics.setdefault("evaluation", {})
    earlier = evaluation.get(entry, {})
    evaluation[entry] = (earlier if earlier.get("seed") == seed else {}) | numbers | {"seed": seed}
    write_json(path, metrics)


def metrics_to_change(path, params):
    """As `read_metrics`; but a file that it cannot read, or of other weights, is renamed, not overwritten."""
    metrics = read_metrics(path, params)
    if metrics.keys() == {"weights"} and path.exists():
        aside = next(aside for n in itertools.count(1) if not (aside := path.with_stem(f"{path.stem}-{n}")).exists())
        replace(path, aside)
        print(f"{path} could not be read, or is of other weights: kept as {aside}")
    return metrics


def read_metrics(path, params):
    """The contents of metrics.json if they belong to the weights ``params``; otherwise only the weights' checksum."""
    weights = f"CRC-32 {crc(params):08x}"
    # The file is missing, or is not one that we wrote.
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        metrics = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows add a byte-order mark
        json.dumps(metrics, indent=2)  # Python 3.12 reads deeper nesting than it writes
        entries = metrics.get("evaluation", {}).values()
        if metrics["weights"] == weights and all(isinstance(entry, dict) for entry in entries):
            return metrics
    return {"weights": weights}


def crc(arrays):
    """The CRC-32 of all numbers in a tree of arrays."""
    return reduce(lambda crc, array: zlib.crc32(array, crc), tree.leaves(arrays), 0)


def write_json(path, numbers):
    """Write numbers as JSON. JSON has no NaN and infinity: they become null."""
    sound = json.loads(json.dumps(numbers), parse_constant=lambda _: None)
    write_text(path, json.dumps(sound, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------- the lock on a folder

LOCK = ".lock"  # stays in the folder


class FolderInUse(UserError):
    """Another program of ours is at work in this folder."""


@contextmanager
def holding(folder):
    """Lock a folder until the block ends, and delete temporary files of killed runs. Raises FolderInUse.

    If no lock file can be written or locked, the block runs without a lock.
    """
    lock = None if parallel.rank else locked(Path(folder) / LOCK)
    try:
        if lock is not None:
            for leftover in Path(folder).glob(f"{PART}*"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # which unlocks it


def locked(path):
    """The descriptor of the file, open and locked; None if it cannot be locked. Raises FolderInUse."""
    try:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:  # another user's
            lock = os.open(path, os.O_RDONLY)
    except PermissionError:  # and it may not even be read
        raise FolderInUse(f"{path}: may not be read, so another program may be at work there") from None
    except OSError:
        return None
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        return lock
    except OSError as error:
        os.close(lock)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise FolderInUse(
                f"{path.parent}: another program of scratchgen is at work there; wait, or take another folder"
            ) from None
        return None  # a file system without locks


# Files that a run and its evaluation make. Other files are the user's own. The checkpoint is moved last, so that the
# next call continues an interrupted move.
OF_VAE = "loss samples reconstructions interpolation codes latents_*_* latent_use"
OF_DDPM = "preview forward trajectory classes nearest bound"
MADE = (
    *(f"{name}.png" for name in (OF_VAE + " " + OF_DDPM).split()),
    "sampling.gif",
    "metrics.json",
    "log.csv",
    "checkpoint.npz",
)


@by_rank_0
def put_aside(folder):
    """Move the files of an earlier run into a subfolder, so that none is lost or taken for a file of the new run.

    Raises UserError if a file of the new run could not be written.
    """
    made = [path for pattern in MADE for path in sorted(folder.glob(pattern)) if path.exists()]
    for path in made:
        if not path.is_file():  # otherwise this would fail only after the training
            raise UserError(f"{path}: expected a file or nothing there, found a folder or a device")
    if not (folder / "checkpoint.npz").exists():
        return
    folders = (folder / f"earlier-{number}" for number in itertools.count(1))
    aside = next(aside for aside in folders if not any((aside / path.name).exists() for path in made))
    aside.mkdir(exist_ok=True)
    for path in made:  # for a link, move its target, perhaps on another disk; the link stays
        shutil.move(os.path.realpath(path), aside / path.name)
    print(f"kept the earlier run as {aside}")
