"""Process set-up: BLAS threads, memory, and the workers.

Importing this module (``scratchgen/__init__.py`` does so first) changes two things in the process, both measured
and both without influence on any result's meaning:

* BLAS runs single-threaded, and parallelism comes from workers that each take a whole shard of a minibatch. Copies,
  element-wise work and normalisation then run in parallel too, not only the matrix products.
* The C library keeps freed memory instead of handing it back to the kernel. Otherwise each large temporary array is
  mapped, zeroed and page-faulted anew at every step. A VAE step becomes 1.7 times faster, a U-Net step 1.1 times.
"""

import ctypes
import mmap
import os
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from scratchgen import tree
from scratchgen.processes import Helper, stop

BLAS_THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)
# Option numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its BLAS does not survive one; Windows has none


def use_one_blas_thread():
    """Make BLAS single-threaded; it reads these variables once, when NumPy loads it."""
    if "numpy" in sys.modules and os.environ.get(BLAS_THREAD_VARIABLES[0]) != "1":
        warnings.warn(
            "NumPy was imported before scratchgen, so BLAS keeps its own threads and training may be slower; "
            "import scratchgen first",
            stacklevel=2,
        )
    os.environ.update(dict.fromkeys(BLAS_THREAD_VARIABLES, "1"))


def keep_freed_memory():
    """Tell glibc to keep and reuse freed memory; on any other C library do nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)  # never a private mapping for a large block ...
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # ... never give the top of the heap back ...
    mallopt(M_TOP_PAD, 64 * 2**20)  # ... and grow it in large strides.


def available_cores():
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


class Workers:
    """``count`` workers that compute ``map(f, items)``, in order: the caller, and helpers beside it.

    The helpers are processes forked from this one. Threads would do the same sums, but a step makes a thousand short
    calls, and each thread that comes back from one waits for the interpreter to be let go by the others: with two
    workers a U-Net step takes 1.17 times as long with threads, a VAE step 1.4 times. Where a process cannot safely be
    forked (CAN_FORK), threads it is.

    A fork hands the helper everything as it is at that moment, functions with all they refer to among it. So a new
    function makes new helpers (some milliseconds), and a function called before finds its surroundings as they were
    then: what changes from call to call belongs into the items, or into arrays that `share` made.
    """

    def __init__(self, count):
        self.count = count
        self.known = {}  # id -> an object that helpers have from their fork, and that therefore travels as its id
        self.helpers = []
        self.at_work = False
        self.threads = ThreadPoolExecutor(count) if count > 1 and not CAN_FORK else None
        if self.threads:
            # How long a thread that comes back from a matrix product waits for another to let go of the interpreter.
            # The default of 5 ms is longer than most products here; 0.5 ms makes a U-Net step 1.2 times faster.
            sys.setswitchinterval(0.0005)
        weakref.finalize(self, stop, self.helpers)

    def share(self, arrays):
        """The tree in memory that helpers see too (a copy, if there are any): changes in place are seen by all.

        In an item of `map` such a tree, any branch or leaf of it, costs nothing to send.
        """
        if self.count == 1 or self.threads:
            return arrays
        import numpy as np  # not above: this module is imported before NumPy

        def in_shared_memory(array):
            shared = np.ndarray(array.shape, array.dtype, mmap.mmap(-1, max(1, array.nbytes)))
            shared[...] = array
            return shared

        shared = tree.map(in_shared_memory, arrays)
        self.introduce(*tree.nodes(shared))
        return shared

    def introduce(self, *objects):
        """Let the helpers know these objects: by new forks, if there are any that they do not know."""
        unknown = {id(thing): thing for thing in objects if id(thing) not in self.known}
        if unknown:
            stop(self.helpers)
            self.known |= unknown

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
            self.introduce(f)
            self.at_work, items = True, iter(items)
            try:
                while batch := list(islice(items, self.count)):
                    while len(self.helpers) < len(batch) - 1:
                        self.helpers.append(Helper(self.known))
                    busy = list(zip(self.helpers, batch[1:], strict=False))
                    for helper, item in busy:
                        helper.ask(f, item)
                    yield f(batch[0])
                    for helper, _ in busy:
                        yield helper.answer(copy)
            except BaseException:  # Ctrl-C, or a caller that wants no more: answers may be on their way to nobody
                stop(self.helpers)
                raise
            finally:
                self.at_work = False


use_one_blas_thread()
keep_freed_memory()
