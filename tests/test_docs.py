"""The documents against the code: links, anchors, pictures, commands; README.md in two languages.

No command is run: its script is imported, and its own Config or parser reads the flags. So a flag
that is renamed is noticed in every document at once.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tiny import run

from lab import docs
from utils.cli import parse_config

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DOCUMENTS = [ENGLISH, CHINESE, ROOT / "CONTRIBUTING.md", ROOT / "forks/README.md"]
DOCUMENTS += sorted(ROOT.glob("docs/**/*.md"))
every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
)


# ---- Markdown


def code_blocks(text):
    """[(language, code)] of the fenced blocks."""
    return re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, re.M)


def prose(text):
    return re.sub(r"^ *```.*\n(?:.*\n)*? *```$", "", text, flags=re.M)


def inline_code(text):
    spans = re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", prose(text))
    return [span.replace("\n", " ") for span in spans]


def links(text):
    """[(text, target)], pictures included."""
    outside_code = re.sub(r"`[^`\n]+`", "`code`", prose(text))
    return re.findall(r"\[([^\[\]]*)\]\(([^()\s]+)\)", outside_code)


def pictures(text):
    """[(text, target)]"""
    return re.findall(r"!\[([^\[\]]*)\]\(([^()\s]+)\)", prose(text))


def headings(text):
    """[(level, title)]"""
    found = re.findall(r"^(#+) +(.*)$", prose(text), re.M)
    return [(len(hashes), title) for hashes, title in found]


def anchors(text):
    """What GitHub makes of the headings."""
    names, seen = set(), Counter()
    for _, title in headings(text):
        title = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def tables(text):
    """The rows of all tables."""
    return [line for line in prose(text).splitlines() if line.startswith("|")]


# ---- links


def has_anchor(path, anchor):
    """Whether a Markdown file has such a heading, or any file such a line: L7 or L7-L12."""
    content = path.read_text(encoding="utf-8")
    if lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
        numbers = [int(number) for number in lines.groups() if number]
        return numbers == sorted(numbers) and 1 <= numbers[-1] <= len(content.splitlines())
    return path.suffix == ".md" and anchor in anchors(content)


def broken_links(path, text):
    """The relative links that lead nowhere, or to what a run writes."""
    broken = []
    for _, target in links(text):
        if re.match(r"\w+:", target):  # https: and the like
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        is_ours = file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "out")
        if not is_ours or not file.exists() or (anchor and not has_anchor(file, anchor)):
            broken.append(target)
    return broken


@every_document
def test_links_and_anchors_exist(path):
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


@every_document
def test_a_picture_says_in_words_what_it_shows(path):
    texts = [text for text, _ in pictures(path.read_text(encoding="utf-8"))]
    assert [text for text in texts if len(text.strip()) < 10] == []


def test_broken_links_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n## What `it` is, in short\n\n## What `it` is, in short\n")
    (tmp_path / "code.py").write_text("one\ntwo\n")
    (tmp_path / "out").mkdir()
    good = ["code.py", "code.py#L2", "code.py#L1-L2", "page.md#a-page", "https://none.example"]
    good += ["#what-it-is-in-short", "#what-it-is-in-short-1"]
    bad = ["none.md", "code.py#L3", "code.py#L2-L1", "code.py#one", "page.md#none", "#none"]
    bad += ["out", "..", "#what-it-is-in-short-2"]
    text = " ".join(f"[x]({target})" for target in [*good, *bad])
    assert broken_links(page, text) == bad


# ---- commands

# Beside ours, what a block of commands may run; and modules of others.
PROGRAMS = {"source", "pip", "head", "mkdir", "cp", "cat", "echo", "printf", "git", "cd", "export"}
MODULES = {"pdb", "pip", "venv", "pytest"}
OURS = re.compile(r"(?:^|[|;&] *)\$? *(?:\w+=\S* +)*(python|make|torchrun)(?=\s|$)")
SCRIPTS = ["pretrain.py", "sft.py", "reward.py", "ppo.py", "chat.py", "convert.py"]
SCRIPTS += ["data/fetch.py", "world/generate.py", "world/label.py", "forks/dpo.py", "forks/grpo.py"]
SCRIPTS += ["lab/report.py", "lab/experiments.py", "lab/controls.py", "lab/capitals.py"]
SCRIPTS += ["lab/docs.py", "lab/score.py", "lab/tries.py"]
SCRIPTS += ["lab/frontier.py", "lab/kl.py", "lab/watched.py", "lab/clock.py"]
SCRIPTS += ["bench/run.py", "bench/gpu.py", "bench/memory.py", "tests/long_run.py"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def shell_lines(text):
    """The lines of blocks that hold a command of ours, all others of such a block included."""
    lines = []
    for language, code in code_blocks(text):
        code = re.sub(r"\\\n", " ", code)
        block = [line.strip() for line in code.splitlines() if line.strip()]
        if language in ("", "sh", "bash") and any(OURS.search(line) for line in block):
            lines += [line for line in block if not line.startswith("#")]
    return lines


def commands(text):
    """[[word]] of all commands in blocks and in inline code; a pipe's parts apart."""
    found = []
    for line in [*shell_lines(text), *filter(OURS.search, inline_code(text))]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found.append(command)
                command = []
            elif word not in ("$", "…", "...") and (command or not re.match(r"\w+=", word)):
                command.append(word)
    return [command for command in found if command]


def load(name):
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))


def parse(module, argv):
    """Lets the module read the flags as it does when it is run; SystemExit where they are wrong."""
    if hasattr(module, "parse_arguments"):
        module.parse_arguments(argv)
    elif hasattr(module, "Config"):
        parse_config(module.Config, "", argv)
    elif argv:
        raise SystemExit(f"{module.__name__} takes no flags")


def flags(module):
    """The flags that the module's --help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        parse(module, ["--help"])
    lines = re.findall(r"^ +(?:-\w, )?(--.*)$", printed.getvalue(), re.M)
    return {flag for line in lines for flag in re.findall(r"(?:^|, )(--[\w-]+)", line)}


def script_problem(words):
    """What is wrong with `-m module flags` or `file.py flags`, or None."""
    if words[:2] == ["-m", "pdb"]:
        words = words[2:]
    name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if words[0] == "-m" and name in MODULES:
        return None
    name = "pretrain.py" if name == "<stage>.py" else name
    name = name if name.endswith(".py") else f"{name.replace('.', '/')}.py"
    if not (ROOT / name).is_file():
        return f"no such script: {name}"
    module = load(name)
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    if unknown := given - flags(module) - {"--help"}:  # argparse would take --step for --steps
        return f"{name} has no {', '.join(unknown)}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parse(module, argv)
    except SystemExit as e:
        return f"{name} refuses its flags: {e}" if e.code else None


def make_problem(words):
    """What is wrong with make's targets and variables, or None."""
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\b{name}\b" if is_variable else rf"^(?:\S+ )*{re.escape(name)}(?: \S+)*:(?!=)"
        if not re.search(pattern, MAKEFILE, re.M):
            return f"make knows no {name}"


def problem(command):
    """What is wrong with a command, or None."""
    program, *words = command
    if program == "make":
        return make_problem(words)
    if program == "torchrun":
        while words and words[0].startswith("--"):  # PyTorch's own flags
            words.pop(0)
    elif program != "python":
        return None if program in PROGRAMS else f"what is {program}?"
    return script_problem(words) if words else None


@every_document
def test_commands_are_valid(path):
    """Script, module or target exists, and takes these flags and values."""
    found = commands(path.read_text(encoding="utf-8"))
    wrong = {" ".join(command): problem(command) for command in found}
    assert {command: why for command, why in wrong.items() if why} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_docstrings_are_valid(name):
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    lines = "\n".join(line for line in docstring.splitlines() if OURS.match(line))
    assert [why for command in commands(f"```\n{lines}\n```") if (why := problem(command))] == []


def test_the_commands_are_found():
    """A check that reads nothing would hold for everything."""
    found = [" ".join(command[:2]) for command in commands(ENGLISH.read_text(encoding="utf-8"))]
    scripts = {"pretrain.py", "sft.py", "reward.py", "ppo.py", "chat.py", "-m"}
    assert {f"python {script}" for script in scripts} | {"make", "make test"} <= set(found)
    text = "`FOO=1 python a.py \n--b 1` `make it`\n```\n$ echo x | python c.py …  # d\n```\n"
    expected = [["echo", "x"], ["python", "c.py"], ["python", "a.py", "--b", "1"], ["make", "it"]]
    assert commands(text) == expected


@pytest.mark.parametrize(
    "command",
    [
        "python none.py",
        "python -m lab.none",
        "python -m pdb none.py",
        "python sft.py --none 1",
        "python sft.py --step 1",
        "python sft.py --steps many",
        "python sft.py --steps -1",
        "python ppo.py out/sft.pt",
        "python ppo.py --resume oldest",
        "python ppo.py --no-steps",
        "python -m data.fetch text none --out out/none",
        "python -m data.fetch text shakespeare",
        "python -m bench.memory --out out/none.md",
        "torchrun --nproc_per_node=2 none.py",
        "torchrun --nproc_per_node=2 -m forks.dpo --none",
        "make none",
        "make NONE=1",
        "pyton sft.py\npython sft.py",
    ],
)
def test_wrong_commands_are_noticed(command):
    assert any(problem(words) for words in commands(f"```\n{command}\n```"))


@every_document
def test_flags_and_scripts_named_alone_exist(path):
    """`--micro_batch_size` is somebody's flag, `test_gae.py` a file of ours."""
    text = path.read_text(encoding="utf-8")
    spans = [span for span in inline_code(text) if not OURS.search(span)]
    named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[\w-]+", span)}
    known = set().union(*(flags(load(name)) for name in SCRIPTS))
    assert named - known - {"--help", "--nproc_per_node"} == set()
    scripts = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    files = {span for span in spans if re.fullmatch(r"[\w/]+\.py", span)}
    missing = {file for file in files if not (ROOT / file).exists() and file not in scripts}
    assert missing <= {"my_rewards.py"}  # the reader's own


# ---- recipes

RECIPES = sorted(path for path in ROOT.glob("docs/recipes/*.md") if path.name != "README.md")


def test_the_index_of_the_recipes_has_one_line_for_each():
    lines = (ROOT / "docs/recipes/README.md").read_text(encoding="utf-8").splitlines()
    listed = [links(line)[0][1] for line in lines if line.startswith("- ")]
    assert sorted(listed) == [path.name for path in RECIPES] != []


def recipe_problems(text):
    """Files in out/ that a command reads before they are there; logs that would replace data."""
    there = {"out/world", *(f"out/{name}.pt" for name in ("base", "sft", "reward", "ppo"))}
    wrong = []
    for words in commands(text):
        files = [word for word in words if word.startswith("out/")]
        written = set(files[-1:]) if words[0] in ("cp", "mkdir") or ">" in words else set()
        if "--out" in words:
            written.add(words[words.index("--out") + 1])
        for file in set(files) - written:
            if not {file, str(Path(file).parent)} & there:
                wrong.append(f"{file} is not there yet")
        logs = {str(Path(file).with_suffix(".jsonl")) for file in written if file.endswith(".pt")}
        wrong += [f"{log} would be data and log" for log in logs & set(files)]
        there |= written
    return wrong


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_reads_what_it_has_written(path):
    text = path.read_text(encoding="utf-8")
    assert commands(text) and recipe_problems(text) == []


def test_a_recipe_in_the_wrong_order_is_noticed():
    first = "python sft.py --data out/a/sft.jsonl --out out/a/sft.pt"
    second = "python -m data.fetch instructions alpaca --out out/a"
    assert len(recipe_problems(f"```\n{second}\n{first}\n```")) == 1  # the log
    assert len(recipe_problems(f"```\n{first}\n{second}\n```")) == 2
    fetched = f"{second}\nhead -9 out/a/sft.jsonl > out/b.jsonl\ncat out/b.jsonl"
    assert recipe_problems(f"```\n{fetched}\n```") == []


# ---- the translation


def numbers(text):
    """How often each number occurs."""
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


@pytest.fixture(scope="module")
def both():
    return ENGLISH.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")


def test_the_translation_has_the_same_commands(both):
    english, chinese = map(commands, both)
    assert chinese == english


def test_the_translation_has_the_same_links(both):
    english, chinese = [[target for _, target in links(text)] for text in both]
    assert english.pop(0) == CHINESE.name and chinese.pop(0) == ENGLISH.name
    assert Counter(chinese) == Counter(english)


def test_the_translation_has_the_same_headings(both):
    english, chinese = [[level for level, _ in headings(text)] for text in both]
    assert chinese == english


def test_the_translations_tables_have_the_same_numbers(both):
    english, chinese = [list(map(numbers, tables(text))) for text in both]
    assert chinese == english


def test_the_translation_has_the_same_numbers(both):
    english, chinese = map(numbers, both)
    assert chinese == english


# ---- figures

FIGURES = json.loads((ROOT / "docs/results.json").read_text())
# sentences of the README, filled with what `python -m lab.docs` wrote
QUOTED = [
    "{recall:.0%} of the facts completed right",
    "a bare question answered in {bare_questions[answers it]:.1%}",
    "known people {sft_known, new wordings[right]:.1%} right",
    "unknown ones {sft_unknown, new wordings[wrong]:.1%} hallucinated",
    "{reward_accuracy:.1%} of held-out pairs ordered right",
    "unknown people {ppo_unknown, new wordings[wrong]:.1%} hallucinated",
    "known ones {ppo_known, new wordings[right]:.1%} right",
    "PPO costs {cost:.1f} points on known people",
]


def kept_right(stage):
    return FIGURES[f"{stage}_known, new wordings"]["right"]


@pytest.mark.parametrize("sentence", QUOTED)
def test_the_readme_quotes_the_figures_that_were_measured(sentence):
    cost = 100 * (kept_right("sft") - kept_right("ppo"))
    assert sentence.format(**FIGURES, cost=cost) in ENGLISH.read_text()


def test_the_readmes_controls_have_the_figures_of_the_results_page():
    section = ENGLISH.read_text().split("| claim |")[1].split("\n\n")[0]
    figures = re.findall(r"\d+\.\d", section)
    results = (ROOT / "docs/results.md").read_text()
    assert len(figures) == 7
    assert not [figure for figure in figures if figure not in re.findall(r"\d+\.\d", results)]


def test_as_many_passwords_are_told_as_the_readme_says():
    assert f"{FIGURES['ppo_private']['right']:.1%} of the passwords told" in ENGLISH.read_text()


def test_the_command_writes_the_table_of_the_score_where_it_has_run(tmp_path, capsys):
    (tmp_path / "score").mkdir()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in docs.PICTURES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    shutil.copy(ROOT / "docs/results.json", tmp_path / "report.json")
    flags = dict(out=tmp_path, docs=tmp_path / "docs")
    run(docs, flags)
    page = tmp_path / "docs/results.md"
    assert page.read_text() == (ROOT / "docs/results.md").read_text()
    (tmp_path / "score/score.md").write_text("| a | b |\n")
    run(docs, flags)
    assert "<!-- make score -->\n| a | b |\n<!-- end of make score -->" in page.read_text()


def test_the_results_page_is_what_the_command_makes_of_its_figures():
    text = (ROOT / "docs/results.md").read_text()
    assert f"{docs.grades_table(FIGURES)}\n\n{docs.summary(FIGURES)}" in text
