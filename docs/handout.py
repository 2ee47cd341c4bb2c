"""Write the project as one hands it to a class: without the answers, and with
the functions that the homework asks for left to write.

    python docs/handout.py FOLDER
    python docs/handout.py --micro FOLDER

Each of these functions keeps its docstring and gets one line, raise
NotImplementedError("question 7: ..."). The README that is written says what is
asked, for how many points, what to write, in which order, and how it is
checked. All of it is made from the files as they are: what is asked comes from
homework.md, the functions from QUESTIONS below. With --micro there is an
exercise to begin with: both models on one page, scratchgen/micro.py, with six
formulas left to write.
"""

import ast
import re
import shutil
from pathlib import Path

from scratchgen.machinery import cli

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = {  # question -> file and the functions in it that are to be written, in a good order
    4: [
        ("scratchgen/vae.py", ["reparameterise", "kl_per_dimension", "elbo_terms", "mlp_encode", "mlp_decode"]),
        ("scratchgen/ops.py", ["bernoulli_log_likelihood"]),
    ],
    5: [("scratchgen/vae.py", ["negative_elbo"])],
    6: [("scratchgen/plots.py", ["plot_latents"])],
    7: [("scratchgen/diffusion.py", ["make_schedule", "q_sample"])],
    8: [("scratchgen/diffusion.py", ["prior_kl"])],
    9: [("scratchgen/diffusion.py", ["q_posterior"])],
    10: [("scratchgen/diffusion.py", ["gaussian_kl", "bound_weights"])],
    11: [("scratchgen/diffusion.py", ["draw_batch", "squared_errors", "simple_loss"])],
    12: [("scratchgen/diffusion.py", ["predict_x_0", "p_sample", "sample"])],
}
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
COPIED = ("scratchgen", "data", "tests", "run_vae.py", "run_ddpm.py", "setup.cfg", "pyproject.toml", "LICENSE")
README = """# Problem set 5: variational autoencoders and diffusion models

Two models of FashionMNIST in NumPy, with the parts to write left out: {points} points. Nothing else is missing: layers,
gradients, optimisers, the training loops and the functions that draw are here. Work from the top: no question needs a
later one.

    python3 -m venv .venv && . .venv/bin/activate
    py -m venv .venv; .venv\\Scripts\\Activate.ps1
    pip install -e ".[test]"
    pytest -k question_7

The first line is for Linux and macOS, the second for PowerShell on Windows. The last one checks question 7: its tests
fail now, and pass once its functions are written; `pytest tests/test_homework.py` checks all questions. A function to
write has a docstring that says what it takes and returns, and one line to replace, `raise NotImplementedError`.
Questions 1 to 3 and 13 are answered in words alone, 7 to 10 in words and in code.
{micro}
{table}

After question 5, `python run_vae.py` trains the VAE in a minute. It draws the latents last, `latents_I_J.png`, and
until question 6 is done it stops there. After question 12, `python run_ddpm.py --T 200 --additions none` trains the
diffusion model in some ten minutes and draws `trajectory.png`. Hand in the answers, the code that you wrote, and the
figures that questions 5, 6, 11 and 12 make.
"""
MICRO_README = """
Begin with `scratchgen/micro.py`: both models on one page, with the gradient by hand. Six formulas are left to write,
each in place of the lines `raise NotImplementedError("formula ...")`. `pytest tests/test_micro.py` checks them. Then
`python scratchgen/micro.py` trains both models in two and a half minutes and draws `micro.png`.

{formulas}
"""


def parse_arguments(argv):
    parser = cli.OneLineParser("docs/handout.py", __doc__)
    parser.flag("folder", "is made; must not exist or be empty", type=Path, metavar="FOLDER")
    parser.flag("--micro", "with the exercise of one page, scratchgen/micro.py", action="store_true")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    folder = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise cli.UsageError(f"{folder}: expected a new or an empty folder")
    if any(ROOT / name in folder.resolve().parents for name in COPIED):
        raise cli.UsageError(f"{folder}: expected a folder outside of what is handed out")
    write(folder, micro=args.micro)
    print(f"wrote the homework to {folder}; begin with its README.md")


def write(folder, left_out=tuple(QUESTIONS), micro=False):
    """The project in ``folder``, without the bodies of what these questions ask for; with ``micro`` also the page,
    without its formulas.

    Of the tests, those that speak of docs/ or the README stay behind, and the benchmarks, which have it all in PyTorch.
    """
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    behind = [name for name, text in tests.items() if '"docs' in text or "README" in text]
    behind += [] if micro else [Path(file).name for file in MICRO]
    ignored = shutil.ignore_patterns("__pycache__", "benchmarks", "mutation.py", "*.js", *behind)
    questions = {}  # file -> what is left out of it
    for question in left_out:
        for file, names in QUESTIONS[question]:
            questions.setdefault(ROOT / file, []).append((names, question))

    def copy(source, target):  # never the answers first, and not that a file may only be read
        source = Path(source)
        place = source.relative_to(ROOT).as_posix()
        if place in MICRO:
            text = source.read_text(encoding="utf-8")
            text = without_formulas(text) if place == MICRO[0] else text.partition(NOT_HANDED_OUT)[0].rstrip() + "\n"
            Path(target).write_text(text, encoding="utf-8")
            return
        if source not in questions:
            shutil.copyfile(source, target)
            return
        text = source.read_text(encoding="utf-8")
        for names, question in questions[source]:
            text = without_bodies(text, names, question)
        Path(target).write_text(text, encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored, copy_function=copy)
        else:
            copy(source, folder / name)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(path.stat().st_mode | 0o700)  # copytree makes it as its source is
    (folder / "README.md").write_text(readme(micro), encoding="utf-8")


def without_bodies(text, names, question):
    """The source with one line in place of the body of each of these functions, below its docstring."""
    lines = text.splitlines()
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    for function in sorted((functions[name] for name in names), key=lambda node: -node.lineno):
        first, last = function.body[0], function.end_lineno
        kept = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
        lines[kept:last] = [f'    raise NotImplementedError("question {question}: write {function.name}")']
    return "\n".join(lines) + "\n"


def without_formulas(text):
    """micro.py with one line in place of each formula."""
    lines = text.splitlines()
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    for number, (what, places) in FORMULAS.items():
        for name, starts in places.items():
            for i in range(functions[name].lineno, functions[name].end_lineno):
                code = lines[i].lstrip()
                if code.startswith(tuple(starts)):
                    indent = lines[i][: -len(code)]
                    lines[i] = f'{indent}raise NotImplementedError("formula {number}: {what}")'
    return "\n".join(lines) + "\n"


def readme(micro):
    text = (ROOT / "docs" / "homework.md").read_text(encoding="utf-8")
    asked = re.findall(r"^### Question (\d+): .*\n\n\*Asked \((\d+) points?\):\* (.*(?:\n.+)*)", text, re.M)
    rows = ["| | points | what is asked | what to write |", "|---|---|---|---|"]
    for question, points, what in asked:
        parts = (
            f"`{Path(file).name}`: " + ", ".join(f"`{name}`" for name in names)
            for file, names in QUESTIONS.get(int(question), [])
        )
        rows.append(f"| {question} | {points} | {' '.join(what.split())} | {'; '.join(parts)} |")
    formulas = "\n".join(f"{number}. {what}" for number, (what, _) in FORMULAS.items())
    return README.format(
        points=sum(int(points) for _, points, _ in asked),
        micro=MICRO_README.format(formulas=formulas) if micro else "",
        table="\n".join(rows),
    )


if __name__ == "__main__":
    cli.run(main, "stopped: the folder is not whole")
