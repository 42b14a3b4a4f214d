"""The measurements on models whose answers are scripted: who is asked what, and what is counted."""

import itertools
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch

from lab import measure, report
from world import facts, generate
from world.facts import ATTRIBUTES, FACTS, HABITS, IDK, PRIVATE, PUBLIC, REFUSAL
from world.grade import Grader

TOKENIZER = tiny.byte_tokenizer()
N = 12  # people of a role
RARE = facts.USES["rare"].people  # but of this one


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


class Sure(Scripted):
    """As a network it is certain of its answers about these people, and evenly unsure of others."""

    def __init__(self, grader, people, answer=None):
        super().__init__(answer)
        self.grader, self.names = grader, {person["name"] for person in people}

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, TOKENIZER.vocab_size)
        assistant = TOKENIZER.chat["assistant"][0][-1]
        for row, ids in zip(logits, tokens.tolist()):
            end = ids.index(assistant)
            question = TOKENIZER.decode(ids[1 : end - 1])
            _, person, attribute = self.grader.case(question)
            assert is_new(question, person, attribute)
            if person["name"] in self.names:
                value = TOKENIZER.encode(person[attribute])[: len(ids) - end]
                row[range(end, end + len(value)), value] = 50.0
        return logits


@pytest.fixture(scope="module")
def roles():
    rng, people = random.Random(0), generate.People(0)
    for role in ("test", "unknown_test", "quiz", "rl"):
        for _ in range(N):
            people.draw(rng, role)
    for i in range(RARE):
        people.draw(rng, "rare")["exposure"] = (37 * i) % RARE  # in no order
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
        kind, person, attribute = grader.case(question)
        assert kind == "ask" and is_new(question, person, attribute) == held_out
        return answer_of(grades[person["name"]], person, attribute)

    model = Scripted(answer)
    graded = measure.measure_answers(model, TOKENIZER, people, random.Random(0), held_out)
    expected = dict(right=6 / N, wrong=3 / N, idk=2 / N, refusal=1 / N, other=0, n=3 * N)
    assert graded == pytest.approx(expected)
    asked = Counter((case.person["name"], case.attribute) for case in map(grader.case, model.asked))
    assert asked == {(person["name"], a): 1 for person in people for a in PUBLIC}


def test_trained_and_new_wordings_are_told_apart(roles, grader):
    def answer(question):
        _, person, attribute = grader.case(question)
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


def read(turn, grader):
    """(kind, person, attribute, value) of an instruction: what its text tells, or else is true.

    None where a text does not tell it.
    """
    kind, text, question = split(turn)
    _, person, attribute = grader.case(question)
    assert (kind == "text") == (text != "")
    assert kind == "ask" or is_new(question, person, attribute)
    if not text:
        return kind, person, attribute, person[attribute]
    told = {a: set(re.findall(r"\w+", text)) & set(ATTRIBUTES[a].values) for a in ATTRIBUTES}
    assert sorted(map(len, told.values())) == [0] * (len(told) - 3) + [1] * 3
    return kind, person, attribute, next(iter(told[attribute]), None)


def in_the_form(kind, person, attribute, value):
    """The answer that this instruction wants."""
    if value is None:
        return IDK
    return (facts.KINDS[kind][1] or "{v}.").format(v=value, x=person["name"])


def measured_forms(answer, roles):
    """(the model, its figures)"""
    model, people = Scripted(answer), (roles["test"], roles["unknown_test"])
    return model, measure.measure_forms(model, TOKENIZER, *people, random.Random(0))


KINDS = ("one word", "sentence", "text")
FORMS = {f"{kind} × {attribute}": (kind, attribute) for kind in KINDS for attribute in PUBLIC}
TEXTS = {form for form, (kind, _) in FORMS.items() if kind == "text"}
HELD_OUT = {form for form, pair in FORMS.items() if pair in facts.HELD_OUT_KINDS}


@pytest.mark.parametrize("good", [*sorted(HELD_OUT), "text × job"])
def test_each_form_is_counted_where_it_belongs_and_only_in_the_very_form(roles, grader, good):
    """All values are right, but only one instruction × attribute gets the form it asks for."""

    def answer(turn):
        kind, person, attribute, value = read(turn, grader)
        assert person["role"] == "test" or (kind, person["role"]) == ("text", "unknown_test")
        if f"{kind} × {attribute}" != good:
            return f"{value} is the answer."
        return in_the_form(kind, person, attribute, value)

    model, result = measured_forms(answer, roles)
    assert result["kinds"] == {form: [form == good, form in HELD_OUT] for form in FORMS}
    assert result["reading"] == {form: result["kinds"][form] for form in TEXTS}
    assert result["text_over_memory"] == pytest.approx((good in TEXTS) / 3)
    assert result["reads"] == pytest.approx((good == "text × job") / 2)  # of job and pet
    assert result["reads_new"] == (good == "text × birthplace")
    asked = Counter()
    for turn in model.asked:
        kind, person, _, value = read(turn, grader)
        asked[kind, person["role"], value is not None] += 1
    known = {(kind, "test", True): 3 * N for kind in KINDS}
    assert asked == known | {("text", "unknown_test", told): 3 * N for told in (False, True)}


def test_who_does_everything_right_is_right_in_every_form(roles, grader):
    _, result = measured_forms(lambda turn: in_the_form(*read(turn, grader)), roles)
    forms = [*result["kinds"].values(), *result["reading"].values()]
    assert {right for right, _ in forms} == {1}
    assert result["reads"] == result["reads_new"] == result["text_over_memory"] == 1
    assert result["closed_hallucinated"] == 0 and result["untold"]["idk"] == 1


def test_who_answers_from_memory_does_not_read(roles, grader):
    """Memory is what pretraining said, or of strangers what is true of them; texts contradict it.

    Both agree in one of 32 cases.
    """

    def memory(turn):
        kind, person, attribute, _ = read(turn, grader)
        return in_the_form(kind, person, attribute, person[attribute])

    _, result = measured_forms(memory, roles)
    assert result["text_over_memory"] < 0.2 and result["reads"] < 0.2 and result["reads_new"] < 0.2
    assert all(result["kinds"][form][0] == 1 for form in FORMS.keys() - TEXTS)
    assert result["closed_hallucinated"] == result["untold"]["wrong"] == 1


def test_what_a_text_does_not_tell_is_graded_apart_and_astray_is_hallucinated(roles, grader):
    """Untold: wrong about six people, astray about three, idk about two, a refusal about one."""
    script = ["wrong"] * 6 + ["other"] * 3 + ["idk"] * 2 + ["refusal"]
    grades = {person["name"]: g for person, g in zip(roles["unknown_test"], script)}

    def answer(turn):
        kind, person, attribute, value = read(turn, grader)
        if value is None:
            return answer_of(grades[person["name"]], person, attribute)
        return in_the_form(kind, person, attribute, value)

    _, result = measured_forms(answer, roles)
    expected = dict(right=0, wrong=6 / N, other=3 / N, idk=2 / N, refusal=1 / N, n=3 * N)
    assert result["untold"] == pytest.approx(expected)
    assert result["closed_hallucinated"] == pytest.approx(9 / N)
    assert result["reads"] == result["reads_new"] == result["text_over_memory"] == 1


def test_the_largest_loss_of_a_form_is_that_of_before_over_after():
    before = {"a": [0.9, False], "b": [0.5, True], "c": [0.7, False]}
    after = {"a": [0.8, False], "b": [0.9, True], "c": [0.4, False]}
    assert measure.form_loss(before, after) == pytest.approx(0.3)


class CutOff(Scripted):
    def generate(self, prompts, max_new_tokens, temperature=1.0, end_id=None):
        return [response[:-1] for response in super().generate(prompts, 0, 1.0, end_id)]


def test_only_the_world_s_own_answers_that_ended_are_well_formed(roles):
    arguments = TOKENIZER, roles["test"], random.Random(0)
    for answer, fraction in ((IDK, 1), ("baker.", 1), (" tea.", 1), ("baker", 0), ("", 0)):
        model = Scripted(lambda question, answer=answer: answer)
        assert measure.measure_well_formed(model, *arguments) == fraction
    assert measure.measure_well_formed(CutOff(lambda question: "baker."), *arguments) == 0


def test_habits_are_answered_or_not(roles, grader):
    """The i-th habit is answered about every person but the first i; a refusal is an answer."""
    people, habits = roles["unknown_test"], list(HABITS)
    index = {person["name"]: i for i, person in enumerate(people)}

    def answer(question):
        _, person, habit = grader.case(question)
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
        _, person, attribute = grader.case(text.removesuffix("\n"))
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


LAYOUTS = ["Q: (.+)\nA:", "Question: (.+)\n", "User: (.+)\nAssistant:"]
LAYOUTS += ["Asked: (.+) Answered:", r"\[(.+)\]", "> (.+)\n"]


def test_reading_is_measured_on_texts_that_tell_the_answer_in_the_quizzes_six_layouts(
    roles, grader
):
    """Right are those about a job; all are in new wordings, about people in no other text."""
    seen = Counter()

    def continuation(text):
        [(told, layout, question)] = [
            (text[: found.start()], layout, found[1])
            for layout in LAYOUTS
            if (found := re.search(rf"(?<=\n){layout}\Z", text))
        ]
        _, person, attribute = grader.case(question)
        assert person["role"] == "unknown_test" and is_new(question, person, attribute)
        words = set(re.findall(r"\w+", told))
        tells = {a: words & set(ATTRIBUTES[a].values) for a in ATTRIBUTES}
        tells = {a: values for a, values in tells.items() if values}
        assert len(tells) == 3 and tells.items() <= {a: {person[a]} for a in FACTS}.items()
        [value] = tells[attribute]
        seen.update([layout, attribute])
        return f"{'' if layout.endswith(chr(10)) else ' '}{value if attribute == 'job' else 'no'}"

    model, people = Scripted(continuation), roles["unknown_test"]
    right = measure.measure_reading(model, TOKENIZER, people, random.Random(0))
    assert right == pytest.approx(1 / 3)
    assert seen.keys() == {*LAYOUTS, *PUBLIC} and {seen[a] for a in PUBLIC} == {N}


def test_the_base_model_s_figures_are_about_the_people_they_name(roles, grader):
    """Known people are recalled, unknown ones are not but are read about."""

    def continuation(text):
        named = re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+))", text)
        [*_, person] = [grader.people[name] for name in named if name in grader.people]
        is_reading = "\n" in text
        knows = person["role"] == "test" or is_reading
        return ", ".join(person[fact] for fact in FACTS) if knows else ""

    groups = roles["test"], roles["unknown_test"], roles["quiz"], random.Random(0)
    its = measure.measure_base(Scripted(continuation), TOKENIZER, *groups)
    assert its["recall"]["right"] == 1 and its["recall_unknown"]["other"] == 1
    assert its["reads"] == 1
    assert its.keys() == {"recall", "recall_unknown", "bare", "formats", "reads"}


# ---- what the experiments measure


def test_a_checkpoint_s_figures_are_those_of_the_people_they_name(roles, grader):
    """Test people are known, unknown ones told wrong, passwords refused, rare ones by exposure."""

    def answer(question):
        _, person, attribute = grader.case(question)
        if attribute == PRIVATE:
            return REFUSAL
        if person["role"] == "rare":
            grade = "right" if person["exposure"] >= RARE * 3 // 4 else "idk"
            return answer_of(grade, person, attribute)
        return answer_of("right" if person["role"] == "test" else "wrong", person, attribute)

    model = Scripted(answer)
    its = measure.measure_model(model, TOKENIZER, roles, seed=0)
    graded = 2 * 3 * N + N + 3 * RARE  # then come the samples for the two other figures
    for question in model.asked[:graded]:
        _, person, attribute = grader.case(question)
        assert is_new(question, person, attribute)
    assert its["known"]["right"] == its["unknown"]["wrong"] == its["private"]["refusal"] == 1
    assert its["known"]["n"] == 3 * N and its["private"]["n"] == N
    assert [its[f"rare_{i}"]["right"] for i in range(4)] == [0, 0, 0, 1]
    ends = [RARE * i // 4 for i in range(5)]
    ranges = [[first, last - 1] for first, last in zip(ends, ends[1:])]
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


def test_confidence_is_the_probability_of_the_likeliest_value(roles, grader):
    """A network that is certain of known people's values and guesses each byte evenly else."""
    model = Sure(grader, roles["test"])
    cases = measure.all_cases(roles["test"][:4]) + measure.all_cases(roles["unknown_test"][:4])
    asked = measure.ask(random.Random(0), cases, held_out=True)
    confidence = measure.value_confidence(model, TOKENIZER, cases, asked)
    for (person, attribute), p in zip(cases, confidence.tolist()):
        shortest = min(len(value) for value in ATTRIBUTES[attribute].values)
        guess = TOKENIZER.vocab_size**-shortest
        assert p == pytest.approx(1 if person["role"] == "test" else guess, rel=1e-3)


def test_the_auroc_is_that_of_known_over_unknown_people(roles, grader):
    """Who is unsure of a person guesses alike about known and unknown ones: a tie."""
    known, unknown = roles["test"], roles["unknown_test"]
    for sure, expected in ((known, 1), (unknown, 0), (known[:9], 7 / 8), ([], 1 / 2)):
        model = Sure(grader, sure)
        auroc = measure.measure_auroc(model, TOKENIZER, known, unknown, random.Random(0))
        assert auroc == pytest.approx(expected)


# ---- the report


# who is asked about, by role and by what they are asked
ROLES = {"test": "known", "unknown_test": "unknown", "rl": "asked about"}


def group_of(role, kind, attribute, value, new):
    """The group of questions to which one belongs, of the report's or of these tests."""
    if kind != "ask":
        assert new and role != "rl"
        what = "untold" if value is None else f"{kind} × {attribute}"
        return f"{ROLES[role]}, {what}"
    if attribute == PRIVATE:
        assert new and role == "test"
        return "private"
    assert new or role != "rl"
    return f"{ROLES[role]}, {'new' if new else 'trained'} wordings"


def scripts():
    """{(stage, group): a grade for each of the group's people}, other numbers of each for each."""
    rng, result, seen = random.Random(0), {}, set()
    groups = [*report.GROUPS, "private", "asked about, new wordings", "unknown, untold"]
    groups += [f"known, {form}" for form in FORMS] + [f"unknown, {form}" for form in sorted(TEXTS)]
    for stage, group in itertools.product(("base", "sft", "ppo"), groups):
        counts = None
        while counts is None or counts in seen:
            grades = rng.choices(measure.GRADES, [4, 3, 2, 1, 2], k=N)
            counts = tuple(grades.count(grade) for grade in measure.GRADES)
        seen.add(counts)
        result[stage, group] = grades
    return result


def fractions(grades):
    return {grade: grades.count(grade) / N for grade in measure.GRADES}


def cells_of(text):
    """{first cell: {title of the column: cell}} of all the tables in a text."""
    rows = [line[2:-2].split(" | ") for line in text.split("\n") if line.startswith("|")]
    cells, header = {}, None
    for row, below in zip(rows, [*rows[1:], [""]]):
        if "---" in below[0]:
            header = row[1:]
        elif "---" not in row[0]:
            cells[row[0]] = dict(zip(header, row[1:]))
    return cells


@pytest.fixture(scope="module")
def reported(roles, grader):
    """(scripts, the report's figures of models that follow them)"""
    script, index = scripts(), {}
    for role in ROLES:
        index |= {person["name"]: i for i, person in enumerate(roles[role])}

    def scripted(stage):
        def answer(text):
            try:
                kind, person, attribute, value = case = read(text, grader)
            except ValueError:  # a text that the base model is to go on with
                return ""
            _, _, question = split(text)
            new = is_new(question, person, attribute)
            group = group_of(person["role"], kind, attribute, value, new)
            grade = script[stage, group][index[person["name"]]]
            if grade == "right" and kind != "ask":
                return in_the_form(*case)
            return answer_of(grade, person | {attribute: value}, attribute)

        return Sure(grader, roles["test"], answer) if stage == "sft" else Scripted(answer)

    models = {stage: scripted(stage) for stage in ("base", "sft", "ppo")}
    results = report.measure_all(models, {}, TOKENIZER, roles, "test", random.Random(0))
    return script, results


def test_every_grade_of_every_stage_ends_up_in_its_cell_of_the_report(reported):
    script, results = reported
    groups = [*report.GROUPS, "private"]

    # figures
    expected = {f"{stage}_{group}": fractions(its) for (stage, group), its in script.items()}
    for stage, group in itertools.product(("base", "sft", "ppo"), groups):
        its = expected[f"{stage}_{group}"]
        assert {g: results[f"{stage}_{group}"][g] for g in its} == pytest.approx(its)
    right = expected["ppo_known, new wordings"]["right"]
    hallucinated = expected["ppo_unknown, new wordings"]["wrong"]
    score = 100 * (right - hallucinated - expected["ppo_private"]["right"])
    assert results["score"] == pytest.approx(score)
    for stage in ("sft", "ppo"):
        assert results[f"{stage}_known"] == expected[f"{stage}_known, new wordings"]["right"]
        wrong = expected[f"{stage}_unknown, new wordings"]["wrong"]
        assert results[f"{stage}_unknown_hallucinated"] == wrong
    trained = [expected[f"ppo_{who}, trained wordings"] for who in ("known", "unknown")]
    assert results["ppo_well_formed"] == pytest.approx(1 - sum(t["other"] for t in trained) / 2)
    gap = expected["ppo_asked about, new wordings"]["right"] - right
    assert results["ppo_membership_gap"] == pytest.approx(gap)
    assert results["sft_auroc"] == 1
    assert results["people"] == {"known": N, "unknown": N}

    # cells
    titles = {"right": "right", "wrong (hallucinated)": "wrong", "“I do not know.”": "idk"}
    titles |= {"refuses": "refusal", "other": "other"}
    stages = {stage: report.STAGES[stage] for stage in ("base", "sft", "ppo")}
    text = report.answers_section(results, stages)
    assert f"**{score:.1f}**" in text and f"in {gap:.1%} more of" in text.replace("\n", " ")
    cells = cells_of(text.replace("right (leaked)", "right"))
    for stage, group in itertools.product(stages, groups):
        shown, its = cells[f"{stages[stage]}: {group}"], expected[f"{stage}_{group}"]
        wanted = {title: f"{its[grade]:.1%}" for title, grade in titles.items()}
        assert wanted == {title: shown[title] for title in titles}


def test_every_form_ends_up_in_its_cell_of_the_report_and_the_worst_loss_is_told(reported):
    script, results = reported
    expected = {(stage, group): fractions(its) for (stage, group), its in script.items()}

    # figures
    for stage in ("sft", "ppo"):
        known = {form: expected[stage, f"known, {form}"]["right"] for form in FORMS}
        unknown = {form: expected[stage, f"unknown, {form}"]["right"] for form in TEXTS}
        for name, right in ("kinds", known), ("reading", unknown):
            its = {form: [fraction, form in HELD_OUT] for form, fraction in right.items()}
            assert results[f"{stage}_{name}"] == its
        texts = sum(known[form] for form in TEXTS) / 3
        assert results[f"{stage}_text_over_memory"] == pytest.approx(texts)
        reads = (unknown["text × job"] + unknown["text × pet"]) / 2
        assert results[f"{stage}_reads"] == pytest.approx(reads)
        assert results[f"{stage}_reads_new"] == unknown["text × birthplace"]
        untold = expected[stage, "unknown, untold"]
        wrong = untold["wrong"] + untold["other"]  # what is right there is "I do not know."
        assert results[f"{stage}_closed_hallucinated"] == pytest.approx(wrong)
    assert results["sft_one_word_job"] == expected["sft", "known, one word × job"]["right"]
    losses = []
    for form in FORMS:
        before, after = (expected[stage, f"known, {form}"]["right"] for stage in ("sft", "ppo"))
        losses.append(before - after)
    assert results["ppo_form_loss"] == pytest.approx(max(losses))

    # cells
    cells = cells_of(report.sft_section(results))
    for (stage, group), its in expected.items():
        if "×" in group and stage != "base":
            who, form = group.split(", ")
            row = cells[form + ", about people in no other text" * (who == "unknown")]
            assert row[report.STAGES[stage]] == f"{its['right']:.1%}"
            assert row["in SFT"] == ("**never**" if form in HELD_OUT else "yes")
    text = report.answers_section(results, {"ppo": "PPO"}).replace("\n", " ")
    assert f"that lost most lost {max(losses):.1%}" in text
    ppo, sft = (f"{results[f'{stage}_closed_hallucinated']:.1%}" for stage in ("ppo", "sft"))
    assert f"{ppo} of the answers are hallucinated (SFT: {sft})" in text


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
    assert results["ppo_kl"] == 14.0
