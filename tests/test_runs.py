"""The two scripts as a user runs them: what they make, what they refuse, and that nothing is lost when they stop."""

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from scratchgen.machinery import parallel

import numpy as np
import pytest

with suppress(ImportError):  # Windows has none
    import resource
needs_limits = pytest.mark.skipif("resource" not in globals(), reason="no limits on the size of files here")
ROOT = Path(__file__).parent.parent
MODELS = ["vae", "ddpm"]
FLAGS = {  # small runs of a few seconds
    "vae": ["--latent-dim", "5", "--batch-size", "16"],
    "ddpm": ["--T", "5", "--batch-size", "16"],
}
FIGURES = {
    "vae": {"loss.png", "reconstructions.png", "samples.png", "interpolation.png"},
    "ddpm": {"loss.png", "forward.png", "trajectory.png", "samples.png", "sampling.gif", "preview.png"},
}
NUMBERS = {
    "vae": {"elbo", "reconstruction", "kl", "entropy_floor"},
    "ddpm": {"test_loss", "alpha_bar_T", "prior_kl"},
}


def finish(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    return result.returncode, result.stdout, result.stderr


# The script as a program, but with shards so small that a minibatch of 16 has work for two ranks.
PROGRAM = """
import itertools, os, sys
sys.path.insert(0, {root!r})
from scratchgen.machinery import cli, files, parallel
from scratchgen.machinery import run as run_module
import run_{model} as script

script.SHARD = 8
sys.argv[0] = "run_{model}.py"
{change}
cli.run(script.main)
"""


def run(model, *flags, change="", **options):
    code = PROGRAM.format(root=str(ROOT), model=model, change=change)
    return finish([sys.executable, "-c", code, *map(str, flags)], **options)


def arrays_in(folder):
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "state"}


def state_in(folder):
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        return json.loads(str(file["state"]))


def assert_same_arrays(a, b):
    a, b = arrays_in(a), arrays_in(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="session", params=["vae", "ddpm"])
def whole_run(request, small_data, tmp_path_factory):
    """(model, flags, folder) of a run of three epochs that was left alone, with one worker."""
    model, out = request.param, tmp_path_factory.mktemp(request.param)
    flags = [*FLAGS[model], "--data", small_data, "--epochs", 3]
    status, stdout, stderr = run(model, *flags, "--workers", 1, "--out", out)
    assert status == 0, stderr
    return model, flags, out, stdout, stderr


def test_a_run_makes_all_its_figures_and_numbers(whole_run):
    model, _, out, stdout, stderr = whole_run
    made = {path.name for path in out.iterdir()}
    assert made >= FIGURES[model] | {"log.csv", "metrics.json", "checkpoint.npz"}
    if model == "vae":
        assert len([name for name in made if name.startswith("latents_")]) == 1
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == NUMBERS[model] | {"seconds", "epochs", "seed", "parameters", "command", "weights"}
    assert metrics["epochs"] == 3 and metrics["command"].startswith(f"python run_{model}.py ")
    if model == "vae":
        assert metrics["elbo"] == metrics["reconstruction"] - metrics["kl"] < -metrics["entropy_floor"]
    assert stdout.count("epoch ") == 3 and "\r" not in stdout + stderr  # one line an epoch, no bar in a pipe
    assert stderr.count("\n") == 1 and "not the published FashionMNIST" in stderr


def test_training_lowers_the_loss(whole_run):
    model, _, out, _, _ = whole_run
    log = state_in(out)["log"]
    losses = [-row["test_elbo"] if model == "vae" else row["test_loss"] for row in log]
    assert losses[-1] < losses[0]
    for row in log:  # the training loss is the mean of its own epoch: near the test loss, not a sum over epochs
        train, test = (row[f"{part}_{'elbo' if model == 'vae' else 'loss'}"] for part in ("train", "test"))
        assert 0.5 < train / test < 2


def test_same_seed_same_bits_with_any_number_of_workers(whole_run, tmp_path):
    model, flags, out, _, _ = whole_run
    assert run(model, *flags, "--workers", 2, "--out", tmp_path)[0] == 0
    assert_same_arrays(out, tmp_path)
    # Not the weights alone: what is evaluated and drawn with them, too.
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path)]
    assert [numbers[0][name] for name in NUMBERS[model]] == [numbers[1][name] for name in NUMBERS[model]]
    assert (out / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()


def test_another_seed_gives_another_run(whole_run, tmp_path):
    model, flags, out, _, _ = whole_run
    assert run(model, *flags, "--epochs", 1, "--seed", 1, "--out", tmp_path)[0] == 0
    a, b = arrays_in(out), arrays_in(tmp_path)
    weights = [name for name in a if name.endswith("/w") and not name.startswith("moments/v/")]  # Muon leaves v zero
    assert all(np.any(a[name] != b[name]) for name in weights)


# A signal in the middle of epoch 2, between its steps 18 and 19; an epoch has 13.
STEPS, STOP = 13, 18
INTERRUPTED = """
calls, stop_if_asked = itertools.count(1), run_module.Run.stop_if_asked

def interrupt(self):  # of all ranks rank 0 does it
    if next(calls) == {step} and parallel.rank == 0:
        os.kill({whom}, {how})
    stop_if_asked(self)

run_module.Run.stop_if_asked = interrupt
"""


def interrupt(how, model, *flags, whom="os.getpid()"):
    change = INTERRUPTED.format(step=STOP, how=int(how), whom=whom)
    return run(model, *flags, "--workers", 2, change=change, start_new_session=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])  # test_run.py has SIGTERM
def test_stopped_in_the_middle_of_epoch_2_and_resumed_gives_the_same_bits(how, whole_run, tmp_path):
    model, flags, whole, _, _ = whole_run
    # Ctrl-C on a terminal goes to the whole group of processes, which is what 0 means to kill(2).
    whom = "0" if how == signal.SIGINT else "os.getpid()"
    status, _, err = interrupt(how, model, *flags, "--out", tmp_path, whom=whom)
    assert status == (-9 if how == signal.SIGKILL else 128 + how)
    assert state_in(tmp_path)["step"] == (STEPS if how == signal.SIGKILL else STOP)
    if how != signal.SIGKILL:
        assert "--resume" in err.splitlines()[-1] and "Traceback" not in err

    # Elsewhere, too: with five cores a fresh run would have other shards, and so other bits.
    change = "run_module.blas.available_cores = lambda: 5"
    status, out, err = run(model, *flags, "--out", tmp_path, "--resume", "--workers", 1, change=change)
    assert status == 0, err
    assert_same_arrays(whole, tmp_path)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in state_in(f)["log"]] for f in (whole, tmp_path)]
    assert logs[0] == logs[1]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.skipif(not parallel.CAN_FORK, reason="workers are threads here")
def test_a_killed_rank_is_one_line_and_nothing_is_lost(whole_run, tmp_path):
    model, flags, whole, _, _ = whole_run
    status, _, err = interrupt(signal.SIGKILL, model, *flags, "--out", tmp_path, whom="self.ranks.children[-1]")
    assert "Traceback" not in err and "was killed, for want of memory? Try fewer --workers" in err.splitlines()[-1]
    assert status == 1  # the world was at fault
    assert state_in(tmp_path)["step"] == STEPS
    assert run(model, *flags, "--out", tmp_path, "--resume")[0] == 0
    assert_same_arrays(whole, tmp_path)


def test_resuming_a_finished_run_draws_again_and_changes_nothing(whole_run):
    model, flags, out, _, _ = whole_run
    before = (out / "checkpoint.npz").read_bytes()
    (out / "samples.png").unlink()
    status, stdout, _ = run(model, *flags, "--out", out, "--resume")
    assert status == 0 and "epoch " not in stdout
    assert (out / "samples.png").exists() and (out / "checkpoint.npz").read_bytes() == before


def test_a_new_run_in_the_same_folder_keeps_the_old_checkpoint(whole_run, tmp_path):
    model, flags, out, _, _ = whole_run
    first = (out / "checkpoint.npz").read_bytes()
    (tmp_path / "checkpoint.npz").write_bytes(first)
    status, stdout, _ = run(model, *flags, "--epochs", 1, "--out", tmp_path)
    assert status == 0 and "kept" in stdout
    assert (tmp_path / "earlier-1" / "checkpoint.npz").read_bytes() == first
    assert (tmp_path / "checkpoint.npz").read_bytes() != first


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(whole_run, tmp_path):
    model, flags, whole, _, _ = whole_run
    second = [sys.executable, f"run_{model}.py", *map(str, flags), "--workers", "1", "--out", str(tmp_path)]
    change = f"""
import subprocess
write_log = files.write_log
def and_start_another(*args):
    if parallel.rank == 0:
        result = subprocess.run({second!r}, cwd={str(ROOT)!r}, capture_output=True, text=True)
        print("second", result.returncode, result.stderr.splitlines()[-1])
    write_log(*args)
files.write_log = and_start_another
"""
    status, stdout, _ = run(model, *flags, "--workers", 2, "--out", tmp_path, change=change)
    refused = f"second 2 run_{model}.py: {tmp_path}: another program of scratchgen is at work there; wait"
    assert status == 0 and stdout.count(refused) == 4  # once an epoch, and at the end
    assert_same_arrays(whole, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}


@needs_limits
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(whole_run, tmp_path):
    """A limit on the size of files stands in for the full disk: writing fails half-way in the same manner."""
    model, flags, _, _, _ = whole_run
    interrupt(signal.SIGKILL, model, *flags, "--out", tmp_path)
    before = (tmp_path / "checkpoint.npz").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    status, _, stderr = run(model, *flags, "--out", tmp_path, "--resume", preexec_fn=limit)
    assert status == 1 and "Traceback" not in stderr
    assert len(stderr.splitlines()) == 2  # the first says that these are not the published files
    assert "checkpoint.npz" in stderr.splitlines()[1]
    assert (tmp_path / "checkpoint.npz").read_bytes() == before
    assert list(tmp_path.glob(".*")) == [tmp_path / ".lock"]


def one_line_error(model, *flags):
    status, _, stderr = run(model, *flags)
    assert status == 2, stderr
    assert len(stderr.splitlines()) == 1 and "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize("model", MODELS)
def test_missing_and_broken_data_are_one_line(model, small_data, tmp_path):
    assert "nowhere" in one_line_error(model, "--data", "nowhere", "--out", tmp_path / "out")
    names = sorted(os.listdir(small_data))
    for name in names:
        (tmp_path / name).write_bytes((small_data / name).read_bytes())
    victim = tmp_path / names[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert names[0] in one_line_error(model, "--data", tmp_path, "--out", tmp_path / "out")


def test_a_checkpoint_of_another_model_or_T_is_one_line(whole_run, small_data, tmp_path):
    model, flags, out, _, _ = whole_run
    other = {"vae": "ddpm", "ddpm": "vae"}[model]
    assert f"model {model}" in one_line_error(other, "--data", ROOT / "data", "--out", out, "--resume")
    key, flag = {"vae": ("latent_dim", "--latent-dim"), "ddpm": ("T", "--T")}[model]
    assert f"{key} 5" in run(model, *flags, "--out", out, flag, 6, "--resume")[2]
    assert "found no such file" in run(model, *flags, "--out", tmp_path, "--resume")[2]


LAST_STEP = ("--lr", 1e12, "--epochs", 1, "--batch-size", 200)


@pytest.mark.parametrize(
    ("model", "flags"), [("vae", ("--lr", 1e6)), ("vae", LAST_STEP), ("ddpm", ("--arch", "mlp", *LAST_STEP))]
)
def test_divergence_says_so_and_keeps_the_last_checkpoint(model, flags, small_data, tmp_path):
    """Also in the very last step, after which no training loss shows it."""
    status, _, stderr = run(model, *FLAGS[model], "--data", small_data, "--out", tmp_path, *flags)
    assert status == 1 and "--lr" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert all(np.isfinite(a).all() for a in arrays_in(tmp_path).values())
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("model", MODELS)
def test_help_names_every_flag_and_shows_examples(model):
    status, stdout, _ = run(model, "--help")
    assert status == 0 and f"python run_{model}.py" in stdout
    for flag in ("epochs", "batch-size", "lr", "seed", "workers", "data", "out", "train-images", "resume", "arch"):
        assert f"--{flag}" in stdout


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_measuring_what_is_not_there_is_one_line(tmp_path):
    evaluate, no_data = ["-m", "scratchgen.evaluate"], ["--data", tmp_path / "none"]
    for program, flags in (
        (["-m", "scratchgen.draw"], [tmp_path]),
        (evaluate, [tmp_path]),
        (evaluate, []),
        (["docs/train_classifier.py"], [*no_data, "--out", tmp_path / "weights"]),
        (["docs/published_protocol.py"], [*no_data, "--out", tmp_path / "protocol"]),
        (["docs/ablation.py"], [*no_data, "--runs", tmp_path / "runs"]),
        (["docs/sweeps.py"], [tmp_path]),
    ):
        status, stdout, stderr = finish([sys.executable, *program, *map(str, flags)], cwd=ROOT)
        assert status == 2 and stdout == "" and stderr.count("\n") == 1 and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_help_of_evaluate_teaches():
    status, stdout, _ = finish([sys.executable, "-m", "scratchgen.evaluate", "--help"], cwd=ROOT)
    assert status == 0 and "examples:" in stdout and "--iwae K" in stdout


@needs_limits
def test_drawn_images_on_a_full_disk_leave_what_was_there(whole_run, tmp_path):
    """The limit on file size stands in for the disk: 20 images have room in it, 400 have not."""
    model, _, out, _, _ = whole_run
    command = [
        sys.executable,
        "-m",
        "scratchgen.draw",
        str(out),
        "--out",
        str(tmp_path / "drawn.png"),
        "--workers",
        "1",
    ]
    status, _, stderr = finish([*command, "-n", "20"], cwd=ROOT)
    assert status == 0, stderr
    before = (tmp_path / "drawn.png").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    status, _, stderr = finish([*command, "-n", "400"], cwd=ROOT, preexec_fn=small_files)
    assert status == 1 and "drawn.png" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert (tmp_path / "drawn.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------------- the user's environment


def test_neither_a_notebooks_backend_nor_a_matplotlibrc_changes_a_figure(whole_run, tmp_path):
    model, flags, out, _, _ = whole_run
    settings = "text.usetex: True\nfont.family: No Such Font\nsavefig.bbox: tight\nsavefig.dpi: 30\naxes.grid: True\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    environment = os.environ | {
        "MPLBACKEND": "module://no_such_backend",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    status, _, err = run(model, *flags, "--out", tmp_path / "out", env=environment)
    assert status == 0 and "Traceback" not in err
    for name in ("loss.png", "samples.png"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_path_that_cannot_be_shown_is_no_reason_to_stop(encoding, small_data, tmp_path):
    flags = ["--data", small_data, "--epochs", 1, "--train-images", 16, "--out", tmp_path / "π 日本"]
    status, out, err = run("vae", *flags, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (
        status == 0 and "\\u65e5" in out and "Traceback" not in err and (tmp_path / "π 日本" / "samples.png").exists()
    )


def test_a_ctrl_c_during_the_imports_is_one_line():
    code = "import os, signal, sys, builtins\nload = builtins.__import__\ndef interrupted(name, *rest, **more):\n"
    code += (
        "    if name == 'autograd.numpy': os.kill(os.getpid(), signal.SIGINT)\n    return load(name, *rest, **more)\n"
    )
    code += "builtins.__import__ = interrupted\nimport scratchgen.vae"
    status, out, err = finish([sys.executable, "-c", code], cwd=ROOT)
    assert status in (-signal.SIGINT, 130) and out == "" and err == "stopped before it began\n"


def test_advice_after_a_divergence_leads_somewhere(small_data, tmp_path):
    flags = [*FLAGS["vae"], "--data", small_data, "--epochs", 1, "--out", tmp_path]
    status, _, err = run("vae", *flags, "--lr", 1e6)
    assert status == 1 and "start again, without --resume, with a smaller --lr" in err and len(err.splitlines()) == 2
    assert run("vae", *flags)[0] == 0 and (tmp_path / "metrics.json").exists()
