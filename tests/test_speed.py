"""docs/speed.py: seconds of training to a Frechet distance."""

import math
import os
import shutil
import sys

import run_ddpm
from scratchgen.data import scale
from scratchgen.machinery import checkpoint

import numpy as np
import pytest
from conftest import ROOT, T, load, main_of, script

speed = script("docs/speed.py")


def test_between_two_points_the_logarithm_of_the_distance_is_a_line():
    curve = [(s, 100 * math.exp(-s / 10)) for s in (5, 12, 21, 40)]  # a line in the logarithm
    for target in (50, 20, 3):
        assert speed.seconds_to(curve, target) == pytest.approx(10 * math.log(100 / target))
    assert speed.seconds_to(curve, 70) == 5  # it was there at the first point
    assert math.isnan(speed.seconds_to(curve, 1))
    assert speed.seconds_to([(1, 9), (2, 4), (3, 6), (4, 2)], 4) == 2  # the first time
    assert speed.of_seeds([10.0, 14.0]) == "12 +- 3" and speed.of_seeds([1.234], 2) == "1.23"
    assert speed.of_seeds([10.0, math.nan]) == "never"


def test_the_early_state_guides_only_once_it_is_there():
    def state(step, additions=("v", "guide")):
        log = [{"step": 100 * n} for n in range(1, 1 + step // 100)]
        return {"step": step, "log": log, "config": {"epochs": 16, "additions": additions}}

    assert [speed.has_guide(state(step)) for step in (50, 350, 400, 401, 1600)] == [False, False, False, True, True]
    assert not speed.has_guide(state(1600, ()))


@pytest.fixture
def commands(monkeypatch, narrow_runs):
    """The commands that train. Each only writes five checkpoints, one every 40 s of a clock, from before step 1 on."""
    given = []
    arrays, state = load(narrow_runs / "ddpm" / "checkpoint.npz")
    state["config"]["epochs"] = 14  # of 100 steps, so that there is a guide from step 351 on

    class Training:
        def __init__(self, command, cwd):
            assert command[:2] == [sys.executable, str(ROOT / "run_ddpm.py")] and cwd == ROOT
            self.args = run_ddpm.parse_arguments(command[2:])
            self.written = 0
            given.append(self.args)

        def poll(self):
            path = self.args.out / "checkpoint.npz"
            path.parent.mkdir(exist_ok=True)
            if self.written == 5:
                (path.parent / "metrics.json").touch()
                return 0
            log = [{"step": 100 * n} for n in range(1, 1 + self.written)]
            of_step = {"step": 100 * self.written, "log": log, "seconds": 40.0 * self.written + self.args.seed}
            checkpoint.save(path, arrays, state | of_step)
            at = 10**18 + 40 * 10**9 * self.written
            os.utime(path, ns=(at, at))
            self.written += 1
            return None

    monkeypatch.setattr(speed.subprocess, "Popen", Training)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    return given


def test_each_copy_is_measured_once_by_the_clock_of_its_training(
    commands, small_data, x_test, tmp_path, monkeypatch, capsys
):
    drawn = []
    found = iter([30.0, 1.0, 40.0, 2.0, 25.0, 1.0])

    def draw(model, N, seed, ranks, config):
        drawn.append((N, seed, str(config)))
        return np.full((N, 28, 28, 1), len(drawn), np.uint8)

    def distance(generated, real):
        assert generated.shape == (8, 28) and np.all(generated == scale(np.uint8(len(drawn)), 0, 1))
        np.testing.assert_array_equal(real, scale(x_test[:, 14, :, 0], 0, 1))
        return next(found)

    monkeypatch.setattr(speed, "draw", draw)
    monkeypatch.setattr(speed.classifier, "features", lambda params, x: x[:, 14, :, 0])
    monkeypatch.setattr(speed.metrics, "frechet_distance", distance)
    monkeypatch.setattr(speed, "TARGETS", (20, 5, 1.5))
    monkeypatch.setitem(speed.ROWS, "tiny", ["--classes", "--epochs", "2"])
    flags = [
        "--rows",
        "tiny",
        "--seeds",
        3,
        5,
        "--samples",
        8,
        "--runs",
        tmp_path,
        "--data",
        small_data,
        "--workers",
        1,
    ]
    main_of(speed, *flags)
    printed = capsys.readouterr().out.splitlines()

    asked = [(args.T, args.classes, args.epochs, args.seed, args.workers, args.resume) for args in commands]
    assert asked == [(200, True, 2, 3, 1, False), (200, True, 2, 5, 1, False)]
    folders = [tmp_path / f"speed-tiny-{seed}" for seed in (3, 5)]
    assert [args.out for args in commands] == folders and {args.data for args in commands} == {small_data}
    # Of 0, 40, .. 160 s there are copies at 0, before step 1, at 120, the first after 90 s, and at the end.
    assert [len(list((folder / "copies").glob("*.npz"))) for folder in folders] == [3, 3]
    assert drawn == [(8, 0, f"sde-dpm++, {T} steps"), (8, 0, f"sde-dpm++, {T} steps, w = 0.5")] * 2
    assert (
        printed[0] == "tiny, seed 3: 123 s 30.00, 163 s 1.00" and printed[1] == "tiny, seed 5: 125 s 40.00, 165 s 2.00"
    )
    assert printed[2] == "| row | 20 | 5 | 1.5 | at the end |"
    cells = [cell.strip() for cell in printed[-1].strip("| ").split("|")]
    for target, cell in ((20, cells[1]), (5, cells[2])):
        of_3 = 123 + 40 * math.log(30 / target) / math.log(30 / 1)
        of_5 = 125 + 40 * math.log(40 / target) / math.log(40 / 2)
        assert cell == f"{(of_3 + of_5) / 2:.0f} +- {abs(of_3 - of_5) / math.sqrt(2):.0f}"
    assert (cells[0], cells[3:]) == ("tiny", ["never", "1.50 +- 0.71 after 164 +- 1 s"])

    main_of(speed, *flags)  # neither trained nor measured again
    assert capsys.readouterr().out.splitlines() == printed and len(commands) == 2 and len(drawn) == 4
    shutil.rmtree(folders[0] / "copies")  # a run without copies, or one that was stopped, is resumed and not begun anew
    (folders[0] / "metrics.json").unlink()
    main_of(speed, *flags)
    assert [args.resume for args in commands[2:]] == [True]
    assert capsys.readouterr().out.splitlines()[0] == "tiny, seed 3: 123 s 25.00, 163 s 1.00"
