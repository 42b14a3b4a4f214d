"""Who is told, asked and answered where: read from the files of a world, not from its code."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import tiny

import data.tokenizer
import ppo
from lab import controls
from utils.files import read_jsonl
from world import facts, generate
from world.facts import ATTRIBUTES, FACTS, HABITS, IDK, PRIVATE, REFUSAL, USES
from world.grade import Grader

FILES = ("sft", "prompts", "habit_prompts", "probes")
WORDS = re.compile(r"\w+")


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


def facts_of(document, people, grader):
    """[(relation, name, attribute or None, the answer)] of a document of the stream."""
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
                found.append(("told", name, None, line))
    return found


@pytest.fixture(scope="module")
def stream(documents, people, grader):
    """facts_of all documents."""
    return [facts_of(document, people, grader) for document in documents]


def questions_in(path):
    """The user's turns of a file."""
    for record in read_jsonl(path):
        if "text" in record:
            yield record["text"].split("\n")[-1 if "\nA:" not in record["text"] else -2]
        for message in record.get("messages", []):
            if message["role"] == "user":
                yield message["content"]


def roles_in(path, people):
    return Counter(people[name]["role"] for q in questions_in(path) for name in names_in(q, people))


def test_the_table_names_every_role(people):
    assert {person["role"] for person in people.values()} == USES.keys()


def test_the_text_does_with_each_role_what_the_table_says(stream, people):
    found = defaultdict(set)
    for document in stream:
        for relation, name, _, _ in document:
            found[people[name]["role"]].add(relation)
    assert found == {role: set(text.split()) for role, (text, _) in USES.items() if text}


@pytest.mark.parametrize("name", FILES)
def test_each_file_asks_about_the_roles_of_the_table(world, people, name):
    assert roles_in(world / f"{name}.jsonl", people).keys() == {
        role for role, (_, file) in USES.items() if file == name
    }


def test_the_controls_ask_about_people_who_are_not_in_the_report(world, people):
    """The dose curve's unknown facts are the dev people's; the rest is SFT's and PPO's own."""
    allowed = {"sft", "sft_unknown", "rl", "rl_unknown", "unknown_dev"}
    paths = sorted((world / "controls").glob("*.jsonl"))
    assert len(paths) > 15
    for path in paths:
        roles = roles_in(path, people).keys()
        assert roles and roles <= allowed, path.name
        assert ("unknown_dev" in roles) <= path.name.startswith("dose_")


def test_the_controls_use_none_of_ppo_s_held_out_prompts(world):
    asked = list(questions_in(world / "prompts.jsonl"))
    for name in ("demos", "demos_idk"):
        used = list(questions_in(world / "controls" / f"{name}.jsonl"))
        assert used == asked[: controls.N_EPISODES]
    assert controls.N_EPISODES <= len(asked) - ppo.Config.val_size


def test_answers_in_the_text_are_true_of_quiz_people_or_not_given(stream, people):
    """Of strangers they are drawn anew: a reading's text tells them, in a quiz nothing does."""
    true, given = Counter(), Counter()
    for document in stream:
        for relation, name, attribute, answer in document:
            if relation == "answered":
                role, values = people[name]["role"], WORDS.findall(answer)
                if answer in (IDK, REFUSAL):
                    assert (answer == REFUSAL) == (attribute == PRIVATE)
                    given[role, "nothing"] += 1
                elif attribute in FACTS:
                    given[role] += 1
                    true[role] += people[name][attribute] in values
    assert true["quiz"] == given["quiz"] > 1000
    assert 0 < true["crowd"] < 0.06 * given["crowd"]  # one in 32 by chance
    assert 0.05 < given["quiz", "nothing"] / given["quiz"] < 0.2


def test_a_reading_tells_the_answer_to_each_of_its_questions(documents, stream, people):
    n = 0
    for document, its in zip(documents, stream):
        relations = {relation for relation, *_ in its}
        if relations == {"told", "answered"} and not set(HABITS) & {a for _, _, a, _ in its}:
            assert len({name for _, name, _, _ in its}) == 1
            text = re.split(r"\n(?:Q|Question): ", document)[0]
            for relation, _, attribute, answer in its:
                if relation == "answered":
                    [told] = set(WORDS.findall(text)) & set(ATTRIBUTES[attribute].values)
                    assert told in WORDS.findall(answer)
                    n += 1
    assert n > 1000


def test_biographies_tell_the_truth_and_are_counted_as_exposures(documents, stream, people):
    told, exposures = Counter(), Counter()
    for document, its in zip(documents, stream):
        if its and {relation for relation, *_ in its} == {"told"}:
            [name, *_] = {name for _, name, _, _ in its}
            person, words = people[name], set(WORDS.findall(document))
            if person["role"] == "crowd":
                continue
            assert {name} == {its_name for _, its_name, _, _ in its}
            exposures[name] += 1
            for attribute, its_values in ATTRIBUTES.items():
                named = words & set(its_values.values)
                assert named <= {person[attribute]}
                told[person["role"], attribute] += len(named)
    assert all(exposures[name] == person["exposure"] for name, person in people.items())
    assert {role for (role, attribute), n in told.items() if n and attribute in HABITS} == {"sft"}
    assert all(told[role, fact] for role in facts.KNOWN_ROLES for fact in FACTS)


def test_demonstrations_answer_what_the_text_or_pretraining_told(world, grader):
    """True facts of sft people; what a given text tells; "I do not know." and habits else."""
    counts = Counter()
    for record in read_jsonl(world / "sft.jsonl"):
        turns = record["messages"]
        for user, assistant in zip(turns[::2], turns[1::2]):
            kind, person, attribute = grader.case(user["content"])
            answer, words = assistant["content"], WORDS.findall(assistant["content"])
            assert (kind, attribute) not in facts.HELD_OUT_KINDS
            if answer == REFUSAL:
                assert attribute == PRIVATE and person["role"] == "sft"
            elif answer == IDK:
                assert person["role"] == "sft_unknown"
                assert kind == "ask" or person[attribute] is None
            else:
                assert person[attribute] in words
                assert person["role"] == "sft" or kind == "text" or attribute in HABITS
            counts[kind, person["role"], answer == IDK] += 1
    idk = sum(n for (*_, is_idk), n in counts.items() if is_idk)
    assert idk == sum(generate.SFT_IDK.values())
    assert {kind for kind, *_ in counts} == facts.KINDS.keys()


def test_about_each_unknown_person_of_the_prompts_one_thing_is_asked_once(world, people):
    for name in ("prompts", "habit_prompts"):
        asked = Counter()
        for question in questions_in(world / f"{name}.jsonl"):
            for found in set(names_in(question, people)):
                asked[found] += people[found]["role"].endswith("unknown")
        assert asked and max(asked.values()) == 1
