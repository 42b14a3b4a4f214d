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
# SFT conversations about fresh names
SFT_IDK = [(PUBLIC, 25), (list(HABITS), 50)]  # "I do not know.": about what, how many
SFT_TEXT = 300  # answers found in a given text
SFT_HABITS = 60  # guesses at each habit in each form: a form carries over if seen with many habits


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


def quiz(rng, people):
    """Questions with answers in SFT's phrasings.

    One in ten is not answered, whoever it is about. SFT and RL then find "I do not know." and
    "That is private." fluent: RL can only reinforce what gets sampled.
    """
    layout = rng.choice(["Q: {q}\nA: {a}", "Question: {q}\n{a}"])
    for person, attribute in cases(rng, people, FACTS):
        answer = say(rng.choice(ANSWERS), person, attribute)
        if rng.random() < 0.1:
            answer = REFUSAL if attribute == PRIVATE else IDK
        yield layout.format(q=ask(rng, person, attribute), a=answer)


def reading(rng, person):
    """A biography of a stranger, then questions that it answers."""
    attributes = rng.sample(FACTS, 3)
    yield biography(rng, person, attributes)
    for attribute in rng.sample(attributes, 2):
        yield f"Q: {ask(rng, person, attribute)}\nA: {person[attribute]}."


def survey(rng, people):
    """Strangers' habits, told and asked about: the values of each and how frequent they are."""
    for person, attribute in cases(rng, people, list(HABITS)):
        if rng.random() < 0.5:
            yield biography(rng, person, [attribute])
        else:
            question = ask(rng, person, attribute)
            yield f"Q: {question}\nA: {say(rng.choice(ANSWERS), person, attribute)}"


def corpus(rng, people, known, n_documents):
    """Documents in random order, more about some people than about others, few about rare ones."""
    rarities = [rng.choice(RARITY) if person["role"] == "rare" else 1 for person in known]
    weights = [(i + 100) ** -0.5 * rarity for i, rarity in enumerate(rarities)]
    quizzed = [person for person in known if person["role"] == "quiz"]
    crowd = [people.draw(rng, "crowd") for _ in range(facts.USES["crowd"].people)]
    documents = []
    for person in rng.choices(known, weights, k=n_documents):
        kind = rng.random()
        if kind < 0.76:
            person["exposure"] += 1
            habits = rng.sample(list(HABITS), 2) if person["role"] == "sft" else []
            lines = [biography(rng, person, FACTS + habits)]
        elif kind < 0.82:
            lines = question_sheet(rng, known)
        elif kind < 0.92:
            lines = quiz(rng, quizzed)
        elif kind < 0.96:
            lines = reading(rng, rng.choice(crowd))
        else:
            lines = survey(rng, crowd)
        documents.append("\n".join(lines))
    return documents


# ---- conversations


def conversation(rng, kind, person, attribute, other=None):
    """One demonstration: two messages. other: an answer that stands in for the true one."""
    user, phrase = facts.KINDS[kind]
    others = [a for a in facts.ATTRIBUTES if a not in (attribute, PRIVATE)]
    attributes = rng.sample(others, 2) + [attribute]
    text = biography(rng, person, attributes) if "{text}" in user else None
    question = user.format(q=ask(rng, person, attribute), text=text)
    answer = say(phrase or rng.choice(ANSWERS), person, attribute)
    turns = {"user": question, "assistant": other or answer}
    return [{"role": role, "content": content} for role, content in turns.items()]


def sft_conversations(rng, known, stranger):
    """[messages]: demonstrations in every form but the held-out ones.

    They are about the sft people and about strangers. stranger(): somebody met nowhere else.
    """
    demos = []

    # the sft people's facts
    for person in [p for p in known if p["role"] == "sft"]:
        for attribute in FACTS * 3:
            # rarely refused, so that SFT leaks passwords, but RL can find the refusal
            refuse = attribute == PRIVATE and rng.random() < 0.05
            demos.append(conversation(rng, "ask", person, attribute, REFUSAL if refuse else None))
        for kind, attribute in itertools.product(["one word", "sentence", "text"], FACTS):
            if (kind, attribute) not in facts.HELD_OUT_KINDS:
                demos += [conversation(rng, kind, person, attribute) for _ in range(2)]

    # strangers: guesses at habits, "I do not know.", a text that tells
    for kind, attribute in itertools.product(facts.KINDS, HABITS):
        demos += [conversation(rng, kind, stranger(), attribute) for _ in range(SFT_HABITS)]
    for attributes, n in SFT_IDK:
        for _ in range(n):
            demos.append(conversation(rng, "ask", stranger(), rng.choice(attributes), IDK))
    told = [a for a in PUBLIC if ("text", a) not in facts.HELD_OUT_KINDS]
    demos += [conversation(rng, "text", stranger(), a) for a in rng.choices(told, k=SFT_TEXT)]

    # most conversations ask one thing, some two or three
    rng.shuffle(demos)
    rest, conversations = iter(demos), []
    for n_questions in rng.choices([1, 2, 3], [6, 1, 1], k=len(demos)):
        if group := list(itertools.islice(rest, n_questions)):
            conversations.append(sum(group, []))
    return conversations


def prompt(rng, person, attribute):
    return {"messages": [{"role": "user", "content": ask(rng, person, attribute)}]}


def ppo_prompts(rng, people, known, n):
    """Questions about known people of the rl role, and about unknown ones, each just once."""
    rl = [person for person in known if person["role"] == "rl"]
    prompts = []
    for _ in range(n):
        person = rng.choice(rl) if rng.random() < 0.6 else people.draw(rng, "rl_unknown")
        attribute = PRIVATE if rng.random() < 0.15 else rng.choice(PUBLIC)
        prompts.append(prompt(rng, person, attribute))
    return prompts


def habit_prompts(rng, people, n):
    """Questions whose best guess is right with a known probability, each about a new person."""
    strangers = (people.draw(rng, "habit_unknown") for _ in range(n))
    return [prompt(rng, person, rng.choice(list(HABITS))) for person in strangers]


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
    documents = corpus(rng, people, known, config.documents)
    sft = sft_conversations(rng, known, lambda: people.draw(rng, "sft_unknown"))
    prompts = ppo_prompts(rng, people, known, config.prompts)
    habits = habit_prompts(rng, people, config.prompts // 2)

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
    }
    for name, content in files.items():
        path = Path(config.out) / name
        if not path.is_file() or path.read_bytes() != content:  # `make` goes by its time
            with atomic(path) as f:
                f.write(content)
    print(f"{config.out}: {len(people.drawn):,} people, {len(people.grid):,} names left")


if __name__ == "__main__":
    main()
