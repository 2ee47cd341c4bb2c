"""Names in the documents are those of the code, effects those of the ablation, and lines can be read in a terminal."""

import importlib
import json
import re
from pathlib import Path

from scratchgen import improved, layers, muon

import numpy as np
import pytest
from conftest import ROOT, script

FILES = [path for folder in ("scratchgen", "tests", "docs", "data", ".ci") for path in (ROOT / folder).rglob("*")]
FILES += [path for path in ROOT.iterdir() if path.suffix in (".py", ".cfg", ".toml", ".md")]
DOCUMENTS = sorted(path for path in FILES if path.suffix == ".md")
NAMES = {part for path in FILES for part in (path.name, path.relative_to(ROOT).as_posix())}
MODULES = {
    path.stem: path
    for path in FILES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in ("tests", "docs")
}
CODE = [path for path in FILES if path.suffix in (".py", ".cfg", ".toml", ".html") and path != Path(__file__)]
WORDS = {
    word
    for path in CODE
    for word in re.findall(r"--[\w-]+|\w+\.(?:json|npz|csv|png|gif)\b|\w+", path.read_text(encoding="utf-8"))
}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def without_blocks(text):
    """A text without blocks of code and of mathematics, and without comments."""
    return re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.DOTALL)


@each_document
def test_no_line_is_longer_than_120(path):
    """But for those that cannot be broken: rows of tables, and a link or a formula alone on its line."""
    for line in without_blocks(path.read_text(encoding="utf-8")).splitlines():
        assert len(line) <= 120 or line.startswith("|") or re.fullmatch(r"!?\[[^]]*\]\(\S+\)\S?|\$[^$]+\$", line), line


@each_document
def test_no_line_begins_with_a_minus_or_a_plus(path):
    """Markdown would take it for the bullet of a list. Our bullets are stars."""
    assert re.findall(r"^ {0,3}[-+] .*", without_blocks(path.read_text(encoding="utf-8")), re.MULTILINE) == []


def unknown_names(text):
    """What stands in backticks and is neither in the code nor a file of ours. Of a name with dots that begins with a
    module of ours each part must be there."""
    for quoted in re.findall(r"`([^`\n]+)`", without_blocks(text)):
        ours = re.sub(r"^(jupyter|uv|sha256sum) .*|question_\d+", "", quoted)
        for name in re.findall(r"--[a-z][\w-]*|[A-Za-z_][\w./-]*\w", ours):
            if name not in NAMES | WORDS and not known(name):
                yield quoted


def known(name):
    first, *rest = name.split(".")
    if "/" in name or "-" in name.lstrip("-"):  # a path of the reader's, or something that is no name
        return not re.match(r"(scratchgen|docs|tests)/|--", name)
    if not rest or first not in MODULES:
        return set(name.split(".")) <= WORDS
    place = importlib.import_module(".".join(MODULES[first].relative_to(ROOT).with_suffix("").parts))
    for part in rest:
        place = getattr(place, part, None)
    return place is not None


@each_document
def test_names_in_backticks_are_in_the_code(path):
    assert list(unknown_names(path.read_text(encoding="utf-8"))) == []


def test_a_name_that_is_not_there_is_noticed():
    wrong = ["vae.encode_all", "Denoser", "--no-such-thing", "docs/abc.md", "np.expp"]
    right = ["vae.mlp_encode", "--guidance 0.5", "docs/figures.py --text", "np.exp", "runs/vae", "samples.png"]
    assert list(unknown_names(" ".join(f"`{name}`" for name in wrong + right))) == wrong


def measured():
    """What docs/ablation.py has measured, {row: {seed: numbers}}."""
    return json.loads((ROOT / "docs" / "ablation.json").read_text(encoding="utf-8"))


def test_the_ladder_is_that_of_the_ablation():
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    with_table = script("docs/ablation.py").with_table
    assert with_table(text, measured()) == text != with_table(text, {}), "its place is found"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (improved.Denoiser.__doc__, ("none", "+ v")),
        (improved.above_black.__doc__, ("+ v", "+ black")),
        (improved.step_weights.__doc__, ("+ black", "+ weights")),
        (muon.__doc__, ("+ weights", "+ muon")),
        (layers.global_block.__doc__, ("+ muon", "+ global")),
        (improved.guided.__doc__, ("+ global", "+ guide")),
        (improved.Groups.__doc__, ("+ guide", "+ groups, the default")),
        (improved.Groups.__doc__, ("+ global", "the default, no guide")),
        ("docs/quality.md", ("+ guide", "+ groups, the default")),
        ("docs/quality.md", ("+ global", "the default, no guide")),
        ("docs/faq.md", ("none", "+ v")),
        ("docs/faq.md", ("the default, no moving average", "+ groups, the default")),
        ("docs/faq.md", ("x_0 in place of v", "+ v")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_an_effect_is_that_of_the_ablation(text, rows):
    """Its Frechet distances are means over seeds, to two digits."""
    before, after = (np.mean([numbers[2] for numbers in measured()[row].values()]) for row in rows)
    before, after = (f"{distance:.{0 if distance >= 9.95 else 1}f}" for distance in (before, after))
    if text.endswith(".md"):
        text = (ROOT / text).read_text(encoding="utf-8")
    effect = rf"distance (of |from )?{re.escape(before)} (->|to|and) {re.escape(after)}(?!\.?\d)"
    assert re.search(effect, " ".join(text.split())), (before, after)
