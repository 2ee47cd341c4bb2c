"""Flags, and one-line errors."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import draw
from scratchgen.data import DataError
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import cli, parallel
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.files import FolderInUse

import matplotlib
import pytest
import tqdm
from conftest import ROOT

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
        ("--beta", "-1"),
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
        ("--additions",),
        ("--additions", "vv"),
        ("--additions", "none", "v"),
        ("--additions", "muon", "all"),
        ("--additions", "global", "--arch", "mlp"),
    ],
}


@pytest.mark.parametrize(("model", "flags"), [(m, f) for m in MODULES for f in BAD_FLAGS + BAD_FLAGS_OF[m]])
def test_a_flag_out_of_range_is_one_line(model, flags, finish, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [f"run_{model}.py", "--out", str(tmp_path / "out"), *flags])
    status, stderr = finish(MODULES[model].main)  # with the command line of the process, as a user's
    assert status == 2 and len(stderr.splitlines()) == 1 and flags[0] in stderr
    assert not (tmp_path / "out").exists()


RUN, OUT = "RUN", "OUT"
WRONG = {
    "scratchgen.draw": [
        ["--modle", "vae"], ["--class", "hat"], ["--class"], ["--class", "10"], ["--class", "boot", "runs/none"],
        ["-n", "0"], ["-n", "many"], ["--steps", "0"], ["--sampler", "euler"], ["--guide", "late"],
        ["--guidance", "-1"], ["--guide", "early", "--guidance", "0"], ["--out", "x"], ["--out", "x.txt"],
        ["runs/none"], [RUN, "--model", "vae"], ["one", "two"], ["--seed", "-1"], ["--model", "gan"],
        ["--model", "vae", "--class", "boot"], ["--class", "boot", "bag", "-n", "1"],
    ],
    "scratchgen.evaluate": [
        [], ["runs/none"], [RUN, "--iwae", "0"], [RUN, "--bound", "2"], [RUN, "--guidance", "1"], [RUN, "--draws", "2"],
        [RUN, "--frechet", "3"], [RUN, "--frechet", "1000000"], [RUN, "--frechet", "10", "--steps", "5"],
        [RUN, "--vae", "x"], [RUN, "--data", "nowhere"], [RUN, "--frechte", "10"],
    ],
    "run_vae.py": [
        ["--latent-dims", "3", "4"], ["--latents", "1", "1"], ["--beta", "-1"], ["--epochs", "0"], ["--arch", "unet"],
        ["--data", "nowhere"], ["--train-images", "99999999"], ["--resume", "--out", OUT], ["--out", "/dev/null"],
    ],
    "run_ddpm.py": [
        ["--T", "0"], ["--additions", "all", "v"], ["--additions", "w"], ["--classes", "--arch", "mlp"],
        ["--emma", "1"], ["--ema", "2"], ["--schedule", "square"], ["--resume", "--out", OUT],
    ],
}  # fmt: skip


@pytest.mark.parametrize("program", WRONG)
def test_fifty_wrong_command_lines_are_one_line_each(program, runs, small_data, tmp_path, finish, monkeypatch):
    mains = {"scratchgen.draw": draw, "scratchgen.evaluate": evaluate, "run_vae.py": run_vae, "run_ddpm.py": run_ddpm}
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # of the small data
    for flags in WRONG[program]:
        flags = [{RUN: str(runs / "vae"), OUT: str(tmp_path / "out")}.get(flag, flag) for flag in flags]
        if program != "scratchgen.draw" and "nowhere" not in flags:
            flags += ["--data", str(small_data)]
        status, stderr = finish(partial(mains[program].main, flags))
        where = program if program.endswith(".py") else f"python -m {program}"
        assert status in (1, 2) and stderr.count("\n") == 1 and stderr.startswith(f"{where}: "), (flags, stderr)
        assert list(tmp_path.glob("*.*")) == []


@pytest.mark.parametrize(
    ("flags", "meant"),
    [(["--latentdim", "3"], "--latent-dim"), (["--epoch-s", "3"], "--epochs"), (["--lrr", "3"], "--lr"), (["7"], None)],
)
def test_a_flag_that_is_nearly_one_is_answered_with_the_one_that_was_meant(flags, meant, capsys):
    with pytest.raises(SystemExit):
        run_vae.main(flags)
    error = capsys.readouterr().err
    assert f"unknown: {' '.join(flags)}" in error and ("did you mean" in error) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in error


@pytest.mark.parametrize("program", ["run_vae.py", "run_ddpm.py", "draw", "evaluate", *(ROOT / "docs").glob("*.py")])
def test_help_fits_a_terminal_of_80_columns(program):
    command = ["-m", f"scratchgen.{program}"] if program in ("draw", "evaluate") else [str(program)]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stderr


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("a"), 2),
        (CheckpointError("a"), 2),
        (FolderInUse("a"), 2),
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
    sys.stdout.close()
    sys.stderr.close()


def test_numbers_are_checked_at_their_bounds():
    parse = cli.number(float, 1e-9, high=1)
    assert parse("1") == 1 and parse("1e-9") == 1e-9
    for text in ("0", "1.01", "nan", "-inf"):
        with pytest.raises(Exception, match="out of range"):
            parse(text)


def test_default_data_lies_beside_the_scripts():
    args = cli.run_parser("run_x.py", "", {"mlp": 1}, 1, 1.0, "runs/x").parse_args([])
    assert args.data.resolve() == Path(__file__).parent.parent / "data"


def test_flags_come_from_a_list_or_from_the_command_line_and_are_kept_as_a_command(monkeypatch):
    parser = cli.run_parser("run_x.py", "", {"mlp": 3, "unet": 2}, 1, 1.0, "runs/x")
    monkeypatch.setattr(sys, "argv", ["/somewhere/run_x.py", "--seed", "7"])
    args = parser.parse_args()
    assert args.seed == 7 and args.command == "python run_x.py --seed 7"
    args = parser.parse_args(["--out", "a folder", "--arch", "unet"])
    assert args.seed == 0 and args.arch == "unet" and args.command == "python run_x.py --out 'a folder' --arch unet"


@pytest.mark.parametrize("module", MODULES.values())
def test_the_help_of_every_flag_says_its_default_once(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    _, *flags = (" ".join(flag.split()) for flag in re.split(r"\n  --", capsys.readouterr().out))
    assert len(flags) >= 13
    for flag in flags:
        expected = 0 if flag.startswith(("resume", "classes")) else 1
        assert flag.count("(default: ") == expected, flag
    assert any(flag.startswith("seed") and "(default: 0)" in flag for flag in flags)


def test_a_bar_starts_no_thread_that_a_fork_would_lose(monkeypatch):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    before = threading.active_count()
    with cli.progress(10, "drawn", " images") as bar:
        bar.update(5)
        assert threading.active_count() == before and cli.tqdm.monitor_interval == 0


def test_only_rank_0_shows_a_bar(monkeypatch):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", rank)
        with cli.progress(10, "drawn", " images") as bar:
            assert bar.disable == (rank > 0)


def test_a_bar_says_what_it_counts_and_goes_on_from_what_is_done(monkeypatch, capsys):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(cli.progress(3, "bound", " steps", "abc")) == ["a", "b", "c"]  # over these
    shown = capsys.readouterr().err
    assert "bound" in shown and "3/3" in shown and "steps/s" in shown
    with cli.progress(10, None, " steps", done=4) as bar:
        bar.update()
        assert (bar.n, bar.total) == (5, 10)


@pytest.mark.skipif(int(tqdm.__version__.split(".")[1]) < 66, reason="it had no such switch yet")
def test_tqdms_own_switch_turns_the_bar_off():
    """TQDM_DISABLE is read when tqdm is imported."""
    code = "from scratchgen.machinery import cli\ncli.sys.stderr.isatty = lambda: True\n"
    code += "print(list(cli.progress(3, 'bound', ' steps', 'abc')))"
    for variables, shown in (({"TQDM_DISABLE": "1"}, False), ({}, True)):
        environment = os.environ | variables
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == "['a', 'b', 'c']\n" and ("3/3" in done.stderr) == shown


@pytest.mark.parametrize("flags", [["--guidance", "0", "0.5"], ["--sampler", "ddim", "ddpm"], ["--guide", "early"]])
@pytest.mark.parametrize("folder", ["runs/ddpm", "/somewhere/ddpm", "../ddpm"])
def test_a_folder_may_stand_where_one_would_write_it(flags, folder):
    argvs = [[folder, "--frechet", "9", *flags], ["--frechet", "9", *flags, folder], [*flags, folder, "--frechet", "9"]]
    found = [vars(evaluate.parse_arguments(argv)) for argv in argvs]
    for args, argv in zip(found, argvs, strict=True):
        assert args.pop("command").endswith(" ".join(argv))  # as it was written
        assert args["run"] == Path(folder) and args == found[0]


def test_what_is_no_folder_is_no_value_either(capsys):
    for flags in (["--guidance", "0", "much"], ["--sampler", "ddim", "eulr"], ["--class", "boot", "hat"]):
        program = draw if "--class" in flags else evaluate
        with pytest.raises(SystemExit):
            program.parse_arguments([*flags, *([] if program is draw else ["runs/x"])])
        assert flags[-1] in capsys.readouterr().err
    assert draw.parse_arguments(["--class", "boot", "runs/x"]).run == Path("runs/x")
    args = draw.parse_arguments(["--class", "T-shirt/top", "boot"])  # a class with a / in its name
    assert args.run is None and getattr(args, "class") == [0, 9]


@pytest.mark.parametrize("program", [["run_vae.py"], ["run_ddpm.py"], ["-m", "scratchgen.draw"]])
def test_a_matplotlib_that_cannot_be_imported_is_one_line(program, tmp_path):
    """It writes a cache, and reads settings: where nothing may be written, or these are damaged, its import fails."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise OSError('requires access to a writable\\ncache')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *program, "--out", str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "matplotlib cannot be imported: requires access to a writable cache" in done.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("switch", [["-W", "error"], ["-OO"], ["-bb"], ["-X", "dev"], ["-I"]])
def test_pythons_own_switches(switch, small_data, tmp_path):
    if switch[0] in ("-W", "-X") and matplotlib.__version_info__ < (3, 10):
        pytest.skip("packages as old as that warn of each other")
    flags = ["--data", small_data, "--epochs", 1, "--train-images", 16, "--workers", 2, "--out", tmp_path / "out"]
    command = [sys.executable, *switch, ROOT / "run_vae.py", *flags]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.count("\n") == 1 and "not the published FashionMNIST" in done.stderr
    assert done.returncode == ("error" in switch) and (tmp_path / "out" / "loss.png").exists() != ("error" in switch)
    command = [sys.executable, *switch, "-m", "scratchgen.draw", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "9 boot" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="no such signal here")
def test_a_limit_on_the_time_which_speaks_each_second_is_heard_once():
    stop = cli.Stop()
    with pytest.raises(cli.Stopped), stop:
        stop(signal.SIGXCPU, None)
        stop(signal.SIGXCPU, None)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_in_a_log_there_is_no_bar(capsys):
    assert list(cli.progress(3, "bound", " steps", "abc")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_message_with_line_ends_in_it_is_one_line_still(finish):
    status, stderr = finish(raising(cli.UsageError("a folder\nnamed\r\nso: found nothing")))
    assert status == 2 and stderr.count("\n") == 1 and "a folder named so: found nothing" in stderr


@pytest.mark.parametrize("number", parallel.STOP_SIGNALS)
def test_a_handler_has_the_signals_until_the_block_ends(number):
    before = [signal.getsignal(each) for each in parallel.STOP_SIGNALS]
    received = []

    def handler(signal_number, frame):
        received.append(signal_number)

    with pytest.raises(ZeroDivisionError), cli.on_stop(handler):
        os.kill(os.getpid(), number)
        with cli.on_stop(lambda *_: received.append("inner")):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        raise ZeroDivisionError
    assert received == [number, "inner", number]
    assert [signal.getsignal(each) for each in parallel.STOP_SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so_and_a_thread_asks_for_none(finish):
    number = parallel.STOP_SIGNALS[-1]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        status, stderr = finish(lambda: os.kill(os.getpid(), number))
        assert (status, stderr) == (0, "") and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    handlers = []

    def in_a_thread():
        with cli.on_stop(cli.interrupt):
            handlers.extend(signal.getsignal(each) for each in parallel.STOP_SIGNALS)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert len(handlers) == len(parallel.STOP_SIGNALS) and cli.interrupt not in handlers


@pytest.mark.parametrize("number", parallel.STOP_SIGNALS)
def test_every_program_ends_in_one_line_when_it_is_told_to_and_cleans_up(number, finish):
    usual, cleaned = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL, []
    before = signal.signal(number, usual)

    def main():
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    status, stderr = finish(main)
    assert status == 128 + number and len(stderr.splitlines()) == 1 and cleaned == [True]
    assert signal.signal(number, before) == usual
