"""What all programs here share at the command line: flags, one-line errors, a clean stop, progress.

Nothing here knows about models; the training loop stands in the scripts.
"""

import argparse
import math
import os
import signal
import sys
import warnings
from pathlib import Path

from scratchgen import runtime
from scratchgen.checkpoint import CheckpointError
from scratchgen.data import DataError

from tqdm import tqdm


class UsageError(ValueError):
    """Flags that contradict each other or the data; the message says it in one line."""


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


def check_finite(loss, step):
    if not math.isfinite(loss):
        raise Diverged(f"the loss became {loss} at step {step}: try a smaller --lr; the last checkpoint is sound")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, without the whole usage above it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains every flag)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a number from ``low`` to ``high``, or strictly above ``low``."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid whole number value"
    return parse


def add_data_flags(p):
    """The flags of everything that computes on the data: --workers and --data."""
    cores = runtime.available_cores()
    p.add_argument(
        "--workers",
        help="processes that share each minibatch, a shard each; they change no result, and 1 keeps everything in this "
        f"one, for a debugger (default: all cores, here {cores})",
        type=number(int, 1),
        default=cores,
        metavar="N",
    )
    p.add_argument(
        "--data",
        help="folder with the four FashionMNIST idx files, compressed or not (default: data/ beside the run scripts)",
        type=Path,
        default=Path(__file__).parent.parent / "data",
        metavar="DIR",
    )


def parser(description, epochs, batch_size, lr, out):
    """A parser with the flags of every run; a script adds its model's own.

    ``epochs`` maps each architecture to its default number of epochs; the first architecture is the default.
    """
    p = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_arch = next(iter(epochs))
    by_arch = ", ".join(f"{count} for {arch}" for arch, count in epochs.items())
    whole, positive, natural = number(int, 1), number(float, 0, above=True), number(int, 0)

    def flag(name, help, **options):
        p.add_argument(name, help=help, **options)

    flag("--arch", f"the network (default: {default_arch})", choices=epochs, default=default_arch)
    flag("--epochs", f"passes over the training images (default: {by_arch})", type=whole, metavar="N")
    flag("--batch-size", f"images a gradient step (default: {batch_size})", type=whole, default=batch_size, metavar="N")
    flag(
        "--lr",
        f"peak learning rate: a short rise, then half a cosine down to 0 (default: {lr})",
        type=positive,
        default=lr,
    )
    flag("--seed", "decides every random number: same seed, same bits (default: 0)", type=natural, default=0)
    add_data_flags(p)
    flag("--out", f"folder for everything the run makes (default: {out})", type=Path, default=Path(out), metavar="DIR")
    flag("--train-images", "train on the first N images, for a quick look (default: all)", type=whole, metavar="N")
    flag(
        "--resume",
        "continue from checkpoint.npz in --out, to the same bits as if never stopped; for a finished run, draw again",
        action="store_true",
    )
    return p


def add_to_epoch(sums, means, weight):
    """Add a minibatch's means to the epoch's, ``weight`` being the minibatch's part of the epoch's images."""
    for name, mean in means.items():
        sums[name] = sums.get(name, 0.0) + weight * float(mean)


def first_images(images, count):
    """The first ``count`` images, or all of them for None. Raises UsageError if there are fewer."""
    if count is not None and count > len(images):
        raise UsageError(f"--train-images {count} is out of range, the data has {len(images)} training images")
    return images[:count]


class Stopped(Exception):
    """The run was asked to stop by this signal, and has saved what it had."""


class StopBetweenSteps:
    """While this context is entered, Ctrl-C and a polite kill wait for `here`, called where the state is whole.

    A second Ctrl-C stops at once; then the last checkpoint on disk is what remains.
    """

    def __enter__(self):
        self.received = None
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, signal_number, frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal_number
        if sys.stderr.isatty():
            os.write(2, b"\nstopping after this step\n")  # print is not safe in a signal handler

    def here(self, save):
        """If a stop was asked for: save, and raise Stopped."""
        if self.received is not None:
            save()
            raise Stopped(self.received)

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def progress(total, done=0, description=None):
    """A tqdm bar of images on a terminal, nothing elsewhere: a log file wants only what `tqdm.write` prints."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )


def progress_over(steps, total, description):
    return tqdm(steps, description, total, unit=" steps", dynamic_ncols=True, disable=not sys.stderr.isatty())


RESUMABLE = "stopped: the same command with --resume continues from the last checkpoint, if there is one"


def run(main, when_stopped=RESUMABLE):
    """Call ``main()`` and exit; whatever the user can mend becomes one line on stderr and a non-zero status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the whole run
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True)  # an epoch's line appears when the epoch ends, in a pipe too
    status, message = 0, None
    try:
        main()
    except (UsageError, DataError, CheckpointError) as error:
        status, message = 2, str(error)
    except Diverged as error:
        status, message = 1, str(error)
    except Stopped as stop:
        status, message = 128 + stop.args[0], "stopped and saved: the same command with --resume continues"
    except KeyboardInterrupt:
        status, message = 130, when_stopped
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        status, message = 1, f"{where}{error.strerror or error}"
    except MemoryError:
        status, message = 1, "out of memory: try fewer --workers"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
