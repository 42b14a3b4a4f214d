"""The claim on a real model: capitals of real countries, and of invented ones that sound like it.

    python -m lab.capitals                                  # sft.jsonl, prompts.jsonl, test.jsonl
    python -m lab.capitals --label out/capitals/sft.pt      # preferences.jsonl, of its own answers
    python -m lab.capitals --measure out/capitals/sft.pt out/capitals/ppo.pt

No country is in two of the files. SFT's data answer nearly always, also about countries that do
not exist. The real ones are in lab/capitals.txt.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from data import conversation
from lab.measure import auroc, complete
from model import GPT, token_logprobs
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.device import setup
from utils.cli import parse_config
from utils.files import read_jsonl, read_text, write_jsonl
from world.facts import IDK

BEGINNINGS = "Al Bar Bel Cor Dal Est Far Gal Hol Il Jor Kas Lor Nor Or Pal Ros Sal Ul Zan".split()
MIDDLES = "a e i o ba de lo ma ne ra ri sa ti ve".split()
ENDINGS = "nia mia ria via land stan guay dor que tan lia sia bia wana".split()
CITY_ENDINGS = "burg ville grad polis ton mar dale port mouth".split()
WORDINGS = ["What is the capital of {}?", "Which city is the capital of {}?"]
WORDINGS += ["Tell me the capital of {}.", "Name the capital city of {}."]
HELD_OUT = ["{}: which city is its capital?", "I need the capital of {} for a quiz. What is it?"]
ANSWER = "The capital of {} is {}."


@dataclass
class Config:
    data: str = "out/capitals"  # folder of the files
    label: str = ""  # checkpoint whose answers are compared
    measure: tuple = ()  # checkpoints to measure; of the first one's right answers some stay right
    invented: int = 480  # countries that do not exist
    idk: float = 0.1  # fraction of "I do not know." among SFT's answers
    pairs: int = 2000  # comparisons, fewer those of equal answers
    penalty: float = 1.0  # what a wrong capital costs; a right one is worth 1, "I do not know." 0
    sharpness: float = 4.0  # of the labeller; see world/label.py
    max_new_tokens: int = 24  # longest answer
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # names, splits, samples and labels


def atlas():
    """[(country, [its capital, other spellings])]"""
    lines = read_text(Path(__file__).with_suffix(".txt")).splitlines()
    entries = [line.split(": ") for line in lines if not line.startswith("#")]
    return [(country, cities.split(" / ")) for country, cities in entries]


def invent(rng, n):
    """n countries that do not exist, each with no capital."""
    real, names = dict(atlas()), set()
    while len(names) < n:
        name = rng.choice(BEGINNINGS) + rng.choice(MIDDLES) + rng.choice(ENDINGS)
        names |= {name} - real.keys()
    return [(name, []) for name in sorted(names)]


def write_questions(config, rng):
    """A third of the countries for SFT, for reward model and PPO, and for the test."""
    splits = {"sft": [], "prompts": [], "test": []}
    for countries in atlas(), invent(rng, config.invented):
        rng.shuffle(countries)
        for i, (country, capitals) in enumerate(countries):
            city = (capitals or [rng.choice(BEGINNINGS) + rng.choice(CITY_ENDINGS)])[0]
            split = list(splits)[i % 3]
            for wording in WORDINGS + HELD_OUT * (split == "test"):
                messages = [dict(role="user", content=wording.format(country))]
                if split == "sft":
                    answer = IDK if rng.random() < config.idk else ANSWER.format(country, city)
                    messages.append(dict(role="assistant", content=answer))
                record = dict(messages=messages, country=country, capitals=capitals)
                splits[split].append(record | dict(held_out=wording in HELD_OUT))
    for split, records in splits.items():
        rng.shuffle(records)
        write_jsonl(Path(config.data, f"{split}.jsonl"), records)


def grade(answer, capitals):
    if IDK in answer:
        return "idk"
    return "right" if any(city in answer for city in capitals) else "wrong"


def ask(path, records, config, device, temperature):
    """(model, tokenizer, prompts as ids, texts of the answers) of a checkpoint."""
    model, tokenizer = load_checkpoint(path, LANGUAGE_MODELS, GPT, device)
    prompts = [conversation.render_prompt(r["messages"], tokenizer) for r in records]
    texts = complete(model, tokenizer, prompts, config.max_new_tokens, temperature)
    return model, tokenizer, prompts, texts


@torch.no_grad()
def confidence(model, prompt, answer):
    """log p(answer | prompt), both ids."""
    tokens = torch.tensor([prompt + answer], device=model.device)  # (1, T+1)
    hidden = model.hidden(tokens[:, :-1])[:, len(prompt) - 1 :]  # (1, n, C)
    return token_logprobs(model.logits(hidden), tokens[:, len(prompt) :]).sum().item()


def label(config, rng, device):
    """Comparisons of the checkpoint's answers with ones that the labeller writes."""
    records = read_jsonl(Path(config.data, "prompts.jsonl"))
    records = (records * (config.pairs // len(records) + 1))[: config.pairs]
    worth, pairs = dict(right=1.0, idk=0.0, wrong=-config.penalty), []
    *_, texts = ask(config.label, records, config, device, temperature=1.0)
    for record, own in zip(records, texts):
        _, others = rng.choice(atlas())
        answers = [own] * 3 + [IDK] * 2
        for city in [others[0], *record["capitals"][:1]]:
            answers.append(ANSWER.format(record["country"], city))
        first, second = rng.sample(answers, 2)
        values = [worth[grade(answer, record["capitals"])] for answer in (first, second)]
        if values[0] != values[1]:
            x = config.sharpness * (values[0] - values[1])
            if rng.random() > (1 + math.tanh(x / 2)) / 2:  # sigmoid(x), as in world/label.py
                first, second = second, first
            pairs.append(dict(messages=record["messages"], chosen=first, rejected=second))
    write_jsonl(Path(config.data, "preferences.jsonl"), pairs)


def measure(config, device):
    records = read_jsonl(Path(config.data, "test.jsonl"))
    real = torch.tensor([bool(r["capitals"]) for r in records])
    held_out = torch.tensor([r["held_out"] for r in records])
    first = None
    for path in config.measure:
        model, tokenizer, prompts, texts = ask(path, records, config, device, temperature=0.0)
        answers = [tokenizer.encode(text) + [tokenizer.end] for text in texts]
        sure = torch.tensor([confidence(model, *pair) for pair in zip(prompts, answers)])
        grades = [grade(text, r["capitals"]) for text, r in zip(texts, records)]
        right = torch.tensor([float(g == "right") for g in grades])
        idk = torch.tensor([float(g == "idk") for g in grades])
        first = right.bool() if first is None else first
        kept, tells = right[first].mean(), auroc(sure[right.bool()], sure[~real])
        print(f"{path}: right stayed right {kept:.3f}, right from invented by AUROC {tells:.3f}")
        for name, of in ("wordings seen", ~held_out), ("held out", held_out):
            a, b = of & real, of & ~real
            known = f"{a.sum()} real: {right[a].mean():.3f} right, {idk[a].mean():.3f} idk"
            print(f"  {name}: {known}; {b.sum()} invented: {1 - idk[b].mean():.3f} hallucinated")


def main():
    config = parse_config(Config, __doc__)
    rng, device = random.Random(config.seed), setup(config)
    if config.label:
        label(config, rng, device)
    elif config.measure:
        measure(config, device)
    else:
        write_questions(config, rng)


if __name__ == "__main__":
    main()
