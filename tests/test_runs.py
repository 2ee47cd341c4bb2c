"""The two scripts as a user runs them: what they make, what they refuse, and that nothing is lost when they stop."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import draw, plots
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import checkpoint, cli, files, parallel
from scratchgen.machinery import run as run_module
from scratchgen.machinery.run import Run

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, load

with suppress(ImportError):  # Windows has none
    import resource
needs_limits = pytest.mark.skipif("resource" not in globals(), reason="no limits on the size of files here")

PROGRAMS = {"vae": run_vae, "ddpm": run_ddpm, "draw": draw, "evaluate": evaluate}
SMALL = {"train_images": 48, "batch_size": 16, "epochs": 2, "workers": 1}  # three steps an epoch
FLAGS = {"vae": SMALL | {"latent_dim": 5}, "ddpm": SMALL | {"T": 5, "classes": True}, "draw": {}, "evaluate": {}}
# Each flag of a script either is a setting in the checkpoint, with here another value than that of the run above,
# or may differ when the run is resumed.
SETTINGS = {"epochs": 3, "batch_size": 8, "lr": 0.02, "seed": 1, "train_images": 47}
SETTINGS = {
    "vae": SETTINGS | {"arch": "conv", "latent_dim": 6, "beta": 2},
    "ddpm": SETTINGS | {"arch": "mlp", "T": 6, "schedule": "cosine", "additions": "muon", "classes": 0, "ema": 0.9},
}
MAY_DIFFER = {"workers", "data", "out", "resume"}
MAY_DIFFER = {"vae": MAY_DIFFER | {"latents"}, "ddpm": MAY_DIFFER}
FIGURES = {
    "vae": "loss reconstructions samples interpolation codes latents_0_0",
    "ddpm": "loss forward trajectory samples preview nearest classes",
}
NUMBERS = {"vae": ["elbo", "reconstruction", "kl", "entropy_floor"], "ddpm": ["test_loss", "alpha_bar_T", "prior_kl"]}
ODD_SETTINGS = {"text.usetex": True, "font.family": "No Such Font", "savefig.bbox": "tight", "savefig.dpi": 30}
ODD_SETTINGS |= {"axes.grid": True, "image.cmap": "jet"}  # of matplotlib
SMALL_DATA = r"warning: .*: not the published FashionMNIST \(plain MNIST\?\): .*\n"


def words(flags):
    """{"latent_dim": 5, "classes": True} as a command line; None and False are left out."""
    found = []
    for name, value in flags.items():
        if value not in (None, False):
            values = () if value is True else value if isinstance(value, list) else [value]
            found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def program(name, *more, **flags):
    """Run a program in this process as `python` does: its exit status, what it prints, and the lines of its errors."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("default", message=".*not the published")
        # An old matplotlib with a new pyparsing, where pytest has -W default: `python` shows no such warning.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"matplotlib|pyparsing")
        warnings.showwarning = lambda *warned: err.write(warnings.formatwarning(*warned))  # pytest would keep it
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which `cli.run` changes
        patch.setattr(PROGRAMS[name], "SHARD", 8, raising=False)  # so that two ranks have work
        with pytest.raises(SystemExit) as stop:
            cli.run(partial(PROGRAMS[name].main, [*map(str, more), *words(FLAGS[name] | flags)]))
    return stop.value.code, out.getvalue(), re.sub(SMALL_DATA, "", err.getvalue()).splitlines()


@pytest.fixture(scope="session", params=["vae", "ddpm"])
def whole(request, small_data, tmp_path_factory):
    """(model, folder, stdout) of a run of two epochs that was left alone, with one worker."""
    model, out = request.param, tmp_path_factory.mktemp(request.param)
    status, stdout, err = program(model, data=small_data, out=out)
    assert status == 0 and err == [], err
    return model, out, stdout


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "copy")
    return tmp_path / "copy"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_same_run(one, other):
    """All that two runs have left but times: arrays, state, log, numbers and figures."""
    assert names_in(one) == names_in(other)
    (a, state_a), (b, state_b) = (load(folder / "checkpoint.npz") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for row in (state_a, state_b, *state_a["log"], *state_b["log"]):
        del row["seconds"]
    assert state_a == state_b
    for name in ("weights", *NUMBERS[state_a["config"]["model"]]):
        assert metrics_in(one)[name] == metrics_in(other)[name]
    for name in names_in(one):
        if name.endswith((".png", ".gif")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_what_a_run_leaves_and_prints(whole):
    model, out, stdout = whole
    figures = [f"{name}.png" for name in FIGURES[model].split()] + ["sampling.gif"] * (model == "ddpm")
    made = {re.sub(r"\d+", "0", name) for name in names_in(out)}
    assert made == {*figures, "log.csv", "metrics.json", "checkpoint.npz", files.LOCK}
    metrics, (_, state) = metrics_in(out), load(out / "checkpoint.npz")
    assert set(metrics) == {*NUMBERS[model], "seconds", "epochs", "seed", "parameters", "command", "weights"}
    assert metrics["epochs"] == 2 and metrics["command"].startswith(f"python run_{model}.py --train-images 48 ")
    with open(out / "log.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == state["log"] and [row["step"] for row in rows] == [3, 6]

    assert "\r" not in stdout  # no bar in a pipe
    first, *epochs = (line for line in stdout.splitlines() if "epoch" in line or "parameters" in line)
    assert f"{metrics['parameters']:,} parameters, 48 training images" in first and len(epochs) == 2
    for number, (line, row) in enumerate(zip(epochs, rows, strict=True), 1):
        if model == "vae":
            said = "ELBO: train {train_elbo:.2f}, test {test_elbo:.2f} = {test_reconstruction:.2f} - {test_kl:.2f} nats"
        else:
            said = "loss: train {train_loss:.5f}, test {test_loss:.5f}"
        assert re.fullmatch(re.escape(f"epoch {number}/2  {said}".format(**row)) + r"  \d+ s", line)
        # The training loss is the mean of its own epoch: near the test loss, not a sum over epochs.
        train, test = (row[f"{part}_{'elbo' if model == 'vae' else 'loss'}"] for part in ("train", "test"))
        assert 0.5 < train / test < 2
    if model == "vae":
        assert metrics["elbo"] == metrics["reconstruction"] - metrics["kl"] < -metrics["entropy_floor"]
        said = "test ELBO {elbo:.2f} = {reconstruction:.2f} - {kl:.2f} nats per image; no model gets above "
        assert f"{said}-{{entropy_floor:.2f}}, ".format(**metrics) in stdout
        assert metrics["elbo"] == rows[-1]["test_elbo"] > rows[0]["test_elbo"]
    else:
        assert "T = 5, alpha_bar_T = {alpha_bar_T:.2e}, prior KL = {prior_kl:.3g} nats".format(**metrics) in stdout
        assert f"test loss {metrics['test_loss']:.5f}: " in stdout and rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.fixture
def at(monkeypatch):
    """Have each rank call ``act(run)`` inside the step that is given."""

    def plan(step, act):
        record = Run.record
        monkeypatch.setattr(Run, "record", lambda run, *_: (run.step + 1 == step and act(run), record(run, *_)))

    return plan


def test_stopped_in_epoch_2_and_resumed_elsewhere_it_is_the_same_run(whole, at, small_data, tmp_path, monkeypatch):
    model, folder, _ = whole
    at(5, lambda run: parallel.rank or os.kill(os.getpid(), signal.SIGINT))
    status, stdout, err = program(model, data=small_data, out=tmp_path, workers=3)
    assert status == 130 and err == [f"run_{model}.py: {cli.STOPPED}"] and stdout.count("epoch ") == 1
    assert load(tmp_path / "checkpoint.npz")[1]["step"] == 5  # the step was done first
    monkeypatch.undo()

    # With five cores a fresh run would have other shards, and so other bits.
    monkeypatch.setattr(run_module.blas, "available_cores", lambda: 5)
    status, stdout, err = program(model, data=small_data, out=tmp_path, resume=True)
    assert (status, err) == (0, []) and stdout.count("epoch ") == 1
    assert_same_run(folder, tmp_path)


def other_data(folder, small_data, name, byte):
    """A copy of the data in which one byte of one file is another."""
    shutil.copytree(small_data, folder)
    content = bytearray((folder / name).read_bytes())
    content[byte] ^= 1
    (folder / name).write_bytes(content)
    return folder


def test_each_flag_is_a_setting_that_cannot_be_changed_or_may_differ(whole, copy, small_data, tmp_path):
    model = whole[0]
    flags = vars(PROGRAMS[model].parse_arguments([])).keys() - {"command"}
    assert flags == SETTINGS[model].keys() | MAY_DIFFER[model]  # of a new flag one of the two must be said
    before, (_, state) = (copy / "checkpoint.npz").read_bytes(), load(copy / "checkpoint.npz")
    assert state["config"].keys() == SETTINGS[model].keys() | {"model", "test_images"}
    changes = {name: {name: value} for name, value in SETTINGS[model].items()}
    first = {"train_images": "train-images-idx3-ubyte", "test_images": "t10k-images-idx3-ubyte"}
    changes |= {"images": {"data": other_data(tmp_path / "train", small_data, first["train_images"], 5000)}}
    changes |= {"test_images": {"data": other_data(tmp_path / "test", small_data, first["test_images"], -1)}}
    if model == "ddpm":
        changes["arch"]["classes"] = False  # which the other network cannot have
        for part, key in (("train", "labels"), ("t10k", "test_images")):
            name = f"{part}-labels-idx1-ubyte"
            changes |= {key: {"data": other_data(tmp_path / name, small_data, name, 9)}}
    for key, change in changes.items():
        key = key if key in state["config"] else "train_images"
        status, _, err = program(model, **{"data": small_data, "out": copy, "resume": True} | change)
        refused = f"made with {key} {state['config'][key]}, this run has {key} "
        assert status == 2 and len(err) == 1 and f": {copy / 'checkpoint.npz'}: {refused}" in err[0], (change, err)
    other = "ddpm" if model == "vae" else "vae"
    status, _, err = program(other, data=small_data, out=copy, resume=True)
    assert status == 2 and len(err) == 1 and f"made with model {model}, this run has model {other};" in err[0]
    assert (copy / "checkpoint.npz").read_bytes() == before and names_in(copy) == names_in(whole[1])


def test_a_finished_run_is_drawn_again_and_flushes_each_file_before_its_rename(
    whole, small_data, tmp_path, monkeypatch
):
    """With what may differ: ranks, the place of the data, and the settings of matplotlib."""
    model, folder, _ = whole
    out, data = tmp_path / "out", shutil.copytree(small_data, tmp_path / "data")
    out.mkdir()
    before = Path(shutil.copy(folder / "checkpoint.npz", out)).read_bytes()
    flushed, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def whole_content(status):
        return status.st_ino, status.st_size

    def recorded_fsync(descriptor):
        fsync(descriptor)
        flushed.add(whole_content(os.fstat(descriptor)))

    def recorded_replace(source, target):
        assert whole_content(os.stat(source)) in flushed, target
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with matplotlib.rc_context(ODD_SETTINGS):
        status, stdout, err = program(model, data=data, out=out, workers=2, resume=True)
    assert (status, err) == (0, []) and "epoch " not in stdout
    assert (out / "checkpoint.npz").read_bytes() == before
    assert {*renamed, "checkpoint.npz", files.LOCK} == names_in(out)
    if model == "ddpm":  # of which all rows were drawn
        shutil.copy(folder / "preview.png", out)
    assert_same_run(folder, out)
    if model == "vae":
        assert program(model, data=data, out=out, latents=[0, 1], resume=True)[0] == 0
        assert (out / "latents_0_1.png").exists()


def test_a_new_run_puts_all_aside_that_a_run_and_its_evaluation_have_made(whole, copy, small_data):
    model = whole[0]
    measure = {"vae": {"iwae": 2}, "ddpm": {"bound": 2}}[model]
    status, _, err = program("evaluate", copy, data=small_data, workers=1, **measure)
    assert (status, err) == (0, [])
    made = names_in(copy) - {files.LOCK}
    named = set(re.findall(r'"(\w+\.(?:png|gif))"', (ROOT / f"run_{model}.py").read_text(encoding="utf-8")))
    assert made > names_in(whole[1]) - {files.LOCK} and made >= named  # no other flag makes another figure
    mine = {"notes.txt", "holiday.png", "my samples.png", "cat.gif", "samples.npz"}
    for name in mine:
        (copy / name).write_bytes(b"the user's")
    with redirect_stdout(io.StringIO()):
        files.put_aside(copy)
    assert names_in(copy / "earlier-1") == made
    assert names_in(copy) == mine | {files.LOCK, "earlier-1"}


@pytest.mark.skipif(files.fcntl is None, reason="no locks on folders here")
def test_a_second_run_in_the_folder_of_a_running_one_is_refused(small_data, tmp_path, monkeypatch):
    first, second = {"data": small_data, "out": tmp_path / "out", "epochs": 1}, []

    def and_start_another(f):
        def started(*args):
            if parallel.rank == 0:
                second.append(program("vae", **first))
            return f(*args)

        return started

    monkeypatch.setattr(files, "write_log", and_start_another(files.write_log))
    monkeypatch.setattr(plots, "codes_by_class", and_start_another(plots.codes_by_class))
    status, _, err = program("vae", **first, workers=2)
    refused = (
        f"run_vae.py: {first['out']}: another program of scratchgen is at work there; wait, or take another folder"
    )
    assert (status, err) == (0, []) and second == [(2, "", [refused])] * 3  # at the epoch's end, and among the figures
    assert {"checkpoint.npz", "samples.png"} < names_in(tmp_path / "out")


@pytest.fixture
def full_disk():
    """A function after which no file may have more bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@needs_limits
def test_a_full_disk_is_one_line_and_what_was_there_stays(at, full_disk, small_data, runs, tmp_path):
    at(1, lambda run: full_disk(300_000))  # the checkpoint of the start is written
    status, _, err = program("vae", data=small_data, out=tmp_path / "run")
    assert status == 1 and err == [f"run_vae.py: {tmp_path / 'run' / 'checkpoint.npz'}: File too large"]
    assert checkpoint.load(tmp_path / "run" / "checkpoint.npz")[1]["step"] == 0
    assert names_in(tmp_path / "run") == {"checkpoint.npz", "log.csv", files.LOCK}

    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(b"an earlier figure")
    full_disk(2000)
    status, _, err = program("draw", runs / "vae", out=drawn, workers=1)
    assert status == 1 and err == [f"python -m scratchgen.draw: {drawn}: File too large"]
    assert drawn.read_bytes() == b"an earlier figure" and names_in(tmp_path) == {"run", "drawn.png"}


LAST_STEP = {"lr": 1e12, "epochs": 1, "batch_size": 200}


@pytest.mark.parametrize(
    ("model", "flags"), [("vae", {"lr": 1e6}), ("vae", LAST_STEP), ("ddpm", LAST_STEP | {"arch": "mlp", "classes": 0})]
)
def test_divergence_says_so_keeps_the_last_checkpoint_and_its_advice_helps(model, flags, small_data, tmp_path):
    """Also in the very last step, after which no training loss shows it."""
    first = {"data": small_data, "out": tmp_path}
    status, _, err = program(model, **first | flags)
    assert status == 1 and len(err) == 1 and "start again, without --resume, with a smaller --lr" in err[0]
    assert all(np.isfinite(array).all() for array in load(tmp_path / "checkpoint.npz")[0].values())
    assert "metrics.json" not in names_in(tmp_path)
    if flags == {"lr": 1e6}:
        assert program(model, **first)[0] == 0 and metrics_in(tmp_path)["epochs"] == 2


# --------------------------------------------------------------------------------------------- the user's environment


def python(*words, **variables):
    """Run a Python command; its exit status, stdout and stderr."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("switches", [["-OO", "-bb", "-X", "dev"], ["-W", "error"]])
def test_pythons_own_switches_and_a_poor_environment(switches, small_data, tmp_path):
    """Without docstrings and asserts, with all warnings, on a terminal that cannot show the path."""
    if matplotlib.__version_info__ < (3, 10):
        pytest.skip("packages as old as that warn of each other")
    settings = "".join(f"{name}: {value}\n" for name, value in ODD_SETTINGS.items())
    (tmp_path / "matplotlibrc").write_text(settings)
    poor = {"PYTHONIOENCODING": "ascii", "MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://no_such_backend"}
    flags = {"data": small_data, "epochs": 1, "train_images": 16, "workers": 2, "out": tmp_path / "π 日本"}
    status, out, err = python(*switches, ROOT / "run_vae.py", *words(flags), **poor)
    assert err.count("\n") == 1 and "not the published FashionMNIST" in err
    goes_on = "-W" not in switches
    assert status == (0 if goes_on else 1) and (tmp_path / "π 日本" / "samples.png").exists() == goes_on
    assert ("\\u65e5" in out) == goes_on
    for more in [], ["-I"]:
        status, out, err = python(*switches, *more, "-m", "scratchgen.draw", "--help", **poor)
        assert (status, err) == (0, "") and "9 boot" in out


def test_a_ctrl_c_during_the_imports_is_one_line():
    code = """
import builtins, os, signal
load = builtins.__import__
def interrupted(name, *rest, **more):
    if name == "autograd.numpy":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest, **more)
builtins.__import__ = interrupted
import scratchgen.vae
"""
    status, out, err = python("-c", code)
    assert status in (-signal.SIGINT, 130) and out == "" and err == "stopped before it began\n"


def test_a_matplotlib_that_cannot_be_imported_is_one_line_of_each_program(tmp_path):
    """It writes a cache, and reads settings: where nothing may be written, or these are damaged, its import fails."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise OSError('requires access to a writable\\ncache')")
    code = """
import run_ddpm, run_vae, sys
from scratchgen import draw
from scratchgen.machinery import cli
for program in run_vae, run_ddpm, draw:
    try:
        cli.run(program.main)
    except SystemExit as stop:
        print(stop.code)
"""
    status, out, err = python("-c", code, "--out", tmp_path / "out.png", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (status, out) == (0, "2\n" * 3) and err.count("\n") == 3
    assert err.count("matplotlib cannot be imported: requires access to a writable cache") == 3
    assert names_in(tmp_path) == {"matplotlib"}
