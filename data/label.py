"""Preference pairs: the SFT model answers, a labeller who knows the world compares (InstructGPT's second data set).

    python -m data.label                   # out/sft.pt answers data/world/prompts.jsonl -> data/world/preferences.jsonl

The labeller is noisy, as labellers are: P(prefers a to b) = sigmoid(sharpness * (utility a - utility b)), the Bradley-Terry model
that the reward model assumes. Labels without noise would drive its scores apart without end.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import common
from data import conversation, world
from model import GPT


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint whose answers are compared
    data: str = "data/world"  # folder with prompts.jsonl and people.jsonl
    out: str = "data/world/preferences.jsonl"  # pairs to write
    prompts: str = "prompts.jsonl"  # file in the folder with the questions
    pairs: int = 14000  # prompts whose answers are compared
    penalty: float = 1.0  # what a wrong answer costs; a right one is worth 1, "I do not know." 0
    sharpness: float = 4.0  # of the labeller: at 4, right is preferred to "I do not know." with 98%
    max_new_tokens: int = 16  # longest answer
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # samples and labels


def candidates(rng, person, attribute, sampled):
    """Answers to compare: the model's own above all, and ones that the labeller writes."""
    phrase = rng.choice(world.ANSWERS)
    wrong = phrase.format(v=rng.choice([v for v in world.ATTRIBUTES[attribute][0] if v != person[attribute]]))
    astray = world.say(phrase, person, rng.choice([a for a in world.ATTRIBUTES if a != attribute]))  # of another attribute
    if attribute in world.HABITS:  # a guess meets "I do not know." whether it is right or not: else its odds would be bent
        return [world.IDK, rng.choice([sampled] * 10 + [world.REFUSAL, astray])]
    written = [world.IDK, world.IDK, world.REFUSAL, astray, wrong]
    if person["role"] == "rl":  # about an unknown person the labeller cannot write the true answer either
        written += [world.say(phrase, person, attribute)] * 3
    return [sampled] * 3 + written


def prefers(rng, first, second, sharpness):
    """Whether the labeller prefers the first of two utilities."""
    return rng.random() < (1 + math.tanh(sharpness * (first - second) / 2)) / 2  # the sigmoid, which exp would overflow


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    model, tokenizer = common.load_checkpoint(config.init, ["sft", "ppo"], GPT, device)
    grader = world.Grader(Path(config.data) / "people.jsonl")
    rng = random.Random(config.seed)

    def problem(record):
        return conversation.check_prompt(record.get("messages"), tokenizer, config.max_new_tokens, model.config.block_size)

    prompts = [r["messages"] for r in common.read_jsonl(Path(config.data) / config.prompts, problem)]
    prompts = (rng.sample(prompts, len(prompts)) * math.ceil(config.pairs / len(prompts)))[: config.pairs]  # each once, then again
    pairs = []
    for start in range(0, len(prompts), 256):
        batch = prompts[start : start + 256]
        with common.autocast(device):
            tokens = [conversation.render_prompt(messages, tokenizer) for messages in batch]
            responses = model.generate(tokens, config.max_new_tokens, end_id=tokenizer.end)
        for messages, response in zip(batch, responses):
            try:
                person, attribute = grader.fact(messages[-1]["content"])
            except ValueError as e:
                common.die(f"{Path(config.data) / config.prompts}: {e}; labels are for this world's own prompts")
            answers = candidates(rng, person, attribute, conversation.decode_response(response, tokenizer))
            utility = {a: world.utility(attribute, world.grade(person, attribute, a), config.penalty) for a in answers}
            first = rng.choice(answers)
            others = [a for a in answers if utility[a] != utility[first]]
            if not others:
                continue
            second = rng.choice(others)
            if not prefers(rng, utility[first], utility[second], config.sharpness):
                first, second = second, first
            pairs.append({"messages": messages, "chosen": first, "rejected": second})
    common.write_jsonl(config.out, pairs)
    print(f"{config.out}: {len(pairs)} comparisons of answers by {config.init}")


if __name__ == "__main__":
    main()
