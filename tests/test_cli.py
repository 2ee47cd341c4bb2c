"""Flags, one-line errors, and stopping between steps."""

import errno
import os
import signal
import sys
import warnings
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import cli
from scratchgen.checkpoint import CheckpointError
from scratchgen.data import DataError

import pytest

MODULES = {"vae": run_vae, "ddpm": run_ddpm}

BAD_FLAGS = [
    ("--epochs", "0"),
    ("--epochs", "many"),
    ("--batch-size", "-1"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--seed", "-1"),
    ("--workers", "0"),
    ("--train-images", "0"),
    ("--train-images", "60001"),
    ("--arch", "transformer"),
    ("--no-such-flag",),
]
BAD_FLAGS_OF = {
    "vae": [
        ("--latent-dim", "1"),
        ("--latent-dim", str(10**19)),
        ("--weight-decay", "-1"),
        ("--weight-decay", "400"),  # times the learning rate above 1
        ("--latents", "0", "20"),
        ("--latents", "3", "3"),
        ("--latents", "1"),
    ],
    "ddpm": [
        ("--T", "0"),
        ("--T", "2.5"),
        ("--T", str(10**19)),
        ("--schedule", "square"),
        ("--ema", "1.5"),
        ("--ema", "-0.1"),
    ],
}


@pytest.fixture
def finish(capsys, monkeypatch):
    """Run a main function as the scripts do; return its exit status and stderr."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards

    def run(main):
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("model", "flags"), [(m, f) for m in MODULES for f in BAD_FLAGS + BAD_FLAGS_OF[m]])
def test_a_flag_out_of_range_is_one_line(model, flags, finish, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [f"run_{model}.py", "--out", str(tmp_path / "out"), *flags])
    status, stderr = finish(MODULES[model].main)
    assert status == 2 and len(stderr.splitlines()) == 1 and flags[0] in stderr
    assert not (tmp_path / "out").exists()


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("a"), 2),
        (CheckpointError("a"), 2),
        (cli.UsageError("a"), 2),
        (cli.Diverged("a"), 1),
        (cli.Stopped(signal.SIGINT), 130),
        (cli.Stopped(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "x/loss.png"), 1),
        (MemoryError(), 1),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, finish):
    found, stderr = finish(raising(error))
    assert found == status and len(stderr.splitlines()) == 1
    if isinstance(error, OSError):
        assert "x/loss.png: No space left on device" in stderr


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))


def test_a_warning_is_one_line(finish):
    finish(lambda: None)
    assert warnings.formatwarning("mind", UserWarning, "file", 1) == "warning: mind\n"


def test_closed_output_streams_are_borne(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: print("into the void"))
    assert stop.value.code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_next_place_where_it_is_allowed(number):
    saved, handlers = [], [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(cli.Stopped) as stopped, cli.StopBetweenSteps() as stop:
        stop.here(lambda: saved.append("too early"))
        os.kill(os.getpid(), number)
        step_goes_on = True
        stop.here(lambda: saved.append("whole"))
    assert saved == ["whole"] and stopped.value.args == (number,) and step_goes_on
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), cli.StopBetweenSteps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_numbers_are_checked_at_their_bounds():
    parse = cli.number(float, 0, high=1, above=True)
    assert parse("1") == 1 and parse("1e-9") == 1e-9
    for text in ("0", "1.01", "nan", "-inf"):
        with pytest.raises(Exception, match="out of range"):
            parse(text)


def test_epoch_means_are_weighted_by_images():
    sums = {}
    cli.add_to_epoch(sums, {"kl": 2.0}, 30 / 40)
    cli.add_to_epoch(sums, {"kl": 6.0}, 10 / 40)
    assert sums == {"kl": 3.0}


def test_default_data_lies_beside_the_scripts():
    args = cli.parser("", {"mlp": 1}, 1, 1.0, "runs/x").parse_args([])
    assert args.data.resolve() == Path(__file__).parent.parent / "data"
