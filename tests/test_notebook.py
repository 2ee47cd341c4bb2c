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


def test_one_kernel_whatever_happens_in_its_cells(kernel, small_data):
    """Its flags are no program's; a cell can be interrupted and run again; a bar tells how far; errors are short."""
    status, error, printed = kernel("import numpy\nimport run_vae\nimport sys")  # in the wrong order, as somebody will
    assert (status, error) == ("ok", "")
    status, _, printed = kernel("print(sys.argv)\nprint(run_vae.parse_arguments(None).out)")
    assert status == "ok" and "-f" in printed and "runs/vae" in printed.replace("\\", "/")
    if sys.platform != "win32":  # where kernels are interrupted in another way
        status, error, printed = kernel(TRAIN.format(small_data, "--epochs 100000"), interrupt_at="epoch 2/")
        assert (status, error) == ("error", cli.STOPPED), printed
    status, error, printed = kernel(TRAIN.format(small_data, "--epochs 2"))  # the folder is free, and kept apart
    assert (status, error) == ("ok", "") and "steps/s" in printed and "figures and numbers are in run" in printed
    assert "kept the earlier run as run/earlier-1" in printed or sys.platform == "win32"
    status, error, printed = kernel(TRAIN.format(small_data, "--epochs 2 --resume"))  # figures again
    assert (status, error) == ("ok", "")
    for flags, words in (("--epochs 0", "0 is out of range"), ("--train-images 1000", "there are 200 images")):
        status, error, _ = kernel(TRAIN.format(small_data, flags))
        assert status == "error" and error.startswith(("UserError: ", "UsageError: "))
        assert words in error and "\n" not in error
    status, error, printed = kernel("from scratchgen import draw\ndraw.main(['run', '-n', '4', '--workers', '2'])")
    assert (status, error) == ("ok", "") and "wrote drawn.png" in printed


def test_a_process_that_only_imports_the_kernels_modules_is_no_notebook():
    import ipykernel.kernelapp  # noqa: F401  (as the finder of kernels does)

    assert not cli.in_notebook()


# ------------------------------------------------------------------------------------------------------------- the tour

TOUR = ROOT / "docs" / "tour.ipynb"
SHORTER = {  # what stands in a cell, once -> what takes a minute less
    '"--epochs", "6"': '"--epochs", "1", "--data", {data!r}',
    'train = scale(data["train_images"],': 'train = scale(data["train_images"][:1000],',
    '_images"][:100]': '_images"][:5]',
    "np.full(100, t), eps": "np.full(5, t), eps",
    "np.full(100, t)))": "np.full(5, t)))",
    "range(T, 0, -1)": "range(2, 0, -1)",
    "range(1, 501)": "range(1, 4)",
    "sample(40, rng)": "sample(20, rng)",
    "spirals(rng)": "spirals(rng)[::8]",
    "range(1, 4001)": "range(1, 301)",
    "noise(rng, 1000)": "noise(rng, 50)",
    "partial(toy2d.network, early))": "partial(toy2d.network, early), 50)",
    '("dpm++", 20, guidance': '("dpm++", 3, guidance',
    "sample(20, rng, labels=np.full(20,": "sample(10, rng, labels=np.full(10,",
    "steps=40": "steps=3",
    "schedule, x_0, steps=50": "schedule, x_0, steps=3",
    "x_T, None, steps=50": "x_T, None, steps=3",
    "steps=20, order=2": "steps=3, order=2",
}


def test_the_tour_runs_from_the_top_and_from_any_folder(tmp_path, small_data):
    """Its cells are run again, with less to train and to draw. Up to there they print what is stored beside them."""
    stored, again = (nbformat.read(TOUR, as_version=4) for _ in range(2))
    code = [cell for cell in again.cells if cell.cell_type == "code"]
    for long, short in SHORTER.items():
        (cell,) = (cell for cell in code if long in cell.source)
        assert cell.source.count(long) == 1, long
        cell.source = cell.source.replace(long, short.format(data=str(small_data)))
    NotebookClient(again, timeout=300, coalesce_streams=True, resources={"metadata": {"path": tmp_path}}).execute()
    trained, printed = False, 0
    for before, after in zip(stored.cells, again.cells, strict=True):
        if before.cell_type == "code":
            kinds = [
                [out.output_type for out in cell.outputs if out.get("name") != "stderr"] for cell in (before, after)
            ]
            assert kinds[0] == kinds[1]
            trained |= before.source != after.source
            texts = ["".join(o.text for o in cell.outputs if o.get("name") == "stdout") for cell in (before, after)]
            if texts[0] and not trained:
                words, numbers = zip(*(split(text) for text in texts), strict=True)
                assert words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=1e-6)
                printed += 1
    assert printed == 6  # the bytes, the shapes, the gradient, the tape, `backward`, the bound


def split(text):
    """A text without its numbers, and these."""
    number = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"
    return re.sub(number, "", text).split(), [float(found) for found in re.findall(number, text)]


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
