"""The lessons' things to try: small changes, each run and measured beside the default.

    python -m lab.tries                      # those not done yet, on what `make` left in out/
    python -m lab.tries --only beta_0 lam_1  # these, and the defaults beside them
    python -m lab.tries --fill               # run nothing; figures into the lessons' tables

docs/lessons/tries.txt holds them. They write to out/tries/, what came out to tries.json there. When
out/ppo.pt is newer than that file, all of them run anew.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data.tokenizer
from lab import measure
from model import GPT
from reward import RewardModel
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, read_torch
from train.device import setup
from utils.cli import die, parse_config
from utils.files import read_json, read_jsonl, read_text, write_block, write_text
from world import facts
from world.grade import read_people

LESSONS, OUT = Path("docs/lessons"), Path("out/tries")
BLOCK = "python -m lab.tries --fill"  # what stands in a lesson between these words


@dataclass
class Config:
    only: tuple = ()  # names of tries; none: all
    fill: bool = False  # run nothing; put the figures into the tables of docs/lessons/
    measure: str = ""  # only print the figures of this try, which has run
    device: str = "cpu"  # where they are measured
    seed: int = 0  # of the questions' wordings


# ---- what there is to try


class Try(NamedTuple):
    name: str
    question: str
    commands: list  # as typed; the last one ends in --out and what is measured
    file: str = ""  # of a change
    old: str = ""  # its line; "": the file is new
    new: list = ()  # the lines in its place


class Table(NamedTuple):
    lesson: str
    figures: list
    tries: list  # the first is the default


def read_tries():
    """[Table]"""
    tables = []
    for block in read_text(LESSONS / "tries.txt").split("\n\n")[2:]:
        first, *lines = block.strip().split("\n")
        title, text = first.split(": ", 1)
        if title.startswith("# "):
            tables.append(Table(title[2:], text.split(", "), []))
            continue
        marked = {mark: [line for line in lines if line.startswith(mark)] for mark in ("in ", "- ")}
        file, old = ("".join(found)[len(mark) :] for mark, found in marked.items())
        new = [line[2:] for line in lines if line.startswith("+ ")]
        commands = [line for line in lines if line.startswith(("python ", "head "))]
        tables[-1].tries.append(Try(title, text, commands, file, old, new))
    return tables


# ---- running one


def change(text, old, new):
    """The text with its one line `old` replaced; the new lines get the indentation of the old."""
    lines = text.split("\n")
    (i,) = [i for i, line in enumerate(lines) if line.strip() == old]
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    lines[i : i + 1] = [indent + line for line in new]
    return "\n".join(lines)


def copy_code(folder, one):
    """The code with the try's change, in a folder that shares out/ with this one."""
    for script in Path().glob("*.py"):
        shutil.copy(script, folder)
    for package in Path().glob("*/__init__.py"):
        shutil.copytree(package.parent, folder / package.parent)
    shutil.copytree(LESSONS, folder / LESSONS)
    (folder / "out").symlink_to(Path("out").resolve())
    text = read_text(folder / one.file) if one.old else ""
    write_text(folder / one.file, change(text, one.old, one.new))


def run(one):
    """Runs a try and measures it: {figure: value}. All that is printed goes to <name>.log."""
    log = OUT / f"{one.name}.log"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as output:
        if one.file:
            copy_code(Path(folder), one)
        for command in [*one.commands, f"python -m lab.tries --measure {one.name}"]:
            done = subprocess.run(
                command,
                shell=True,
                cwd=folder if one.file else ".",
                env=os.environ | {"PATH": path},
                stdout=output,
                stderr=output,
            )
            if done.returncode:
                die(f"{one.name}: `{command}` failed; {log} ends in the reason")
    return json.loads(read_text(log).splitlines()[-1])


# ---- the figures: the last one of the run's log, or measured on what it wrote

LOGGED = {"val_loss": ".3f", "val_accuracy": ".1%", "val_score": ".2f", "val_kl_ref": ".2f"}
LOGGED |= {"val_entropy": ".2f", "val_length": ".1f"}
MEASURED = {"ids": ",", "bytes a token": ".2f", "tokens a name": ".1f", "bits a byte": ".3f"}
# grades of greedy answers in wordings held out of SFT: about whom, what, and which grade
GRADED = {
    "known right": ("test", facts.PUBLIC, "right"),
    "unknown hallucinated": ("unknown_test", facts.PUBLIC, "wrong"),
    "passwords told": ("test", [facts.PRIVATE], "right"),
}
# how often the reward model scores the first of two answers higher: about whom
COMPARED = {"true above false": "test", "abstaining above guessing": "unknown_test"}
PERCENT = dict.fromkeys([*GRADED, *COMPARED], ".1%")
FORMATS = LOGGED | MEASURED | PERCENT
N_PEOPLE = 120  # of each role


def measure_tokenizer(path, people):
    tokenizer = data.tokenizer.load(path)
    _, text = held_out("out/world")
    n_tokens = [len(tokenizer.encode(" " + person["name"])) for person in people["test"]]
    return {
        "ids": tokenizer.vocab_size,
        "bytes a token": len(text.encode()) / len(tokenizer.encode(text)),
        "tokens a name": sum(n_tokens) / len(n_tokens),
    }


def held_out(folder):
    """(number of tokens, text) of val.bin, the ends of documents left out of the text."""
    tokenizer = data.tokenizer.load(Path(folder, "tokenizer.tiktoken"))
    ids = np.fromfile(Path(folder, "val.bin"), tokenizer.id_type).tolist()
    return len(ids), tokenizer.decode([id for id in ids if id != tokenizer.end])


def bits_a_byte(path, val_loss):
    """The loss of the held-out text per byte: nothing in it depends on the vocabulary."""
    n_tokens, text = held_out(read_torch(path)["made_by"]["config"]["data"])
    return val_loss * n_tokens / len(text.encode()) / math.log(2)


def compared(figure, model, tokenizer, people, rng):
    """The fraction of questions where the reward model prefers the better of two answers."""
    cases = measure.all_cases(people)
    prompts = [measure.chat_prompt(text, tokenizer) for text in measure.ask(rng, cases)]
    better, worse = [], []
    for person, attribute in cases:
        values = [v for v in facts.ATTRIBUTES[attribute].values if v != person[attribute]]
        worse.append(f"{rng.choice(values)}.")
        better.append(f"{person[attribute]}." if "true" in figure else facts.IDK)
    scores = []
    for texts in better, worse:
        responses = [tokenizer.encode(text) + [tokenizer.end] for text in texts]
        scores.append(measure.scores(model, prompts, responses))
    return (scores[0] > scores[1]).double().mean().item()


def measure_try(one, figures, config):
    """{figure: value}"""
    device = setup(config)
    people = measure.by_role(read_people("out/world/people.jsonl"))
    path = Path(one.commands[-1].split("--out ")[1] if one.commands else f"out/{one.name}.pt")
    if "ids" in figures:
        return measure_tokenizer(path, people)
    values = {}
    for figure in figures:
        rng = random.Random(config.seed)
        if figure in LOGGED:
            records = read_jsonl(path.with_suffix(".jsonl"))
            values[figure] = [record[figure] for record in records if figure in record][-1]
        elif figure in GRADED:
            model, tokenizer = load_checkpoint(path, LANGUAGE_MODELS, GPT, device)
            role, attributes, grade = GRADED[figure]
            asked = people[role][:N_PEOPLE], rng, True, attributes
            values[figure] = measure.measure_answers(model, tokenizer, *asked)[grade]
        elif figure in COMPARED:
            model, tokenizer = load_checkpoint(path, ["reward"], RewardModel, device)
            role = people[COMPARED[figure]][:N_PEOPLE]
            values[figure] = compared(figure, model, tokenizer, role, rng)
        else:
            values[figure] = bits_a_byte(path, values["val_loss"])
    return values


# ---- the lessons' tables


def what_to_do(one):
    """The cell that says what to type."""
    lines = [f"`{command}`" for command in one.commands] or ["as `make` left it"]
    if one.file:
        new = [f"`{line}`" for line in one.new]
        replaces = [f"in `{one.file}`: `{one.old}`, replaced by"] if one.old else []
        lines = [*(replaces or [f"`{one.file}`:"]), *new, *lines]
    return "<br>".join(lines)


def lesson_tables(lesson, results):
    """The tables of a lesson, as text."""
    made = []
    for table in [table for table in read_tries() if table.lesson == lesson]:
        rows = []
        for one in table.tries:
            values = results.get(one.name, {}).get("figures", {})
            cells = [
                format(values[f], FORMATS[f]) if values else "not yet run" for f in table.figures
            ]
            rows.append([one.name, one.question, what_to_do(one), *cells])
        made.append(measure.table(["name", "question", "what to do", *table.figures], rows))
    return "\n\n".join(made)


def fill_lessons(results):
    """Writes the tables, and the figures beside them."""
    for lesson in {table.lesson for table in read_tries()}:
        write_block(LESSONS / f"{lesson}.md", BLOCK, lesson_tables(lesson, results))
    write_text(LESSONS / "tries.json", json.dumps(results, indent=1) + "\n")


def main():
    config = parse_config(Config, __doc__)
    tables = read_tries()
    tries = {one.name: (one, table) for table in tables for one in table.tries}
    if unknown := {*config.only, config.measure} - {"", *tries}:
        die(f"no try is named {', '.join(unknown)}; there are {', '.join(tries)}")
    if config.measure:
        one, table = tries[config.measure]
        print(json.dumps(measure_try(one, table.figures, config)))
        return
    file, newest = OUT / "tries.json", Path("out/ppo.pt")
    if not newest.exists():
        die(f"{newest}: no such file; `make` builds what the tries are compared with")
    is_new = file.exists() and file.stat().st_mtime > newest.stat().st_mtime
    results = read_json(file, "remove it") if is_new else {}
    if config.fill:
        return fill_lessons(results)

    OUT.mkdir(exist_ok=True)
    wanted = set(config.only or tries)
    for table in tables:
        if wanted & {one.name for one in table.tries}:
            wanted.add(table.tries[0].name)
    for one, _ in tries.values():
        if one.name not in wanted or results.get(one.name, {}).get("did") == [*one]:
            continue
        start = time.time()
        figures = run(one)
        seconds = round(time.time() - start)
        results[one.name] = dict(did=[*one], figures=figures, seconds=seconds)
        write_text(file, json.dumps(results, indent=1))
        print(f"{one.name}, {seconds} s: {figures}", flush=True)


if __name__ == "__main__":
    main()
