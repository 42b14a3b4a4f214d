"""The lessons in docs/lessons/: their links to the code, their form, and their things to try.

PYTHONPATH=tests python -m tests.test_lessons    # sets the line numbers in the links right
"""

import ast
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from lab import controls, tries
from tests.test_docs import problem

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/lessons"
LESSONS = ["tokenizer", "model", "pretraining", "sft", "reward-model", "ppo", "beyond"]
SECTIONS = ["1. What it is for", "2. The idea", "3. The code", "4. See it"]
SECTIONS += ["5. What was measured", "6. Try it"]
LINK = re.compile(r"\[([\w.]+)\]\(\.\./\.\./([\w/]+\.py)(?:#L(\d+))?\)")
every_lesson = pytest.mark.parametrize("lesson", LESSONS)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def read(lesson):
    return (FOLDER / f"{lesson}.md").read_text(encoding="utf-8")


def definitions(text):
    """{name: its line} of the functions, classes and constants at the top of a file or class."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append(node.lineno)
            if node.decorator_list:  # lineno is that of `def`, below the decorators
                assert text.split("\n")[node.lineno - 1].lstrip().startswith(("def", "class"))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.col_offset == 0:
                found.setdefault(node.targets[0].id, []).append(node.lineno)
    return {name: lines[0] for name, lines in found.items() if len(lines) == 1}


def mended(text):
    """The text with each link to a definition at its line."""

    def at_its_line(match):
        name, file, _ = match.groups()
        line = definitions((ROOT / file).read_text(encoding="utf-8")).get(name)
        return f"[{name}](../../{file}#L{line})"

    return LINK.sub(at_its_line, text)


# ---- the pages


@every_lesson
def test_links_lead_to_the_line_of_the_definition(lesson):
    """`PYTHONPATH=tests python -m tests.test_lessons` mends them."""
    text = read(lesson)
    assert len(LINK.findall(text)) >= 5
    assert LINK.findall(text) == LINK.findall(mended(text))
    assert "#LNone" not in text


@every_lesson
def test_all_links_to_code_are_of_that_form(lesson):
    text = read(lesson)
    assert len(re.findall(r"\]\([^)]*\.py", text)) == len(LINK.findall(text))


@every_lesson
def test_a_lesson_has_its_six_sections(lesson):
    assert re.findall(r"^## (.*)$", read(lesson), re.M) == SECTIONS


@every_lesson
def test_a_lesson_shows_a_run_and_a_debugger(lesson):
    see_it = read(lesson).split("## 4. See it")[1].split("## 5.")[0]
    assert "--show" in see_it and "python -m pdb" in see_it
    assert len(re.findall(r"^```", see_it, re.M)) >= 4 and "(Pdb) b " in see_it


@every_lesson
def test_formulas_are_closed(lesson):
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$", "", read(lesson), flags=re.M)
    assert prose.count("$$") % 2 == 0
    formulas = re.findall(r"^\$\$\n((?:.*\n)+?)\$\$$", prose, re.M)
    assert len(formulas) == prose.count("$$") / 2 >= 2
    for formula in formulas:
        assert formula.count("{") == formula.count("}")
        sides = [len(re.findall(rf"\\{side}\b", formula)) for side in ("left", "right")]
        assert sides[0] == sides[1]


def test_the_index_is_short_and_leads_to_all_lessons():
    text = read("README")
    assert len(text.splitlines()) <= 15
    assert re.findall(r"\((\w[\w-]*)\.md\)", text) == LESSONS


@every_lesson
def test_a_lesson_has_its_number_and_leads_to_its_neighbours(lesson):
    title, _, way = read(lesson).split("\n")[:3]
    i = LESSONS.index(lesson)
    assert title.startswith(f"# Lesson {i + 1}: ")
    neighbours = [*LESSONS[max(i - 1, 0) : i], "README", *LESSONS[i + 1 : i + 2]]
    assert re.findall(r"\(([\w-]+)\.md\)", way) == neighbours


# ---- the things to try

TABLES = tries.read_tries()
TRIES = {one.name: one for table in TABLES for one in table.tries}
every_try = pytest.mark.parametrize("one", TRIES.values(), ids=TRIES)


def test_there_are_enough_of_them_for_each_lesson():
    assert [*dict.fromkeys(table.lesson for table in TABLES)] == LESSONS
    for lesson in LESSONS:
        changed = [one for table in TABLES if table.lesson == lesson for one in table.tries[1:]]
        assert len(changed) >= 5
    assert sum(len(table.tries) - 1 for table in TABLES) >= 32


def test_a_name_means_one_thing_in_all_tables():
    """Then its figures fit every table that it stands in."""
    for table in TABLES:
        for one in table.tries:
            assert one == TRIES[one.name]
            others = [other for other in TABLES if one in other.tries]
            assert {tuple(other.figures) for other in others} == {tuple(table.figures)}
        assert set(table.figures) <= tries.FORMATS.keys()


@every_try
def test_a_change_is_one_line_of_todays_code(one):
    assert len(one.new) <= 3
    if one.old:
        text = (ROOT / one.file).read_text(encoding="utf-8")
        changed = tries.change(text, one.old, one.new)  # fails unless the line is there once
        assert changed != text
        old, new = ([line.strip() for line in code.split("\n")] for code in (text, changed))
        assert Counter(new) - Counter(old) == Counter(line.strip() for line in one.new) - Counter(
            [one.old]
        )
        assert len(new) == len(old) - 1 + len(one.new)
    else:
        assert not (ROOT / (one.file or "none")).exists()
        changed = "\n".join(one.new)
    ast.parse(changed)


@every_try
def test_its_commands_are_valid_and_write_to_its_own_file(one):
    assert len(one.question) > 10
    for command in one.commands:
        words = shlex.split(command.split(" > ")[0])
        assert problem(words) is None
    outs = [words[-1] for words in map(str.split, one.commands)]
    if one.commands:
        assert Path(outs[-1]).stem == one.name and one.commands[-1].split()[-2] == "--out"
        assert {Path(out).parts[:2] for out in outs if out.startswith("out/")} == {("out", "tries")}


@every_try
def test_what_a_command_reads_is_there_or_was_written_before(one):
    there = {f"out/{name}.pt" for name in ("base", "sft", "reward", "ppo")} | {"README.md"}
    there |= {f"out/world/{name}.jsonl" for name in ("sft", "preferences", "prompts")}
    for command in one.commands:
        words = shlex.split(command)
        if "lab.controls" in command:
            names = ["sft_shuffled", "dose_50_removed", "dose_50", "dose_50_idk"]
            assert 50 in controls.DOSES
            there |= {f"out/world/controls/{name}.jsonl" for name in names}
        files = [word for word in words if re.match(r"(out/|README)", word)]
        assert set(files[:-1]) <= there
        there.add(files[-1] if files else "")


def test_a_change_of_a_line_that_is_there_twice_or_not_at_all_is_refused():
    assert tries.change("a\n  b\nc", "b", ["d", "  e"]) == "a\n  d\n    e\nc"
    for text in ("b\nb", "a\nc"):
        with pytest.raises(ValueError):
            tries.change(text, "b", ["d"])


def test_a_changed_copy_leaves_the_code_alone_and_shares_the_outputs(tmp_path, monkeypatch):
    code = tmp_path / "code"
    (code / "data").mkdir(parents=True)
    (code / "docs/lessons").mkdir(parents=True)
    (code / "out").mkdir()
    (code / "data/__init__.py").write_text("")
    (code / "a.py").write_text("def f():\n    return 1\n")
    monkeypatch.chdir(code)
    (tmp_path / "copy").mkdir()
    one = tries.Try("mine", "What if?", [], "a.py", "return 1", ["x = 2", "return x"])
    tries.copy_code(tmp_path / "copy", one)
    assert (tmp_path / "copy/a.py").read_text() == "def f():\n    x = 2\n    return x\n"
    assert (code / "a.py").read_text() == "def f():\n    return 1\n"
    (tmp_path / "copy/out/mine.pt").touch()
    assert (code / "out/mine.pt").exists()
    new = tries.Try("new", "And a new file?", [], "b.py", "", ["x = 3"])
    (tmp_path / "other").mkdir()
    tries.copy_code(tmp_path / "other", new)
    assert (tmp_path / "other/b.py").read_text().strip() == "x = 3"


# ---- the figures


@every_lesson
def test_a_lessons_tables_hold_the_figures_of_the_file_beside_them(lesson):
    """`python -m lab.tries --fill` writes both."""
    path = FOLDER / "tries.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = read(lesson)
    block = f"<!-- {tries.BLOCK} -->\n{tries.lesson_tables(lesson, results)}\n<!-- end of"
    assert text.count(block) == 1
    assert path.exists() or "not yet run" in text


def test_a_table_tells_a_figure_with_its_unit(tmp_path, monkeypatch):
    tables = tries.read_tries()
    monkeypatch.setattr(tries, "read_tries", lambda: tables)
    monkeypatch.setattr(tries, "LESSONS", tmp_path)
    done = {"adamw": {"figures": {"val_loss": 1.23456, "bits a byte": 0.5}}}
    begin, end = f"<!-- {tries.BLOCK} -->", f"<!-- end of {tries.BLOCK} -->"
    for lesson in LESSONS:
        (tmp_path / f"{lesson}.md").write_text(f"before\n{begin}\nSTALE\n{end}\nafter\n")
    tries.fill_lessons(done)
    page = tmp_path / "pretraining.md"
    filled = page.read_text()
    (row,) = [line for line in filled.splitlines() if line.startswith("| adamw |")]
    assert row.endswith("| 1.235 | 0.500 |") and "`python pretrain.py --steps 250" in row
    assert filled.count("not yet run") == 2 * 6
    assert filled.startswith("before\n") and filled.endswith("\nafter\n") and "STALE" not in filled
    assert json.loads((tmp_path / "tries.json").read_text()) == done
    tries.fill_lessons(done)
    assert page.read_text() == filled


if __name__ == "__main__":
    for page in FOLDER.glob("*.md"):
        content = page.read_text(encoding="utf-8")
        page.write_text(mended(content), encoding="utf-8")
