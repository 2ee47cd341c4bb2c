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
import warnings
from functools import cache

from scratchgen import diffusion, gradients, ops, plots, vae

import nbformat
import numpy as np
import pytest
import test_homework
from conftest import ROOT, script
from homework_variants import RIGHT, WRONG
from nbclient import NotebookClient

handout = script("docs/handout.py")
test_hidden = script("docs/handout/lecturer/test_hidden.py")
STUDENT = ROOT / "docs" / "handout" / "student"
PLACES = [place.split(".") for functions in handout.FUNCTIONS.values() for place in functions]
PACKAGE = {"vae": vae, "diffusion": diffusion, "plots": plots}
BESIDE = {"mlp_encode": ["gaussian", "init_gaussian"]}  # what ours call, and belongs to the answer


def solution(name, module):
    """The package's own function, as text."""
    names = [*BESIDE.get(name, []), name]
    text = "".join(inspect.getsource(inspect.unwrap(getattr(PACKAGE[module], name))) + "\n\n" for name in names)
    return ("MAX_LOG_VAR = 2.0\n\n" if "MAX_LOG_VAR" in text else "") + text


def solved(module, names):
    """A module of the skeleton with the package's own functions in place of some stubs."""
    text = (STUDENT / "scratchgen" / f"{module}.py").read_text(encoding="utf-8")
    for name in names:
        lines = text.splitlines()
        node = handout.functions_in(text)[name]
        lines[node.lineno - 1 : node.end_lineno] = solution(name, module).rstrip().splitlines()
        text = "\n".join(lines) + "\n"
    return text


def solve(folder, questions=tuple(handout.FUNCTIONS)):
    """Answer these questions in a folder that was handed out."""
    for module in PACKAGE:
        names = [name for q in questions for m, name in map(split, handout.FUNCTIONS[q]) if m == module]
        (folder / "scratchgen" / f"{module}.py").write_text(solved(module, names), encoding="utf-8")
    return folder


def split(place):
    return place.split(".")


def module_of(text):
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("answer", None))
    exec(text, vars(module))
    return module


def cases(question, tests=test_homework):
    """The tests of a question, each ready to be called, by name."""
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
        for module in PACKAGE:
            names = [name for q in questions[:done] for m, name in map(split, handout.FUNCTIONS[q]) if m == module]
            monkeypatch.setattr(test_homework, module, module_of(solved(module, names)))
        if done > 0:
            assert failures(questions[done - 1]) == {}
        if done < len(questions):
            said = failures(questions[done])
            assert said.keys() == {name for name, _ in cases(questions[done])}
            assert {type(error) for error in said.values()} == {NotImplementedError}


def test_each_function_has_the_packages_arguments_and_says_what_it_takes_and_returns():
    for question, functions in handout.FUNCTIONS.items():
        for module, name in map(split, functions):
            node = handout.functions_in((STUDENT / "scratchgen" / f"{module}.py").read_text())[name]
            assert len(node.body) == 2
            assert ast.unparse(node.body[1]) == f"raise NotImplementedError('question {question}: write {name}')"
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
    hidden = (ROOT / "docs" / "handout" / "lecturer" / "test_hidden.py").read_text()
    for text in (hidden, (ROOT / "tests" / "test_homework.py").read_text()):
        tests = set(re.findall(r"^def (test_\w+)", text, re.M))
        for question, functions in handout.FUNCTIONS.items():
            for _, name in map(split, functions):
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
        found = {
            f"{where.strip('`')[:-3]}.{name}": float(points) for name, points in re.findall(r"`(\w+)` ([\d.]+)", what)
        }
        assert found == functions
    assert len(readme.splitlines()) < 60  # one page
    questions = (STUDENT / "questions.md").read_text()
    asked = {
        int(n): int(points) for n, points in re.findall(r"^\*\*Question (\d+) \((\d+) points?\)\.\*\*", questions, re.M)
    }
    assert asked == handout.POINTS
    assert re.findall(r"\\tag\{(\d)\}", questions) == list("12345678")
    rubric = (ROOT / "docs" / "handout" / "lecturer" / "rubric.md").read_text()
    by_hand = {int(n): float(points) for n, points in re.findall(r"^\| (\d+) \| ([\d.]+) \| ", rubric, re.M)}
    of_code = {question: sum(functions.values()) for question, functions in handout.FUNCTIONS.items()}
    rest = {question: points - of_code.get(question, 0) for question, points in handout.POINTS.items()}
    assert by_hand == {question: points for question, points in rest.items() if points}
    rubric = " ".join(rubric.split())
    assert f"{sum(of_code.values()):g} of 29" in rubric and f"the {sum(rest.values()):g} others" in rubric


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A hand-out with all answers in it, and with the notebook."""
    folder = tmp_path_factory.mktemp("answered")
    handout.write(folder, notebook=True)
    return solve(folder)


def run(folder, *command, **variables):
    environment = os.environ | {"PYTHONPATH": str(folder), "MPLBACKEND": "agg"} | variables
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_in_its_own_folder_all_tests_pass_and_k_chooses_one_question(answered):
    result = run(answered, "-m", "pytest", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    for question, number in (("1", 0), ("2 or question_12 or question_8", 8)):
        result = run(answered, "-m", "pytest", "--collect-only", "-k", f"question_{question}")
        assert len(re.findall(r"::test_question_", result.stdout)) == number, question


def test_the_run_scripts_train_and_draw(answered, small_data):
    """In one process, on few images, with few steps; and with draws in float64."""
    text = (answered / "scratchgen" / "diffusion.py").read_text()
    (answered / "scratchgen" / "diffusion.py").write_text(text.replace(", dtype=np.float32)", ")"))
    flags = f"['--data', {str(small_data)!r}, '--epochs', '2', '--seed', '3', '--out', 'out']"
    code = "import run_vae, run_ddpm; run_ddpm.T = 6; run_ddpm.TIMES = [6, 2, 0]; "
    code += f"[module.main({flags}) for module in (run_vae, run_ddpm)]"
    result = run(answered, "-c", code)
    solve(answered)
    assert result.returncode == 0, result.stderr
    made = {path.name for path in (answered / "out").iterdir()}
    assert {"loss.png", "samples.png", "reconstructions.png", "trajectory.png"} < made
    assert any(re.fullmatch(r"latents_\d+_\d+.png", name) for name in made)
    for script_name in ("run_vae.py", "run_ddpm.py"):
        result = run(answered, script_name, "--help")
        assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 80
        assert len((answered / script_name).read_text().splitlines()) < 100


# ---------------------------------------------------------------------- what is wrong is refused, what is right is not


def put_in(monkeypatch, question, code):
    """Put the functions of a variant in place of the package's."""
    (module,) = {module for module, _ in map(split, handout.FUNCTIONS[question])}
    space = vars(PACKAGE[module]) | {"op": gradients.op}
    exec(code, space)
    names = [
        name for _, name in map(split, handout.FUNCTIONS[question]) if space[name] is not getattr(PACKAGE[module], name)
    ]
    assert names
    for name in names:
        monkeypatch.setattr(PACKAGE[module], name, space[name])
    return names


WITHOUT_WORDS = set()


@pytest.mark.parametrize(("question", "what", "code"), WRONG, ids=[f"{q} {what}" for q, what, _ in WRONG])
def test_what_is_wrong_is_refused_in_words(question, what, code, monkeypatch):
    """By the tests of the function itself, in one line, unless what it returns cannot even be compared."""
    (name,) = put_in(monkeypatch, question, code)
    error = next(iter(failures(f"{question}_{name}", all_of_them=False).values()))
    if isinstance(error, pytest.fail.Exception):
        assert str(error).startswith(f"{name}: ") and "\n" not in str(error)
    else:
        WITHOUT_WORDS.add(what)


def test_hardly_any_is_refused_without_words():
    assert len(WITHOUT_WORDS) <= 0.05 * len(WRONG), WITHOUT_WORDS


@pytest.mark.parametrize(("question", "what", "code"), RIGHT, ids=[f"{q} {what}" for q, what, _ in RIGHT])
def test_what_is_right_is_accepted(question, what, code, monkeypatch):
    put_in(monkeypatch, question, code)
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


@cache
def solutions():
    return {plain(node) for module, name in PLACES for node in expressions(solution(name, module))}


@cache
def squeezed_solutions():
    texts = {squeezed(ast.unparse(node)) for module, name in PLACES for node in expressions(solution(name, module))}
    return {text for text in texts if len(text) > 15}


def leaks(name, text):
    """What of the answers is in a text."""
    found = {plain(node) for node in expressions(text)} & solutions() if name.endswith(".py") else set()
    flat = squeezed(text)
    found |= {text for text in squeezed_solutions() if text in flat}
    return found | {what for what, words in ANSWERS.items() if re.search(words, flat)}


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed out")
    handout.write(folder, notebook=True)
    return folder


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


def text_of(function):
    return inspect.getsource(inspect.unwrap(function))


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


@pytest.mark.parametrize(("module", "name"), PLACES)
def test_each_answer_is_itself_a_leak(module, name):
    text = solution(name, module)
    assert leaks(f"{module}.py", text) or name in ("init_mlp_vae", "mlp_encode", "mlp_decode", "elbo_terms", "sample")


def arguments():
    """For each function to write, arguments to tell by what it returns whether another one does the same."""
    rng = np.random.default_rng(0)
    schedule = diffusion.make_schedule("linear", 20)
    x, y, z = rng.standard_normal((3, 4, 6, 6, 1))
    t = np.array([2, 5, 11, 19])
    mu, log_var, eps = rng.standard_normal((3, 4, 5))
    return {
        "reparameterise": (mu, log_var, eps),
        "kl_per_dimension": (mu, log_var),
        "bernoulli_log_likelihood": (mu, np.exp(log_var) / (1 + np.exp(log_var))),
        "elbo_terms": (lambda x: (mu, log_var), lambda z: z, (1 / (1 + np.exp(-mu)), eps)),
        "negative_elbo": (lambda x: (mu, log_var), lambda z: z, (1 / (1 + np.exp(-mu)), eps)),
        "make_schedule": ("linear", 20),
        "q_sample": (schedule, x, t, y),
        "prior_kl": (schedule, x),
        "q_posterior": (schedule, x, y, t),
        "gaussian_kl": (x, np.exp(y), z, np.exp(x)),
        "squared_errors": (x, y),
        "simple_loss": (lambda x, t: 0.5 * x, schedule, (x, t, y)),
        "predict_x_0": (schedule, x, t, y),
        "p_sample": (lambda x, t: 0.5 * x, schedule, x, 5, y),
    }


def numbers(answer):
    if isinstance(answer, dict):
        return [number for value in answer.values() for number in numbers(value)]
    if isinstance(answer, (list, tuple)):
        return [number for value in answer for number in numbers(value)]
    return np.ravel(np.asarray(answer, float)).tolist()


def does_the_same(function, args, expected):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = numbers(function(*copy.deepcopy(args)))
    except Exception:
        return False
    return len(found) == len(expected) and np.allclose(found, expected, 1e-4, 1e-6, equal_nan=True)


def solving(modules):
    """The functions of these modules that do what one has to write."""
    functions = {
        f"{module.__name__}.{key}": function
        for module in modules
        for key, function in vars(module).items()
        if inspect.isfunction(function)
    }
    found = []
    for name, args in arguments().items():
        (module,) = {module for module, other in PLACES if other == name}
        expected = numbers(getattr(PACKAGE[module], name)(*copy.deepcopy(args)))
        found += [(name, key) for key, function in functions.items() if does_the_same(function, args, expected)]
    return found


def test_no_function_that_is_handed_out_is_an_answer_under_another_name(handed_out):
    names = [f"scratchgen.{path.stem}" for path in (handed_out / "scratchgen").glob("*.py") if path.stem[0] != "_"]
    names = [name for name in names if name.partition(".")[2] not in ("vae", "plots", "diffusion", "ops")]
    modules = [importlib.import_module(name) for name in (*names, "scratchgen.machinery.blas")]
    modules += [
        module_of((handed_out / "scratchgen" / f"{name}.py").read_text()) for name in ("vae", "diffusion", "ops")
    ]
    assert len(modules) == 10
    assert solving(modules) == []
    # And these would be noticed.
    other = module_of("from scratchgen.diffusion import p_sample as move\n")
    assert solving([other]) == [("p_sample", "answer.move")]
    assert ("bernoulli_log_likelihood", "scratchgen.ops.bernoulli_log_likelihood") in solving([ops])


# ------------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_has_a_cell_for_each_function_and_runs_the_tests_of_each_question(
    handed_out, answered, small_data
):
    """As it is handed out every check fails; with the answers in its cells, and none in the files, all pass."""
    notebook = nbformat.read(handed_out / "homework.ipynb", as_version=4)
    nbformat.validate(notebook)
    stubs = [cell for cell in notebook.cells if "NotImplementedError" in cell.source]
    assert [cell.source.split("(")[0] for cell in stubs] == [f"def {name}" for _, name in PLACES]
    checks = [cell for cell in notebook.cells if cell.source.startswith("check(")]
    assert len(checks) == len(handout.FUNCTIONS)
    for cell in notebook.cells:
        if "main([])" in cell.source:
            cell.source = f"import run_vae; run_vae.main(['--data', {str(small_data)!r}, '--epochs', '1'])"
    del notebook.cells[-1]
    answers = copy.deepcopy(notebook)
    for cell in answers.cells:
        if "NotImplementedError" in cell.source:
            name = cell.source.split("(")[0].removeprefix("def ")
            (module,) = {module for module, other in PLACES if other == name}
            cell.source = "from scratchgen.gradients import op\n" * (module == "vae") + solution(name, module)
            cell.source = "import math\n" * (module == "plots") + cell.source
    del notebook.cells[-1]
    for version, expected in ((notebook, "False"), (answers, "True")):
        client = NotebookClient(version, timeout=120, resources={"metadata": {"path": handed_out}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(handed_out))
            client.execute()
        results = [
            output["data"]["text/plain"]
            for cell in version.cells
            if cell.source.startswith("check(")
            for output in cell.outputs
            if output.output_type == "execute_result"
        ]
        assert results == [expected] * len(handout.FUNCTIONS)
    assert (handed_out / "runs" / "vae" / "samples.png").exists()


# ------------------------------------------------------------------------------------------------------------ grading


def test_grading_counts_what_is_right_question_by_question(answered, tmp_path):
    half = shutil.copytree(
        answered, tmp_path / "half", ignore=shutil.ignore_patterns("data", "out", "tests", "*.ipynb")
    )
    text = (half / "scratchgen" / "diffusion.py").read_text()
    text = text.replace(
        '"alpha_bar": alpha_bar, **factors', '"alpha_bar": alpha_bar * 0, **factors'
    )  # all else needs it
    text = text.replace("0.5 * (ratio - 1", "0.7 * (ratio - 1")
    text = text.replace("posterior_variance", "a_key_of_its_own")  # which goes together with its own schedule only
    (half / "scratchgen" / "diffusion.py").write_text(text)
    (half / "scratchgen" / "plots.py").write_text("def plot_latents(:\n")
    grades = {"full": handout.grade(answered), "half": handout.grade(half)}
    full, of_half = (
        {question: sum(points for points, _ in functions.values()) for question, functions in grades[name].items()}
        for name in ("full", "half")
    )
    assert full == {question: sum(functions.values()) for question, functions in handout.FUNCTIONS.items()}
    assert of_half == full | {6: 0, 7: 0.5, 10: 0}
    assert grades["half"][6]["plot_latents"][1].startswith("plots.py cannot be imported: SyntaxError")
    lines = handout.table(grades).splitlines()
    assert lines[0].split() == ["question", "4", "5", "6", "7", "8", "9", "10", "11", "12", "all"]
    assert lines[2].split()[-1] == lines[1].split()[-1] == f"{sum(full.values()):g}"
    assert float(lines[3].split()[-1]) == sum(of_half.values())
    assert float(lines[4].split()[-1]) == pytest.approx((sum(full.values()) + sum(of_half.values())) / 2, abs=0.1)
    assert any(line.startswith("half, question 10, gaussian_kl: gaussian_kl: expected") for line in lines)
    assert lines[6].startswith("by hand") and "13 (2)" in lines[6] and "7 (1)" in lines[6]


def test_a_crash_or_an_endless_loop_costs_its_question_alone(answered, tmp_path, monkeypatch):
    """One of its functions ends the process, another one never ends, a third is not written."""
    folder = tmp_path / "ends"
    shutil.copytree(answered / "scratchgen", folder / "scratchgen")
    text = (folder / "scratchgen" / "diffusion.py").read_text()
    text = text.replace("    ratio = variance", "    while True:\n        pass\n    ratio = variance")
    text = text.replace('    alpha_bar = schedule["alpha_bar"][-1]', "    import os\n    os._exit(0)")
    text = text.replace("    difference = eps - prediction", "    raise NotImplementedError")
    (folder / "scratchgen" / "diffusion.py").write_text(text)
    monkeypatch.setattr(handout, "LIMIT", 6)
    grades = handout.grade(folder, (7, 8, 9, 10, 11))
    lost = "crashed, or took longer than 6 seconds"
    assert grades == {
        7: {"make_schedule": (0.5, ""), "q_sample": (0.5, "")},
        8: {"prior_kl": (0, lost)},
        9: {"q_posterior": (0.5, "")},
        10: {"gaussian_kl": (0, lost)},
        11: {
            "draw_batch": (2, ""),
            "squared_errors": (0, "NotImplementedError"),
            "simple_loss": (0, "NotImplementedError"),
        },
    }


def test_the_command_grades_each_folder(tmp_path, monkeypatch, capsys):
    whole = {q: {p.partition(".")[2]: (n, "") for p, n in places.items()} for q, places in handout.FUNCTIONS.items()}
    monkeypatch.setattr(handout, "grade", lambda folder: whole)
    for name in ("anna", "bert"):
        (tmp_path / name / "scratchgen").mkdir(parents=True)
    handout.main(["--grade", str(tmp_path / "anna"), str(tmp_path / "bert")])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert rows == ["question", "points", "anna", "bert", "mean", "by"]


def test_a_notebook_is_graded_too(handed_out, tmp_path):
    """Where the files have stubs, and some cell fails."""
    folder = tmp_path / "notebook"
    shutil.copytree(handed_out / "scratchgen", folder / "scratchgen")
    notebook = json.loads((handed_out / "homework.ipynb").read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for name, text in (("prior_kl", solution("prior_kl", "diffusion")), ("gaussian_kl", "1 / 0")):
            if source.startswith(f"def {name}("):
                cell["source"] = text.splitlines(keepends=True)
    (folder / "homework.ipynb").write_text(json.dumps(notebook))
    grades = handout.grade(folder, (8, 9, 10))
    assert [points for functions in grades.values() for points, _ in functions.values()] == [0.5, 0, 0]


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
    file = tmp_path / "scratchgen" / "micro.py"
    lines = [str(n) for n, (_, places) in handout.FORMULAS.items() for starts in places.values() for _ in starts]
    handed_out = file.read_text()
    assert sorted(re.findall(r"NotImplementedError\(.formula (\d)", handed_out)) == lines and len(lines) == 10
    assert len(handed_out.splitlines()) == len(page.splitlines())
    assert not re.search(r"sigma \* eps|sigma\*\*2|alpha_bar\[t\]|W\.T|sigmoid\(logits\) - x", handed_out)
    tests = (tmp_path / "tests" / "test_micro.py").read_text()
    assert "assert_gradient" in tests and "beside the package" not in tests and "elbo_terms" not in tests
    assert "1. the gradient of a layer" in (tmp_path / "README.md").read_text()

    assert len(WRONG_FORMULAS) >= 10 and all(page.count(right) == 1 for right, _ in WRONG_FORMULAS)
    pages = [handed_out, page, *(page.replace(right, wrong) for right, wrong in WRONG_FORMULAS)]
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    result = run(tmp_path, "-c", TRY_PAGES)
    assert result.returncode == 0, result.stderr
    passed = json.loads((tmp_path / "passed.json").read_text())
    assert passed == [False, True, *[False] * len(WRONG_FORMULAS)]


TRY_PAGES = """
import json
import pytest
from scratchgen import micro
passed = []
for page in json.load(open("pages.json")):
    exec(page, vars(micro))
    choice = ["-k", "not copied_anywhere"]  # which trains, in half a minute, and tells nothing of a formula
    status = pytest.main(["-xq", "--tb=no", "-p", "no:cacheprovider", "tests/test_micro.py", *choice])
    assert status in (0, 1), status
    passed.append(status == 0)
json.dump(passed, open("passed.json", "w"))
"""


def test_without_it_the_page_stays_behind(handed_out):
    assert not list(handed_out.rglob("*micro*")) and "micro" not in (handed_out / "README.md").read_text()


def test_of_a_read_only_project_the_hand_out_can_be_written_and_changed(tmp_path, monkeypatch):
    """Not by root, who may write everywhere: so what counts are the modes."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "figures", "*.gz", "*.npz", "runs", ".*")
    shutil.copytree(ROOT, root, ignore=ignored)
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.setattr(handout, "ROOT", root)
    handout.write(tmp_path / "homework", notebook=True, micro=True)
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode | 0o200)  # or pytest could not delete it
    written = list((tmp_path / "homework").rglob("*"))
    assert len(written) > 30 and all(path.stat().st_mode & 0o200 for path in written)


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
