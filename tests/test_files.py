"""Files that are written whole or not at all, what metrics.json keeps and what it drops, and the lock on a folder."""

import contextlib
import errno
import gc
import itertools
import json
import math
import os
import re
import stat
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

from scratchgen import draw, plots, tree
from scratchgen.data import UserError
from scratchgen.machinery import checkpoint, files, parallel
from scratchgen.machinery.files import FolderInUse

import numpy as np
import pytest
from conftest import ROOT


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"the old file")
    return tmp_path / "c.npz"


@pytest.fixture
def params(rng):
    return {"a": [rng.standard_normal((2, 3), dtype=np.float32)], "b": np.arange(3, dtype=np.float32)}


@pytest.fixture
def calls(monkeypatch):
    """What was flushed and what was renamed, in this order: ("fsync" or "replace", file, its bytes)."""
    recorded, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        recorded.append(("fsync", status.st_ino, os.read(descriptor, status.st_size)))
        fsync(descriptor)

    def recorded_replace(source, target):
        recorded.append(("replace", os.stat(source).st_ino, source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return recorded


def test_the_old_file_is_there_until_the_new_one_is_whole_and_flushed(path, tmp_path, calls):
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half a check")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"c.npz": b"the old file"} and calls == []
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"the new file")
        assert path.read_bytes() == b"the old file" and calls == []
        assert temporary.suffix == ".npz" and temporary.parent == path.parent  # by which np.savez goes; one file system
    assert contents(tmp_path) == {"c.npz": b"the new file"}
    inode = path.stat().st_ino
    assert calls == [("fsync", inode, b"the new file"), ("replace", inode, b"the new file")]


def test_nothing_is_written_moved_or_locked_but_by_rank_0(tmp_path, params, monkeypatch):
    image = np.zeros((4, 28, 28, 1), np.float32)
    writers = {
        "log.csv": lambda path: files.write_log(path, [{"epoch": 1, "elbo": -240.25}, {"epoch": 2, "elbo": -239.5}]),
        "metrics.json": lambda path: files.write_metrics(path, {"elbo": -240.0}, params),
        "evaluation.json": lambda path: files.add_evaluation(path, params, "bound", {"bits": 4.0}, 0),
        "checkpoint.npz": lambda path: checkpoint.save(path, params, {}),
        "grid.png": lambda path: plots.save(plots.grid(image, 2, "grid"), path),
        "sampling.gif": lambda path: plots.save_gif({1: image, 0: image}, 2, path),
        "drawn.npz": lambda path: draw.save_images(path, image),
    }
    (tmp_path / "checkpoint.npz").write_bytes(b"an earlier run")
    for rank in (1, 2, 0):
        monkeypatch.setattr(parallel, "rank", rank)
        with files.holding(tmp_path):
            files.put_aside(tmp_path)
            for name, write in writers.items():
                write(tmp_path / name)
        if rank:
            assert contents(tmp_path) == {"checkpoint.npz": b"an earlier run"}
    assert contents(tmp_path).keys() == {*writers, files.LOCK}
    assert contents(tmp_path)["log.csv"] == b"epoch,elbo\n1,-240.25\n2,-239.5\n"
    assert contents(tmp_path / "earlier-1") == {"checkpoint.npz": b"an earlier run"}


def test_of_a_link_the_target_is_replaced(tmp_path):
    """It may lie on the disk that is large enough. So with a link to a link, and to what is not there yet."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_bytes(b"before")
    for name in ("old", "new"):
        target, link, second = tmp_path / "disk" / name, tmp_path / f"{name}.npz", tmp_path / f"{name}-2.npz"
        link.symlink_to(Path("disk") / name)  # relative to where the link is
        second.symlink_to(link)
        for path in (link, second):
            with files.replacing(path) as temporary:
                assert temporary.parent == target.parent
                temporary.write_text(str(path))
            assert path.is_symlink() and target.read_text() == str(path) and not target.is_symlink()
    assert len(contents(tmp_path / "disk")) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_what_cannot_be_replaced_is_named_before_anything_is_written(path, tmp_path):
    files.check_output(path)
    files.check_output(tmp_path / "new" / "folder" / "x.png")
    assert path.read_bytes() == b"the old file" and contents(tmp_path / "new" / "folder") == {}
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    wrong = [tmp_path / f"{name}.png" for name in ("fifo", "folder", "loop", "null", "n" * 252)]
    for each in (*wrong, Path("/dev/null"), path / "x.png"):  # a file is no folder
        with pytest.raises(OSError) as error:
            files.check_output(each)
        assert error.value.filename in (str(each), str(path)) and error.value.strerror  # never the temporary file
        with pytest.raises(OSError), files.replacing(each) as temporary:
            temporary.touch()
            pytest.fail("it went on")
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo.png").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(tmp_path.iterdir()) == before
    with files.replacing(tmp_path / ("n" * 251 + ".png")) as temporary:  # as long as file systems allow
        temporary.touch()


def test_two_containers_with_one_process_number_do_not_share_a_temporary_file(path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with files.replacing(path) as one, files.replacing(path) as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one"  # which is renamed last


@pytest.mark.parametrize(
    ("number", "lost"),
    [(number, False) for number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)]
    + [(number, True) for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT)],
)
def test_a_flush_that_lost_data_keeps_the_old_file_and_one_that_cannot_be_is_none(number, lost, path, monkeypatch):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    expected = pytest.raises(OSError, match=os.strerror(number)) if lost else contextlib.nullcontext()
    with expected, files.replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == (b"the old file" if lost else b"new")


@pytest.mark.parametrize("refusals", [3, math.inf])
def test_a_file_that_a_viewer_shows_is_replaced_when_it_is_let_go(refusals, path, monkeypatch):
    """Windows refuses to replace a file that is open. A second is waited for it, and no longer."""
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    real, clock, calls = os.replace, [0.0], itertools.count()

    def replace(*paths):
        if next(calls) < refusals:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    try:
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"new")
        assert path.read_bytes() == b"new" and refusals == 3
    except PermissionError as error:
        assert error.filename == str(path) and path.read_bytes() == b"the old file" and 1 <= clock[0] < 1.2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the archive that stays open
def test_an_interrupt_that_zipfile_hides_comes_through(path, tmp_path, monkeypatch):
    """It arrives as a member of the archive is about to be closed; closing the archive then raises a ValueError."""

    def interrupted(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(zipfile._ZipWriteFile, "close", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt, files.replacing(path) as temporary:
        np.savez(temporary, a=np.ones(3))
    assert interrupt.value.args == (15,) and contents(tmp_path) == {"c.npz": b"the old file"}
    del interrupt
    gc.collect()  # the archive, within this test


# -------------------------------------------------------------------------------------------------------- metrics.json


def test_what_was_measured_stays_for_the_same_weights_and_seed(tmp_path, params):
    path = tmp_path / "metrics.json"
    files.write_metrics(path, {"elbo": -240.0, "seconds": 9}, params)
    for name, value, seed in (("ddim", 1.0, 0), ("ddpm", 2.0, 0)):
        files.add_evaluation(path, params, "frechet_10", {name: value}, seed)
    files.add_evaluation(path, params, "bound", {"bits": 4.0}, 0)
    files.write_metrics(path, {"elbo": -239.0}, params)
    kept = json.loads(path.read_text())
    assert kept["elbo"] == -239.0 and "seconds" not in kept and kept["weights"].startswith("CRC-32 ")
    bound = {"bits": 4.0, "seed": 0}
    assert kept["evaluation"] == {"frechet_10": {"ddim": 1.0, "ddpm": 2.0, "seed": 0}, "bound": bound}
    files.add_evaluation(path, params, "frechet_10", {"ddpm": 3.0}, 1)
    assert json.loads(path.read_text())["evaluation"] == {"frechet_10": {"ddpm": 3.0, "seed": 1}, "bound": bound}

    other = tree.map(np.copy, params)
    other["b"][2] += 1
    files.write_metrics(path, {"elbo": -238.0}, other)
    found = json.loads(path.read_text())
    assert found.keys() == {"elbo", "weights"} and found["weights"] != kept["weights"]


WEIGHTS = '{"weights": "%s", "evaluation": '
NESTED = [f'{{}}, "x": {"[" * depth}{"]" * depth}}}' for depth in (500, 900, 1200, 3000, 200_000)]
UNREADABLE = ["", "{", "7", "[]", "[1]", "{}", '{"elbo": 1}', '{"weights": [], "a": NaN}', "[" * 100_000]
UNREADABLE += ["\u00e4".encode("utf-16"), (WEIGHTS % "CRC-32 0") + "{}}", WEIGHTS + NESTED[-1]]
UNREADABLE += [WEIGHTS + value for value in ("[]}", "7}", "null}", '{"iwae_50": []}}', '{"iwae_50": 7}}')]
WRITERS = [partial(files.write_metrics, numbers={"elbo": -240.0})]
WRITERS += [partial(files.add_evaluation, entry="bound", numbers={"bits": 4.0}, seed=0)]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_metrics_file_that_says_nothing_of_these_weights_is_kept_beside(tmp_path, params, content, capsys):
    path = tmp_path / "metrics.json"
    weights = files.read_metrics(path, params)  # of what is not there
    assert weights.keys() == {"weights"}
    content = content if isinstance(content, bytes) else content.replace("%s", weights["weights"]).encode()
    for number, write in enumerate(WRITERS, 1):
        path.write_bytes(content)
        assert files.read_metrics(path, params) == weights and path.exists()  # reading moves nothing
        write(path, params=params)
        assert (tmp_path / f"metrics-{number}.json").read_bytes() == content
        assert f"kept as {tmp_path / f'metrics-{number}.json'}" in capsys.readouterr().out
        write(path, params=params)  # what it has written it can read
    assert json.loads(path.read_text()) == weights | {"evaluation": {"bound": {"bits": 4.0, "seed": 0}}}
    assert len(contents(tmp_path)) == 3 and capsys.readouterr().out == ""


@pytest.mark.parametrize("rest", NESTED[:-1])
def test_however_deep_a_metrics_file_is_nested_what_is_measured_can_be_added(tmp_path, params, rest):
    """Which depth can be read, and which of these be written, depends on Python: 3.12 reads 1200 and writes 900."""
    path = tmp_path / "metrics.json"
    path.write_text((WEIGHTS + rest).replace("%s", files.read_metrics(path, params)["weights"]))
    files.add_evaluation(path, params, "iwae_50", {"log_likelihood": -235.0}, seed=0)
    assert json.loads(path.read_text())["evaluation"]["iwae_50"] == {"log_likelihood": -235.0, "seed": 0}


@pytest.mark.parametrize("change", ["\ufeff{}", "{}\n\n", " {}"])
def test_a_metrics_file_that_an_editor_has_saved_is_read_and_what_is_no_number_is_null(tmp_path, params, change):
    path = tmp_path / "metrics.json"
    files.write_metrics(path, {"elbo": float("nan"), "parts": [1.5, float("inf")]}, params)
    path.write_text(change.replace("{}", path.read_text().replace("\n", "\r\n")), encoding="utf-8")
    files.add_evaluation(path, params, "bound", {"bits": -float("inf")}, seed=0)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert found["elbo"] is None and found["parts"] == [1.5, None] and found["evaluation"]["bound"]["bits"] is None
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------------ the lock

needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no locks on folders here")


def is_held(folder):
    """Whether a program that came now would be refused: a lock is of an open file, and not of a process."""
    try:
        with files.holding(folder):
            return False
    except FolderInUse as error:
        assert str(error).startswith(f"{folder}: another program of scratchgen is at work there; wait, or take another")
        return True


@needs_locks
def test_a_folder_is_held_until_the_block_ends(tmp_path):
    """The locked file stays: were it made anew, two programs could each lock one of their own."""
    seen = []
    for error in (None, ZeroDivisionError):
        with contextlib.suppress(ZeroDivisionError), files.holding(tmp_path):
            assert is_held(tmp_path) and is_held(tmp_path)  # the refused one has not let it go
            seen.append((tmp_path / files.LOCK).stat().st_ino)
            if error:
                raise error
        assert not is_held(tmp_path)
        seen.append((tmp_path / files.LOCK).stat().st_ino)
    assert len(set(seen)) == 1 and len(contents(tmp_path)) == 1


@needs_locks
def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    code = "import sys; from scratchgen.machinery import files\nwith files.holding(sys.argv[1]): "
    code += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        other.kill()
        other.wait()
    assert not is_held(tmp_path)  # a killed one holds nothing


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_file_of_another_user_is_locked_and_where_there_is_none_work_goes_on(there, tmp_path, monkeypatch):
    """As if files could only be read. A chmod would not do: root may write everything."""
    opened, modes = os.open, []

    def read_only(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        modes.append(flags)
        return opened(path, flags, *rest)

    if there:
        (tmp_path / files.LOCK).touch()
    monkeypatch.setattr(os, "open", read_only)
    with files.holding(tmp_path):
        assert modes == [os.O_RDONLY] and is_held(tmp_path) == (there and files.fcntl is not None)
    assert not is_held(tmp_path) and list(tmp_path.iterdir()) == [tmp_path / files.LOCK] * there


def test_a_lock_file_that_may_not_even_be_read_is_taken_for_locked(tmp_path, monkeypatch):
    def refuse(path, flags, *rest):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FolderInUse, match="may not be read"), files.holding(tmp_path):
        pass


@pytest.mark.parametrize("error", [BlockingIOError, PermissionError])
def test_windows_locks_one_byte_and_says_permission_denied(error, tmp_path, monkeypatch):
    class Msvcrt:
        LK_NBLCK = 2
        locked = []

        def locking(self, lock, how, count):
            if self.locked:
                raise error(errno.EACCES, "Permission denied")
            self.locked.append((how, count))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", Msvcrt())
    with files.holding(tmp_path):
        assert is_held(tmp_path)
    assert Msvcrt.locked == [(2, 1)]


def test_what_killed_programs_left_half_written_goes(tmp_path):
    for name in (f"{files.PART}123.png", f"{files.PART}99.npz", "preview.png", ".lock", ".other"):
        (tmp_path / name).touch()
    with files.holding(tmp_path):
        assert contents(tmp_path).keys() == {"preview.png", ".lock", ".other"}


def test_where_nothing_can_be_locked_or_written_work_goes_on(tmp_path, monkeypatch):
    with files.holding(tmp_path / "no such folder"):
        pass
    if files.fcntl:

        def no_locks(file, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / f"{files.PART}7.csv").touch()
    with files.holding(tmp_path):
        assert (tmp_path / f"{files.PART}7.csv").exists()  # who knows whose it is
    monkeypatch.setattr(files, "fcntl", None)  # as on a system with neither
    with files.holding(tmp_path):
        assert not is_held(tmp_path)


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_folder_is_free_when_the_holder_and_all_that_it_forked_have_ended(tmp_path):
    """A rank that outlives its run holds the folder on; one that ends before does not let it go."""
    reader, writer = os.pipe()
    with files.holding(tmp_path):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        assert is_held(tmp_path)
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        assert is_held(tmp_path)
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)
    assert not is_held(tmp_path)


# ------------------------------------------------------ an earlier run: test_runs.py has all that a finished one leaves

LEFT = ["checkpoint.npz", "log.csv", "metrics.json", "samples.png"]


@pytest.mark.parametrize("linked", [False, True])
def test_an_earlier_run_is_moved_whole_and_never_overwritten(linked, tmp_path, capsys):
    """Of a link what it leads to; the link stays for the new run."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir()
    disk.mkdir()
    (out / "holiday.png").write_bytes(b"the user's")
    files.put_aside(out)  # no run is there
    if linked:
        for name in LEFT:
            (out / name).symlink_to(Path("../disk") / name)
        (out / "preview.png").symlink_to("nowhere")
    for number, content in ((1, b"first"), (2, b"second")):
        for name in LEFT:
            with files.replacing(out / name) as temporary:
                temporary.write_bytes(content)
        files.put_aside(out)
        assert capsys.readouterr().out == f"kept the earlier run as {out / f'earlier-{number}'}\n"
    for number, content in ((1, b"first"), (2, b"second")):
        assert contents(out / f"earlier-{number}") == dict.fromkeys(LEFT, content)
        assert not any(path.is_symlink() for path in (out / f"earlier-{number}").iterdir())
    assert contents(out) == {"holiday.png": b"the user's"} and contents(disk) == {}
    assert all((out / name).is_symlink() == linked for name in LEFT)


def test_a_folder_where_a_figure_is_to_go_is_found_before_the_training(tmp_path):
    for name in ("loss.png", "metrics.json", "checkpoint.npz", "latents_3_4.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: expected a file or nothing there")):
            files.put_aside(tmp_path)
        (tmp_path / name).rmdir()
    (tmp_path / "holiday.png").mkdir()
    files.put_aside(tmp_path)


@pytest.mark.parametrize("after", range(5))
def test_a_move_that_was_killed_goes_on_with_the_same_folder(after, tmp_path, monkeypatch):
    for name in LEFT:
        (tmp_path / name).write_text(name)
    rename, calls = os.rename, itertools.count()

    def killed(*paths):
        if next(calls) == after:
            raise KeyboardInterrupt
        rename(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        files.put_aside(tmp_path)
    files.put_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier-1"]
    assert contents(tmp_path / "earlier-1") == {name: name.encode() for name in LEFT}
