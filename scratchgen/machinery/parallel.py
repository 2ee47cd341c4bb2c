"""Ranks: several processes that run the same lines, as one run.

    ranks = ranks_for(workers)
    arrays = ranks.share(arrays)
    value_and_grad = sharded(loss, ranks, params, shard_size, batch_size)
    with ranks:                          from here on every rank runs these lines
        value, terms, gradient = value_and_grad(params, batch)

Rank, barrier, broadcast and all_gather are MPI's words, and PyTorch's. Every rank draws the same random numbers and
has the same weights. Only what takes time is divided: the shards of a minibatch, the images of an evaluation, and the
leaves of the parameters, each of which is stepped by one rank, its owner. Sums are taken in the order of the shards,
so the number of ranks changes no bit. Rank 0 alone prints, writes and listens to signals.

The ranks are processes of this machine, forked from the caller (`Ranks`), or those that mpiexec started, here or on
several machines (`MPIRanks`). Where nothing may be forked there is one rank, which maps its shards over threads.
"""

import math
import mmap
import operator
import os
import pickle
import platform
import select
import signal
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial, reduce
from itertools import cycle
from multiprocessing import Pipe

from scratchgen import tree
from scratchgen.data import UserError
from scratchgen.gradients import value_and_grad
from scratchgen.machinery import blas

import numpy as np

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its BLAS does not survive one; Windows has none
# Ctrl-C, Ctrl-\, a kill, a closed terminal (Windows: BREAK), and what batch systems send some time before a kill.
STOP_NAMES = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = [getattr(signal, name) for name in STOP_NAMES if hasattr(signal, name)]
SPIN_SECONDS = 0.001  # to look for a message before going to sleep: a rank that sleeps takes 0.05 ms to wake up
KILLED = "a rank (one of the --workers processes) was killed, for want of memory? Try fewer --workers"

rank = 0  # of this process


class Ranks:
    """``workers`` processes of this machine, from ``with`` on: the caller is rank 0, the others are forked from it and
    end with the block. Before and after it there is one rank, and --workers 1 never forks.

    All ranks must call the methods in the same order, as each waits for the others. Where one decides something that
    others cannot know (its clock, a signal), it is `broadcast`. A rank that fails, or is killed, ends all of them: rank
    0 raises its error, or ChildProcessError, and the pipes of the others come to an end.

    Threads would do the same sums, but each that comes back from one of a step's thousand short calls waits for the
    others to let go of the interpreter: a U-Net step takes 1.17 times as long, a VAE step 1.4 times.
    """

    count = 1

    def __init__(self, workers):
        if not blas.ONE_BLAS_THREAD:  # BLAS has its own threads
            workers = 1
        self.processes, self.threads = (workers, 1) if CAN_FORK else (1, workers)
        self.pipes = []  # to rank 0; of rank 0, to all others
        self.children = []
        self.places = []  # of each leaf of the parameters, in the order of their sizes

    @property
    def rank(self):
        return rank

    def share(self, arrays):
        """A copy of the tree in memory that all ranks will see, made before the fork; for one rank the tree itself."""

        def in_shared_memory(array):
            shared = np.ndarray(array.shape, array.dtype, mmap.mmap(-1, max(1, array.nbytes)))
            shared[...] = array
            return shared

        return arrays if self.processes == 1 else tree.map(in_shared_memory, arrays)

    # ----------------------------------------------------------------------------------------- how ranks begin and end

    def __enter__(self):
        if self.processes > 1:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            try:
                # A signal in between would find ranks that nobody ends yet, or one that listens to it.
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                while not rank and len(self.children) < self.processes - 1:
                    self.fork()
                self.count = self.processes
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            except BaseException:
                if rank:
                    os._exit(1)
                self.end()
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                raise
        return self

    def fork(self):
        """Add a rank, which returns from here, too: quiet, and deaf to signals."""
        global rank
        ours, theirs = Pipe()
        self.pipes.append(ours)
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside other threads (a notebook's, pytest-xdist's) warns: a lock that such a
            # thread holds stays locked in the child. Ranks compute, and ask for none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            theirs.close()
            self.children.append(child)
            return
        rank = len(self.pipes)
        for pipe in self.pipes:  # or the others would not see rank 0 end
            pipe.close()
        self.pipes = [theirs]
        self.children = []
        be_quiet()

    def __exit__(self, kind, error, trace):
        if rank and self.pipes:
            with suppress(Exception):  # rank 0 has ended
                if error is None:
                    self.barrier()
                else:
                    self.pipes[0].send_bytes(pickle.dumps((as_told(error), None)))
            os._exit(0)  # what called the caller is rank 0's to go on with
        try:
            if error is None:
                self.barrier()  # the last chance to hear of an error
        finally:
            self.end()

    def end(self):
        """End the other ranks that this one has forked, at once."""
        for child in self.children:
            with suppress(OSError):  # where the system does not keep those that have ended
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        for pipe in self.pipes:
            pipe.close()
        if self.pipes:
            self.pipes = []
            self.children = []
            self.count = 1

    # ---------------------------------------------------------------------------------------------------- how they meet

    def all_gather(self, part):
        """The list of what each rank gives, for all of them: ``[part of rank 0, part of rank 1, ..]``."""
        if self.count == 1:
            return [part]
        if rank:
            self.pipes[0].send_bytes(pickle.dumps((None, part)))
            return receive(self.pipes[0])
        parts = [part, *map(receive, self.pipes)]
        message = pickle.dumps((None, parts))
        for pipe in self.pipes:
            with suppress(ConnectionError):  # of a rank that has died since, as the next meeting will find
                pipe.send_bytes(message)
        return parts

    def broadcast(self, value):
        """The value that rank 0 gives, for all of them."""
        return self.all_gather(None if rank else value)[0]

    def barrier(self):
        """Wait until all ranks are here."""
        self.all_gather(None)

    def agree(self, what, value):
        """Raise UserError unless the value is the same for all ranks."""
        values = self.all_gather(value)
        if len(set(values)) > 1:
            raise UserError(f"{what}: ranks found different ones ({values}); all machines must see the same files")

    def map(self, f, items):
        """[f(item) for item in items]: each rank computes items rank, rank + count, .., and all get all results."""
        mine = items[rank :: self.count]
        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                results = list(pool.map(f, mine))
        else:
            results = list(map(f, mine))
        everything = [None] * len(items)
        for number, part in enumerate(self.all_gather(results)):
            everything[number :: self.count] = part
        return everything

    # ------------------------------------------------------------------------------------ of a training step, by leaves

    def divide(self, params):
        """Decide who owns each leaf of the parameters, which is who steps it: every rank gets large and small ones."""
        by_size = np.argsort([leaf.size for leaf in tree.leaves(params)], kind="stable")  # the same on all machines
        self.places = np.argsort(by_size).tolist()

    def owners(self):
        """The rank of each leaf's owner, again and again for several trees like the parameters."""
        return cycle([place % self.count for place in self.places])

    def own(self, trees):
        """The tree (like the parameters, or a tree of such trees) with None in place of the leaves of other ranks."""
        owners = self.owners()
        return tree.map(lambda leaf: leaf if next(owners) == rank else None, trees)

    def to_owners(self, gradient, room):
        """Write the leaves of a shard's gradient that other ranks own to the ``room`` where they look for them."""
        if self.count > 1:
            for leaf, place, owner in zip(tree.leaves(gradient), tree.leaves(room), self.owners(), strict=False):
                if owner != rank:
                    place[...] = leaf

    def from_rank(self, source, room):
        """Bring what a rank has written to its ``room`` to the owners of the leaves. Here all see the same memory."""

    def from_owners(self, trees):
        """Bring the leaves that their owners have changed to all ranks, which may use them after the next meeting. Here
        all see the same memory."""


def as_told(error):
    """The error of a rank, to be raised by rank 0. What a user can put right stays what it is."""
    if isinstance(error, (UserError, OSError, MemoryError)):
        return error
    return RuntimeError(f"rank {rank} failed:\n" + "".join(traceback.format_exception(error)))


def receive(pipe):
    """The next message of another rank. Raises its error, or ChildProcessError if it was killed."""
    poll = select.poll()
    until = time.monotonic() + SPIN_SECONDS
    poll.register(pipe.fileno(), select.POLLIN)
    while not poll.poll(0) and time.monotonic() < until:
        os.sched_yield()
    try:
        received = pipe.recv_bytes()
    except (EOFError, OSError):
        raise ChildProcessError(KILLED) from None
    error, message = pickle.loads(received)
    if error:
        raise error
    return message


# ----------------------------------------------------------------------------------------------------- ranks of mpiexec

# What mpiexec, or Slurm's srun, tells a process of itself and of the others, each in words of its own. PMIX_RANK comes
# without a count. SLURM_PROCID is 0 in a batch script, too, where nobody has started ranks: srun alone sets a count.
NUMBER = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
COUNT = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def told(names):
    """The largest of the numbers that these variables of the environment have; None if there is none."""
    return max((int(os.environ[name]) for name in names if name in os.environ), default=None)


class MPIRanks(Ranks):
    """The ranks that mpiexec started. All run the whole program; what one needs of another's memory is sent."""

    def __init__(self, comm):
        super().__init__(workers=1)
        self.comm = comm
        self.count = comm.size
        self.failed = comm.Dup()  # apart from what the others may be waiting for in comm

    def all_gather(self, part):
        return self.comm.allgather(part)

    def from_rank(self, source, room):
        leaves = zip(tree.leaves(room), self.owners(), strict=False)
        self.send((leaf, source, owner) for leaf, owner in leaves)

    def from_owners(self, trees):
        leaves = zip(tree.leaves(trees), self.owners(), strict=False)
        self.send((leaf, owner, target) for leaf, owner in leaves for target in range(self.count))

    def send(self, journeys):
        """Copy arrays in place, (array, from this rank, to that one) each. Each array is a message of its own, all at
        once: with one long message for each rank, to be packed and unpacked, a VAE step takes 1.08 times as long."""
        requests = []
        for array, source, target in journeys:  # in the same order everywhere, which is how MPI tells them apart
            if rank == source != target:
                requests.append(self.comm.Isend(array, target))
            elif rank == target != source:
                requests.append(self.comm.Irecv(array, source))
        for request in requests:
            request.Wait()


@cache
def world():
    """The ranks that mpiexec started; None without mpiexec, where MPI is not even imported. Raises UserError."""
    wanted = told(COUNT)
    number = told(NUMBER)
    if wanted == 1 or (wanted is None and not number and "PMIX_RANK" not in os.environ):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not there; or it finds no MPI
        raise UserError(f'mpiexec needs mpi4py (pip install "scratchgen[mpi]"), and that says: {error}') from None
    found = MPI.COMM_WORLD.size
    if found != (wanted or found) or found <= (number or 0):
        started = wanted or f"at least {number + 1}"
        raise UserError(
            f"mpiexec started {started} ranks, mpi4py finds {found}: two different MPIs, or srun without one"
        )
    return MPIRanks(MPI.COMM_WORLD) if found > 1 else None


def ranks_for(workers):
    """The ranks that mpiexec started or, without it, `Ranks` of ``workers`` processes. Raises UserError."""
    return world() or Ranks(workers)


def begin():
    """Under mpiexec, leave it to rank 0 to print, and to listen to signals. Raises UserError, as `world` does."""
    global rank
    rank = told(NUMBER) or 0
    if rank:
        be_quiet()
    world()


def be_quiet():
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the whole run
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end(status, message):
    """Print the message of a failure. Under mpiexec: once, if all ranks have failed. One that fails alone ends the
    others, too, which wait for it. Raises UserError, as `world` does, when it has printed."""
    print(message, file=sys.stderr, flush=True)  # rank 0
    if ranks := world():
        all_fail = ranks.failed.Ibarrier()
        until = time.monotonic() + 2
        while not all_fail.Test():
            time.sleep(0.01)
            if time.monotonic() > until:
                if rank:
                    print(f"rank {rank} on {platform.node()}: {message}", file=sys.__stderr__, flush=True)
                    time.sleep(2)  # Abort loses what mpiexec has not yet read
                ranks.comm.Abort(status)
                return  # MPICH's comes back, and ends the rank a little later


# --------------------------------------------------------------------------------------------- what the ranks divide up


def shard_size(batch_size, cores):
    """How many images a rank differentiates at a time: one shard a core for 2 to 8 cores, and at most 64 images, as
    larger ones only take more memory. --workers has no say, so that it cannot change results."""
    return min(64, math.ceil(batch_size / min(max(2, cores), 8)))


def shards(N, shard_size):
    """The slices that cut N images into shards of ``shard_size``, the last of which may be smaller."""
    return [slice(start, min(start + shard_size, N)) for start in range(0, N, shard_size)]


def images_of(batch, images):  # a tree of arrays with leading axis N -> the same for a slice of the images
    return tree.map(lambda array: array[images], batch)


def sharded(loss, ranks, params, shard_size, batch_size):
    """From a loss, a mean over the images of its batch, make a function of (params, batch) for all ranks.

    ``loss(params, batch)`` returns (value, terms), as for `gradients.value_and_grad`, and the function returns (value,
    terms, gradient). In the gradient the leaves that other ranks own are None; one rank alone owns them all. Each rank
    differentiates shards of the batch, and adds up the gradients of its own leaves in the order of the shards: the
    shard size alone decides the arithmetic. Call `sharded` itself before ``with ranks``, with the size of the largest
    batch. Before the next gradient all ranks must have met; `Run.minibatches` sees to it.
    """
    shard_value_and_grad = value_and_grad(loss)
    ranks.divide(params)
    room = [ranks.share(tree.map(np.empty_like, params)) for _ in shards(batch_size, shard_size)]

    def value_and_gradient_over_shards(params, batch):
        cut = shards(len(tree.leaves(batch)[0]), shard_size)
        # Of each shard. This rank puts its own here; the leaves that it owns of the others' arrive in the room.
        gradients = room[: len(cut)]

        def differentiate(shard):
            weight = (cut[shard].stop - cut[shard].start) / cut[-1].stop
            value, terms, gradients[shard] = shard_value_and_grad(params, images_of(batch, cut[shard]), weight=weight)
            ranks.to_owners(gradients[shard], room[shard])
            return tree.map(lambda number: weight * number, [value, terms])

        value, terms = reduce(partial(tree.map, operator.add), ranks.map(differentiate, range(len(cut))))
        for shard in range(len(cut)):
            ranks.from_rank(shard % ranks.count, room[shard])
        # own(params) has None for the leaves of other ranks, which tree.map passes over.
        return value, terms, tree.map(lambda _, *parts: reduce(operator.add, parts), ranks.own(params), *gradients)

    return value_and_gradient_over_shards


def in_parallel(f, shard_size, ranks):
    """``f(*arrays)`` computed shard by shard by all ranks, for an f that treats each image of its batch on its own."""

    def of_all(*arrays):
        cut = [images_of(arrays, images) for images in shards(len(arrays[0]), shard_size)]
        return np.concatenate(ranks.map(lambda shard: f(*shard), cut))

    return of_all
