"""Imports run one way, as docs/contributing.md says, and the paper stands alone."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "scratchgen"
FLOORS = [  # from the ground up: a module may import from the floors below its own, and from nowhere else
    {"tree", "machinery.blas", "micro"},
    {"data", "gradients", "optim"},
    {"ops"},
    {"diffusion", "samplers"},
    {"layers", "muon"},
    {"improved", "editing"},
    {"vae", "denoisers"},
    {"machinery.parallel"},
    {"machinery.files"},
    {"machinery.checkpoint", "plots"},
    {"machinery.cli"},
    {"machinery.run"},
    {"trained"},
    {"evaluate.metrics", "evaluate.classifier", "draw"},
    {"evaluate.reports"},
    {"evaluate.__main__"},
    {"run_vae", "run_ddpm"},
    {"docs.ablation", "docs.figures", "docs.handout", "docs.measure_micro", "docs.pack", "docs.predict_x_0"},
    {
        "docs.page",
        "docs.published_protocol",
        "docs.speed",
        "docs.sweeps",
        "docs.toy2d",
        "docs.train_classifier",
        "docs.unet",
    },
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in sorted(floor)}
WINGS = ("machinery", "evaluate")
MODELS = {"ops", "layers", "vae", "denoisers", "diffusion", "improved", "samplers", "editing", "muon", "optim"}
MODELS |= {"trained"}


def sources():
    """Every module by the name it has in FLOORS, with its text; those that only make a folder a package are apart."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files |= {path.stem: path for path in ROOT.glob("run_*.py")}
    files |= {f"docs.{path.stem}": path for path in (ROOT / "docs").glob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items() if not name.endswith("__init__")}


def imports(text):
    """The modules of the project that a text imports, wherever in it, by the names they have in FLOORS."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            # "from scratchgen.machinery import cli" names a module, "from scratchgen.ops import relu" a part of one.
            is_folder = node.module in ("scratchgen", *(f"scratchgen.{wing}" for wing in WINGS))
            found |= {f"{node.module}.{name.name}" for name in node.names} if is_folder else {node.module}
    names = {name.removeprefix("scratchgen.") for name in found if name.startswith("scratchgen.")}
    return names | {name for name in found if name.startswith("run_")}


def upward(name, text):
    """What a module imports from its own floor, from above, or from nowhere that the table knows."""
    return {other for other in imports(text) if FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[name]}


def test_every_module_has_its_floor_and_every_floor_its_modules():
    assert sources().keys() == FLOOR_OF.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)  # none is on two floors


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_go_to_a_lower_floor(name):
    assert upward(name, sources()[name]) == set()


def test_an_import_that_goes_up_is_noticed():
    for name, text, wrong in (
        ("layers", "from scratchgen import ops, muon", "muon"),
        ("machinery.cli", "from scratchgen.machinery import files, run", "machinery.run"),
        ("trained", "from scratchgen.evaluate.metrics import recall", "evaluate.metrics"),
        ("diffusion", "from scratchgen.improved import guided", "improved"),
        ("machinery.files", "def f():\n    import scratchgen.machinery.cli", "machinery.cli"),
        ("machinery.files", "from scratchgen import plots, tree", "plots"),
        ("trained", "import run_vae", "run_vae"),
        ("vae", "from scratchgen import no_such_module", "no_such_module"),
    ):
        assert upward(name, text) == {wrong}


def test_the_paper_does_not_know_what_was_added_to_it():
    assert "improved" not in imports(sources()["diffusion"]) and "improved" not in sources()["diffusion"]
    assert "diffusion" in imports(sources()["improved"])


@pytest.mark.parametrize("name", [name for name in FLOOR_OF if name.startswith("machinery.")])
def test_the_machinery_knows_no_model(name):
    known = MODELS if name == "machinery.parallel" else MODELS | {"gradients"}  # which it computes shard by shard
    assert imports(sources()[name]) & known == set()
