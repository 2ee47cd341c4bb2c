"""The homework as it is handed out: that it can be done, that nothing in it is an answer, and that grading tells right
from wrong.
"""

import ast
import copy
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

from scratchgen import diffusion, gradients, ops, plots, vae
from scratchgen.data import load_fashion_mnist

import nbformat
import numpy as np
import pytest
import test_homework
from conftest import ROOT, script
from homework_variants import PLAIN, STUDENTS, WRONG, edited
from nbclient import NotebookClient

handout = script("docs/handout.py")
test_hidden = script("docs/handout/lecturer/test_hidden.py")
STUDENT = ROOT / "docs" / "handout" / "student"
LECTURER = ROOT / "docs" / "handout" / "lecturer"
PLACES = [place.split(".") for functions in handout.FUNCTIONS.values() for place in functions]
MODULE = {name: module for module, name in PLACES}
QUESTION = {place.split(".")[1]: question for question, functions in handout.FUNCTIONS.items() for place in functions}
PACKAGE = {"vae": vae, "diffusion": diffusion, "plots": plots}


def functions_of(questions):
    return [name for name in QUESTION if QUESTION[name] in questions]


def solved(module, answers):
    """A module of the skeleton with these answers in place of its stubs."""
    text = (STUDENT / "scratchgen" / f"{module}.py").read_text(encoding="utf-8")
    for name, answer in answers.items():
        if MODULE[name] == module:
            lines = text.splitlines()
            node = handout.functions_in(text)[name]
            lines[node.lineno - 1 : node.end_lineno] = answer.strip().splitlines()
            text = "\n".join(lines) + "\n"
    return text


def solve(folder, **others):
    """Answer all questions in a folder that was handed out: the plain answers, but for some."""
    for module in PACKAGE:
        (folder / "scratchgen" / f"{module}.py").write_text(solved(module, PLAIN | others), encoding="utf-8")
    return folder


def module_of(text):
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("answer", None))
    exec(text, vars(module))
    return module


def cases(question, tests=test_homework):
    """The tests of a question, or of a function "4_mlp_encode", each ready to be called, by name."""
    for name, test in list(vars(tests).items()):
        if name.startswith(f"test_question_{question}_"):
            for mark in getattr(test, "pytestmark", [None]):
                for values in mark.args[1] if mark else [()]:
                    arguments = dict(zip(mark.args[0], values, strict=True)) if mark else {}
                    if "rng" in inspect.signature(test).parameters:
                        arguments["rng"] = np.random.default_rng(0)
                    yield name, lambda test=test, arguments=arguments: test(**arguments)


def failures(question, tests=test_homework, all_of_them=True):
    """Test -> what it says, for each that fails, or for the first."""
    said = {}
    for name, case in cases(question, tests):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case()
        except (pytest.fail.Exception, Exception) as error:
            said[name] = error
            if not all_of_them:
                break
    return said


# ----------------------------------------------------------------------------------------------- one can do it as given


def test_question_by_question_the_tests_turn_green(monkeypatch):
    """With the answers to all questions so far, the tests of the last pass, and those of the next fail one and all."""
    questions = list(handout.FUNCTIONS)
    for done in range(len(questions) + 1):
        answers = {name: PLAIN[name] for name in functions_of(questions[:done])}
        for module in PACKAGE:
            monkeypatch.setattr(test_homework, module, module_of(solved(module, answers)))
        if done > 0:
            assert failures(questions[done - 1]) == {}
        if done < len(questions):
            said = failures(questions[done])
            assert said.keys() == {name for name, _ in cases(questions[done])}
            assert {type(error) for error in said.values()} == {NotImplementedError}


def test_each_function_has_the_packages_arguments_and_says_what_it_takes_and_returns():
    for module, name in PLACES:
        node = handout.functions_in((STUDENT / "scratchgen" / f"{module}.py").read_text())[name]
        assert len(node.body) == 2
        assert ast.unparse(node.body[1]) == f"raise NotImplementedError('question {QUESTION[name]}: write {name}')"
        docstring = ast.get_docstring(node)
        assert re.search(r"Returns|as a (generator|dict)|The parameters", docstring), name
        # What ours take besides is optional.
        ours = list(inspect.signature(getattr(PACKAGE[module], name)).parameters.values())
        count = len(node.args.args)
        assert [argument.arg for argument in node.args.args] == [parameter.name for parameter in ours[:count]]
        assert all(parameter.default is not parameter.empty for parameter in ours[count:]), name
        for argument in node.args.args:
            said = docstring + "schedule" * (module == "diffusion")  # which the module's docstring explains
            assert re.search(rf"\b{argument.arg}\b", said), f"{name}: {argument.arg}"


def test_every_function_has_a_test_and_every_test_is_of_a_function():
    for path in (LECTURER / "test_hidden.py", ROOT / "tests" / "test_homework.py"):
        tests = set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
        for name, question in QUESTION.items():
            found = {test for test in tests if test.startswith(f"test_question_{question}_{name}_")}
            assert found, name
            tests -= found
        assert tests == set()


def test_the_readme_and_the_questions_have_the_points_of_the_sheet():
    readme = (STUDENT / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]*) ?\| (.*?) ?\| (.*) \|$", readme, re.M)
    assert {int(row[0]): int(row[1]) for row in rows} == handout.POINTS and sum(handout.POINTS.values()) == 29
    for question, _, of_code, where, what in rows:
        functions = handout.FUNCTIONS.get(int(question), {})
        assert float(of_code or 0) == sum(functions.values()) <= handout.POINTS[int(question)]
        found = {f"{where.strip('`')[:-3]}.{name}": float(n) for name, n in re.findall(r"`(\w+)` ([\d.]+)", what)}
        assert found == functions
    assert len(readme.splitlines()) < 60  # one page
    questions = (STUDENT / "questions.md").read_text()
    asked = re.findall(r"^\*\*Question (\d+) \((\d+) points?\)\.\*\*", questions, re.M)
    assert {int(question): int(points) for question, points in asked} == handout.POINTS
    assert re.findall(r"\\tag\{(\d)\}", questions) == list("12345678")
    rubric = (LECTURER / "rubric.md").read_text()
    by_hand = {int(n): float(points) for n, points in re.findall(r"^\| (\d+) \| ([\d.]+) \| ", rubric, re.M)}
    of_code = {question: sum(functions.values()) for question, functions in handout.FUNCTIONS.items()}
    rest = {question: points - of_code.get(question, 0) for question, points in handout.POINTS.items()}
    assert by_hand == {question: points for question, points in rest.items() if points}
    rubric = " ".join(rubric.split())
    assert f"{sum(of_code.values()):g} of 29" in rubric and f"the {sum(rest.values()):g} others" in rubric


PYTHON = {  # for each piece of LaTeX, in this order; a matrix is a number, too
    r"\bar\alpha_{t-1}": "bar_before",
    r"x_{t-1}": "x_before",
    r"S_2^{-1}": "(1 / S_2)",
    r"\log \det S": "log(S)",
    r"^\top": "",
    r"\det": "",
    r"\mathrm{tr}": "",
    r"\tfrac12": "0.5",
    r"\left": "",
    r"\right": "",
    r"\,": "",
    r"\;": "",
    r"\log ": "log",
    "\\": "",
}


def value(formula, **numbers):
    for latex, python in PYTHON.items():
        formula = formula.replace(latex, python)
    formula = " ".join(formula.split())
    for _ in range(2):  # what is inside comes first
        formula = re.sub(r"sqrt{([^{}]*)}", r"sqrt(\1)", formula)
        formula = re.sub(r"frac{([^{}]*)}{([^{}]*)}", r"((\1) / (\2))", formula)
    formula = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", formula)
    return eval(formula, {"sqrt": np.sqrt, "log": np.log, "N": gaussian, "I": 1, "d": 1}, numbers)


def gaussian(mean, variance):
    return np.stack(np.broadcast_arrays(mean, variance))


def test_the_equations_of_the_questions_are_those_of_our_functions():
    schedule = diffusion.make_schedule("linear", 5)
    t = np.array([3])
    beta, alpha, bar = (schedule[name][3] for name in ("beta", "alpha", "alpha_bar"))
    of_schedule = {"beta_t": beta, "alpha_t": alpha, "baralpha_t": bar, "bar_before": schedule["alpha_bar"][2]}
    x_0, x_t, epsilon, nothing = np.array([0.7, -0.4, 1.3, 0]).reshape(4, 1, 1, 1, 1)
    images = {"x_0": x_0, "x_t": x_t, "x_before": x_t, "epsilon_t": epsilon}
    of_gaussians = {"m": 0.3, "S": 0.6, "m_1": 0.2, "m_2": -0.5, "S_1": 0.9, "S_2": 1.7}
    mean, variance = diffusion.q_posterior(schedule, x_0, x_t, t)
    of_step_t = gaussian(
        diffusion.q_sample(schedule, x_0, t, nothing), diffusion.q_sample(schedule, nothing, t, nothing + 1) ** 2
    )
    questions = (STUDENT / "questions.md").read_text()
    for left, expected in {
        r"q(x_t \mid x_{t-1})": gaussian(np.sqrt(alpha) * x_t, beta),
        r"q(x_t \mid x_0)": of_step_t,
        r"D_{KL}\left(N(m, S) \,\Vert\, N(0, I)\right)": diffusion.gaussian_kl(0.3, 0.6, 0, 1),
        r"\tilde\beta_t": variance,
        r"\tilde\mu_t(x_t, x_0)": mean,
        r"x_t": diffusion.q_sample(schedule, x_0, t, epsilon),
        r"D_{KL}\left(N(m_1, S_1) \,\Vert\, N(m_2, S_2)\right)": diffusion.gaussian_kl(0.2, 0.9, -0.5, 1.7),
    }.items():
        formula = re.search(rf"^{re.escape(left)} = (.*?)\.?(?: \\tag\{{\d\}})?\n```", questions, re.M | re.S)[1]
        found = value(formula, **of_schedule, **images, **of_gaussians)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=left)


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed out")
    handout.write(folder, notebook=True)
    return folder


@pytest.fixture(scope="module")
def answered(handed_out, tmp_path_factory):
    """The same with all answers in its files, and without the notebook."""
    folder = tmp_path_factory.mktemp("answered")
    shutil.copytree(handed_out, folder, ignore=shutil.ignore_patterns("*.ipynb"), dirs_exist_ok=True)
    return solve(folder)


def test_what_is_handed_out_is_installed_with_all_that_it_imports(handed_out):
    files = [*handed_out.glob("run_*.py"), *handed_out.glob("scratchgen/**/*.py")]
    imported = re.findall(
        r"^(?:import|from) (\w+)", "\n".join(path.read_text(encoding="utf-8") for path in files), re.M
    )
    (dependencies,) = re.findall(r"^dependencies = (.*)", (handed_out / "pyproject.toml").read_text(), re.M)
    assert {*re.findall(r'"(\w+)', dependencies)} == {*imported} - {"scratchgen"} - sys.stdlib_module_names


def run(folder, code):
    environment = os.environ | {"PYTHONPATH": str(folder), "MPLBACKEND": "agg", "COLUMNS": "80"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


IN_ITS_FOLDER = """
import json, runpy, sys
import pytest
from matplotlib.figure import Figure
import run_ddpm, run_vae
from scratchgen import diffusion, vae
print([int(pytest.main(["-vvk", k])) for k in ("question_1", "question_2 or question_12 or question_8")])
shown = {}
def savefig(figure, path):
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    images = [[image.get_array().tolist(), *image.get_clim()] for each in figure.axes for image in each.images]
    shown[path.name] = lines, images, [axes.get_title() for axes in figure.axes]
Figure.savefig = savefig
run_ddpm.T, run_ddpm.TIMES = 6, [6, 2, 0]
generate, codes = vae.generate, []
vae.generate = lambda decode, z: codes.append(z) or generate(decode, z)
eps_theta_of, weights = run_ddpm.eps_theta_of, []
run_ddpm.eps_theta_of = lambda params: weights.append(params) or eps_theta_of(params)
sample = diffusion.sample
def sample_in_place(eps_theta, schedule, x_T, rng):
    for t, x_T[:] in sample(eps_theta, schedule, x_T, rng):
        yield t, x_T
diffusion.sample = sample_in_place
for module, flags in ((run_vae, SEED_4), (run_vae, SEED_3), (run_ddpm, SEED_3)):
    module.main(flags)
    shown[f"{module.__name__} {flags[-1]}"] = shown["samples.png"], shown["loss.png"][0]
shown["codes"] = [float(z.std()) for z in codes if len(z) == 100 and z[0].all()]
shown["as in the test"] = all(params is weights[-1] for params in weights[-5:])
json.dump(shown, open("shown.json", "w"))
for name in ("run_vae.py", "run_ddpm.py"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit:
        pass
"""


@pytest.fixture(scope="module")
def printed(answered, small_data):
    """What the tests and the run scripts print there, in one process; on few images, with few steps."""
    seeds = [f"['--data', {str(small_data)!r}, '--epochs', '2', '--out', 'out', '--seed', '{seed}']" for seed in (3, 4)]
    return run(answered, IN_ITS_FOLDER.replace("SEED_3", seeds[0]).replace("SEED_4", seeds[1]))


def test_in_its_own_folder_k_chooses_questions_and_their_tests_pass(printed):
    """All tests pass there, too: the cells of the notebook run them, below."""
    assert "\n[5, 0]\n" in printed  # no tests of question 1, and all of the others passed
    chosen = re.findall(r"::test_question_(\d+)_\w+ PASSED", printed)
    assert chosen == [n for n in ("8", "12") for _ in cases(n)] and len(chosen) == 8


def test_the_run_scripts_train_and_draw_what_they_print(printed, answered, small_data):
    shown = json.loads((answered / "shown.json").read_text())
    losses = re.findall(r"^epoch \d: loss ([\d.]+) in training, ([\d.]+) on test images", printed, re.M)
    lines = shown["run_ddpm 3"][1]
    assert [(f"{a:.5f}", f"{b:.5f}") for a, b in zip(lines["train"], lines["test"], strict=True)] == losses
    bounds = re.findall(r"^epoch \d: test ELBO (-[\d.]+) = (-[\d.]+) - ([\d.]+) nats", printed, re.M)
    assert len(losses) == 2 and len(bounds) == 4  # two epochs, and of two seeds
    assert all(float(bound) == pytest.approx(float(a) - float(b), abs=0.02) for bound, a, b in bounds)
    lines = shown["run_vae 3"][1]
    assert [f"{bound:.2f}" for bound in lines["test"]] == [bound for bound, _, _ in bounds[2:]]
    assert lines["train"] == pytest.approx(lines["test"], rel=0.4)
    assert shown["as in the test"]  # four quarters of the test images, and the samples: by the averaged weights
    assert shown["codes"] == pytest.approx([1, 1], abs=0.05)  # what samples are decoded from
    _, ((picture, low, high),), _ = shown["reconstructions.png"]
    with pytest.warns(UserWarning, match="not the published"):
        x_test = load_fashion_mnist(small_data)["test_images"][..., 0] / 255
    picture = np.array(picture, float)
    assert (low, high) == (0, 1) and picture.shape == (8 * 29 - 1, 10 * 29 - 1)
    np.testing.assert_allclose(picture[58:86, 29:57], x_test[11], atol=1e-6)  # a row of images, and a row decoded
    assert np.abs(picture[29:57, 29:57] - x_test[1]).mean() > 0.05
    assert [shown[name][0][1][0][1:] for name in ("run_vae 3", "run_ddpm 3")] == [[0, 1], [-1, 1]]
    assert shown["run_vae 3"][0] != shown["run_vae 4"][0]
    assert shown["trajectory.png"][2] == ["t = 6", "t = 2", "t = 0"]
    assert len({str(picture) for picture, _, _ in shown["trajectory.png"][1]}) == 3
    named = [re.fullmatch(r"latents_(\d+)_(\d+).png", name) for name in shown]
    assert all(int(name[1]) < int(name[2]) < 20 for name in named if name) and any(named)
    help_texts = printed[printed.index("usage: run_vae.py") :]
    assert help_texts.count("usage:") == 2 and max(map(len, help_texts.splitlines())) <= 80
    assert all(len((answered / name).read_text().splitlines()) < 100 for name in ("run_vae.py", "run_ddpm.py"))


# ---------------------------------------------------------------------- what is wrong is refused, what is right is not


def put_in(monkeypatch, code, names):
    """Put these functions of one module, as some code defines them, in place of the package's."""
    (module,) = {MODULE[name] for name in names}
    space = vars(PACKAGE[module]) | {"op": gradients.op}
    exec(code, space)
    for name in names:
        monkeypatch.setattr(PACKAGE[module], name, space[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_words(name):
    """By the tests of the function itself, in one line."""
    for what, edits in WRONG[name].items():
        with pytest.MonkeyPatch.context() as patch:
            put_in(patch, edited(name, *edits), [name])
            (error,) = failures(f"{QUESTION[name]}_{name}", all_of_them=False).values() or [None]
        assert isinstance(error, pytest.fail.Exception), what
        assert str(error).startswith(f"{name}: ") and "\n" not in str(error), what


@pytest.mark.parametrize("student", STUDENTS)
def test_what_is_right_is_accepted(student, monkeypatch):
    """All questions of which some answer is not a plain one."""
    answers = [edited(*answer) if isinstance(answer, tuple) else answer for answer in STUDENTS[student]]
    defines = r"^(def {0}\(|[\w, ]*\b{0}\b[\w, ]* = )"
    own = [{name for name in QUESTION if re.search(defines.format(name), text, re.M)} for text in answers]
    assert all(own)
    for module in PACKAGE:
        names = [name for name in QUESTION if MODULE[name] == module]
        texts = [PLAIN[name] for name in names if name not in set().union(*own)]
        texts += [text for text, of in zip(answers, own, strict=True) if of <= set(names)]
        put_in(monkeypatch, "\n".join(texts), names)
    for question in sorted({QUESTION[name] for name in set().union(*own)}):
        assert failures(question) == failures(question, test_hidden) == {}


# ----------------------------------------------------------------------------------------------- no answer is in it


def plain(node):
    """An expression as text, its variables numbered as they come, so that names make no difference."""
    node = copy.deepcopy(node)
    numbers = {}
    called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and id(part) not in called and part.id != "np":
            part.id = f"v{numbers.setdefault(part.id, len(numbers))}"
    return ast.unparse(node)


def expressions(text):
    """Expressions in Python text that compute something, and have three operations or calls or more."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.expr):
            parts = [
                part for part in ast.walk(node) if isinstance(part, (ast.BinOp, ast.Call, ast.Subscript, ast.UnaryOp))
            ]
            if len(parts) >= 3 and any(isinstance(part, ast.BinOp) for part in parts):
                yield node


def squeezed(text):
    """A formula in Python, in LaTeX or in plain text, without what differs between them."""
    text = re.sub(r"\\bar\\alpha|\\bar\{\\alpha\}", "alphabar", text.lower())
    text = re.sub(r"\*\*2|\^2|\^\{2\}", "²", text)
    text = re.sub(r"\\(left|right|quad|,|;|!)|\b(np|math|anp)\.", "", text)
    return re.sub(r"[\s{}()\[\]\\*_,$\"']", "", text)


ANSWERS = {  # in other forms than the package's, as squeezed text
    "the KL of a code": r"muj?²\+sigmaj?²-1|mu²\+explogvar|mumu\+explogvar|explogvar-1",
    "sigma of log_var": r"exp0?\.5logvar|explogvar/2",
    "the log-likelihood": r"log1\+exp|logaddexp|max(imum)?l(ogits)?0|clipl(ogits)?0",
    "its derivative": r"derivativeisx-p|x-sigmoid|sigmoidlogits-x",
    "question 8": r"-dalphabar|alphabart?\|?\|x0|alphabart?vertx0|dlog1-alphabar|log1p-alphabar",
    "question 9": r"beta(\[?t\]?)?/sqrt1-alphabar|fracbetatsqrt1-alphabar",
    "question 10": r"onlythelastterm|tildemut-mutheta|ratio-1|2tildebetat",
    "the weight of question 10": r"betat?²/2|betat?/2alpha|2alphat1-alphabar|beta2:/2",
    "x_0 of question 12": r"xt-sqrt1-alphabar|xt-atschedulesqrtoneminus",
    "where answers are": r"homework\.md|testanswers|testsamples|rubric|testhidden",
}


def text_of(function):
    return inspect.getsource(inspect.unwrap(function))


@cache
def solutions():
    """Expressions of the package's own functions, with variables numbered, and squeezed."""
    texts = [text_of(getattr(PACKAGE[module], name)) for module, name in PLACES]
    texts += [text_of(vae.gaussian), text_of(vae.init_gaussian)]
    nodes = [node for text in texts for node in expressions(text)]
    flat = {squeezed(ast.unparse(node)) for node in nodes}
    return {plain(node) for node in nodes}, {text for text in flat if len(text) > 15}


@cache
def leaks(name, text):
    """What of the answers is in a text."""
    numbered, squeezed_ones = solutions()
    found = {plain(node) for node in expressions(text)} & numbered if name.endswith(".py") else set()
    flat = squeezed(text)
    found |= {text for text in squeezed_ones if text in flat}
    return found | {what for what, words in ANSWERS.items() if re.search(words, flat)}


def texts_in(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".md", ".toml", ".ipynb")]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_nothing_that_is_handed_out_is_an_answer(handed_out):
    for name, text in texts_in(handed_out).items():
        assert leaks(name, text) == set(), name


def test_no_weights_no_answers_and_no_machinery_are_handed_out(handed_out):
    files = {path.relative_to(handed_out).as_posix() for path in handed_out.rglob("*") if path.is_file()}
    assert {name for name in files if name.endswith((".npz", ".png", ".gif"))} == set()
    assert {name for name in files if name.startswith("tests/")} == {
        f"tests/{name}.py" for name in ("conftest", "finite_differences", "test_homework")
    }
    modules = {name.removeprefix("scratchgen/") for name in files if name.startswith("scratchgen/")}
    ours = {path.relative_to(ROOT / "scratchgen").as_posix() for path in (ROOT / "scratchgen").rglob("*.py")}
    assert len(modules) == 13 and modules < ours
    assert not modules & {"improved.py", "samplers.py", "editing.py", "trained.py", "draw.py", "muon.py", "micro.py"}
    for name in handout.UNCHANGED:
        assert (handed_out / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (handed_out / "docs").exists() and not any("rubric" in name or "hidden" in name for name in files)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        # What an earlier hand-out had in it.
        ("docstring", diffusion.prior_kl.__doc__, "question 8"),
        ("docstring", diffusion.p_sample.__doc__, "question 9"),
        ("docstring", diffusion.gaussian_kl.__doc__, "question 10"),
        ("ops.py", (ROOT / "scratchgen" / "ops.py").read_text(), "its derivative"),
        ("ops.py", (ROOT / "scratchgen" / "ops.py").read_text(), "the log-likelihood"),
        ("diffusion.py", text_of(diffusion.bound_weights), "the weight of question 10"),
        (
            "test_homework.py",
            '"""The code that the homework asks for; docs/homework.md has the answers."""',
            "where answers are",
        ),
        # Other ways to write them.
        ("a.md", "$\\tfrac12 \\sum_j (\\mu_j^2 + \\sigma_j^2 - 1 - \\log \\sigma_j^2)$", "the KL of a code"),
        ("a.md", "mean: \\frac{\\beta_t}{\\sqrt{1 - \\bar\\alpha_t}} \\epsilon", "question 9"),
        ("a.py", "def other(a, b, c):\n    return b + np.exp(0.5 * c) * a", "v0 + np.exp(0.5 * v2) * v1"),
        ("a.py", "def f(m, s):\n    return 0.5 * (m * m + np.exp(s) - 1 - s)", "0.5 * (v1 * v1 + np.exp(v0) - 1 - v0)"),
        (
            "a.py",
            "def f(s, n, r):\n    return r.integers(1, s['T'] + 1, size=len(n))",
            "v0.integers(1, v1['T'] + 1, size=len(v2))",
        ),
    ],
)
def test_a_leak_is_noticed(name, text, what):
    assert what in leaks(name, text)


def test_each_answer_is_itself_a_leak():
    for module, name in PLACES:
        if name not in ("init_mlp_vae", "mlp_encode", "mlp_decode", "elbo_terms", "sample"):
            assert leaks("a.py", text_of(getattr(PACKAGE[module], name))), name


def solving(modules):
    """The functions of these modules that pass the tests of a function that one has to write."""
    found = []
    functions = {(module.__name__, key): f for module in modules for key, f in vars(module).items()}
    for name in set(QUESTION) - {"init_mlp_vae", "mlp_encode", "mlp_decode", "plot_latents", "sample"}:
        for (module, key), function in functions.items():
            if inspect.isfunction(function):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(PACKAGE[MODULE[name]], name, function)
                    if not failures(f"{QUESTION[name]}_{name}", all_of_them=False):
                        found.append((name, f"{module}.{key}"))
    return found


def test_no_function_that_is_handed_out_is_an_answer_under_another_name(handed_out):
    names = [f"scratchgen.{path.stem}" for path in (handed_out / "scratchgen").glob("*.py") if path.stem[0] != "_"]
    names = [name for name in names if name.partition(".")[2] not in ("vae", "plots", "diffusion", "ops")]
    modules = [importlib.import_module(name) for name in (*names, "scratchgen.machinery.blas")]
    ours = ("vae", "diffusion", "ops")
    modules += [module_of((handed_out / "scratchgen" / f"{name}.py").read_text()) for name in ours]
    assert len(modules) == 10
    assert solving(modules) == []
    # And these would be noticed.
    other = module_of("from scratchgen.diffusion import p_sample as move\n")
    assert solving([other]) == [("p_sample", "answer.move")]
    assert ("bernoulli_log_likelihood", "scratchgen.ops.bernoulli_log_likelihood") in solving([ops])


# ------------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_has_a_cell_for_each_function_and_runs_the_tests_of_each_question(
    handed_out, small_data, tmp_path, monkeypatch
):
    """In one kernel: as it is handed out the checks fail; then, with the answers in its cells, all pass."""
    notebook = nbformat.read(handed_out / "homework.ipynb", as_version=4)
    nbformat.validate(notebook)
    *cells, train_vae, train_ddpm = notebook.cells
    assert "run_vae.main([])" in train_vae.source and "run_ddpm.main([])" in train_ddpm.source
    stubs = [cell for cell in cells if "NotImplementedError" in cell.source]
    assert [cell.source.split("(")[0] for cell in stubs] == [f"def {name}" for _, name in PLACES]
    checks = [cell.source for cell in cells if cell.source.startswith("check(")]
    assert checks == [f"check({question}, globals())" for question in handout.FUNCTIONS]
    again = copy.deepcopy(cells)
    cells = [cell for cell in cells if cell.source not in checks[1:-1]]  # two of them tell
    for cell in again:
        cell.id += "-again"
        if "NotImplementedError" in cell.source:
            cell.source = PLAIN[cell.source.split("(")[0].removeprefix("def ")]
            if "def bernoulli_log_likelihood" in cell.source:
                cell.source = STUDENTS["by hand, image by image"][1]  # decorated
    flags = ["--data", str(small_data), "--epochs", "1", "--out", str(tmp_path / "vae")]
    train_vae.source = train_vae.source.replace("[]", str(flags))
    notebook.cells = [*cells, *again, train_vae]
    monkeypatch.setenv("PYTHONPATH", str(handed_out))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": handed_out}}).execute()
    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.source.startswith("check(")
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert results == ["False"] * 2 + ["True"] * len(checks)
    assert (tmp_path / "vae" / "samples.png").exists()


# ------------------------------------------------------------------------------------------------------------ grading


def points(grades):
    return {question: [points for points, _ in functions.values()] for question, functions in grades.items()}


def test_grading_counts_what_is_right_function_by_function(answered, tmp_path):
    """Whatever the others are: wrong, not written, not to be imported, one that ends the process. Some are in cells."""
    made_otherwise = edited("make_schedule", '"alpha_bar": alpha_bar', '"alpha_bar": 0 * alpha_bar, "mine": alpha_bar')
    student = {
        "negative_elbo": 'def negative_elbo(*args):\n    raise NotImplementedError("question 5")',  # in a cell, below
        "make_schedule": made_otherwise,  # all else needs it
        "prior_kl": "def prior_kl(*args):\n    import os\n    os._exit(0)",
        "q_sample": edited("q_sample", "alpha_bar", "mine"),
        "q_posterior": PLAIN["q_posterior"].replace("alpha_bar", "mine"),  # together with its own schedule only
        "gaussian_kl": edited("gaussian_kl", "0.5", "0.7"),
        "squared_errors": "def squared_errors(*args):\n    raise NotImplementedError",
    }
    shutil.copytree(answered / "scratchgen", tmp_path / "scratchgen")
    solve(tmp_path, **student)
    (tmp_path / "scratchgen" / "plots.py").write_text("def plot_latents(:\n")
    notebook = handout.notebook_of_stubs()
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for name, text in (("negative_elbo", PLAIN["negative_elbo"]), ("q_posterior", "1 / 0")):
            if source.startswith(f"def {name}("):
                cell["source"] = text.splitlines(keepends=True)
    (tmp_path / "homework.ipynb").write_text(json.dumps(notebook))
    grades = handout.grade(tmp_path)
    full = {question: list(functions.values()) for question, functions in handout.FUNCTIONS.items()}
    assert points(grades) == {
        4: full[4],
        5: [0.5],
        6: [0],
        7: [0, 0.5],
        8: [0],
        9: [0.5],
        10: [0],
        11: [2, 0, 0],
        12: full[12],
    }
    assert grades[6]["plot_latents"][1].startswith("plots.py cannot be imported: SyntaxError")
    assert grades[8] == {"prior_kl": (0, "crashed, or took longer than 60 seconds")}
    assert grades[10]["gaussian_kl"][1].startswith("gaussian_kl: expected")
    assert grades[11]["simple_loss"] == grades[11]["squared_errors"] == (0, "NotImplementedError")
    assert grades[4]["mlp_encode"] == (1, "")


def test_an_endless_loop_costs_its_question(answered, tmp_path, monkeypatch):
    shutil.copytree(answered / "scratchgen", tmp_path / "scratchgen")
    solve(tmp_path, prior_kl="def prior_kl(*args):\n    import threading\n    threading.Event().wait()")
    monkeypatch.setattr(handout, "LIMIT", 4)
    began = time.monotonic()
    assert handout.grade(tmp_path, (8,)) == {8: {"prior_kl": (0, "crashed, or took longer than 4 seconds")}}
    assert time.monotonic() - began < 60


def test_the_command_prints_a_table_of_the_folders(tmp_path, monkeypatch, capsys):
    def grade(folder):
        """Full points for Anna and Carla; Bert's question 10 is wrong."""
        full = {q: {p.partition(".")[2]: (n, "") for p, n in places.items()} for q, places in handout.FUNCTIONS.items()}
        return full | ({10: {"gaussian_kl": (0, "expected it")}} if folder.name == "bert" else {})

    monkeypatch.setattr(handout, "grade", grade)
    folders = [tmp_path / name for name in ("anna", "bert", "carla")]
    for folder in folders:
        (folder / "scratchgen").mkdir(parents=True)
    monkeypatch.chdir(folders[2])  # which is graded as "."
    handout.main(["--grade", *map(str, folders[:2]), "."])
    lines = capsys.readouterr().out.splitlines()
    names = ("question", "points for code", "anna", "bert", "carla", "mean")
    assert all(line.startswith(f"{name} ") for name, line in zip(names, lines, strict=False))
    numbers_of = {name: line.removeprefix(name).split() for name, line in zip(names, lines, strict=False)}
    of_code = {question: sum(functions.values()) for question, functions in handout.FUNCTIONS.items()}
    assert numbers_of["question"] == [*map(str, of_code), "all"]
    for name, of_10 in (("points for code", 0.5), ("anna", 0.5), ("bert", 0), ("carla", 0.5), ("mean", 1 / 3)):
        numbers = (of_code | {10: of_10}).values()
        assert numbers_of[name] == [f"{n:.4g}" for n in (*numbers, sum(numbers))], name
    rest = [f"{q} ({n - of_code.get(q, 0):g})" for q, n in handout.POINTS.items() if n > of_code.get(q, 0)]
    assert lines[7] == f"by hand, with docs/handout/lecturer/rubric.md: {', '.join(rest)}"
    assert lines[8:] == ["bert, question 10, gaussian_kl: expected it"]

    for name in ("anna", "bert"):  # whose folders have one name
        (tmp_path / name / "ps5" / "scratchgen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    handout.main(["--grade", "anna/ps5", "bert/ps5"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        str(Path("anna", "ps5")),
        str(Path("bert", "ps5")),
    ]


# ------------------------------------------------------------------------------------------- how the folder is written

# Each of these is a mistake in one of the formulas: a sign, a factor, a transposition, an index.
WRONG_FORMULAS = [
    ("x.T @ d_y, d_y.sum(axis=0)", "x.T @ d_y / 2, d_y.sum(axis=0)"),
    ("d_y.sum(axis=0)", "d_y.mean(axis=0)"),
    ("d_y = d_x * (x > 0)", "d_y = d_x"),
    ("(sigmoid(logits) - x) / len(x)", "(x - sigmoid(logits)) / len(x)"),
    ("np.sum(softplus - x * logits)", "np.sum(softplus + x * logits)"),
    ("kl = np.sum(mu**2 + sigma**2 - 1 - log_var) / 2", "kl = np.sum(mu**2 + sigma**2 - 1 - log_var)"),
    ("d_z + mu / len(x)", "d_z - mu / len(x)"),
    ("d_z * sigma * eps / 2", "d_z * sigma * eps"),
    ("(sigma**2 - 1) / 2 / len(x)", "sigma**2 / 2 / len(x)"),
    ("x_0 + np.sqrt(1 - alpha_bar[t]) * eps", "x_0 + (1 - alpha_bar[t]) * eps"),
    ("(x_t - np.sqrt(alpha_bar[t]) * x_0) / np", "(x_t + np.sqrt(alpha_bar[t]) * x_0) / np"),
    ("(1 - alpha_bar[t - 1]) / (1", "(1 - alpha_bar[t]) / (1"),
    ("* eps) / np.sqrt(alpha[t])", "* eps) * np.sqrt(alpha[t])"),
    ("(1 - alpha[t]) / np.sqrt(1 - alpha_bar[t]) * eps", "(1 - alpha[t]) / (1 - alpha_bar[t]) * eps"),
    ("v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)", "v_hat = m, v"),
    ("h[:, :D], h[:, D:]", "h[:, D:], h[:, :D]"),
]


def test_the_page_is_handed_out_without_its_formulas_and_its_tests_notice_each_mistake(tmp_path):
    """Whole it passes them; without a formula, or with a wrong one, it does not."""
    page = (ROOT / "scratchgen" / "micro.py").read_text()
    handout.write(tmp_path, micro=True)
    handed_out = (tmp_path / "scratchgen" / "micro.py").read_text()
    lines = [str(n) for n, (_, places) in handout.FORMULAS.items() for starts in places.values() for _ in starts]
    assert sorted(re.findall(r"NotImplementedError\(.formula (\d)", handed_out)) == lines and len(lines) == 10
    assert len(handed_out.splitlines()) == len(page.splitlines())
    assert not re.search(r"sigma \* eps|sigma\*\*2|alpha_bar\[t\]|W\.T|sigmoid\(logits\) - x", handed_out)
    tests = (tmp_path / "tests" / "test_micro.py").read_text()
    assert "assert_gradient" in tests and "beside the package" not in tests and "elbo_terms" not in tests
    assert "1. the gradient of a layer" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.rglob("*.ipynb")) and not (tmp_path / "check.py").exists()

    assert all(page.count(right) == 1 for right, _ in WRONG_FORMULAS)
    pages = [handed_out, page, *(page.replace(right, wrong) for right, wrong in WRONG_FORMULAS)]
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    run(tmp_path, TRY_PAGES)
    passed = json.loads((tmp_path / "passed.json").read_text())
    assert passed == [False, True, *[False] * len(WRONG_FORMULAS)]


TRY_PAGES = """
import json
import pytest
from scratchgen import micro
passed = []
for page in json.load(open("pages.json")):
    exec(page, vars(micro))
    choice = ["-k", "not copied_anywhere"]  # which trains, and tells nothing of a formula
    status = pytest.main(["-xq", "--tb=no", "-p", "no:cacheprovider", "tests/test_micro.py", *choice])
    assert status in (0, 1), status
    passed.append(status == 0)
json.dump(passed, open("passed.json", "w"))
"""


def test_without_it_the_page_stays_behind(handed_out):
    assert not list(handed_out.rglob("*micro*")) and "micro" not in (handed_out / "README.md").read_text()


def test_each_flag_reaches_what_it_is_for(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(handout, "write", lambda folder, notebook, micro: written.append((folder, notebook, micro)))
    for flags in ([], ["--notebook"], ["--micro"], ["--notebook", "--micro"]):
        handout.main([*flags, str(tmp_path / "new")])
        assert written[-1] == (tmp_path / "new", "--notebook" in flags, "--micro" in flags)
        assert f"wrote the homework to {tmp_path / 'new'}" in capsys.readouterr().out


def test_of_a_read_only_project_the_hand_out_can_be_written_and_changed(tmp_path, monkeypatch):
    """Not by root, who may write everywhere: so what counts are the modes."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "figures", "*.gz", "*.npz", "runs", ".*")
    shutil.copytree(ROOT, root, ignore=ignored)
    (root / "docs/handout/student/scratchgen/__pycache__").mkdir()  # of a lecturer who tried it
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.setattr(handout, "ROOT", root)
    handout.write(tmp_path / "homework", notebook=True, micro=True)
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode | 0o200)  # or pytest could not delete it
    written = list((tmp_path / "homework").rglob("*"))
    assert len(written) > 30 and all(path.stat().st_mode & 0o200 for path in written)
    assert "__pycache__" not in [path.name for path in written]


@pytest.mark.parametrize("name", ["without_last_section", "notebook_of_stubs", "without_formulas"])
def test_a_hand_out_that_is_stopped_has_no_answers_in_it(name, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handout, name, full)
    with pytest.raises(OSError):
        handout.write(tmp_path / "homework", notebook=True, micro=True)
    for file, text in texts_in(tmp_path / "homework").items():
        assert leaks(file, text) == set(), file


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["full"], "full: expected a new or an empty folder"),
        ([ROOT / "tests" / "x"], "outside"),
        ([], "expected either one FOLDER"),
        (["new", "--grade", "full"], "expected either one FOLDER"),
        (["--grade", "full"], "full: expected a folder with the homework"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words, said, tmp_path, finish, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    status, stderr = finish(lambda: handout.main([str(word) for word in words]))
    assert status == 2 and said in stderr and stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"] and not (ROOT / "tests" / "x").exists()


def test_the_help_fits_80_columns(capsys):
    with pytest.raises(SystemExit):
        handout.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
