"""Flags, and one-line errors."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import draw
from scratchgen.data import DataError
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import cli, parallel
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.files import FolderInUse

import pytest
import tqdm
from conftest import ROOT, script

MODULES = {"run_vae.py": run_vae, "run_ddpm.py": run_ddpm, "scratchgen.draw": draw, "scratchgen.evaluate": evaluate}
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.py"))


def module_of(program):
    return MODULES[program] if program in MODULES else script(program)


RUN, OUT, BROKEN = "RUN", "OUT", "BROKEN"
OF_BOTH = [
    ["--epochs", "0"], ["--epochs", "many"], ["--batch-size", "-1"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"],
    ["--seed", "-1"], ["--workers", "0"], ["--train-images", "0"], ["--train-images", "60001"], ["--lrr", "3"],
    ["--arch", "transformer"], ["--data", "nowhere"], ["--data", BROKEN], ["--resume", "--out", OUT],
    ["--out", "/dev/null"],
]  # fmt: skip
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
    "run_vae.py": OF_BOTH + [
        ["--latent-dim", "1"], ["--latent-dim", "1e3"], ["--latentdim", "3"], ["7"], ["--beta", "-1"],
        ["--latent-dim", str(10**19)], ["--latents", "0", "20"], ["--latents", "3", "3"], ["--latents", "1"],
    ],
    "run_ddpm.py": OF_BOTH + [
        ["--T", "0"], ["--T", "2.5"], ["--T", str(10**19)], ["--schedule", "square"], ["--emma", "1"], ["--ema", "1.5"],
        ["--ema", "-0.1"], ["--additions"], ["--additions", "vv"], ["--additions", "none", "v"],
        ["--additions", "muon", "all"], ["--additions", "global", "--arch", "mlp"], ["--classes", "--arch", "mlp"],
    ],
    "docs/train_classifier.py": [["--data", "nowhere", "--out", OUT]],
    "docs/published_protocol.py": [["--data", "nowhere", "--out", OUT]],
    "docs/ablation.py": [["--runs", OUT], ["--seeds", "-1"]],
    "docs/sweeps.py": [["runs/none"], []],
}  # fmt: skip


@pytest.mark.parametrize("program", WRONG)
def test_a_wrong_command_line_is_one_line_and_makes_nothing(program, runs, small_data, tmp_path, finish, monkeypatch):
    broken, main = tmp_path / "broken", module_of(program).main
    shutil.copytree(small_data, broken)
    images = broken / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # of the small data
    must_name = {"nowhere": "nowhere", "/dev/null": "/dev/null", BROKEN: images.name, "--resume": "no such file"}
    must_name |= {"--runs": "out", "7": "unknown: 7 (", "--lrr": "unknown: --lrr 3; did you mean --lr?"}
    must_name |= {"--latentdim": "did you mean --latent-dim?"}
    for flags in WRONG[program]:
        named = next((words for flag, words in must_name.items() if flag in flags), [*flags, ""][0])
        flags = [{RUN: f"{runs / 'vae'}", OUT: f"{tmp_path / 'out'}", BROKEN: f"{broken}"}.get(f, f) for f in flags]
        if program in ("run_vae.py", "run_ddpm.py", "scratchgen.evaluate") and "--data" not in flags:
            flags += ["--data", str(small_data)]
        monkeypatch.setattr(sys, "argv", [program, *flags])
        status, stderr = finish(main)  # with the command line of the process, as a user's
        where = program if program.endswith(".py") else f"python -m {program}"
        assert status == (1 if "/dev/null" in flags else 2), (flags, stderr)
        assert stderr.count("\n") == 1 and stderr.startswith(f"{where}: "), (flags, stderr)
        assert named in stderr or program.startswith("scratchgen"), (flags, stderr)
        if "--resume" in flags:  # which looks there
            shutil.rmtree(tmp_path / "out")
        assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("program", [*MODULES, *DOCS])
def test_help_fits_a_terminal_of_80_columns_and_says_each_default_once(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        module_of(program).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    if program.startswith("run_"):
        assert f"  python {program} --" in text  # an example
        args = vars(MODULES[program].parse_arguments([]))
        flags = {flag.split()[0]: " ".join(flag.split()) for flag in re.split(r"\n  --", text)[1:]}
        assert {name.replace("-", "_") for name in flags} == args.keys() - {"command"}
        for name, words in flags.items():
            default = args[name.replace("-", "_")]
            assert words.count("(default: ") == (0 if name in ("resume", "classes") else 1), words
            if name not in ("resume", "classes", "data", "epochs", "train-images", "latents", "additions"):
                assert f"(default: {default})" in words or f", here {default};" in words
        for arch in MODULES[program].EPOCHS:
            args = MODULES[program].parse_arguments(["--arch", arch])
            assert re.search(rf"\b{args.epochs} for {arch}\b", flags["epochs"])
    elif program == "scratchgen.evaluate":
        assert "examples:" in text and "--iwae K" in text


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
        (cli.UsageError("a folder\nnamed\r\nso"), 2),
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
    assert found == status and stderr.count("\n") == 1
    said = {OSError: "x/loss.png: No space left on device", cli.UsageError: "a folder named so"}
    assert said.get(type(error), "") in stderr


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))


def test_a_line_arrives_when_it_is_printed_in_a_pipe_too_and_whatever_it_says(monkeypatch):
    """What a pipe has got shows at once how far a run is, and a path may have letters that it cannot show."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="ascii"))

    def main():
        print("epoch 1")
        assert pipe.getvalue() == b"epoch 1\n"
        print("runs/\u65e5 \udcff")
        assert pipe.getvalue().endswith(b"\nruns/\\u65e5 \\udcff\n")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 0 and not sys.stdout.write_through


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


def test_flags_come_from_a_list_or_from_the_command_line_and_are_kept_as_a_command(monkeypatch):
    parser = cli.run_parser("run_x.py", "", {"mlp": 3, "unet": 2}, 1, 1.0, "runs/x")
    monkeypatch.setattr(sys, "argv", ["/somewhere/run_x.py", "--seed", "7"])
    args = parser.parse_args()
    assert args.seed == 7 and args.arch == "mlp" and args.command == "python run_x.py --seed 7"
    assert args.data.resolve() == ROOT / "data"
    args = parser.parse_args(["--out", "a folder", "--arch", "unet"])
    assert args.seed == 0 and args.arch == "unet" and args.command == "python run_x.py --out 'a folder' --arch unet"


def test_a_bar_says_what_it_counts_and_goes_on_from_what_is_done(capsys, monkeypatch):
    assert list(cli.progress(3, "bound", " steps", "abc")) == ["a", "b", "c"] and capsys.readouterr().err == ""
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)  # in a log there is no bar
    before = threading.active_count()
    assert list(cli.progress(3, "bound", " steps", "abc")) == ["a", "b", "c"]  # over these
    shown = capsys.readouterr().err
    assert "bound" in shown and "3/3" in shown and "steps/s" in shown
    with cli.progress(10, None, " steps", done=4) as bar:
        assert "4/10" in capsys.readouterr().err
        bar.update()
        assert (bar.n, bar.total, bar.disable) == (5, 10, False)
        # A thread of its own would be lost by a fork.
        assert threading.active_count() == before and cli.tqdm.monitor_interval == 0
    monkeypatch.setattr(parallel, "rank", 1)  # which is quiet
    with cli.progress(10, None, " steps") as bar:
        assert bar.disable


@pytest.mark.skipif(int(tqdm.__version__.split(".")[1]) < 66, reason="it had no such switch yet")
def test_tqdms_own_switch_turns_the_bar_off():
    """TQDM_DISABLE is read when tqdm is imported."""
    code = "from scratchgen.machinery import cli\ncli.sys.stderr.isatty = lambda: True\n"
    code += "print(list(cli.progress(3, 'bound', ' steps', 'abc')))"
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['a', 'b', 'c']\n", "")


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


@pytest.mark.parametrize("number", parallel.STOP_SIGNALS)
def test_a_handler_has_the_signals_until_the_block_ends(number):
    before = [signal.getsignal(each) for each in parallel.STOP_SIGNALS]
    received = []
    with pytest.raises(ZeroDivisionError), cli.on_stop(lambda number, frame: received.append(number)):
        os.kill(os.getpid(), number)
        with cli.on_stop(lambda *_: received.append("inner")):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        raise ZeroDivisionError
    assert received == [number, "inner", number]
    assert [signal.getsignal(each) for each in parallel.STOP_SIGNALS] == before


@pytest.mark.parametrize("handler", [cli.interrupt, cli.Stop()])
def test_a_signal_that_is_ignored_stays_so(handler):
    """As nohup, or a shell's &, has asked for."""
    number = parallel.STOP_SIGNALS[-1]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with cli.on_stop(handler):
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


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
    assert status == 128 + number and stderr.endswith(f": {cli.RESUMABLE}\n") and stderr.count("\n") == 1
    assert cleaned == [True] and signal.signal(number, before) == usual


@pytest.mark.parametrize("first", parallel.STOP_SIGNALS)
def test_a_second_signal_stops_at_once_but_for_a_limit_on_the_time_which_speaks_each_second(first):
    stop = cli.Stop()
    with pytest.raises(KeyboardInterrupt) as interrupt, cli.on_stop(stop), stop:
        os.kill(os.getpid(), first)
        if hasattr(signal, "SIGXCPU"):
            os.kill(os.getpid(), signal.SIGXCPU)
        assert stop.received == first
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.value.args == (signal.SIGTERM,)
