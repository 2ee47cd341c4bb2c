"""The book-keeping of a training run, so that a script's loop shows nothing but the algorithm.

    with Run("vae", args, train_images, {"params": params, ...}, workers) as run:
        for epoch in run.epochs():
            for step, images in run.minibatches():
                ...                                  draw, differentiate, step
                run.record(value, means)
            run.end_epoch({"train": run.epoch_means, "test": numbers}, "what to print")
    run.write_metrics(numbers, params)

A Run owns the state (step, generator, means of the epoch so far, log), a clean stop, the progress bar, ``log.csv`` and
the checkpoint. It knows no model and calls nothing back.
"""

import math
import os
import signal
import sys
import time

from scratchgen import tree
from scratchgen.data import minibatches
from scratchgen.machinery import checkpoint, cli, files, runtime

import numpy as np
from tqdm import tqdm

INIT, NOISE, ORDER, TEST, SAMPLES, PREVIEW = range(6)  # what random numbers are for
NOT_SETTINGS = {"workers", "data", "out", "resume", "latents", "iwae", "command"}  # what training does not depend on


def rng_for(seed, *purpose):
    """A generator for one purpose of a run: what is drawn for another does not change its numbers."""
    return np.random.default_rng([seed, *purpose])


def shard_size(batch_size, cores):
    """How many images a worker differentiates at a time: such that up to eight cores all have work, as nearly as the
    batch allows, but hardly more shards than cores, as each costs some Python besides. There are two at least, and none
    has more than 64 images. --workers has no say, so that it cannot change results."""
    return min(64, math.ceil(batch_size / min(max(2, cores), 8)))  # larger ones only take more memory


class Run:
    """One training run: begun afresh, or resumed from its checkpoint with --resume.

    ``arrays`` is a tree, {"params": .., "moments": ..} for example, that the steps change in place: they must change
    ``run.arrays``, the copy in memory that all workers share. ``run.rng`` is the generator that the steps draw from.
    Raises CheckpointError or FolderInUse.
    """

    def __init__(self, model, args, images, arrays, workers):
        self.args, self.images = args, images
        self.steps_per_epoch = math.ceil(len(images) / args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.arrays, self.rng = workers.share(arrays), rng_for(args.seed, NOISE)
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
        self.config = {"model": model} | settings | {"train_images": checkpoint.fingerprint(images)}
        self.step, self.epoch_means, self.log, seconds = 0, {}, [], 0.0
        self.shard_size = shard_size(args.batch_size, runtime.available_cores())

        self.path = args.out / "checkpoint.npz"
        args.out.mkdir(parents=True, exist_ok=True)
        files.hold(args.out)
        if args.resume:
            state = checkpoint.resume(self.path, self.config, self.arrays)
            self.step, self.epoch_means, self.log = state["step"], state["epoch_means"], state["log"]
            self.shard_size, seconds = state["shard_size"], state["seconds"]  # shards as where the run began
            self.rng.bit_generator.state = state["rng"]
        else:
            checkpoint.put_aside(self.path)
        self.began = time.monotonic() - seconds
        if not args.resume:
            self.save()  # a disk that cannot be written is found out now, and from here on there is something to resume

    def save(self):
        self.seconds = time.monotonic() - self.began
        names = ("config", "shard_size", "step", "seconds", "epoch_means", "log")
        state = {name: getattr(self, name) for name in names} | {"rng": self.rng.bit_generator.state}
        checkpoint.save(self.path, self.arrays, state)

    def __enter__(self):
        self.stop = StopBetweenSteps()
        done = self.step // self.steps_per_epoch * len(self.images)
        done += self.step % self.steps_per_epoch * self.args.batch_size
        self.bar = cli.progress(self.args.epochs * len(self.images), done)
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.stop.restore()

    def epochs(self):
        """The epochs that are left, counted from 1; the first of them may be half done."""
        for epoch in range(self.step // self.steps_per_epoch, self.args.epochs):
            yield epoch + 1
        self.stop_if_asked()

    def minibatches(self):
        """The minibatches of the epoch that are left, each with the number of its step, counted from 1 over the run."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        # The order depends on seed and epoch alone: a run that resumes inside the epoch skips what it has seen.
        order = rng_for(self.args.seed, ORDER, epoch)
        for images in minibatches(self.images, self.args.batch_size, order, skip=done):
            self.stop_if_asked()
            self.weight = len(images) / len(self.images)  # of this minibatch in the means of the epoch
            yield self.step + 1, images
            self.step += 1  # the script's step is done, and the state whole again
            self.bar.update(len(images))

    def record(self, loss, means):
        """Add a minibatch's means to ``epoch_means``, which is whole when the epoch ends.

        Raises Diverged if the loss is not finite.
        """
        check_finite(loss, self.step + 1)
        for name, mean in means.items():
            self.epoch_means[name] = self.epoch_means.get(name, 0.0) + self.weight * float(mean)
        self.bar.set_postfix(loss=f"{means.get('loss', loss):.4g}", refresh=False)

    def end_epoch(self, numbers, summary):
        """Add a row to the log, {"test": {"elbo": -240.0}} as "test_elbo", and save.

        Raises Diverged if one of the numbers is not finite.
        """
        row = {f"{part}_{name}": number for part, named in numbers.items() for name, number in named.items()}
        for number in row.values():
            check_finite(number, self.step)
        self.seconds = time.monotonic() - self.began
        self.log.append({"epoch": len(self.log) + 1, "step": self.step} | row | {"seconds": self.seconds})
        self.epoch_means = {}
        files.write_log(self.args.out / "log.csv", self.log)
        self.save()
        tqdm.write(f"epoch {len(self.log)}/{self.args.epochs}  {summary}  {self.seconds:.0f} s")

    def stop_if_asked(self):
        """After Ctrl-C or SIGTERM: save, and raise Stopped."""
        if self.stop.received is not None:
            self.save()
            raise cli.Stopped(self.stop.received)

    def write_metrics(self, numbers, params):
        """``metrics.json``: the model's own numbers, and what it took to get them."""
        numbers = numbers | {
            "seconds": round(self.log[-1]["seconds"], 1),  # of training, over all the sittings of a resumed run
            "epochs": len(self.log),
            "seed": self.args.seed,
            "parameters": tree.size(params),
            "command": self.args.command,
        }
        files.write_metrics(self.args.out / "metrics.json", numbers, params)


def check_finite(loss, step):
    if not math.isfinite(loss):
        raise cli.Diverged(f"the loss became {loss} at step {step}: try a smaller --lr; the last checkpoint is sound")


class StopBetweenSteps:
    """From here to `restore`, Ctrl-C and SIGTERM are only noted in ``received``, to be acted on between two steps.

    A second Ctrl-C stops at once; then the last checkpoint on disk is what remains.
    """

    def __init__(self):
        self.received = None
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, signal_number, frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal_number
        if sys.stderr.isatty():
            os.write(2, b"\nstopping after this step\n")  # print is not safe in a signal handler

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
