"""The workers that share a minibatch: who computes what, what they see, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
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
    assert [x.tolist() for x in workers.map(lambda tree: tree["b"][0], [shared] * 3)] == [[7] * 4] * 3
    assert shared["empty"].shape == (0, 2)

    def double(leaf):
        leaf *= 2

    list(workers.map(double, [shared["empty"], shared["a"], shared["b"][0]]))  # a leaf is as good as the whole tree
    assert shared["a"].tolist() == [4] * 3 and shared["b"][0].tolist() == [14] * 4


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
def test_arrays_of_every_layout_arrive_also_where_the_mailbox_is_full(monkeypatch, rng):
    monkeypatch.setattr(workers_module, "MAILBOX_BYTES", 1 << 12)
    a = rng.standard_normal((20, 30))  # 4,800 bytes: more than there is room for
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


def test_an_answer_nobody_waited_for_is_not_taken_for_the_next(both_kinds):
    workers = Workers(2)
    for _ in workers.map(lambda x: x, [1, 2, 3, 4]):
        break
    assert list(workers.map(lambda x: x, [5, 6])) == [5, 6]


@needs_fork
def test_worker_processes_leave_interrupts_to_the_caller():
    workers = Workers(2)
    _, pid = workers.map(process, range(2))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert list(workers.map(process, range(2)))[1] == pid


@needs_fork
def test_one_map_at_a_time():
    workers = Workers(2)
    with pytest.raises(RuntimeError, match="at work on another map"):
        list(zip(workers.map(abs, [1, 2, 3]), workers.map(abs, [4, 5, 6]), strict=True))
    with pytest.raises(RuntimeError, match="at work on another map"):
        list(workers.map(lambda i: list(workers.map(abs, [i, i])), [1, 2]))
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


@needs_fork
def test_arrays_arrive_aligned():
    sent = [np.arange(3, dtype=np.uint8), np.arange(5.0)]
    assert all(list(Workers(2).map(lambda arrays: arrays[1].flags.aligned, [sent, sent])))


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
        while any(map(is_running, processes)) and time.monotonic() < deadline:
            time.sleep(0.01)
        still = [pid for pid in processes if is_running(pid)]
        unburied = [pid for pid in processes if caller.poll() is None and Path(f"/proc/{pid}").exists()]  # zombies
        caller.kill()
    assert len(processes) == 2 and not still and not unburied
