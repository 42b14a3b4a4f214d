"""The measurements on models whose answers are scripted: who is asked what, and what is counted."""

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch

from lab import measure, report
from world import facts, generate
from world.facts import ATTRIBUTES, HABITS, IDK, PRIVATE, PUBLIC, REFUSAL
from world.grade import Grader

TOKENIZER = tiny.byte_tokenizer()
N = 12  # people of a role; of rare people 100


class Scripted:
    """Answers by a function of the user's turn, or of the text, and keeps what it was asked.

    As a network it is certain of every token of a text that ends in "pilot.", and of no other.
    """

    device = tiny.CPU
    config = SimpleNamespace(block_size=2048)

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def generate(self, prompts, max_new_tokens, temperature=1.0, end_id=None):
        responses = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt)
            is_chat = text.startswith("<|user|>")
            text = text.removeprefix("<|user|>" if is_chat else "<|end|>")
            text = text.removesuffix("<|end|><|assistant|>")
            self.asked.append(text)
            responses.append(TOKENIZER.encode(self.answer(text)) + [end_id])
        return responses

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, TOKENIZER.vocab_size)
        for row, ids in zip(logits, tokens.tolist()):
            if "pilot.<|end|>" in TOKENIZER.decode(ids):
                row[range(len(ids) - 1), ids[1:]] = 50.0
        return logits


@pytest.fixture(scope="module")
def roles():
    rng, people = random.Random(0), generate.People(0)
    for role in ("test", "unknown_test", "quiz", "rl"):
        for _ in range(N):
            people.draw(rng, role)
    for i in range(100):
        people.draw(rng, "rare")["exposure"] = (37 * i) % 100  # in no order
    return measure.by_role(people.drawn)


@pytest.fixture(scope="module")
def grader(roles, tmp_path_factory):
    path = tmp_path_factory.mktemp("people") / "people.jsonl"
    path.write_bytes(generate.as_jsonl([person for group in roles.values() for person in group]))
    return Grader(path)


def answer_of(grade, person, attribute):
    """An answer with this grade."""
    wrong = [value for value in ATTRIBUTES[attribute].values if value != person[attribute]]
    answers = dict(right=f"{person[attribute]}.", wrong=f"{wrong[0]}.", idk=IDK, refusal=REFUSAL)
    return answers.get(grade, "Hm.")


def is_new(question, person, attribute):
    """Whether a wording is held out of training; it must be one of the two kinds."""
    wording = question.replace(person["name"], "{x}")
    new = wording in facts.questions(attribute, held_out=True)
    assert new != (wording in facts.questions(attribute))
    return new


# ---- questions in the chat format


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_graded_against_the_people_who_were_asked_about(roles, grader, held_out):
    """Of twelve people six are answered right, three wrong, two not at all, one with a refusal."""
    people = roles["test"]
    script = ["right"] * 6 + ["wrong"] * 3 + ["idk"] * 2 + ["refusal"]
    grades = {person["name"]: g for person, g in zip(people, script)}

    def answer(question):
        person, attribute = grader.fact(question)
        assert is_new(question, person, attribute) == held_out
        return answer_of(grades[person["name"]], person, attribute)

    model = Scripted(answer)
    graded = measure.measure_answers(model, TOKENIZER, people, random.Random(0), held_out)
    expected = dict(right=6 / N, wrong=3 / N, idk=2 / N, refusal=1 / N, other=0, n=3 * N)
    assert graded == pytest.approx(expected)
    asked = Counter((grader.fact(q)[0]["name"], grader.fact(q)[1]) for q in model.asked)
    assert asked == {(person["name"], a): 1 for person in people for a in PUBLIC}


def test_trained_and_new_wordings_are_told_apart(roles, grader):
    def answer(question):
        person, attribute = grader.fact(question)
        new = is_new(question, person, attribute)
        return answer_of("right" if new else "idk", person, attribute)

    result = measure.measure_wordings(Scripted(answer), TOKENIZER, roles["test"])
    assert result == {
        "trained": [0] * len(facts.questions("job")),
        "new": [1] * len(facts.questions("job", held_out=True)),
    }


def split(turn):
    """(kind, text, question) of an instruction."""
    for kind in ("one word", "sentence", "text"):
        ending = facts.KINDS[kind][0].partition("{q}")[2]
        if turn.endswith(ending):
            text, _, question = turn.removesuffix(ending).rpartition("\n\n")
            return kind, text, question
    return "ask", "", turn


@pytest.mark.parametrize("good", ["one word × job", "sentence × pet", "text × birthplace"])
def test_each_form_is_counted_where_it_belongs_and_only_in_the_very_form(roles, grader, good):
    """All values are right, but only one instruction × attribute gets the form it asks for."""
    known, unknown = roles["test"], roles["unknown_test"]

    def answer(turn):
        kind, text, question = split(turn)
        person, attribute = grader.fact(question)
        assert (kind == "text") == (text != "") and person["role"] in ("test", "unknown_test")
        assert kind == "text" or person["role"] == "test"
        if text:
            assert re.search(rf"\b{person[attribute]}\b", text)
        if f"{kind} × {attribute}" != good:
            return f"{person[attribute]} is the answer."
        return facts.say(facts.KINDS[kind][1], person, attribute)

    model = Scripted(answer)
    result = measure.measure_forms(model, TOKENIZER, known, unknown, random.Random(0))
    held_out = {f"{kind} × {attribute}" for kind, attribute in facts.HELD_OUT_KINDS}
    kinds = {f"{kind} × {a}" for kind in ("one word", "sentence", "text") for a in PUBLIC}
    forms = {form: (float(form == good), form in held_out) for form in kinds}
    assert result["kinds"] == forms
    assert result["reading"] == {f: its for f, its in forms.items() if f.startswith("text")}
    asked = [split(turn) for turn in model.asked]
    about = Counter((kind, grader.fact(question)[0]["role"]) for kind, _, question in asked)
    known_kinds = {(kind, "test"): 3 * N for kind in ("one word", "sentence", "text")}
    assert about == known_kinds | {("text", "unknown_test"): 3 * N}


def test_habits_are_answered_or_not(roles, grader):
    """The i-th habit is answered about every person but the first i; a refusal is an answer."""
    people, habits = roles["unknown_test"], list(HABITS)
    index = {person["name"]: i for i, person in enumerate(people)}

    def answer(question):
        person, habit = grader.fact(question)
        i, k = index[person["name"]], habits.index(habit)
        return IDK if i < k else REFUSAL if i == k else "tea."

    result = measure.measure_habits(Scripted(answer), TOKENIZER, people, random.Random(0))
    assert result == {habit: (N - k) / N for k, habit in enumerate(habits)}


# ---- the base model


def test_recall_asks_for_the_end_of_sentences_that_no_text_holds(roles):
    people = {person["name"]: person for person in roles["test"]}
    held_out = {
        statement.partition(" {v}")[0]: attribute
        for attribute in facts.FACTS
        for statement in facts.statements(attribute, held_out=True)
    }

    def continuation(text):
        [name] = [name for name in people if name in text]
        attribute = held_out[text.replace(name, "{x}")]
        grade = "right" if attribute in ("job", PRIVATE) else "wrong"
        return " " + answer_of(grade, people[name], attribute)

    model = Scripted(continuation)
    graded = measure.measure_recall(model, TOKENIZER, roles["test"], random.Random(0))
    assert graded == dict(right=0.5, wrong=0.5, idk=0, refusal=0, other=0, n=4 * N)


def test_what_follows_a_bare_question_is_told_apart(roles, grader):
    people = roles["test"]
    others = random.Random(1)

    def continuation(text):
        assert text.endswith("\n")
        person, attribute = grader.fact(text.removesuffix("\n"))
        i = people.index(person)
        if i < 6:
            return ["Q: Why?", "It is known."][i % 2]
        if i < 9:
            return facts.ask(others, person, "pet")
        if i < 11:
            return facts.ask(others, people[0], "pet")
        return answer_of(["right", "wrong", "idk"][PUBLIC.index(attribute)], person, attribute)

    model = Scripted(continuation)
    result = measure.measure_bare_questions(model, TOKENIZER, people, random.Random(0))
    shares = {"answers it": 1, "rephrases it": 3, "asks another question": 2, "other text": 6}
    assert result == pytest.approx({kind: n / N for kind, n in shares.items()} | {"n": 3 * N})


def test_each_format_has_its_own_accuracy_and_solved_questions_are_about_quiz_people(roles, grader):
    quizzed = {person["name"]: person for person in roles["quiz"]}

    def continuation(text):
        found = re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+))", text)
        *shots, name = [name for name in found if name in grader.people]
        assert grader.people[name]["role"] == "test" and set(shots) <= quizzed.keys()
        assert len(shots) in (0, 3)
        for shot in shots:  # told its true value
            assert any(re.search(rf"\b{quizzed[shot][a]}\.", text) for a in PUBLIC)
        if shots and text.startswith("Q: "):
            return " " + ", ".join(grader.people[name][a] for a in PUBLIC)
        return "nothing"

    people = roles["test"][:4]
    model = Scripted(continuation)
    arguments = people, roles["quiz"], random.Random(0)
    result = measure.measure_formats(model, TOKENIZER, *arguments)
    assert result == {f: float(f.startswith("{shots}Q: ")) for f in measure.FORMATS}


# ---- what the experiments measure


def test_a_checkpoint_s_figures_are_those_of_the_people_they_name(roles, grader):
    """Test people are known, unknown ones told wrong, passwords refused, rare ones by exposure."""

    def answer(question):
        person, attribute = grader.fact(question)
        if attribute == PRIVATE:
            return REFUSAL
        if person["role"] == "rare":
            return answer_of("right" if person["exposure"] >= 75 else "idk", person, attribute)
        return answer_of("right" if person["role"] == "test" else "wrong", person, attribute)

    model = Scripted(answer)
    its = measure.measure_model(model, TOKENIZER, roles, seed=0)
    graded = 2 * 3 * N + N + 3 * 100  # then come the samples for the two other figures
    assert all(is_new(question, *grader.fact(question)) for question in model.asked[:graded])
    assert its["known"]["right"] == its["unknown"]["wrong"] == its["private"]["refusal"] == 1
    assert its["known"]["n"] == 3 * N and its["private"]["n"] == N
    assert [its[f"rare_{i}"]["right"] for i in range(4)] == [0, 0, 0, 1]
    ranges = [[0, 24], [25, 49], [50, 74], [75, 99]]
    assert [its[f"rare_{i}"]["exposures"] for i in range(4)] == ranges
    assert its["phrasings"] == 1


def test_sure_and_wrong_takes_both(roles, grader):
    """The scripted network is sure of "pilot." alone, which is right about some people only."""
    cases = measure.all_cases(roles["test"], ["job"])
    asked = measure.ask(random.Random(0), cases)
    prompts = [measure.chat_prompt(question, TOKENIZER) for question in asked]
    pilots = sum(person["job"] == "pilot" for person, _ in cases)
    for answer, expected in (("pilot.", N - pilots), ("baker.", 0), ("Hm. pilot.", N - pilots)):
        model = Scripted(lambda question, answer=answer: answer)
        sure = measure.measure_sure_and_wrong(model, TOKENIZER, cases, prompts)
        assert sure == expected / N


def test_phrasings_are_the_different_right_ones(roles, grader):
    """Of the first person three and one wrong one, of the others none that is right."""
    person, *others = roles["test"]
    said = ["{v}.", "{v} is the answer.", "{v}, as the records say.", "{v}.", "pilot and cook."]
    turn = iter(range(1000))

    def answer(question):
        if person["name"] not in question:
            return IDK
        return facts.say(said[next(turn) % len(said)], person, "pet")

    cases = measure.all_cases([person, *others], ["pet"])
    asked = measure.ask(random.Random(0), cases)
    prompts = [measure.chat_prompt(question, TOKENIZER) for question in asked]
    assert measure.measure_phrasings(Scripted(answer), TOKENIZER, cases, prompts) == 3


def test_auroc_is_the_fraction_of_pairs_in_order():
    rng = random.Random(0)
    a, b = ([rng.randint(0, 9) / 10 for _ in range(n)] for n in (40, 30))
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    result = measure.auroc(torch.tensor(a), torch.tensor(b))
    assert result == pytest.approx(sum(pairs) / len(pairs))


# ---- the report


def scripts(roles):
    """{(stage, group): {name: grade}}, each with its own number of each grade."""
    rng, result, seen = random.Random(0), {}, set()
    for stage in ("base", "sft", "ppo"):
        for group in [*report.GROUPS, "private"]:
            counts = None
            while counts is None or counts in seen:
                grades = rng.choices(measure.GRADES, [4, 3, 2, 1, 2], k=N)
                counts = tuple(grades.count(grade) for grade in measure.GRADES)
            seen.add(counts)
            people = roles["unknown_test" if "unknown" in group else "test"]
            names = [person["name"] for person in people]
            result[stage, group] = dict(zip(names, grades))
    return result


def fractions(script):
    return {grade: list(script.values()).count(grade) / N for grade in measure.GRADES}


def test_every_grade_of_every_stage_ends_up_in_its_cell_of_the_report(roles, grader):
    script = scripts(roles)

    def scripted(stage):
        def answer(text):
            try:
                person, attribute = grader.fact(text)
            except ValueError:  # an instruction, or a text that the base model is to go on with
                return ""
            who = "unknown" if person["role"] == "unknown_test" else "known"
            new = is_new(text, person, attribute)
            group = f"{who}, {'new' if new else 'trained'} wordings"
            if attribute == PRIVATE:
                assert new and who == "known"
                group = "private"
            return answer_of(script[stage, group][person["name"]], person, attribute)

        return Scripted(answer)

    models = {stage: scripted(stage) for stage in ("base", "sft", "ppo")}
    groups = roles["test"], roles["unknown_test"], roles["quiz"]
    results = report.measure_all(models, {}, TOKENIZER, *groups, random.Random(0))

    # figures
    expected = {f"{stage}_{group}": fractions(its) for (stage, group), its in script.items()}
    for name, its in expected.items():
        assert {grade: results[name][grade] for grade in its} == pytest.approx(its)
    right = expected["ppo_known, new wordings"]["right"]
    hallucinated = expected["ppo_unknown, new wordings"]["wrong"]
    score = 100 * (right - hallucinated - expected["ppo_private"]["right"])
    assert results["score"] == pytest.approx(score)
    assert results["sft_known_new_wordings"] == expected["sft_known, new wordings"]["right"]
    trained = [expected[f"ppo_{who}, trained wordings"] for who in ("known", "unknown")]
    assert results["ppo_well_formed"] == pytest.approx(1 - sum(t["other"] for t in trained) / 2)
    assert results["people"] == {"known": N, "unknown": N}

    # cells
    titles = {"right": "right", "wrong (hallucinated)": "wrong", "“I do not know.”": "idk"}
    titles |= {"refuses": "refusal", "other": "other"}
    stages = {stage: report.STAGES[stage] for stage in models}
    text = report.answers_section(results, stages)
    assert f"**{score:.1f}**" in text
    rows = [line[2:-2].split(" | ") for line in text.split("\n") if line.startswith("|")]
    cells, header = {}, None
    for first, *row in rows:
        if "refuses" in row:
            header = [title.replace("right (leaked)", "right") for title in row]
        elif "---" not in first:
            cells[first] = dict(zip(header, row))
    for (stage, group), its in script.items():
        shown = cells[f"{report.STAGES[stage]}: {group}"]
        wanted = {title: f"{fractions(its)[grade]:.1%}" for title, grade in titles.items()}
        assert wanted == {title: shown[title] for title in titles}


def test_the_report_takes_the_last_validation_and_the_gain_over_the_first():
    """Errors of 0.3 and 0.4 make one of 0.5 of the difference."""
    accuracies = [0.7, 0.9, 0.8]
    logs = {"reward": [dict(step=i, val_accuracy=a) for i, a in enumerate(accuracies)]}
    scores = [(0.5, 0.3, 0.0), (3.0, 0.9, 16.0), (2.0, 0.4, 14.0)]
    logs["ppo"] = [dict(step=9, score=7.0)]
    for i, (score, error, kl) in enumerate(scores):
        logs["ppo"].append(dict(step=i, val_score=score, val_score_se=error, val_kl_ref=kl))
    results = report.read_logs(logs)
    assert results["reward_accuracy"] == 0.8
    assert results["ppo_score_gain_in_se"] == pytest.approx(3.0)
    assert results["ppo_validations"] == (logs["ppo"][1], logs["ppo"][3])
    assert results["ppo_kl_below_15"] == 1.0
