"""Write the homework for a class, without the answers, and grade its work.

    python docs/handout.py FOLDER
    python docs/handout.py --notebook FOLDER
    python docs/handout.py --grade ANNA BERT CARLA

A hand-out is docs/handout/student (the questions, the functions to write,
without their bodies, and two plain run scripts) with the data, the modules that
these need, and the tests of the questions. --notebook adds homework.ipynb: a
cell for each function, and one for each question's tests. --micro adds an
exercise for the first week: scratchgen/micro.py, both models on one page, with
six formulas left to write.

--grade runs the tests of the questions, and hidden ones, on each folder, and
prints a table of points. Answers in words are graded by hand, with
docs/handout/lecturer/rubric.md. This is no sandbox: it runs the students' code.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scratchgen.machinery import cli

ROOT = Path(__file__).resolve().parent.parent
PARTS = Path("docs/handout")  # student: handed out as it is; notebook: with --notebook; lecturer: never
# Question -> its points on the sheet, and of these what each function to write is worth. The rest is for words.
POINTS = {1: 1, 2: 1, 3: 1, 4: 6, 5: 1, 6: 4, 7: 2, 8: 1, 9: 1, 10: 1, 11: 6, 12: 2, 13: 2}
FUNCTIONS = {
    4: {
        "vae.reparameterise": 1,
        "vae.kl_per_dimension": 1,
        "vae.bernoulli_log_likelihood": 1,
        "vae.elbo_terms": 1,
        "vae.init_mlp_vae": 0.5,
        "vae.mlp_encode": 1,
        "vae.mlp_decode": 0.5,
    },
    5: {"vae.negative_elbo": 0.5},
    6: {"plots.plot_latents": 3},
    7: {"diffusion.make_schedule": 0.5, "diffusion.q_sample": 0.5},
    8: {"diffusion.prior_kl": 0.5},
    9: {"diffusion.q_posterior": 0.5},
    10: {"diffusion.gaussian_kl": 0.5},
    11: {"diffusion.draw_batch": 2, "diffusion.squared_errors": 1, "diffusion.simple_loss": 2},
    12: {"diffusion.predict_x_0": 0.25, "diffusion.p_sample": 0.5, "diffusion.sample": 0.25},
}
UNCHANGED = (
    *(f"scratchgen/{name}.py" for name in ("data", "tree", "gradients", "layers", "optim", "denoisers")),
    *("scratchgen/machinery/__init__.py", "scratchgen/machinery/blas.py"),
    *("tests/test_homework.py", "tests/finite_differences.py", "LICENSE"),
)
OPS = "scratchgen/ops.py"  # handed out but for its last section, which is a part of question 4
LAST_SECTION = "# ------------------------------------------------------------------------------------------- Bernoulli"
FORMULAS = {  # number -> what it is, and where in micro.py: the function, and how each line in it begins
    1: ("the gradient of a layer", {"mlp_backward": ["d_x, d_W, d_b ="]}),
    2: ("the gradient of the cross-entropy", {"cross_entropy": ["d_logits ="]}),
    3: ("the KL divergence", {"vae_loss": ["kl ="]}),
    4: ("z, drawn from q(z | x), and the gradient of mu and log_var", {"vae_loss": ["z =", "d_mu =", "d_log_var ="]}),
    5: ("Eq. (4) for x_t, and solved for eps", {"ddpm_loss": ["x_t ="], "p_sample": ["eps ="]}),
    6: ("line 4 of Algorithm 2, with its sigma", {"p_sample": ["sigma =", "return "]}),
}
MICRO = "scratchgen/micro.py", "tests/test_micro.py"
NOT_HANDED_OUT = f"# {'-' * 68} beside the package: not handed out"  # begins the part of test_micro.py with answers
MICRO_README = """
## To begin with

`scratchgen/micro.py` is both models on one page, with the gradient by hand. Six formulas are left to write, each in
place of the lines `raise NotImplementedError("formula ...")`. `pytest tests/test_micro.py` checks them. Then
`python scratchgen/micro.py` trains both models in two minutes and draws `micro.png`.

{formulas}
"""
LIMIT = 60  # seconds for the tests of one question on a student's functions


def parse_arguments(argv):
    parser = cli.OneLineParser("docs/handout.py", __doc__)
    parser.flag("folder", "the folder to make; new, or empty", type=Path, metavar="FOLDER", nargs="?")
    parser.flag("--notebook", "with homework.ipynb, a cell for each function", action="store_true")
    parser.flag(
        "--micro", "with the exercise of one page (it shows parts of questions 4, 11 and 12)", action="store_true"
    )
    parser.flag("--grade", "grade these folders instead", type=Path, nargs="+", metavar="FOLDER")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.grade):
        parser.error("expected either one FOLDER to write or --grade and folders to grade")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.grade:
        for folder in args.grade:
            if not (folder / "scratchgen").is_dir():
                raise cli.UsageError(f"{folder}: expected a folder with the homework, with scratchgen/ in it")
        names = [folder.resolve().name for folder in args.grade]
        if len(set(names)) < len(names):  # anna/ps5 bert/ps5
            names = map(str, args.grade)
        print(table({name: grade(folder) for name, folder in zip(names, args.grade, strict=True)}))
        return
    folder = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise cli.UsageError(f"{folder}: expected a new or an empty folder")
    if any(ROOT / name in folder.resolve().parents for name in ("scratchgen", "data", "tests", "docs")):
        raise cli.UsageError(f"{folder}: expected a folder outside of the project's own")
    write(folder, args.notebook, args.micro)
    print(f"wrote the homework to {folder}; begin with its README.md")


# ---------------------------------------------------------------------------------------------------------- handing out


def write(folder, notebook=False, micro=False):
    """Write the homework to ``folder``, as files that the user may change, even if ours are read-only."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source in (ROOT / PARTS / "student", *([ROOT / PARTS / "notebook"] if notebook else [])):
        shutil.copytree(source, folder, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
    shutil.copytree(ROOT / "data", folder / "data", copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(path.stat().st_mode | 0o700)  # copytree makes it as its source is
    (folder / "scratchgen" / "machinery").mkdir(exist_ok=True)
    for name in UNCHANGED:
        shutil.copyfile(ROOT / name, folder / name)
    write_text(folder / OPS, without_last_section(read(OPS)))
    if notebook:
        write_text(folder / "homework.ipynb", json.dumps(notebook_of_stubs(), indent=1) + "\n")
    if micro:
        write_text(folder / MICRO[0], without_formulas(read(MICRO[0])))
        write_text(folder / MICRO[1], read(MICRO[1]).partition(NOT_HANDED_OUT)[0].rstrip() + "\n")
        formulas = "\n".join(f"{number}. {what}" for number, (what, _) in FORMULAS.items())
        readme = (folder / "README.md").read_text(encoding="utf-8")
        write_text(folder / "README.md", readme + MICRO_README.format(formulas=formulas))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def write_text(path, text):
    path.write_text(text, encoding="utf-8")


def without_last_section(text):
    before, found, _ = text.partition(LAST_SECTION)
    if not found:
        raise ValueError(f"{OPS}: expected its last section to be that of the Bernoulli log-likelihood")
    return before.rstrip() + "\n"


def functions_in(text):
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def without_formulas(text):
    """micro.py with one line in place of each formula."""
    lines = text.splitlines()
    functions = functions_in(text)
    for number, (what, places) in FORMULAS.items():
        for name, starts in places.items():
            for i in range(functions[name].lineno, functions[name].end_lineno):
                code = lines[i].lstrip()
                if code.startswith(tuple(starts)):
                    indent = lines[i][: -len(code)]
                    lines[i] = f'{indent}raise NotImplementedError("formula {number}: {what}")'
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- the notebook

IMPORTS = """# Run this cell first. Then write a function in its cell, run that, and run the cell of its tests.
from scratchgen.plots import *
from scratchgen.vae import *
from scratchgen.diffusion import *
import autograd.numpy as np
from check import check"""
TRAIN = """# After question 6; and after question 12 the same with run_ddpm. Figures are in the folder runs.
import run_vae
run_vae.main([])"""


def notebook_of_stubs():
    """The skeleton as a notebook, in nbformat 4: for each question its functions, and a cell that runs its tests."""
    modules = {name: read(PARTS / "student" / "scratchgen" / f"{name}.py") for name in ("vae", "plots", "diffusion")}
    cells = [
        ("markdown", "# Problem set 5\n\nThe questions, with their equations, are in questions.md."),
        ("code", IMPORTS),
    ]
    for question, functions in FUNCTIONS.items():
        cells.append(("markdown", f"## Question {question}"))
        for place in functions:
            module, name = place.split(".")
            node = functions_in(modules[module])[name]
            cells.append(("code", "\n".join(modules[module].splitlines()[node.lineno - 1 : node.end_lineno])))
        cells.append(("code", f"check({question}, globals())"))
    cells.append(("code", TRAIN))
    cells.append(("code", "import run_ddpm\nrun_ddpm.main([])"))
    only_code = {"execution_count": None, "outputs": []}
    return {
        "cells": [
            {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
            | (only_code if kind == "code" else {})
            for number, (kind, text) in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


# -------------------------------------------------------------------------------------------------------------- grading


def grade(folder, questions=tuple(FUNCTIONS)):
    """Question -> {function: (points, what its first failed test says, or "")}.

    One process runs the questions in turn, with our copies of the tests, and writes the result of each. If it dies, or
    takes longer than LIMIT, that question gets no points, and another process goes on with the next.
    """
    said = {}  # question -> function -> words
    with tempfile.TemporaryDirectory() as scratch:
        lecturer = ROOT / PARTS / "lecturer"
        copied = [ROOT / "tests" / name for name in ("test_homework.py", "finite_differences.py")]
        copied += [lecturer / "test_hidden.py", ROOT / PARTS / "student" / "tests" / "conftest.py"]
        for path in copied:
            shutil.copyfile(path, Path(scratch) / path.name)
        write_text(Path(scratch) / "pytest.ini", "[pytest]\n")
        results = Path(scratch) / "results"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        while missing := [question for question in questions if question not in said]:
            results.write_text("")
            asked = {question: [place.split(".") for place in FUNCTIONS[question]] for question in missing}
            everything = [place.split(".") for functions in FUNCTIONS.values() for place in functions]
            order = json.dumps({"folder": str(folder.resolve()), "asked": asked, "all": everything, "limit": LIMIT})
            command = [sys.executable, str(lecturer / "grade_questions.py"), order]
            options = {"cwd": scratch, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(command, stdin=subprocess.DEVNULL, **options)
            for line in results.read_text(encoding="utf-8").splitlines():
                question, words = json.loads(line)
                said[question] = words
            lost = next((question for question in missing if question not in said), None)
            if lost is not None:
                words = f"crashed, or took longer than {LIMIT} seconds"
                said[lost] = {place.partition(".")[2]: words for place in FUNCTIONS[lost]}
    earned = {}
    for question in questions:
        words = said[question]
        points = {place.partition(".")[2]: points for place, points in FUNCTIONS[question].items()}
        earned[question] = {name: (0 if words[name] else points[name], words[name]) for name in points}
    return earned


def table(grades):
    """Rows are students, columns questions; below it what failed, function by function."""
    of_code = {question: sum(functions.values()) for question, functions in FUNCTIONS.items()}
    by_hand = [question for question in POINTS if of_code.get(question, 0) < POINTS[question]]
    width = max(len("points for code"), *map(len, grades))
    earned = {
        student: [sum(points for points, _ in functions.values()) for functions in by_question.values()]
        for student, by_question in grades.items()
    }

    def row(name, numbers):
        return f"{name:{width}}" + "".join(f"{number:>7.4g}" for number in (*numbers, sum(numbers)))

    lines = [f"{'question':{width}}" + "".join(f"{question:>7}" for question in FUNCTIONS) + "    all"]
    lines += [row("points for code", of_code.values()), *(row(student, numbers) for student, numbers in earned.items())]
    lines += [row("mean", [sum(column) / len(grades) for column in zip(*earned.values(), strict=True)]), ""]
    rest = ", ".join(f"{q} ({POINTS[q] - of_code.get(q, 0):g})" for q in by_hand)
    lines.append(f"by hand, with docs/handout/lecturer/rubric.md: {rest}")
    for student, by_question in grades.items():
        for question, functions in by_question.items():
            lines += [
                f"{student}, question {question}, {name}: {words}" for name, (_, words) in functions.items() if words
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, "stopped: a FOLDER that was being written is not whole")
