"""The README's sessions, run as they stand there, and its links."""

import doctest
import os
import re
import subprocess
import sys

import run_ddpm
import run_vae
from scratchgen import draw, improved

import pytest
from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKER = doctest.OutputChecker()


def block_with(start):
    """The indented block that has this text in its first line, without the indentation."""
    blocks = re.findall(r"(?:^    .*\n)+", README, re.M)
    return re.sub(r"^    ", "", next(b for b in blocks if start in b.splitlines()[0]), flags=re.M)


def test_the_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest(block_with(">>> from scratchgen"), {}, "README.md", None, 0)
    assert len(session.examples) >= 9
    report = []
    failed, _ = doctest.DocTestRunner().run(session, out=report.append)
    assert failed == 0, "".join(report)
    assert (tmp_path / "four.png").exists()


def test_the_debugger_session(tmp_path):
    command, *lines = block_with("python -m pdb").splitlines()
    arguments = command.removeprefix("python ").split()
    arguments[arguments.index("run_vae.py")] = str(ROOT / "run_vae.py")
    steps = []  # [what is typed, what must be printed]
    for line in lines:
        if line.startswith("(Pdb) "):
            steps.append([line.removeprefix("(Pdb) "), ""])
        else:
            steps[-1][1] += line + "\n"
    typed = "".join(f"{step}\n" for step, _ in steps) + "quit\n"
    # On one core, or two, a shard has the 64 images that the session shows; on eight it would have 16.
    one_core = (
        (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if hasattr(os, "sched_setaffinity") else None
    )
    options = {"input": typed, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([sys.executable, *arguments], preexec_fn=one_core, **options)
    answers = result.stdout.split("(Pdb) ")[1:]  # what stands before the first prompt answers nothing
    assert len(answers) > len(steps), result.stdout + result.stderr
    compared = 0
    for (step, expected), answer in zip(steps, answers, strict=False):
        assert "Error" not in answer and "***" not in answer, (step, answer)
        if expected:
            compared += 1
            assert CHECKER.check_output(expected, answer, doctest.ELLIPSIS), f"{step}:\n{answer}\nnot\n{expected}"
    assert compared >= 3


def test_the_line_to_break_at_is_behind_the_gradient():
    number = int(re.search(r"`break run_vae.py:(\d+)`", README)[1])
    assert "gradient = value_and_grad(" in (ROOT / "run_vae.py").read_text(encoding="utf-8").splitlines()[number - 2]


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_what_a_text_links_to_exists(path):
    """And is committed: a figure that git ignores is there only where it was made."""
    tracked = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for link, place in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        target = (path.parent / link).resolve() if link else path
        if link.startswith("https:"):
            continue
        name = target.relative_to(ROOT).as_posix()
        assert target.exists() and (not tracked or any(f"{file}/".startswith(f"{name}/") for file in tracked)), link
        if place:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert place in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], place


def git(*arguments):
    """What git says, or nothing: the tests may run on a copy that is no repository, or where there is no git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout if result.returncode == 0 else ""


PARSERS = {
    "run_vae.py": run_vae.parse_arguments,
    "run_ddpm.py": run_ddpm.parse_arguments,
    "-m scratchgen.draw": draw.parse_arguments,
    "docs/handout.py": script("docs/handout.py").parse_arguments,
}


def test_the_commands_and_flags_that_the_readme_names_are_understood(runs, capsys):
    commands = re.findall(r"python (?:-m pdb -- )?(-m scratchgen\.draw|\S+\.py)((?: [\w./-]+)*)", README)
    assert {program for program, _ in commands} == {*PARSERS, "scratchgen/micro.py"}
    for program, flags in commands:
        if program in PARSERS:
            PARSERS[program](flags.replace(" runs/ddpm", f" {runs / 'ddpm'}").split())
    known = ""
    for parse in (run_vae.parse_arguments, run_ddpm.parse_arguments, draw.parse_arguments):
        with pytest.raises(SystemExit):
            parse(["--help"])
        known += capsys.readouterr().out
    named = re.findall(r"`(--[\w-]+)([^`]*)`", README)
    assert len(named) > 8 and all(re.search(rf"{flag}\b", known) for flag, _ in named)
    draw.parse_arguments(["--class", re.search(r"`--class (\w+)`", README)[1]])


def test_what_the_readme_says_of_defaults_is_so():
    by_default = run_ddpm.parse_arguments([])
    assert "`run_ddpm.py` makes seven additions" in README and len(by_default.additions) == len(improved.ADDITIONS) == 7
    assert f"T is {by_default.T}, and the U-Net" in README
    assert f"one of {improved.GROUPS} groups" in README and f"draws {draw.parse_arguments([]).n} garments" in README
    assert run_ddpm.parse_arguments(["--additions", "none"]).additions == []


def test_a_run_makes_what_the_table_of_the_readme_lists(runs):
    """But for `classes.png`, of a run with --classes."""
    table = README[README.index("| `samples.png`") : README.index("Ctrl-C")]
    for row in re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.M):
        for name in set(re.findall(r"`([\w.]+)`", row[0])) - {"classes.png"}:
            of_vae = list((runs / "vae").glob(name.replace("I_J", "[0-9]*_[0-9]*")))
            of_ddpm = list((runs / "ddpm").glob(name))
            assert len(of_vae) == 1 or not row[1].startswith("VAE"), name
            assert of_vae or of_ddpm, name
