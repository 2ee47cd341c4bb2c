"""The command line of all programs here: flags, one-line errors, progress bars, and stopping by signals.

Nothing here knows about models; the training loop is in the scripts.
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

tqdm.monitor_interval = 0  # no monitor thread: ranks are forked, and no other thread should run at a fork
tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by processes; Python 3.14 reports it lost when a rank ends
program = None  # its name, set by its parser; each message begins with it


class UsageError(UserError):
    """Flags that contradict each other or the data."""


class Diverged(UserError):
    """The loss is no longer a finite number."""


class Stopped(Exception):
    """A signal, the argument, asked the run to stop; its state is saved."""

    def _render_traceback_(self):  # as in `UserError`
        return [STOPPED]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, without the usage text."""

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
        """Add a flag. Its help ends with its default value, if it has one and the help does not name it."""
        if options.get("default") is not None and "(default: " not in help:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)

    def parse_args(self, argv=None):
        words = argv
        if argv is None:
            words = [] if in_notebook() else sys.argv[1:]  # in a notebook sys.argv belongs to the kernel
        args, unknown = self.parse_known_args(self.folders_first(words))
        if unknown:
            meant = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            self.error(f"unknown: {' '.join(unknown)}" + (f"; did you mean {meant[0]}?" if meant else ""))
        args.command = shlex.join(["python", self.prog, *words])
        return args

    def folders_first(self, words):
        """The words, with folders (two or more parts, as runs/ddpm) moved to the front if they follow the values of a
        flag that takes several: argparse would take them for more values."""
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
    """Whether a flag's type accepts the word, as that of --class accepts T-shirt/top. Without a type: no."""
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
        "process, for a debugger (default: all cores, here %(default)s; under mpiexec N is ignored)"
    )
    parser.flag("--workers", help, type=number(int, 1, high=256), default=blas.available_cores(), metavar="N")


def add_data_flags(parser):
    """Add the flags of all programs that compute on the data: --workers and --data."""
    add_workers_flag(parser)
    help = "folder with the four FashionMNIST idx files, compressed or not (default: data/ beside the run scripts)"
    parser.flag("--data", help, type=Path, default=DATA, metavar="DIR")


def run_parser(prog, description, epochs, batch_size, lr, out, networks=""):
    """A parser with the flags that all runs share; a script adds those of its model.

    ``networks`` describes the architectures. ``epochs`` maps each of them to its default number of epochs; the first
    one is the default.
    """
    p = OneLineParser(prog, description)
    by_arch = ", ".join(f"{count} for {arch}" for arch, count in epochs.items())
    whole = number(int, 1, high=10**9)
    positive = number(float, 1e-9, high=1e30)
    help = "the network" + (f": {networks}" if networks else "")
    p.flag("--arch", help, choices=epochs, default=next(iter(epochs)))
    p.flag("--epochs", f"passes over the training images (default: {by_arch})", type=whole, metavar="N")
    help = "images per gradient step, cut into shards for the workers; use more on several machines (performance.md)"
    p.flag("--batch-size", help, type=whole, default=batch_size, metavar="N")
    p.flag("--lr", "peak learning rate: a short rise, then half a cosine down to 0", type=positive, default=lr)
    help = "decides every random number: on one machine the same seed gives the same bits, elsewhere nearly the same"
    p.flag("--seed", help, type=number(int, 0), default=0)
    add_data_flags(p)
    p.flag("--out", "folder for everything the run makes", type=Path, default=Path(out), metavar="DIR")
    p.flag("--train-images", "train on the first N images, for a quick look (default: all)", type=whole, metavar="N")
    help = "continue from checkpoint.npz in --out, bit for bit as if never stopped; a finished run draws again"
    p.flag("--resume", help, action="store_true")
    return p


def progress(total, description, unit, steps=None, done=0):
    """A tqdm bar, over ``steps`` if given. In a log the bar is hidden, and only `tqdm.write` prints."""
    shown = parallel.rank == 0 and (sys.stderr.isatty() or in_notebook())
    hidden = {} if shown else {"disable": True}  # if shown, TQDM_DISABLE decides
    # leave=None: a bar below another one disappears when it is done.
    return tqdm(steps, description, total, leave=None, initial=done, unit=unit, dynamic_ncols=True, **hidden)


def in_notebook():
    """Whether this process is a notebook's kernel; to have imported IPython is not enough."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


STOPPED = "stopped and saved: the same command with --resume continues"
RESUMABLE = "stopped: the same command with --resume continues from the last checkpoint, if there is one"


def run(main, when_stopped=RESUMABLE):
    """Call ``main()`` and exit. An error that the user can fix becomes one line on stderr and a non-zero status."""
    set_up_output()
    with on_stop(interrupt):
        status, message = outcome(main, when_stopped)
    if message:
        tell(status, message)
    sys.exit(status)


def set_up_output():
    """Buffer output by lines, also in a pipe, so that each line appears at once. A closed stream stops no run."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  None if it was closed by whoever started us
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a path may have any bytes
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


def outcome(main, when_stopped):
    """The exit status of ``main()``, and the message of its failure or None."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # `Run` reports a loss that is not finite, once
            parallel.begin()
            plots.import_matplotlib().rcdefaults()  # figures do not depend on a user's matplotlibrc
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
        return 1, f"{warning} (a warning that Python was told to treat as an error)"
    except MemoryError:
        return 1, "out of memory: try fewer --workers"
    except Exception:  # a bug of ours
        if parallel.world():
            parallel.end(1, traceback.format_exc())
            sys.exit(1)
        raise


def tell(status, message):
    """Print the message, in one line that names the program."""
    with suppress(OSError, UserError):  # a closed terminal; or no MPI, as the message says
        parallel.end(status, f"{program or Path(sys.argv[0]).name}: {' '.join(message.split())}"[:2000])


@contextmanager
def on_stop(handler):
    """Until the block ends, each of STOP_SIGNALS calls ``handler(signal_number, frame)``."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other thread may set one
            for number in parallel.STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # set by nohup, or by a shell's &
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(signal_number, frame):
    raise KeyboardInterrupt(signal_number)


class Stop:
    """A handler for `on_stop` that raises Stopped at once or, inside a block ``with stop``, at the end of the block:
    inside it the state or a file is incomplete. A second signal raises KeyboardInterrupt anywhere; then only the last
    checkpoint on disk remains."""

    received = None
    waits = False

    def __call__(self, signal_number, frame):
        if self.received is not None:
            if signal_number == getattr(signal, "SIGXCPU", None):  # sent each second once the limit is reached
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
