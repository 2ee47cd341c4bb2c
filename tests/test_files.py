"""Files that are written whole or not at all, what metrics.json keeps and what it drops, and the lock on a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scratchgen import tree
from scratchgen.machinery import files
from scratchgen.machinery.files import FolderInUse

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"the old file")
    return tmp_path / "c.npz"


def test_a_failed_write_leaves_the_old_file_and_no_debris(path, tmp_path):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half a check")
        raise ZeroDivisionError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError) as error, files.replacing(tmp_path / "x.png") as temporary:
        temporary.write_bytes(b"x")
    assert error.value.filename == str(tmp_path / "x.png")


def test_the_old_file_is_there_until_the_new_one_is_whole(path, tmp_path):
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"the new file")
        assert path.read_bytes() == b"the old file"
        assert temporary.suffix == ".npz" and temporary.parent == path.parent  # by which np.savez goes; one file system
    assert path.read_bytes() == b"the new file" and list(tmp_path.iterdir()) == [path]


def test_the_log_is_one_row_an_epoch(tmp_path):
    rows = [{"epoch": 1, "test_elbo": -240.25}, {"epoch": 2, "test_elbo": -239.5}]
    files.write_log(tmp_path / "log.csv", rows)
    assert (tmp_path / "log.csv").read_bytes() == b"epoch,test_elbo\n1,-240.25\n2,-239.5\n"


# -------------------------------------------------------------------------------------------------------- metrics.json


@pytest.fixture
def params(rng):
    return {"a": [rng.standard_normal((2, 3), dtype=np.float32)], "b": np.arange(3, dtype=np.float32)}


def test_what_was_measured_stays_for_the_same_weights_and_goes_with_other_ones(tmp_path, params):
    path = tmp_path / "metrics.json"
    files.write_metrics(path, {"elbo": -240.0, "seconds": 9}, params)
    files.add_evaluation(path, params, "iwae_50", {"log_likelihood": -235.0}, seed=0)
    files.write_metrics(path, {"elbo": -239.0}, params)
    kept = json.loads(path.read_text())
    assert kept["elbo"] == -239.0 and "seconds" not in kept and kept["weights"].startswith("CRC-32 ")
    assert kept["evaluation"] == {"iwae_50": {"log_likelihood": -235.0, "seed": 0}}

    other = tree.map(np.copy, params)
    other["b"][2] += 1
    files.write_metrics(path, {"elbo": -238.0}, other)
    found = json.loads(path.read_text())
    assert found.keys() == {"elbo", "weights"} and found["weights"] != kept["weights"]


def test_numbers_of_one_seed_come_together_and_those_of_another_replace_them(tmp_path, params):
    path = tmp_path / "metrics.json"
    for name, value, seed in (("ddim", 1.0, 0), ("ddpm", 2.0, 0)):
        files.add_evaluation(path, params, "frechet_10", {name: value}, seed)
    files.add_evaluation(path, params, "bound", {"bits": 4.0}, 0)
    assert json.loads(path.read_text())["evaluation"]["frechet_10"] == {"ddim": 1.0, "ddpm": 2.0, "seed": 0}
    files.add_evaluation(path, params, "frechet_10", {"ddpm": 3.0}, 1)
    expected = {"frechet_10": {"ddpm": 3.0, "seed": 1}, "bound": {"bits": 4.0, "seed": 0}}
    assert json.loads(path.read_text())["evaluation"] == expected


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"weights": "CRC-32 00000000"}', "7"])
def test_a_metrics_file_that_is_not_ours_counts_as_none(tmp_path, params, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    assert files.read_metrics(path, params).keys() == {"weights"}


# ------------------------------------------------------------------------------------------------------------ the lock

needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no locks on folders here")
OTHER = """
import sys
from scratchgen.machinery import files
try:
    files.hold(sys.argv[1])
except files.FolderInUse as error:
    sys.exit(f"refused: {error}")
"""


def another_process_holds(folder):
    """Let another process try for the folder; its complaint, or nothing."""
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr.strip()


@pytest.fixture
def let_go():
    yield
    files.let_go()


@needs_locks
def test_a_folder_is_held_until_another_one_is_or_it_is_let_go(tmp_path, let_go):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    files.hold(first)
    words = "another run is at work there; give this one another --out"
    assert another_process_holds(first) == f"refused: {first}: {words}"
    assert another_process_holds(second) == ""
    files.hold(first)  # again by this process: no quarrel with itself
    files.hold(second)
    assert another_process_holds(first) == "" and "another run is at work" in another_process_holds(second)
    files.let_go()
    assert another_process_holds(second) == ""


@needs_locks
def test_a_folder_that_another_process_holds_is_refused(tmp_path, let_go):
    code = f"import sys; from scratchgen.machinery import files; files.hold({str(tmp_path)!r}); "
    code += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match="another run is at work there"):
            files.hold(tmp_path)
        other.stdin.close()
    files.hold(tmp_path)


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_does_not_hold_the_folder_on(tmp_path, let_go):
    files.hold(tmp_path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # the worker, which outlives the run
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        files.let_go()
        assert another_process_holds(tmp_path) == ""
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)
