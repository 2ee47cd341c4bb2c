"""A run that is killed at any moment, and resumed, ends as if it had been left alone: same bits, same files, no more.

Every write is a flush and a rename, and a kill can come before or after each: those moments are counted in a run that
is left alone, and then a run is killed at one of them. Here at a few; `python tests/test_kills.py` tries all, in ten
to twenty minutes.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FLAGS = {
    "vae": ["--latent-dim", "5", "--batch-size", "64", "--epochs", "2", "--workers", "1"],
    "ddpm": ["--T", "5", "--arch", "mlp", "--batch-size", "64", "--epochs", "2", "--workers", "1"],
}

# The script as a program that kills itself at one of the moments, and saves after each step, not after a minute.
PROGRAM = """
import itertools, os, sys
sys.path.insert(0, {root!r})
from scratchgen.machinery import cli
from scratchgen.machinery import run as run_module
import run_{model} as script

moments = itertools.count()

def dangerous(f):
    def between_two_moments(*args):
        for done in (False, True):
            if next(moments) == {moment}:
                os.kill(os.getpid(), 9)
            if not done:
                f(*args)
    return between_two_moments

os.fsync, os.replace = dangerous(os.fsync), dangerous(os.replace)
run_module.SAVE_SECONDS = 0
sys.argv[0] = "run_{model}.py"
try:
    cli.run(script.main)
finally:
    print("moments", next(moments))
"""


def run(model, data, out, moment=-1, *flags):
    code = PROGRAM.format(root=str(ROOT), model=model, moment=moment)
    command = [sys.executable, "-c", code, *FLAGS[model], "--data", str(data), "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def contents(folder):
    """All that a run has left in its folder, but for times and for the command."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    with np.load(folder / "checkpoint.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    state = json.loads(np.frombuffer(arrays.pop("state"), "<U1").tobytes().decode("utf-32-le"))
    rows = list(csv.DictReader(found.pop("log.csv").decode().splitlines()))
    timed = [state, *state["log"], *rows, metrics := json.loads(found.pop("metrics.json"))]
    for numbers in timed:
        del numbers["seconds"]
    metrics["command"] = metrics["command"].removesuffix(" --resume").split(" --out ")[0]
    return found | {"checkpoint.npz": (arrays, state), "log.csv": rows, "metrics.json": metrics}


def killed_and_resumed(model, data, out, moment):
    result = run(model, data, out, moment)
    assert result.returncode == -9, result.stderr
    again = run(model, data, out, -1, *(["--resume"] if (out / "checkpoint.npz").exists() else []))
    assert again.returncode == 0, again.stderr
    return contents(out)


def left_alone(model, data, out):
    """The contents of a run's folder, and how many moments it has."""
    result = run(model, data, out)
    assert result.returncode == 0, result.stderr
    return contents(out), int(result.stdout.split()[-1])


@pytest.fixture(scope="module", params=FLAGS)
def whole(request, small_data, tmp_path_factory):
    return request.param, *left_alone(request.param, small_data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("part", [0.0, 0.23, 0.62, 0.9, 1.0])
def test_killed_at_some_moment_and_resumed_it_is_the_same_run(part, whole, small_data, tmp_path):
    model, expected, moments = whole
    assert killed_and_resumed(model, small_data, tmp_path / "out", round(part * (moments - 1))) == expected


def all_moments():
    sys.path.insert(0, str(ROOT))  # with the run scripts, which conftest imports
    from conftest import write_small_data

    with tempfile.TemporaryDirectory() as folder:
        data = write_small_data(Path(folder, "data"))
        kills = 0
        same = 0
        for model in FLAGS:
            expected, moments = left_alone(model, data, Path(folder, model))
            for moment in range(moments):
                found = killed_and_resumed(model, data, Path(folder, f"{model}-{moment}"), moment)
                kills += 1
                if found == expected:
                    same += 1
                differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
                print(f"{model}, moment {moment} of {moments}: {differing or 'the same'}", flush=True)
    print(f"{same} of {kills} ended as if left alone")
    return same == kills


if __name__ == "__main__":
    sys.exit(not all_moments())
