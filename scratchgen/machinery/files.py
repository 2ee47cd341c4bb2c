"""Files that are written whole or not at all: beside and renamed, so that a reader finds the old file or the new.

Also what a run writes as text, ``log.csv`` and ``metrics.json``, and the lock on its folder.
"""

import csv
import errno
import io
import itertools
import json
import os
import zlib
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

from scratchgen import tree
from scratchgen.data import UserError
from scratchgen.machinery import parallel

fcntl = msvcrt = None
with suppress(ImportError):  # Windows has none
    import fcntl
with suppress(ImportError):  # and nobody else has
    import msvcrt


def by_rank_0(write):
    """Leave it to rank 0 to write: the other ranks, which do as it does, have the same file to write."""

    @wraps(write)
    def written(*args, **options):
        if parallel.rank == 0:
            write(*args, **options)

    return written


@contextmanager
def replacing(path):
    """Give a temporary path in the same folder; when the block ends well, flush it to disk and rename it to ``path``.

    When it does not, whatever was at ``path`` is still there, and the temporary file is not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part-{os.getpid()}{path.suffix}")  # savez and savefig go by the suffix
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


@by_rank_0
def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_log(path, rows):
    """``log.csv``: one row an epoch, the keys of the first row as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_metrics(path, numbers, params):
    """``metrics.json``: a run's own numbers. What `scratchgen.evaluate` added for the same ``params`` stays."""
    earlier = {k: v for k, v in read_metrics(path, params).items() if k in ("weights", "evaluation")}
    write_json(path, numbers | earlier)


def add_evaluation(path, params, entry, numbers, seed):
    """Add an entry to "evaluation" in ``metrics.json``; numbers of another seed do not stay beside it."""
    metrics = read_metrics(path, params)
    evaluation = metrics.setdefault("evaluation", {})
    earlier = evaluation.get(entry, {})
    evaluation[entry] = (earlier if earlier.get("seed") == seed else {}) | numbers | {"seed": seed}
    write_json(path, metrics)


def read_metrics(path, params):
    """What metrics.json says of a model with these weights; if it is of others, nothing but their checksum."""
    weights = 0
    for leaf in tree.leaves(params):
        weights = zlib.crc32(leaf, weights)
    weights = f"CRC-32 {weights:08x}"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["weights"] == weights:
            entries = metrics.get("evaluation", {}).values()
            if all(isinstance(entry, dict) for entry in entries):
                json.dumps(metrics, indent=2)  # Python 3.12 reads deeper nesting than it writes
                return metrics
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # there is none, or it is not what we wrote
    return {"weights": weights}


def write_json(path, numbers):
    """NaN and infinity are no JSON: they are written as null."""
    sound = json.loads(json.dumps(numbers), parse_constant=lambda _: None)
    write_text(path, json.dumps(sound, indent=2) + "\n")


# ---------------------------------------------------------------------------------------- a folder, and who works there

LOCK = ".lock"
held = set()  # the open lock files of this process


class FolderInUse(UserError):
    """Another program of ours is at work in this folder."""


@contextmanager
def holding(folder):
    """Until the block ends no other program of ours may work in this folder; what killed ones left half-written goes.

    A file is locked, not the folder, since network file systems want one that is open for writing. Where nothing can be
    written, or nothing locked, the block goes ahead without. Raises FolderInUse.
    """
    lock, owner = None if parallel.rank else locked(Path(folder) / LOCK), os.getpid()
    try:
        if lock is not None:
            held.add(lock)
            for leftover in Path(folder).glob(".*.part-*"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        if lock in held and os.getpid() == owner:
            held.discard(lock)
            with suppress(OSError):  # Windows removes no file that is open
                os.unlink(Path(folder) / LOCK)
            os.close(lock)


def locked(path):
    """The file, open and locked; None where that cannot be done. Raises FolderInUse."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT)
        except OSError:
            return None
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(lock)):
                return lock
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                words = "another program of scratchgen is at work there; wait for its end, or take another folder"
                raise FolderInUse(f"{path.parent}: {words}") from None
            path.unlink(missing_ok=True)
            return None  # a file system without locks
        else:
            os.close(lock)  # who held it has removed it in between: once more


def let_go():
    while held:
        os.close(held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)  # or a rank that outlives its run would hold the folder on

# What a run makes. The checkpoint is last: a move that was interrupted still finds it, and goes on.
MADE = ("*.png", "*.gif", "metrics.json", "log.csv", "checkpoint.npz")


@by_rank_0
def put_aside(folder):
    """Move what an earlier run left in a folder into a folder in it: nothing is lost, or taken for the new run's."""
    if not (folder / "checkpoint.npz").exists():
        return
    made = [path for pattern in MADE for path in sorted(folder.glob(pattern))]
    folders = (folder / f"earlier-{number}" for number in itertools.count(1))
    aside = next(aside for aside in folders if not any((aside / path.name).exists() for path in made))
    aside.mkdir(exist_ok=True)
    for path in made:
        os.replace(path, aside / path.name)
    print(f"kept the earlier run as {aside}")
