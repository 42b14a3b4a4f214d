"""Preference pairs: the SFT model answers, a labeller who knows the world compares.

    python -m world.label   # out/sft.pt answers out/world/prompts.jsonl -> preferences.jsonl

This is InstructGPT's second data set (arXiv 2203.02155). The labeller is noisy, as labellers are:
P(prefers a to b) = sigmoid(sharpness * (utility a - utility b)), the Bradley-Terry model that the
reward model assumes. Labels without noise would drive its scores apart without end.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from data import conversation
from data.examples import load_prompts
from model import GPT
from train.checkpoint import load_checkpoint
from train.device import autocast, setup
from utils.cli import die, parse_config
from utils.files import write_jsonl
from world import facts
from world.facts import HABITS, IDK, REFUSAL, say
from world.grade import Grader, is_told, utility


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint whose answers are compared
    data: str = "out/world"  # folder with prompts.jsonl and people.jsonl
    out: str = "out/world/preferences.jsonl"  # pairs to write
    prompts: str = "prompts.jsonl"  # file in the folder with the questions
    pairs: int = 14000  # prompts whose answers are compared
    penalty: float = 1.0  # what a wrong answer costs; a right one is worth 1, "I do not know." 0
    sharpness: float = 4.0  # of the labeller: at 4, right is preferred to "I do not know." with 98%
    max_new_tokens: int = 16  # longest answer
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # samples and labels


def candidates(rng, case, sampled):
    """Answers to compare: some are the model's own, the others the labeller writes."""
    kind, person, attribute = case
    phrase = rng.choice(facts.phrasings(kind))
    others = [name for name in facts.ATTRIBUTES if name != attribute]
    values = [v for v in facts.ATTRIBUTES[attribute].values if v != person[attribute]]
    astray = say(phrase, person, rng.choice(others))
    wrong = say(phrase, person | {attribute: rng.choice(values)}, attribute)
    if attribute in HABITS:
        # a guess meets "I do not know." whether it is right or not: else its odds would be bent
        return [IDK, rng.choice([sampled] * 10 + [REFUSAL, astray])]
    written = [IDK, IDK, REFUSAL, astray, wrong]
    if is_told(case):  # about unknown people the labeller cannot write the true answer
        other_kind = rng.choice([name for name in facts.KINDS if name != kind])
        off_form = rng.choice(facts.phrasings(other_kind))
        right = say(phrase, person, attribute)
        written += [right] * 3 + [say(off_form, person, attribute)] * 2
    return [sampled] * 3 + written


def prefers(rng, first, second, sharpness):
    """Whether the labeller prefers the first of two utilities."""
    x = sharpness * (first - second)
    return rng.random() < (1 + math.tanh(x / 2)) / 2  # sigmoid(x), whose exp would overflow


def compare(rng, case, sampled, config):
    """(chosen, rejected), or None where no answer differs in utility from the first one drawn."""
    answers = candidates(rng, case, sampled)
    utilities = {answer: utility(case, answer, config.penalty) for answer in answers}
    first = rng.choice(answers)
    others = [answer for answer in answers if utilities[answer] != utilities[first]]
    if not others:
        return None
    second = rng.choice(others)
    first_wins = prefers(rng, utilities[first], utilities[second], config.sharpness)
    return (first, second) if first_wins else (second, first)


def main():
    config = parse_config(Config, __doc__)
    device, rng = setup(config), random.Random(config.seed)

    # model and prompts, each once, then again
    model, tokenizer = load_checkpoint(config.init, ["sft", "ppo"], GPT, device)
    path, people = Path(config.data, config.prompts), Path(config.data, "people.jsonl")
    grader = Grader(people)
    prompts = load_prompts(path, tokenizer, config.max_new_tokens, model.config.block_size)
    rounds = math.ceil(config.pairs / len(prompts))
    prompts = (rng.sample(prompts, len(prompts)) * rounds)[: config.pairs]

    pairs = []
    for start in range(0, len(prompts), 256):
        # the model's answers
        batch = prompts[start : start + 256]
        tokens = [prompt.tokens for prompt in batch]
        with autocast(device):
            responses = model.generate(tokens, config.max_new_tokens, end_id=tokenizer.end)

        # the labeller's verdicts
        for prompt, response in zip(batch, responses):
            sampled = conversation.decode_response(response, tokenizer)
            try:
                case = grader.case(prompt.messages[-1]["content"])
            except ValueError as e:
                die(f"{path}, line {prompt.line}: {e}; labels are for this world's own prompts")
            if pair := compare(rng, case, sampled, config):
                chosen, rejected = pair
                pairs.append(dict(messages=prompt.messages, chosen=chosen, rejected=rejected))

    write_jsonl(config.out, pairs)
    print(f"{config.out}: {len(pairs)} comparisons of answers by {config.init}")


if __name__ == "__main__":
    main()
