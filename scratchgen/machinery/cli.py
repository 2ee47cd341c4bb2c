"""What all programs here share at the command line: flags, one-line errors, progress, and how they are stopped.

Nothing here knows about models; the training loop stands in the scripts.
"""

import argparse
import difflib
import math
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from scratchgen import plots
from scratchgen.data import DATA, UserError
from scratchgen.machinery import blas, parallel

import numpy as np

with warnings.catch_warnings():  # a notebook without widgets gets a bar of text, which is fine
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

tqdm.monitor_interval = 0  # no thread to watch the bars: ranks are forked, and a fork should find no thread at work
tqdm.set_lock(threading.RLock())  # its own is shared by processes, and Python 3.14 finds it lost where a rank ends
program = None  # what begins a message, as the parser of this program says it


class UsageError(UserError):
    """Flags that contradict each other or the data."""


class Diverged(UserError):
    """The loss is no longer a finite number."""


class Stopped(Exception):
    """The run was asked to stop by this signal, and has saved what it had."""

    def _render_traceback_(self):  # as of a `UserError`
        return [STOPPED]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, without the whole usage above it."""

    def __init__(self, prog, description):
        global program
        program = prog
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        message += " (--help explains every flag)"
        if in_notebook():
            raise UsageError(message)
        self.exit(2, f"{self.prog}: {message}\n")

    def flag(self, name, help, **options):
        """A flag whose help ends in its default value, if it has one and the help does not name it."""
        if options.get("default") is not None and "(default: " not in help:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)

    def parse_args(self, argv=None):
        words = argv
        if argv is None:
            words = [] if in_notebook() else sys.argv[1:]  # a notebook's are its kernel's
        args, unknown = self.parse_known_args(self.folders_first(words))
        if unknown:
            meant = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            self.error(f"unknown: {' '.join(unknown)}" + (f"; did you mean {meant[0]}?" if meant else ""))
        args.command = shlex.join(["python", self.prog, *words])
        return args

    def folders_first(self, words):
        """The words, with folders (what has a /) that follow several values of a flag in front: argparse would take
        them for more of its values."""
        folders = []
        others = []
        flag = None
        for word in words:
            if word.startswith("--"):
                flag = self._option_string_actions.get(word)
            swallowed = flag and flag.nargs == "+" and len(Path(word).parts) > 1 and not reads(flag, word)
            (folders if swallowed else others).append(word)
        return folders + others


def reads(flag, word):
    """Whether the type of an argparse flag can read the word, as it can the class T-shirt/top. No type: it cannot."""
    try:
        return flag.type is not None and flag.type(word) is not None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def number(kind, low, high=math.inf):
    """An argparse type: a number from ``low`` to ``high``."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse says "invalid whole number value"
    return parse


def add_workers_flag(parser):
    help = (
        "parallel processes (threads on macOS and Windows); results do not depend on N, and 1 keeps everything in this "
        "process, for a debugger (default: all cores, here %(default)s; under mpiexec its ranks count, and not N)"
    )
    parser.flag("--workers", help, type=number(int, 1, high=256), default=blas.available_cores(), metavar="N")


def add_data_flags(parser):
    """The flags of everything that computes on the data: --workers and --data."""
    add_workers_flag(parser)
    help = "folder with the four FashionMNIST idx files, compressed or not (default: data/ beside the run scripts)"
    parser.flag("--data", help, type=Path, default=DATA, metavar="DIR")


def run_parser(prog, description, epochs, batch_size, lr, out, networks=""):
    """A parser with the flags of every run; a script adds its model's own.

    ``networks`` says what the architectures are, and ``epochs`` maps each to its default number of epochs; the first is
    the default.
    """
    p = OneLineParser(prog, description)
    by_arch = ", ".join(f"{count} for {arch}" for arch, count in epochs.items())
    whole = number(int, 1, high=10**9)
    positive = number(float, 1e-9, high=1e30)
    help = "the network" + (f": {networks}" if networks else "")
    p.flag("--arch", help, choices=epochs, default=next(iter(epochs)))
    p.flag("--epochs", f"passes over the training images (default: {by_arch})", type=whole, metavar="N")
    help = "images per gradient step, cut into shards for the workers; on several machines take more (performance.md)"
    p.flag("--batch-size", help, type=whole, default=batch_size, metavar="N")
    p.flag("--lr", "peak learning rate: a short rise, then half a cosine down to 0", type=positive, default=lr)
    help = "decides every random number: on one machine the same seed gives the same bits, elsewhere nearly the same"
    p.flag("--seed", help, type=number(int, 0), default=0)
    add_data_flags(p)
    p.flag("--out", "folder for everything the run makes", type=Path, default=Path(out), metavar="DIR")
    p.flag("--train-images", "train on the first N images, for a quick look (default: all)", type=whole, metavar="N")
    help = "continue from checkpoint.npz in --out, to the same bits as if never stopped; if finished, draw again"
    p.flag("--resume", help, action="store_true")
    return p


def progress(total, description, unit, steps=None, done=0):
    """A tqdm bar, over ``steps`` if they are given; in a log there is only what `tqdm.write` prints."""
    shown = parallel.rank == 0 and (sys.stderr.isatty() or in_notebook())
    hidden = {} if shown else {"disable": True}  # shown, it is TQDM_DISABLE that decides
    # leave=None: a bar beside another one goes when it is done.
    return tqdm(steps, description, total, leave=None, initial=done, unit=unit, dynamic_ncols=True, **hidden)


def in_notebook():
    """Whether this process is a notebook's kernel, not one that has only imported its modules."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


STOPPED = "stopped and saved: the same command with --resume continues"
RESUMABLE = "stopped: the same command with --resume continues from the last checkpoint, if there is one"


def run(main, when_stopped=RESUMABLE):
    """Call ``main()`` and exit; what a user can put right becomes one line on stderr and a non-zero status."""
    set_up_output()
    with on_stop(interrupt):
        status, message = outcome(main, when_stopped)
    if message:
        tell(status, message)
    sys.exit(status)


def set_up_output():
    """An epoch's line appears when the epoch ends, in a pipe too; no output stops a run."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  None if it was closed by whoever started us
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a path may have any bytes
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


def outcome(main, when_stopped):
    """The exit status of ``main()``, and the message of its failure or None."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of a loss that is not finite `Run` says all, and once
            parallel.begin()
            plots.import_matplotlib().rcdefaults()  # figures look alike whatever a matplotlibrc says
            main()
        return 0, None
    except Diverged as error:
        return 1, str(error)
    except UserError as error:
        return 2, str(error)
    except Stopped as stop:
        return 128 + stop.args[0], STOPPED
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT), when_stopped
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}"
    except Warning as warning:  # python -W error
        return 1, f"{warning} (a warning, which Python was told to take for an error)"
    except MemoryError:
        return 1, "out of memory: try fewer --workers"
    except Exception:  # a fault of ours
        if parallel.world():
            parallel.end(1, traceback.format_exc())
            sys.exit(1)
        raise


def tell(status, message):
    """Print the message, in one line that names the program."""
    with suppress(OSError, UserError):  # a terminal that was closed; no MPI, which the message says
        parallel.end(status, f"{program or Path(sys.argv[0]).name}: {' '.join(message.split())}"[:2000])


@contextmanager
def on_stop(handler):
    """Until the block ends, each of STOP_SIGNALS calls ``handler(signal_number, frame)``."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in parallel.STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup, or a shell's &, has asked for
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(signal_number, frame):
    raise KeyboardInterrupt(signal_number)


class Stop:
    """A handler for `on_stop` that raises Stopped: at once or, inside of ``with stop``, at the end of the block, before
    which the state or a file is not whole. A second signal raises KeyboardInterrupt wherever it comes, and then the
    last checkpoint on disk is what remains."""

    received = None
    waits = False

    def __call__(self, signal_number, frame):
        if self.received is not None:
            if signal_number == getattr(signal, "SIGXCPU", None):  # it comes each second, from the limit on
                return
            raise KeyboardInterrupt(signal_number)
        self.received = signal_number
        if not self.waits:
            raise Stopped(signal_number)

    def __enter__(self):
        self.waits = True

    def __exit__(self, kind, error, trace):
        self.waits = False
        if kind is None and self.received is not None:
            raise Stopped(self.received)
