"""The programs in a notebook: one kernel, whatever happens in its cells; and the tour, executed."""

import os
import re
import sys
import time

from scratchgen.machinery import cli

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

pytestmark = pytest.mark.filterwarnings("default")  # of the programs that talk to the kernel


@pytest.fixture
def kernel(tmp_path):
    """Run a cell in a kernel that starts in an empty folder: how it ended, its error in one text, and what it printed.

    The kernel is interrupted as soon as it has printed the text ``interrupt_at``, as by the notebook's stop button."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where the run scripts are
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)

    def run(code, interrupt_at=None, timeout=90):
        printed, request, until = "", client.execute(code), time.monotonic() + timeout
        while True:
            message = client.get_iopub_msg(timeout=until - time.monotonic())
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            printed += content.get("text", "")
            if interrupt_at and interrupt_at in printed:
                manager.interrupt_kernel()
                interrupt_at = None
            if content.get("execution_state") == "idle":
                break
        while True:  # a kernel that was slow to start has been asked more than once whether it is there
            reply = client.get_shell_msg(timeout=until - time.monotonic())
            if reply["parent_header"].get("msg_id") == request:
                break
        reply = reply["content"]
        return reply["status"], "\n".join(reply.get("traceback", [])), printed

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


TRAIN = "run_vae.main('--data {} --train-images 128 --batch-size 32 --workers 2 --out run {}'.split())"


@pytest.mark.skipif(sys.platform == "win32", reason="its kernels are interrupted in another way")
def test_a_cell_that_is_interrupted_can_be_run_again(kernel, small_data):
    status, error, _ = kernel("import numpy\nimport run_vae")  # in the wrong order, as somebody will
    assert (status, error) == ("ok", "")
    status, error, printed = kernel(TRAIN.format(small_data, "--epochs 100000"), interrupt_at="epoch 2/")
    assert (status, error) == ("error", cli.STOPPED), printed
    status, error, printed = kernel(TRAIN.format(small_data, "--epochs 2"))  # the folder is free, and kept apart
    assert (status, error) == ("ok", "") and "kept the earlier run as run/earlier-1" in printed
    assert "figures and numbers are in run" in printed
    status, error, printed = kernel(TRAIN.format(small_data, "--epochs 2 --resume"))  # figures again
    assert (status, error) == ("ok", "")
    for flags, words in (
        ("--epochs 0", "0 is out of range"),
        ("--train-images 1000", "there are 200 images"),
    ):
        status, error, _ = kernel(TRAIN.format(small_data, flags))
        assert status == "error" and error.startswith(("UserError: ", "UsageError: "))
        assert words in error and "\n" not in error
    status, error, printed = kernel("from scratchgen import draw\ndraw.main(['run', '-n', '4', '--workers', '2'])")
    assert (status, error) == ("ok", "") and "wrote drawn.png" in printed


def test_a_process_that_only_imports_the_kernels_modules_is_no_notebook():
    import ipykernel.kernelapp  # noqa: F401  (as the finder of kernels does)

    assert not cli.in_notebook()


def test_a_bar_shows_how_far_it_is(kernel, small_data):
    status, error, printed = kernel("import run_vae\n" + TRAIN.format(small_data, "--epochs 2"))
    assert (status, error) == ("ok", "") and "steps/s" in printed


def test_a_program_without_flags_does_not_take_those_of_the_kernel(kernel):
    status, error, printed = kernel("import sys, run_vae\nprint(sys.argv)\nprint(run_vae.parse_arguments(None).out)")
    assert (status, error) == ("ok", "") and "-f" in printed and "runs/vae" in printed.replace("\\", "/")


# ------------------------------------------------------------------------------------------------------------- the tour

TOUR = ROOT / "docs" / "tour.ipynb"


def test_the_tour_runs_from_the_top_and_from_any_folder(tmp_path):
    """Its cells are run again, and say of the data and of the tape what is stored beside them."""
    stored, again = (nbformat.read(TOUR, as_version=4) for _ in range(2))
    began = time.monotonic()
    NotebookClient(again, timeout=300, coalesce_streams=True, resources={"metadata": {"path": tmp_path}}).execute()
    assert time.monotonic() - began < 300  # one minute on two quiet cores
    same = 0
    for before, after in zip(stored.cells, again.cells, strict=True):
        if before.cell_type == "code":
            kinds = [
                [out.output_type for out in cell.outputs if out.get("name") != "stderr"] for cell in (before, after)
            ]
            assert kinds[0] == kinds[1]
            texts = [[out.text for out in cell.outputs if out.get("name") == "stdout"] for cell in (before, after)]
            same += bool(texts[0]) and texts[0] == texts[1]
    assert same >= 4  # the bytes, the shapes, the tape, `backward`


def test_the_tour_is_stored_with_its_pictures_and_not_large():
    cells = [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("from scratchgen import")  # before NumPy
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs) >= 18
    animations = [
        out["data"]["text/html"] for cell in cells for out in cell.outputs if "text/html" in out.get("data", {})
    ]
    assert len(animations) == 1 and "slider" in animations[0] and len(animations[0]) < 400_000
    assert TOUR.stat().st_size < 2.7e6
    assert str(ROOT) not in TOUR.read_text(encoding="utf-8")
    assert not any("/tmp" in out.get("text", "") for cell in cells for out in cell.outputs)  # nor what is gone


def test_each_section_of_the_tour_ends_with_something_to_try_and_its_answer_folded_away():
    cells = nbformat.read(TOUR, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    text = "\n\n".join(texts)
    sections = re.split(r"^## ", text, flags=re.M)[1:-1]  # the last is where to go from here
    assert [int(section.split(".")[0]) for section in sections] == list(range(1, 12))
    for section in sections:
        *_, last = section.split("**Try this.**")
        assert section.count("**Try this.**") == 1, section[:40]
        assert re.search(r"\?[^?]*\n\n<details><summary>Answer</summary>\n\n.+\n\n</details>\s*$", last, re.S), last
