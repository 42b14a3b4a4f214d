"""The experiments' controls, on the people of a world that is there: training files, a reward.

python -m lab.controls                 # out/world/controls/*.jsonl, for sft.py --data
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch

import ppo
from data import conversation
from lab.measure import all_cases, by_role, chat_prompt, scores
from model import GPT
from reward import RewardModel
from train.checkpoint import load_checkpoint
from train.device import autocast
from utils.cli import parse_config
from utils.files import read_jsonl, write_jsonl, write_text
from world import facts, generate
from world.grade import Grader, is_told, read_people

N_FACTS = 600  # questions in each set of the dose curve
N_EPISODES = ppo.Config.steps * ppo.Config.batch_size  # as many samples for each control
N_HABITS = 3000  # demonstrations; with fewer, how often it abstains depends on the name
SIZES = [100, 300, 1000]  # of the SFT size curve, beside all
DOSES = [0, 25, 50, 75]  # percent of unknown facts
BEST_OF = 4
# What a wrong answer costs: the reward function.
PENALTIES = {1: "true_reward", 2: "true_reward_2", 4: "true_reward_4"}


@dataclass
class Config:
    data: str = "out/world"  # folder of the world
    seed: int = 0  # wordings


def demonstration(messages, answer):
    return {"messages": messages + [{"role": "assistant", "content": answer}]}


def answered(rng, person, attribute, answer=None):
    """A question and an answer, the true one if none is given."""
    prompt = generate.prompt(rng, person, attribute)
    return demonstration(prompt["messages"], answer or f"{person[attribute]}.")


def shuffled_facts(rng, people):
    """The people, each with another's values: the same answers to the wrong questions."""
    others = rng.sample(people, len(people))
    return [p | {a: other[a] for a in facts.ATTRIBUTES} for p, other in zip(people, others)]


def dose_sets(rng, sft, unknown, n_facts):
    """{name: conversations}: a fraction of the facts is about people in no text.

    Two controls at each dose: the unknown facts left out, and answered with "I do not know."
    """
    known = rng.sample(all_cases(sft), n_facts)
    unknown = rng.sample(all_cases(unknown), n_facts * max(DOSES) // 100)
    sets = {}
    for dose in DOSES:
        n = n_facts * dose // 100
        kept = [answered(rng, *case) for case in known[n:]]
        taught = [answered(rng, *case) for case in unknown[:n]]
        idk = [answered(rng, *case, facts.IDK) for case in unknown[:n]]
        sets[f"dose_{dose}"] = rng.sample(kept + taught, n_facts)
        if dose:
            sets[f"dose_{dose}_removed"] = kept
            sets[f"dose_{dose}_idk"] = rng.sample(kept + idk, n_facts)
    return sets


def demonstrations(prompts, grader, abstain):
    """The best answers to PPO's prompts, by a labeller who knows the world.

    With abstain, one who also knows what the model knows: "I do not know." about people in no text.
    """
    result = []
    for record in prompts:
        case = grader.case(record["messages"][-1]["content"])
        person = case.person
        if person[case.attribute] is None:  # the text does not tell, but the labeller knows
            person = grader.people[person["name"]]
        answer = facts.say(facts.phrasings(case.kind)[0], person, case.attribute)
        if case.attribute == facts.PRIVATE:
            answer = facts.REFUSAL
        elif abstain and not is_told(case):
            answer = facts.IDK
        result.append(demonstration(record["messages"], answer))
    return result


def habit_answers(rng, people, abstain=0.3):
    """Each person's own habit or, at random, "I do not know.": for a reference that does both."""
    result = []
    for person in people:
        habit = rng.choice(list(facts.HABITS))
        answer = facts.IDK if rng.random() < abstain else None
        result.append(answered(rng, person, habit, answer))
    return result


# ---- by the models of the current folder


def best_of(device, reward="out/reward.pt", out="out/world/controls/best_of.jsonl"):
    """Demonstrations by the SFT model: of BEST_OF samples a prompt the one that scores highest."""
    model, tokenizer = load_checkpoint("out/sft.pt", ["sft"], GPT, device)
    reward_model, _ = load_checkpoint(reward, ["reward"], RewardModel, device)
    prompts = read_jsonl("out/world/prompts.jsonl")[: N_EPISODES // BEST_OF]
    records = []
    for start in range(0, len(prompts), 64):
        batch = [record["messages"] for record in prompts[start : start + 64]]
        tokens = [conversation.render_prompt(m, tokenizer) for m in batch for _ in range(BEST_OF)]
        with autocast(device):
            responses = model.generate(tokens, 16, end_id=tokenizer.end)
        best = scores(reward_model, tokens, responses).view(-1, BEST_OF).argmax(1)  # (64,)
        for i, k in enumerate(best.tolist()):
            answer = conversation.decode_response(responses[i * BEST_OF + k], tokenizer)
            records.append(demonstration(batch[i], answer))
    write_jsonl(out, records)


@functools.cache
def judge():
    return load_checkpoint("out/reward.pt", ["reward"], RewardModel, torch.device("cpu"))


def margin(prompts, responses):
    """A reward function: by how much the reward model prefers a response to "I do not know." """
    reward_model, tokenizer = judge()
    tokens = [chat_prompt(prompt, tokenizer) for prompt in prompts]
    scored = []
    for texts in responses, [facts.IDK] * len(prompts):
        answers = [tokenizer.encode(text) + [tokenizer.end] for text in texts]
        scored.append(scores(reward_model, tokens, answers))
    return (scored[0] - scored[1]).tolist()


# ---- the files


def main():
    config = parse_config(Config, __doc__)
    folder, rng = Path(config.data), random.Random(config.seed)
    roles = by_role(read_people(folder / "people.jsonl"))
    sft = read_jsonl(folder / "sft.jsonl")
    prompts = read_jsonl(folder / "prompts.jsonl")[:N_EPISODES]  # PPO holds out the file's end
    grader = Grader(folder / "people.jsonl")

    shuffled = shuffled_facts(rng, roles["sft"])
    stranger = functools.partial(next, iter(roles["sft_unknown"]))
    shuffled = generate.sft_conversations(rng, shuffled, stranger)
    sets = {"sft_shuffled": [{"messages": messages} for messages in shuffled]}
    sets |= {f"sft_{n}": sft[:n] for n in SIZES}
    sets |= dose_sets(rng, roles["sft"], roles["unknown_dev"], N_FACTS)
    sets["demos"] = demonstrations(prompts, grader, abstain=False)
    sets["demos_idk"] = demonstrations(prompts, grader, abstain=True)
    sets["habit_ref"] = habit_answers(rng, rng.sample(roles["rl_unknown"], N_HABITS))

    for name, records in sets.items():
        write_jsonl(folder / "controls" / f"{name}.jsonl", records)
        print(f"{folder / 'controls'}: {name}, {len(records)} conversations")
    write_text(folder / "controls" / "done", "\n".join(sets) + "\n")


if __name__ == "__main__":
    main()
