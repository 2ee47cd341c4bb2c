"""Several ranks are one run: the same bits as one process, whoever dies or is asked to stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from scratchgen.machinery import cli, files, ranks

import numpy as np
import pytest
from conftest import ROOT

MPIEXEC = shutil.which("mpiexec", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")
pytest.importorskip("mpi4py", exc_type=ImportError)
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="needs an mpiexec: pip install mpich")


def start(count, *command, **options):
    """Start ``count`` ranks of a Python command."""
    ours = [MPIEXEC, "-n", str(count), sys.executable, *map(str, command)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(ours, **options)


def finish(process):
    out, error = process.communicate(timeout=120)
    # Neither MPI's own line, nor what is said of the small data.
    ours = [line for line in error.splitlines(keepends=True) if not line.startswith(("Abort(", "warning: "))]
    return process.returncode, out, "".join(ours)


def arrays(folder):
    with np.load(folder / "checkpoint.npz") as file:
        return {name: file[name] for name in file.files if name != "state"}


def same(one, other):
    one, other = arrays(one), arrays(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


RUNS = {
    "run_vae.py": "--train-images 150 --batch-size 130 --epochs 2",  # three shards, the last of 2 images; then one
    "run_ddpm.py": "--train-images 40 --batch-size 32 --epochs 1 --T 20 --arch mlp",
}


@pytest.fixture(scope="module")
def alone(small_data, tmp_path_factory):
    """The folder of each run, by one process."""
    folders = {}
    for script, flags in RUNS.items():
        folders[script] = tmp_path_factory.mktemp("alone") / "run"
        command = [sys.executable, ROOT / script, *flags.split(), "--data", small_data, "--workers", "1"]
        subprocess.run([*command, "--out", folders[script]], check=True, capture_output=True)
    return folders


@pytest.mark.parametrize(
    ("script", "count", "workers"), [("run_vae.py", 2, 2), ("run_vae.py", 3, 1), ("run_ddpm.py", 2, 1)]
)
def test_ranks_give_the_bits_of_one_process(script, count, workers, alone, small_data, tmp_path):
    flags = [*RUNS[script].split(), "--data", small_data, "--workers", workers, "--out", tmp_path / "run"]
    status, out, error = finish(start(count, ROOT / script, *flags))
    assert (status, error) == (0, "")
    assert out.count("parameters, ") == out.count("figures and numbers are in") == 1  # one of them speaks
    assert same(tmp_path / "run", alone[script])
    made, expected = (sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "run", alone[script]))
    assert made == expected


def test_stopped_they_save_and_another_number_goes_on_to_the_same_bits(alone, small_data, tmp_path):
    flags = [*RUNS["run_vae.py"].split(), "--data", small_data, "--workers", "1", "--out", tmp_path]
    slow = "import sys, time, runpy; from scratchgen import optim; step = optim.adam_step\n"
    slow += "def slowly(*a, **k): time.sleep(0.5); return step(*a, **k)\n"
    slow += f"optim.adam_step = slowly; sys.argv = {['run_vae.py', *map(str, flags)]}\n"
    slow += f"runpy.run_path({str(ROOT / 'run_vae.py')!r}, run_name='__main__')"
    process = start(2, "-c", slow)
    while not (tmp_path / "log.csv").exists():  # the first epoch
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, out, error = finish(process)
    assert status == 128 + signal.SIGTERM
    assert error.strip().endswith(cli.STOPPED) and "epoch 2/2" not in out
    for count in (3, 1):  # the last has nothing to do but to draw the figures again
        status, _, error = finish(start(count, ROOT / "run_vae.py", *flags, "--resume"))
        assert (status, error) == (0, "")
    assert same(tmp_path, alone["run_vae.py"])


def test_evaluation_and_drawing_by_ranks(alone, tmp_path, small_data):
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        shutil.copytree(alone["run_vae.py"], folder)
        command = ["-m", "scratchgen.evaluate", folder, "--iwae", 2, "--data", small_data, "--workers", 1]
        status, _, error = finish(start(count, *command))
        assert (status, error) == (0, "")
        found.append(json.loads((folder / "metrics.json").read_text())["evaluation"])
        figure = folder / "drawn.png"
        status, out, error = finish(start(count, "-m", "scratchgen.draw", folder, "-n", 5, "--out", figure))
        assert (status, error, out.count("wrote")) == (0, "", 1)
    assert found[0] == found[1]
    assert len({(tmp_path / count / "drawn.png").read_bytes() for count in "12"}) == 1


def test_a_mistake_is_one_line_and_one_rank_that_fails_ends_all(alone, small_data, tmp_path):
    for _ in range(3):  # a line that ends the program may be lost on its way through mpiexec, but not every time
        process = start(2, ROOT / "run_vae.py", "--data", tmp_path / "none", "--out", tmp_path / "out")
        _, error = process.communicate(timeout=120)  # all of it: MPI has nothing to say where all ranks fail
        assert process.returncode == 2 and error.count("\n") == 1 and error.startswith("run_vae.py: ")
    status, _, error = finish(start(2, ROOT / "run_vae.py", "--epochs", 0))
    assert status == 2 and error.count("\n") == 1 and "out of range" in error
    fails = "from scratchgen.machinery import cli, ranks\ndef main():\n    w = ranks.world()\n"
    fails += "    if w.rank == 1: raise OSError(28, 'No space left on device')\n    w.told_by_0(0)\ncli.run(main)"
    status, _, error = finish(start(2, "-c", fails))
    assert status == 1 and error.count("\n") == 1 and error.startswith("rank 1 on ") and "No space left" in error
    both = fails.replace("w.rank == 1", "w.rank < 2").replace("OSError", "ValueError")
    status, _, error = finish(start(2, "-c", both))
    assert status == 1 and error.count("Traceback") == 1  # a fault of ours is said once, too


def test_a_folder_that_ranks_do_not_share_is_noticed(alone, small_data, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(alone["run_vae.py"], tmp_path / name / "run")
    with np.load(tmp_path / "b" / "run" / "checkpoint.npz") as file:
        changed = {
            name: file[name] + (0 if name == "state" else 1) if name != "state" else file[name] for name in file.files
        }
    np.savez(tmp_path / "b" / "run" / "checkpoint.npz", **changed)
    other = ["-n", "1", "-wdir", str(tmp_path / "b"), sys.executable, "-m", "scratchgen.draw", "run"]
    ours = [MPIEXEC, "-n", "1", "-wdir", str(tmp_path / "a"), *other[4:], ":", *other]
    status, _, error = finish(subprocess.Popen(ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert status == 2 and "ranks found different ones" in error and error.count("\n") == 1
    assert not (tmp_path / "a" / "drawn.png").exists()


def test_alone_nothing_of_mpi_is_imported():
    code = "import sys, run_vae; from scratchgen.machinery import ranks; ranks.world(); print('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_without_mpi4py_mpiexec_is_one_line(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    status, _, error = finish(start(2, "-m", "scratchgen.draw", env=environment))
    assert status == 2 and error.count("\n") == 1 and "mpiexec needs mpi4py" in error
    assert ranks.world().count == 1 and files.ranks is ranks
