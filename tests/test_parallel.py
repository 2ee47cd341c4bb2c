"""The ranks of a run: how they meet, what they divide up, that it changes no bit, and how they end."""

import errno
import json
import logging
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
from pathlib import Path
from types import SimpleNamespace

from scratchgen import muon, tree
from scratchgen.data import UserError
from scratchgen.gradients import value_and_grad
from scratchgen.layers import init_mlp, mlp
from scratchgen.machinery import blas, checkpoint, cli, files, parallel
from scratchgen.machinery.parallel import KILLED, Ranks, in_parallel, ranks_for, sharded, shards
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, init_moments

import autograd.numpy as anp
import numpy as np
import pytest
from conftest import ROOT

needs_fork = pytest.mark.skipif(not parallel.CAN_FORK, reason="there is one rank here, and its threads")
STOP_SIGNALS, WAS_KILLED = parallel.STOP_SIGNALS, f"^{re.escape(KILLED)}$"


def processes():
    """(pid, parent, session) of all processes that run, or have ended and are not buried yet (zombies)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            state, parent, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
            yield int(path.parent.name), int(parent), int(session), state


def children():
    return {pid for pid, parent, _, _ in processes() if parent == os.getpid()}


def too_long(*_):
    raise TimeoutError("this took too long")


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


# -------------------------------------------------------------------------------------------------------- how they meet


@needs_fork
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_rank_gets_what_all_give_in_their_order(count):
    def meet(ranks):
        gathered = [ranks.all_gather((turn, ranks.rank)) for turn in range(3)]
        ranks.barrier()
        return ranks.count, gathered, ranks.broadcast(f"from {ranks.rank}")

    gathered = [[(turn, rank) for rank in range(count)] for turn in range(3)]
    assert together(count, meet) == [(count, gathered, "from 0")] * count


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_results_of_a_map_come_in_order_to_all_ranks(both_kinds, count):
    def work(ranks):
        return [ranks.map(lambda x: x * x, range(N)) for N in (20, 3, 1, 0)]

    expected = [[x * x for x in range(N)] for N in (20, 3, 1, 0)]
    assert together(count, work) == [expected] * (count if parallel.CAN_FORK else 1)


def test_one_rank_has_all_items(both_kinds):
    for ranks in (Ranks(1), Ranks(4)):  # before the block, and after it, there is one
        assert (ranks.rank, ranks.count, ranks.map(abs, [-1, -2]), ranks.broadcast(5)) == (0, 1, [1, 2], 5)
        with ranks:
            pass
        assert (ranks.rank, ranks.count, ranks.all_gather("x")) == (0, 1, ["x"])


@needs_fork
def test_messages_may_be_much_larger_than_a_pipe():
    def meet(ranks):
        large = np.full(700_000, ranks.rank, dtype=np.float64)  # 5.6 MB; what all give is 17 MB
        return [(part.shape, part.min(), part.max()) for _ in range(3) for part in ranks.all_gather(large)]

    assert together(3, meet) == [[((700_000,), rank, rank) for rank in range(3)] * 3] * 3


@needs_fork
def test_arrays_of_every_layout_arrive(rng):
    a = rng.standard_normal((200, 300))
    arrays = [a, a.T, a[::2, ::3], a[:3], a[0, :0], np.asfortranarray(a[:4, :5]), np.float32(3), np.array(2), a > 0]
    for sent in together(2, lambda ranks: ranks.broadcast(arrays)):
        for array, found in zip(arrays, sent, strict=True):
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype


def test_results_are_everybodys_own(both_kinds):
    def work(ranks):
        results = ranks.map(lambda i: np.full(1000, i), range(6))
        ranks.barrier()
        results[1][:] = results[4][:] = 9 + ranks.rank
        ranks.barrier()
        return [int(result[500]) for result in results]

    found = together(2, work)
    assert found == [[0, 9 + rank, 2, 3, 9 + rank, 5] for rank in range(len(found))]


@needs_fork
def test_ranks_that_find_different_things_say_so():
    def agree(ranks):
        ranks.agree("a file", "the same")
        with pytest.raises(UserError, match=r"^a file: ranks found different ones \(\[0, 1, 2\]\); all machines "):
            ranks.agree("a file", ranks.rank)
        return "goes on"

    assert together(3, agree) == ["goes on"] * 3
    Ranks(1).agree("a file", "whatever")


# --------------------------------------------------------------------------------------------------------- who they are


@needs_fork
def test_ranks_are_processes_and_rank_0_is_the_caller():
    who = together(3, lambda ranks: (ranks.rank, parallel.rank, os.getpid(), os.getppid()))
    assert [numbers[:2] for numbers in who] == [(0, 0), (1, 1), (2, 2)]
    assert who[0][2] == os.getpid() == who[1][3] == who[2][3] and len({pid for *_, pid, _ in who}) == 3


@needs_fork
def test_the_items_of_a_map_are_divided_among_the_processes():
    def work(ranks):
        return ranks.all_gather(os.getpid()), ranks.map(lambda _: os.getpid(), "abcdefgh")

    for pids, found in together(3, work):
        assert found == (pids * 3)[:8]


@needs_fork
def test_ranks_work_at_the_same_time():
    began = time.monotonic()
    together(4, lambda ranks: ranks.map(lambda _: time.sleep(0.3), range(4)))
    assert time.monotonic() - began < 0.9


def test_where_nothing_may_be_forked_threads_work_at_the_same_time(monkeypatch):
    monkeypatch.setattr(parallel, "CAN_FORK", False)
    monkeypatch.setattr(os, "fork", None, raising=False)
    barrier = threading.Barrier(2, timeout=10)  # passes only if two calls are under way at once
    with Ranks(2) as ranks:
        assert ranks.count == 1 and sorted(ranks.map(lambda _: barrier.wait(), range(2))) == [0, 1]


@pytest.mark.parametrize("why", ["--workers 1", "BLAS has its own threads"])
def test_one_worker_forks_nothing_and_stays_in_the_calling_thread(why, monkeypatch, problem):
    monkeypatch.setattr(os, "fork", None, raising=False)
    monkeypatch.setattr(blas, "ONE_BLAS_THREAD", why == "--workers 1")
    seen = set()

    def watched(params, batch):
        seen.add(threading.current_thread())
        return loss(params, batch)

    ranks = Ranks(1 if why == "--workers 1" else 3)
    value_of = sharded(watched, ranks, problem[0], 4, 13)
    with ranks:
        assert ranks.count == 1
        value_of(*problem)
        ranks.map(lambda _: seen.add(threading.current_thread()), range(3))
    assert seen == {threading.current_thread()}


@needs_fork
def test_ranks_begin_and_end_with_each_block():
    """The same object, and a new one."""
    ranks, seen = Ranks(3), set()
    for again in (ranks, ranks, Ranks(2)):
        assert again.count == 1
        with again:
            assert again.count == again.processes
            pids = again.all_gather(os.getpid())
        assert again.count == 1 and parallel.rank == 0 and children().isdisjoint(pids)
        seen.update(pids)
    assert len(seen) == 1 + 2 + 2 + 1


def test_without_mpiexec_ranks_are_those_of_workers(both_kinds):
    ranks = ranks_for(3)
    assert parallel.world() is None and type(ranks) is Ranks
    assert (ranks.processes, ranks.threads) == ((3, 1) if parallel.CAN_FORK else (1, 3))


@needs_fork
def test_only_rank_0_speaks_and_nobody_else_leaves_the_block():
    code = """
import atexit, os, sys
from scratchgen.machinery.parallel import Ranks
atexit.register(os.write, 1, b"exit ")
print("before", end=" ")  # and not written yet, when the others are forked
try:
    with Ranks(3) as ranks:
        print(f"rank {ranks.rank}", end=" ")
        print(f"rank {ranks.rank}", end=" ", file=sys.stderr)
        sys.stdout.flush()
finally:
    print("after", end=" ", flush=True)
"""
    assert finish_program(["-c", code]) == (0, "before rank 0 after exit ", "rank 0 ")


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


@needs_fork
def test_from_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(together(3, lambda ranks: ranks.rank)))
    thread.start()
    thread.join()
    assert found == [[0, 1, 2]]


@needs_fork
def test_from_a_process_of_a_pool():
    code = """
from multiprocessing import get_context
from scratchgen.machinery.parallel import Ranks
def f(item):
    with Ranks(2) as ranks:
        return ranks.all_gather((ranks.rank, item))
with get_context("fork").Pool(1) as pool:
    print(pool.map(f, [5, 6]))
"""
    status, out, _ = finish_program(["-W", "ignore", "-c", code])
    assert (status, out) == (0, "[[(0, 5), (1, 5)], [(0, 6), (1, 6)]]\n")


@needs_fork
@pytest.mark.parametrize("_again", range(5))
def test_a_thread_beside_neither_holds_up_a_rank_nor_makes_it_warn(_again):
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
            found = together(3, lambda ranks: ranks.map(lambda i: float((ones @ ones)[i, i]), range(6)))
    finally:
        done.set()
        thread.join()
    assert found == [[200.0] * 6] * 3 and seen == []


# ---------------------------------------------------------------------------------------------------- memory they share


@needs_fork
def test_shared_arrays_are_seen_and_changed_by_all():
    ranks, original = (
        Ranks(3),
        {"a": np.zeros(3, np.float32), "b": [np.arange(4)], "c": (np.array(True), np.zeros((0, 2)))},
    )
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
        seen = ranks.all_gather([array.tolist() for array in tree.leaves(shared)])
    assert seen == [[[2, 2, 2], [14, 15, 16, 17], True, []]] * 3
    assert shared["a"].tolist() == [2, 2, 2]  # after the block, too
    assert original["a"].tolist() == [0, 0, 0]


def test_shared_arrays_in_any_memory_order(rng):
    a = rng.standard_normal((4, 5, 6))
    for array in (a.T, a[::2, :, 1], np.asfortranarray(a), np.broadcast_to(a[0, 0], (3, 6))):
        shared = Ranks(2).share(array)
        np.testing.assert_array_equal(shared, array)


def test_one_rank_shares_nothing(both_kinds):
    original = {"a": np.zeros(3)}
    assert Ranks(1).share(original) is original
    if not parallel.CAN_FORK:
        assert Ranks(3).share(original) is original


@needs_fork
def test_what_is_not_shared_is_each_ranks_own():
    array, numbers = np.zeros(2), [0]

    def change(ranks):
        array[:] += ranks.rank
        numbers[0] += ranks.rank
        ranks.barrier()
        return array.tolist(), numbers[0]

    assert together(3, change) == [([rank, rank], rank) for rank in range(3)]


# ---------------------------------------------------------------------------------------------- leaves and their owners


@needs_fork
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_leaf_is_one_ranks_and_none_gets_all_the_work(count):
    params = [np.zeros(size) for size in (100_000, 10, 100_000, 10, 20, 20)]  # weights and biases alternate

    def taken(ranks):
        ranks.divide(params)
        return [None if leaf is None else leaf.size for leaf in ranks.own(params)]

    taken = together(count, taken)
    for number, leaf in enumerate(params):
        assert [sizes[number] for sizes in taken if sizes[number] is not None] == [leaf.size]  # one has it
    assert count == 1 or all(sum(filter(None, sizes)) < 110_000 for sizes in taken)
    assert all(any(sizes) for sizes in taken)


@needs_fork
def test_of_several_trees_a_rank_owns_the_same_leaves(problem):
    params = problem[0]
    trees = {"m": params, "v": tree.map(np.copy, params), "more": [params]}

    def owned(ranks):
        ranks.divide(params)
        m, v, more = ranks.own(trees).values()
        assert tree.names(m) == tree.names(ranks.own(params)) == tree.names(v) == tree.names(more[0])
        assert all(mine is leaf for mine, leaf in zip(tree.leaves(m), tree.leaves(ranks.own(params)), strict=True))
        owners = [owner for owner, _ in zip(ranks.owners(), range(3 * 4), strict=False)]
        assert owners == owners[:4] * 3
        return [
            name for name, owner in zip(tree.names(params), owners, strict=False) if owner == ranks.rank
        ], tree.names(m)

    found = together(3, owned)
    assert all(by_number == names for by_number, names in found)
    assert sorted(name for names, _ in found for name in names) == sorted(tree.names(params))


def test_leaves_of_one_size_are_divided_in_their_order():
    """Or machines whose processors sort in different ways would have different owners."""
    ranks = Ranks(1)
    ranks.divide([np.zeros(size) for size in (9, 5) for _ in range(300)])
    assert ranks.places == [*range(300, 600), *range(300)]


def test_more_ranks_than_leaves(monkeypatch):
    """Some own nothing."""
    ranks, params = Ranks(1), {"w": np.zeros(3)}
    ranks.divide(params)
    ranks.count = 3
    for number in range(3):
        monkeypatch.setattr(parallel, "rank", number)
        assert tree.leaves(ranks.own(params)) == ([params["w"]] if number == 0 else [])
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ shards of a minibatch


def loss(params, batch):
    """A mean over the images of a batch (x, y), and two terms."""
    x, y = batch
    value = anp.sum((mlp(params, x) - y) ** 2) * (1 / len(x))
    return value, {"twice": 2 * value, "none": np.float32(len(x))}


def assert_same_bits(a, b):
    assert tree.names(a) == tree.names(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert np.asarray(x).dtype == np.asarray(y).dtype


def part_of(batch, images):
    return tree.map(lambda array: array[images], batch)


def in_a_plain_loop(params, batch, shard_size=4):
    """[value, terms, gradient], summed over the shards one after the other."""
    N, sums = len(batch[0]), None
    for images in shards(N, shard_size):
        weight = (images.stop - images.start) / N
        value, terms, gradient = value_and_grad(loss)(params, part_of(batch, images), weight=weight)
        found = [weight * value, tree.map(lambda term, weight=weight: weight * term, terms), gradient]
        sums = found if sums is None else tree.map(operator.add, sums, found)
    return sums


def by_ranks(params, batches, workers, loss=loss, shard_size=4, batch_size=13):
    """[value, terms, gradient] of each minibatch, for which all ranks give the leaves that they own."""
    ranks, results = Ranks(workers), []
    value_of = sharded(loss, ranks, params, shard_size, batch_size)
    with ranks:
        for batch in batches:
            value, terms, gradient = value_of(params, batch)
            owned = dict(zip(tree.names(gradient), tree.leaves(gradient), strict=True))
            assert list(owned) == tree.names(ranks.own(params))  # and None for all others
            parts = ranks.all_gather((value, terms, owned))
            assert all(part[:2] == (value, terms) for part in parts)  # all have the whole value
            leaves = {name: leaf for *_, owned in parts for name, leaf in owned.items()}
            assert (
                sum(len(owned) for *_, owned in parts) == len(leaves) == len(tree.names(params))
            )  # each has one owner
            in_order = iter([leaves[name] for name in tree.names(params)])
            results.append([value, terms, tree.map(lambda _, in_order=in_order: next(in_order), params)])
    return results


def test_shards_cover_the_images_in_order():
    assert shards(13, 4) == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]
    assert shards(8, 4) == [slice(0, 4), slice(4, 8)] and shards(3, 4) == [slice(0, 3)] and shards(0, 4) == []


def test_sharded_gradient_is_the_whole_one_up_to_rounding(problem):
    [found] = by_ranks(problem[0], [problem[1]], 2)  # 4 + 4 + 4 + 1 images
    for a, b in zip(tree.leaves(found[0::2]), tree.leaves(value_and_grad(loss)(*problem)[0::2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_bits(both_kinds, problem, workers):
    """Of minibatches of 13 images, of 6, and of one."""
    params, batch = problem
    batches = [part_of(batch, images) for images in (slice(None), slice(7, None), slice(1), slice(None))] * 3
    for found, part in zip(by_ranks(params, batches, workers), batches, strict=True):
        assert_same_bits(found, in_a_plain_loop(params, part))


@pytest.mark.parametrize("shard_size", [1, 5, 13, 100])
def test_the_shard_size_decides_the_arithmetic(problem, shard_size):
    [found] = by_ranks(problem[0], [problem[1]], 3, shard_size=shard_size)
    assert_same_bits(found, in_a_plain_loop(*problem, shard_size))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_minibatch_of_another_dtype_is_fine(problem, workers):
    params, batch = problem
    doubles = tree.map(lambda array: array.astype(np.float64) + 1e-9, batch)
    first, second = by_ranks(params, [batch, doubles], workers)
    assert_same_bits(first, in_a_plain_loop(params, batch))
    assert_same_bits(second[:2], in_a_plain_loop(params, doubles)[:2])
    assert_same_bits(second, by_ranks(params, [doubles], 1)[0])


@pytest.mark.parametrize("optimiser_step", [adam_step, muon_step])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_steps_shared_by_ranks_are_those_of_one_optimiser(both_kinds, problem, optimiser_step, workers, monkeypatch):
    monkeypatch.setattr(muon, "MUON_SIDES", range(2, 65))  # these matrices are so small
    params, batch = problem
    batches = [part_of(batch, images) for images in (slice(None), slice(7, None), slice(None), slice(2))]

    expected = tree.map(np.copy, {"params": params, "moments": init_moments(params)})
    for step, part in enumerate(batches, 1):
        gradient = in_a_plain_loop(expected["params"], part)[2]
        optimiser_step(expected["params"], gradient, expected["moments"], step, 0.1)

    ranks = Ranks(workers)
    arrays = ranks.share(tree.map(np.copy, {"params": params, "moments": init_moments(params)}))
    value_of = sharded(loss, ranks, arrays["params"], 4, 13)
    with ranks:
        for step, part in enumerate(batches, 1):
            _, _, gradient = value_of(arrays["params"], part)
            optimiser_step(arrays["params"], gradient, arrays["moments"], step, 0.1)
            ranks.from_owners(arrays["params"])
            ranks.barrier()  # as a run has one after each step, in `stop_if_asked`
        assert_same_bits(arrays, expected)  # for all ranks
    assert_same_bits(arrays, expected)
    assert not np.array_equal(arrays["params"][0]["w"], params[0]["w"])


def test_a_loss_may_refer_to_what_changes_between_minibatches(both_kinds, problem):
    params, batch = problem
    factor, found, ranks = 1.0, [], Ranks(2)
    value_of = sharded(lambda params, batch: (factor * loss(params, batch)[0], {}), ranks, params, 4, 13)
    with ranks:
        found.append(value_of(params, batch)[0])
        ranks.barrier()
        factor = 3.0
        found.append(value_of(params, batch)[0])
    assert found[1] == pytest.approx(3 * found[0])


def test_in_parallel_returns_the_images_in_order(both_kinds, rng):
    x, y = rng.standard_normal((13, 2)), rng.standard_normal((13, 2))
    for workers in (1, 2, 3):
        for found in together(workers, lambda ranks: in_parallel(lambda a, b: a - b, 4, ranks)(x, y)):
            np.testing.assert_array_equal(found, x - y)


@needs_fork
def test_in_parallel_gives_every_rank_its_part():
    whole = lambda ranks: in_parallel(lambda x: np.full(len(x), ranks.rank), 2, ranks)(np.zeros(7))  # noqa: E731
    assert [who.tolist() for who in together(3, whole)] == [[0, 0, 1, 1, 2, 2, 0]] * 3


# --------------------------------------------------------------------------------------------------------- how they end


@needs_fork
@pytest.mark.parametrize(("guilty", "count"), [(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)])
def test_an_error_of_one_rank_reaches_rank_0(guilty, count, problem):
    """In the second minibatch, in a shard of its own; the others wait for it in the middle of theirs."""
    params, batch = problem
    ranks, turns = Ranks(count), [0]

    def failing(params, batch):
        if turns[0] == 1 and ranks.rank == guilty:
            raise KeyError("mine")
        return loss(params, batch)

    value_of = sharded(failing, ranks, params, 4, 13)
    with pytest.raises(RuntimeError if guilty else KeyError, match="mine") as error, ranks:
        for turns[0] in range(3):
            value_of(params, batch)
            ranks.barrier()
    if guilty:  # whose own words, and where it was, are in it
        assert f"rank {guilty} failed" in str(error.value) and 'raise KeyError("mine")' in str(error.value)
    assert ranks.count == 1 and together(2, lambda ranks: ranks.rank) == [0, 1]  # others can begin


def test_after_an_error_no_thread_goes_on_writing(monkeypatch):
    monkeypatch.setattr(parallel, "CAN_FORK", False)
    room = []

    def f(i):
        if i == 0:
            raise ValueError("first")
        time.sleep(0.1)
        room.append(i)

    with pytest.raises(ValueError, match="first"), Ranks(2) as ranks:
        ranks.map(f, range(6))
    written = len(room)
    time.sleep(0.3)
    assert len(room) == written < 5


EXPECTED = [
    UserError("mine"),
    cli.Diverged("mine"),
    FileNotFoundError(errno.ENOENT, "mine", "a file"),
    MemoryError("mine"),
]


@needs_fork
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_what_a_user_can_put_right_stays_what_it_is(error, guilty):
    with pytest.raises(type(error)) as found, Ranks(2) as ranks:
        if ranks.rank == guilty:
            raise error
        ranks.barrier()
    assert str(found.value) == str(error)
    assert getattr(found.value, "filename", None) == getattr(error, "filename", None)


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


class Awkward(Exception):
    def __init__(self, a, b):  # which pickle cannot call with the one argument that Exception remembers
        super().__init__(f"{a} and {b}")


FAULTS = [
    Awkward("this", "that"),
    EOFError("this and that"),  # as of a file that is too short: not the end of rank 0
    BrokenPipeError(errno.EPIPE, "this and that"),
    SystemExit("this and that"),
    KeyboardInterrupt("this and that"),
]


@needs_fork
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_ends_a_rank_is_said_in_its_own_words(fault):
    with pytest.raises((RuntimeError, UserError, OSError), match="this and that") as error, Ranks(2) as ranks:
        if ranks.rank == 1:
            raise fault
        ranks.barrier()
    assert KILLED not in str(error.value)


@needs_fork
@pytest.mark.parametrize("guilty", [0, 1])
def test_what_cannot_be_sent_is_an_error(guilty):
    with (
        pytest.raises((RuntimeError, AttributeError, pickle.PicklingError), match="(pickle|get) .*lambda"),
        Ranks(2) as ranks,
    ):
        ranks.all_gather((lambda: None) if ranks.rank == guilty else None)


@needs_fork
def test_if_all_fail_the_error_is_rank_0s_own():
    with pytest.raises(ZeroDivisionError), Ranks(3):
        1 / 0  # noqa: B018


@needs_fork
def test_rank_0_ends_the_others_wherever_they_are():
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), Ranks(3) as ranks:
        if ranks.rank:
            time.sleep(60)
        1 / 0  # noqa: B018
    assert time.monotonic() - began < 10


@needs_fork
def test_an_error_after_the_last_meeting_is_heard_of():
    with pytest.raises(UserError, match="at last"), Ranks(3) as ranks:
        ranks.barrier()
        if ranks.rank == 2:
            raise UserError("at last")


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


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_a_message(ranks, guilty):
    if guilty:
        os.write(ranks.pipes[0].fileno(), struct.pack("!i", 1000) + b"half a message")
        die()


def before_it_reads(ranks, guilty):
    """It has said something, and dies while rank 0 sends the long answer."""
    if guilty:
        parallel.receive = lambda pipe: (time.sleep(0.1), die())
    ranks.all_gather(np.zeros(10**6))


def as_rank_0_is_at_work(ranks, guilty):
    if guilty:
        die()
    if ranks.rank == 0:
        time.sleep(0.1)


def by_rank_0(ranks, guilty, before=()):
    """It waits for the others when it is killed, or is stopped before."""
    if guilty:
        ranks.barrier()
    if ranks.rank == 0:
        time.sleep(0.1)
        for number in (*before, signal.SIGKILL):
            os.kill(ranks.children[-1], number)


def in_a_map(ranks, guilty):
    ranks.map(lambda item: die() if guilty and item > 3 else item, range(12))


def in_a_shard(ranks, guilty):
    def killed(params, batch):
        if guilty:
            die()
        return loss(params, batch)

    params = init_mlp(np.random.default_rng(0), [5, 7, 3])
    sharded(killed, ranks, params, 1, 6)(params, (np.ones((6, 5)), np.ones((6, 3))))


MOMENTS = {
    "at once": lambda ranks, guilty: die() if guilty else None,
    "while others wait": lambda ranks, guilty: (time.sleep(0.1), die()) if guilty else None,
    "between two meetings": lambda ranks, guilty: (ranks.barrier(), die() if guilty else None),
    "as rank 0 is at work": as_rank_0_is_at_work,
    "in the middle of a message": in_the_middle_of_a_message,
    "before it reads": before_it_reads,
    "while it waits": by_rank_0,
    "stopped": partial(by_rank_0, before=[signal.SIGSTOP]),
    "in a map": in_a_map,
    "in a shard": in_a_shard,
}


@needs_fork
@pytest.mark.parametrize("guilty", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_rank_is_one_error_whenever_it_dies(moment, guilty):
    with pytest.raises(ChildProcessError, match=WAS_KILLED), Ranks(3) as ranks:
        ranks.barrier()
        MOMENTS[moment](ranks, ranks.rank == guilty)
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
def test_ranks_that_are_killed_at_any_time_of_long_messages():
    for delay in np.linspace(0.001, 0.1, 10):
        with pytest.raises(ChildProcessError, match=WAS_KILLED), Ranks(3) as ranks:
            if ranks.rank == 0:
                threading.Timer(delay, os.kill, [ranks.children[1], signal.SIGKILL]).start()
            while True:
                ranks.all_gather(np.zeros(200_000))


@needs_fork
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_other_ranks_leave_signals_to_rank_0(number):
    with Ranks(3) as ranks:
        pids = ranks.all_gather(os.getpid())
        if ranks.rank == 0:
            for pid in pids[1:]:
                os.kill(pid, number)
        ranks.barrier()
        assert ranks.all_gather(os.getpid()) == pids
        handlers = ranks.all_gather(signal.getsignal(number) == signal.SIG_IGN)
        blocked = ranks.all_gather(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert handlers == [False, True, True] and blocked[1:] == blocked[:1] * 2


@needs_fork
def test_a_ctrl_c_during_a_fork_leaves_no_process_and_no_signal_blocked(monkeypatch):
    """One that arrives while the signals are blocked, and so raises when they are let through again."""
    fork, forked = os.fork, []

    def interrupted():
        child = fork()
        if child:
            forked.append(child)
            signal.raise_signal(signal.SIGINT)
        return child

    monkeypatch.setattr(os, "fork", interrupted)
    ranks = Ranks(3)
    with pytest.raises(KeyboardInterrupt), ranks:
        ranks.barrier()
    assert len(forked) == 2 and children().isdisjoint(forked) and ranks.count == 1
    monkeypatch.undo()
    with ranks:
        assert ranks.all_gather(ranks.rank) == [0, 1, 2]


@needs_fork
def test_a_fork_that_fails_leaves_no_process_either(monkeypatch):
    fork, forked = os.fork, []

    def failing():
        if forked:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        forked.append(child := fork())
        return child

    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(BlockingIOError), Ranks(4) as ranks:
        ranks.barrier()
    assert len(forked) == 1 and children().isdisjoint(forked)


# ---------------------------------------------------------------------------------------------------------- as programs


def start_program(command, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, *map(str, command)], start_new_session=True, **options)


def at_work_in(session):
    return [pid for pid, _, its, state in processes() if its == session and state != "Z"]


def no_process_stays(session, within=10):
    deadline = time.monotonic() + within
    while (left := at_work_in(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


def finish_program(command, **options):
    """(status, stdout, stderr) of a Python program, of which no process may stay."""
    with start_program(command, **options) as process:
        out, err = process.communicate(timeout=100)
        assert no_process_stays(process.pid, within=1)
    return process.returncode, out, err


@needs_fork
@pytest.mark.parametrize(
    "others",
    [
        "ranks.barrier()",  # they wait
        "time.sleep(0.5); ranks.barrier()",  # they are at work
        "ranks.all_gather(bytes(10**7))",  # they have much to say
    ],
)
def test_other_ranks_end_with_a_rank_0_that_is_killed(others):
    code = f"""
import os, time
from scratchgen.machinery.parallel import Ranks
with Ranks(3) as ranks:
    if ranks.rank == 0:
        print("ready", flush=True)
        time.sleep(60)
    {others}
"""
    with start_program(["-c", code]) as process:
        assert process.stdout.readline() == "ready\n" and len(at_work_in(process.pid)) == 3
        process.kill()
        assert no_process_stays(process.pid)


@needs_fork
def test_a_rank_sees_the_end_of_rank_0_though_another_is_still_at_work():
    code = """
import os, time
from scratchgen.machinery.parallel import Ranks
with Ranks(3) as ranks:
    if ranks.rank == 2:
        print("ready", flush=True, file=open(1, "w"))
        time.sleep(60)
    ranks.barrier()
"""
    with start_program(["-c", code]) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        deadline = time.monotonic() + 10
        while len(at_work_in(process.pid)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(at_work_in(process.pid)) == 1
        assert not no_process_stays(process.pid, within=0)  # and here it is ended


@needs_fork
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_for_the_whole_group_is_one_line_of_rank_0(number):
    """As Ctrl-C is on a terminal, and its closing."""
    code = """
import sys, time
from scratchgen.machinery import cli, parallel
def main():
    with parallel.ranks_for(3) as ranks:
        print("ready")
        while True:
            ranks.barrier()
            time.sleep(0.01)
sys.argv[0] = "program.py"
cli.run(main, "stopped: just so")
"""
    with start_program(["-c", code]) as process:
        assert process.stdout.readline() == "ready\n" and len(at_work_in(process.pid)) == 3
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (128 + number, "program.py: stopped: just so\n")
        assert no_process_stays(process.pid, within=1)


# run_vae.py, of which a rank comes to grief in its fourth step: the first of its second epoch.
FLAGS = ["--latent-dim", 4, "--batch-size", 32, "--train-images", 96, "--epochs", 2, "--workers", 3]
PROGRAM = """
import errno, os, signal, sys, time
sys.path.insert(0, {root!r})
from scratchgen.data import UserError
from scratchgen.machinery import cli, parallel
from scratchgen.machinery import run as run_module
import run_vae as script

record = run_module.Run.record

def fail(run, *rest):
    if run.step == 3 and parallel.rank == {guilty}:
        {what}
    record(run, *rest)

run_module.Run.record = fail
sys.argv[0] = "run_vae.py"
cli.run(script.main)
"""
FULL = "raise OSError(errno.ENOSPC, 'No space left on device', 'a file')"


def run_vae(data, out, guilty, what, *flags):
    code = PROGRAM.format(root=str(ROOT), guilty=guilty, what=what)
    status, out, err = finish_program(["-c", code, *FLAGS, "--data", data, "--out", out, *flags])
    return status, out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith("warning: "))


@needs_fork
@pytest.mark.parametrize(
    ("guilty", "what", "status", "message"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", 1, KILLED),
        (2, "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)", 1, KILLED),
        (0, FULL, 1, "a file: No space left on device"),
        (2, FULL, 1, "a file: No space left on device"),
        (1, "raise UserError('what to do')", 2, "what to do"),
        (1, "raise MemoryError", 1, "out of memory: try fewer --workers"),
        (1, "record(run, float('nan'), {})", 1, "the loss became nan at step 4"),
        (0, "os.kill(0, signal.SIGTERM)", 128 + signal.SIGTERM, cli.STOPPED),
    ],
)
def test_a_run_in_which_a_rank_fails_is_one_line(guilty, what, status, message, small_data, tmp_path):
    found, out, err = run_vae(small_data, tmp_path / "out", guilty, what)
    assert found == status and err.count("\n") == 1 and err.startswith(f"run_vae.py: {message}")
    assert out.count("parameters, ") == out.count("epoch ") == 1
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"checkpoint.npz", "log.csv", files.LOCK}


@needs_fork
def test_a_fault_in_a_rank_is_a_traceback_of_that_rank(small_data, tmp_path):
    status, _, err = run_vae(small_data, tmp_path / "out", 2, "1 / 0")
    assert status == 1 and "rank 2 failed" in err and "ZeroDivisionError" in err and "in fail" in err


@needs_fork
def test_a_run_whose_rank_0_is_killed_leaves_its_folder_free(small_data, tmp_path):
    status, _, err = run_vae(small_data, tmp_path / "out", 0, "os.kill(os.getpid(), signal.SIGKILL)")
    assert (status, err) == (-signal.SIGKILL, "")
    status, out, err = run_vae(small_data, tmp_path / "out", 0, "pass", "--resume")
    assert (status, err) == (0, "") and "figures and numbers are in" in out


# ----------------------------------------------------------------------------------------------------- ranks of mpiexec

MPIEXEC = shutil.which("mpiexec", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")
THERE = MPIEXEC is not None and find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(not THERE, reason="needs mpi4py and an mpiexec: pip install mpich")


def start(count, *command, **options):
    """Start ``count`` ranks of a Python command."""
    ours = [MPIEXEC, "-n", str(count), sys.executable, *map(str, command)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(ours, **options)


def finish(process):
    out, error = process.communicate(timeout=100)
    # Neither MPI's own line, nor what is said of the small data.
    ours = [line for line in error.splitlines(keepends=True) if not line.startswith(("Abort(", "warning: "))]
    return process.returncode, out, "".join(ours)


def arrays_in(folder):
    with np.load(folder / "checkpoint.npz") as file:
        return {name: file[name] for name in file.files if name != "state"}


def same(one, other):
    one, other = arrays_in(one), arrays_in(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


RUNS = {
    "run_vae.py": "--train-images 150 --batch-size 130 --epochs 2",  # three shards, the last of 2 images; then one
    "run_ddpm.py": "--train-images 40 --batch-size 32 --epochs 1 --T 20 --arch mlp",
}


@pytest.fixture(scope="module")
def alone(small_data, tmp_path_factory):
    """The folder of each run, by one process."""
    folders, programs = {}, []
    for script, flags in RUNS.items():
        folders[script] = tmp_path_factory.mktemp("alone") / "run"
        command = [script, *flags.split(), "--data", small_data, "--workers", 1, "--out", folders[script]]
        programs.append(start_program(command))
    for program in programs:
        _, err = program.communicate(timeout=100)
        assert program.returncode == 0, err
    return folders


@needs_mpi
def test_ranks_of_mpiexec_do_all_that_others_do():
    """Also before the block, and after it. None forks: --workers has no meaning."""
    code = """
import os, sys
from scratchgen import tree
from scratchgen.machinery import cli, parallel
import numpy as np

def main():
    os.fork, ranks = None, parallel.ranks_for(5)
    params = [np.zeros(size) for size in (4, 1, 3, 2)]
    assert ranks is parallel.world() and ranks.share(params) is params
    ranks.divide(params)
    for block in (False, True, False):
        if block:
            ranks.__enter__()
        print(ranks.count, ranks.processes * ranks.threads, ranks.all_gather(ranks.rank), ranks.broadcast(ranks.rank))
        print(ranks.map(lambda item: (item, ranks.rank), "abcd"))
        for leaf in tree.leaves(ranks.own(params)):
            leaf += 1 + ranks.rank
        ranks.from_owners(params)
        numbers = [leaf.tolist() for leaf in params]
        print(*(leaf.mean() for leaf in params), ranks.all_gather(numbers) == [numbers] * 3)
        if block:
            ranks.__exit__(None, None, None)
    ranks.agree("it", "same")
    ranks.agree("it", ranks.rank)

sys.argv[0] = "program.py"
cli.run(main)
"""
    status, out, error = finish(start(3, "-c", code))
    words = "it: ranks found different ones ([0, 1, 2]); all machines must see the same files"
    assert status == 2 and error == f"program.py: {words}\n"
    lines = out.splitlines()
    assert lines[0::3] == ["3 1 [0, 1, 2] 0"] * 3
    assert lines[1::3] == ["[('a', 0), ('b', 1), ('c', 2), ('d', 0)]"] * 3
    # By size the leaves are the second, the fourth, the third and the first; whose owners are 0, 1, 2 and 0.
    assert lines[2::3] == [f"{1.0 * turn} {1.0 * turn} {3.0 * turn} {2.0 * turn} True" for turn in (1, 2, 3)]


@needs_mpi
@pytest.mark.parametrize(
    ("script", "count", "workers"), [("run_vae.py", 2, 2), ("run_vae.py", 3, 1), ("run_ddpm.py", 2, 1)]
)
def test_ranks_of_mpiexec_give_the_bits_of_one_process(script, count, workers, alone, small_data, tmp_path):
    flags = [*RUNS[script].split(), "--data", small_data, "--workers", workers, "--out", tmp_path / "run"]
    status, out, error = finish(start(count, ROOT / script, *flags))
    assert (status, error) == (0, "")
    assert out.count("parameters, ") == out.count("figures and numbers are in") == 1  # one of them speaks
    assert same(tmp_path / "run", alone[script])
    made, expected = (sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "run", alone[script]))
    assert made == expected


@needs_mpi
def test_stopped_they_save_and_another_number_goes_on_to_the_same_bits(alone, small_data, tmp_path):
    flags = [*RUNS["run_vae.py"].split(), "--data", small_data, "--workers", "1", "--out", tmp_path]
    slow = "import sys, time, runpy; from scratchgen import optim; step = optim.adam_step\n"
    slow += "def slowly(*a, **k): time.sleep(0.5); return step(*a, **k)\n"
    slow += f"optim.adam_step = slowly; sys.argv = {['run_vae.py', *map(str, flags)]}\n"
    slow += f"runpy.run_path({str(ROOT / 'run_vae.py')!r}, run_name='__main__')"
    process = start(2, "-c", slow)
    while not (tmp_path / "log.csv").exists():  # the first epoch
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, out, error = finish(process)
    assert status == 128 + signal.SIGTERM
    assert error.strip().endswith(cli.STOPPED) and "epoch 2/2" not in out
    status, _, error = finish(start(3, ROOT / "run_vae.py", *flags, "--resume"))
    assert (status, error) == (0, "")
    assert same(tmp_path, alone["run_vae.py"])


@needs_mpi
def test_evaluation_and_drawing_by_ranks_of_mpiexec(alone, tmp_path, small_data):
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        shutil.copytree(alone["run_vae.py"], folder)
        command = ["-m", "scratchgen.evaluate", folder, "--iwae", 2, "--data", small_data, "--workers", 1]
        status, _, error = finish(start(count, *command))
        assert (status, error) == (0, "")
        found.append(json.loads((folder / "metrics.json").read_text())["evaluation"])
        figure = folder / "drawn.png"
        status, out, error = finish(start(count, "-m", "scratchgen.draw", folder, "-n", 5, "--out", figure))
        assert (status, error, out.count("wrote")) == (0, "", 1)
    assert found[0] == found[1]
    assert len({(tmp_path / count / "drawn.png").read_bytes() for count in "12"}) == 1


@needs_mpi
def test_a_mistake_is_one_line_and_one_rank_that_fails_ends_all(small_data, tmp_path):
    for _ in range(2):  # a line that ends the program may be lost on its way through mpiexec, but not every time
        process = start(2, ROOT / "run_vae.py", "--data", tmp_path / "none", "--out", tmp_path / "out")
        _, error = process.communicate(timeout=100)  # all of it: MPI has nothing to say where all ranks fail
        assert process.returncode == 2 and error.count("\n") == 1 and error.startswith("run_vae.py: ")
    status, _, error = finish(start(2, ROOT / "run_vae.py", "--epochs", 0))
    assert status == 2 and error.count("\n") == 1 and "out of range" in error
    fails = "from scratchgen.machinery import cli, parallel\ndef main():\n    ranks = parallel.world()\n"
    fails += "    if ranks.rank == 1: raise OSError(28, 'No space left on device')\n    ranks.barrier()\ncli.run(main)"
    status, _, error = finish(start(2, "-c", fails))
    assert status == 1 and error.count("\n") == 1 and error.startswith("rank 1 on ") and "No space left" in error
    both = fails.replace("ranks.rank == 1", "ranks.rank < 2").replace("OSError", "ValueError")
    status, _, error = finish(start(2, "-c", both))
    assert status == 1 and error.count("Traceback") == 1  # a fault of ours is said once, too


@needs_mpi
def test_a_folder_that_ranks_do_not_share_is_noticed(alone, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(alone["run_vae.py"], tmp_path / name / "run")
    path = tmp_path / "b" / "run" / "checkpoint.npz"
    arrays, state = checkpoint.load(path)
    checkpoint.save(path, {name: array + 1 for name, array in arrays.items()}, state)
    other = ["-n", "1", "-wdir", str(tmp_path / "b"), sys.executable, "-m", "scratchgen.draw", "run"]
    ours = [MPIEXEC, "-n", "1", "-wdir", str(tmp_path / "a"), *other[4:], ":", *other]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    status, _, error = finish(process)
    assert status == 2 and "ranks found different ones" in error and error.count("\n") == 1
    assert not (tmp_path / "a" / "drawn.png").exists()


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
    ],
)
def test_whoever_starts_ranks_in_whatever_words(variables, size, expected, launched):
    assert launched(variables, size) == expected


@pytest.mark.parametrize(
    "variables", [{"PMIX_RANK": 1}, PMIX_OF_SRUN, {"SLURM_PROCID": 1}, {"PMI_RANK": 0, "PMI_SIZE": 2}]
)
def test_ranks_that_mpi_does_not_find_are_no_runs_of_their_own(variables, launched):
    with pytest.raises(UserError, match="mpi4py finds 1"):
        launched(variables, 1)


@pytest.mark.parametrize("variables", [{"PMIX_RANK": "1"}, {"SLURM_PROCID": "1"}, {"MV2_COMM_WORLD_RANK": "2"}])
def test_a_rank_by_whatever_words_is_quiet(variables, monkeypatch):
    quiet = []
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(parallel, "rank", 0)
    monkeypatch.setattr(parallel, "be_quiet", lambda: quiet.append(parallel.rank))
    monkeypatch.setattr(parallel, "world", lambda: None)
    parallel.begin()
    assert quiet == [int(*variables.values())]


def test_alone_nothing_of_mpi_is_imported():
    code = "import sys, run_vae; from scratchgen.machinery import parallel; "
    code += "print(parallel.world(), type(parallel.ranks_for(2)).__name__, 'mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None Ranks False\n"


@needs_mpi
def test_without_mpi4py_mpiexec_is_one_line(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    status, _, error = finish(start(2, "-m", "scratchgen.draw", env=environment))
    assert status == 2 and error.count("\n") == 1 and "mpiexec needs mpi4py" in error
