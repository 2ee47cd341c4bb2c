"""Process set-up: BLAS threads, memory, and the pool of workers.

Importing this module (``scratchgen/__init__.py`` does so first) changes two things in the process, both measured
and both without influence on any result's meaning:

* BLAS runs single-threaded, and parallelism comes from workers that each take a whole shard of a minibatch. Copies,
  element-wise work and normalisation then run in parallel too, not only the matrix products.
* The C library keeps freed memory instead of handing it back to the kernel. Otherwise each large temporary array is
  mapped, zeroed and page-faulted anew at every step. A VAE step becomes 1.7 times faster, a U-Net step 1.1 times.
"""

import ctypes
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

BLAS_THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)
# Option numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


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
    mallopt(M_TOP_PAD, 64 * 2**20)  # ... grow it in large strides ...
    mallopt(M_ARENA_MAX, 1)  # ... and share one heap between the threads, or each would keep its own.


def available_cores():
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


class Workers:
    """``count`` workers that compute ``map(f, items)``, in order; with one worker, in the calling thread.

    With one worker it is as lazy as `map`; with more, work begins at once.

    Threads suffice because NumPy lets go of the interpreter lock inside matrix products and array arithmetic.
    """

    def __init__(self, count):
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None
        if count > 1:
            # How long a thread that comes back from a matrix product waits for another to let go of the interpreter.
            # The default of 5 ms is longer than most products here; 0.5 ms makes a U-Net step 1.2 times faster.
            sys.setswitchinterval(0.0005)

    def map(self, f, items):
        return map(f, items) if self._pool is None else self._pool.map(f, items)


use_one_blas_thread()
keep_freed_memory()
