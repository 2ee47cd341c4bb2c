"""Ranks: several processes that run the same lines, as one run.

    ranks = ranks_for(workers)
    arrays = ranks.share(arrays)
    value_and_grad = sharded(loss, ranks, params, shard_size, batch_size)
    with ranks:                          from here on every rank runs these lines
        value, terms, gradient = value_and_grad(params, batch)

Rank, barrier, broadcast and all_gather are MPI's words, and PyTorch's. Every rank draws the same random numbers and
has the same weights. Only the costly work is divided: the shards of a minibatch, the images of an evaluation, and the
leaves of the parameters. Each leaf is updated by one rank, its owner. Sums are taken in the order of the shards, so
results are bit-identical for any number of ranks. Only rank 0 prints, writes files and handles signals.

The ranks are processes of this machine, forked from the caller (`Ranks`), or those that mpiexec started, here or on
several machines (`MPIRanks`). Where a fork is not possible there is one rank, which maps its shards over threads.
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
# Ctrl-C, Ctrl-\, a kill, a closed terminal (Windows: BREAK), and signals that batch systems send before a kill.
STOP_NAMES = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = [getattr(signal, name) for name in STOP_NAMES if hasattr(signal, name)]
SPIN_SECONDS = 0.001  # a rank polls for a message this long, then sleeps; waking up takes 0.05 ms
KILLED = "a rank (one of the --workers processes) was killed, for want of memory? Try fewer --workers"

rank = 0  # of this process


class Ranks:
    """``workers`` processes of this machine inside a ``with`` block. The caller is rank 0. The others are forked from
    it, and end with the block. Outside the block there is one rank. --workers 1 never forks.

    All ranks must call the methods in the same order, as each waits for the others. A decision that depends on one rank
    alone (its clock, a signal) is sent to all by `broadcast`. If a rank fails or is killed, all of them end: rank 0
    raises its error, or ChildProcessError, and the others find their pipes closed.

    Threads would compute the same sums, but slower: after each of a step's thousand short calls a thread waits for the
    interpreter lock. A U-Net step takes 1.17 times as long, a VAE step 1.4 times.
    """

    count = 1

    def __init__(self, workers):
        if not blas.ONE_BLAS_THREAD:  # BLAS uses its own threads
            workers = 1
        self.processes, self.threads = (workers, 1) if CAN_FORK else (1, workers)
        self.pipes = []  # to rank 0; on rank 0, to all others
        self.children = []
        self.places = []  # the position of each leaf of the parameters, sorted by size

    @property
    def rank(self):
        return rank

    def share(self, arrays):
        """A copy of the tree in memory that ranks share, made before the fork; without a fork the tree itself."""

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
                # A signal between forks could leave ranks that nothing ends, or reach one that still handles signals.
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
        """Fork one more rank. It returns from here, too, but prints nothing and ignores signals."""
        global rank
        ours, theirs = Pipe()
        self.pipes.append(ours)
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
                stream.flush()  # or each rank would have a copy of what is not printed yet
        with warnings.catch_warnings():
            # Since Python 3.12 a fork warns if there are other threads (of a notebook, of pytest-xdist): a lock that
            # one of them holds stays locked in the child. Ranks only compute, and need none of these locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            theirs.close()
            self.children.append(child)
            return
        rank = len(self.pipes)
        for pipe in self.pipes:  # otherwise the others could not notice that rank 0 ended
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
            os._exit(0)  # only rank 0 continues after the block
        try:
            if error is None:
                self.barrier()  # the last chance to receive an error
        finally:
            self.end()

    def end(self):
        """Kill the ranks that this one has forked."""
        for child in self.children:
            with suppress(OSError):  # where the system has removed those that have ended
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
        """A list of the parts of all ranks, on every rank: ``[part of rank 0, part of rank 1, ..]``."""
        if self.count == 1:
            return [part]
        if rank:
            self.pipes[0].send_bytes(pickle.dumps((None, part)))
            return receive(self.pipes[0])
        parts = [part, *map(receive, self.pipes)]
        message = pickle.dumps((None, parts))
        for pipe in self.pipes:
            with suppress(ConnectionError):  # that rank has died; the next call will report it
                pipe.send_bytes(message)
        return parts

    def broadcast(self, value):
        """The value of rank 0, on every rank."""
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

    # ------------------------------------------------------------------------------------ a training step, leaf by leaf

    def divide(self, params):
        """Assign each leaf of the parameters to its owner, the rank that updates it. Each gets large and small ones."""
        by_size = np.argsort([leaf.size for leaf in tree.leaves(params)], kind="stable")  # the same on all machines
        self.places = np.argsort(by_size).tolist()

    def owners(self):
        """The rank of each leaf's owner, repeated without end, for several trees like the parameters."""
        return cycle([place % self.count for place in self.places])

    def own(self, trees):
        """The tree (like the parameters, or a tree of such trees) with None in place of the leaves of other ranks."""
        owners = self.owners()
        return tree.map(lambda leaf: leaf if next(owners) == rank else None, trees)

    def to_owners(self, gradient, room):
        """Copy the leaves of a shard's gradient that other ranks own to ``room``, from which those ranks read them."""
        if self.count > 1:
            for leaf, place, owner in zip(tree.leaves(gradient), tree.leaves(room), self.owners(), strict=False):
                if owner != rank:
                    place[...] = leaf

    def from_rank(self, source, room):
        """Send the owners of the leaves what rank ``source`` wrote to its ``room``. Here memory is shared."""

    def from_owners(self, trees):
        """Send all ranks the leaves that their owners have changed, for use after the next collective call.
        Here memory is shared."""


def as_told(error):
    """The error of a rank, for rank 0 to raise. An error that the user can fix keeps its type."""
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

# Environment variables with the rank of a process and the number of ranks, set by mpiexec or Slurm's srun. PMIX_RANK
# comes without a count. SLURM_PROCID is 0 also in a batch script without ranks: only srun sets a count.
NUMBER = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
COUNT = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def told(names):
    """The largest number in these environment variables; None if none of them is set."""
    return max((int(os.environ[name]) for name in names if name in os.environ), default=None)


class MPIRanks(Ranks):
    """The ranks that mpiexec started. All run the whole program; data in another rank's memory is sent."""

    def __init__(self, comm):
        super().__init__(workers=1)
        self.comm = comm
        self.count = comm.size
        self.failed = comm.Dup()  # separate from calls in comm for which others may be waiting

    def all_gather(self, part):
        return self.comm.allgather(part)

    def from_rank(self, source, room):
        leaves = zip(tree.leaves(room), self.owners(), strict=False)
        self.send((leaf, source, owner) for leaf, owner in leaves)

    def from_owners(self, trees):
        leaves = zip(tree.leaves(trees), self.owners(), strict=False)
        self.send((leaf, owner, target) for leaf, owner in leaves for target in range(self.count))

    def send(self, journeys):
        """Copy arrays in place; ``journeys`` are (array, source rank, target rank). All arrays are sent at once, one
        message each: with one packed message for each rank, a VAE step takes 1.08 times as long."""
        requests = []
        for array, source, target in journeys:  # in the same order on all ranks: MPI matches messages by order
            if rank == source != target:
                requests.append(self.comm.Isend(array, target))
            elif rank == target != source:
                requests.append(self.comm.Irecv(array, source))
        for request in requests:
            request.Wait()


@cache
def world():
    """The ranks that mpiexec started; None without mpiexec, and then MPI is not imported. Raises UserError."""
    wanted = told(COUNT)
    number = told(NUMBER)
    if wanted == 1 or (wanted is None and not number and "PMIX_RANK" not in os.environ):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed; or it finds no MPI
        raise UserError(f'mpiexec needs mpi4py (pip install "scratchgen[mpi]"); its import failed: {error}') from None
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
    """Under mpiexec, let only rank 0 print and handle signals. Raises UserError, as `world` does."""
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
    """Print the message of a failure; under mpiexec only once if all ranks have failed. A rank that fails alone aborts
    the others, which wait for it. Raises UserError, as `world` does, after printing."""
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
    """The number of images in a shard: about one shard a core (2 to 8), and at most 64 images, as larger shards only
    take more memory. It is independent of --workers, so that --workers cannot change results."""
    return min(64, math.ceil(batch_size / min(max(2, cores), 8)))


def shards(N, shard_size):
    """The slices that cut N images into shards of ``shard_size``, the last of which may be smaller."""
    return [slice(start, min(start + shard_size, N)) for start in range(0, N, shard_size)]


def images_of(batch, images):  # a tree of arrays with leading axis N -> the same for a slice of the images
    return tree.map(lambda array: array[images], batch)


def sharded(loss, ranks, params, shard_size, batch_size):
    """From a loss, a mean over the images of its batch, make a function of (params, batch) for all ranks.

    ``loss(params, batch)`` returns (value, terms), as for `gradients.value_and_grad`; the function returns (value,
    terms, gradient). In the gradient, leaves that other ranks own are None; a single rank owns all leaves. Each rank
    differentiates shards of the batch, and sums the gradients of its own leaves in the order of the shards, so that
    rounding depends only on the shard size. Call `sharded` before ``with ranks``, with the size of the largest batch.
    All ranks must synchronise before the next gradient; `Run.minibatches` does this.
    """
    shard_value_and_grad = value_and_grad(loss)
    ranks.divide(params)
    room = [ranks.share(tree.map(np.empty_like, params)) for _ in shards(batch_size, shard_size)]

    def value_and_gradient_over_shards(params, batch):
        cut = shards(len(tree.leaves(batch)[0]), shard_size)
        # One gradient for each shard. This rank puts its own here. Of the others, the leaves it owns arrive in room.
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
