"""Files that nobody would write, by hand: `python tests/fuzz.py --inputs 1000000` (some ten minutes).

Sound idx files, checkpoints, states of runs and metrics.json, each changed at random in a few places, are given to what
reads them, in a process whose memory is bounded. Only one-line errors are allowed, and nothing may have been changed.
Every input follows from the seed, its kind and its number: `--only state 4711` tries one again, with its traceback.
"""

import argparse
import gzip
import json
import struct
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scratchgen import tree
from scratchgen.data import DataError, load_idx
from scratchgen.machinery import checkpoint, cli, files

import numpy as np

ODD = [
    -1,
    0,
    1,
    1.5,
    "x",
    True,
    None,
    [],
    {},
    [[]],
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "a\nb",
    "y" * 10_000,
    [7],
]
CONFIG = {"model": "toy", "T": 200, "additions": ["v"]}
CONFIG |= {f"{part}_images": "3 of CRC-32 00000000" for part in ("train", "test")}
ROW = {"epoch": 1, "step": 3, "train_loss": 0.5, "test_loss": 0.6, "seconds": 1.5}
STATE = {"config": CONFIG, "shard_size": 8, "step": 4, "seconds": 2.5, "epoch_means": {"loss": 0.25}, "log": [ROW]}
STATE |= {"rng": np.random.default_rng(5).bit_generator.state}
ARRAYS = {"params": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)]}


def changed_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place, how = int(rng.integers(len(content) + 1)), rng.integers(5)
        if how == 0:
            del content[place:]
        elif how == 1:
            content[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif how == 2:
            content[place : place + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31, 2**32 - 1])))
        else:
            content[place : place + 1] = rng.bytes(1)
    return bytes(content)


def changed_value(value, rng):
    """The same JSON value, but for one place in it that has something odd, or is missing, or there twice."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = changed_value(value[key], rng)
        return value
    return [value, value] if rng.random() < 0.1 else ODD[rng.integers(len(ODD))]


def try_idx(path, rng):
    numbers = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    content = bytes([0, 0, 8, 3]) + struct.pack(">III", *numbers.shape) + numbers.tobytes()
    path.write_bytes(changed_bytes(gzip.compress(content, 1, mtime=0) if rng.random() < 0.5 else content, rng))
    load_idx(path)


def resume(path):
    into = tree.map(np.zeros_like, ARRAYS)
    try:
        checkpoint.resume(path, CONFIG, into)
    except checkpoint.CheckpointError:
        assert not any(leaf.any() for leaf in tree.leaves(into)), "refused, and yet read"
        raise


def try_checkpoint(path, rng):
    checkpoint.save(path, ARRAYS, STATE)
    path.write_bytes(changed_bytes(path.read_bytes(), rng))
    resume(path)


def try_state(path, rng):
    """A sound checkpoint with another state in it, and without a checksum, or with that of before."""
    checkpoint.save(path, ARRAYS, STATE)
    named, _ = checkpoint.load(path)
    with zipfile.ZipFile(path) as archive:
        checksum = archive.comment
    text = json.dumps(changed_value(STATE, rng))

    np.savez(path, state=np.array(text), **named)
    try:
        resume(path)
    except checkpoint.CheckpointError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("it has no checksum, and yet was read")

    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = checksum
    resume(path)
    assert text == json.dumps(STATE), "it was changed, and yet read"


def try_metrics(path, rng):
    path.unlink(missing_ok=True)
    files.write_metrics(path, {"elbo": -240.0, "epochs": 2}, ARRAYS)
    files.add_evaluation(path, ARRAYS, "iwae_5", {"log_likelihood": -235.0}, 0)
    if rng.random() < 0.5:
        path.write_bytes(changed_bytes(path.read_bytes(), rng))
    else:
        path.write_text(json.dumps(changed_value(json.loads(path.read_text()), rng)))
    files.add_evaluation(path, ARRAYS, "bound", {"bits": float("nan")}, 1)
    files.write_metrics(path, {"elbo": -239.0}, ARRAYS)
    assert "NaN" not in json.dumps(json.loads(path.read_text()))


KINDS = {"idx": (try_idx, 0.88), "checkpoint": (try_checkpoint, 0.05), "state": (try_state, 0.05)}
KINDS |= {"metrics": (try_metrics, 0.02)}  # and the share of each in the inputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"))
    args = parser.parse_args()
    with suppress(ImportError):  # Windows has none
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    files.os.fsync = lambda file: None  # what is tried is reading
    shm, failures = Path("/dev/shm"), 0
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        for number_of_kind, (kind, (attempt, share)) in enumerate(KINDS.items()):
            path, refused, numbers = Path(folder, f"{kind}.npz"), 0, range(round(share * args.inputs))
            if args.only:
                numbers = [int(args.only[1])] if args.only[0] == kind else []
            for number in cli.progress(len(numbers), kind, " inputs", numbers):
                try:
                    attempt(path, np.random.default_rng([args.seed, number_of_kind, number]))
                except (DataError, checkpoint.CheckpointError) as error:
                    refused += 1
                    assert "\n" not in str(error), (kind, number)
                except Exception as error:
                    failures += 1
                    print(f"--only {kind} {number}: {type(error).__name__}: {error}"[:300])
                    if args.only:
                        raise
            print(f"{kind}: {len(numbers):,} inputs, {refused:,} refused", flush=True)
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main()))
