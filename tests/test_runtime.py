"""What importing scratchgen sets up, and the workers."""

import subprocess
import sys
import threading
from pathlib import Path

from scratchgen.runtime import Workers

import pytest

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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(count):
    assert list(Workers(count).map(lambda x: x * x, range(20))) == [x * x for x in range(20)]


def test_two_workers_are_two_threads_and_one_is_the_caller():
    barrier = threading.Barrier(2, timeout=10)  # passes only if two calls are under way at once
    assert sorted(Workers(2).map(lambda _: barrier.wait(), range(2))) == [0, 1]
    assert list(Workers(1).map(lambda _: threading.current_thread(), [0])) == [threading.current_thread()]
