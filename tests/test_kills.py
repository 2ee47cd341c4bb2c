"""A run that is killed at any moment, and resumed, ends as if it had been left alone: same bits, same files, no more.

Every write is a flush and a rename. What a kill before or after one of them leaves is what is in the folder then. It
is looked at in all those moments of a run that is left alone, and a run is resumed from each. Here with small networks;
`python tests/test_kills.py` kills runs of the real ones, in ten to twenty minutes.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))  # with the run scripts, where this is a program

import run_ddpm
import run_vae
from scratchgen import denoisers, vae
from scratchgen.machinery import blas, cli, files, parallel
from scratchgen.machinery import run as run_module

import numpy as np
import pytest
from conftest import load, main_of, write_small_data

SCRIPTS = {"vae": run_vae, "ddpm": run_ddpm}
FLAGS = {"vae": ["--latent-dim", 5], "ddpm": ["--T", 5, "--arch", "mlp"]}
STEPS = 6  # of a run: in each epoch two of 48 images, which are four shards on four cores, and one of 4, a single shard
COMMON = ["--batch-size", 48, "--train-images", 100, "--epochs", 2]


def train(model, data, out, *flags):
    return main_of(SCRIPTS[model], *FLAGS[model], *COMMON, "--data", data, "--out", out, *flags)


class Figures:
    """Stands in for `scratchgen.plots`: the numbers that a figure would show are written, as checksums."""

    def __getattr__(self, name):
        return lambda *args, **options: [name, args, options]

    @staticmethod
    @files.by_rank_0
    def save(figure, path):
        def told(other):
            return files.crc(np.ascontiguousarray(other)) if isinstance(other, np.ndarray) else type(other).__name__

        files.write_text(path, json.dumps(figure, default=told))

    def save_gif(self, frames, columns, path):
        self.save(frames, path)


@contextmanager
def clock_and_cores(cores=4, save_seconds=-1):
    """A clock that stands still, by which it is time to save after each step; and so many cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
        patch.setattr(run_module, "SAVE_SECONDS", save_seconds)
        patch.setattr(blas, "available_cores", lambda: cores)
        yield patch


@contextmanager
def small(**options):
    """The same, of networks and figures that take no time, and with an evaluation in several shards."""
    with clock_and_cores(**options) as patch:
        encode, decode = vae.VAES["mlp"][1:]
        patch.setitem(vae.VAES, "mlp", (partial(vae.init_mlp_vae, hidden=(8, 6)), encode, decode))
        init = partial(denoisers.init_mlp_denoiser, hidden=7)
        patch.setitem(denoisers.DENOISERS, "mlp", (init, denoisers.mlp_denoiser))
        patch.setattr(os, "fsync", lambda file: None)
        for script in SCRIPTS.values():
            patch.setattr(script, "plots", Figures())
            patch.setattr(script, "SHARD", 6)
        yield patch


@contextmanager
def at_each_moment(act):
    """Before and after each flush and each rename call ``act()``. Ranks other than 0 may do neither."""

    def dangerous(f):
        def between_two_moments(*args):
            assert parallel.rank == 0
            act()
            f(*args)
            act()

        return between_two_moments

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, dangerous(getattr(os, name)))
        yield


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.LOCK}


def contents(folder):
    """All that a run has left in its folder, but for the flags of the command that do not matter."""
    found = files_in(folder)
    metrics = json.loads(found["metrics.json"])
    metrics["command"] = metrics["command"].removesuffix(" --resume").split(" --out ")[0]
    return found | {"metrics.json": metrics}


def what_kills_leave(model, data, out, *flags):
    """The files of a run's folder, with their contents, whenever they are not what they were the moment before."""
    left = []

    def look():
        now = files_in(out)
        if now not in left[-1:]:
            left.append(now)

    with at_each_moment(look):
        train(model, data, out, *flags)
    return left


@pytest.fixture(scope="module", params=FLAGS)
def whole(request, small_data, tmp_path_factory):
    """(model, the contents of the folder of a run by one worker, what kills of a run by three leave)."""
    model, folder = request.param, tmp_path_factory.mktemp(request.param)
    with small():
        train(model, small_data, folder / "whole", "--workers", 1)
        left = what_kills_leave(model, small_data, folder / "out", "--workers", 3)
    assert contents(folder / "out") == contents(folder / "whole")
    return model, contents(folder / "whole"), left


def test_killed_at_any_moment_and_resumed_by_others_it_is_the_same_run(whole, small_data, tmp_path):
    """By another number of workers, and with another number of cores, which would have other shards."""
    model, expected, left = whole
    steps = []
    for number, by_name in enumerate(left):
        out = tmp_path / str(number)
        out.mkdir()
        for name, found in by_name.items():
            (out / name).write_bytes(found)
        saved = (out / "checkpoint.npz").exists()
        steps.append(load(out / "checkpoint.npz")[1]["step"] if saved else -1)
        with small(cores=9 if saved else 4, save_seconds=1):
            train(model, small_data, out, "--workers", 1 + number % 3, *(["--resume"] if saved else []))
        assert contents(out) == expected
    assert set(steps) == {-1, *range(STEPS + 1)} and steps == sorted(steps)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_in_a_step_and_resumed_by_others_it_is_the_same_run(step, whole, small_data, tmp_path):
    """The signal arrives inside of the step, which is finished and saved, though it was not yet time to save."""
    model, expected, _ = whole
    out, record = tmp_path / "out", run_module.Run.record

    def stopped(run, *rest):
        if run.step == step - 1:
            signal.raise_signal(signal.SIGTERM)  # to all ranks, of which one listens
        record(run, *rest)

    with small(save_seconds=1) as patch, pytest.raises(cli.Stopped):
        patch.setattr(run_module.Run, "record", stopped)
        train(model, small_data, out, "--workers", 1 + step % 4)
    assert load(out / "checkpoint.npz")[1]["step"] == step
    with small():
        train(model, small_data, out, "--workers", 1 + (step + 2) % 4, "--resume")
    assert contents(out) == expected


# ------------------------------------------------------------------------------------------ kills, of the real networks


def die_at(moment, model, data, out):
    """Train as a program of its own, and be killed at this moment."""
    moments = itertools.count()

    def look():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with clock_and_cores(), at_each_moment(look):
        train(model, data, out, "--workers", 1)


def kills(model, data, folder):
    """Kill a run at each moment, and say for each whether it was the same when it was resumed."""
    moments = itertools.count()
    with clock_and_cores():
        with at_each_moment(lambda: next(moments)):
            train(model, data, folder / "whole", "--workers", 1)
        count = next(moments)
        for moment in range(count):
            out = folder / str(moment)
            killed = get_context("spawn").Process(target=die_at, args=(moment, model, data, out))
            killed.start()
            killed.join()
            assert killed.exitcode == -signal.SIGKILL
            train(model, data, out, "--workers", 1, *(["--resume"] if (out / "checkpoint.npz").exists() else []))
            found, expected = contents(out), contents(folder / "whole")
            differ = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
            print(f"{model}, moment {moment} of {count}: {differ or 'the same'}", flush=True)
            yield not differ
            shutil.rmtree(out)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = write_small_data(Path(folder, "data"))
        same = [same for model in FLAGS for same in kills(model, data, Path(folder, model))]
    print(f"{sum(same)} of {len(same)} ended as if left alone")
    sys.exit(not all(same))
