"""The workers that share a minibatch: the calling process, and worker processes forked from it.

`Workers` is what the rest of the package uses. Below it stands how a worker process is forked, asked and ended, and how
questions and answers travel.
"""

import io
import mmap
import os
import pickle
import signal
import sys
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe

from scratchgen import tree

import numpy as np

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its BLAS does not survive one; Windows has none
KILLED = "a worker process was killed, perhaps for want of memory: try fewer --workers"
MAILBOX_BYTES = 64 << 20  # per direction and worker; only what is ever used takes memory


class Workers:
    """``count`` workers that compute ``map(f, items)``, in order: the caller, and worker processes forked from it.

    Threads would do the same sums, but a step makes a thousand short calls, and each thread that comes back from one
    waits for the interpreter to be let go by the others: with two workers a U-Net step takes 1.17 times as long with
    threads, a VAE step 1.4 times. Where a process cannot safely be forked (CAN_FORK), threads it is.

    A fork gives the worker everything as it is at that moment, functions with all they refer to among it. So a new
    function means new worker processes (some milliseconds), and a function called before finds its surroundings as they
    were then: what changes from call to call belongs in the items, or in arrays that `share` made.
    """

    def __init__(self, count):
        self.count = count
        self.registered = {}  # id -> an object that workers have from their fork, and that therefore travels as its id
        self.processes = []
        self.at_work = False
        self.threads = ThreadPoolExecutor(count) if count > 1 and not CAN_FORK else None
        if self.threads:
            # How long a thread that comes back from a matrix product waits for another to let go of the interpreter.
            # The default of 5 ms is longer than most products here; 0.5 ms makes a U-Net step 1.2 times faster.
            sys.setswitchinterval(0.0005)
        weakref.finalize(self, stop, self.processes)

    def share(self, arrays):
        """The tree in memory that all workers see (a copy, if there are several): changes in place are seen by all.

        In an item of `map` such a tree, any branch or leaf of it, costs nothing to send.
        """
        if self.count == 1 or self.threads:
            return arrays

        def in_shared_memory(array):
            shared = np.ndarray(array.shape, array.dtype, mmap.mmap(-1, max(1, array.nbytes)))
            shared[...] = array
            return shared

        shared = tree.map(in_shared_memory, arrays)
        self.register(*tree.nodes(shared))
        return shared

    def register(self, *objects):
        """Make sure that the workers have these objects: by new forks, if some are new."""
        unknown = {id(thing): thing for thing in objects if id(thing) not in self.registered}
        if unknown:
            stop(self.processes)
            self.registered |= unknown

    def map(self, f, items, copy=True):
        """Yield ``f(item)`` for each item, in order. An error in f arrives here, whoever computed it.

        One map at a time, so f may not call another. The arrays of an item are f's for the time of the call only;
        without ``copy``, those of a result are the caller's only until the next result is asked for.
        """
        if self.count == 1:
            yield from map(f, items)
        elif self.threads:
            yield from self.threads.map(f, items)
        else:
            if self.at_work:
                raise RuntimeError("these workers are at work on another map, which must end first")
            self.register(f)
            self.at_work, items = True, iter(items)
            try:
                while batch := list(islice(items, self.count)):
                    while len(self.processes) < len(batch) - 1:
                        self.processes.append(WorkerProcess(self.registered))
                    busy = list(zip(self.processes, batch[1:], strict=False))
                    for process, item in busy:
                        process.ask(f, item)
                    yield f(batch[0])
                    for process, _ in busy:
                        yield process.answer(copy)
            except BaseException:  # Ctrl-C, or a caller that wants no more: answers may be on their way to nobody
                stop(self.processes)
                raise
            finally:
                self.at_work = False


def stop(processes):
    """End these worker processes, whatever they are doing, and empty the list."""
    while processes:
        processes.pop().kill()


class WorkerProcess:
    """A process forked from this one that answers one question after another until the pipe to it is closed."""

    def __init__(self, registered):
        self.questions, self.answers = Mailbox(registered), Mailbox(registered)
        # Ctrl-C goes to the whole group of processes, and some send SIGTERM to all of it, too. The parent decides what
        # then happens; in the worker both stay blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        self.owner, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            try:
                self.serve()
            finally:
                os._exit(0)  # nothing of what the parent had planned for its own end
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.questions.receiver.close()
        self.answers.sender.close()

    def serve(self):
        self.questions.sender.close()
        self.answers.receiver.close()
        try:
            while True:
                f, item = self.questions.receive(copy=False)
                try:
                    answer = f(item), None
                except BaseException as error:
                    answer = portable(error), traceback.format_exc()
                try:
                    self.answers.send(answer)
                except (pickle.PicklingError, TypeError, AttributeError) as error:  # what f returned cannot travel
                    self.answers.send((portable(error), traceback.format_exc()))
        except (EOFError, BrokenPipeError):  # the parent has ended, in whatever way
            return

    def ask(self, f, item):
        try:
            self.questions.send((f, item))
        except OSError:
            raise ChildProcessError(KILLED) from None

    def answer(self, copy):
        try:
            answer, trace = self.answers.receive(copy)
        except (EOFError, OSError):
            raise ChildProcessError(KILLED) from None
        if trace:
            raise answer from RuntimeError(f"in a worker process:\n{trace}")
        return answer

    def kill(self):
        if self.owner == os.getpid():  # and not a copy of this object in another worker
            with suppress(ChildProcessError, ProcessLookupError):  # reaped by somebody else
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def portable(error):
    """The exception itself, if it survives pickling, or else a RuntimeError that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class Mailbox:
    """One direction between two processes: registered objects go as their ids, arrays through shared memory, the rest
    (and arrays for which there is no room) through a pipe."""

    def __init__(self, registered):
        self.registered = registered
        self.memory = mmap.mmap(-1, MAILBOX_BYTES)
        self.receiver, self.sender = Pipe(duplex=False)

    def send(self, message):
        places, end = [], 0

        def put(buffer):  # called by pickle for each array; whether pickle itself should carry it
            nonlocal end
            raw = buffer.raw()
            if end + raw.nbytes > MAILBOX_BYTES:
                return True
            self.memory[end : end + raw.nbytes] = raw
            places.append(slice(end, end + raw.nbytes))
            end += -(-raw.nbytes // 64) * 64  # the next array begins where one may begin in memory
            return False

        text = io.BytesIO()
        pickler = pickle.Pickler(text, protocol=5, buffer_callback=put)
        pickler.persistent_id = lambda thing: id(thing) if id(thing) in self.registered else None
        pickler.dump(message)
        self.sender.send((places, text.getvalue()))

    def receive(self, copy):
        """The next message; its arrays lie in the shared memory until the next one comes, or are copies."""
        places, text = self.receiver.recv()
        buffers = [memoryview(self.memory)[place] for place in places]
        unpickler = pickle.Unpickler(io.BytesIO(text), buffers=map(bytearray, buffers) if copy else buffers)
        unpickler.persistent_load = self.registered.__getitem__
        return unpickler.load()
