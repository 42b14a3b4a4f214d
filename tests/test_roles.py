"""Who is told, asked and answered where: read from the files of a world, not from its code."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiny

import data.tokenizer
import ppo
from lab import controls
from lab.measure import table
from utils.files import read_jsonl
from world import facts, generate
from world.facts import ATTRIBUTES, FACTS, HABITS, IDK, PRIVATE, PUBLIC, REFUSAL, USES
from world.grade import Grader

CONTROLS = ["sft_shuffled", "demos", "demos_idk", "habit_ref", "dose_0"]
CONTROLS += [f"sft_{n}" for n in controls.SIZES]
CONTROLS += [f"dose_{d}{end}" for d in controls.DOSES if d for end in ("", "_removed", "_idk")]
FILES = ["sft", "prompts", "habit_prompts"] + [f"controls/{name}" for name in CONTROLS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world's folder, with the controls of the experiments."""
    folder = tmp_path_factory.mktemp("world")
    tiny.run(generate, dict(out=folder, documents=12000, prompts=8000, vocab_size=600))
    tiny.run(controls, dict(data=folder))
    return folder


@pytest.fixture(scope="module")
def people(world):
    return {person["name"]: person for person in read_jsonl(world / "people.jsonl")}


@pytest.fixture(scope="module")
def grader(world):
    return Grader(world / "people.jsonl")


@pytest.fixture(scope="module")
def documents(world):
    """The documents that the two token files hold."""
    tokenizer = data.tokenizer.load(world / "tokenizer.tiktoken")
    paths = [world / f"{name}.bin" for name in ("val", "train")]
    ids = np.concatenate([np.fromfile(path, tokenizer.id_type) for path in paths])
    return tokenizer.decode(ids.tolist()).split("<|end|>")[:-1]


def names_in(text, people):
    found = re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+))", text)
    return [name for name in found if name in people]


def words_of(text):
    return set(re.findall(r"\w+", text))


def relations(document, people, grader):
    """[(told, asked or answered, name, attribute or None, the answer or None)] of a document."""
    found, lines = [], document.split("\n")
    for i, line in enumerate(lines):
        question = line.removeprefix("Q: ").removeprefix("Question: ")
        for name in dict.fromkeys(names_in(line, people)):
            attribute = grader.attribute.get(question.replace(name, "{x}"))
            if question != line:
                answer = lines[i + 1].removeprefix("A: ")
                found.append(("answered", name, attribute, answer))
            elif attribute:
                found.append(("asked", name, attribute, None))
            else:
                found.append(("told", name, None, None))
    return found


@pytest.fixture(scope="module")
def stream(documents, people, grader):
    """[(document, its relations)]"""
    return [(document, relations(document, people, grader)) for document in documents]


def split(turn):
    """(kind, text, question) of a user's turn."""
    text, _, rest = turn.rpartition("\n\n")
    for kind, (template, _) in facts.KINDS.items():
        ending = template.partition("{q}")[2]
        if ending and rest.endswith(ending):
            return kind, text, rest.removesuffix(ending)
    return "ask", text, rest


def turns(path, grader):
    """[(kind, text, question, person, attribute, answer or None)] of a file's conversations."""
    found = []
    for record in read_jsonl(path):
        messages = record["messages"] + [{"content": None}]  # a prompt has no answer
        for user, assistant in zip(messages[::2], messages[1::2]):
            kind, text, question = split(user["content"])
            found.append((kind, text, question, *grader.fact(question), assistant["content"]))
    return found


# ---- the table


def test_the_document_shows_the_table():
    rows = []
    for role, use in USES.items():
        people = f"{use.people:,}" if use.people else "one for each use"
        text, files = (", ".join(cell.split()) or "–" for cell in (use.text, use.files))
        rows.append([role, people, text, files, use.note])
    shown = table(["role", "people", "in the pretraining text", "asked about in", ""], rows)
    path = Path(__file__).parent.parent / "docs" / "world.md"
    assert f"\n\n{shown}\n\n" in path.read_text(encoding="utf-8")


def test_there_are_as_many_people_of_each_role_as_the_table_says(people):
    counts = Counter(person["role"] for person in people.values())
    assert counts.keys() == USES.keys()
    assert all(use.people in (None, counts[role]) for role, use in USES.items())


def test_the_text_does_with_each_role_what_the_table_says(stream, people):
    found = defaultdict(set)
    for _, its in stream:
        for relation, name, _, _ in its:
            found[people[name]["role"]].add(relation)
    assert found == {role: set(use.text.split()) for role, use in USES.items() if use.text}


def test_the_files_ask_about_the_roles_of_the_table(world, grader):
    found = defaultdict(set)
    for name in FILES:
        for _, _, _, person, _, _ in turns(world / f"{name}.jsonl", grader):
            found[person["role"]].add(name.partition("/")[0])
    assert found == {role: set(use.files.split()) for role, use in USES.items() if use.files}
    written = {path.stem for path in (world / "controls").glob("*.jsonl")}
    assert written == set(CONTROLS)


# ---- the text


def test_answers_in_the_text_are_true_and_one_in_ten_of_a_quiz_s_is_not_given(stream, people):
    given, kept = Counter(), 0
    for _, its in stream:
        for relation, name, attribute, answer in its:
            if relation == "answered":
                person = people[name]
                if answer in (IDK, REFUSAL):
                    assert person["role"] == "quiz"
                    assert (answer == REFUSAL) == (attribute == PRIVATE)
                    kept += 1
                else:
                    named = words_of(answer) & set(ATTRIBUTES[attribute].values)
                    assert named == {person[attribute]}
                    given[person["role"]] += 1
    assert given["quiz"] > 1000 and given["crowd"] > 500
    assert 0.08 < kept / (kept + given["quiz"]) < 0.12


def test_a_reading_tells_the_answer_to_each_of_its_questions(stream):
    n = 0
    for document, its in stream:
        kinds = {relation for relation, *_ in its}
        if kinds == {"told", "answered"} and not set(HABITS) & {a for _, _, a, _ in its}:
            assert len({name for _, name, _, _ in its}) == 1
            text = document.partition("\nQ: ")[0]
            for relation, _, attribute, answer in its:
                if relation == "answered":
                    [told] = words_of(text) & set(ATTRIBUTES[attribute].values)
                    assert told in words_of(answer)
                    n += 1
    assert n > 500


def test_biographies_tell_the_truth_and_are_counted_as_exposures(stream, people):
    told, exposures = Counter(), Counter()
    for document, its in stream:
        if its and {relation for relation, *_ in its} == {"told"}:
            person, words = people[its[0][1]], words_of(document)
            if person["role"] == "crowd":
                continue
            assert {name for _, name, _, _ in its} == {person["name"]}
            exposures[person["name"]] += 1
            for attribute, its_values in ATTRIBUTES.items():
                named = words & set(its_values.values)
                assert named <= {person[attribute]}
                told[person["role"], attribute] += len(named)
    assert all(exposures[name] == person["exposure"] for name, person in people.items())
    assert {role for (role, a), n in told.items() if n and a in HABITS} == {"sft"}
    assert all(told[role, fact] for role in facts.KNOWN_ROLES for fact in FACTS)


def test_held_out_wordings_of_questions_are_asked_nowhere(world, stream, grader):
    """Those of statements are held by test_world.py."""
    asked = set()
    for document, its in stream:
        for line in document.split("\n"):
            question = line.removeprefix("Q: ").removeprefix("Question: ")
            asked |= {question.replace(name, "{x}") for _, name, _, _ in its}
    for name in FILES:
        for _, _, question, person, _, _ in turns(world / f"{name}.jsonl", grader):
            asked.add(question.replace(person["name"], "{x}"))
    for attribute in ATTRIBUTES:
        assert not asked & set(facts.questions(attribute, held_out=True))
        assert set(facts.questions(attribute)) <= asked


# ---- the conversations


@pytest.mark.parametrize("name", FILES)
def test_held_out_combinations_are_trained_nowhere_and_a_text_holds_its_answer(world, grader, name):
    seen = set()
    for kind, text, _, _, attribute, answer in turns(world / f"{name}.jsonl", grader):
        seen.add((kind, attribute))
        assert (kind == "text") == (text != "")
        if kind == "text":
            [told] = words_of(text) & set(ATTRIBUTES[attribute].values)
            assert answer == f"{told}."
        elif kind != "ask":
            _, phrase = facts.KINDS[kind]
            assert phrase.partition("{v}")[2].partition("{x}")[0] in answer
    assert seen and not seen & facts.HELD_OUT_KINDS
    if name == "sft":
        pairs = {(kind, attribute) for kind in facts.KINDS for attribute in ATTRIBUTES}
        assert seen == pairs - facts.HELD_OUT_KINDS


def test_demonstrations_answer_what_pretraining_or_a_text_told(world, grader):
    """True facts of sft people; about strangers what a text tells, habits, "I do not know."."""
    counts = Counter()
    for kind, _, _, person, attribute, answer in turns(world / "sft.jsonl", grader):
        if answer == REFUSAL:
            assert attribute == PRIVATE and person["role"] == "sft"
        elif answer == IDK:
            assert kind == "ask" and person["role"] == "sft_unknown"
        else:
            assert words_of(answer) & set(ATTRIBUTES[attribute].values) == {person[attribute]}
            assert person["role"] == "sft" or kind == "text" or attribute in HABITS
        counts[answer if answer in (IDK, REFUSAL) else "given"] += 1
    assert counts[IDK] == sum(n for _, n in generate.SFT_IDK)
    assert 0 < counts[REFUSAL] < 0.1 * 3 * USES["sft"].people


def test_about_each_unknown_person_of_the_prompts_one_thing_is_asked_once(world, grader):
    for name in ("prompts", "habit_prompts"):
        asked = Counter()
        for _, _, _, person, attribute, _ in turns(world / f"{name}.jsonl", grader):
            asked[person["name"]] += person["role"].endswith("unknown")
            assert (attribute in HABITS) == (name == "habit_prompts")
        assert asked and max(asked.values()) == 1


# ---- the control sets


def control(world, grader, name):
    """[(person, attribute, answer)] of a control set of bare questions."""
    its = turns(world / "controls" / f"{name}.jsonl", grader)
    assert {kind for kind, *_ in its} == {"ask"}
    return [(person, attribute, answer) for _, _, _, person, attribute, answer in its]


def test_the_size_curve_s_sets_are_the_first_of_sft_s_conversations(world):
    sft = read_jsonl(world / "sft.jsonl")
    for n in controls.SIZES:
        assert read_jsonl(world / "controls" / f"sft_{n}.jsonl") == sft[:n]


def test_shuffled_demonstrations_are_right_about_sft_people_by_chance_only(world, grader):
    right = []
    for kind, _, _, person, attribute, answer in turns(
        world / "controls" / "sft_shuffled.jsonl", grader
    ):
        if kind == "ask" and person["role"] == "sft" and answer != REFUSAL:
            right.append(person[attribute] in words_of(answer))
    assert len(right) > 1000 and sum(right) < 0.08 * len(right)  # 1 in 32


def test_the_dose_sets_hold_their_dose_and_true_answers(world, grader):
    for dose in controls.DOSES:
        for ending in ["", "_removed", "_idk"] if dose else [""]:
            its, n_unknown = control(world, grader, f"dose_{dose}{ending}"), 0
            for person, attribute, answer in its:
                unknown = person["role"] == "unknown_dev"
                n_unknown += unknown
                idk = unknown and ending == "_idk"
                assert attribute in PUBLIC
                assert answer == (IDK if idk else f"{person[attribute]}.")
            n = controls.N_FACTS * dose // 100
            assert n_unknown == (0 if ending == "_removed" else n)
            assert len(its) == controls.N_FACTS - (n if ending == "_removed" else 0)


def test_the_demonstrations_answer_the_prompts_that_ppo_trains_on(world, grader):
    prompts = read_jsonl(world / "prompts.jsonl")
    assert controls.N_EPISODES <= len(prompts) - ppo.Config.val_size  # it holds out the last ones
    for name in ("demos", "demos_idk"):
        records = read_jsonl(world / "controls" / f"{name}.jsonl")
        asked = [record["messages"][:-1] for record in records]
        assert asked == [prompt["messages"] for prompt in prompts[: controls.N_EPISODES]]
        for person, attribute, answer in control(world, grader, name):
            idk = name == "demos_idk" and person["role"] == "rl_unknown"
            expected = REFUSAL if attribute == PRIVATE else f"{person[attribute]}."
            assert answer == (IDK if idk and attribute != PRIVATE else expected)


def test_the_abstention_s_reference_is_shown_habits_of_people_asked_about_once(world, grader):
    its = control(world, grader, "habit_ref")
    assert {person["role"] for person, _, _ in its} == {"rl_unknown"}
    assert len({person["name"] for person, _, _ in its}) == len(its) == controls.N_HABITS
    assert {attribute for _, attribute, _ in its} == set(HABITS)
    given = [f"{person[a]}." == answer for person, a, answer in its if answer != IDK]
    assert all(given) and abs(len(given) / len(its) - 0.7) < 4 * (0.21 / len(its)) ** 0.5
