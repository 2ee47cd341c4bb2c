"""Change the mathematics one small thing at a time, and see whether a test notices.

    python tests/mutation.py --every 1            all of some 2,500, in two hours of two cores
    python tests/mutation.py                      every tenth
    python tests/mutation.py --only vae --every 1

A mutant is the package with one change: another sign, comparison or constant, a shifted index, a term, factor or call
left out, a condition turned round. Each is made in a copy of the project and tried by the tests of its module, then by
those of the others, up to the first that fails: then the mutant is killed. What no test notices survives: either a test
is missing, or the change is none, and EQUIVALENT says why. The exit status is 1 if any other survives.

mutmut 3.8 makes no mutant of a function with a decorator, so none of any primitive of ops.py, nor of a constant of a
module, and is told of an equivalent only by a comment in the package. Cosmic Ray 8.7 leaves out no term, factor or
call, and starts Python, NumPy and pytest anew for each mutant, where here, as in mutmut, a process is forked.
"""

import argparse
import ast
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Queue

import pytest
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
MODULES = {  # file -> the tests tried first
    "scratchgen/vae.py": ("vae", "layers", "homework"),
    "scratchgen/diffusion.py": ("diffusion", "homework"),
    "scratchgen/improved.py": ("improved",),
    "scratchgen/denoisers.py": ("denoisers", "layers"),
    "scratchgen/layers.py": ("layers", "denoisers"),
    "scratchgen/samplers.py": ("samplers", "editing"),
    "scratchgen/evaluate/metrics.py": ("metrics", "answers"),
    "scratchgen/optim.py": ("optim",),
    "scratchgen/muon.py": ("muon", "optim"),
    "scratchgen/gradients.py": ("gradients",),
    "scratchgen/tree.py": ("tree", "gradients"),
    "scratchgen/ops.py": ("ops", "layers"),
    "scratchgen/machinery/blas.py": ("blas", "ops"),
    "scratchgen/machinery/parallel.py": ("parallel", "gradients"),
}
FUNCTIONS = {  # of these files, which do other things besides, only what computes, or divides up what is computed
    "scratchgen/machinery/blas.py": {"has_small_kernels", "tile", "product"},
    "scratchgen/machinery/parallel.py": {"map", "divide", "owners", "own"}
    | {"shards", "images_of", "sharded", "in_parallel"},
}
OTHERS = (*(Path(file).stem for file in MODULES), "homework", "answers")  # and then
SECONDS = 300  # for the tests of one mutant

FASTER = "how a product is cut, or its operand laid out, decides on its speed alone"
BROADCAST = "broadcasting gives the same numbers, more slowly"
EQUIVALENT = {  # module, beginning of the change ("" for any), beginning of its line -> why no test can notice it
    ("diffusion", "1.0 -> 1.1", "alpha_bar_before ="): "enters at t = 0 alone, where all that follows is NaN",
    ("vae", "500 -> 501", "def importance_weighted_bound"): "blocks do not matter, which a test says",
    ("diffusion", "above + below", "flip ="): "matters only where above and below are large and of one sign",
    ("diffusion", "0 -> 1", "flip ="): "the same",
    ("diffusion", "x ", "above[x > 1 - half]"): "no grey level lies just there",
    ("samplers", "0.5 -> ", "return 0.5 * math.log"): "a step takes quotients of differences of lambda, no more",
    ("samplers", "0.5 * math.log(alpha_bar[t] / (1 - alpha_bar[t])) -> (math", "return 0.5"): "the same",
    ("layers", "float(gain / inputs) -> ", "w *="): "both are floats already",
    ("layers", "(labels[:, None]", "one_hot ="): "booleans times float32 are float32, more slowly",
    ("denoisers", "28 -> 29", "def init_unet"): "a half and a quarter of either are 14 and 7",
    ("gradients", "0 -> 1", "TRACE ="): "any number will do",
    ("gradients", "False -> True", "outgrads ="): "nothing is ever added to the gradient of the end itself",
    ("gradients", "True -> False", "for "): "both are equally long; strict is there in case they are not",
    ("blas", "K < 32", "if not SMALL_KERNELS or"): FASTER,
    ("blas", "32 -> 33", "if not SMALL_KERNELS or"): FASTER,
    ("blas", "", "limit = min("): FASTER,
    ("blas", "", "sizes ="): FASTER,
    ("blas", "", "transposed ="): FASTER,
    ("blas", "", "if transposed and M > 512"): FASTER,
    ("blas", "", "b = np.ascontiguousarray"): FASTER,
    ("ops", "np.ascontiguousarray", "dk ="): FASTER,
    ("ops", "", "y += along_row(b"): BROADCAST,
    ("ops", "", "return np.repeat("): BROADCAST,
    ("ops", "2 -> 3", "strips ="): "room that no window reaches",
    ("ops", "16 -> 17", "images = slice("): "an image is done twice, with the same result",
    ("parallel", "0 -> 1", "cut = shards("): "a batch has several arrays, of as many images",
}

SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "//",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and",
}  # fmt: skip


def changes(source, functions=None):
    """Every (start, end, text) of a source that makes a mutant: the characters to replace, and by what.

    With ``functions``, only in functions and methods of these names."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node):
        return source.encode()[slice(*span(node))].decode()

    module = ast.parse(source)
    modules = {"np", "math"} | {  # in x.reshape(2) x is an argument, in layers.mlp(x) layers is none
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }

    def of(node, negative, statement):
        match node:
            case ast.BinOp(left, op, right):
                if type(op) in SWAPS:
                    yield f"({text(left)}) {SWAPS[type(op)]} ({text(right)})"
                if isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div):
                    yield f"({text(left)})"
                    yield f"({text(right)})"
            case ast.UnaryOp(ast.USub() | ast.Not(), operand):
                yield f"({text(operand)})"
            case ast.Compare(left, [op], [right]):
                yield f"({text(left)}) {SWAPS[type(op)]} ({text(right)})"
            case ast.BoolOp(op, values):
                yield f" {SWAPS[type(op)]} ".join(f"({text(value)})" for value in values)
            case ast.Constant(bool()):
                yield str(not node.value)
            case ast.Constant(int() | float()):  # -1 is one change, its sign: as a size it means the same as -2
                if not negative:
                    yield repr(node.value + 1 if isinstance(node.value, int) else node.value * 1.1 or 1.0)
            case ast.Subscript(slice=ast.Name() as index):
                yield f"{text(node.value)}[{index.id} - 1]"
            case ast.Call(ast.Attribute(receiver)) if not statement and text(receiver) not in modules:
                yield f"({text(receiver)})"
            case ast.Call(_, [first, *_]) if not statement and not isinstance(first, ast.Starred):
                yield f"({text(first)})"
            case ast.IfExp(test, body, orelse):
                yield f"(({text(orelse)}) if ({text(test)}) else ({text(body)}))"
            case ast.AugAssign() | ast.Expr(ast.Call()):
                yield "pass"

    def visit(node):
        skipped = ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Expr
        for child in ast.iter_child_nodes(node):
            if isinstance(child, skipped) and not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Call)):
                continue
            for new in of(child, isinstance(node, ast.UnaryOp), isinstance(node, ast.Expr)):
                yield *span(child), new
            if isinstance(child, ast.If | ast.While):
                yield *span(child.test), f"not ({text(child.test)})"
            yield from visit(child)

    for node in ast.walk(module) if functions else [module]:
        if node is module and not functions or isinstance(node, ast.FunctionDef) and node.name in functions:
            yield from visit(node)


def mutants(only, every):
    """(file, name, source) of one mutant of every so many, chosen by a hash of its name and in the order of that."""
    chosen = []
    for file in MODULES:
        if only and Path(file).stem not in only:
            continue
        source = (ROOT / file).read_bytes()
        seen = {}
        for start, end, new in changes(source.decode(), FUNCTIONS.get(file)):
            line = source[source.rfind(b"\n", 0, start) + 1 :].split(b"\n")[0].decode().strip()
            old = " ".join(source[start:end].decode().split())
            name = f"{Path(file).stem}: {old} -> {' '.join(new.split())} | {line}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f" ({seen[name]})"
            place = int(hashlib.sha256(name.encode()).hexdigest(), 16)
            if place % every == 0:
                chosen.append((place, file, name, source[:start] + new.encode() + source[end:]))
    return [mutant for _, *mutant in sorted(chosen)]


def why_equivalent(name):
    module, rest = name.split(": ", 1)
    change, line = rest.split(" | ", 1)
    for (of_module, of_change, of_line), reason in EQUIVALENT.items():
        if module == of_module and change.startswith(of_change) and line.startswith(of_line):
            return reason
    return None


class FirstFailure:
    """A plugin of pytest: the name of the first test that failed, or of a file whose import did."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.name = self.name or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def run_tests(copy, groups, answer):
    """In a process of its own: send what the tests in a copy of the project say, the first that fails, or None."""
    os.setpgid(0, 0)  # with all processes that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    found = FirstFailure()
    # That the document shows the code as it is says nothing about the code.
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "not the_code_in_the_document"]
    for tests in groups:
        status = pytest.main([*options, *(f"tests/test_{test}.py" for test in tests)], plugins=[found])
        if status:
            answer.send(found.name or f"pytest ended with {status}")
            return
    answer.send(None)


FORKS = multiprocessing.get_context("forkserver")  # each process is forked from one that has these imported
FORKS.set_forkserver_preload(["autograd.numpy", "matplotlib.figure", "numpy", "pytest", "tqdm"])


def failure(copy, groups, seconds=SECONDS):
    """What these tests in a copy of the project say, one group after the other: the first that fails, or None."""
    answer, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=run_tests, args=(copy, groups, sender))
    process.start()
    sender.close()
    try:
        return answer.recv() if answer.poll(seconds) else f"more than {seconds} s"
    except EOFError:
        return "the process died"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def tried(copies, mutant):
    """What killed a mutant: the first test that fails, or None. Leaves the copy that it took as it was."""
    file, _, source = mutant
    copy = copies.get()
    try:
        (copy / file).write_bytes(source)
        return failure(copy, [MODULES[file], [test for test in OTHERS if test not in MODULES[file]]])
    finally:
        (copy / file).write_bytes((ROOT / file).read_bytes())
        copies.put(copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="such as vae; by default all of them")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="one of N mutants (default: 10)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="mutants tried at a time")
    parser.add_argument("--log", type=Path, default=os.devnull, help="where to write each mutant and what killed it")
    args = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # which scratchgen would set, were NumPy not imported before it
    todo = mutants(args.only, args.every)
    counts = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool, open(args.log, "w") as log:
        copies = Queue()
        for number in range(args.workers):
            copy = Path(folder) / str(number)
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("data", "runs", ".*", "__pycache__"))
            (copy / "data").symlink_to(ROOT / "data")
            copies.put(copy)
        if failed := failure(copy, [{*OTHERS, *sum(MODULES.values(), ())}], 10 * SECONDS):
            sys.exit(f"a test fails without any change: {failed}")
        killers = tqdm(pool.map(partial(tried, copies), todo), total=len(todo))
        for (file, name, _), killer in zip(todo, killers, strict=True):
            reason = None if killer else why_equivalent(name)
            outcome = "killed" if killer else "equivalent" if reason else "survived"
            counts.setdefault(file, Counter())[outcome] += 1
            print(f"{outcome}: {name}\n    {killer or reason or ''}", file=log, flush=True)
            if outcome == "survived":
                tqdm.write(name)
    total = sum(counts.values(), Counter())
    print(f"{'':32}{'mutants':>10}{'killed':>10}{'equivalent':>12}{'surviving':>11}")
    for file, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{file:32}{count.total():10,}{count['killed']:10,}{count['equivalent']:12,}{count['survived']:11,}")
    sys.exit(1 if total["survived"] else 0)


if __name__ == "__main__":
    main()
