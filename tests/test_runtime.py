"""What importing scratchgen sets up."""

import os
import subprocess
import sys
from pathlib import Path

from scratchgen.machinery import runtime

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_blas_is_told_to_use_one_thread_before_numpy_loads():
    code = "import sys, scratchgen, os; print('numpy' in sys.modules, os.environ['OPENBLAS_NUM_THREADS'])"
    assert python(code, OPENBLAS_NUM_THREADS="7").stdout.split() == ["False", "1"]


THREADS_AND_WORKERS = """
from scratchgen.machinery import runtime
from scratchgen.machinery.workers import Workers
print(runtime.ONE_BLAS_THREAD, Workers(3).count)
"""


def test_numpy_imported_first_is_told_to_use_one_thread_then_and_one_line_says_so():
    result = python("import numpy" + THREADS_AND_WORKERS)
    assert result.stdout.split() == ["True", "3"] and result.stderr.count("import scratchgen first") == 1
    assert "set to one thread now" in result.stderr
    for alone in ("import scratchgen, numpy" + THREADS_AND_WORKERS, "import numpy, scratchgen"):
        assert python(alone, OPENBLAS_NUM_THREADS="1" if alone.startswith("import n") else "5").stderr == ""


def test_where_blas_cannot_be_told_it_does_the_parallel_work_alone():
    code = "import ctypes, numpy; ctypes.CDLL = lambda *_: object()"  # a library without any of the functions
    result = python(code + THREADS_AND_WORKERS)
    assert result.stdout.split() == ["False", "1"] and "left its threads, and --workers is ignored" in result.stderr


def test_a_library_that_is_not_there_has_no_threads_to_set():
    assert not runtime.set_one_thread("no/such/library.so")


def test_whatever_is_imported_first_of_the_package_runtime_acts_before_numpy_is_loaded():
    for module in ("tree", "improved", "machinery.cli", "evaluate.load"):
        code = f"import os, scratchgen.{module}, numpy; print(os.environ['OPENBLAS_NUM_THREADS'])"
        result = python(code, OPENBLAS_NUM_THREADS="7")
        assert result.stdout.split() == ["1"] and result.stderr == ""


def test_available_cores_are_those_of_this_process():
    assert runtime.available_cores() >= 1
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from scratchgen.machinery import "
        assert python(code + "runtime; print(runtime.available_cores())").stdout.split() == ["1"]


def test_a_variable_that_was_set_after_numpy_read_it_is_not_believed():
    code = "import numpy, os, ctypes\nos.environ['OPENBLAS_NUM_THREADS'], opened, load = '1', [], ctypes.CDLL\n"
    code += "ctypes.CDLL = lambda name: opened.append(str(name)) or load(name)\nimport scratchgen\n"
    code += "print(any('multiarray' in name for name in opened))"
    result = python(code)
    assert result.stdout.split() == ["True"] and result.stderr == ""
