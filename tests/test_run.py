"""The book-keeping of a run: its steps, its means, its log, and that it stops and goes on without losing anything."""

import argparse
import csv
import json
import os
import re
import signal
import threading
from functools import partial
from types import SimpleNamespace

from scratchgen import tree
from scratchgen.machinery import checkpoint, cli, files, parallel
from scratchgen.machinery import run as run_module
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.parallel import Ranks
from scratchgen.machinery.run import INIT, NOISE, ORDER, SAMPLES, TEST, Run, rng_for

import numpy as np
import pytest

IMAGES = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
SETTINGS = {"model": "toy", "layers": ["dense", "relu"]}
SIGNALS = parallel.STOP_SIGNALS


@pytest.fixture
def make(tmp_path):
    """A function that begins a run of 40 images with arrays of zeros; flags by name."""

    def begin(settings=SETTINGS, images=IMAGES, workers=1, test_images=IMAGES[:7], **changed):
        for run in begun:  # the folder is held until the end of `with run`, which not every test has
            run.held.close()
        flags = {"epochs": 2, "batch_size": 16, "seed": 0, "lr": 0.1, "out": tmp_path / "run", "resume": False}
        flags |= {"workers": workers, "data": "data", "command": "python run_toy.py"} | changed
        params = {"w": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}  # of two ranks the second owns w
        zeros = partial(tree.map, np.zeros_like)
        arrays = {"params": params, "moments": {"m": zeros(params)}, "ema": zeros(params), "groups": [np.zeros(2)]}
        ranks = Ranks(workers)
        ranks.divide(params)
        run = Run(argparse.Namespace(**flags), settings, (images, test_images), arrays, ranks)
        begun.append(run)
        return run

    begun = []
    yield begin
    for run in begun:
        run.held.close()


def take_step(run, images):
    """Something that depends on the images, on their order and on random numbers, as training does: each leaf is
    stepped by its owner, after all have met, as they do for a gradient."""
    drawn = run.rng.standard_normal(3, dtype=np.float32)
    run.ranks.barrier()
    mine = (run.ranks.own(part) for part in (run.arrays["params"], run.arrays["moments"]["m"], run.arrays["ema"]))
    for leaf, moment, average in zip(*map(tree.leaves, mine), strict=True):
        moment += drawn[: len(leaf)] + np.float32(images.sum())
        leaf += moment - leaf / 10
        average += leaf
    run.ranks.barrier()
    w = run.arrays["params"]["w"]
    run.record(float(w[0]), {"loss": w[0]})


def train(run, stop_at=None, how=signal.SIGINT):
    """Train to the end. The signal is sent inside a step, or in what is measured after an epoch: "epoch 1"."""
    with run.ranks, run:
        for epoch in run.epochs():
            for step, images in run.minibatches():
                if step == stop_at:
                    os.kill(os.getpid(), how)
                take_step(run, images)
            if stop_at == f"epoch {epoch}":
                os.kill(os.getpid(), how)
            run.end_epoch({"train": run.epoch_means, "test": {"loss": float(run.arrays["params"]["w"][1])}}, "summary")
    return run


def step_of(path):
    _, state = checkpoint.load(path)
    return state["step"]


# ----------------------------------------------------------------------------------------------- shards, random numbers


@pytest.mark.parametrize(
    ("cores", "batch_64", "batch_128"), [(1, 32, 64), (2, 32, 64), (3, 22, 43), (4, 16, 32), (8, 8, 16), (96, 8, 16)]
)
def test_up_to_eight_cores_all_have_a_shard(cores, batch_64, batch_128):
    assert (parallel.shard_size(64, cores), parallel.shard_size(128, cores)) == (batch_64, batch_128)
    for batch in (1, 2, 7, 1000):
        assert 1 <= parallel.shard_size(batch, cores) <= min(batch, 64)


def test_the_shards_are_those_of_the_machine_where_a_run_began(make, monkeypatch):
    monkeypatch.setattr(run_module.blas, "available_cores", lambda: 4)
    assert [make(workers=n, out=make().args.out.with_name(f"{n}")).shard_size for n in (1, 2, 3)] == [4] * 3
    train(make())
    monkeypatch.setattr(run_module.blas, "available_cores", lambda: 2)
    assert make(resume=True).shard_size == 4 and make(seed=1).shard_size == 8


def test_what_is_drawn_for_one_purpose_changes_nothing_for_another():
    purposes = [(INIT,), (INIT, 1), (NOISE,), (TEST,), (SAMPLES,), (ORDER, 0), (ORDER, 1)]
    firsts = [rng_for(seed, *purpose).random() for seed in (0, 1) for purpose in purposes]
    assert len(set(firsts)) == 14 and rng_for(1, ORDER, 1).random() == firsts[13]  # and the same each time


# ------------------------------------------------------------------------------------------------------ steps and means


def test_every_epoch_shows_every_image_once_and_its_means_are_weighted_by_images(make):
    labels = IMAGES.ravel() + 100
    run, steps, seen = make(images=(IMAGES, labels), test_images=(IMAGES[:7], labels[:7])), [], []
    with run:
        for epoch in run.epochs():
            for step, (images, found) in run.minibatches():
                assert run.step == step - 1  # it counts as done when the script comes back for the next
                np.testing.assert_array_equal(images.ravel() + 100, found)
                steps.append((epoch, step, len(images)))
                seen.append(images.ravel())
                run.record(1.0, {"kl": {1: 2.0, 2: 4.0}.get(step, 10.0 * epoch)})
            run.end_epoch({"train": run.epoch_means}, "")
    assert steps == [(1, 1, 16), (1, 2, 16), (1, 3, 8), (2, 4, 16), (2, 5, 16), (2, 6, 8)]
    assert run.count == 40 and run.total_steps == 6 and run.steps_per_epoch == 3
    orders = [np.concatenate(seen[start : start + 3]).tolist() for start in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]
    # (16 * 2 + 16 * 4 + 8 * 10) / 40, and the means of each epoch are its own
    assert [row["train_kl"] for row in run.log] == pytest.approx([4.4, 20.0])
    run = make(images=(IMAGES, None), test_images=(IMAGES[:7], None))
    with run:
        assert [(len(images), found) for _, (images, found) in run.minibatches()] == [(16, None), (16, None), (8, None)]


def test_an_epoch_is_a_row_of_log_csv_and_a_line_on_the_screen_and_the_run_is_metrics_json(make, capsys):
    run = train(make(seed=3))
    with open(run.args.out / "log.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert list(rows[0]) == ["epoch", "step", "train_loss", "test_loss", "seconds"] and rows == run.log
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert re.fullmatch(r"epoch 1/2  summary  \d+ s\nepoch 2/2  summary  \d+ s\n", capsys.readouterr().out)
    run.write_metrics({"elbo": -240.0}, run.arrays["params"])
    found = json.loads((run.args.out / "metrics.json").read_text())
    assert found.pop("weights").startswith("CRC-32 ") and found.pop("seconds") >= 0
    assert found == {"elbo": -240.0, "epochs": 2, "seed": 3, "parameters": 5, "command": "python run_toy.py"}


def test_the_bar_begins_where_the_run_was_resumed(make, monkeypatch):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)  # or there is no bar
    seen, update = [], cli.tqdm.update

    def recorded(bar, n=1):
        seen.append((bar.n, bar.total, bar.postfix))
        update(bar, n)

    monkeypatch.setattr(cli.tqdm, "update", recorded)
    with pytest.raises(cli.Stopped):
        train(make(), stop_at=2)
    resumed = train(make(resume=True))
    assert [(done, total) for done, total, _ in seen] == [(done, 6) for done in (0, 2, 3, 4, 5)]
    assert (resumed.bar.n, resumed.bar.initial) == (6, 2)
    assert all(re.fullmatch(r"loss=-?[\d.e+]+", postfix) for *_, postfix in seen)
    with make() as run:  # a weighted loss is shown only where there is no other
        shown = [({"loss": 0.123456}, "loss=0.1235"), ({"kl": 4.0}, "loss=3"), ({}, "loss=3")]
        for (means, postfix), _ in zip(shown, run.minibatches(), strict=True):
            run.record(3.0, means)
            assert run.bar.postfix == postfix


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_loss_that_is_not_finite_ends_the_run(make, value):
    run = make(workers=3)
    advice = "at step 2: start again, without --resume, with a smaller --lr"
    with pytest.raises(cli.Diverged, match=advice), run.ranks, run:
        for step, _images in run.minibatches():  # of one rank alone, which ends all
            run.record(value if step == 2 and parallel.rank == run.ranks.count - 1 else 1.0, {"loss": 1.0})
    assert step_of(run.path) == 0
    run = make()
    with pytest.raises(cli.Diverged, match="--lr"), run:  # or one that shows only in what is measured
        run.end_epoch({"train": {"loss": 1.0}, "test": {"loss": value}}, "")
    assert run.log == [] and not (run.args.out / "log.csv").exists()


# ------------------------------------------------------------------------------------------- what is saved, and when


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_array_that_is_not_finite_is_saved(make, value):
    run = make()
    before, arrays = run.path.read_bytes(), run.arrays
    places = tree.names(arrays)
    assert {name.split("/")[0] for name in places} == {"params", "moments", "ema", "groups"}
    for name, leaf in zip(places, tree.leaves(arrays), strict=True):
        leaf[-1] = value
        with pytest.raises(cli.Diverged, match="--lr"):
            run.save()
        leaf[-1] = 0
        assert run.path.read_bytes() == before, name
    run.save()
    assert run.path.read_bytes() != before


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, for `Run`; its ``seconds`` are the test's to change."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.mark.parametrize("workers", [1, 3])
def test_it_saves_at_once_a_minute_after_the_last_save_and_after_each_epoch(make, clock, monkeypatch, workers, capsys):
    """Steps take 25 s, a save takes 20 s, and an evaluation 7 s; the time between two sittings does not count."""
    saves, save, whole = [], checkpoint.save, [True]  # whether what was last collected from the ranks was all arrays

    def slow_save(path, arrays, state):
        assert whole[-1], "moments of other ranks, which mpiexec has started elsewhere, are old"
        saves.append((state["step"], len(state["log"]), state["seconds"]))
        clock.seconds += 20
        save(path, arrays, state)

    def train_slowly(run, stop_at=None):
        collect = run.ranks.from_owners
        run.ranks.from_owners = lambda arrays: (whole.append(arrays is run.arrays), collect(arrays))
        with run.ranks, run:
            for _epoch in run.epochs():
                for step, images in run.minibatches():
                    take_step(run, images)
                    clock.seconds += 25
                    if step == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                clock.seconds += 7
                run.end_epoch({"train": run.epoch_means}, "")

    monkeypatch.setattr(checkpoint, "save", slow_save)
    with pytest.raises(cli.Stopped):
        train_slowly(make(batch_size=8, workers=workers), stop_at=9)
    assert run_module.SAVE_SECONDS == 60  # as docs/reliability.md promises
    # step, epochs, seconds: the start; 3 steps of 25 s are more than a minute; the epoch; and so on; the stop
    assert saves == [(0, 0, 0.0), (3, 0, 95.0), (5, 1, 172.0), (8, 1, 267.0), (9, 1, 312.0)]
    assert whole.count(False) == 9  # of the parameters alone, which all need after each step
    clock.seconds += 86_400
    saves.clear()
    run = make(batch_size=8, resume=True)
    train_slowly(run)
    assert saves == [(10, 2, 312.0 + 25 + 7)]  # steps are skipped, not taken, and nothing is saved at the start
    assert [row["seconds"] for row in run.log] == [172.0, 344.0]
    run.write_metrics({}, run.arrays["params"])
    assert json.loads((run.args.out / "metrics.json").read_text())["seconds"] == 344.0
    assert re.findall(r"  (\d+) s\n", capsys.readouterr().out) == ["172", "344"]


def test_what_rank_0_says_decides_and_not_a_ranks_own_clock(make, clock):
    run, steps = make(), []
    run.ranks.broadcast = lambda mine: (None, steps[-1:] == [2])  # heard of rank 0: save after step 2
    with run:
        for step, _images in run.minibatches():
            steps.append(step)
            clock.seconds += 100
            if step == 3:
                assert step_of(run.path) == 2
    assert step_of(run.path) == 2


def test_the_folder_is_free_when_the_run_has_ended_or_could_not_begin(make):
    run = train(make())
    with files.holding(run.args.out):
        pass
    with pytest.raises(CheckpointError) as error:
        make(resume=True, seed=5)
    with files.holding(run.args.out):  # although the error, which a notebook keeps, still knows the run
        assert error.tb is not None


def test_a_log_that_cannot_be_replaced_ends_no_run(make, monkeypatch):
    replace = files.replace

    def spreadsheet(source, target):
        if target.name == "log.csv":
            raise PermissionError(13, "used by another process")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", spreadsheet)
        run = train(make())
    assert len(run.log) == 2 and not (run.args.out / "log.csv").exists()
    run.write_metrics({}, run.arrays["params"])
    assert len((run.args.out / "log.csv").read_text().splitlines()) == 3


# --------------------------------------------------------------------------------------------------- stop and resume


def without_seconds(run):
    return [{name: number for name, number in row.items() if name != "seconds"} for row in run.log]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 6, "epoch 1", "epoch 2"])  # 3 and 6 are the last of their epochs
def test_stopped_anywhere_and_resumed_it_is_the_same_run(make, tmp_path, stop_at, workers):
    """A signal may reach the whole group of ranks: rank 0 alone decides, after the step, and saves once."""
    whole, saves = train(make(out=tmp_path / "whole")), []
    for number in SIGNALS:
        handlers = [signal.getsignal(each) for each in SIGNALS]
        run = make(workers=workers, out=tmp_path / number.name)
        run.save = lambda saves=saves, save=run.save, run=run: (saves.append(run.step), save())
        with pytest.raises(cli.Stopped) as stopped:
            train(run, stop_at, number)  # each rank sends it to itself
        assert stopped.value.args == (number,) and [signal.getsignal(each) for each in SIGNALS] == handlers
        assert parallel.rank == 0 and run.ranks.count == 1 and run.ranks.children == []

        resumed = make(resume=True, workers=4 - workers, out=tmp_path / number.name)
        step = {"epoch 1": 3, "epoch 2": 6}.get(stop_at, stop_at)
        assert resumed.step == saves[-1] == step and saves.count(step) == SIGNALS.index(number) + 1
        train(resumed)
        tree.map(np.testing.assert_array_equal, resumed.arrays, whole.arrays)
        assert without_seconds(resumed) == without_seconds(whole) and len(whole.log) == 2
        assert resumed.log[-1]["seconds"] >= resumed.log[0]["seconds"] > 0


def test_a_signal_while_an_epoch_is_saved_waits_for_the_whole_checkpoint(make, monkeypatch):
    saved, finished = checkpoint.save, []

    def save(path, arrays, state):
        if len(state["log"]) == 1 and finished == [0]:
            os.kill(os.getpid(), signal.SIGTERM)
        saved(path, arrays, state)
        finished.append(len(state["log"]))

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(cli.Stopped) as stop:
        train(make())
    assert stop.value.args == (signal.SIGTERM,) and finished[:2] == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_thread_no_signal_is_asked_for(make, workers):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(make(workers=workers))))
    thread.start()
    thread.join()
    assert len(runs) == 1 and runs[0].step == 6


def test_a_run_is_resumed_only_with_the_settings_it_was_made_with(make):
    run = train(make())
    kept = run.path.read_bytes()
    changes = {name: {"settings": SETTINGS | {name: ["other"]}} for name in SETTINGS}
    changes |= {"seed": {"seed": 1}, "lr": {"lr": 0.2}, "epochs": {"epochs": 3}, "batch_size": {"batch_size": 8}}
    changes |= {"train_images": {"images": IMAGES ^ 1}, "test_images": {"test_images": IMAGES[:6]}}
    assert changes.keys() == run.config.keys()
    for name, change in changes.items():
        with pytest.raises(CheckpointError) as error:
            make(resume=True, **change)
        message = str(error.value)
        assert f"made with {name} {run.config[name]}, this run has {name} " in message and "\n" not in message
        assert run.path.read_bytes() == kept

        named, state = checkpoint.load(run.path)  # and so, if the checkpoint has no such setting
        del state["config"][name]
        checkpoint.save(run.path, named, state)
        with pytest.raises(CheckpointError, match=f"made with {name} None, this run has {name} "):
            make(resume=True)
        run.path.write_bytes(kept)
    # What changes nothing that is computed may differ.
    run = make(resume=True, workers=2, data="elsewhere", command="python run_toy.py --resume")
    with run:
        assert run.step == 6 and list(run.epochs()) == []


def test_the_folder_may_be_a_link_to_one_that_is_not_there_yet(make, tmp_path):
    (tmp_path / "run").symlink_to("disk")
    assert make().path.is_file() and (tmp_path / "disk" / "checkpoint.npz").is_file()


def test_a_new_run_saves_at_once_and_puts_an_earlier_checkpoint_aside(make, capsys):
    first = train(make()).path.read_bytes()
    run = make(seed=1)
    assert (run.args.out / "earlier-1" / "checkpoint.npz").read_bytes() == first != run.path.read_bytes()
    assert "kept the earlier run" in capsys.readouterr().out
    assert not (run.args.out / "log.csv").exists()  # which was of the other run
    assert make(seed=1, resume=True).step == 0
