"""Mutation testing: small bugs planted one at a time, each against the tests that run its line.

    make mutants                                    # at most 40 minutes on two cores
    python tests/mutants.py train/optim.py          # one file
    python tests/mutants.py sft.py --tests tests/test_flags.py tests/test_logged.py

The bugs are cosmic-ray's (another operator, number, comparison, …) and two kinds more: a call or
a keyword argument left out. They are planted inside functions, in copies of the repository, in
random order until the time is up. out/mutants.txt lists those that no test noticed.
"""

import argparse
import ast
import contextlib
import difflib
import multiprocessing
import os
import pickle
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import coverage
import hypothesis  # noqa: F401, imported once here, not again for each bug
import pytest
import torch  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
FILES = ["pretrain.py", "sft.py", "reward.py", "ppo.py"]
for folder in ("train", "world", "lab"):
    FILES += [f"{folder}/{path.name}" for path in sorted((ROOT / folder).glob("[a-z]*.py"))]

# Of cosmic-ray's a dozen for each sign one or two: the others find the same holes.
SIGNS = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr"
COMPARISONS = "Lt_LtE Lt_Gt LtE_Lt Gt_GtE Gt_Lt GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
OPERATORS = [f"ReplaceBinaryOperator_{name}" for name in SIGNS.split()]
OPERATORS += [f"ReplaceComparisonOperator_{name}" for name in COMPARISONS.split()]
OPERATORS += [f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")]
OPERATORS += ["AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "NumberReplacer"]
OPERATORS += ["ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ZeroIterationForLoop"]
OPERATORS += ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer"]

# They edit the code themselves, or read its text, or run nothing of what is mutated.
LEFT_OUT = ["planted_bugs", "layout", "bench", "fetch", "convert"]
LONGEST = 60  # seconds that the tests of one bug may take without it; the rest is left out


class Mutant(NamedTuple):
    file: str
    line: int
    operator: str
    occurrence: int


# ---- the bugs


def left_out(source):
    """(line, source) without a call whose result nobody takes, a `+=` or a keyword argument."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = b"".join(lines)
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        is_keyword = isinstance(node, ast.keyword) and node.arg
        if is_call or is_keyword or isinstance(node, ast.AugAssign):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            rest = re.sub(rb"^\s*,", b"", text[end:]) if is_keyword else text[end:]
            new = text[:start] + (b"" if is_keyword else b"pass") + rest
            yield node.lineno, new.decode()


def first_lines(source):
    """{line of a function's body: the body's first line}, of the innermost function."""
    first = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for line in range(node.body[0].lineno, node.end_lineno + 1):
                first[line] = node.body[0].lineno
    return first


def find_mutants(file):
    source = (ROOT / file).read_text()
    tree, lines = get_ast(source), [("left out", [line for line, _ in left_out(source)])]
    for name in OPERATORS:
        operator, its = get_operator(f"core/{name}")(), []
        for node in ast_nodes(tree):
            its += [start[0] for start, _ in operator.mutation_positions(node)]
        lines.append((name, its))
    inside, found = first_lines(source), []
    for name, its in lines:
        for occurrence, line in enumerate(its):
            if line in inside:
                found.append(Mutant(file, line, name, occurrence))
    return found


def mutate(mutant, source):
    """The file's source with the bug."""
    if mutant.operator == "left out":
        return list(left_out(source))[mutant.occurrence][1]
    return mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)


# ---- the tests


class Contexts:
    """Tells coverage which test runs. What a module's fixture runs, all its tests run."""

    def __init__(self, cover):
        self.cover, self.seconds, self.failed, self.running = cover, {}, set(), ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.running, start = item.nodeid, time.time()
        self.cover.switch_context(self.running)
        result = yield
        self.seconds[item.nodeid] = time.time() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope != "function":
            self.cover.switch_context(self.running.split("::")[0])
        result = yield
        self.cover.switch_context(self.running)
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def measure(files, tests):
    """({file: {line: contexts}}, {test: seconds}, failed tests)."""
    cover = coverage.Coverage(data_file=None, include=[str(Path(file).resolve()) for file in files])
    plugin = Contexts(cover)
    cover.start()
    pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[plugin])
    cover.stop()
    data, contexts = cover.get_data(), {}
    for file in files:
        contexts[file] = data.contexts_by_lineno(str(Path(file).resolve()))
    return contexts, plugin.seconds, plugin.failed


class FirstFailure:
    nodeid = None

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.nodeid:
            self.nodeid = report.nodeid


def first_failure(tests):
    """[the test that fails first, or None]."""
    plugin = FirstFailure()
    code = pytest.main(["-qx", "-p", "no:cacheprovider", *tests], plugins=[plugin])
    return [plugin.nodeid or (f"pytest, which exits with {int(code)}" if code else None)]


# ---- the processes


def in_child(seconds, function, *args):
    """function(*args) in a fork of its own, which imports the project anew; None: no result."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
            sys.path.insert(0, os.getcwd())
            with os.fdopen(sender, "wb") as pipe:
                pickle.dump(function(*args), pipe)
        finally:
            os._exit(0)
    os.close(sender)
    ready = select.select([receiver], [], [], seconds)[0]
    with os.fdopen(receiver, "rb") as pipe:
        content = pipe.read() if ready else b""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pickle.loads(content) if content else None


kills = Counter()  # how many bugs each test has noticed in this worker: those go first


def start_worker(trees):
    os.chdir(trees.get())


def measure_share(task):
    return in_child(3600, measure, *task)


def plant(mutant, source):
    """Writes the file, and removes what Python compiled: it may be as long and as old."""
    path = Path(mutant.file)
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def kill(task):
    """(mutant, what noticed it: a test, the time limit, or None; False: it was not its turn)."""
    mutant, seconds, deadline = task
    if time.time() > deadline:
        return mutant, False
    chosen, total = [], 0.0
    for test in sorted(seconds, key=lambda test: (-kills[test], seconds[test])):
        if not chosen or total + seconds[test] < LONGEST:
            chosen.append(test)
            total += seconds[test]
    original = Path(mutant.file).read_text()
    plant(mutant, mutate(mutant, original))
    result = in_child(20 + 3 * total, first_failure, chosen)
    plant(mutant, original)
    killer = result[0] if result else "the time limit"
    kills[killer] += 1
    return mutant, killer


# ---- all together


def copy_tree(folder):
    ignored = shutil.ignore_patterns(".*", "out", "__pycache__", "mutants.py")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return str(folder)


def tests_that_run(mutant, contexts, seconds):
    """{test: seconds} of those that run the mutant's line, or the nearest line above it."""
    first = first_lines((ROOT / mutant.file).read_text())[mutant.line]
    names = set()
    for line in range(mutant.line, first - 1, -1):
        names = set(contexts[mutant.file].get(line, [])) - {""}
        if names:
            break
    return {test: s for test, s in seconds.items() if {test, test.split("::")[0]} & names}


def describe(mutant):
    source = (ROOT / mutant.file).read_text()
    before, after = source.splitlines(), mutate(mutant, source).splitlines()
    diff = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
    return "\n".join([f"{mutant.file}:{mutant.line}", *(f"    {line}" for line in diff)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", default=FILES, help="files to plant bugs in")
    parser.add_argument("--tests", nargs="+", help="tests to run; all that are apt")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    tests = args.tests
    if not tests:
        tests = [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py"))]
        tests = [test for test in tests if not any(name in test for name in LEFT_OUT)]

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        trees = context.SimpleQueue()
        for i in range(args.jobs):
            trees.put(copy_tree(Path(folder) / str(i)))
        with context.Pool(args.jobs, start_worker, (trees,)) as pool:
            # which tests run which line
            shares = [(args.files, tests[i :: args.jobs]) for i in range(args.jobs)]
            contexts, seconds = {file: defaultdict(list) for file in args.files}, {}
            for measured in pool.imap_unordered(measure_share, [s for s in shares if s[1]]):
                for file, lines in measured[0].items():
                    for line, names in lines.items():
                        contexts[file][line] += names
                seconds |= {t: s for t, s in measured[1].items() if t not in measured[2]}
                print(*(f"fails without a bug: {test}" for test in measured[2]), sep="\n")

            # plant and test
            planted = [mutant for file in args.files for mutant in find_mutants(file)]
            random.Random(0).shuffle(planted)
            print(f"{len(planted)} bugs, {len(seconds)} tests")
            tasks, results = [], []
            for mutant in planted:
                apt = tests_that_run(mutant, contexts, seconds)
                if apt:
                    tasks.append((mutant, apt, deadline))
                else:
                    results.append((mutant, None))
            for result in pool.imap_unordered(kill, tasks):
                results.append(result)
                print("x" if result[1] is False else "." if result[1] else "S", end="", flush=True)

    # report
    tried = [(mutant, killer) for mutant, killer in results if killer is not False]
    survivors = sorted(mutant for mutant, killer in tried if not killer)
    lines = [f"{len(planted)} bugs, {len(tried)} tried, {len(survivors)} not noticed", ""]
    for file in args.files:
        n = sum(mutant.file == file for mutant, _ in tried)
        alive = sum(mutant.file == file for mutant in survivors)
        if n:
            lines.append(f"{file}: {n - alive} of {n} noticed, {(n - alive) / n:.1%}")
    by = Counter(killer for _, killer in tried if killer)
    lines += ["", *(f"{n} noticed first by {test}" for test, n in by.most_common(20)), ""]
    report = "\n".join([*lines, *map(describe, survivors)])
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "mutants.txt").write_text(report + "\n")
    print("\n" + "\n".join(lines) + "out/mutants.txt")


if __name__ == "__main__":
    main()
