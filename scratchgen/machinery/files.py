"""Files that are written whole or not at all: beside and renamed, so that a reader finds the old file or the new.

Also what a run writes as text, ``log.csv`` and ``metrics.json``, and the lock on its folder.
"""

import csv
import io
import json
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

from scratchgen import tree

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
    write_text(path, json.dumps(numbers | earlier, indent=2) + "\n")


def add_evaluation(path, params, entry, numbers, seed):
    """Add an entry to "evaluation" in ``metrics.json``; numbers of another seed do not stay beside it."""
    metrics = read_metrics(path, params)
    evaluation = metrics.setdefault("evaluation", {})
    earlier = evaluation.get(entry, {})
    evaluation[entry] = (earlier if earlier.get("seed") == seed else {}) | numbers | {"seed": seed}
    write_text(path, json.dumps(metrics, indent=2) + "\n")


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


class FolderInUse(ValueError):
    """Another run is at work in this folder."""


held = []  # the open folder that this process has locked, if any


def hold(folder):
    """Lock a folder until this process ends, so that two runs cannot overwrite each other's files.

    Raises FolderInUse if another process holds it.
    """
    let_go()
    if fcntl:
        held.append(os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(f"{folder}: another run is at work there; give this one another --out") from None
        except OSError:  # a file system without locks
            pass


def let_go():
    while held:
        os.close(held.pop())


if fcntl:
    os.register_at_fork(after_in_child=let_go)  # or a worker that outlives its run would hold the folder on
