"""What importing scratchgen sets up, and the matrix product that is cut into tiles."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from scratchgen.machinery import blas

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


# --------------------------------------------------------------------------------------------------- threads and memory


def test_blas_is_told_to_use_one_thread_before_numpy_loads():
    code = """
import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "numpy":
            print(*(os.environ.get(f"{blas}_NUM_THREADS") for blas in ("OPENBLAS", "MKL", "BLIS", "OMP")))
sys.meta_path.insert(0, Watch())
import scratchgen
"""
    assert python(code, OPENBLAS_NUM_THREADS="7").stdout == "1 1 1 1\n"


THREADS_AND_WORKERS = """
from scratchgen.machinery import blas
from scratchgen.machinery.parallel import Ranks
ranks = Ranks(3)
print(blas.ONE_BLAS_THREAD, ranks.processes * ranks.threads)
"""


def test_numpy_imported_first_is_told_to_use_one_thread_then_and_nothing_need_be_said():
    result = python("import numpy" + THREADS_AND_WORKERS)
    assert result.stdout.split() == ["True", "3"] and result.stderr == ""
    for alone in ("import scratchgen, numpy" + THREADS_AND_WORKERS, "import numpy, scratchgen"):
        assert python(alone, OPENBLAS_NUM_THREADS="1" if alone.startswith("import n") else "5").stderr == ""


def test_where_blas_cannot_be_told_it_does_the_parallel_work_alone():
    code = "import ctypes, numpy; ctypes.CDLL = lambda *_: object()"  # a library without any of the functions
    result = python(code + THREADS_AND_WORKERS)
    assert result.stdout.split() == ["False", "1"] and "left its threads, and --workers is ignored" in result.stderr
    assert result.stderr.count("import scratchgen first") == 1


def test_apples_accelerate_is_told_by_its_own_function(monkeypatch):
    told = []
    library = SimpleNamespace(BLASSetThreading=told.append)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: library)
    assert blas.set_one_thread("_multiarray_umath.so") and told == [1]  # BLAS_THREADING_SINGLE_THREADED


def test_a_library_that_is_not_there_has_no_threads_to_set():
    assert not blas.set_one_thread("no/such/library.so")


def test_whatever_is_imported_first_of_the_package_blas_is_set_up_before_numpy_is_loaded():
    for module in ("tree", "improved", "machinery.cli", "trained"):
        code = f"import os, scratchgen.{module}, numpy; print(os.environ['OPENBLAS_NUM_THREADS'])"
        result = python(code, OPENBLAS_NUM_THREADS="7")
        assert result.stdout.split() == ["1"] and result.stderr == ""


def test_available_cores_are_those_of_this_process():
    assert blas.available_cores() >= 1
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from scratchgen.machinery import "
        assert python(code + "blas; print(blas.available_cores())").stdout.split() == ["1"]


def test_a_variable_that_was_set_after_numpy_read_it_is_not_believed():
    code = "import numpy, os, ctypes\nos.environ['OPENBLAS_NUM_THREADS'], opened, load = '1', [], ctypes.CDLL\n"
    code += "ctypes.CDLL = lambda name: opened.append(str(name)) or load(name)\nimport scratchgen\n"
    code += "print(any('multiarray' in name for name in opened))"
    result = python(code)
    assert result.stdout.split() == ["True"] and result.stderr == ""


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
    assert python(code).stdout == f"True {[True] * 5}\n"


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


def test_tiles_divide_a_product_and_are_small_enough_for_the_kernels_that_do_not_pack(both_kinds):
    for M, K, N, transposed in (
        (784, 288, 32, False),
        (64, 784, 300, False),
        (32, 256, 784, True),
        (8, 10**7, 4, False),
    ):
        rows, columns = blas.tile(M, K, N, transposed)
        assert M % rows == 0 and N % columns == 0
        if not blas.SMALL_KERNELS:
            assert (rows, columns) == (M, N)
        elif K <= 10**6:
            assert rows * K * columns <= 10**6 and (not transposed or rows * columns <= 1200)


@pytest.mark.parametrize(
    ("M", "K", "N", "transposed", "tile"),
    [
        (448, 576, 32, False, (32, 32)),  # of several of one area one with 32 columns
        (448, 288, 64, False, (32, 64)),
        (32, 784, 256, True, (32, 32)),
        (1568, 16, 64, True, (1568, 64)),  # too shallow for the kernels that take a transposed operand
        (43, 3136, 256, False, (43, 256)),  # prime: cut into single rows it takes more than twice as long
        (32, 196_000, 32, False, (32, 32)),
    ],
)
def test_tiles_as_measured(monkeypatch, M, K, N, transposed, tile):
    monkeypatch.setattr(blas, "SMALL_KERNELS", True)
    blas.tile.cache_clear()
    assert blas.tile(M, K, N, transposed) == tile
    blas.tile.cache_clear()


SIMD = {"SIMD Extensions": {"found": ["X86_V4"]}}


@pytest.mark.parametrize(
    "config",
    [{}, SIMD, SIMD | {"Build Dependencies": {}}, SIMD | {"Build Dependencies": {"blas": {}}}]
    + [{"SIMD Extensions": {}, "Build Dependencies": {"blas": {"name": "openblas"}}}],
)
def test_a_numpy_that_says_less_of_itself_has_no_small_kernels(config, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert not blas.has_small_kernels()


@pytest.mark.parametrize(
    ("features", "library", "small"),
    [("X86_V4", "scipy-openblas", True), ("AVX512_SKX", "openblas", True), ("AVX2", "openblas", False)]
    + [("X86_V4", "accelerate", False)],
)
def test_what_the_processor_has_decides_and_not_the_clock(monkeypatch, features, library, small):
    config = {
        "SIMD Extensions": {"baseline": ["SSE"], "found": [features]},
        "Build Dependencies": {"blas": {"name": library}},
    }
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert blas.has_small_kernels() == small
