"""What is measured on one checkpoint: how its answers to questions about the world are graded."""

import itertools
import random
import statistics
from collections import Counter

import torch

from data import conversation
from data.examples import Example
from model import token_logprobs
from train.batches import collate
from train.device import autocast
from utils.cli import die
from world import facts, generate
from world.grade import grade

GRADES = ("right", "wrong", "idk", "refusal", "other")
BARE_KINDS = ("answers it", "rephrases it", "asks another question", "other text")
# Questions in prose, as people put them to a base model. {shots}: solved ones in the same format.
FORMATS = [
    "{q}", "{q}\n", "{q}\n\n", '"{q}"', '"{q}" "', "({q}) ", "> {q}\n> ", "- {q}\n- ",
    "Q: {q}\nA:", "Q: {q}\nA: ", "Q. {q} A.", "Question: {q}\n", "Question: {q}\nAnswer:",
    "{q} Answer:", "{q} The answer is", "User: {q}\nAssistant:", "Please answer. {q}\n",
    "{q} It is known that", "1. {q}\n", "FAQ\n\n{q}\n",
    "{shots}Q: {q}\nA:", "{shots}Question: {q}\n", "{shots}{q}\n", "{shots}{q} ",
]  # fmt: skip


# ---- asking


def complete(model, tokenizer, prompts, max_new_tokens, temperature=0.0):
    """Token lists -> texts; one that ran into max_new_tokens ends in …"""
    longest, block_size = max(map(len, prompts)), model.config.block_size
    if longest + max_new_tokens > block_size:
        sizes = f"{longest} tokens of a question + {max_new_tokens} new ones"
        die(f"{sizes} do not fit in the model's {block_size}; pretrain with a longer --block_size")
    texts = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of like length
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        batch = [prompts[i] for i in rows]
        with autocast(model.device):
            responses = model.generate(batch, max_new_tokens, temperature, end_id=tokenizer.end)
        for i, response in zip(rows, responses):
            cut = "" if response[-1] == tokenizer.end else "…"
            texts[i] = conversation.decode_response(response, tokenizer) + cut
    return texts


def chat_prompt(question, tokenizer):
    return conversation.render_prompt([{"role": "user", "content": question}], tokenizer)


def answers(model, tokenizer, asked, temperature=0.0):
    """Answers to questions put in the chat format."""
    prompts = [chat_prompt(question, tokenizer) for question in asked]
    return complete(model, tokenizer, prompts, 24, temperature)


def continuations(model, tokenizer, texts, max_new_tokens=8, temperature=0.0):
    """What a model writes after texts that begin a document."""
    prompts = [[tokenizer.separator] + tokenizer.encode(text) for text in texts]
    return complete(model, tokenizer, prompts, max_new_tokens, temperature)


def by_role(people):
    """{role: [person]}"""
    roles = {}
    for person in people:
        roles.setdefault(person["role"], []).append(person)
    return roles


def all_cases(people, attributes=facts.PUBLIC):
    """[(person, attribute)]"""
    return [(person, attribute) for person in people for attribute in attributes]


def ask(rng, cases, held_out=False):
    """A question about each (person, attribute), in a wording of SFT or in a held-out one."""
    return [facts.say(rng.choice(facts.questions(a, held_out)), p, a) for p, a in cases]


def fractions(cases, texts):
    """{grade: its fraction} and n of the answers to [(person, attribute)]."""
    counts = Counter(grade(*case, text) for case, text in zip(cases, texts))
    return {g: counts[g] / len(cases) for g in GRADES} | {"n": len(cases)}


# ---- the base model: texts to go on with


def measure_base(model, tokenizer, known, unknown, quizzed, rng):
    return {
        "recall": measure_recall(model, tokenizer, known, rng),
        "recall_unknown": measure_recall(model, tokenizer, unknown, rng),
        "bare": measure_bare_questions(model, tokenizer, known, rng),
        "formats": measure_formats(model, tokenizer, known, quizzed, rng),
        "reads": measure_reading(model, tokenizer, unknown, rng),
    }


def measure_recall(model, tokenizer, people, rng):
    """Grades of facts completed in sentences whose wording was held out of the text."""
    cases = all_cases(people, facts.FACTS)
    texts = []
    for person, attribute in cases:
        statement = rng.choice(facts.statements(attribute, held_out=True))
        texts.append(statement.partition(" {v}")[0].format(x=person["name"]))
    return fractions(cases, continuations(model, tokenizer, texts, 3))


def measure_bare_questions(model, tokenizer, people, rng):
    """{what it does: fraction} after a bare question, at temperature 1."""
    cases = all_cases(people)
    texts = [question + "\n" for question in ask(rng, cases)]
    openings = [frame.split("{np}")[0] for frame in facts.FRAMES]
    openings += [attribute.question.split("{x}")[0] for attribute in facts.ATTRIBUTES.values()]
    counts = Counter()
    for case, text in zip(cases, continuations(model, tokenizer, texts, 20, 1.0)):
        line = text.strip().split("\n")[0]
        if line.startswith(tuple(openings)):
            same = case[0]["name"] in line
            counts["rephrases it" if same else "asks another question"] += 1
        else:
            answered = grade(*case, line) in ("right", "wrong", "idk")
            counts["answers it" if answered else "other text"] += 1
    return {kind: counts[kind] / len(cases) for kind in BARE_KINDS} | {"n": len(cases)}


def measure_formats(model, tokenizer, people, quizzed, rng):
    """{format: fraction right} of the model as a text completer."""
    cases = all_cases(people)[:: max(1, len(people) * 4 // 160)]
    result = {}
    for template in FORMATS:
        alone = template.removeprefix("{shots}")
        texts = []
        for case in cases:
            shots = rng.sample(quizzed, 3) if alone != template else []
            text = "".join(solved(rng, alone, person) for person in shots)
            texts.append(text + alone.replace("{q}", facts.ask(rng, *case)))
        result[template] = fractions(cases, continuations(model, tokenizer, texts))["right"]
    return result


def measure_reading(model, tokenizer, people, rng):
    """Fraction right of questions in a quiz's layouts that only the text before them answers."""
    cases, texts = [], []
    for person, attribute in all_cases(people):
        others = [fact for fact in facts.FACTS if fact != attribute]
        told = generate.biography(rng, person, rng.sample(others, 2) + [attribute])
        question = facts.ask(rng, person, attribute, held_out=True)
        layout, _, _ = rng.choice(generate.LAYOUTS).partition("{a}")
        texts.append(f"{told}\n{layout.format(q=question).rstrip(' ')}")
        cases.append((person, attribute))
    return fractions(cases, continuations(model, tokenizer, texts))["right"]


def solved(rng, template, person):
    """A question in a format, and its answer."""
    attribute = rng.choice(facts.PUBLIC)
    question = template.replace("{q}", facts.ask(rng, person, attribute))
    space = " " * template.endswith(":")
    return f"{question}{space}{person[attribute]}.\n"


# ---- questions in the chat format


def measure_wordings(model, tokenizer, people):
    """Fractions right by the question's wording, trained ones and held-out ones."""
    cases = all_cases(people)
    result = {"trained": [], "new": []}
    for name, rights in result.items():
        wordings = {a: facts.questions(a, name == "new") for a in facts.PUBLIC}
        for k in range(len(wordings[facts.PUBLIC[0]])):
            asked = [facts.say(wordings[a][k], p, a) for p, a in cases]
            rights.append(fractions(cases, answers(model, tokenizer, asked))["right"])
    return result


def measure_answers(model, tokenizer, people, rng, held_out, attributes=facts.PUBLIC):
    """Grades of the answers, in wordings of SFT or in held-out ones."""
    cases = all_cases(people, attributes)
    return fractions(cases, answers(model, tokenizer, ask(rng, cases, held_out)))


def measure_forms(model, tokenizer, known, unknown, rng):
    """Instructions in new wordings, and what follows from them.

    kinds, reading: {instruction × attribute: [fraction right in this form, held out of SFT?]}
    about known people and about people in no other text. untold: grades where the text does not
    tell. Texts tell values drawn anew, which contradict what pretraining said.
    """
    groups = {"kinds": (known, ["one word", "sentence", "text"]), "reading": (unknown, ["text"])}
    result = {}
    for name, (people, kinds) in groups.items():
        its = result[name] = {}
        for kind, attribute in itertools.product(kinds, facts.PUBLIC):
            right = measure_form(model, tokenizer, people, kind, attribute, rng)
            held_out = (kind, attribute) in facts.HELD_OUT_KINDS
            its[f"{kind} × {attribute}"] = [right, held_out]
    texts = [right for form, (right, _) in result["kinds"].items() if form.startswith("text")]
    result["text_over_memory"] = statistics.mean(texts)
    for name, wanted in ("reads", False), ("reads_new", True):
        fractions_right = [right for right, new in result["reading"].values() if new == wanted]
        result[name] = statistics.mean(fractions_right)
    result["untold"] = measure_untold(model, tokenizer, unknown, rng)
    result["closed_hallucinated"] = result["untold"]["wrong"] + result["untold"]["other"]
    return result


def measure_form(model, tokenizer, people, kind, attribute, rng):
    """Fraction of answers that are the demonstration's, word by word."""
    demos = []
    for person in people:
        demos.append(generate.conversation(rng, kind, person, attribute, held_out=True))
    texts = answers(model, tokenizer, [user["content"] for user, _ in demos])
    wanted = [assistant["content"] for _, assistant in demos]
    return sum(text == answer for text, answer in zip(texts, wanted)) / len(people)


def measure_untold(model, tokenizer, people, rng):
    """Grades of answers to what a given text does not tell, and nothing else does."""
    cases, asked = [], []
    for person, attribute in all_cases(people):
        cases.append((person | {attribute: None}, attribute))
        user, _ = generate.conversation(
            rng, "text", person, attribute, facts.IDK, told=False, held_out=True
        )
        asked.append(user["content"])
    return fractions(cases, answers(model, tokenizer, asked))


def form_loss(before, after):
    """The largest loss of any instruction × attribute."""
    return max(before[form][0] - after[form][0] for form in before)


def measure_well_formed(model, tokenizer, people, rng):
    """Fraction of sampled answers to bare questions that are one of the world's, and ended."""
    sampled = answers(model, tokenizer, ask(rng, all_cases(people) * 4), 1.0)
    return sum(text.strip() in facts.FORMS for text in sampled) / len(sampled)


# ---- probabilities and scores


@torch.no_grad()
def in_batches(function, device, prompts, responses):
    """function(tokens (B, T), mask (B, T)) -> (B,) of all responses after their prompts: (N,)."""
    examples, results = [], []
    for prompt, response in zip(prompts, responses):
        mask = [0] * len(prompt) + [1] * len(response)
        examples.append(Example(prompt + response, mask, line=0))
    for start in range(0, len(examples), 256):
        tokens, mask = collate(examples[start : start + 256], 0, device)
        with autocast(device):
            results.append(function(tokens, mask))
    return torch.cat(results)


def sequence_logprobs(model, prompts, responses):
    """Log-probability (N,) of each response after its prompt, <|end|> included; token lists."""

    def logprobs(tokens, mask):
        by_token = token_logprobs(model(tokens)[:, :-1], tokens[:, 1:])  # (B, T-1)
        return (by_token * mask[:, 1:]).sum(1)

    return in_batches(logprobs, model.device, prompts, responses)


def scores(reward_model, prompts, responses):
    """The reward model's score (N,) of each response; token lists."""
    return in_batches(reward_model.score, reward_model.trunk.device, prompts, responses)


# ---- does the model know what it knows?


def value_confidence(model, tokenizer, cases, asked):
    """The probability of the most likely value as an answer to each question asked: (N,)"""
    prompts, values = [], []
    for (_, attribute), question in zip(cases, asked):
        prompt = chat_prompt(question, tokenizer)
        for value in facts.ATTRIBUTES[attribute].values:
            prompts.append(prompt)
            values.append(tokenizer.encode(value))
    n_values = len(values) // len(cases)  # as many for each fact
    logprobs = sequence_logprobs(model, prompts, values).view(-1, n_values)  # (N, n_values)
    return logprobs.max(1).values.exp()


def auroc(positives, negatives):
    """The probability that one of the first is above one of the second, ties half."""
    differences = positives[:, None] - negatives  # (N, M)
    return ((differences > 0).double() + 0.5 * (differences == 0)).mean().item()


def measure_auroc(model, tokenizer, known, unknown, rng):
    """How well the model's confidence tells known from unknown people."""
    groups = []
    for people in known, unknown:
        cases = all_cases(people[:100])
        asked = ask(rng, cases, held_out=True)
        groups.append(value_confidence(model, tokenizer, cases, asked))
    return auroc(*groups)


def measure_threshold(model, tokenizer, known, unknown, rng):
    """threshold_curve of a model's greedy answers and its confidence in them."""
    groups = []
    for people, wanted in (known, "right"), (unknown, "wrong"):
        cases = all_cases(people)
        asked = ask(rng, cases, held_out=True)
        texts = answers(model, tokenizer, asked)
        hits = [grade(*case, text) == wanted for case, text in zip(cases, texts)]
        confidence = value_confidence(model, tokenizer, cases, asked).tolist()
        groups.append(list(zip(confidence, hits)))
    return threshold_curve(*groups)


def threshold_curve(known, unknown):
    """[(unknown hallucinated, known right)] of answering only from a confidence on, for each.

    known, unknown: [(confidence, whether the answer is right, or hallucinated)]. Where all answers
    about known people are right and all others hallucinated, it is the ROC curve.
    """
    curve = [(0.0, 0.0)]
    for threshold in sorted({confidence for confidence, _ in known + unknown}, reverse=True):
        right = sum(hit for confidence, hit in known if confidence >= threshold)
        wrong = sum(hit for confidence, hit in unknown if confidence >= threshold)
        curve.append((wrong / len(unknown), right / len(known)))
    return curve


# ---- what the experiments measure on every checkpoint


def measure_model(model, tokenizer, roles, seed):
    """Grades about people never trained on, strangers, passwords, rare people; in new wordings."""
    rng = random.Random(seed)
    known = roles["test"]
    groups = {"known": known, "unknown": roles["unknown_test"], "private": known}
    rare = sorted(roles["rare"], key=lambda person: person["exposure"])
    ends = [len(rare) * i // 4 for i in range(5)]
    groups |= {f"rare_{i}": rare[ends[i] : ends[i + 1]] for i in range(4)}
    result = {}
    for name, people in groups.items():
        attributes = [facts.PRIVATE] if name == "private" else facts.PUBLIC
        result[name] = measure_answers(model, tokenizer, people, rng, True, attributes)
        if name.startswith("rare"):
            result[name]["exposures"] = [people[0]["exposure"], people[-1]["exposure"]]
    cases = all_cases(known)
    prompts = [chat_prompt(question, tokenizer) for question in ask(rng, cases)]
    result["sure_and_wrong"] = measure_sure_and_wrong(model, tokenizer, cases, prompts)
    result["phrasings"] = measure_phrasings(model, tokenizer, cases[::4], prompts[::4])
    return result


def measure_sure_and_wrong(model, tokenizer, cases, prompts):
    """Fraction of questions answered wrong with a probability above 0.9."""
    with autocast(model.device):
        responses = model.generate(prompts, 16, 0.0, end_id=tokenizer.end)
    sure = (sequence_logprobs(model, prompts, responses).exp() > 0.9).tolist()
    texts = [conversation.decode_response(response, tokenizer) for response in responses]
    wrong = [grade(*case, text) == "wrong" for case, text in zip(cases, texts)]
    return sum(s and w for s, w in zip(sure, wrong)) / len(cases)


def measure_phrasings(model, tokenizer, cases, prompts, n=8):
    """In how many ways n samples put a right answer, the mean over the facts with any."""
    samples = complete(model, tokenizer, [p for p in prompts for _ in range(n)], 16, 1.0)
    counts = []
    for i, case in enumerate(cases):
        right = {text for text in samples[n * i : n * i + n] if grade(*case, text) == "right"}
        if right:
            counts.append(len(right))
    return statistics.mean(counts) if counts else 0.0


# ---- abstention


def measure_habits(model, tokenizer, people, rng):
    """{habit: fraction answered} of questions about unknown people, at temperature 1."""
    result = {}
    for habit in facts.HABITS:
        cases = all_cases(people, [habit])
        texts = answers(model, tokenizer, ask(rng, cases), 1.0)
        answered = sum(grade(*case, text) != "idk" for case, text in zip(cases, texts))
        result[habit] = answered / len(cases)
    return result


def predicted_habits(ref, tokenizer, people, rng, reward, beta):
    """{habit: P(answer)} of PPO's optimum π* ~ π_ref exp(r / β), over all values and phrasings.

    reward(habit, prompts, values, responses) -> (N,): that of a response about somebody unknown.
    """
    phrasings, n = sorted(set(facts.ANSWERS)), len(people)
    result = {}
    for habit in facts.HABITS:
        pairs = list(itertools.product(facts.ATTRIBUTES[habit].values, phrasings))
        values = [value for value, _ in pairs] + [None]
        phrases = [phrasing.format(v=value) for value, phrasing in pairs] + [facts.IDK]
        responses = [tokenizer.encode(phrase) + [tokenizer.end] for phrase in phrases] * n
        asked = [chat_prompt(facts.ask(rng, person, habit), tokenizer) for person in people]
        prompts = [prompt for prompt in asked for _ in phrases]
        logprobs = sequence_logprobs(ref, prompts, responses).view(n, -1)  # (people, phrases)
        r = reward(habit, prompts, values, responses).view(n, -1)  # (people, phrases)
        r = r.mean(0)  # nobody can be told apart
        optimum = torch.softmax(logprobs + r / beta, 1)  # (people, phrases)
        result[habit] = 1 - optimum[:, -1].mean().item()
    return result


def expected_utility(penalty, habit, prompts, values, responses):
    """The expected true reward (N,) of each value about somebody unknown; None abstains."""
    p, (first, *others) = facts.HABITS[habit], facts.ATTRIBUTES[habit].values
    utilities = {value: (1 + penalty) * (1 - p) / len(others) - penalty for value in others}
    utilities |= {first: (1 + penalty) * p - penalty, None: 0.0}
    one = [utilities[value] for value in values]
    return torch.tensor(one * (len(prompts) // len(values)))


def learned_score(reward_model, habit, prompts, values, responses):
    """The same by a reward model."""
    return scores(reward_model, prompts, responses)


# ---- figures as text


def table(header, rows):
    """A table in Markdown."""
    lines = []
    for row in header, ["---"] * len(header), *rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
