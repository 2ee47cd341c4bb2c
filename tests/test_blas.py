"""What importing scratchgen sets up, and the matrix product that is cut into tiles."""

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from scratchgen.machinery import blas

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


# --------------------------------------------------------------------------------------------------- threads and memory

SEES_NUMPY_LOAD = """
import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "numpy":
            blas = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "MKL", "BLIS", "OMP")] + ["VECLIB_MAXIMUM_THREADS"]
            print(*map(os.environ.get, blas))
sys.meta_path.insert(0, Watch())
import scratchgen"""


@pytest.mark.parametrize("module", ["", ".tree", ".improved", ".machinery.cli", ".trained"])
def test_blas_is_told_to_use_one_thread_before_numpy_loads_whatever_is_imported_first(module):
    assert python(SEES_NUMPY_LOAD + module, OPENBLAS_NUM_THREADS="7") == (["1"] * 5, "")


# How many threads OpenBLAS has, in which a variable that was set after NumPy read it is not to be believed.
NUMPY_FIRST = """
import ctypes, os, sys, numpy
loaded = [line.split()[-1] for line in open("/proc/self/maps") if "openblas" in line]
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import scratchgen
from scratchgen.machinery import blas
from scratchgen.machinery.parallel import Ranks
library = loaded and ctypes.CDLL(loaded[0])
names = [name.replace("set", "get") for name in blas.BLAS_THREAD_FUNCTIONS if hasattr(library, name)]
ranks = Ranks(3)
print(getattr(library, names[0])() if loaded else 1, blas.ONE_BLAS_THREAD, ranks.processes * ranks.threads)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="who knows where its BLAS is?")
def test_numpy_imported_first_is_told_to_use_one_thread_then_and_nothing_need_be_said():
    assert python(NUMPY_FIRST, OPENBLAS_NUM_THREADS="5") == (["1", "True", "3"], "")


def test_where_blas_cannot_be_told_it_does_the_parallel_work_alone():
    code = """
import ctypes, numpy
ctypes.CDLL = lambda *_: object()  # a library without any of the functions
from scratchgen.machinery import blas
from scratchgen.machinery.parallel import Ranks
print(blas.ONE_BLAS_THREAD, Ranks(3).processes * Ranks(3).threads)
"""
    found, said = python(code)
    assert found == ["False", "1"] and "keeps its threads, and --workers is ignored" in said
    assert said.count("import scratchgen first") == 1
    assert python(code, OPENBLAS_NUM_THREADS="1") == (["True", "3"], "")  # NumPy has read it


@pytest.mark.parametrize("names", [blas.BLAS_THREAD_FUNCTIONS, *([name] for name in blas.BLAS_THREAD_FUNCTIONS)])
def test_each_blas_is_told_by_its_own_function(names, monkeypatch):
    assert {"openblas_set_num_threads", "MKL_Set_Num_Threads", "BLASSetThreading"} <= {*blas.BLAS_THREAD_FUNCTIONS}
    told = {}
    functions = {name: partial(told.__setitem__, name) for name in names}
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: SimpleNamespace(**functions))
    assert blas.set_one_thread("_multiarray_umath.so") and told == dict.fromkeys(names, 1)


def test_a_library_that_is_not_there_has_no_threads_to_set():
    assert not blas.set_one_thread("no/such/library.so")


def test_available_cores_are_those_of_this_process(monkeypatch):
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from scratchgen.machinery import "
        assert python(code + "blas; print(blas.available_cores())")[0] == ["1"]
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for known, expected in ((12, 12), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda known=known: known)
        assert blas.available_cores() == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
def test_freed_memory_is_used_again_without_asking_the_kernel_for_it():
    code = """
import resource, scratchgen, numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults() > 100, [faults() < 100 for _ in range(5)])
"""
    assert python(code)[0] == ["True", *f"{[True] * 5}".split()]


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("shape", [(60, 784, 300), (1001, 64, 96), (7, 3, 1), (2, 2_000_000, 1), (97, 200, 211)])
def test_a_product_is_the_same_whole_and_in_tiles(rng, both_kinds, shape, stack, transposed):
    M, K, N = shape
    a = rng.standard_normal((*stack, K, M), dtype=np.float32).swapaxes(-1, -2) if K < 1000 else np.ones((*stack, M, K))
    b = rng.standard_normal((*stack, N, K)).swapaxes(-1, -2) if transposed else rng.standard_normal((K, N))
    out = np.full((*a.shape[:-1], 2 * N), np.nan)[..., ::2]  # not even in one piece
    np.testing.assert_allclose(blas.product(a, b), a @ b, atol=1e-8)
    assert blas.product(a, b, out=out) is out
    np.testing.assert_allclose(out, a @ b, atol=1e-8)


def test_a_product_over_nothing_is_zero(both_kinds):
    """Sums of no terms: there is no tile of such a product, as 10^6 / K numbers would be its size."""
    # A slice keeps its strides. Those of a new array without numbers are zeros: it would count as transposed, and a
    # transposed b of few rows is left whole for another reason.
    a, b = np.ones((64, 0)), np.ones((3, 96))[:0]
    np.testing.assert_array_equal(blas.product(a, b), np.zeros((64, 96)))


@pytest.mark.parametrize(
    ("M", "K", "N", "transposed", "tile"),
    [
        (784, 288, 32, False, (98, 32)),
        (64, 784, 300, False, (16, 75)),
        (448, 576, 32, False, (32, 32)),  # of several of one area one with 32 columns
        (448, 288, 64, False, (32, 64)),
        (32, 784, 256, True, (32, 32)),
        (32, 256, 784, True, (16, 56)),
        (1568, 16, 64, True, (1568, 64)),  # too shallow for the kernels that take a transposed operand
        (43, 3136, 256, False, (43, 256)),  # prime: cut into single rows it takes more than twice as long
        (32, 196_000, 32, False, (32, 32)),  # too deep
        (8, 10**7, 4, False, (8, 4)),
    ],
)
def test_tiles_are_as_measured_and_small_enough_for_the_kernels_that_do_not_pack(both_kinds, M, K, N, transposed, tile):
    rows, columns = blas.tile(M, K, N, transposed)
    assert (rows, columns) == (tile if blas.SMALL_KERNELS else (M, N))
    if (rows, columns) != (M, N):
        assert M % rows == N % columns == 0
        assert rows * K * columns <= 10**6 and (not transposed or rows * columns <= 1200)


SIMD = {"SIMD Extensions": {"found": ["X86_V4"]}}


def has(library, found=(), baseline=("SSE",)):
    extensions = {"baseline": [*baseline], "found": [*found]}
    return {"SIMD Extensions": extensions, "Build Dependencies": {"blas": {"name": library}}}


@pytest.mark.parametrize(
    ("config", "small"),
    [
        (has("scipy-openblas", found=["X86_V4"]), True),
        (has("openblas", found=["AVX2", "AVX512_SKX"]), True),
        (has("openblas", baseline=["SSE", "X86_V4"]), True),
        (has("openblas", found=["AVX2"]), False),
        (has("accelerate", found=["X86_V4"]), False),
        ({}, False),  # a NumPy that says less of itself
        (SIMD, False),
        (SIMD | {"Build Dependencies": {}}, False),
        (SIMD | {"Build Dependencies": {"blas": {}}}, False),
        ({"SIMD Extensions": {}, "Build Dependencies": {"blas": {"name": "openblas"}}}, False),
    ],
)
def test_what_the_processor_has_decides_and_not_the_clock(config, small, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert blas.has_small_kernels() == small
