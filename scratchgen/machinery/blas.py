"""The set-up of BLAS and memory for the whole process, and the tiled matrix product.

Importing this module (``scratchgen/__init__.py`` does so first) changes two things in the process:

* BLAS runs single-threaded, and parallelism comes from ranks that each take whole shards of a minibatch. Copies,
  element-wise work and normalisation then run in parallel too, not only the matrix products.
* The C library keeps freed memory instead of handing it back to the kernel. Otherwise each large temporary array is
  mapped, zeroed and page-faulted anew at every step. A VAE step becomes 1.7 times faster, a U-Net step 1.1 times.
"""

import ctypes
import itertools
import math
import os
import sys
import warnings
from functools import cache
from pathlib import Path

BLAS_THREAD_VARIABLES = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "MKL", "BLIS", "OMP")]
BLAS_THREAD_VARIABLES += ["VECLIB_MAXIMUM_THREADS"]
BLAS_THREAD_FUNCTIONS = [f"{scipy}openblas_set_num_threads{i64}" for scipy in ("scipy_", "") for i64 in ("64_", "")]
BLAS_THREAD_FUNCTIONS += ["MKL_Set_Num_Threads", "BLASSetThreading"]  # the last is Apple's; its 1 stands for one thread
# Option numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def use_one_blas_thread():
    """Make BLAS single-threaded, and return whether it is.

    BLAS reads the environment once, when NumPy loads it. After that only its own functions can change its threads.
    """
    told = os.environ.get(BLAS_THREAD_VARIABLES[0]) == "1"
    os.environ.update(dict.fromkeys(BLAS_THREAD_VARIABLES, "1"))
    if "numpy" not in sys.modules:
        return True
    folder = Path(sys.modules["numpy"].__file__).parent
    # NumPy's extension module gives the functions of libraries that it is linked with; on Windows only the DLLs do.
    done = any(map(set_one_thread, [*folder.glob("*core/_multiarray*"), *folder.parent.glob("numpy.libs/*blas*")]))
    if not (done or told):
        message = "NumPy was imported before scratchgen, so BLAS keeps its threads, and --workers is ignored"
        warnings.warn(f"{message}: training may be slower; better import scratchgen first", stacklevel=3)
    return done or told


def set_one_thread(library):
    """Set the BLAS in this library, or in one that it is linked with, to one thread; return whether that worked."""
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


ONE_BLAS_THREAD = use_one_blas_thread()
keep_freed_memory()

import numpy as np  # noqa: E402  now that BLAS reads the variables

# ----------------------------------------------------------------------------------------------------- matrix products
# OpenBLAS copies ("packs") the operands of a product into a layout of its own. Its AVX-512 kernels read small operands
# in place: rows x inner x columns is at most a million and, if the right operand is transposed, rows x columns at most
# 1200 and the inner dimension at least 32. So with AVX-512 a product is cut into such tiles, in one call of np.matmul,
# which loops over stacks of matrices: 1.1 to 2 times faster (docs/performance.md). On other processors it stays whole.
# This depends on the processor, not on timing: on one machine the sums, and so the bits, are always the same.


def has_small_kernels():
    config = np.show_config(mode="dicts")  # not every build of NumPy has all these entries
    extensions = config.get("SIMD Extensions", {})
    here = {*extensions.get("baseline", ()), *extensions.get("found", ())}
    avx512 = {"X86_V4", "AVX512_SKX"}  # two names of the same: since NumPy 2.4, and before
    return bool(here & avx512) and "openblas" in config.get("Build Dependencies", {}).get("blas", {}).get("name", "")


SMALL_KERNELS = has_small_kernels()


@cache
def tile(M, K, N, transposed):
    """The tile (rows, columns) of (M, K) @ (K, N); it divides M and N. The largest is taken; of several, one of 32
    columns or more, as rows of b are read in such pieces, then the squarest. Single rows and few columns are excluded,
    being slower than the whole product. If no tile is left, as for a large prime M, the product stays whole."""
    if not SMALL_KERNELS or (transposed and K < 32) or 0 in (M, K, N):
        return M, N
    limit = min(10**6 // K, 1200) if transposed else 10**6 // K
    sizes = itertools.product(*([d for d in range(1, side + 1) if side % d == 0] for side in (M, N)))
    sizes = [(r, c) for r, c in sizes if 64 <= r * c <= limit and (r > 1 or M == 1) and (c >= 16 or c == N)]
    return max(sizes, key=lambda size: (math.prod(size), min(size[1], 32), min(size)), default=(M, N))


def product(a, b, out=None):
    """a @ b for (.., M, K) and (.., K, N), or one b (K, N) for all: (.., M, N), written to ``out`` if it is given."""
    M, K, N = a.shape[-2:] + b.shape[-1:]
    transposed = b.strides[-1] != b.itemsize
    if transposed and M > 512:  # copying b takes little time here, and b is read faster by rows
        b = np.ascontiguousarray(b)
        transposed = False
    rows, columns = tile(M, K, N, transposed)
    if (rows, columns) == (M, N):
        return np.matmul(a, b, out=out)
    if out is None:
        out = np.empty((*a.shape[:-1], N), np.result_type(a, b))
    # Two more axes, for the tiles: (.., M / rows, 1, rows, K) @ (.., 1, N / columns, K, columns). Nothing is copied.
    a = a.reshape(*a.shape[:-2], M // rows, 1, rows, K)
    b = b.reshape(*b.shape[:-1], N // columns, columns).swapaxes(-3, -2)[..., None, :, :, :]
    np.matmul(a, b, out=out.reshape(*out.shape[:-2], M // rows, rows, N // columns, columns).swapaxes(-3, -2))
    return out
