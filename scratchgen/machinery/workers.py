"""The workers that share a computation: this process, and others forked from it.

A fork gives a process everything as it is at that moment, functions with all that they refer to and the arrays of
`Workers.share` among it. After that, only items and results travel, through a pipe.
"""

import gc
import mmap
import os
import pickle
import signal
import sys
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import current_process, get_context
from multiprocessing.util import Finalize
from types import CodeType, FunctionType, ModuleType

from scratchgen import tree
from scratchgen.machinery import ranks, runtime

import numpy as np

KEPT = 8  # functions that processes are forked with; each keeps alive all that it refers to
CAN_FORK = sys.platform == "linux"  # macOS has fork, but its BLAS does not survive one; Windows has none


class Workers:
    """``count`` workers: the caller, and ``count`` - 1 processes. All ranks of an mpiexec have ``total``.

    Threads would do the same sums, but each that comes back from one of a step's thousand short calls waits for the
    others to let go of the interpreter: a U-Net step takes 1.17 times as long, a VAE step 1.4 times. Where a process
    cannot safely be forked, threads it is. Where BLAS keeps its own (`runtime.ONE_BLAS_THREAD`) there is one worker, as
    in a process of a pool, which may have no others.
    """

    def __init__(self, count):
        in_a_pool = current_process().daemon
        self.count = count if runtime.ONE_BLAS_THREAD and not in_a_pool else 1
        self.ranks = ranks.Ranks() if in_a_pool else ranks.world()
        self.total = sum(self.ranks.gather([self.count], self.ranks.count))
        self.owner = os.getpid()
        self.functions, self.surroundings = [], []  # what the processes know; what each of it referred to at the fork
        self.processes = []  # pairs of a process and our end of the pipe to it
        self.at_work = False
        self.threads = ThreadPoolExecutor(self.count) if self.count > 1 and not CAN_FORK else None
        if self.threads:
            sys.setswitchinterval(0.0005)  # seconds that they wait; 0.005, the default, makes a step 1.2 times as long
        Finalize(self, stop, [self.processes], exitpriority=1)  # when this object goes, or the interpreter ends

    def share(self, arrays):
        """The tree in memory that all workers see (a copy, if there are several): changes in place are seen by all."""

        def in_shared_memory(array):
            shared = np.ndarray(array.shape, array.dtype, mmap.mmap(-1, max(1, array.nbytes)))
            shared[...] = array
            return shared

        return arrays if self.count == 1 or self.threads else tree.map(in_shared_memory, arrays)

    def map(self, f, items):
        """[f(item) for item in items], of which each rank computes a part and hands it to the others.

        An error in f arrives here, whoever computed it. One map at a time, so f may not call another.
        """
        items = list(items)
        return self.ranks.gather(self.map_here(f, self.ranks.mine(items)), len(items))

    def map_here(self, f, items):
        """[f(item) for item in items] by the workers of this rank: of n the k-th takes items k, k + n, k + 2 n, ..."""
        items = list(items)
        n = min(self.count, len(items))
        if n < 2:
            return [f(item) for item in items]
        if self.at_work:
            raise RuntimeError("these workers are at work on another map, which must end first")
        if self.owner != os.getpid():  # their pipes were inherited, but answers would go to whoever reads first
            raise RuntimeError("these workers belong to the process that this one was forked from")
        self.at_work, futures = True, []
        try:
            if self.threads:
                futures += [self.threads.submit(f, item) for item in items]
                return [future.result() for future in futures]
            number = self.number(f, n)
            pipes = [pipe for _, pipe in self.processes[: n - 1]]
            for k, pipe in enumerate(pipes, 1):
                through(pipe.send, (number, items[k::n]))
            results = [None] * len(items)
            results[::n] = [f(item) for item in items[::n]]
            for k, pipe in enumerate(pipes, 1):
                results[k::n], trace = pickle.loads(through(pipe.recv_bytes))
                if trace:
                    raise results[k] from RuntimeError(f"in a worker process:\n{trace}")
            return results
        except BaseException:  # an error, or Ctrl-C: answers may be on their way to nobody
            stop(self.processes)
            wait([future for future in futures if not future.cancel()])
            raise
        finally:
            self.at_work = False

    def number(self, f, n):
        """The number by which n - 1 processes know f. If something is new to them, they are all forked anew."""
        if f not in self.functions:
            self.functions = [*self.functions[1 - KEPT :], f]
            stop(self.processes)
        number = self.functions.index(f)
        if len(self.processes) < n - 1 or self.surroundings[number].have_changed():
            stop(self.processes)
            self.surroundings = [Surroundings(f) for f in self.functions]
            for _ in range(n - 1):
                fork(self.functions, self.processes)
        return number


# --------------------------------------------------------------------------------------------------- a worker process


def fork(functions, processes):
    """Add a new worker process, and our end of the pipe to it, to the list."""
    ours, theirs = (context := get_context("fork")).Pipe()
    process = context.Process(target=serve, args=(functions, ours, theirs), daemon=True)
    # Ctrl-C, and often SIGTERM, goes to the whole group of processes; the caller decides what happens, so here:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        process.start()
        processes.append((process, ours))  # before a Ctrl-C can come in between, and leave it to nobody
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()


def serve(functions, ours, theirs):
    """What the process does: answer one question after another, until the pipe to the caller is closed."""
    ours.close()
    try:
        while True:
            question, count = theirs.recv_bytes(), 1
            try:
                number, items = pickle.loads(question)
                count = len(items)
                message = pickle.dumps(([functions[number](item) for item in items], None), protocol=5)
            except BaseException as error:  # in the function; or what it was given, or returned, cannot travel
                message = pickle.dumps(([portable(error)] * count, traceback.format_exc()))
            theirs.send_bytes(message)
    except (EOFError, BrokenPipeError):  # the caller has ended, in whatever way
        pass


def portable(error):
    """The exception itself, if it survives pickling, or else a RuntimeError that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def through(send_or_recv, *message):
    try:
        return send_or_recv(*message)
    except (EOFError, OSError):
        raise ChildProcessError("a worker process was killed, for want of memory? Try fewer --workers") from None


def stop(processes):
    """End these worker processes, whatever they are doing, and empty the list."""
    while processes:
        process, pipe = processes.pop()
        process.kill()
        process.join()
        pipe.close()


# ------------------------------------------------------------------------------------------ what a function refers to


class Surroundings:
    """What a function refers to, directly or not, as it is at a fork, and stays in the process that was forked: its
    closure, containers, objects, arrays, and variables of the main program (a script, or a notebook). Not looked at are
    arrays of `Workers.share`, which may change, other modules, classes, and the inside of generators and bytearrays."""

    def __init__(self, f):
        self.things, self.variables, self.arrays = [], [], []
        found, todo = set(), [f]
        while todo:
            thing = todo.pop()
            if id(thing) in found or isinstance(thing, (CodeType, ModuleType, type)):
                continue
            found.add(id(thing))
            self.things.append(thing)  # which keeps it alive, too: no other can get the same identity
            if isinstance(thing, FunctionType):
                todo += [thing.__defaults__, thing.__kwdefaults__, *(thing.__closure__ or ())]
                if thing.__module__ == "__main__":
                    names = names_in(thing.__code__)
                    self.variables += [(thing.__globals__, name) for name in names]
                    todo += [thing.__globals__.get(name) for name in names]
            elif isinstance(thing, np.ndarray):
                whole = thing
                while isinstance(whole.base, np.ndarray):  # a view may be read-only where the array is not
                    whole = whole.base
                if whole.flags.writeable and not isinstance(whole.base, mmap.mmap):
                    self.arrays.append(thing)
            else:
                todo += gc.get_referents(thing)  # in it, as the garbage collector sees it
        self.before = self.look()

    def look(self):
        identities = list(map(id, gc.get_referents(*self.things)))
        variables = [id(variables.get(name)) for variables, name in self.variables]
        return identities, variables, [zlib.crc32(array.tobytes()) for array in self.arrays]

    def have_changed(self):
        return self.look() != self.before


def names_in(code):
    """The names that a function reads, also those of the comprehensions and functions inside it."""
    return [*code.co_names, *(name for part in code.co_consts if isinstance(part, CodeType) for name in names_in(part))]
