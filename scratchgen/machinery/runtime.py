"""Process set-up: BLAS threads and memory.

Importing this module (``scratchgen/__init__.py`` does so first) changes three things in the process:

* BLAS runs single-threaded, and parallelism comes from workers that each take a whole shard of a minibatch. Copies,
  element-wise work and normalisation then run in parallel too, not only the matrix products.
* The C library keeps freed memory instead of handing it back to the kernel. Otherwise each large temporary array is
  mapped, zeroed and page-faulted anew at every step. A VAE step becomes 1.7 times faster, a U-Net step 1.1 times.
* Ctrl-C while modules are being imported, which takes a second, is one line and no traceback.
"""

import ctypes
import os
import sys
import traceback
import warnings
from pathlib import Path

BLAS_THREAD_VARIABLES = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "MKL", "BLIS", "OMP")]
BLAS_THREAD_VARIABLES += ["VECLIB_MAXIMUM_THREADS"]
BLAS_THREAD_FUNCTIONS = [f"{scipy}openblas_set_num_threads{i64}" for scipy in ("scipy_", "") for i64 in ("64_", "")]
BLAS_THREAD_FUNCTIONS += ["MKL_Set_Num_Threads"]
# Option numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def use_one_blas_thread():
    """Make BLAS single-threaded, and return whether it is.

    It reads the variables once, when NumPy loads it; afterwards only a function of its own can change its threads.
    """
    told = os.environ.get(BLAS_THREAD_VARIABLES[0]) == "1"
    os.environ.update(dict.fromkeys(BLAS_THREAD_VARIABLES, "1"))
    if "numpy" not in sys.modules:
        return True
    folder = Path(sys.modules["numpy"].__file__).parent
    # NumPy's extension leads to the functions of all that it is linked with; on Windows only their own DLL does.
    done = any(map(set_one_thread, [*folder.glob("*core/_multiarray*"), *folder.parent.glob("numpy.libs/*blas*")]))
    how = "set to one thread now" if done else "left its threads, and --workers is ignored: training may be slower"
    if not told:
        message = f"NumPy was imported before scratchgen, so BLAS was {how}; better import scratchgen first"
        warnings.warn(message, stacklevel=3)
    return done or told


def set_one_thread(library):
    """Whether the BLAS in this library, or in one that it is linked with, could be told to use one thread."""
    try:
        functions = ctypes.CDLL(str(library))
    except OSError:
        return False
    names = [name for name in BLAS_THREAD_FUNCTIONS if hasattr(functions, name)]
    for name in names:
        getattr(functions, name)(1)
    return bool(names)


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


def quiet_imports(kind, error, trace, hook=sys.excepthook):
    """A sys.excepthook: `hook`, but for a KeyboardInterrupt in the body of a module other than the main program's."""
    names = [(frame.f_code.co_name, frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
    if issubclass(kind, KeyboardInterrupt) and any(f == "<module>" and name != "__main__" for f, name in names):
        print("stopped before it began", file=sys.stderr)
    else:
        hook(kind, error, trace)


sys.excepthook = quiet_imports
ONE_BLAS_THREAD = use_one_blas_thread()
keep_freed_memory()
