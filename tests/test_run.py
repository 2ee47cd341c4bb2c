"""The book-keeping of a run: its steps, its means, its log, and that it stops and goes on without losing anything."""

import argparse
import csv
import json
import os
import signal
import threading

from scratchgen import tree
from scratchgen.machinery import checkpoint, cli, files, parallel
from scratchgen.machinery import run as run_module
from scratchgen.machinery.checkpoint import CheckpointError
from scratchgen.machinery.cli import Stop
from scratchgen.machinery.parallel import Ranks
from scratchgen.machinery.run import Run, rng_for

import numpy as np
import pytest
from conftest import load, tamper

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
        arrays = {"params": params, "moments": {"m": tree.map(np.zeros_like, params)}}
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
    for leaf in tree.leaves(run.ranks.own(run.arrays["params"])):
        leaf *= np.float32(0.9)
        leaf += drawn[: len(leaf)] + np.float32(images.sum())
    run.ranks.barrier()
    w = run.arrays["params"]["w"]
    run.record(float(w[0]), {"loss": w[0]})


def train(run, stop_at=None, how=signal.SIGINT):
    with run.ranks, run:
        for _epoch in run.epochs():
            for step, images in run.minibatches():
                if step == stop_at:
                    os.kill(os.getpid(), how)
                take_step(run, images)
            run.end_epoch({"train": run.epoch_means, "test": {"loss": float(run.arrays["params"]["w"][1])}}, "summary")
    return run


def step_of(path):
    _, state = checkpoint.load(path)
    return state["step"]


# ------------------------------------------------------------------------------------------------------------- shards


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


# ----------------------------------------------------------------------------------------------------- random numbers


def test_what_is_drawn_for_one_purpose_changes_nothing_for_another():
    purposes = [
        (run_module.INIT,),
        (run_module.NOISE,),
        (run_module.ORDER, 0),
        (run_module.ORDER, 1),
        (run_module.TEST,),
    ]
    firsts = [rng_for(seed, *purpose).random() for seed in (0, 1) for purpose in purposes]
    assert len(set(firsts)) == 10
    assert rng_for(1, run_module.ORDER, 1).random() == firsts[8]  # and is the same each time


# ------------------------------------------------------------------------------------------------------ steps and means


def test_steps_count_from_1_over_the_run_and_every_epoch_shows_every_image(make):
    run, steps, seen = make(), [], []
    with run:
        for epoch in run.epochs():
            for step, images in run.minibatches():
                assert run.step == step - 1  # it counts as done when the script comes back for the next
                steps.append((epoch, step, len(images)))
                seen.append(images.ravel())
                run.record(1.0, {"loss": 1.0})
            run.end_epoch({"train": run.epoch_means}, "")
    assert steps == [(1, 1, 16), (1, 2, 16), (1, 3, 8), (2, 4, 16), (2, 5, 16), (2, 6, 8)]
    assert run.total_steps == 6 and run.steps_per_epoch == 3
    orders = [np.concatenate(seen[start : start + 3]).tolist() for start in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]


def test_epoch_means_are_weighted_by_images(make):
    run = make(batch_size=30, epochs=1)
    with run:
        for _epoch in run.epochs():
            for step, _images in run.minibatches():
                run.record(0.0, {"kl": {1: 2.0, 2: 6.0}[step]})
            assert run.epoch_means == {"kl": 3.0}
            run.end_epoch({"train": run.epoch_means}, "")
            assert run.log[-1]["train_kl"] == 3.0
    run = make(batch_size=30, epochs=3)
    with run:
        for epoch in run.epochs():  # the means of each are its own
            for _step, _images in run.minibatches():
                run.record(0.0, {"kl": float(epoch)})
            run.end_epoch({"train": run.epoch_means}, "")
    assert [row["train_kl"] for row in run.log] == [1.0, 2.0, 3.0]


def test_labels_come_with_their_images_if_there_are_any(make):
    labels = IMAGES.ravel() + 100
    run = make(images=(IMAGES, labels), test_images=(IMAGES[:7], labels[:7]))
    with run:
        for _step, (images, found) in run.minibatches():
            np.testing.assert_array_equal(images.ravel() + 100, found)
    assert run.count == 40 and run.step == 3
    run = make(images=(IMAGES, None), test_images=(IMAGES[:7], None))
    with run:
        assert [(len(images), found) for _, (images, found) in run.minibatches()] == [(16, None), (16, None), (8, None)]


def test_a_row_an_epoch_in_log_csv_and_one_line_on_the_screen(make, capsys):
    run = train(make())
    with open(run.args.out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "step", "train_loss", "test_loss", "seconds"]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in run.log]
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "epoch 1/2  summary" in out and "epoch 2/2  summary" in out


def test_the_bar_counts_the_steps_of_all_sittings(make, monkeypatch):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)  # or there is no bar
    whole = train(make()).bar
    with pytest.raises(cli.Stopped):
        train(make(), stop_at=2)
    resumed = make(resume=True)
    with resumed:
        assert (resumed.bar.n, resumed.bar.total) == (2, 6)
    train(resumed := make(resume=True))
    assert [(bar.n, bar.total) for bar in (whole, resumed.bar)] == [(6, 6)] * 2


def test_what_it_took_goes_beside_the_models_own_numbers(make):
    run = train(make(seed=3))
    run.write_metrics({"elbo": -240.0}, run.arrays["params"])
    found = json.loads((run.args.out / "metrics.json").read_text())
    weights, seconds = found.pop("weights"), found.pop("seconds")
    assert found == {"elbo": -240.0, "epochs": 2, "seed": 3, "parameters": 5, "command": "python run_toy.py"}
    assert weights.startswith("CRC-32 ") and seconds >= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_loss_that_is_not_finite_ends_the_run(make, value):
    run = make()
    with pytest.raises(cli.Diverged, match="at step 2: start again, without --resume, with a smaller --lr"), run:
        for _epoch in run.epochs():
            for step, _images in run.minibatches():
                run.record(value if step == 2 else 1.0, {"loss": 1.0})
    run = make()
    with pytest.raises(cli.Diverged, match="--lr"), run:  # or one that shows only in what is measured
        run.end_epoch({"train": {"loss": 1.0}, "test": {"loss": value}}, "")
    assert run.log == [] and not (run.args.out / "log.csv").exists()


# --------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_waits_for_the_next_place_where_it_is_allowed(make, number):
    handlers = [signal.getsignal(s) for s in SIGNALS]
    run, saved, step_goes_on = make(), [], False
    save = run.save
    run.save = lambda: saved.append(run.step) or save()
    with pytest.raises(cli.Stopped) as stopped, run:
        for _epoch in run.epochs():
            for step, images in run.minibatches():
                if step == 2:
                    os.kill(os.getpid(), number)
                take_step(run, images)
                step_goes_on = step == 2
    assert saved == [2] and stopped.value.args == (number,) and step_goes_on
    assert [signal.getsignal(s) for s in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_a_step_a_stop_does_not_wait_and_what_was_done_is_saved(make, tmp_path, number):
    """In what is measured or drawn after an epoch: resumed, the run takes no step twice, and draws what is missing."""
    whole, drawn = train(make(out=tmp_path / "whole")), []

    def train_and_draw(run, stop_at=None):
        with run:
            for epoch in run.epochs():
                for _step, images in run.minibatches():
                    take_step(run, images)
                if epoch == stop_at:
                    os.kill(os.getpid(), number)
                drawn.append(epoch)
                test = {"loss": float(run.arrays["params"]["w"][1])}
                run.end_epoch({"train": run.epoch_means, "test": test}, "summary")
        return run

    with pytest.raises(cli.Stopped):
        train_and_draw(make(), stop_at=2)
    run = make(resume=True)
    assert drawn == [1] and run.step == 6 and len(run.log) == 1
    train_and_draw(run)
    assert drawn == [1, 2]
    np.testing.assert_array_equal(run.arrays["params"]["w"], whole.arrays["params"]["w"])
    assert [row["train_loss"] for row in run.log] == [row["train_loss"] for row in whole.log]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_signal_that_was_to_be_ignored_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop = Stop()
    try:
        with cli.on_stop(stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_thread_no_signal_is_asked_for(make, workers):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(make(workers=workers))))
    thread.start()
    thread.join()
    assert len(runs) == 1 and runs[0].step == 6


def test_a_checkpoint_is_saved_within_an_epoch_too(make, monkeypatch):
    monkeypatch.setattr(run_module, "SAVE_SECONDS", 0)
    run, steps = make(), []
    with run:
        for _epoch in run.epochs():
            for step, images in run.minibatches():
                if step > 1:
                    steps.append(step_of(run.path))
                take_step(run, images)
            run.end_epoch({"train": run.epoch_means, "test": {"loss": 0.0}}, "")
    assert steps == [1, 2, 3, 4, 5]


def test_weights_that_are_not_finite_are_not_saved(make):
    run = make()
    before = run.path.read_bytes()
    run.arrays["params"]["w"][1] = np.nan
    with pytest.raises(cli.Diverged), run:
        run.save()
    assert run.path.read_bytes() == before


def test_the_folder_is_free_when_the_run_has_ended_or_could_not_begin(make):
    run = train(make())
    with files.holding(run.args.out):
        pass
    with pytest.raises(CheckpointError) as error:
        make(resume=True, seed=5)
    with files.holding(run.args.out):  # although the error, which a notebook keeps, still knows the run
        assert error.tb is not None


def test_a_log_that_cannot_be_replaced_ends_no_run(make, monkeypatch):
    replace = os.replace

    def spreadsheet(source, target):
        if target.name == "log.csv":
            raise PermissionError(13, "used by another process")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", spreadsheet)
        run = train(make())
    assert len(run.log) == 2 and not (run.args.out / "log.csv").exists()
    run.write_metrics({}, run.arrays["params"])
    assert len((run.args.out / "log.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7},
        {"step": 2},
        {"step": 10**15},
        {"shard_size": 1},
        {"log": []},
        {"log": [{"epoch": 1, "step": 3, "seconds": 1.0}] * 2},
        {"log": [{"epoch": 1, "step": 3, "train_loss": 0.0, "test_loss": 0.0, "seconds": 1.0}] * 2},
    ],
)
@pytest.mark.parametrize("keep_checksum", [False, True])
def test_a_state_that_was_changed_to_that_of_another_place_is_refused(make, change, keep_checksum):
    run = train(make())
    arrays, state = load(run.path)
    tamper(run.path, arrays, state | change, keep_checksum)
    with pytest.raises(CheckpointError, match="changed, or is of another version") as error:
        make(resume=True)
    assert "\n" not in str(error.value)


def test_a_second_ctrl_c_stops_at_once():
    handlers = [signal.getsignal(s) for s in SIGNALS]
    stop = Stop()
    with pytest.raises(KeyboardInterrupt) as interrupt, cli.on_stop(stop), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.value.args == (signal.SIGTERM,)
    assert [signal.getsignal(s) for s in SIGNALS] == handlers


def test_a_signal_while_an_epoch_is_saved_waits_for_the_whole_checkpoint(make, monkeypatch):
    saved = checkpoint.save
    finished = []  # of the calls that save an epoch, of which the first gets the signal

    def save(*args):
        if args[2]["log"]:
            finished.append(False)
            if len(finished) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        saved(*args)
        if args[2]["log"]:
            finished[-1] = True

    run = make()
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(cli.Stopped) as stop:
        train(run)
    assert stop.value.args == (signal.SIGTERM,) and len(load(run.path)[1]["log"]) == 1
    assert finished[0] is True


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 6])  # 3 and 6 are the last steps of their epochs
def test_stopped_anywhere_and_resumed_it_is_the_same_run(make, tmp_path, stop_at, workers):
    whole = train(make(out=tmp_path / "whole"))
    with pytest.raises(cli.Stopped):
        train(make(workers=workers), stop_at)
    resumed = make(resume=True, workers=3 - workers)
    assert resumed.step == stop_at
    train(resumed)
    for name in ("w", "b"):
        np.testing.assert_array_equal(resumed.arrays["params"][name], whole.arrays["params"][name])
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.log] for run in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert resumed.log[-1]["seconds"] >= resumed.log[0]["seconds"] > 0


@pytest.mark.parametrize("number", SIGNALS)
def test_several_ranks_stop_together_and_rank_0_alone_decides(make, number):
    """A signal may reach the whole group of processes: the others are deaf, and save nothing."""
    handlers, run = [signal.getsignal(s) for s in SIGNALS], make(workers=2)
    with pytest.raises(cli.Stopped) as stopped:
        train(run, 2, number)  # sent by each rank to itself
    assert stopped.value.args == (number,) and step_of(run.path) == 2
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert parallel.rank == 0 and run.ranks.count == 1 and run.ranks.children == []


def test_a_loss_that_is_not_finite_for_one_rank_ends_all(make):
    run = make(workers=2)
    with pytest.raises(cli.Diverged, match="at step 2"), run.ranks, run:
        for _epoch in run.epochs():
            for step, _images in run.minibatches():
                run.record(float("nan") if step == 2 and run.ranks.rank == run.ranks.count - 1 else 1.0, {"loss": 1.0})
    assert step_of(run.path) == 0
    with files.holding(run.args.out):
        pass


def test_a_run_is_resumed_only_with_the_settings_it_was_made_with(make, tmp_path):
    train(make())
    for change, words in (
        ({"seed": 1}, "seed 0, this run has seed 1"),
        ({"lr": 0.2}, "lr 0.1, this run has lr 0.2"),
        ({"epochs": 3}, "epochs 2, this run has epochs 3"),
        ({"batch_size": 8}, "batch_size 16, this run has batch_size 8"),
        ({"settings": SETTINGS | {"model": "other"}}, "model toy, this run has model other"),
        ({"settings": SETTINGS | {"layers": []}}, "layers \\['dense', 'relu'\\], this run has layers \\[\\]"),
        ({"images": IMAGES[:39]}, "40 of CRC-32"),
        ({"test_images": IMAGES[:6]}, "test_images 7 of CRC-32"),
    ):
        with pytest.raises(CheckpointError, match=words):
            make(resume=True, **change)
    # What changes nothing that is computed may differ.
    run = make(resume=True, workers=2, data="elsewhere", command="python run_toy.py --resume")
    with run:
        assert run.step == 6 and list(run.epochs()) == []


def test_a_new_run_saves_at_once_and_puts_an_earlier_checkpoint_aside(make, capsys):
    first = train(make()).path.read_bytes()
    run = make(seed=1)
    assert (run.args.out / "earlier-1" / "checkpoint.npz").read_bytes() == first != run.path.read_bytes()
    assert "kept the earlier run" in capsys.readouterr().out
    assert not (run.args.out / "log.csv").exists()  # which was of the other run
    assert make(seed=1, resume=True).step == 0
