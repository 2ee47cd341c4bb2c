"""Files that are written whole or not at all, what metrics.json keeps and what it drops, and the lock on a folder."""

import contextlib
import errno
import gc
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from scratchgen import draw, plots, tree
from scratchgen.machinery import checkpoint, files, parallel
from scratchgen.machinery.files import FolderInUse

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"the old file")
    return tmp_path / "c.npz"


def test_a_failed_write_leaves_the_old_file_and_no_debris(path, tmp_path):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half a check")
        raise ZeroDivisionError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError) as error, files.replacing(tmp_path / "x.png") as temporary:
        temporary.write_bytes(b"x")
    assert error.value.filename == str(tmp_path / "x.png")


def test_the_old_file_is_there_until_the_new_one_is_whole(path, tmp_path):
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"the new file")
        assert path.read_bytes() == b"the old file"
        assert temporary.suffix == ".npz" and temporary.parent == path.parent  # by which np.savez goes; one file system
    assert path.read_bytes() == b"the new file" and list(tmp_path.iterdir()) == [path]


def test_the_log_is_one_row_an_epoch(tmp_path):
    rows = [{"epoch": 1, "test_elbo": -240.25}, {"epoch": 2, "test_elbo": -239.5}]
    files.write_log(tmp_path / "log.csv", rows)
    assert (tmp_path / "log.csv").read_bytes() == b"epoch,test_elbo\n1,-240.25\n2,-239.5\n"


def test_the_other_ranks_leave_it_to_rank_0_to_write(monkeypatch):
    written = []

    @files.by_rank_0
    def write(name, number):
        """A docstring."""
        written.append((name, number))

    for rank in (1, 0, 2):
        monkeypatch.setattr(parallel, "rank", rank)
        write("log", rank)
    assert written == [("log", 0)] and write.__name__ == "write" and write.__doc__ == "A docstring."


def test_nothing_is_written_moved_or_locked_but_by_rank_0(tmp_path, params, monkeypatch):
    image = np.zeros((4, 28, 28, 1), np.float32)
    writers = {
        "log.csv": lambda path: files.write_log(path, [{"epoch": 1}]),
        "metrics.json": lambda path: files.write_metrics(path, {"elbo": -240.0}, params),
        "evaluation.json": lambda path: files.add_evaluation(path, params, "bound", {"bits": 4.0}, 0),
        "checkpoint.npz": lambda path: checkpoint.save(path, params, {}),
        "grid.png": lambda path: plots.save(plots.grid(image, 2, "grid"), path),
        "sampling.gif": lambda path: plots.save_gif([image] * 2, 2, path),
        "drawn.npz": lambda path: draw.save_images(path, image),
    }
    (tmp_path / "checkpoint.npz").write_bytes(b"an earlier run")
    monkeypatch.setattr(parallel, "rank", 1)
    with files.holding(tmp_path):
        for name, write in writers.items():
            write(tmp_path / name)
        files.put_aside(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    assert (tmp_path / "checkpoint.npz").read_bytes() == b"an earlier run"

    monkeypatch.setattr(parallel, "rank", 0)
    with files.holding(tmp_path):
        files.put_aside(tmp_path)
        for name, write in writers.items():
            write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {*writers, "earlier-1", files.LOCK}


# -------------------------------------------------------------------------------------------------------- metrics.json


@pytest.fixture
def params(rng):
    return {"a": [rng.standard_normal((2, 3), dtype=np.float32)], "b": np.arange(3, dtype=np.float32)}


def test_what_was_measured_stays_for_the_same_weights_and_goes_with_other_ones(tmp_path, params):
    path = tmp_path / "metrics.json"
    files.write_metrics(path, {"elbo": -240.0, "seconds": 9}, params)
    files.add_evaluation(path, params, "iwae_50", {"log_likelihood": -235.0}, seed=0)
    files.write_metrics(path, {"elbo": -239.0}, params)
    kept = json.loads(path.read_text())
    assert kept["elbo"] == -239.0 and "seconds" not in kept and kept["weights"].startswith("CRC-32 ")
    assert kept["evaluation"] == {"iwae_50": {"log_likelihood": -235.0, "seed": 0}}

    other = tree.map(np.copy, params)
    other["b"][2] += 1
    files.write_metrics(path, {"elbo": -238.0}, other)
    found = json.loads(path.read_text())
    assert found.keys() == {"elbo", "weights"} and found["weights"] != kept["weights"]


def test_numbers_of_one_seed_come_together_and_those_of_another_replace_them(tmp_path, params):
    path = tmp_path / "metrics.json"
    for name, value, seed in (("ddim", 1.0, 0), ("ddpm", 2.0, 0)):
        files.add_evaluation(path, params, "frechet_10", {name: value}, seed)
    files.add_evaluation(path, params, "bound", {"bits": 4.0}, 0)
    assert json.loads(path.read_text())["evaluation"]["frechet_10"] == {"ddim": 1.0, "ddpm": 2.0, "seed": 0}
    files.add_evaluation(path, params, "frechet_10", {"ddpm": 3.0}, 1)
    expected = {"frechet_10": {"ddpm": 3.0, "seed": 1}, "bound": {"bits": 4.0, "seed": 0}}
    assert json.loads(path.read_text())["evaluation"] == expected


WEIGHTS = '{"weights": "%s", "evaluation": '


@pytest.mark.parametrize(
    "content",
    [None, "", "[1]", "{}", '{"weights": "CRC-32 00000000"}', "7", "[" * 100_000, '{"weights": [], "a": NaN}']
    + [WEIGHTS + '{}, "x": ' + "[" * 200_000 + "]" * 200_000 + "}"]
    + [WEIGHTS + value for value in ("[]}", "7}", "null}", '{"iwae_50": []}}', '{"iwae_50": 7}}')],
)
def test_a_metrics_file_that_is_not_ours_counts_as_none(tmp_path, params, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content.replace("%s", files.read_metrics(path, params)["weights"]))
    assert files.read_metrics(path, params).keys() == {"weights"}
    files.add_evaluation(path, params, "iwae_50", {"log_likelihood": -235.0}, seed=0)
    assert json.loads(path.read_text())["evaluation"]["iwae_50"] == {"log_likelihood": -235.0, "seed": 0}


@pytest.mark.parametrize("depth", [500, 900, 1200, 3000])
def test_however_deep_a_metrics_file_is_nested_what_is_measured_can_be_added(tmp_path, params, depth):
    """Which depth can be read, and which of these be written, depends on Python: 3.12 reads 1200 and writes 900."""
    path = tmp_path / "metrics.json"
    text = WEIGHTS + '{}, "x": ' + "[" * depth + "]" * depth + "}"
    path.write_text(text.replace("%s", files.read_metrics(path, params)["weights"]))
    files.add_evaluation(path, params, "iwae_50", {"log_likelihood": -235.0}, seed=0)
    assert json.loads(path.read_text())["evaluation"]["iwae_50"] == {"log_likelihood": -235.0, "seed": 0}


def test_what_is_no_number_is_null_in_json(tmp_path, params):
    path = tmp_path / "metrics.json"
    numbers = {"elbo": float("nan"), "parts": [1.5, float("inf")]}
    files.write_metrics(path, numbers, params)
    files.add_evaluation(path, params, "bound", {"bits": -float("inf")}, 0)

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["elbo"] is None and found["parts"] == [1.5, None] and found["evaluation"]["bound"]["bits"] is None


# ------------------------------------------------------------------------------------------------------------ the lock

needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no locks on folders here")
OTHER = """
import sys
from scratchgen.machinery import files
try:
    with files.holding(sys.argv[1]):
        pass
except files.FolderInUse as error:
    sys.exit(f"refused: {error}")
"""


def another_process_holds(folder):
    """Let another process try for the folder; its complaint, or nothing."""
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr.strip()


@needs_locks
def test_a_folder_is_held_until_the_block_ends(tmp_path):
    words = "another program of scratchgen is at work there; wait"
    with files.holding(tmp_path):
        complaint = another_process_holds(tmp_path)
        assert complaint.startswith(f"refused: {tmp_path}: {words}") and "\n" not in complaint
        with pytest.raises(FolderInUse), files.holding(tmp_path):  # another thread, a second cell of a notebook
            pass
        assert "refused" in another_process_holds(tmp_path)  # which the refused one has not let go
    assert another_process_holds(tmp_path) == ""
    with pytest.raises(ZeroDivisionError), files.holding(tmp_path):
        raise ZeroDivisionError
    assert another_process_holds(tmp_path) == ""


@needs_locks
def test_the_file_that_is_locked_stays_and_stays_the_same(tmp_path):
    """Were it removed and made anew, two programs could each lock one of their own."""
    seen = []
    for _ in range(2):
        with files.holding(tmp_path):
            seen.append((tmp_path / files.LOCK).stat().st_ino)
        assert list(tmp_path.iterdir()) == [tmp_path / files.LOCK]
        assert another_process_holds(tmp_path) == ""
        seen.append((tmp_path / files.LOCK).stat().st_ino)
    assert len(set(seen)) == 1


@pytest.fixture
def of_another_user(monkeypatch):
    """As if files could only be read. A chmod would not do: root may write everything."""
    opened, modes = os.open, []

    def read_only(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        modes.append(flags)
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    return modes


@needs_locks
def test_a_lock_file_of_another_user_is_locked_all_the_same(tmp_path, of_another_user):
    (tmp_path / files.LOCK).write_bytes(b"")
    with files.holding(tmp_path):
        assert of_another_user == [os.O_RDONLY] and "refused" in another_process_holds(tmp_path)
        with pytest.raises(FolderInUse), files.holding(tmp_path):
            pass
    assert another_process_holds(tmp_path) == "" and list(tmp_path.iterdir()) == [tmp_path / files.LOCK]


def test_in_a_folder_of_another_user_without_a_lock_file_work_goes_on(tmp_path, of_another_user):
    with files.holding(tmp_path):
        assert list(tmp_path.iterdir()) == []
    assert of_another_user == [os.O_RDONLY]  # it was tried


def test_what_killed_programs_left_half_written_goes(tmp_path):
    for name in (".preview.part-123.png", ".checkpoint.part-99.npz", "preview.png", ".lock", ".other"):
        (tmp_path / name).write_bytes(b"x")
    with files.holding(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"preview.png", ".lock", ".other"}


def test_where_nothing_can_be_locked_or_written_work_goes_on(tmp_path, monkeypatch):
    with files.holding(tmp_path / "no such folder"):
        pass
    if files.fcntl:

        def no_locks(file, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / ".log.part-7.csv").touch()
    with files.holding(tmp_path):
        assert (tmp_path / ".log.part-7.csv").exists()  # who knows whose it is
    monkeypatch.setattr(files, "fcntl", None)  # as on a system with neither
    with files.holding(tmp_path):
        assert another_process_holds(tmp_path) == ""


@needs_locks
def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    code = f"import sys; from scratchgen.machinery import files\nwith files.holding({str(tmp_path)!r}): "
    code += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match="at work there"), files.holding(tmp_path):
            pass
        other.kill()
        other.wait()
        with files.holding(tmp_path):  # a killed one holds nothing
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / files.LOCK]


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_folder_is_free_when_the_holder_and_all_that_it_forked_have_ended(tmp_path):
    """A rank that outlives its run holds the folder on; one that ends before does not let it go."""
    reader, writer = os.pipe()
    with files.holding(tmp_path):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        assert "refused" in another_process_holds(tmp_path)
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        assert "refused" in another_process_holds(tmp_path)
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)
    assert another_process_holds(tmp_path) == ""


# --------------------------------------------------------------------------------------------------- an earlier run


def test_an_earlier_run_is_moved_whole_and_never_overwritten(tmp_path, capsys):
    for content in (b"first", b"second"):
        for name in ("checkpoint.npz", "log.csv", "metrics.json", "samples.png"):
            (tmp_path / name).write_bytes(content)
        (tmp_path / "notes.txt").write_bytes(b"the user's")
        files.put_aside(tmp_path)
    files.put_aside(tmp_path)  # nothing there any more
    assert {path.name for path in tmp_path.iterdir()} == {"earlier-1", "earlier-2", "notes.txt"}
    for number, content in ((1, b"first"), (2, b"second")):
        found = {path.name: path.read_bytes() for path in (tmp_path / f"earlier-{number}").iterdir()}
        assert found == dict.fromkeys(("checkpoint.npz", "log.csv", "metrics.json", "samples.png"), content)
    assert capsys.readouterr().out.count("kept the earlier run") == 2


@pytest.mark.parametrize("after", range(5))
def test_a_move_that_was_killed_goes_on_with_the_same_folder(after, tmp_path, monkeypatch):
    names = ["checkpoint.npz", "log.csv", "metrics.json", "samples.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    replace, calls = os.replace, itertools.count()

    def killed(*paths):
        if next(calls) == after:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        files.put_aside(tmp_path)
    files.put_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier-1"]
    assert {path.name: path.read_text() for path in (tmp_path / "earlier-1").iterdir()} == {n: n for n in names}


def test_a_folder_without_a_run_is_left_alone(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"the user's")
    files.put_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the archive that stays open
def test_an_interrupt_that_zipfile_hides_comes_through(tmp_path, monkeypatch):
    """It arrives as a member of the archive is about to be closed; closing the archive then raises a ValueError."""
    path = tmp_path / "arrays.npz"
    path.write_text("as it was")

    def interrupted(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(zipfile._ZipWriteFile, "close", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt, files.replacing(path) as temporary:
        np.savez(temporary, a=np.ones(3))
    assert interrupt.value.args == (15,)
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]
    del interrupt
    gc.collect()  # the archive, within this test
