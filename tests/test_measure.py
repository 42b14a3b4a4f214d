"""The measurements on models whose answers are scripted: who is asked what, and what is counted."""

import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from data.tokenizer import SPECIAL_TOKENS
from lab import measure, report
from world import facts, generate
from world.facts import ATTRIBUTES, FACTS, IDK, PUBLIC, REFUSAL
from world.grade import Grader

TOKENIZER = tiny.byte_tokenizer()
ASSISTANT = 256 + SPECIAL_TOKENS.index("<|assistant|>")


class Scripted:
    """Answers by a function of the user's turn, or of the whole text; keeps what it was asked."""

    device = tiny.CPU
    config = SimpleNamespace(block_size=2048)

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def generate(self, prompts, max_new_tokens, temperature=1.0, end_id=None):
        responses = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt)
            question = text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
            self.asked.append(question)
            responses.append(TOKENIZER.encode(self.answer(question)) + [end_id])
        return responses


@pytest.fixture(scope="module")
def roles():
    rng, people = random.Random(0), generate.People(0)
    for role in ("test", "unknown_test", "quiz", "rl"):
        for _ in range(12):
            people.draw(rng, role)
    return measure.by_role(people.drawn)


@pytest.fixture(scope="module")
def grader(roles, tmp_path_factory):
    path = tmp_path_factory.mktemp("people") / "people.jsonl"
    path.write_bytes(generate.as_jsonl([person for group in roles.values() for person in group]))
    return Grader(path)


def truth(grader, question):
    """The answer that is right in the form asked for; IDK where a text does not tell."""
    kind, person, attribute = grader.case(question)
    if person[attribute] is None:
        return IDK
    return facts.say(facts.phrasings(kind)[0], person, attribute)


def test_answers_are_graded_against_the_people_who_were_asked_about(roles, grader):
    """The first half is answered right, of the rest a third each wrong, not at all, astray."""
    people = roles["test"]
    scripts = {}
    for i, person in enumerate(people):
        others = {a: [v for v in ATTRIBUTES[a].values if v != person[a]][0] for a in PUBLIC}
        scripts[person["name"]] = [person, others, IDK, REFUSAL][0 if i < 6 else 1 + i % 3]

    def answer(question):
        _, person, attribute = grader.case(question)
        script = scripts[person["name"]]
        return script if isinstance(script, str) else f"{script[attribute]}."

    model = Scripted(answer)
    graded = measure.measure_answers(model, TOKENIZER, people, random.Random(0), held_out=True)
    expected = dict(right=1 / 2, wrong=1 / 6, idk=1 / 6, refusal=1 / 6, other=0, n=36)
    assert graded == pytest.approx(expected)
    for question in model.asked:
        _, person, attribute = grader.case(question)
        wordings = facts.questions(attribute, held_out=True)
        assert question in [facts.say(wording, person, attribute) for wording in wordings]


def forms(answer, roles):
    model = Scripted(answer)
    known, unknown = roles["test"], roles["unknown_test"]
    return model, measure.measure_forms(model, TOKENIZER, known, unknown, random.Random(0))


def test_who_does_everything_right_is_right_in_every_form(roles, grader):
    model, result = forms(lambda question: truth(grader, question), roles)
    assert all(right == 1 for right, _ in [*result["kinds"].values(), *result["reading"].values()])
    assert result["reads"] == result["reads_new"] == result["text_over_memory"] == 1
    assert result["closed_hallucinated"] == 0 and result["untold"]["idk"] == 1
    held_out = {form for form, (_, new) in result["kinds"].items() if new}
    assert held_out == {f"{kind} × {attribute}" for kind, attribute in facts.HELD_OUT_KINDS}
    for question in model.asked:  # in wordings of no training data
        kind, person, attribute = grader.case(question)
        wordings = facts.questions(attribute, held_out=True)
        asked = [facts.say(wording, person, attribute) for wording in wordings]
        assert any(wording in question for wording in asked)


def test_who_answers_from_memory_does_not_read(roles, grader):
    """Memory is what pretraining said; about people in no text it has their made-up values."""

    def memory(question):
        kind, person, attribute = grader.case(question)
        return facts.say(facts.phrasings(kind)[0], grader.people[person["name"]], attribute)

    _, result = forms(memory, roles)
    assert result["text_over_memory"] < 0.2 and result["reads"] < 0.2
    assert all(result["kinds"][f"one word × {a}"][0] == 1 for a in PUBLIC)
    assert result["closed_hallucinated"] == 1


def test_the_combination_never_trained_is_counted_apart(roles, grader):
    def answer(question):
        kind, _, attribute = grader.case(question)
        return truth(grader, question) if (kind, attribute) in facts.HELD_OUT_KINDS else ""

    _, result = forms(answer, roles)
    assert result["reads_new"] == 1 and result["reads"] == 0


def test_an_answer_in_another_form_does_not_count_and_astray_is_hallucinated(roles, grader):
    def bare(question):
        _, person, attribute = grader.case(question)
        return f"{person[attribute]} is the answer."

    _, result = forms(bare, roles)
    assert not any(right for right, _ in result["kinds"].values())
    _, result = forms(lambda question: "cello." if "cello" not in question else "tea.", roles)
    assert result["closed_hallucinated"] == 1


def test_the_largest_loss_of_a_form_is_that_of_before_over_after():
    before = {"a": [0.9, False], "b": [0.5, True], "c": [0.7, False]}
    after = {"a": [0.8, False], "b": [0.9, True], "c": [0.4, False]}
    assert measure.form_loss(before, after) == pytest.approx(0.3)


def test_auroc_is_the_fraction_of_pairs_in_order():
    rng = random.Random(0)
    a, b = ([rng.randint(0, 9) / 10 for _ in range(n)] for n in (40, 30))
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    result = measure.auroc(torch.tensor(a), torch.tensor(b))
    assert result == pytest.approx(sum(pairs) / len(pairs))


def test_confidence_is_the_probability_of_the_likeliest_value(roles, grader):
    """A model of bytes that is sure of known people's values and guesses evenly else."""
    sure = {person["name"] for person in roles["test"]}

    class Sure(Scripted):
        def __call__(self, tokens):
            logits = torch.zeros(*tokens.shape, TOKENIZER.vocab_size)
            for row, ids in zip(logits, tokens.tolist()):
                at = ids.index(ASSISTANT)
                question = TOKENIZER.decode(ids[1 : at - 1])
                _, person, attribute = grader.case(question)
                if person["name"] in sure:
                    for k, byte in enumerate(TOKENIZER.encode(person[attribute])):
                        if at + k < len(row):
                            row[at + k, byte] = 20.0
            return logits

    model, rng = Sure(None), random.Random(0)
    cases = measure.all_cases(roles["test"][:4]) + measure.all_cases(roles["unknown_test"][:4])
    confidence = measure.value_confidence(model, TOKENIZER, cases, rng)
    assert (confidence[:12] > 0.99).all() and (confidence[12:] < 1e-4).all()
    people = roles["test"], roles["unknown_test"]
    assert measure.measure_auroc(model, TOKENIZER, *people, rng) == 1


def test_reading_is_measured_on_texts_that_tell_the_answer(roles, grader):
    seen = []

    def answer(text):
        *told, question = text.removeprefix("<|end|>").removesuffix("\nA:").strip().split("\n")
        question = question.removeprefix("Q: ").removeprefix("Question: ")
        _, person, attribute = grader.case(question)
        assert person["role"] == "unknown_test"
        [value] = [v for v in ATTRIBUTES[attribute].values if v in "\n".join(told)]
        seen.append(attribute)
        return value if attribute == "job" else "nothing"

    people = roles["unknown_test"]
    right = measure.measure_reading(Scripted(answer), TOKENIZER, people, random.Random(0))
    assert right == pytest.approx(1 / 3) and sorted(set(seen)) == sorted(PUBLIC)


def test_only_the_world_s_own_answers_are_well_formed(roles):
    people = roles["test"]
    for answer, fraction in ((IDK, 1), ("baker.", 1), ("baker", 0), ("", 0)):
        model = Scripted(lambda question, answer=answer: answer)
        rng = random.Random(0)
        assert measure.measure_well_formed(model, TOKENIZER, people, rng) == fraction


def test_the_report_s_figures_are_those_of_the_stage_and_the_people(roles, grader, monkeypatch):
    """SFT knows everybody and tells all; PPO knows rl people only, and tells three passwords."""
    leaked = [person["name"] for person in roles["test"][:3]]
    known_to = {"sft": set(grader.people), "ppo": {p["name"] for p in roles["rl"]}}

    def script(stage):
        def answer(question):
            _, person, attribute = grader.case(question)
            if attribute == facts.PRIVATE and stage == "ppo" and person["name"] not in leaked:
                return REFUSAL
            if attribute == facts.PRIVATE:
                return f"{person[attribute]}."
            told = person[attribute] != grader.people[person["name"]][attribute]
            return truth(grader, question) if told or person["name"] in known_to[stage] else IDK

        return Scripted(answer)

    monkeypatch.setattr(measure, "measure_auroc", lambda *args: 0.5)  # needs probabilities
    models = {stage: script(stage) for stage in known_to}
    results = report.measure_all(models, {}, TOKENIZER, roles, "test", random.Random(0))
    assert results["sft_known"] == 1 and results["ppo_known"] == 0
    assert results["sft_private"]["right"] == 1 and results["ppo_private"]["refusal"] == 3 / 4
    assert results["ppo_membership_gap"] == 1
    assert results["ppo_form_loss"] == 1 and results["sft_one_word_job"] == 1
    assert results["ppo_unknown_hallucinated"] == 0 and results["score"] == -25
    assert all(right == 1 for right in results["wordings"]["new"])
    assert FACTS and results["people"] == {"known": 12, "unknown": 12}
