"""The homework as it is handed out: what is left out, and that each question's tests fail before and pass after."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

handout = script("docs/handout.py")


def passed_and_not(folder, *flags):
    """The tests of the questions that pass in a folder, and those that do not."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", *flags]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) tests/test_homework.py::(\w+)", result.stdout, re.M)
    assert outcomes, result.stdout + result.stderr
    return {name for outcome, name in outcomes if outcome == "PASSED"}, {
        name for outcome, name in outcomes if outcome != "PASSED"
    }


def test_question_by_question_the_tests_turn_green(tmp_path):
    """The bodies are put back in order: the tests of the questions so far pass, those of all others fail."""
    questions = list(handout.QUESTIONS)
    for done in range(len(questions) + 1):
        folder = tmp_path / str(done)
        handout.write(folder, questions[done:])
        passed, failed = passed_and_not(folder, "tests/test_homework.py")
        answered = {name for name in passed | failed if int(name.split("_")[2]) in questions[:done]}
        assert (passed, failed) == (answered, (passed | failed) - answered)
        assert {int(name.split("_")[2]) for name in passed | failed} == set(questions)
    passed, failed = passed_and_not(tmp_path / "0", "-k", "question_7")  # as the README says it
    assert not passed and failed and all(name.startswith("test_question_7_") for name in failed)


def functions_in(path):
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_function_keeps_its_docstring_and_says_which_question_it_is_for(tmp_path):
    handout.write(tmp_path / "homework")
    left_out = 0
    for question, files in handout.QUESTIONS.items():
        for file, names in files:
            whole, handed_out = functions_in(ROOT / file), functions_in(tmp_path / "homework" / file)
            assert whole.keys() == handed_out.keys()
            for name in names:
                before, after = whole[name], handed_out[name]
                assert ast.get_docstring(before) == ast.get_docstring(after) and ast.dump(before.args) == ast.dump(
                    after.args
                )
                assert ast.unparse(after.body[-1]) == f"raise NotImplementedError('question {question}: write {name}')"
                assert len(after.body) == 1 + (ast.get_docstring(before) is not None)
                left_out += 1
    text = "".join(path.read_text() for path in (tmp_path / "homework" / "scratchgen").rglob("*.py"))
    assert text.count("NotImplementedError") == left_out == 20
    # All else is as it was.
    changed = {*handout.MICRO, *(file for files in handout.QUESTIONS.values() for file, _ in files)}
    for path in (ROOT / "scratchgen").rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.as_posix() not in changed:
            assert (tmp_path / "homework" / place).read_bytes() == path.read_bytes()


def test_the_answers_stay_behind(tmp_path):
    handout.write(tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"docs", "homework.md", "figures", "test_answers.py", "benchmarks", "vs_torch.py", "__pycache__"}
    assert {"test_homework.py", "conftest.py", "finite_differences.py", "classifier.npz", "SHA256SUMS"} <= names
    readme = (tmp_path / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+) \| (.*) \|$", readme, re.M)
    assert [int(question) for question, *_ in rows] == list(range(1, 14))
    assert sum(int(points) for _, points, *_ in rows) == 29 and "29 points" in readme
    for question, files in handout.QUESTIONS.items():
        for file, functions in files:
            assert Path(file).name in rows[question - 1][3]
            assert all(f"`{name}`" in rows[question - 1][3] for name in functions)
    assert len(readme.splitlines()) < 60  # one page


# Each of these is a mistake in one of the formulas: a sign, a factor, a transposition, an index.
WRONG = [
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

    def passes(text):
        file.write_text(text)
        command = [sys.executable, "-m", "pytest", "-xq", "--tb=no", "-p", "no:cacheprovider", "tests/test_micro.py"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode in (0, 1), result.stdout + result.stderr
        return result.returncode == 0

    assert not passes(file.read_text())
    assert passes(page)
    assert len(WRONG) >= 10
    for right, wrong in WRONG:
        assert page.count(right) == 1, right
        assert not passes(page.replace(right, wrong)), wrong


def test_without_it_the_page_stays_behind(tmp_path):
    handout.write(tmp_path)
    assert not list(tmp_path.rglob("*micro*")) and "micro" not in (tmp_path / "README.md").read_text()


def test_of_a_read_only_project_the_hand_out_can_be_written_and_changed(tmp_path, monkeypatch):
    """Not by root, who may write everywhere: so what counts are the modes."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("figures", "*.ipynb"))
    for name in handout.COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.gz", "*.npz")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.setattr(handout, "ROOT", root)
    handout.write(tmp_path / "homework")
    written = list((tmp_path / "homework").rglob("*"))
    assert len(written) > 40 and all(path.stat().st_mode & 0o200 for path in written)


def test_a_hand_out_that_is_stopped_has_no_answers_in_it(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handout, "without_bodies", full)
    with pytest.raises(OSError):
        handout.write(tmp_path / "homework")
    for files in handout.QUESTIONS.values():
        for file, _ in files:
            assert not (tmp_path / "homework" / file).exists()


@pytest.mark.parametrize(
    ("folder", "words"), [("full", "expected a new or an empty folder"), (ROOT / "tests" / "x", "outside")]
)
def test_a_folder_that_cannot_be_written_is_refused(folder, words, tmp_path, finish):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    status, stderr = finish(lambda: handout.main([str(tmp_path / folder)]))
    assert status == 2 and words in stderr and stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"] and not (ROOT / "tests" / "x").exists()
