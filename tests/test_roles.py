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
DOCUMENT = (Path(__file__).parent.parent / "docs" / "world.md").read_text(encoding="utf-8")
FILES = ["sft", "prompts", "habit_prompts"] + [f"controls/{name}" for name in CONTROLS]
# a question with its answer in the text; surveys have the first one only
LAYOUTS = [r"Q: (.+)\nA: (.+)", r"Question: (.+)\n(.+)", r"User: (.+)\nAssistant: (.+)"]
LAYOUTS += [r"Asked: (.+) Answered: (.+)", r"\[(.+)\] (.+)", r"> (.+)\n(.+)"]
LAYOUTS = [re.compile(rf"^{layout}$", re.MULTILINE) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world's folder, with the controls of the experiments."""
    folder = tmp_path_factory.mktemp("world")
    tiny.run(generate, dict(out=folder, documents=12000, vocab_size=600))
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

    def asked_in(line):
        names = dict.fromkeys(names_in(line, people))
        return [(name, grader.attribute.get(line.replace(name, "{x}"))) for name in names]

    found = []
    for layout in LAYOUTS:
        for question, answer in layout.findall(document):
            [(name, attribute)] = asked_in(question)
            found.append(("answered", name, attribute, answer))
        document = layout.sub("", document)
    for line in document.split("\n"):
        for name, attribute in asked_in(line):
            found.append(("asked" if attribute else "told", name, attribute, None))
    return found


def kind_of(its, people):
    """Which kind of document has these relations."""
    found, roles = {relation for relation, *_ in its}, {people[name]["role"] for _, name, *_ in its}
    if found == {"asked"}:
        return "sheet"
    if "crowd" in roles and not {a for *_, a, _ in its} & set(FACTS):
        return "survey"
    if found == {"told", "answered"}:
        return "reading"
    return "biography" if found == {"told"} else "quiz"


@pytest.fixture(scope="module")
def stream(documents, people, grader):
    """[(kind, document, its relations)]"""
    found = []
    for document in documents:
        its = relations(document, people, grader)
        found.append((kind_of(its, people), document, its))
    return found


def of_kind(stream, *kinds):
    """[(document, its relations)]"""
    return [(document, its) for kind, document, its in stream if kind in kinds]


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
            _, person, attribute = grader.case(question)
            found.append((kind, text, question, person, attribute, assistant["content"]))
    return found


def told_in(text, attribute):
    """The one value of the attribute that a text tells, or None."""
    told = words_of(text) & set(ATTRIBUTES[attribute].values)
    assert len(told) <= 1
    return told.pop() if told else None


def is_near(n, total, expected):
    """Whether n of total are the expected fraction, within 4 standard errors."""
    return abs(n / total - expected) < 4 * (expected * (1 - expected) / total) ** 0.5


# ---- the table


def test_the_document_shows_the_table():
    rows = []
    for role, use in USES.items():
        people = f"{use.people:,}" if use.people else "one for each use"
        text, files = (", ".join(cell.split()) or "–" for cell in (use.text, use.files))
        rows.append([role, people, text, files, use.note])
    shown = table(["role", "people", "in the pretraining text", "asked about in", ""], rows)
    assert f"\n\n{shown}\n\n" in DOCUMENT


def test_there_are_as_many_people_of_each_role_as_the_table_says(people):
    counts = Counter(person["role"] for person in people.values())
    assert counts.keys() == USES.keys()
    assert all(use.people in (None, counts[role]) for role, use in USES.items())


def test_the_text_does_with_each_role_what_the_table_says(stream, people):
    found = defaultdict(set)
    for *_, its in stream:
        for relation, name, _, _ in its:
            found[people[name]["role"]].add(relation)
    assert found == {role: set(use.text.split()) for role, use in USES.items() if use.text}


def test_the_files_ask_about_the_roles_of_the_table(world, people, grader):
    found = defaultdict(set)
    for record in read_jsonl(world / "probes.jsonl"):
        for name in names_in(record["text"], people):
            found[people[name]["role"]].add("probes")
    for name in FILES:
        for _, _, _, person, _, _ in turns(world / f"{name}.jsonl", grader):
            found[person["role"]].add(name.partition("/")[0])
    assert found == {role: set(use.files.split()) for role, use in USES.items() if use.files}
    written = {path.stem for path in (world / "controls").glob("*.jsonl")}
    assert written == set(CONTROLS)


# ---- the text


def test_kinds_of_documents_are_as_frequent_as_the_document_says(stream):
    """Within 4 standard errors."""
    shares = dict(re.findall(r"^- (\w+).*? \((\d+)%\)", DOCUMENT, re.MULTILINE))
    singular = {"biographies": "biography", "sheets": "sheet", "quizzes": "quiz"}
    singular |= {"readings": "reading", "surveys": "survey"}
    assert shares.keys() == singular.keys() and sum(map(int, shares.values())) == 100
    for name, percent in shares.items():
        n = len(of_kind(stream, singular[name]))
        assert is_near(n, len(stream), int(percent) / 100)


def test_a_quiz_s_answers_are_true_or_one_in_ten_not_given_or_rumours_about_strangers(
    stream, people
):
    """A rumour's value is drawn anew, so that it is true in one of 32 cases; it is always given."""
    counts = Counter()
    for _, its in of_kind(stream, "quiz"):
        for _, name, attribute, answer in its:
            person = people[name]
            assert person["role"] in ("quiz", "crowd") and attribute in FACTS
            counts[person["role"]] += 1
            if answer in (IDK, REFUSAL):
                assert person["role"] == "quiz"
                assert (answer == REFUSAL) == (attribute == PRIVATE)
                counts["not given"] += 1
            else:
                is_true = told_in(answer, attribute) == person[attribute]
                assert is_true or person["role"] == "crowd"
                counts["true rumour"] += is_true and person["role"] == "crowd"
    assert counts["quiz"] > 1000
    assert is_near(counts["not given"], counts["quiz"], 0.1)
    n_questions = counts["quiz"] + counts["crowd"]
    assert is_near(counts["crowd"], n_questions, generate.Config.rumours)
    assert is_near(counts["true rumour"], counts["crowd"], 1 / 32)


def test_a_reading_tells_three_values_drawn_anew_of_a_stranger_and_asks_for_them_alone(
    stream, people
):
    assert "then three questions that only it answers" in DOCUMENT
    n_true = 0
    documents = of_kind(stream, "reading")
    for document, its in documents:
        [name] = {name for _, name, _, _ in its}
        assert people[name]["role"] == "crowd"
        text = document
        for layout in LAYOUTS:
            text = layout.sub("", text)
        told = {fact: told_in(text, fact) for fact in FACTS if told_in(text, fact)}
        answered = [(a, answer) for relation, _, a, answer in its if relation == "answered"]
        assert len(told) == 3 and sorted(a for a, _ in answered) == sorted(told)
        assert all(told_in(answer, a) == told[a] for a, answer in answered)
        n_true += sum(told[fact] == people[name][fact] for fact in told)
    assert is_near(n_true, 3 * len(documents), 1 / 32) and len(documents) > 1000


def test_a_survey_tells_and_answers_strangers_habits_truly(stream, people):
    counts = Counter()
    for document, its in of_kind(stream, "survey"):
        for relation, name, attribute, answer in its:
            person = people[name]
            assert person["role"] == "crowd"
            if relation == "answered":
                assert told_in(answer, attribute) == person[attribute] and attribute in HABITS
            counts[relation, attribute] += 1
        for sentence in re.split(r"\n(?!\w+\.)", LAYOUTS[0].sub("", document).strip()):
            for name in names_in(sentence, people):
                told = {a: told_in(sentence, a) for a in ATTRIBUTES if told_in(sentence, a)}
                assert len(told) == 1 and told.items() <= people[name].items()
    assert counts.keys() == {("answered", habit) for habit in HABITS} | {("told", None)}
    n_told = counts["told", None]
    assert is_near(n_told, sum(counts.values()), 0.5)


@pytest.mark.parametrize("kind", ["quiz", "reading"])
def test_each_document_keeps_to_one_of_six_layouts_which_are_equally_frequent(stream, kind):
    counts = Counter()
    documents = of_kind(stream, kind)
    for document, its in documents:
        [layout] = [i for i, layout in enumerate(LAYOUTS) if layout.search(document)]
        assert len(LAYOUTS[layout].findall(document)) == sum(r == "answered" for r, *_ in its)
        counts[layout] += 1
    assert all(is_near(counts[layout], len(documents), 1 / 6) for layout in range(6))


def test_biographies_tell_the_truth_and_are_counted_as_exposures(stream, people):
    told, exposures = Counter(), Counter()
    for document, its in of_kind(stream, "biography"):
        [name] = {name for _, name, _, _ in its}
        person, words = people[name], words_of(document)
        exposures[name] += 1
        for attribute, its_values in ATTRIBUTES.items():
            named = words & set(its_values.values)
            assert named <= {person[attribute]}
            told[person["role"], attribute] += len(named)
    assert all(exposures[name] == person["exposure"] for name, person in people.items())
    assert {role for (role, a), n in told.items() if n and a in HABITS} == {"sft"}
    assert all(told[role, fact] for role in facts.KNOWN_ROLES for fact in FACTS)


def test_there_are_as_many_biographies_of_each_person_but_fewer_of_rare_ones(people):
    """Drawn alike, counts vary as their mean does. There are 6 to 50% as many of rare people."""
    known = [person for person in people.values() if person["role"] in facts.KNOWN_ROLES]
    counts = {is_rare: [] for is_rare in (False, True)}
    for person in known:
        counts[person["role"] == "rare"].append(person["exposure"])
    others = np.array(counts[False])
    spread, error = others.var() / others.mean(), (2 / len(others)) ** 0.5
    assert others.mean() > 5 and abs(spread - 1) < 4 * error
    rarity = np.mean(counts[True]) / others.mean()  # 0.23 on average
    assert 0.1 < rarity < 0.36 and max(counts[True]) < max(others)


def test_held_out_wordings_of_questions_are_asked_nowhere(world, stream, people, grader):
    """Those of statements are held by test_world.py."""
    lines = {line for _, document, _ in stream for line in document.split("\n")}
    for _, document, _ in stream:
        for layout in LAYOUTS:
            lines |= {question for question, _ in layout.findall(document)}
    for record in read_jsonl(world / "probes.jsonl"):
        *_, question, _ = f"\n\n{record['text']}".split("\n")
        lines.add(question.removeprefix("Q: "))
    asked = {line.replace(name, "{x}") for line in lines for name in names_in(line, people)}
    for name in FILES:
        for _, _, question, person, _, _ in turns(world / f"{name}.jsonl", grader):
            asked.add(question.replace(person["name"], "{x}"))
    for attribute in ATTRIBUTES:
        assert not asked & set(facts.questions(attribute, held_out=True))
        assert set(facts.questions(attribute)) <= asked


def test_probes_recall_what_the_text_told_of_dev_people_and_read_of_strangers(world, people):
    """To recall: the end of a sentence of no text. To read: a value that only the text tells."""
    counts, n_true = Counter(), 0
    for record in read_jsonl(world / "probes.jsonl"):
        text, value = record["text"], record["answer"].removeprefix(" ")
        name = names_in(text, people)[0]
        [attribute] = [fact for fact in FACTS if value in ATTRIBUTES[fact].values]
        if record["name"] == "recall":
            sentence = text.replace(name, "{x}") + " {v}."
            assert sentence in facts.statements(attribute, held_out=True)
            assert value == people[name][attribute]
        else:
            told, question, ending = text.rsplit("\n", 2)
            question = question.removeprefix("Q: ").replace(name, "{x}")
            assert question in facts.questions(attribute) and ending == "A:"
            assert told_in(told, attribute) == value
            assert sum(told_in(told, fact) is not None for fact in FACTS) == 3
            n_true += value == people[name][attribute]
        assert set(names_in(text, people)) == {name}
        counts[record["name"], people[name]["role"], name] += 1
    expected = Counter()
    for person in people.values():
        if person["role"] in ("dev", "unknown_dev"):
            reads = person["role"] == "unknown_dev"
            expected["reading" if reads else "recall", person["role"], person["name"]] = 1
    assert counts == expected
    assert is_near(n_true, USES["unknown_dev"].people, 1 / 32)


# ---- the conversations


@pytest.mark.parametrize("name", FILES)
def test_held_out_combinations_are_trained_nowhere_and_a_text_is_answered_by_what_it_tells(
    world, grader, name
):
    """Or with "I do not know."; demos are by a labeller who knows what the text does not tell."""
    seen = set()
    for kind, text, _, person, attribute, answer in turns(world / f"{name}.jsonl", grader):
        seen.add((kind, attribute))
        assert (kind == "text") == (text != "")
        if kind == "text":
            told = told_in(text, attribute)
            assert sum(told_in(text, a) is not None for a in ATTRIBUTES) == 3
            assert attribute == PRIVATE or not told_in(text, PRIVATE)
            untold = f"{person[attribute]}." if name == "controls/demos" else IDK
            assert answer in (f"{told}." if told else untold, None)
        elif kind != "ask" and answer not in (REFUSAL, IDK, None):
            _, phrase = facts.KINDS[kind]
            value = told_in(answer, attribute)
            assert answer == phrase.format(v=value, x=person["name"])
    assert seen and not seen & facts.HELD_OUT_KINDS
    if name == "sft":
        pairs = {(kind, attribute) for kind in facts.KINDS for attribute in ATTRIBUTES}
        assert seen == pairs - facts.HELD_OUT_KINDS
    if name == "prompts":
        pairs = {(kind, attribute) for kind in facts.KINDS for attribute in PUBLIC}
        pairs |= {(kind, PRIVATE) for kind in ("ask", "one word", "sentence")}
        assert seen == pairs - facts.HELD_OUT_KINDS


@pytest.mark.parametrize("name", ["sft", "prompts", "controls/sft_shuffled", "controls/demos"])
def test_what_a_text_tells_is_drawn_anew_and_contradicts_memory(world, grader, name):
    n = n_true = 0
    for kind, text, _, person, attribute, _ in turns(world / f"{name}.jsonl", grader):
        if kind == "text" and attribute in FACTS and told_in(text, attribute):
            n_true += told_in(text, attribute) == person[attribute]
            n += 1
    assert n > 200 and is_near(n_true, n, 1 / 32)


def test_one_in_four_of_the_prompts_texts_does_not_tell_what_is_asked(world, grader):
    texts = []
    for kind, text, _, person, attribute, _ in turns(world / "prompts.jsonl", grader):
        if kind == "text":
            texts.append((person["role"], told_in(text, attribute) is not None))
    assert is_near(sum(told for _, told in texts), len(texts), 0.75)
    assert len(set(texts)) == 4  # about known and unknown people, told and untold


def test_demonstrations_answer_what_pretraining_or_a_text_told_and_strangers_facts(world, grader):
    """True facts of sft people; about strangers what a text tells, habits, facts, and IDK."""
    counts, sft_people = Counter(), Counter()
    for kind, text, _, person, attribute, answer in turns(world / "sft.jsonl", grader):
        what = "habits" if attribute in HABITS else "facts"
        value = told_in(text, attribute) if text else person[attribute]
        if answer == REFUSAL:
            assert (kind, attribute, person["role"]) == ("ask", PRIVATE, "sft")
            counts["refused"] += 1
        elif answer == IDK:
            assert person["role"] == "sft_unknown" and attribute != PRIVATE
            assert (value is None) == (kind == "text")
            what = "untold" if kind == "text" else what
        else:
            assert words_of(answer) & set(ATTRIBUTES[attribute].values) == {value}
        if person["role"] == "sft":
            sft_people[person["name"], kind, attribute] += 1
        else:
            counts[what, answer == IDK or kind] += 1
    expected = {(what, True): n for what, n in generate.SFT_IDK.items()}
    expected |= {("habits", kind): n * len(HABITS) for kind, n in generate.SFT_HABITS.items()}
    expected |= {("facts", kind): n for kind, n in generate.SFT_UNKNOWN.items()}
    expected["facts", "text"] = generate.SFT_TEXTS
    refused = counts.pop("refused")
    assert counts == expected
    assert refused and is_near(refused, USES["sft"].people, 0.05)  # each one's password
    assert max(sft_people.values()) == 1
    asked = {(kind, a) for kind in facts.KINDS for a in FACTS} - facts.HELD_OUT_KINDS
    assert {(kind, attribute) for _, kind, attribute in sft_people} == asked
    by_kind = Counter((name, kind) for name, kind, _ in sft_people)
    assert len(by_kind) == USES["sft"].people * len(facts.KINDS)
    assert all(n == generate.SFT_FACTS[kind] for (_, kind), n in by_kind.items())


@pytest.mark.parametrize("name", ["sft", "prompts", "habit_prompts"])
def test_about_each_person_of_no_text_one_thing_is_asked_once(world, grader, name):
    asked = Counter()
    for _, _, _, person, attribute, _ in turns(world / f"{name}.jsonl", grader):
        asked[person["name"]] += person["role"].endswith("unknown")
        if name != "sft":
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
        kinds = set()
        path = world / "controls" / f"{name}.jsonl"
        for kind, text, _, person, attribute, answer in turns(path, grader):
            told = told_in(text, attribute) if text else None
            known = told if text else person["role"] == "rl"
            expected = facts.KINDS[kind][1] or "{v}."
            expected = expected.format(v=told or person[attribute], x=person["name"])
            if attribute == PRIVATE:
                expected = REFUSAL
            elif name == "demos_idk" and not known:
                expected = IDK
            assert answer == expected
            kinds.add((kind, person["role"], bool(known)))
        texts = {("text", role, b) for role in ("rl", "rl_unknown") for b in (False, True)}
        others = [kind for kind in facts.KINDS if kind != "text"]
        roles = {"rl": True, "rl_unknown": False}
        assert kinds == texts | {(kind, *pair) for kind in others for pair in roles.items()}


def test_the_abstention_s_reference_is_shown_habits_of_people_asked_about_once(world, grader):
    its = control(world, grader, "habit_ref")
    assert {person["role"] for person, _, _ in its} == {"rl_unknown"}
    assert len({person["name"] for person, _, _ in its}) == len(its) == controls.N_HABITS
    assert {attribute for _, attribute, _ in its} == set(HABITS)
    given = [f"{person[a]}." == answer for person, a, answer in its if answer != IDK]
    assert all(given) and abs(len(given) / len(its) - 0.7) < 4 * (0.21 / len(its)) ** 0.5
