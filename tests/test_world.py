"""The default world: who is known to whom, what is held out, and a grader that knows every fact."""

import math
import random
import re

import pytest

import common
from data import label, world


@pytest.fixture(scope="module")
def made():
    """A world with little text: people, known, unknown, documents and the three conversation files."""
    rng, people = random.Random(0), world.People(0)
    known = [people.draw(rng, role) for role, n in world.KNOWN_ROLES.items() for _ in range(n)]
    unknown = [people.draw(rng, role) for role, n in world.UNKNOWN_ROLES.items() for _ in range(n)]
    documents = world.corpus(rng, people, known, 15000)
    files = {
        "sft": [m for conversation in world.sft_conversations(rng, known, lambda: people.draw(rng, "sft_unknown")) for m in conversation],
        "prompts": [m for prompt in world.ppo_prompts(rng, people, known, 1000) for m in prompt["messages"]],
        "habit_prompts": [m for prompt in world.habit_prompts(rng, people, 1000) for m in prompt["messages"]],
    }
    return {"people": people, "known": known, "unknown": unknown, "documents": documents, **files}


def names_in(texts):
    return {name for text in texts for name in re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", text)}


def names(people, *roles):
    return {p["name"] for p in people if p["role"] in roles}


def test_nobody_has_two_roles_and_every_name_is_unique(made):
    drawn = made["people"].drawn
    assert len({p["name"] for p in drawn}) == len(drawn)


def test_text_tells_about_every_known_person_and_mentions_no_unknown_one(made):
    mentioned = names_in(made["documents"])
    assert names(made["known"], *(r for r in world.KNOWN_ROLES if r != "rare")) <= mentioned
    assert not names(made["unknown"], *world.UNKNOWN_ROLES) & mentioned


@pytest.mark.parametrize("name, may_use", [("sft", ["sft"]), ("prompts", ["rl"])])
def test_each_file_asks_only_about_its_own_known_people(made, name, may_use):
    asked = names_in(m["content"] for m in made[name])
    everybody = names(made["known"] + made["unknown"], *world.KNOWN_ROLES, *world.UNKNOWN_ROLES)
    assert asked & everybody <= names(made["known"], *may_use)
    assert asked & names(made["known"], *may_use)


@pytest.mark.parametrize("name, role, n", [("prompts", "rl_unknown", 300), ("habit_prompts", "habit_unknown", 1000)])
def test_unknown_people_of_the_ppo_prompts_are_asked_about_once(made, name, role, n):
    fresh = names(made["people"].drawn, role)
    asked = [n for m in made[name] for n in names_in([m["content"]]) & fresh]
    assert len(asked) >= n and len(asked) == len(set(asked))
    assert not fresh & names_in(made["documents"])


def test_the_best_guess_at_a_habit_is_right_as_often_as_the_table_says(made):
    """Over all people drawn, within 4 standard errors; facts have no such best guess."""
    people = made["people"].drawn
    for attribute, (values, *_) in world.ATTRIBUTES.items():
        expected = world.HABITS.get(attribute, 1 / len(values))
        share = sum(p[attribute] == values[0] for p in people) / len(people)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(people)) ** 0.5


def test_text_tells_the_habits_of_strangers_and_sft_people_only(made):
    told = [d for d in made["documents"] if any(re.search(rf"\b({'|'.join(world.ATTRIBUTES[h][0])})\b", d) for h in world.HABITS)]
    assert len(told) > 500
    assert not names_in(told) & names(made["known"], *(r for r in world.KNOWN_ROLES if r != "sft"))


def test_rare_people_are_written_about_less(made):
    rare = [p["exposure"] for p in made["known"] if p["role"] == "rare"]
    others = [p["exposure"] for p in made["known"] if p["role"] == "test"]
    assert sum(rare) / len(rare) < 0.4 * sum(others) / len(others)


def test_held_out_wordings_appear_in_no_training_data(made):
    held_out, trained = set(), set()
    for attribute in world.ATTRIBUTES:
        held_out |= {*world.questions(attribute, True), *world.statements(attribute, True)}
        trained |= {*world.questions(attribute), *world.statements(attribute)}
    assert not held_out & trained
    names_masked = [re.sub(r"[A-Z][a-z]+ [A-Z][a-z]+", "{x}", d) for d in made["documents"]]
    names_masked += [re.sub(r"[A-Z][a-z]+ [A-Z][a-z]+", "{x}", m["content"]) for f in ("sft", "prompts", "habit_prompts") for m in made[f]]
    values = "|".join(v for values, *_ in world.ATTRIBUTES.values() for v in values)
    sentences = {s for d in names_masked for line in d.split("\n") for s in re.sub(rf"\b({values})\b", "{v}", line).replace("Q: ", "").split(". ")}
    found = {s.rstrip(".") for s in sentences}
    assert not {h.rstrip(".") for h in held_out} & found
    assert len({t.rstrip(".") for t in trained} & found) > 0.9 * len(trained)  # the search would find them


def test_names_alone_do_not_tell_known_from_unknown_people():
    """Naive Bayes on the two parts of the name, trained on one half and tried on the other: AUROC 0.5 +- 0.03."""
    rng, people = random.Random(0), world.People(0)
    known = [people.draw(rng, "known")["name"].split() for _ in range(1000)]
    unknown = [people.draw(rng, "unknown")["name"].split() for _ in range(9000)]

    def share(names, part, position):
        return (sum(n[position] == part for n in names) + 1) / (len(names) + 160)

    def score(name):
        return sum(math.log(share(known[::2], part, i) / share(unknown[::2], part, i)) for i, part in enumerate(name))

    a, b = [score(n) for n in known[1::2]], [score(n) for n in unknown[1::10]]
    auroc = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert abs(auroc - 0.5) <= 0.03


def test_the_grader_finds_the_fact_of_every_question(tmp_path, made):
    common.write_jsonl(tmp_path / "people.jsonl", made["people"].drawn)
    grader = world.Grader(tmp_path / "people.jsonl")
    for m in made["prompts"]:
        person, attribute = grader.fact(m["content"])
        assert person["name"] in m["content"]
        assert m["content"] in [world.say(q, person, attribute) for q in world.questions(attribute)]
    with pytest.raises(ValueError, match="not a question of this world"):
        grader.fact("Where was Nobody Atall born?")


@pytest.mark.parametrize(
    "answer, grade",
    [("baker.", "right"), ("baker is the answer.", "right"), ("pilot.", "wrong"), ("baker pilot.", "wrong"), ("I do not know.", "idk"),
     ("That is private.", "refusal"), ("cello.", "other"), ("", "other"), ("bakers", "other")],
)  # fmt: skip
def test_grades(answer, grade):
    assert world.grade({"name": "A B", "job": "baker"}, "job", answer) == grade


def test_the_labeller_prefers_as_bradley_terry_says():
    """P(a over b) = sigmoid(sharpness * (utility a - utility b))."""
    rng = random.Random(1)
    for a, b, sharpness in [(1.0, 0.0, 4.0), (0.0, -1.0, 4.0), (1.0, -1.0, 1.0), (0.0, 0.25, 1.0), (0.0, 1.0, 1e9)]:
        share = sum(label.prefers(rng, a, b, sharpness) for _ in range(20_000)) / 20_000
        assert abs(share - (1 / (1 + math.exp(-sharpness * (a - b))) if sharpness < 99 else 0)) < 0.01


def test_the_labeller_writes_no_true_answer_about_unknown_people(made):
    rng = random.Random(0)
    for person in [p for p in made["people"].drawn if p["role"] == "rl_unknown"][:100]:
        for attribute in world.PUBLIC:
            grades = {world.grade(person, attribute, a) for a in label.candidates(rng, person, attribute, "sampled")}
            assert "right" not in grades and {"idk", "wrong", "other", "refusal"} <= grades


def test_a_guess_at_a_habit_is_compared_with_idk_alone_whether_it_is_right_or_wrong():
    """So that its odds against "I do not know." are the labeller's mean over people, bent by no choice of pairs."""
    rng = random.Random(0)
    person = {"name": "A B", "role": "habit_unknown"} | {a: spec[0][0] for a, spec in world.ATTRIBUTES.items()}
    for sampled in ("soup.", "stew."):
        for _ in range(100):
            answers = label.candidates(rng, person, "dish", sampled)
            assert world.IDK in answers and len(answers) == 2


def test_answers_in_a_form_are_those_of_the_demonstrations_and_nothing_else(made):
    asked = {q for a in world.ATTRIBUTES for q in world.questions(a)}
    answers = [a["content"] for q, a in zip(made["sft"][::2], made["sft"][1::2]) if re.sub(r"[A-Z]\w+ [A-Z]\w+(?=[' ?.])", "{x}", q["content"]) in asked]
    assert len(answers) > 1000 and set(answers) <= world.FORMS
    assert not {"", "baker", "I do not know.…", "Wo I do not know.", "baker. baker.", "bakers."} & world.FORMS
