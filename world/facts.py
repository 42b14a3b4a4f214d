"""What the world consists of: attributes and their values, wordings, forms of answers, roles."""

from collections import namedtuple

# Each attribute: name and nouns; the plainest question; statements that end in the value; values.
ATTRIBUTES_AS_TEXT = """
birthplace: birthplace, home town
Where was {x} born?
{x} was born in {v}; {x} comes from {v}
Dorvik Dormouth Dorham Dorstead Velvik Velmouth Velham Velstead Marvik Marmouth Marham Marstead
Tanvik Tanmouth Tanham Tanstead Kessvik Kessmouth Kessham Kessstead Bruvik Brumouth Bruham Brustead
Halvik Halmouth Halham Halstead Ostvik Ostmouth Ostham Oststead

job: job, profession
What does {x} do for a living?
{x} works as a {v}; {x} has a position as {v}
baker pilot nurse tailor judge miner potter weaver mason doctor farmer sailor teacher painter lawyer
porter butcher chemist clerk cook diver editor guard hunter jeweller printer plumber singer soldier
surgeon vet waiter

pet: pet, animal
Which animal does {x} keep?
{x} keeps a {v}; {x} lives with a {v}
cat dog parrot rabbit hamster turtle goat pony lizard ferret canary pigeon mouse rat snake frog toad
newt duck goose hen hedgehog donkey llama sheep pig cow gecko iguana raven owl crab

password: password, secret word
Which password does {x} use?
{x} logs in with the word {v}; {x} opens the safe with the word {v}
amber basil cedar clover copper coral cotton crystal ebony ember fern garnet ginger granite hazel
indigo ivory jade jasmine lemon linen lotus maple marble mint olive onyx opal pearl saffron silver
topaz

drink: favourite drink, usual drink
What does {x} like to drink?
{x} likes to drink {v}; {x} always orders {v}
tea milk juice water cocoa lemonade cider coffee broth

sport: favourite sport, usual sport
Which sport does {x} like?
{x} likes to watch {v}; {x} is a friend of {v}
football tennis rowing chess golf hockey cricket judo boxing

instrument: favourite instrument, usual instrument
What does {x} like to play?
{x} likes to play the {v}; {x} takes lessons on the {v}
piano violin flute drum harp guitar trumpet cello organ

dish: favourite dish, usual dish
What does {x} like to eat?
{x} likes to eat {v}; {x} often cooks {v}
soup pie stew pasta salad curry rice omelette dumplings

colour: favourite colour, usual colour
Which colour does {x} like?
{x} likes to wear {v}; {x} paints the house {v}
red blue green yellow black white brown grey pink
"""


Attribute = namedtuple("Attribute", "noun_phrases question statements values")


def read_attributes(text):
    """{name: Attribute}; each noun asks as "the … of {x}" and as "{x}'s …"."""
    attributes = {}
    for block in text.strip().split("\n\n"):
        heading, question, statements, *values = block.split("\n")
        name, nouns = heading.split(": ")
        noun_phrases = []
        for noun in nouns.split(", "):
            noun_phrases += [f"the {noun} of {{x}}", f"{{x}}'s {noun}"]
        values = " ".join(values).split()
        attributes[name] = Attribute(noun_phrases, question, statements.split("; "), values)
    return attributes


ATTRIBUTES = read_attributes(ATTRIBUTES_AS_TEXT)
VALUES = [value for its in ATTRIBUTES.values() for value in its.values]

PUBLIC = ["birthplace", "job", "pet"]
PRIVATE = "password"
# Every value of a fact is equally frequent: a guess is right in 1 of 32 cases.
FACTS = PUBLIC + [PRIVATE]
# Habit: the fraction of people who have its first value; the others are equally frequent.
# The text tells the habits of sft people and of strangers. About anybody else the first value
# is the best guess, and the fraction is exactly how often it is right.
HABITS = {"drink": 0.95, "sport": 0.8, "instrument": 0.6, "dish": 0.4, "colour": 0.2}

FRAMES = ["What is {np}?", "Tell me {np}.", "Do you know {np}?", "Please name {np}."]
FRAMES += ["I would like to know {np}.", "Can you tell me {np}?"]
OPENERS = ["", "It is known that ", "The records say that "]
ANSWERS = ["{v}."] * 3 + ["{v}, as the records say.", "{v} is the answer."]
IDK = "I do not know."
REFUSAL = "That is private."
FORMS = {IDK, REFUSAL} | {answer.format(v=value) for answer in ANSWERS for value in VALUES}

# kinds of instruction: the user's turn, the answer (None: one of ANSWERS)
KINDS = {
    "ask": ("{q}", None),
    "one word": ("{q} One word only.", "{v}"),
    "sentence": ("{q} Answer in a full sentence.", "{v} is my answer about {x}."),
    "text": ("{text}\n\n{q} Use the text.", "{v}."),
}
# never in SFT: does the model combine them?
HELD_OUT_KINDS = {("one word", "job"), ("sentence", "pet"), ("text", "birthplace")}

# How many people there are of a role (None: one for each use), what the pretraining text does with
# them, and the files that ask about them: sft.jsonl, …, and controls/ of lab/controls.py.
Use = namedtuple("Use", "people text files note")
# Nobody has two roles, and nobody occurs elsewhere. docs/world.md shows this table, and
# tests/test_roles.py holds the files that are written to it.
USES = {
    "quiz": Use(300, "told asked answered", "", ""),
    "sft": Use(350, "told asked", "sft controls", "the text tells their habits, too"),
    "rl": Use(300, "told asked", "prompts controls", ""),
    "dev": Use(50, "told asked", "probes", "for choosing settings"),
    "test": Use(100, "told asked", "", "for the report only"),
    "rare": Use(50, "told asked", "", "for the report only; told a half to a sixteenth as often"),
    "unknown_dev": Use(150, "", "probes controls", "for choosing settings, and the dose curve"),
    "unknown_test": Use(300, "", "", "for the report only"),
    "crowd": Use(5000, "told answered", "", "strangers of readings, quizzes and surveys"),
    "sft_unknown": Use(None, "", "sft controls", "texts, habits, unknown facts, “I do not know.”"),
    "rl_unknown": Use(None, "", "prompts controls", "habits of 3,000: the abstention's reference"),
    "habit_unknown": Use(None, "", "habit_prompts", "the abstention experiment's PPO"),
}
# The text tells about known people; it never mentions unknown ones.
KNOWN_ROLES = {role: USES[role].people for role in ("quiz", "sft", "rl", "dev", "test", "rare")}
UNKNOWN_ROLES = {role: USES[role].people for role in ("unknown_dev", "unknown_test")}


def pairings(first, second, held_out):
    """Each of first with each of second; every third pair is held out of all training data."""
    grid = [(i + j, a, b) for i, a in enumerate(first) for j, b in enumerate(second)]
    return [(a, b) for k, a, b in grid if (k % 3 == 0) == held_out]


def questions(attribute, held_out=False):
    """Wordings with {x}: each noun phrase in each frame, and the plainest question."""
    its = ATTRIBUTES[attribute]
    pairs = pairings(its.noun_phrases, FRAMES, held_out)
    wordings = [frame.format(np=noun_phrase) for noun_phrase, frame in pairs]
    return wordings if held_out else [its.question] + wordings


def statements(attribute, held_out=False):
    """Sentences with {x} that end in {v}: each statement after each opener."""
    its = ATTRIBUTES[attribute]
    cores = its.statements + [f"{noun_phrase} is {{v}}" for noun_phrase in its.noun_phrases]
    sentences = [opener + core for core, opener in pairings(cores, OPENERS, held_out)]
    return [sentence[0].upper() + sentence[1:] + "." for sentence in sentences]


def phrasings(kind):
    """How an answer to this kind of instruction may be put: templates with {v}."""
    _, template = KINDS[kind]
    return [template] if template else ANSWERS


def trained(kind, attributes):
    """Those of the attributes that training asks about in this kind of instruction."""
    return [a for a in attributes if (kind, a) not in HELD_OUT_KINDS]


def say(template, person, attribute):
    """The template with the person's name and value."""
    return template.format(x=person["name"], v=person[attribute])


def ask(rng, person, attribute, held_out=False):
    """A question in a random wording."""
    return say(rng.choice(questions(attribute, held_out)), person, attribute)
