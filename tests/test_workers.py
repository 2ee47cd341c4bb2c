"""The workers that share a minibatch: who computes what, what they see, and how they end."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

from scratchgen.machinery import workers as workers_module
from scratchgen.machinery.workers import Workers

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[True, False], ids=["processes", "threads"])
def both_kinds(request, monkeypatch):
    monkeypatch.setattr(workers_module, "CAN_FORK", request.param and workers_module.CAN_FORK)


needs_fork = pytest.mark.skipif(not workers_module.CAN_FORK, reason="workers are threads here")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(both_kinds, count):
    assert list(Workers(count).map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
    assert list(Workers(count).map(lambda x: x * x, [])) == []


def process(_):
    time.sleep(0.05)
    return os.getpid()


@needs_fork
def test_workers_are_processes_and_one_of_them_is_the_caller():
    found = list(Workers(3).map(process, range(9)))
    assert found[0] == os.getpid() and len(set(found)) == 3 and found[:3] * 3 == found
    assert set(Workers(1).map(process, range(3))) == {os.getpid()}


@needs_fork
def test_workers_work_at_the_same_time():
    began = time.monotonic()
    list(Workers(4).map(lambda _: time.sleep(0.3), range(4)))
    assert time.monotonic() - began < 0.9


def test_threads_are_threads(monkeypatch):
    monkeypatch.setattr(workers_module, "CAN_FORK", False)
    barrier = threading.Barrier(2, timeout=10)  # passes only if two calls are under way at once
    assert sorted(Workers(2).map(lambda _: barrier.wait(), range(2))) == [0, 1]


def test_shared_arrays_are_seen_and_changed_by_all(both_kinds):
    workers = Workers(3)
    original = {"a": np.zeros(3, np.float32), "b": [np.arange(4)], "empty": np.zeros((0, 2))}
    shared = workers.share(original)

    def add_one(i):  # the array of this closure is no part of the item, and yet it is the shared one
        shared["a"][i] += 1
        return shared["a"].dtype

    for _ in range(2):
        assert list(workers.map(add_one, range(3))) == [np.float32] * 3
    assert list(shared["a"]) == [2, 2, 2]
    shared["b"][0][:] = 7  # and what the caller changes, they see
    assert [x.tolist() for x in workers.map(lambda _: shared["b"][0], range(3))] == [[7] * 4] * 3
    assert shared["empty"].shape == (0, 2)


@needs_fork
def test_arrays_that_are_not_shared_travel_as_they_are_now():
    workers, array = Workers(2), np.zeros(2)
    total = lambda x: float(x.sum())  # noqa: E731
    assert list(workers.map(total, [array, array])) == [0, 0]
    array += 1
    assert list(workers.map(total, [array, array])) == [2, 2]


def test_results_are_the_callers_own(both_kinds):
    workers = Workers(2)
    results = list(workers.map(lambda i: np.full(1000, i), range(6)))
    assert [set(result.tolist()) for result in results] == [{i} for i in range(6)]
    results[1][:] = 9
    assert set(results[3].tolist()) == {3}


@needs_fork
def test_arrays_of_every_layout_arrive_also_those_larger_than_a_pipe(rng):
    a = rng.standard_normal((200, 300))
    arrays = [a, a.T, a[::2, ::3], a[:3], a[0, :0], np.asfortranarray(a[:4, :5]), np.float32(3), np.array(2)]
    for result in Workers(2).map(lambda x: x, [arrays, arrays]):
        for found, sent in zip(result, arrays, strict=True):
            np.testing.assert_array_equal(found, sent)
            assert found.dtype == sent.dtype


@pytest.mark.parametrize("guilty", [0, 1])  # the caller, a worker process
def test_an_error_arrives_and_the_workers_go_on(both_kinds, guilty):
    workers = Workers(2)

    def f(i):
        if i == guilty:
            raise KeyError("mine")
        return i

    with pytest.raises(KeyError, match="mine"):
        list(workers.map(f, [0, 1]))
    assert list(workers.map(f, [2, 3])) == [2, 3]


@needs_fork
def test_an_error_in_a_worker_process_says_where():
    with pytest.raises(ZeroDivisionError) as error:
        list(Workers(2).map(lambda i: 1 / (1 - i), [0, 1]))
    assert "in a worker process" in str(error.value.__cause__) and "1 / (1 - i)" in str(error.value.__cause__)


@needs_fork
def test_a_killed_worker_process_is_an_error_in_one_line_and_replaced():
    workers, caller = Workers(2), os.getpid()

    def f(die):
        if die and os.getpid() != caller:
            os.kill(os.getpid(), signal.SIGKILL)
        return die

    with pytest.raises(ChildProcessError, match="^a worker process was killed"):
        list(workers.map(f, [True, True]))
    assert list(workers.map(f, [False, False])) == [False, False]


@needs_fork
def test_a_worker_process_killed_between_two_maps_is_the_same_error():
    workers = Workers(2)
    _, pid = workers.map(process, range(2))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it has ended, so that the next question meets no reader
    with pytest.raises(ChildProcessError, match="^a worker process was killed"):
        list(workers.map(process, range(2)))
    assert len(set(workers.map(process, range(2)))) == 2


@needs_fork
def test_an_answer_nobody_waited_for_is_not_taken_for_the_next():
    """Ctrl-C in the caller, while the other one is still at work."""
    workers, caller = Workers(2), os.getpid()

    def f(i):
        if os.getpid() == caller and i == 1:
            raise KeyboardInterrupt
        return i

    with pytest.raises(KeyboardInterrupt):
        workers.map(f, [1, 2, 3, 4])
    assert workers.map(f, [5, 6]) == [5, 6]


@needs_fork
def test_worker_processes_leave_interrupts_to_the_caller():
    workers = Workers(2)
    _, pid = workers.map(process, range(2))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert list(workers.map(process, range(2)))[1] == pid


@needs_fork
@pytest.mark.parametrize("_again", range(5))
def test_a_thread_beside_does_not_hold_up_a_worker(_again):
    """A fork copies locks as they are, but not the threads that let them go; nothing in a worker waits for one."""
    done = threading.Event()

    def busy():  # with what most programs share
        while not done.is_set():
            print("working", file=sys.stderr, flush=True)
            logging.getLogger("test").debug("working")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later: a fork beside threads
            assert (
                Workers(3).map(lambda i: float((np.ones((200, 200)) @ np.ones((200, 200)))[i, i]), range(6))
                == [200] * 6
            )
    finally:
        done.set()
        thread.join()


@needs_fork
def test_one_map_at_a_time():
    workers = Workers(2)
    for guilty in (0, 1):  # the caller, a worker process: which has the caller's pipes, and must not use them
        with pytest.raises(RuntimeError, match="at work on another map"):
            workers.map(lambda i, guilty=guilty: workers.map(abs, [i, i]) if i == guilty else i, [0, 1])
    assert list(workers.map(abs, [-1, -2])) == [1, 2]


class Awkward(Exception):
    def __init__(self, a, b):  # which pickle cannot call with the one argument that Exception remembers
        super().__init__(f"{a} and {b}")


@needs_fork
def test_what_cannot_travel_is_said_in_its_own_words():
    def f(i):
        if i == 1:
            raise Awkward("this", "that")
        return (lambda: i) if i == 2 else sys.exit("enough") if i == 3 else i

    for i, error, words in ((1, RuntimeError, "Awkward: this and that"), (3, SystemExit, "enough")):
        with pytest.raises(error, match=words):
            list(Workers(2).map(f, [0, i]))
    with pytest.raises((AttributeError, TypeError, RuntimeError), match="lambda"):
        list(Workers(2).map(f, [0, 2]))


class Settings:
    def __init__(self):
        self.factor = 1


@needs_fork
@pytest.mark.parametrize(
    "what", ["variable", "array", "list", "dict", "object", "default", "partial", "method", "deep"]
)
def test_what_a_function_refers_to_may_change_and_all_workers_see_it(what):
    """Each case: something that f refers to is 1, then 5; a process forked in between would go on with 1."""
    workers, settings, variable = Workers(2), Settings(), 1
    array, numbers, named, inner = np.ones(1000), [1], {"factor": 1}, [({"deep": [1]},)]

    def with_default(i, factor=1):
        return factor

    def read(self, i):
        return self.factor

    f = {
        "variable": lambda i: variable,
        "array": lambda i: array[500],
        "list": lambda i: numbers[0],
        "dict": lambda i: named["factor"],
        "object": lambda i: settings.factor,
        "default": with_default,
        "partial": partial(lambda numbers, i: numbers[-1], numbers),
        "method": read.__get__(settings),
        "deep": lambda i: inner[0][0]["deep"][0],
    }[what]
    assert workers.map(f, [0, 1]) == [1, 1]
    pids = [process.pid for process, _ in workers.processes]
    assert workers.map(f, [0, 1]) == [1, 1]
    assert [process.pid for process, _ in workers.processes] == pids  # what has not changed is not forked anew
    variable = array[500] = numbers[0] = named["factor"] = settings.factor = inner[0][0]["deep"][0] = 5
    with_default.__defaults__ = (5,)
    assert workers.map(f, [0, 1]) == [5, 5]
    pids = [process.pid for process, _ in workers.processes]
    variable = array[500] = numbers[0] = named["factor"] = settings.factor = inner[0][0]["deep"][0] = 1  # and back
    with_default.__defaults__ = (1,)
    assert workers.map(f, [0, 1]) == [1, 1] and pids != [process.pid for process, _ in workers.processes]
    pids = [process.pid for process, _ in workers.processes]
    assert workers.map(f, [0, 1]) == [1, 1] and pids == [process.pid for process, _ in workers.processes]


@needs_fork
def test_a_read_only_view_may_show_what_has_changed():
    workers, array = Workers(2), np.ones(1000)
    view = np.broadcast_to(array, (2, 1000))
    f = lambda i: view[0, 5]  # noqa: E731
    assert workers.map(f, [0, 1]) == [1, 1]
    array[5] = 5
    assert workers.map(f, [0, 1]) == [5, 5]


@needs_fork
def test_processes_do_not_use_the_workers_of_the_one_that_they_were_forked_from():
    outer, inner = Workers(2), Workers(2)
    inner.map(abs, [0, 1])
    with pytest.raises(RuntimeError, match="belong to the process"):
        outer.map(lambda i: inner.map(abs, [i, i]) if i else None, [0, 1])


@needs_fork
def test_a_ctrl_c_during_a_fork_leaves_no_process_and_no_signal_blocked(monkeypatch):
    """One that arrives while the signals are blocked, and so raises when they are let through again."""
    workers, start = Workers(2), workers_module.get_context("fork").Process.start
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def interrupted(process):
        start(process)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workers_module.get_context("fork").Process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.map(abs, [0, 1])
    assert workers.processes == [] and signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    monkeypatch.undo()
    assert workers.map(abs, [0, -1]) == [0, 1]


@needs_fork
def test_functions_no_longer_used_are_let_go():
    workers = Workers(2)
    for number in range(20):
        array = np.full(1000, number)
        assert workers.map(lambda i, array=array: array[i], [0, 1]) == [number] * 2
    assert len(workers.functions) == workers_module.KEPT


def test_after_an_error_no_thread_goes_on_writing(monkeypatch):
    monkeypatch.setattr(workers_module, "CAN_FORK", False)
    workers, room = Workers(2), []

    def f(i):
        if i == 0:
            raise ValueError("first")
        time.sleep(0.1)
        room.append(i)

    with pytest.raises(ValueError, match="first"):
        workers.map(f, range(6))
    written = len(room)
    time.sleep(0.3)
    assert len(room) == written < 5


@needs_fork
def test_a_process_of_a_pool_works_alone():
    with workers_module.get_context("fork").Pool(1) as pool:
        assert pool.apply(count_of_new_workers) == 1


def count_of_new_workers():
    return Workers(3).count


@needs_fork
def test_a_variable_of_the_main_program_may_change_as_in_a_notebook():
    code = """
from scratchgen.machinery.workers import Workers
workers, factor = Workers(2), 1
def f(i):
    return factor
def g(i):
    return sum(factor for _ in range(1)) + (lambda: factor)()
first = workers.map(f, [0, 1]), workers.map(g, [0, 1])
factor = 5
print(*first, workers.map(f, [0, 1]), workers.map(g, [0, 1]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[1, 1] [2, 2] [5, 5] [10, 10]\n", result.stderr


@needs_fork
def test_shared_arrays_and_those_that_nobody_can_write_change_nothing():
    workers, frozen = Workers(2), np.zeros(3)
    frozen.flags.writeable = False
    shared = workers.share(np.zeros(3))
    part = shared[:2]
    f = lambda i: frozen[0] + part[0]  # noqa: E731
    assert workers.map(f, [0, 1]) == [0, 0]
    pids = [process.pid for process, _ in workers.processes]
    shared[0] = 2
    assert workers.map(f, [0, 1]) == [2, 2]
    assert [process.pid for process, _ in workers.processes] == pids


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_fork
@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)", "del workers; time.sleep(60)"])
def test_worker_processes_end_with_the_caller_and_with_their_workers(end):
    code = f"""
import os, sys, time
from scratchgen.machinery.workers import Workers
workers = Workers(3)
print(*workers.map(lambda _: os.getpid(), range(3)), flush=True)
{end}
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        _, *processes = map(int, caller.stdout.readline().split())
        deadline = time.monotonic() + 10
        still = unburied = processes
        while (still or unburied) and time.monotonic() < deadline:
            time.sleep(0.01)
            still = [pid for pid in processes if is_running(pid)]
            unburied = [pid for pid in processes if caller.poll() is None and Path(f"/proc/{pid}").exists()]  # zombies
        caller.kill()
    assert len(processes) == 2 and not still and not unburied
