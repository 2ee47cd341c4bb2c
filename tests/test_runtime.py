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


def test_numpy_imported_first_is_warned_of():
    assert "import scratchgen first" in python("import numpy, scratchgen").stderr
    assert python("import scratchgen, numpy").stderr == ""


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
