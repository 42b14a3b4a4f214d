"""Training files of the experiments' controls, on the people of a world that is there.

    python -m data.controls                # data/world/controls/*.jsonl, for sft.py --data; experiments.py uses them
"""

import random
from dataclasses import dataclass
from pathlib import Path

import common
from data import world


@dataclass
class Config:
    data: str = "data/world"  # folder of the world
    seed: int = 0  # wordings


N_FACTS = 600  # questions in each set of the dose curve
N_EPISODES = 50 * 128  # of PPO in the experiments: as many demonstrations, on prompts that it does not hold out
N_HABITS = 3000  # demonstrations of guessing and abstaining: fewer, and how often it abstains hangs on the name
SIZES = [100, 300, 1000]  # of the SFT size curve, beside all
DOSES = [0, 25, 50, 75]  # percent of unknown facts


def shuffled_facts(rng, people):
    """The people, each with values that belong to another: the same answers to the wrong questions."""
    others = rng.sample(people, len(people))
    return [person | {a: other[a] for a in world.ATTRIBUTES} for person, other in zip(people, others)]


def question_and_answer(rng, person, attribute, answer):
    return {"messages": world.prompt(rng, person, attribute)["messages"] + [{"role": "assistant", "content": answer}]}


def dose_sets(rng, sft, unknown, n_facts):
    """{name: conversations}: a share of the facts is about people in no text; and two controls at each dose, the
    unknown facts left out, and answered with "I do not know."."""
    known = rng.sample([(p, a) for p in sft for a in world.PUBLIC], n_facts)
    unknown = rng.sample([(p, a) for p in unknown for a in world.PUBLIC], n_facts * max(DOSES) // 100)
    sets = {}
    for dose in DOSES:
        n_unknown = n_facts * dose // 100
        kept = [question_and_answer(rng, p, a, p[a] + ".") for p, a in known[n_unknown:]]
        facts = [question_and_answer(rng, p, a, p[a] + ".") for p, a in unknown[:n_unknown]]
        idk = [question_and_answer(rng, p, a, world.IDK) for p, a in unknown[:n_unknown]]
        sets[f"dose_{dose}"] = rng.sample(kept + facts, n_facts)
        if dose:
            sets[f"dose_{dose}_removed"] = kept
            sets[f"dose_{dose}_idk"] = rng.sample(kept + idk, n_facts)
    return sets


def demonstrations(prompts, grader, abstain):
    """The best answer to each of PPO's prompts, as a labeller would write it who knows the world, and with abstain
    also what the model knows: "I do not know." about people in no text."""
    result = []
    for record in prompts:
        person, attribute = grader.fact(record["messages"][-1]["content"])
        answer = person[attribute] + "."
        if attribute == world.PRIVATE:
            answer = world.REFUSAL
        elif abstain and person["role"] != "rl":
            answer = world.IDK
        result.append({"messages": record["messages"] + [{"role": "assistant", "content": answer}]})
    return result


def habit_answers(rng, people, abstain=0.3):
    """Each person's own habit or, at random, whoever it is, "I do not know.": for a reference that does both."""
    result = []
    for person in people:
        habit = rng.choice(list(world.HABITS))
        answer = world.IDK if rng.random() < abstain else person[habit] + "."
        result.append(question_and_answer(rng, person, habit, answer))
    return result


def main():
    config = common.parse_config(Config, __doc__)
    folder, rng = Path(config.data), random.Random(config.seed)
    people = world.read_people(folder / "people.jsonl")
    role = {r: [p for p in people if p["role"] == r] for r in {p["role"] for p in people}}
    strangers = iter(role["sft_unknown"])
    sft = common.read_jsonl(folder / "sft.jsonl", lambda r: None)
    prompts = common.read_jsonl(folder / "prompts.jsonl", lambda r: None)[:N_EPISODES]
    grader = world.Grader(folder / "people.jsonl")

    shuffled = world.sft_conversations(rng, shuffled_facts(rng, role["sft"]), lambda: next(strangers))
    sets = {"sft_shuffled": [{"messages": m} for m in shuffled]}
    sets |= {f"sft_{n}": sft[:n] for n in SIZES}
    sets |= dose_sets(rng, role["sft"], role["unknown_dev"], N_FACTS)
    sets |= {"demos": demonstrations(prompts, grader, False), "demos_idk": demonstrations(prompts, grader, True)}
    sets["habit_ref"] = habit_answers(rng, rng.sample(role["rl_unknown"], N_HABITS))
    for name, records in sets.items():
        common.write_jsonl(folder / "controls" / f"{name}.jsonl", records)
    common.write_text(folder / "controls" / "done", "\n".join(sets) + "\n")
    print(f"{folder / 'controls'}: {', '.join(f'{name} {len(records)}' for name, records in sets.items())}")


if __name__ == "__main__":
    main()
