"""The layout that CONTRIBUTING.md describes, and what the Makefile says depends on what."""

import ast
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["utils", "data", "train", "world", "lab", "forks", "bench"]
SCRIPTS = ["model", "pretrain", "sft", "reward", "ppo", "chat", "convert"]
FILES = [ROOT / f"{name}.py" for name in SCRIPTS]
FILES += [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"]

# What a file may import of the project: its own layer, and those below it.
LOWER = {"utils", "data", "model", "train"}
STAGES = {"pretrain", "sft", "reward", "ppo"}
MAY_IMPORT = {
    "utils": {"utils"},
    "data": {"utils", "data"},
    "model": set(),
    "train": LOWER,
    "pretrain": LOWER,
    "sft": LOWER,
    "reward": LOWER,
    "ppo": LOWER | {"reward"},
    "chat": LOWER,
    "convert": LOWER,
    "world": {"utils", "data", "world"},
    "world/label": LOWER | {"world"},
    "lab": LOWER | STAGES | {"world", "world/label", "lab"},
    "forks": LOWER | STAGES | {"forks"},
    "bench": LOWER | STAGES | {"convert", "bench"},
}


def layer(name):
    """The key in MAY_IMPORT of a file."""
    stem = name.removesuffix(".py")
    return stem if stem in MAY_IMPORT else name.split("/")[0]


def imports(name):
    """The files of the project that this one imports anywhere, also within functions."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {f"{module.replace('.', '/')}.py" for module in modules} & set(NAMES)


GRAPH = {name: imports(name) for name in NAMES}


def closure(name):
    """All that a file imports, directly or through others. Itself only if there is a circle."""
    found, rest = set(), [name]
    while rest:
        new = GRAPH[rest.pop()] - found
        found |= new
        rest += new
    return found


def test_the_root_holds_the_seven_scripts_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


def test_imports_point_downwards_only():
    for name, imported in GRAPH.items():
        upwards = {other for other in imported if layer(other) not in MAY_IMPORT[layer(name)]}
        assert not upwards, f"{name} imports {upwards}"


def test_no_files_import_each_other_in_a_circle():
    assert not [name for name in NAMES if name in closure(name)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_in_one_line_what_it_holds(package):
    lines = (ROOT / package / "__init__.py").read_text().splitlines()
    assert len(lines) == 1 and len(ast.literal_eval(lines[0])) > 20


def test_contributing_fits_on_one_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


# ---- the Makefile


def make(*arguments, folder=ROOT, **variables):
    """What make prints, without the flags of a make that runs these tests."""
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    environment |= dict(LC_ALL="C") | variables
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A folder that make takes for a virtual environment with everything installed."""
    folder = tmp_path_factory.mktemp("venv")
    for name in ("ready", "ready-test"):
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def rules(venv):
    """{target: (its prerequisites, the scripts of the project that its recipe runs)} of files."""
    rules, target, phony = {}, None, set()
    for line in make("-pnrR", f"VENV={venv}").splitlines():
        if rule := re.match(r"([^#\s][^:=]*):(?!=) ?(.*)", line):
            target, prerequisites = rule[1], rule[2].split("|")[0].split()
            if target == ".PHONY":
                phony = set(prerequisites)
            rules[target] = set(prerequisites), set()
        elif line.startswith("\t"):
            for module in re.findall(r"\$\(RUN\) (?:-m )?([\w./]+)", line):
                name = f"{module.removesuffix('.py').replace('.', '/')}.py"
                rules[target][1].update({name} & set(NAMES))
    return {target: rule for target, rule in rules.items() if rule[1] and target not in phony}


TARGETS = {
    "out/world/made": "world/generate.py",
    "out/base.pt": "pretrain.py",
    "out/sft.pt": "sft.py",
    "out/world/preferences.jsonl": "world/label.py",
    "out/reward.pt": "reward.py",
    "out/ppo.pt": "ppo.py",
    "out/report.md": "lab/report.py",
}


def test_these_are_the_files_that_make_builds_with_scripts(rules):
    """The world's files beside `made` run the generator only where one of them is missing."""
    scripts = {target: scripts for target, (_, scripts) in rules.items()}
    for target, (prerequisites, _) in rules.items():
        if prerequisites == {"out/world/made"}:
            assert scripts.pop(target) == {"world/generate.py"}
    assert scripts == {target: {script} for target, script in TARGETS.items()}


@pytest.mark.parametrize("target, script", TARGETS.items())
def test_a_rule_names_all_that_its_script_imports_and_nothing_else(rules, target, script):
    prerequisites, _ = rules[target]
    code = {name for name in prerequisites if not name.startswith("out/")}
    code = {name for name in code if not name.endswith("/__init__.py")}
    assert code == {script} | closure(script)


@pytest.mark.parametrize("target, script", TARGETS.items())
def test_a_rule_names_the_files_that_its_script_reads_by_default(rules, target, script):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    defaults = [field.default for field in module.Config.__dataclass_fields__.values()]
    files = {value for value in defaults if re.fullmatch(r"out/.+\.\w+", str(value))}
    assert files - {target} <= rules[target][0]


@pytest.fixture
def built(tmp_path):
    """A copy of the project in which everything is built, all files but the Makefile empty.

    In place of Python stands a program that notes what it is to run, and touches what that writes.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    world = [f"out/world/{name}" for name in ("train.bin", "sft.jsonl", "prompts.jsonl")]
    world.append("out/world/people.jsonl")
    order = [*NAMES, "requirements.txt", "requirements-test.txt", "venv/ready", "venv/ready-test"]
    for time, name in enumerate([*order, *world, *TARGETS], 1000):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    lines = ["#!/bin/sh", 'echo "$*" >>ran', 'case "$*" in', "*world.generate) touch $CHANGED ;;"]
    for target, script in TARGETS.items():
        lines.append(f"*{script.split('/')[-1].removesuffix('.py')}*) touch {target} ;;")
    (tmp_path / "venv/bin").mkdir()
    (tmp_path / "venv/bin/python").write_text("\n".join([*lines, "esac\n"]))
    (tmp_path / "venv/bin/python").chmod(0o755)
    return tmp_path


def touch(path, time=10_000):
    """Makes the file newer than all that was built before."""
    os.utime(path, (time, time))


def what_runs(folder, target="all", changed=()):
    """What make runs, in order. changed: the files that the world's generation would change."""
    (folder / "ran").write_text("")
    names = " ".join(f"out/world/{name}" for name in changed)
    make("VENV=venv", target, folder=folder, CHANGED=names or "ran")
    return (folder / "ran").read_text().replace("-m ", "").split("\n")[:-1]


CHAIN = ["pretrain.py", "sft.py", "world.label", "reward.py", "ppo.py", "lab.report"]


@pytest.mark.parametrize(
    "changed, first",
    [
        ("out/world/train.bin", "pretrain.py"),
        ("pretrain.py", "pretrain.py"),
        ("model.py", "pretrain.py"),
        ("out/world/sft.jsonl", "sft.py"),
        ("sft.py", "sft.py"),
        ("out/world/prompts.jsonl", "world.label"),
        ("out/world/people.jsonl", "world.label"),
        ("world/label.py", "world.label"),
        ("world/grade.py", "world.label"),
        ("reward.py", "reward.py"),
        ("ppo.py", "ppo.py"),
        ("lab/report.py", "lab.report"),
        ("chat.py", None),
        ("forks/dpo.py", None),
    ],
)
def test_a_change_reruns_what_follows_from_it_and_nothing_else(built, changed, first):
    assert what_runs(built) == []
    touch(built / changed)
    assert what_runs(built) == (CHAIN[CHAIN.index(first) :] if first else [])
    assert what_runs(built) == []


@pytest.mark.parametrize(
    "changed, first",
    [
        ([], "world.label"),  # it imports the facts itself
        (["people.jsonl"], "world.label"),
        (["sft.jsonl", "prompts.jsonl"], "sft.py"),
        (["train.bin", "sft.jsonl"], "pretrain.py"),
    ],
)
def test_a_change_to_the_facts_retrains_the_base_only_if_it_changes_the_text(built, changed, first):
    """The world's files keep their times where their content stays the same."""
    touch(built / "world/facts.py")
    base = ["pretrain.py"] if "train.bin" in changed else []
    assert what_runs(built, "out/base.pt", changed) == ["world.generate", *base]
    rest = CHAIN[CHAIN.index(first) :]
    assert what_runs(built) == rest[len(base) :]
    assert what_runs(built) == []
