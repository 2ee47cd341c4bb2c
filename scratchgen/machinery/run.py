"""The book-keeping of a training run, so that a script's loop shows nothing but the algorithm.

    run = Run(args, {"model": "vae", "arch": args.arch, ...}, (train_images, test_images), {"params": ..}, ranks)
    with ranks, run:
        for epoch in run.epochs():
            for step, images in run.minibatches():
                ...                                  draw, differentiate, step
                run.record(value, means)
            run.end_epoch({"train": run.epoch_means, "test": numbers}, "what to print")
        run.write_metrics(numbers, params)
        ...                                          figures

A Run owns the state (step, generator, means of the epoch so far, log), a clean stop, the progress bar, ``log.csv``, the
checkpoint, and the folder, which no other run may use until the ``with`` ends. It has no callbacks.
"""

import math
import os
import time
from contextlib import ExitStack, suppress

from scratchgen import tree
from scratchgen.data import minibatches
from scratchgen.machinery import blas, checkpoint, cli, files, parallel

import numpy as np

INIT, NOISE, ORDER, TEST, SAMPLES = range(5)  # purposes of random numbers, for `rng_for`
STATE = ("shard_size", "step", "seconds", "epoch_means", "log")  # attributes of a Run that its checkpoint keeps
SAVE_SECONDS = 60  # between two checkpoints: a kill or a power cut loses little more than this


def rng_for(seed, *purpose):
    """A generator for one purpose of a run. Its numbers do not depend on draws for other purposes."""
    return np.random.default_rng([seed, *purpose])


class Run:
    """One training run: begun afresh, or resumed from its checkpoint with --resume.

    ``args`` are the flags of `cli.run_parser`. ``settings`` are those of the model. A run resumes only with the same
    settings, epochs, batch size, learning rate, seed and images. ``images`` is a pair, for training and for test; each
    is an array or a pair (images, labels), labels may be None, and `minibatches` yields the same kind. ``arrays`` is a
    tree, for example {"params": .., "moments": ..}, that the steps change in place: they must change ``run.arrays``,
    the copy that forked ranks share. ``run.rng`` is the generator from which the steps draw. Raises
    CheckpointError or FolderInUse.
    """

    def __init__(self, args, settings, images, arrays, ranks):
        self.images, test_images = images
        self.config = settings | {
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "seed": args.seed,
            "train_images": checkpoint.fingerprint(self.images),
            "test_images": checkpoint.fingerprint(test_images),
        }
        ranks.agree(f"the images in {args.data}", f"{self.config['train_images']}, {self.config['test_images']}")
        self.args = args
        self.ranks = ranks
        self.count = len(tree.leaves(self.images)[0])
        self.steps_per_epoch = math.ceil(self.count / args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.arrays = ranks.share(arrays)
        self.rng = rng_for(args.seed, NOISE)
        self.step = 0
        self.epoch_means = {}
        self.log = []
        self.seconds = 0.0
        self.shard_size = ranks.broadcast(parallel.shard_size(args.batch_size, blas.available_cores()))

        self.path = args.out / "checkpoint.npz"
        os.makedirs(os.path.realpath(args.out), exist_ok=True)  # for a dangling link, make its target
        with ExitStack() as held:
            held.enter_context(files.holding(args.out))
            if args.resume:
                state = checkpoint.resume(self.path, self.config, self.arrays)
                self.rng.bit_generator.state = state["rng"]
                for name in STATE:  # with shard_size, as it was on the machine where the run began
                    setattr(self, name, state[name])
            else:
                files.put_aside(args.out)
            self.saved_at = time.monotonic()
            self.began = self.saved_at - self.seconds
            if not args.resume:
                self.save()  # fails now if the disk cannot be written; from now on the run can be resumed
            self.held = held.pop_all()

    def save(self):
        """Write a checkpoint. Raises OSError, or Diverged if weights are not finite; then the earlier one stays."""
        if not all(np.isfinite(leaf).all() for leaf in tree.leaves(self.arrays)):
            check_finite(math.nan, self.step)
        self.seconds = time.monotonic() - self.began
        state = {name: getattr(self, name) for name in STATE}
        state |= {"config": self.config, "rng": self.rng.bit_generator.state}
        checkpoint.save(self.path, self.arrays, state)
        self.saved_at = time.monotonic()

    def __enter__(self):
        self.stop = cli.Stop()
        self.held.enter_context(cli.on_stop(self.stop))
        self.held.enter_context(np.errstate(over="ignore", invalid="ignore", under="ignore"))  # `check_finite` reports
        self.bar = cli.progress(self.total_steps, None, " steps", done=self.step)
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is cli.Stopped:
                self.save()
        finally:
            self.held.close()
            with suppress(OSError):  # a terminal that was closed
                self.bar.close()

    def epochs(self):
        """Yield the epochs that `end_epoch` has not ended yet, counted from 1; the first may be half done."""
        while len(self.log) < self.args.epochs:
            yield len(self.log) + 1
        self.bar.close()

    def minibatches(self):
        """Yield (step, minibatch) for the rest of the epoch; steps are counted from 1 over the whole run."""
        epoch = len(self.log)
        done = self.step - epoch * self.steps_per_epoch
        if done == 0:  # not sooner: `end_epoch` gets those of the epoch before
            self.epoch_means = {}
        # The order depends on seed and epoch alone: a run that resumes inside the epoch skips what it has seen.
        order = rng_for(self.args.seed, ORDER, epoch)
        with self.stop:  # a stop waits until the script's step is done
            for images in minibatches(self.images, self.args.batch_size, order, skip=done):
                self.weight = len(tree.leaves(images)[0]) / self.count  # of this minibatch in the means of the epoch
                yield self.step + 1, images
                self.step += 1
                self.ranks.from_owners(self.arrays["params"])
                self.stop_if_asked()
                self.bar.update()
            self.ranks.from_owners(self.arrays)

    def record(self, loss, means):
        """Add a minibatch's means to ``epoch_means``, which is complete when the epoch ends. Raises Diverged."""
        check_finite(loss, self.step + 1)
        for name, mean in means.items():
            self.epoch_means[name] = self.epoch_means.get(name, 0.0) + self.weight * float(mean)
        self.bar.set_postfix(loss=f"{means.get('loss', loss):.4g}", refresh=False)

    def end_epoch(self, numbers, summary):
        """Add a row to the log, with {"test": {"elbo": -240.0}} as "test_elbo", and save.

        Make other outputs of an epoch, such as a preview, before this call: a resumed run does not return to an epoch
        that has ended. Raises Diverged if one of the numbers is not finite.
        """
        row = {f"{part}_{name}": number for part, named in numbers.items() for name, number in named.items()}
        for number in row.values():
            check_finite(number, self.step)
        self.seconds = time.monotonic() - self.began
        self.log.append({"epoch": len(self.log) + 1, "step": self.step} | row | {"seconds": self.seconds})
        with self.stop:
            self.write_log()
            self.save()
        cli.tqdm.write(f"epoch {len(self.log)}/{self.args.epochs}  {summary}  {self.seconds:.0f} s")

    def stop_if_asked(self):
        """Between two steps: stop, or save if it is due. Rank 0 decides, and needs all ranks to collect the state."""
        due = time.monotonic() - self.saved_at > SAVE_SECONDS
        asked, due = self.ranks.broadcast((self.stop.received, due))
        if asked is not None or due:
            self.ranks.from_owners(self.arrays)  # between steps moments, for example, stay with their owners
            if asked is not None:
                raise cli.Stopped(asked)
            self.save()

    def write_log(self):
        with suppress(PermissionError):  # on Windows a spreadsheet may keep it open: it is written again later
            files.write_log(self.args.out / "log.csv", self.log)

    def write_metrics(self, numbers, params):
        """Write ``metrics.json``: the model's numbers, and the run's time, epochs, seed, parameters and command."""
        self.write_log()  # its last version may not have been written
        about = {
            "seconds": round(self.log[-1]["seconds"], 1),  # of training, over all parts of a resumed run
            "epochs": len(self.log),
            "seed": self.args.seed,
            "parameters": tree.size(params),
            "command": self.args.command,
        }
        files.write_metrics(self.args.out / "metrics.json", numbers | about, params)


def check_finite(loss, step):
    if not math.isfinite(loss):
        raise cli.Diverged(f"the loss became {loss} at step {step}: start again, without --resume, with a smaller --lr")
