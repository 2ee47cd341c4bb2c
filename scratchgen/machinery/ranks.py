"""Several processes as one run, on one machine or on many: ``mpiexec -n 4 python run_ddpm.py``, by MPI.

Every rank, as MPI calls such a process, runs the whole program: it reads the data, draws the same random numbers and
has the same weights. Only what takes time is divided: the items of `Workers.map`, and in a training step the leaves of
the parameters, each of which has an owner that adds up its gradients and steps it. So results do not depend on the
number of ranks. Rank 0 alone prints, writes and listens to Ctrl-C. Where nobody said mpiexec, MPI is not even imported.
"""

import os
import platform
import signal
import sys
import time
from functools import cache
from itertools import cycle

from scratchgen import tree
from scratchgen.data import UserError

import numpy as np

NUMBER = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")  # what mpiexec, or Slurm's srun, tells a process of itself,
COUNT = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # and of the others


@cache
def world():
    """The ranks that mpiexec started, this process among them. Raises UserError."""
    wanted = max(int(os.environ.get(name, 1)) for name in COUNT)
    if wanted == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not there; or it finds no MPI
        raise UserError(f'mpiexec needs mpi4py (pip install "scratchgen[mpi]"), and that says: {error}') from None
    if MPI.COMM_WORLD.size != wanted:
        raise UserError(f"mpiexec started {wanted} ranks, mpi4py finds {MPI.COMM_WORLD.size}: two different MPIs")
    return Ranks(MPI.COMM_WORLD, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).size)


class Ranks:
    """``count`` ranks, of which this process is number ``rank``; ``on_this_machine`` of them share its cores.

    All ranks must call the methods in the same order, as each waits for the others: where one decides something that
    others cannot know (its clock, a signal), they are `told_by_0`.
    """

    def __init__(self, comm=None, on_this_machine=1):
        self.comm, self.on_this_machine = comm, on_this_machine
        self.failed = comm.Dup() if comm else None  # apart from what the others may be waiting for in comm
        self.rank, self.count = (comm.rank, comm.size) if comm else (0, 1)

    def mine(self, items):
        """What this rank has to do of a list: items rank, rank + count, ..."""
        return items[self.rank :: self.count]

    def gather(self, results, total):
        """The list of all ``total`` results, of which each rank has those of its own items."""
        if self.count == 1:
            return results
        everything = [None] * total
        for rank, part in enumerate(self.comm.allgather(results)):
            everything[rank :: self.count] = part
        return everything

    def told_by_0(self, value):
        return value if self.count == 1 else self.comm.bcast(value)

    def agree(self, what, value):
        """Raise UserError unless the value is the same for all ranks."""
        if self.count > 1 and len(values := set(self.comm.allgather(value))) > 1:
            words = "ranks found different ones; all machines must see the same folders and files"
            raise UserError(f"{what}: {words} ({', '.join(sorted(map(str, values)))})")

    def all_fail(self, within):
        """Whether all ranks call this before so many seconds are over."""
        everyone, end = self.failed.Ibarrier(), time.monotonic() + within
        while not (done := everyone.Test()) and time.monotonic() < end:
            time.sleep(0.01)
        return done

    # ---------------------------------------------------------------------------- of a training step, leaf by leaf

    def shares(self, params):
        """Who steps each leaf: its owner, and its number among the owner's leaves. Each gets some large, some small."""
        place = np.argsort(np.argsort([leaf.size for leaf in tree.leaves(params)]))  # of each leaf by size
        number, owner = np.divmod(place, self.count)
        return owner, number

    def to_owners(self, gradients):
        """Copy the gradients in place to the owners of their leaves: a tree for each shard, of which each rank has its
        own (`mine`)."""
        if self.count == 1:
            return
        owner, _ = self.shares(gradients[0])
        self.copy(
            (leaf, number % self.count, target)
            for number, gradient in enumerate(gradients)
            for leaf, target in zip(tree.leaves(gradient), owner, strict=True)
        )

    def from_owners(self, params, arrays):
        """Copy the leaves of ``arrays``, trees like ``params``, in place from their owners to all."""
        if self.count == 1:
            return
        owner, _ = self.shares(params)
        self.copy(
            (leaf, source, target)
            for leaf, source in zip(tree.leaves(arrays), cycle(owner), strict=False)
            for target in range(self.count)
        )

    def copy(self, journeys):
        """Copy arrays in place, all at once: triples of an array, the rank that has it and the rank that wants it.

        Each is read and written where it lies. That bought: a VAE on two ranks takes 1.06 times as long as with two
        workers. With one long message for each rank, which is to be packed and unpacked, it was 1.14 times.
        """
        requests = []
        for array, source, target in journeys:  # in the same order everywhere, which is how MPI tells them apart
            if self.rank == source != target:
                requests.append(self.comm.Isend(array, target))
            elif self.rank == target != source:
                requests.append(self.comm.Irecv(array, source))
        for request in requests:
            request.Wait()


# -------------------------------------------------------------------------------- a program of which there are several


def begin(signals):
    """Leave it to rank 0 to print, and to listen to these signals. Raises UserError, as `world` does."""
    if any(int(os.environ.get(name, 0)) for name in NUMBER):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the whole run
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
    world()


def end(status, message):
    """Print the message of a failure: once, if all ranks have failed. One that fails alone ends the others, too, which
    wait for it. Raises UserError, as `world` does, when it has printed."""
    print(message, file=sys.stderr, flush=True)  # rank 0
    ranks = world()
    if ranks.count == 1 or ranks.all_fail(within=2):
        return
    if ranks.rank:
        print(f"rank {ranks.rank} on {platform.node()}: {message}", file=sys.__stderr__, flush=True)
        time.sleep(2)  # Abort loses what mpiexec has not yet read
    ranks.comm.Abort(status)
