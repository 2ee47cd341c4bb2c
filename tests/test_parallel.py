"""The ranks of a run: how they meet, what they divide up, that it changes no bit, and how they end."""

import errno
import itertools
import logging
import math
import operator
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from scratchgen import draw, muon, tree
from scratchgen.data import UserError
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import reports
from scratchgen.gradients import value_and_grad
from scratchgen.layers import init_mlp, mlp
from scratchgen.machinery import blas, cli, files, parallel
from scratchgen.machinery import run as run_module
from scratchgen.machinery.parallel import KILLED, Ranks, in_parallel, ranks_for, sharded, shards
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, init_moments
from scratchgen.trained import load_run

import autograd.numpy as anp
import numpy as np
import pytest
from conftest import ROOT, load, main_of
from test_kills import FLAGS, Figures, at_each_moment, contents, small, train, what_kills_leave

needs_fork = pytest.mark.skipif(not parallel.CAN_FORK, reason="there is one rank here, and its threads")
WAS_KILLED = f"^{re.escape(KILLED)}$"
NAMES = [f"SIG{name}" for name in ("INT", "QUIT", "TERM", "HUP", "USR1", "USR2", "XCPU")]
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
RECORD = run_module.Run.record


def processes():
    """(pid, parent, session) of all processes that run, or have ended and are not buried yet (zombies)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            state, parent, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
            yield int(path.parent.name), int(parent), int(session), state


def children():
    return {pid for pid, parent, _, _ in processes() if parent == os.getpid()}


def too_long(*_):
    pytest.fail("this took too long")  # a TimeoutError is an OSError, which `receive` takes for the end of a rank


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No test may leave a process, even one that is not buried; and a rank that waits for ever is a failure."""
    if not parallel.CAN_FORK:
        yield
        return
    before, mask = children(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert children() <= before and parallel.rank == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


@pytest.fixture(params=[True, False], ids=["processes", "threads"])
def both_kinds(request, monkeypatch):
    monkeypatch.setattr(parallel, "CAN_FORK", request.param and parallel.CAN_FORK)


def together(workers, f):
    """[f(ranks) of rank 0, of rank 1, ..]. What is inside a block with ranks, other ranks never leave."""
    with Ranks(workers) as ranks:
        return ranks.all_gather(f(ranks))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error):
    raise error


# -------------------------------------------------------------------------------------------------------- how they meet


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_items_of_a_map_are_divided_and_all_get_all_results_as_their_own(both_kinds, count):
    def work(ranks):
        results = [ranks.map(lambda x: np.array([x * x, parallel.rank]), range(N)) for N in (20, 3, 1, 0)]
        ranks.barrier()
        for result in (result for of_map in results for result in of_map):
            result += parallel.rank
        ranks.barrier()
        return [[(result - parallel.rank).tolist() for result in of_map] for of_map in results]

    ranks = count if parallel.CAN_FORK else 1
    expected = [[[x * x, x % ranks] for x in range(N)] for N in (20, 3, 1, 0)]
    assert together(count, work) == [expected] * ranks


@needs_fork
def test_arrays_of_every_layout_arrive_and_may_be_much_larger_than_a_pipe(rng):
    a = rng.standard_normal((200, 300))
    arrays = [a, a.T, a[::2, ::3], a[:3], a[0, :0], np.asfortranarray(a[:4, :5]), np.float32(3), np.array(2), a > 0]
    arrays.append(np.full(700_000, 1.5))  # 5.6 MB; what all give is 17 MB

    def meet(ranks):
        for _ in range(3):
            for number, given in enumerate(ranks.all_gather([array + ranks.rank for array in arrays])):
                for array, found in zip(arrays, given, strict=True):
                    np.testing.assert_array_equal(found, array + number)
                    assert found.dtype == (array + number).dtype
        return ranks.broadcast(arrays if ranks.rank == 0 else None)[8].dtype

    assert together(3, meet) == [bool] * 3


@needs_fork
def test_ranks_that_find_different_things_say_so():
    def agree(ranks):
        ranks.agree("a file", "the same")
        for value, found in (
            (ranks.rank, "0, 1, 2"),
            (ranks.rank // 2, "0, 0, 1"),
            (ranks.rank == 0, "True, F.*, F.*"),
        ):
            with pytest.raises(UserError, match=rf"^a file: ranks found different ones \(\[{found}\]\); all machines "):
                ranks.agree("a file", value)
        return "goes on"

    assert together(3, agree) == ["goes on"] * 3
    Ranks(1).agree("a file", "whatever")


# --------------------------------------------------------------------------------------------------------- who they are


@needs_fork
def test_ranks_are_processes_from_the_beginning_of_each_block_to_its_end():
    """Of the same object, and of a new one. Rank 0 is the caller."""
    ranks, seen = Ranks(3), set()
    for again in (ranks, ranks, Ranks(2)):
        assert (again.rank, again.count, again.map(abs, [-1, -2]), again.all_gather(5)) == (0, 1, [1, 2], [5])
        with again:
            assert again.count == again.processes
            who = again.all_gather((again.rank, parallel.rank, os.getppid()))
            assert again.all_gather(again.broadcast(f"from {again.rank}")) == ["from 0"] * again.count
            pids = again.all_gather(os.getpid())
        assert [numbers[:2] for numbers in who] == [(number, number) for number in range(again.processes)]
        assert pids[0] == os.getpid() and {parent for *_, parent in who[1:]} == {os.getpid()}
        assert again.count == 1 and parallel.rank == 0 and children().isdisjoint(pids)
        seen.update(pids)
    assert len(seen) == 1 + 2 + 2 + 1


def test_workers_work_at_the_same_time(both_kinds, monkeypatch):
    barrier = (get_context("fork") if parallel.CAN_FORK else threading).Barrier(4, timeout=20)
    if not parallel.CAN_FORK:
        monkeypatch.setattr(os, "fork", None, raising=False)
    array = np.zeros(3)
    with Ranks(4) as ranks:  # a call comes back only when four are under way at once
        assert (ranks.share(array) is array) == (not parallel.CAN_FORK)
        found = sorted(ranks.map(lambda _: barrier.wait(), range(4)))
        assert found == [0, 1, 2, 3] and ranks.count == (4 if parallel.CAN_FORK else 1)


@pytest.mark.parametrize("why", ["--workers 1", "BLAS has its own threads"])
def test_one_worker_forks_nothing_and_stays_in_the_calling_thread(why, monkeypatch, problem):
    monkeypatch.setattr(os, "fork", None, raising=False)
    monkeypatch.setattr(blas, "ONE_BLAS_THREAD", why == "--workers 1")
    seen = set()

    def watched(params, batch):
        seen.add(threading.current_thread())
        return loss(params, batch)

    ranks = Ranks(1 if why == "--workers 1" else 3)
    assert ranks.share(problem[0]) is problem[0]
    value_of = sharded(watched, ranks, problem[0], 4, 13)
    with ranks:
        assert ranks.count == 1
        value_of(*problem)
        ranks.map(lambda _: seen.add(threading.current_thread()), range(3))
    assert seen == {threading.current_thread()}


def test_without_mpiexec_ranks_are_those_of_workers_and_nothing_of_mpi_is_imported(both_kinds):
    ranks = ranks_for(3)
    assert parallel.world() is None and type(ranks) is Ranks and "mpi4py" not in sys.modules
    assert (ranks.processes, ranks.threads) == ((3, 1) if parallel.CAN_FORK else (1, 3))


@needs_fork
def test_only_rank_0_speaks_and_nobody_else_leaves_the_block(start, tmp_path):
    def main():
        print("before", end=" ")  # and not written yet, when the others are forked
        try:
            with Ranks(3) as ranks:
                print(f"rank {ranks.rank}", end=" ")
                print(f"rank {ranks.rank}", end=" ", file=sys.stderr)
                sys.stdout.flush()
        finally:
            os.write(1, b"after")  # whatever a rank has made of its sys.stdout

    assert finish_program(start(main), tmp_path) == (0, "before rank 0 after", "rank 0 ")


@needs_fork
def test_ranks_that_end_neither_let_the_folder_of_a_run_go_nor_hold_it_on(tmp_path):
    with files.holding(tmp_path):
        assert together(3, lambda ranks: ranks.rank) == [0, 1, 2]
        with pytest.raises(files.FolderInUse):
            files.locked(tmp_path / files.LOCK)
    with Ranks(3) as ranks, files.holding(tmp_path):  # as `with ranks, run`
        ranks.barrier()
    os.close(files.locked(tmp_path / files.LOCK))
    ranks, held = Ranks(3), files.holding(tmp_path)
    held.__enter__()  # as a run does when it is made
    with ranks:
        held.__exit__(None, None, None)
        ranks.barrier()
    os.close(files.locked(tmp_path / files.LOCK))


def in_a_pool(item):
    return together(2, lambda ranks: (ranks.rank, item))


@needs_fork
def test_from_a_thread_and_from_a_process_of_a_pool():
    found = []
    thread = threading.Thread(target=lambda: found.append(in_a_pool(4)))
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in `Ranks.fork`
        with get_context("fork").Pool(1) as pool:
            found += pool.map(in_a_pool, [5, 6])
            pool.close()
            pool.join()
    assert found == [[(0, item), (1, item)] for item in (4, 5, 6)]


@needs_fork
def test_a_thread_beside_neither_holds_up_a_rank_nor_makes_it_warn():
    """A fork copies locks as they are, but not the threads that let them go; nothing in a rank waits for one. From
    Python 3.12 on such a fork warns."""
    done = threading.Event()

    def busy():  # with what most programs share
        while not done.is_set():
            print("working", file=sys.stderr, flush=True)
            logging.getLogger("test").debug("working")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as seen:  # as an error it would only be lost in os.fork
            warnings.simplefilter("always")
            ones = np.ones((200, 200))
            for _ in range(5):
                found = together(3, lambda ranks: ranks.map(lambda i: float((ones @ ones)[i, i]), range(6)))
                assert found == [[200.0] * 6] * 3
    finally:
        done.set()
        thread.join()
    assert seen == []


# ---------------------------------------------------------------------------------------------------- memory they share


@needs_fork
def test_shared_arrays_are_seen_and_changed_by_all(rng):
    a = rng.standard_normal((4, 5, 6))
    original = {"a": np.zeros(3, np.float32), "b": [np.arange(4)], "c": (np.array(True), np.zeros((0, 2)))}
    original["d"] = [a.T, a[::2, :, 1], np.asfortranarray(a), np.broadcast_to(a[0, 0], (3, 6))]  # in any memory order
    ranks = Ranks(3)
    shared = ranks.share(original)
    assert tree.names(shared) == tree.names(original)
    for array, like in zip(tree.leaves(shared), tree.leaves(original), strict=True):
        np.testing.assert_array_equal(array, like)
        assert array.dtype == like.dtype and array.shape == like.shape and not np.shares_memory(array, like)
    with ranks:
        for _ in range(2):
            shared["a"][ranks.rank] += 1
            if ranks.rank == 1:
                shared["b"][0][:] += 7
            ranks.barrier()
            assert shared["a"].min() > 0  # whoever changed it
        seen = ranks.all_gather((shared["a"].tolist(), shared["b"][0].tolist()))
    assert seen == [([2, 2, 2], [14, 15, 16, 17])] * 3
    assert shared["a"].tolist() == [2, 2, 2]  # after the block, too
    assert original["a"].tolist() == [0, 0, 0]
    assert together(3, lambda ranks: (original["a"].__iadd__(ranks.rank), ranks.barrier())[0].sum()) == [0, 3, 6]


# ---------------------------------------------------------------------------------------------- leaves and their owners


@needs_fork
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_leaf_is_one_ranks_in_all_trees_and_none_gets_all_the_work(count):
    params = {str(n): np.zeros(size) for n, size in enumerate((100_000, 10, 100_000, 10, 20, 20))}  # weights and biases
    trees = {"m": params, "v": tree.map(np.copy, params), "more": [params]}

    def owned(ranks):
        ranks.divide(params)
        mine = ranks.own(params)
        assert all(leaf is None or leaf is params[name] for name, leaf in mine.items())
        assert [tree.names(part) for part in ranks.own(trees).values()] == [
            tree.names(part) for part in (mine, mine, [mine])
        ]
        return {name: leaf.size for name, leaf in mine.items() if leaf is not None}

    sizes = together(count, owned)
    assert sorted(name for owned in sizes for name in owned) == sorted(params)  # each has one owner
    assert count == 1 or all(sum(owned.values()) < 110_000 for owned in sizes)
    assert sum(map(bool, sizes)) == min(count, 6)  # more ranks than leaves: some own nothing


def test_leaves_of_one_size_are_divided_in_their_order():
    """Or machines whose processors sort in different ways would have different owners."""
    ranks = Ranks(1)
    ranks.divide([np.zeros(size) for size in (9, 5) for _ in range(300)])
    assert ranks.places == [*range(300, 600), *range(300)]


# ------------------------------------------------------------------------------------------------ shards of a minibatch


def loss(params, batch):
    """A mean over the images of a batch (x, y), and two terms."""
    x, y = batch
    value = anp.sum((mlp(params, x) - y) ** 2) * (1 / len(x))
    return value, {"twice": 2 * value, "none": np.float32(len(x))}


def part_of(batch, images):
    return tree.map(lambda array: array[images], batch)


def in_a_plain_loop(params, batch, shard_size):
    """[value, terms, gradient], summed over the shards one after the other."""
    N, sums = len(batch[0]), None
    for images in shards(N, shard_size):
        weight = (images.stop - images.start) / N
        value, terms, gradient = value_and_grad(loss)(params, part_of(batch, images), weight=weight)
        found = [weight * value, tree.map(lambda term, weight=weight: weight * term, terms), gradient]
        sums = found if sums is None else tree.map(operator.add, sums, found)
    return sums


def test_shards_cover_the_images_in_order_and_their_sum_is_the_whole_gradient_up_to_rounding(problem):
    assert shards(13, 4) == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]
    assert shards(8, 4) == [slice(0, 4), slice(4, 8)] and shards(3, 4) == [slice(0, 3)] and shards(0, 4) == []
    found, whole = in_a_plain_loop(*problem, 4), value_and_grad(loss)(*problem)
    for a, b in zip(tree.leaves(found[0::2]), tree.leaves(whole[0::2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser_step", [adam_step, muon_step])
@pytest.mark.parametrize(("workers", "shard_size"), [(1, 4), (2, 4), (3, 4), (5, 4), (3, 1), (4, 5), (3, 13), (2, 100)])
def test_steps_shared_by_ranks_are_those_of_one(both_kinds, problem, optimiser_step, workers, shard_size, monkeypatch):
    """The shard size alone decides the arithmetic: of minibatches of 13 images, of 6, of one, and of another dtype."""
    monkeypatch.setattr(muon, "MUON_SIDES", range(2, 65))  # these matrices are so small
    params, batch = problem
    batches = [part_of(batch, images) for images in (slice(None), slice(7, None), slice(1), slice(None))]
    batches.append(tree.map(lambda array: array.astype(np.float64) + 1e-9, batch))
    start = {"params": params, "moments": init_moments(params)}
    expected, numbers = tree.map(np.copy, start), []
    for step, part in enumerate(batches, 1):
        value, terms, gradient = in_a_plain_loop(expected["params"], part, shard_size)
        numbers.append((value, terms))
        optimiser_step(expected["params"], gradient, expected["moments"], step, 0.1)

    ranks = Ranks(workers)
    arrays, steps = ranks.share(tree.map(np.copy, start)), []
    # What a loss refers to may change from one minibatch to the next.
    value_of = sharded(lambda params, batch: loss(params, batch[len(steps)]), ranks, arrays["params"], shard_size, 13)
    with ranks:
        for step, part in enumerate(batches, 1):
            value, terms, gradient = value_of(arrays["params"], [part] * len(batches))
            assert (value, terms) == numbers[len(steps)]  # for all ranks
            assert tree.names(gradient) == tree.names(ranks.own(params))  # and None for all others
            steps.append(step)
            optimiser_step(arrays["params"], gradient, arrays["moments"], step, 0.1)
            ranks.from_owners(arrays["params"])
            ranks.barrier()  # as a run has one after each step, in `stop_if_asked`
        for found, leaf in zip(tree.leaves(arrays), tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(found, leaf)
            assert found.dtype == leaf.dtype
    assert not np.array_equal(arrays["params"][0]["w"], params[0]["w"])


def test_in_parallel_gives_every_rank_its_part_and_returns_the_images_in_order(both_kinds, rng):
    x, y = rng.standard_normal((7, 2)), rng.standard_normal((7, 2))
    for workers in (1, 2, 3):
        whole = lambda ranks: in_parallel(lambda a, b: np.c_[a - b, np.full(len(a), parallel.rank)], 2, ranks)(x, y)  # noqa: E731
        for found in together(workers, whole):
            np.testing.assert_array_equal(found[:, :2], x - y)
            count = workers if parallel.CAN_FORK else 1
            assert found[:, 2].tolist() == [image // 2 % count for image in range(7)]


# --------------------------------------------------------------------------------------------------------- how they end


@pytest.mark.parametrize("guilty", [0, 1, 2, 59])
def test_after_an_error_of_any_thread_none_goes_on_writing(guilty, monkeypatch):
    monkeypatch.setattr(parallel, "CAN_FORK", False)
    room = []

    def f(i):
        if i == guilty:
            raise ValueError(f"of item {guilty}")
        time.sleep(0.01)
        room.append(i)

    with pytest.raises(ValueError, match=f"of item {guilty}"), Ranks(3) as ranks:
        ranks.map(f, range(60))
    written = len(room)
    time.sleep(0.03)
    assert len(room) == written < (59 if guilty < 3 else 60)


class Awkward(Exception):
    def __init__(self, a, b):  # which pickle cannot call with the one argument that Exception remembers
        super().__init__(f"{a} and {b}")


OF_USERS = [
    UserError("mine"),
    cli.Diverged("mine"),
    FileNotFoundError(errno.ENOENT, "mine", "a file"),
    MemoryError("mine"),
]
FAULTS = [
    KeyError("mine"),
    Awkward("mine", "yours"),
    EOFError("mine"),  # as of a file that is too short: not the end of rank 0
    BrokenPipeError(errno.EPIPE, "mine"),
    SystemExit("mine"),
    KeyboardInterrupt("mine"),
]


def in_a_shard(ranks, act):
    """In the block ``act`` is called in the second minibatch; the others wait for it in the middle of theirs."""
    turns = [0]

    def acting(params, batch):
        if turns[0] == 1:
            act()
        return loss(params, batch)

    params = init_mlp(np.random.default_rng(0), [5, 7, 3])
    value_of = sharded(acting, ranks, params, 1, 6)  # before the block, or the gradients would be in no shared memory

    def in_the_block():
        for turns[0] in range(3):
            value_of(params, (np.ones((6, 5)), np.ones((6, 3))))
            ranks.barrier()

    return in_the_block


PLACES = {
    "at once": lambda ranks, act: lambda: (act(), ranks.barrier()),
    "after the last meeting": lambda ranks, act: lambda: (ranks.barrier(), act()),
    "in a shard": in_a_shard,
}


@needs_fork
@pytest.mark.parametrize("guilty", [0, 1, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", OF_USERS + FAULTS, ids=lambda error: type(error).__name__)
def test_whatever_ends_a_rank_is_said_in_its_own_words(error, place, guilty):
    ranks = Ranks(4)
    in_the_block = PLACES[place](ranks, lambda: fail(error) if ranks.rank == guilty else None)
    with pytest.raises(BaseException, match="mine") as found, ranks:
        in_the_block()
    assert KILLED not in str(found.value) and ranks.count == 1
    if guilty == 0 or error in OF_USERS:  # what a user can put right stays what it is
        assert type(found.value) is type(error) and str(found.value) == str(error)
        assert getattr(found.value, "filename", None) == getattr(error, "filename", None)
    elif not isinstance(error, OSError):  # a fault of ours, with where it was
        assert f"rank {guilty} failed" in str(found.value) and "in fail\n    raise error" in str(found.value)


def test_all_errors_that_a_user_can_put_right_can_be_sent():
    ours, classes = set(), [UserError]
    while classes:
        error = classes.pop()
        classes += error.__subclasses__()
        if error.__module__.startswith("scratchgen."):
            ours.add(error.__name__)
            sent = pickle.loads(pickle.dumps(error("what to do")))
            assert type(sent) is error and str(sent) == "what to do"
    assert ours >= {"UserError", "DataError", "CheckpointError", "FolderInUse", "UsageError", "Diverged"}


@needs_fork
@pytest.mark.parametrize("guilty", [0, 2])
def test_what_cannot_be_sent_is_an_error(guilty):
    unsent = pytest.raises((RuntimeError, AttributeError, pickle.PicklingError), match="(pickle|get) .*lambda")
    with unsent, Ranks(3) as ranks:
        ranks.all_gather((lambda: None) if ranks.rank == guilty else None)


@needs_fork
@pytest.mark.parametrize("others", [lambda: None, partial(time.sleep, 60)])
def test_the_error_of_rank_0_is_its_own_and_ends_the_others_wherever_they_are(others):
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), Ranks(3) as ranks:
        if ranks.rank:
            others()
        1 / 0  # noqa: B018
    assert time.monotonic() - began < 10


@needs_fork
def test_ranks_that_do_not_meet_as_often_do_not_wait_for_ever():
    """A mistake of the program's, which has made a decision that not all ranks made."""
    signal.alarm(10)
    with suppress(ChildProcessError), Ranks(2) as ranks:
        for _ in range(1 + ranks.rank):
            ranks.barrier()
    with pytest.raises(ChildProcessError), Ranks(2) as ranks:
        for _ in range(2 - ranks.rank):
            ranks.barrier()


def in_the_middle_of_a_message(ranks, guilty):
    if guilty:
        os.write(ranks.pipes[0].fileno(), struct.pack("!i", 1000) + b"half a message")
        die()


def before_it_reads(ranks, guilty):
    """It has said something, and dies while rank 0 sends the long answer."""
    if guilty:
        parallel.receive = lambda pipe: (time.sleep(0.1), die())
    ranks.all_gather(np.zeros(10**6))


def by_rank_0(ranks, guilty, before=()):
    """It waits for the others when it is killed, or is stopped before."""
    if guilty:
        ranks.barrier()
    if ranks.rank == 0:
        time.sleep(0.1)
        for number in (*before, signal.SIGKILL):
            os.kill(ranks.children[-1], number)


def amid_long_messages(ranks, guilty):
    for _ in range(50):
        if guilty:
            threading.Timer(0.01, die).start()
        ranks.all_gather(np.zeros(200_000))


MOMENTS = {
    "at once": lambda ranks, guilty: die() if guilty else None,
    "while others wait": lambda ranks, guilty: (time.sleep(0.1), die()) if guilty else None,
    "between two meetings": lambda ranks, guilty: (ranks.barrier(), die() if guilty else None),
    "as rank 0 is at work": lambda ranks, guilty: die() if guilty else time.sleep(0.0 if ranks.rank else 0.1),
    "in the middle of a message": in_the_middle_of_a_message,
    "amid long messages": amid_long_messages,
    "before it reads": before_it_reads,
    "while it waits": by_rank_0,
    "stopped": partial(by_rank_0, before=[signal.SIGSTOP]),
    "in a map": lambda ranks, guilty: ranks.map(lambda item: die() if guilty and item > 3 else item, range(12)),
}


@needs_fork
@pytest.mark.parametrize("guilty", [1, 2])
@pytest.mark.parametrize("moment", [*MOMENTS, "in a shard"])
def test_a_killed_rank_is_one_error_whenever_it_dies(moment, guilty):
    ranks = Ranks(3)
    differentiate = in_a_shard(ranks, lambda: die() if ranks.rank == guilty else None)
    with pytest.raises(ChildProcessError, match=WAS_KILLED), ranks:
        ranks.barrier()
        if moment in MOMENTS:
            MOMENTS[moment](ranks, ranks.rank == guilty)
        else:
            differentiate()
        for _ in range(3):
            ranks.all_gather(np.zeros(1000))


@needs_fork
def test_a_rank_that_is_killed_on_its_way_into_the_block_or_out_of_it(monkeypatch):
    be_quiet, leave = parallel.be_quiet, os._exit
    monkeypatch.setattr(parallel, "be_quiet", lambda: die() if parallel.rank == 1 else be_quiet())
    with pytest.raises(ChildProcessError, match=WAS_KILLED), Ranks(3):
        pass
    monkeypatch.setattr(parallel, "be_quiet", be_quiet)
    with pytest.raises(ChildProcessError, match=WAS_KILLED), Ranks(3) as ranks:
        if ranks.rank == 2:  # in the last line
            die()
    monkeypatch.setattr(os, "_exit", lambda status: die() if parallel.rank == 1 else leave(status))
    with Ranks(3):  # which has done all that it had to
        pass


@needs_fork
def test_other_ranks_leave_signals_to_rank_0():
    with Ranks(3) as ranks:
        pids = ranks.all_gather(os.getpid())
        if ranks.rank == 0:
            for pid in pids[1:]:
                for number in STOP_SIGNALS:
                    os.kill(pid, number)
        ranks.barrier()
        assert ranks.all_gather(os.getpid()) == pids
        ignored = ranks.all_gather([signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS])
        blocked = ranks.all_gather(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert [set(found) for found in ignored] == [{False}, {True}, {True}] and blocked[1:] == blocked[:1] * 2


@needs_fork
@pytest.mark.parametrize("error", [KeyboardInterrupt, BlockingIOError])
def test_a_ctrl_c_during_a_fork_or_one_that_fails_leaves_no_process_and_no_signal_blocked(error, monkeypatch):
    """A Ctrl-C that arrives while the signals are blocked, and so raises when they are let through again."""
    fork, forked = os.fork, []

    def interrupted():
        if error is BlockingIOError and forked:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        child = fork()
        if child:
            forked.append(child)
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
        return child

    monkeypatch.setattr(os, "fork", interrupted)
    ranks = Ranks(3)
    with pytest.raises(error), ranks:
        ranks.barrier()
    assert len(forked) == (2 if error is KeyboardInterrupt else 1)
    assert children().isdisjoint(forked) and ranks.count == 1
    monkeypatch.undo()
    with ranks:
        assert ranks.all_gather(ranks.rank) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------- as programs


@pytest.fixture
def start(tmp_path):
    """Start a main function as a program in a session of its own. It is forked: to import all anew takes a second."""
    streams = [tmp_path / name for name in ("stdout", "stderr")]

    def program(main, when_stopped):
        os.setsid()
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w") for number in (1, 2))  # noqa: SIM115  to the end of the program
        sys.argv, cli.program = ["program.py"], None
        cli.run(main, when_stopped)

    def of(main, when_stopped=cli.RESUMABLE):
        for path in streams:
            path.touch()
        process = get_context("fork").Process(target=program, args=(main, when_stopped))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as in `Ranks.fork`
            process.start()
        return process

    return of


def at_work(program):
    return [pid for pid, _, session, state in processes() if session == program.pid and state != "Z"]


def within_ten_seconds(condition):
    deadline = time.monotonic() + 10
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def is_ready(program, folder):
    return within_ten_seconds(lambda: (folder / "stdout").read_text() == "ready\n") and len(at_work(program)) == 3


def finish_program(program, folder):
    """(status, stdout, stderr) of a program of which no process may stay."""
    program.join()
    assert within_ten_seconds(lambda: not at_work(program))
    return program.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr"))


@needs_fork
@pytest.mark.parametrize("others", ["wait", "are at work", "have much to say", "do not all see it"])
def test_other_ranks_end_with_a_rank_0_that_is_killed(others, start, tmp_path):
    def main():
        with Ranks(3) as ranks:
            if ranks.rank == 0:
                print("ready", flush=True)
                time.sleep(60)
            if others == "are at work" or (others == "do not all see it" and ranks.rank == 2):
                time.sleep(0.5 if others == "are at work" else 60)
            ranks.all_gather(bytes(10**7 if others == "have much to say" else 1))

    program = start(main)
    assert is_ready(program, tmp_path)
    program.kill()
    if others == "do not all see it":
        assert within_ten_seconds(lambda: len(at_work(program)) == 1)  # the other ends
        os.kill(*at_work(program), signal.SIGKILL)
    assert finish_program(program, tmp_path)[0] == -signal.SIGKILL


@needs_fork
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_for_the_whole_group_is_one_line_of_rank_0(number, start, tmp_path):
    """As Ctrl-C is on a terminal, and its closing."""

    def main():
        with ranks_for(3) as ranks:
            print("ready")
            while True:
                ranks.barrier()
                time.sleep(0.01)

    program = start(main, "stopped: just so")
    assert is_ready(program, tmp_path)
    os.killpg(program.pid, number)
    assert finish_program(program, tmp_path) == (128 + number, "ready\n", "program.py: stopped: just so\n")


@pytest.fixture(scope="module")
def alone(small_data, tmp_path_factory):
    """The folder of a run of each model by one worker, and by name what a kill at each of its moments would leave."""
    folder = tmp_path_factory.mktemp("alone")
    with small():
        return folder, {m: what_kills_leave(m, small_data, folder / m, "--workers", 1) for m in FLAGS}


FULL = OSError(errno.ENOSPC, "No space left on device", "a file")


@needs_fork
@pytest.mark.parametrize(
    ("guilty", "what", "status", "message"),
    [
        (1, die, 1, KILLED),
        (2, lambda run: (time.sleep(0.2), die()), 1, KILLED),
        (0, lambda run: fail(FULL), 1, "a file: No space left on device"),
        (2, lambda run: fail(FULL), 1, "a file: No space left on device"),
        (1, lambda run: fail(UserError("what to do")), 2, "what to do"),
        (2, lambda run: fail(MemoryError()), 1, "out of memory: try fewer --workers"),
        (1, lambda run: RECORD(run, math.nan, {}), 1, "the loss became nan at step 4"),
        (0, lambda run: os.kill(0, signal.SIGTERM), 128 + signal.SIGTERM, cli.STOPPED),
        (0, die, -signal.SIGKILL, None),
        (2, lambda run: 1 / 0, 1, None),
    ],
)
def test_a_run_in_which_a_rank_fails_is_one_line(guilty, what, status, message, small_data, alone, start, tmp_path):
    """In its fourth step, the first of its second epoch. It can be resumed, and then it is the same run."""

    def record(run, *rest):
        if run.step == 3 and parallel.rank == guilty:
            what(run)
        RECORD(run, *rest)

    def main():
        train("vae", small_data, tmp_path / "out", "--workers", 4)

    with small(save_seconds=1) as patch:
        patch.setattr(run_module.Run, "record", record)
        found, out, err = finish_program(start(main), tmp_path)
    assert found == status and out.count("parameters, ") == out.count("epoch ") == 1
    if message:
        assert err.count("\n") == 1 and err.startswith(f"run_vae.py: {message}")
    elif guilty:
        assert "rank 2 failed" in err and "ZeroDivisionError" in err and "in record" in err
    else:
        assert err == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint.npz", "log.csv", files.LOCK}
    assert load(tmp_path / "out" / "checkpoint.npz")[1]["step"] == (4 if message == cli.STOPPED else 3)
    with small():
        train("vae", small_data, tmp_path / "out", "--workers", 3, "--resume")
    assert contents(tmp_path / "out") == contents(alone[0] / "vae")


# ----------------------------------------------------------------------------------------------------- ranks of mpiexec

MPIEXEC = shutil.which("mpiexec", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")
THERE = MPIEXEC is not None and find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(not THERE, reason="needs mpi4py and an mpiexec: pip install mpich")


def end(pid):
    """End a process and those that it has started; ranks that wait for ever are deaf to signals."""
    below = [child for child, parent, _, _ in processes() if parent == pid]
    for child in below:
        end(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def mpiexec(count, *command):
    """(status, stdout, stderr) of so many ranks of a Python command."""
    ours = [MPIEXEC, "-n", str(count), sys.executable, *map(str, command)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen(ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            out, error = process.communicate(timeout=100)
        except BaseException:
            end(process.pid)
            raise
    return process.returncode, out, "".join(line for line in error.splitlines(True) if not line.startswith("Abort("))


def as_ranks(count, main, *folders):
    """The same of a function of this file, which gets the folders."""
    call = f"test_parallel.{main.__name__}, {', '.join(repr(str(folder)) for folder in folders)}"
    code = "import atexit, functools, sys, test_parallel; atexit.register(lambda: sys.stdout.close()); "
    code += f"test_parallel.cli.run(functools.partial({call}))"  # pytest has Python warn of files that are not closed
    return mpiexec(count, "-c", code)


PARTS = ("train", "t10k")


def measure_and_draw(data, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plots", Figures())
        patch.setattr(draw, "plots", Figures())
        common = ["--data", data, "--workers", 1]
        main_of(evaluate, folder / "vae", *common, "--iwae", 3)
        config = ["--sampler", "ddim", "--steps", 2]
        main_of(evaluate, folder / "ddpm", *common, "--bound", 3, "--frechet", 40, *config)
        flags = ["-n", "70", "--out", str(folder / "ddpm" / "drawn.png"), "--samples", "--workers", "1"]
        draw.main([str(folder / "ddpm"), *flags])


def checkpoints(left):
    """The different checkpoints in a list of what kills would leave."""
    found = [by_name.get("checkpoint.npz") for by_name in left]
    return [found[number] for number in range(len(found)) if number == 0 or found[number] != found[number - 1]]


def do_it_all(data, others, folder):
    """What ranks of mpiexec do on machines with other cores and other clocks, and then with other files."""
    os.fork = None  # --workers has no meaning
    rank, folder = parallel.rank, Path(folder)
    assert ranks_for(5) is parallel.world() and parallel.world().processes * parallel.world().threads == 1
    with small(cores=4 + rank, save_seconds=-1 if rank == 0 else 1):
        for model in FLAGS:
            left = what_kills_leave(model, data, folder / model)
            if rank == 0:
                (folder / f"{model}.saved").write_bytes(pickle.dumps(checkpoints(left)))
            train(model, data, folder / "killed" / model, "--resume")
        with at_each_moment(lambda: None):
            measure_and_draw(data, folder)
        for part in PARTS:
            with pytest.raises(UserError, match="images in .*ranks found different ones"):
                train("vae", Path(others, part) if rank == 2 else data, folder / "none")
        with pytest.raises(UserError, match="ranks found different ones"):
            load_run(folder / ("vae" if rank == 1 else "ddpm"))
    parallel.world().agree("it", rank // 2)


@needs_mpi
def test_ranks_of_mpiexec_do_all_to_the_bits_of_one_process(alone, small_data, tmp_path):
    folder, left = alone
    for part in PARTS:
        path = shutil.copytree(small_data, tmp_path / "others" / part) / f"{part}-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[: 16 + 28 * 28 - 1] + b"\1" + path.read_bytes()[16 + 28 * 28 :])  # one pixel
    for model in FLAGS:  # killed in the second epoch
        killed = tmp_path / "killed" / model
        killed.mkdir(parents=True)
        (killed / "checkpoint.npz").write_bytes(checkpoints(left[model])[-3])
    status, out, error = as_ranks(3, do_it_all, small_data, tmp_path / "others", tmp_path)
    words = "it: ranks found different ones ([0, 0, 1]); all machines must see the same files"
    assert (status, error) == (2, f"run_vae.py: {words}\n")
    for model in FLAGS:
        saved = pickle.loads((tmp_path / f"{model}.saved").read_bytes())
        assert saved == checkpoints(left[model])  # after each step the same
        assert contents(tmp_path / "killed" / model) == contents(folder / model)
        shutil.copytree(folder / model, tmp_path / "expected" / model)
    with small():
        measure_and_draw(small_data, tmp_path / "expected")
    for model in FLAGS:
        assert contents(tmp_path / model) == contents(tmp_path / "expected" / model)
    spoken = [out.count(words) for words in ("parameters, ", "figures and numbers are in", "drawn.png")]
    assert spoken == [4, 4, 1]  # by one of them
    assert not (tmp_path / "none").exists()


def be_stopped(data, folder):
    def record(run, *rest):
        if run.step == 4:
            signal.raise_signal(signal.SIGTERM)  # to all ranks, of which one listens
        RECORD(run, *rest)

    with small(save_seconds=1) as patch:
        patch.setattr(run_module.Run, "record", record)
        train("ddpm", data, Path(folder))


@needs_mpi
def test_stopped_in_a_step_they_save_and_another_number_goes_on_to_the_same_bits(alone, small_data, tmp_path):
    folder, left = alone
    status, out, error = as_ranks(3, be_stopped, small_data, tmp_path)
    assert status == 128 + signal.SIGTERM and error == f"run_ddpm.py: {cli.STOPPED}\n" and "epoch 2/2" not in out
    assert (tmp_path / "checkpoint.npz").read_bytes() == checkpoints(left["ddpm"])[-3]
    with small():
        train("ddpm", small_data, tmp_path, "--workers", 2, "--resume")
    assert contents(tmp_path) == contents(folder / "ddpm")


def fail_alone():
    if parallel.rank == 2:
        raise FULL
    parallel.world().barrier()


def fail_together():
    raise ValueError(parallel.rank)


@needs_mpi
def test_a_mistake_is_one_line_and_one_rank_that_fails_ends_all(tmp_path):
    for flags, words in ((["--data", tmp_path / "none"], "none"), (["--epochs", 0], "out of range")):
        status, _, error = mpiexec(2, ROOT / "run_vae.py", "--out", tmp_path / "out", *flags)
        assert status == 2 and error.count("\n") == 1 and error.startswith("run_vae.py: ") and words in error
    status, _, error = as_ranks(3, fail_alone)
    assert status == 1 and error.count("\n") == 1 and error.startswith("rank 2 on ") and "No space left" in error
    status, _, error = as_ranks(3, fail_together)
    assert status == 1 and error.count("Traceback") == 1  # a fault of ours is said once, too


def test_a_rank_that_fails_alone_says_so_once_though_it_may_live_on_after_mpis_abort(monkeypatch, capsys):
    aborted, seconds = [], itertools.count()
    never_all = SimpleNamespace(Test=lambda: len(aborted) > 1)
    ranks = SimpleNamespace(
        failed=SimpleNamespace(Ibarrier=lambda: never_all), comm=SimpleNamespace(Abort=aborted.append)
    )
    monkeypatch.setattr(parallel, "world", lambda: ranks)
    monkeypatch.setattr(parallel, "rank", 2)
    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    monkeypatch.setattr(sys, "__stderr__", sys.stdout)
    parallel.end(1, "what to do")
    assert aborted == [1] and capsys.readouterr().out.count("what to do") == 1


@pytest.fixture
def launched(monkeypatch):
    """Ask for `parallel.world` with these variables, where MPI finds so many ranks: their number, or None."""

    def world(variables, size):
        for name in (*parallel.NUMBER, *parallel.COUNT, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        comm = SimpleNamespace(size=size, Dup=lambda: None)
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=comm)))
        monkeypatch.setattr(parallel, "rank", 0)
        parallel.world.cache_clear()
        try:
            ranks = parallel.world()
            return ranks and ranks.count
        finally:
            parallel.world.cache_clear()

    return world


PMIX_OF_SRUN = {"PMIX_RANK": 1, "SLURM_PROCID": 1, "SLURM_NTASKS": 4, "SLURM_STEP_NUM_TASKS": 4}


@pytest.mark.parametrize(
    ("variables", "size", "expected"),
    [
        ({}, 1, None),
        ({"PMI_RANK": 0, "PMI_SIZE": 1}, 7, None),  # told that it is alone, it does not ask
        ({"PMI_RANK": 1, "PMI_SIZE": 4}, 4, 4),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 4, "PMIX_RANK": 0}, 4, 4),
        ({"MV2_COMM_WORLD_RANK": 3, "MV2_COMM_WORLD_SIZE": 4}, 4, 4),
        (PMIX_OF_SRUN, 4, 4),
        ({"PMIX_RANK": 0}, 4, 4),
        ({"PMIX_RANK": 3}, 4, 4),
        ({"PMIX_RANK": 0}, 1, None),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 4}, 1, None),  # a batch script, which srun has not started
        ({"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1}, 1, None),
        ({"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 2, "PMI_RANK": 5, "PMI_SIZE": 8}, 8, 8),  # mpiexec by way of srun
        ({"PMI_RANK": 0, "PMI_SIZE": 1, "OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4}, 4, 4),  # in srun -n 1
        *((told, 1, "an error") for told in ({"PMIX_RANK": 1}, PMIX_OF_SRUN, {"SLURM_PROCID": 1})),
        ({"PMI_RANK": 0, "PMI_SIZE": 2}, 1, "an error"),
    ],
)
def test_whoever_starts_ranks_in_whatever_words(variables, size, expected, launched):
    if expected == "an error":  # for they are no runs of their own
        with pytest.raises(UserError, match="mpi4py finds 1"):
            launched(variables, size)
    else:
        assert launched(variables, size) == expected


WORDS = [{"PMIX_RANK": "1"}, {"SLURM_PROCID": "1"}, {"MV2_COMM_WORLD_RANK": "2"}]


@pytest.mark.parametrize("variables", [*WORDS, {"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "3"}])
def test_a_rank_by_whatever_words_is_quiet(variables, monkeypatch):
    quiet = []
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(parallel, "rank", 0)
    monkeypatch.setattr(parallel, "be_quiet", lambda: quiet.append(parallel.rank))
    monkeypatch.setattr(parallel, "world", lambda: None)
    parallel.begin()
    assert quiet == [max(map(int, variables.values()))]


class WithoutLibrary:
    @property
    def MPI(self):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("mpi4py", [None, WithoutLibrary()], ids=["no mpi4py", "no MPI"])
def test_without_mpi4py_mpiexec_is_one_line(mpi4py, monkeypatch, finish):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    parallel.world.cache_clear()
    status, error = finish(lambda: None)
    parallel.world.cache_clear()
    assert status == 2 and error.count("\n") == 1 and ": mpiexec needs mpi4py" in error
