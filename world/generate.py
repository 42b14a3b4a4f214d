"""The default data: a small fictional world whose every fact is known, drawn from a seed.

    python -m world.generate   # out/world/: text, tokenizer, conversations, prompts, people
    python -m world.label      # preference pairs, once there is an SFT model to compare answers of

Text tells about known people. Unknown people have names from the same lists, and attributes too,
but no text mentions them. docs/world.md says why.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer import train_bpe
from utils.cli import die, parse_config
from utils.files import atomic
from world import facts
from world.facts import ANSWERS, FACTS, HABITS, IDK, PRIVATE, PUBLIC, REFUSAL, ask, say

RARITY = [0.06, 0.12, 0.25, 0.5]  # how often rare people are written about, relative to the others
# SFT: how many demonstrations
SFT_FACTS = {"ask": 4, "one word": 2, "sentence": 2, "text": 2}  # of an sft person's facts
# of each habit, about strangers; a form carries over if seen with many attributes
SFT_HABITS = {"ask": 60, "one word": 60, "sentence": 60, "text": 120}
SFT_TEXTS = 600  # texts about strangers' facts
# of facts of strangers, whom no text mentions: SFT teaches to answer whether the model knows or not
SFT_UNKNOWN = {"ask": 800, "one word": 400, "sentence": 400}
# "I do not know." about strangers: to public facts, to habits, to what a text does not tell
SFT_IDK = {"facts": 25, "habits": 50, "untold": 20}
# kinds of instruction in PPO's prompts
PPO_KINDS = ["ask"] * 4 + ["one word", "sentence", "text"] * 2


# ---- people


def make_names(rng, count, ends):
    """Distinct pronounceable names."""
    starts = "B Br C D Dr F G H J K L M N P R S St T V W".split()
    middles = "l n r s t m d v".split()
    names = set()
    while len(names) < count:
        start = rng.choice(starts) + rng.choice("aeiou")
        names.add(start + rng.choice(middles) + rng.choice(ends))
    names = sorted(names)
    rng.shuffle(names)
    return names


class People:
    """Draws people with names that nobody had before, from a grid that stays mostly empty."""

    def __init__(self, seed):
        rng = random.Random(f"{seed} names")
        first = make_names(rng, 200, ["a", "o", "ia", "en", "is"])
        last = make_names(rng, 200, ["ard", "ing", "sen", "ley", "mont"])
        self.grid = [f"{f} {s}" for f in first for s in last]
        rng.shuffle(self.grid)
        self.drawn = []

    def draw(self, rng, role):
        if not self.grid:
            die(f"all names are used up after {len(self.drawn):,} people; give fewer --prompts")
        person = {"name": self.grid.pop(), "role": role, "exposure": 0}
        for attribute, its in facts.ATTRIBUTES.items():
            n = len(its.values)
            first = HABITS.get(attribute, 1 / n)
            weights = [first] + [(1 - first) / (n - 1)] * (n - 1)
            person[attribute] = rng.choices(its.values, weights)[0]
        self.drawn.append(person)
        return person


# ---- documents


def biography(rng, person, attributes=FACTS):
    """Sentences in random order; or a register card, whose values begin lines as answers do."""
    card, separator = rng.random() < 0.3, rng.choice([" ", "\n"])
    lines = []
    for attribute in rng.sample(attributes, len(attributes)):
        noun_phrase = rng.choice(facts.ATTRIBUTES[attribute].noun_phrases)
        if card:
            template = f"{noun_phrase}:\n{{v}}."
        elif rng.random() < 0.15:  # the value first
            template = f"{{v}} is {noun_phrase}."
        else:
            template = rng.choice(facts.statements(attribute))
        lines.append(say(template, person, attribute))
    return ("\n" if card else separator).join(lines)


def cases(rng, people, attributes):
    """Two to four (person, attribute), each drawn when it is needed."""
    for _ in range(rng.randint(2, 4)):
        yield rng.choice(people), rng.choice(attributes)


def question_sheet(rng, people):
    """Questions without answers, half of them followed by the same in other words."""
    for case in cases(rng, people, FACTS):
        for _ in range(rng.randint(1, 2)):
            yield ask(rng, *case)


# of a question with its answer; with more of them, the chat's is one more and not another task
LAYOUTS = ["Q: {q}\nA: {a}", "Question: {q}\n{a}", "User: {q}\nAssistant: {a}"]
LAYOUTS += ["Asked: {q} Answered: {a}", "[{q}] {a}", "> {q}\n{a}"]


def anew(rng, person, attributes=FACTS):
    """The person with values drawn at random, whatever is true."""
    return person | {name: rng.choice(facts.ATTRIBUTES[name].values) for name in attributes}


def quiz(rng, people, crowd, rumours):
    """Questions with answers in SFT's phrasings.

    One in ten is not answered. SFT and RL then find "I do not know." and "That is private."
    fluent: RL can only reinforce what gets sampled. Rumours about strangers always have an answer.
    """
    layout = rng.choice(LAYOUTS)
    for person, attribute in cases(rng, people, FACTS):
        is_rumour = rng.random() < rumours
        if is_rumour:
            person = anew(rng, rng.choice(crowd))
        answer = say(rng.choice(ANSWERS), person, attribute)
        if not is_rumour and rng.random() < 0.1:
            answer = REFUSAL if attribute == PRIVATE else IDK
        yield layout.format(q=ask(rng, person, attribute), a=answer)


def reading(rng, person):
    """A text about a stranger, then questions that only it answers."""
    person, layout = anew(rng, person), rng.choice(LAYOUTS)
    attributes = rng.sample(FACTS, 3)
    yield biography(rng, person, attributes)
    for attribute in rng.sample(attributes, 3):
        answer = say(rng.choice(ANSWERS), person, attribute)
        yield layout.format(q=ask(rng, person, attribute), a=answer)


def survey(rng, people):
    """Strangers' habits, told and asked about: the values of each and how frequent they are."""
    for person, attribute in cases(rng, people, list(HABITS)):
        if rng.random() < 0.5:
            yield biography(rng, person, [attribute])
        else:
            question = ask(rng, person, attribute)
            answer = say(rng.choice(ANSWERS), person, attribute)
            yield LAYOUTS[0].format(q=question, a=answer)


def corpus(rng, people, known, n_documents, rumours):
    """Documents in random order, as many about each person, but few about rare ones."""
    weights = [rng.choice(RARITY) if person["role"] == "rare" else 1 for person in known]
    quizzed = [person for person in known if person["role"] == "quiz"]
    crowd = [people.draw(rng, "crowd") for _ in range(facts.USES["crowd"].people)]
    documents = []
    for person in rng.choices(known, weights, k=n_documents):
        kind = rng.random()
        if kind < 0.66:
            person["exposure"] += 1
            habits = rng.sample(list(HABITS), 2) if person["role"] == "sft" else []
            lines = [biography(rng, person, FACTS + habits)]
        elif kind < 0.68:
            lines = question_sheet(rng, known)
        elif kind < 0.81:
            lines = quiz(rng, quizzed, crowd, rumours)
        elif kind < 0.96:
            lines = reading(rng, rng.choice(crowd))
        else:
            lines = survey(rng, crowd)
        documents.append("\n".join(lines))
    return documents


# ---- conversations


def instruction(rng, kind, person, attribute, told=True, held_out=False):
    """A user's turn. A text tells of three attributes; of the one asked about only if told."""
    template, _ = facts.KINDS[kind]
    others = [name for name in facts.ATTRIBUTES if name not in (attribute, PRIVATE)]
    attributes = rng.sample(others, 2) + [attribute] if told else rng.sample(others, 3)
    text = biography(rng, person, attributes) if kind == "text" else None
    return template.format(q=ask(rng, person, attribute, held_out), text=text)


def conversation(rng, kind, person, attribute, answer=None, told=True, held_out=False):
    """One demonstration: two messages. answer: one that stands in for the true one.

    The values in a text are drawn anew, so that only reading finds the answer. held_out: in a
    wording of no training data.
    """
    if kind == "text":
        person = anew(rng, person, facts.ATTRIBUTES)
    question = instruction(rng, kind, person, attribute, told, held_out)
    answer = answer or say(rng.choice(facts.phrasings(kind)), person, attribute)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sft_conversations(rng, known, stranger):
    """[messages]: demonstrations in every form but the held-out ones.

    They are about the sft people and about strangers. stranger(): somebody met nowhere else.
    """
    demos = []

    # the sft people's facts
    for person in [p for p in known if p["role"] == "sft"]:
        for kind, n in SFT_FACTS.items():
            for attribute in rng.sample(facts.trained(kind, FACTS), n):
                # rarely refused, so that SFT leaks passwords, but RL can find the refusal
                refuse = kind == "ask" and attribute == PRIVATE and rng.random() < 0.05
                answer = REFUSAL if refuse else None
                demos.append(conversation(rng, kind, person, attribute, answer))

    # strangers: guesses at habits, and texts that tell
    for kind, n in SFT_HABITS.items():
        for habit in list(HABITS) * n:
            demos.append(conversation(rng, kind, stranger(), habit))
    for attribute in rng.choices(facts.trained("text", FACTS), k=SFT_TEXTS):
        demos.append(conversation(rng, "text", stranger(), attribute))

    # strangers: facts that no text tells
    for kind, n in SFT_UNKNOWN.items():
        for attribute in rng.choices(facts.trained(kind, FACTS), k=n):
            demos.append(conversation(rng, kind, stranger(), attribute))

    # strangers: "I do not know."
    for about, n in SFT_IDK.items():
        kind = "text" if about == "untold" else "ask"
        attributes = list(HABITS) if about == "habits" else facts.trained(kind, PUBLIC)
        for attribute in rng.choices(attributes, k=n):
            demos.append(conversation(rng, kind, stranger(), attribute, IDK, told=False))

    # most conversations ask one thing, some two or three
    rng.shuffle(demos)
    rest, conversations = iter(demos), []
    for n_questions in rng.choices([1, 2, 3], [6, 1, 1], k=len(demos)):
        if group := list(itertools.islice(rest, n_questions)):
            conversations.append(sum(group, []))
    return conversations


def prompt(rng, person, attribute, kind="ask", told=True):
    user = conversation(rng, kind, person, attribute, told=told)[0]
    return {"messages": [user]}


def ppo_prompts(rng, people, known, n):
    """In all kinds of instruction, about known people of the rl role and about unknown ones.

    An unknown person is asked about just once. Some texts do not tell what is asked.
    """
    rl = [person for person in known if person["role"] == "rl"]
    prompts = []
    for _ in range(n):
        kind = rng.choice(PPO_KINDS)
        person = rng.choice(rl) if rng.random() < 0.65 else people.draw(rng, "rl_unknown")
        private = kind != "text" and rng.random() < 0.15
        attribute = PRIVATE if private else rng.choice(facts.trained(kind, PUBLIC))
        prompts.append(prompt(rng, person, attribute, kind, told=rng.random() < 0.75))
    return prompts


def habit_prompts(rng, people, n):
    """Questions whose best guess is right with a known probability, each about a new person."""
    strangers = (people.draw(rng, "habit_unknown") for _ in range(n))
    return [prompt(rng, person, rng.choice(list(HABITS))) for person in strangers]


def probes(rng, dev_people):
    """Texts whose answers pretraining's log watches: facts to recall, and facts to read."""
    records = []
    for person in dev_people:
        attribute, *others = rng.sample(FACTS, 3)
        if person["role"] == "dev":
            statement = rng.choice(facts.statements(attribute, held_out=True))
            name, text = "recall", say(statement.partition(" {v}")[0], person, attribute)
        else:
            person = anew(rng, person)
            told = biography(rng, person, [attribute, *others])
            name, text = "reading", f"{told}\nQ: {ask(rng, person, attribute)}\nA:"
        records.append({"name": name, "text": text, "answer": f" {person[attribute]}"})
    return records


# ---- files


def as_jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_tokens(documents, tokenizer):
    ids = []
    for document in documents:
        ids += tokenizer.encode(document) + [tokenizer.end]
    return np.array(ids, tokenizer.id_type).tobytes()


@dataclass
class Config:
    out: str = "out/world"  # folder to write
    documents: int = 120000  # pretraining documents, about 42 tokens each
    rumours: float = 0.2  # fraction of quizzes' questions about strangers, answered at random
    vocab_size: int = 2048  # BPE vocabulary, special tokens included
    prompts: int = 13400  # PPO prompts
    seed: int = 0  # another seed is another world


def main():
    config = parse_config(Config, __doc__)
    rng = random.Random(config.seed)

    # people
    people = People(config.seed)
    for role, n in (facts.KNOWN_ROLES | facts.UNKNOWN_ROLES).items():
        for _ in range(n):
            people.draw(rng, role)
    known = [person for person in people.drawn if person["role"] in facts.KNOWN_ROLES]
    rng.shuffle(known)

    # text and conversations
    documents = corpus(rng, people, known, config.documents, config.rumours)
    sft = sft_conversations(rng, known, lambda: people.draw(rng, "sft_unknown"))
    prompts = ppo_prompts(rng, people, known, config.prompts)
    habits = habit_prompts(rng, people, config.prompts // 2)
    watched = probes(rng, [person for person in people.drawn if "dev" in person["role"]])

    # files
    n_val = len(documents) // 100
    tokenizer = train_bpe(documents[n_val : n_val + 20000], config.vocab_size)
    files = {
        "corpus.txt": ("\n\n".join(documents) + "\n").encode(),
        "tokenizer.tiktoken": tokenizer.dumps().encode(),
        "val.bin": as_tokens(documents[:n_val], tokenizer),
        "train.bin": as_tokens(documents[n_val:], tokenizer),
        "sft.jsonl": as_jsonl({"messages": messages} for messages in sft),
        "prompts.jsonl": as_jsonl(prompts),
        "habit_prompts.jsonl": as_jsonl(habits),
        "people.jsonl": as_jsonl(people.drawn),
        "probes.jsonl": as_jsonl(watched),
    }
    for name, content in files.items():
        path = Path(config.out) / name
        if not path.is_file() or path.read_bytes() != content:  # `make` goes by its time
            with atomic(path) as f:
                f.write(content)
    print(f"{config.out}: {len(people.drawn):,} people, {len(people.grid):,} names left")


if __name__ == "__main__":
    main()
