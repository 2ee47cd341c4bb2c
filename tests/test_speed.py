"""docs/speed.py: seconds of training to a Frechet distance."""

import math
import shutil

import pytest
from conftest import script

speed = script("docs/speed.py")


def test_between_two_points_the_logarithm_of_the_distance_is_a_line():
    curve = [(s, 100 * math.exp(-s / 10)) for s in (5, 12, 21, 40)]  # a line in the logarithm
    for target in (50, 20, 3):
        assert speed.seconds_to(curve, target) == pytest.approx(10 * math.log(100 / target))
    assert speed.seconds_to(curve, 70) == 5  # it was there at the first point
    assert math.isnan(speed.seconds_to(curve, 1))
    assert speed.seconds_to([(1, 9), (2, 4), (3, 6), (4, 2)], 4) == 2  # the first time


def test_the_early_state_guides_only_once_it_is_there():
    def state(step, additions=("v", "guide")):
        log = [{"step": 100 * n} for n in range(1, 1 + step // 100)]
        return {"step": step, "log": log, "config": {"epochs": 16, "additions": additions}}

    assert [speed.has_guide(state(step)) for step in (50, 350, 400, 401, 1600)] == [False, False, False, True, True]
    assert not speed.has_guide(state(1600, ()))


def test_seeds_have_a_mean_and_a_spread():
    assert speed.of_seeds([10.0, 14.0]) == "12 +- 3" and speed.of_seeds([1.234], 2) == "1.23"
    assert speed.of_seeds([10.0, math.nan]) == "never"


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_a_run_is_copied_as_it_trains_and_each_copy_is_measured_once(small_data, tmp_path, monkeypatch, capsys):
    flags = ["--train-images", "64", "--batch-size", "32", "--epochs", "2", "--arch", "mlp", "--additions", "v"]
    monkeypatch.setitem(speed.ROWS, "tiny", flags)
    monkeypatch.setattr(speed, "TARGETS", (1e9, 0.1))
    command = ["--rows", "tiny", "--seeds", "3", "--samples", "8", "--runs", str(tmp_path)]
    command += ["--data", str(small_data), "--workers", "1"]
    speed.main(command)
    printed = capsys.readouterr().out
    copies = list((tmp_path / "speed-tiny-3" / "copies").glob("*.npz"))
    assert copies and "tiny, seed 3: " in printed
    row = printed.splitlines()[-1].split(" | ")
    assert row[0] == "| tiny" and row[2] == "never" and "after" in row[3]
    monkeypatch.setattr(speed, "draw", None)  # and the run is not trained again
    speed.main(command)
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setitem(speed.ROWS, "tiny", flags)
    shutil.rmtree(copies[0].parent)  # a run without copies, or one that was stopped, is resumed and not begun anew
    (copies[0].parent.parent / "metrics.json").unlink()
    speed.main(command)
    end = printed.splitlines()[-1].split(" | ")[-1].split(" after ")[0]
    assert f"| {end} after " in capsys.readouterr().out
    assert not list((tmp_path / "speed-tiny-3").glob("earlier-*"))
