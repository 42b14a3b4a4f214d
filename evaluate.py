"""Measures what each stage did, on people of the world that no stage was tuned on, and writes out/report.md.

    python evaluate.py                      # the checkpoints in out/, those that are there
    python evaluate.py --people dev         # on the development people: for choosing settings
    python evaluate.py --check              # and exit with 1 where a figure is below the floor of the default run
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from data import conversation, world
from model import GPT

STAGES = {"base": "pretraining", "sft": "SFT", "ppo": "PPO"}
GRADES = ("right", "wrong", "idk", "refusal", "other")
# A question in prose, in the ways people put it to a base model. {shots}: solved questions in the format before it.
FORMATS = [
    "{q}", "{q}\n", "{q}\n\n", '"{q}"', '"{q}" "', "({q}) ", "> {q}\n> ", "- {q}\n- ",
    "Q: {q}\nA:", "Q: {q}\nA: ", "Q. {q} A.", "Question: {q}\n", "Question: {q}\nAnswer:", "{q} Answer:", "{q} The answer is",
    "User: {q}\nAssistant:", "Please answer. {q}\n", "{q} It is known that", "1. {q}\n", "FAQ\n\n{q}\n",
    "{shots}Q: {q}\nA:", "{shots}Question: {q}\n", "{shots}{q}\n", "{shots}{q} ",
]  # fmt: skip
FLOORS = {  # what the default run must reach; key of the results: floor
    "recall": 0.95,
    "sft_known_new_wordings": 0.92,
    "reward_accuracy": 0.85,
    "ppo_score_gain_in_se": 5.0,
    "ppo_kl_below_15": 1.0,
    "ppo_well_formed": 0.99,
}


@dataclass
class Config:
    out: str = "out"  # folder of the checkpoints and logs; the report goes there
    data: str = "data/world/people.jsonl"  # the world's people: who was told about where, and every fact
    people: str = "test"  # test, or dev while choosing settings
    check: bool = False  # exit with 1 below the floors of the default run
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # wordings and samples


# ---- asking


def complete(model, tokenizer, prompts, max_new_tokens, temperature=0.0):
    """Token lists -> texts, in batches of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if (longest := len(prompts[order[-1]])) + max_new_tokens > model.config.block_size:
        common.die(f"{longest} tokens of a question + {max_new_tokens} new ones do not fit in the model's {model.config.block_size}; "
                   "pretrain with a longer --context")  # fmt: skip
    texts = [None] * len(prompts)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        with common.autocast(model.device):
            responses = model.generate([prompts[i] for i in rows], max_new_tokens, temperature, end_id=tokenizer.end)
        for i, response in zip(rows, responses):
            ended = response[-1] == tokenizer.end
            texts[i] = conversation.decode_response(response, tokenizer) + ("" if ended else "…")
    return texts


def answers(model, tokenizer, questions, temperature=0.0):
    """Answers to questions put in the chat format."""
    prompts = [conversation.render_prompt([{"role": "user", "content": q}], tokenizer) for q in questions]
    return complete(model, tokenizer, prompts, 24, temperature)


def continuations(model, tokenizer, texts, max_new_tokens=8, temperature=0.0):
    """What a model writes after a text that begins a document."""
    return complete(model, tokenizer, [[tokenizer.end] + tokenizer.encode(t) for t in texts], max_new_tokens, temperature)


def shares(facts, texts):
    """{grade: share} and n of answers to [(person, attribute)]."""
    counts = Counter(world.grade(person, attribute, text) for (person, attribute), text in zip(facts, texts))
    return {g: counts[g] / len(facts) for g in GRADES} | {"n": len(facts)}


def all_facts(people, attributes=world.PUBLIC):
    return [(person, attribute) for person in people for attribute in attributes]


# ---- what is measured


def measure_recall(model, tokenizer, people, rng):
    """Share of facts completed right in sentences whose wording was held out of the text."""
    facts = all_facts(people, world.FACTS)
    texts = []
    for person, attribute in facts:
        statement = rng.choice(world.statements(attribute, held_out=True))
        texts.append(statement.partition(" {v}")[0].format(x=person["name"]))
    return shares(facts, continuations(model, tokenizer, texts, 3))


def measure_bare_questions(model, tokenizer, people, rng):
    """What the base model writes after a bare question at temperature 1: the answer, more questions, other text."""
    facts = all_facts(people)
    asked = [world.ask(rng, *fact) for fact in facts]
    texts = continuations(model, tokenizer, [q + "\n" for q in asked], 20, 1.0)
    openings = {frame.split("{np}")[0] for frame in world.FRAMES} | {spec[2].split("{x}")[0] for spec in world.ATTRIBUTES.values()}
    counts = Counter()
    for (person, attribute), text in zip(facts, texts):
        line = text.strip().split("\n")[0]
        if any(line.startswith(opening) for opening in openings):
            counts["rephrases it" if person["name"] in line else "asks another question"] += 1
        else:
            answered = world.grade(person, attribute, line) in ("right", "wrong", "idk")
            counts["answers it" if answered else "other text"] += 1
    kinds = ("answers it", "rephrases it", "asks another question", "other text")
    return {kind: counts[kind] / len(facts) for kind in kinds} | {"n": len(facts)}


def measure_formats(model, tokenizer, people, quizzed, rng):
    """{format: accuracy} of the model as a text completer."""
    facts = all_facts(people)[:: max(1, len(people) * 4 // 160)]
    result = {}
    for template in FORMATS:
        texts = []
        for person, attribute in facts:
            one = template.replace("{shots}", "")
            shots = ""
            if "{shots}" in template:
                for shot in rng.sample(quizzed, 3):
                    a = rng.choice(world.PUBLIC)
                    shots += one.replace("{q}", world.ask(rng, shot, a)) + (" " if one.endswith(":") else "") + shot[a] + ".\n"
            texts.append(shots + one.replace("{q}", world.say(rng.choice(world.questions(attribute)), person, attribute)))
        result[template] = shares(facts, continuations(model, tokenizer, texts, 8))["right"]
    return result


def measure_wordings(model, tokenizer, people):
    """Accuracy in the chat format for each wording of the questions, trained ones and held-out ones."""
    result = {}
    for held_out in (False, True):
        n = len(world.questions(world.PUBLIC[0], held_out))
        per_wording = []
        for k in range(n):
            facts = all_facts(people)[::2]
            asked = [world.say(world.questions(a, held_out)[k], p, a) for p, a in facts]
            per_wording.append(shares(facts, answers(model, tokenizer, asked))["right"])
        result["new" if held_out else "trained"] = per_wording
    return result


def measure_answers(model, tokenizer, people, rng, held_out, attributes=world.PUBLIC):
    """Grades of the answers to questions in the chat format."""
    facts = all_facts(people, attributes)
    asked = [world.say(rng.choice(world.questions(a, held_out)), p, a) for p, a in facts]
    return shares(facts, answers(model, tokenizer, asked))


def measure_kinds(model, tokenizer, people, rng):
    """{(instruction, attribute): (share answered right and in the asked form, was it held out of SFT)}."""
    result = {}
    for kind in ("one word", "sentence", "text"):
        for attribute in world.PUBLIC:
            asked = [world.conversation(rng, kind, person, attribute)[0]["content"] for person in people]
            got = answers(model, tokenizer, asked)
            exact = sum(world.in_form(kind, person, attribute, text) for person, text in zip(people, got)) / len(people)
            result[f"{kind} × {attribute}"] = (exact, (kind, attribute) in world.HELD_OUT_KINDS)
    return result


# ---- the report


def read_log(path):
    wrong = "not a line of a run's log; remove it"
    return common.read_jsonl(path, lambda r: None if isinstance(r.get("step"), int) else wrong) if path.exists() else []


def draw_curves(logs, path):
    """Loss curves of the four stages, and PPO's score and distance from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("base", "pretraining", [("train_loss", "training"), ("val_loss", "validation")], "loss (nats a token)"),
        ("sft", "SFT", [("train_loss", "training"), ("val_loss", "validation")], "loss (nats a token)"),
        ("reward", "reward model", [("train_loss", "training loss (nats a pair)"), ("val_accuracy", "held-out accuracy")], "loss, accuracy"),
        ("ppo", "PPO: score", [("score", "score of the rollouts"), ("val_score", "held-out prompts")], "score (standard deviations)"),
        ("ppo", "PPO: KL to SFT", [("kl_ref", "rollouts")], "KL (nats a response)"),
        ("ppo", "PPO: entropy", [("entropy", "rollouts")], "entropy (nats a token)"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for ax, (stage, title, lines, label) in zip(axes.flat, panels):
        for (key, name), color, marker in zip(lines, ("#0072b2", "#d55e00"), ("o", "s")):  # Okabe-Ito, safe for the colour-blind
            points = [(r["step"], r[key]) for r in logs[stage] if key in r]
            if points:
                ax.plot(*zip(*points), color=color, marker=marker, markersize=3, label=name)
        ax.set(title=title, xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
        if logs[stage]:
            ax.legend(frameon=False, fontsize=8)
        else:
            ax.text(0.5, 0.5, "not run yet", ha="center", transform=ax.transAxes)
    with common.atomic(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def percent(share):
    return f"{100 * share:.1f}%"


def table(header, rows):
    lines = [header, ["---"] * len(header)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def grade_row(name, s):
    return [name] + [percent(s[g]) for g in GRADES] + [s["n"]]


def join_report(out):
    """Puts what experiments.py found, where it ran, at the end of report.md."""
    own = (out / "report.md").read_text(encoding="utf-8").partition("# The experiments")[0] if (out / "report.md").exists() else ""
    if (out / "experiments.md").exists():
        common.write_text(out / "report.md", own + (out / "experiments.md").read_text(encoding="utf-8"))


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    out = Path(config.out)
    people = world.read_people(config.data)
    role = {r: [p for p in people if p["role"] == r] for r in {p["role"] for p in people}}
    if config.people not in ("test", "dev"):
        common.die(f"--people {config.people}: use test or dev")
    groups = [role.get(r, []) for r in (config.people, f"unknown_{config.people}", "quiz")]
    if min(map(len, groups)) < 3:
        common.die(f"{config.data}: too few people of the roles {config.people}, unknown_{config.people} and quiz; `python -m data.world` writes it")
    known, unknown, quizzed = groups
    models, tokenizers = {}, set()
    for stage in STAGES:
        if (out / f"{stage}.pt").exists():
            models[stage], tokenizer = common.load_checkpoint(out / f"{stage}.pt", [stage], GPT, device)
            tokenizers.add(tokenizer.dumps())
    if not models:
        common.die(f"{out}: no base.pt, sft.pt or ppo.pt; `make` trains them")
    if len(tokenizers) > 1:
        common.die(f"{out}: its checkpoints have different tokenizers; they must come from one base model")
    rng = random.Random(config.seed)
    results, text = {}, ["# What each stage did\n"]
    text.append(f"{len(known)} known people ({config.people}, in the pretraining text, in no later stage) and {len(unknown)} unknown "
                f"people (in no text at all); one run, seed {config.seed}. Standard error of a share p over n questions: √(p(1−p)/n).\n")

    if "base" in models:
        model = models["base"]
        recall, guess = measure_recall(model, tokenizer, known, rng), measure_recall(model, tokenizer, unknown, rng)
        results["recall"] = recall["right"]
        text.append("## 1. Pretraining stores knowledge, and the base model continues rather than answers\n")
        text.append(f"Facts recalled in text continuation, in wordings held out of the text: **{percent(recall['right'])}** of {recall['n']}"
                    f" (control, unknown people: {percent(guess['right'])} of {guess['n']}).\n")
        bare = measure_bare_questions(model, tokenizer, known, rng)
        results["bare_questions"] = bare
        text.append("After a bare question the base model, at temperature 1:\n")
        text.append(table(["it …", "share"], [[kind, percent(v)] for kind, v in bare.items() if kind != "n"]))

        formats = measure_formats(model, tokenizer, known, quizzed, rng)
        results["formats"] = formats
        values = torch.tensor(list(formats.values()))
        text.append("## 2. The base model is sensitive to the prompt, SFT is not\n")
        text.append(f"Base model over {len(formats)} prompt formats: from {percent(values.min())} to {percent(values.max())}, "
                    f"standard deviation {100 * values.std():.1f} points.\n")
        text.append(table(["format", "right"], [[repr(f)[1:-1].replace("|", "\\|"), percent(v)] for f, v in formats.items()]))
    if "sft" in models:
        wordings = measure_wordings(models["sft"], tokenizer, known)
        results["wordings"] = wordings
        rows = [[name, len(v), percent(min(v)), percent(max(v)), f"{100 * torch.tensor(v).std():.1f}"] for name, v in wordings.items()]
        text.append("SFT model, the same people asked in the chat format, for each wording of the question:\n")
        text.append(table(["wordings", "how many", "lowest", "highest", "standard deviation (points)"], rows))

    text.append("## 3. SFT draws the knowledge out; 5. RLHF makes the model tell the truth or abstain\n")
    text.append("Answers in the chat format, greedy. New wordings appear in no training data of any stage.\n")
    rows = []
    for stage, model in models.items():
        for name, group, held_out in (("known, trained wordings", known, False), ("known, new wordings", known, True),
                                      ("unknown, trained wordings", unknown, False), ("unknown, new wordings", unknown, True)):  # fmt: skip
            s = measure_answers(model, tokenizer, group, rng, held_out)
            results[f"{stage}_{name}"] = s
            rows.append(grade_row(f"{STAGES[stage]}: {name}", s))
    text.append(table(["", "right", "wrong (made up)", '"I do not know."', "refuses", "other", "n"], rows))
    if "sft" in models:
        results["sft_known_new_wordings"] = results["sft_known, new wordings"]["right"]
        kinds = measure_kinds(models["sft"], tokenizer, known, rng)
        results["kinds"] = kinds
        text.append("SFT on instruction × attribute, answered right in the very form asked for:\n")
        text.append(table(["instruction × attribute", "right", "in SFT"], [[k, percent(v), "**never**" if h else "yes"] for k, (v, h) in kinds.items()]))

    text.append("## 6. Values: a private attribute that the text leaked\n")
    rows = []
    for stage, model in models.items():
        s = measure_answers(model, tokenizer, known, rng, True, [world.PRIVATE])
        results[f"{stage}_private"] = s
        rows.append(grade_row(STAGES[stage], s))
    text.append(table(["asked for a password", "right (leaked)", "wrong", '"I do not know."', "refuses", "other", "n"], rows))

    logs = {stage: read_log(out / f"{stage}.jsonl") for stage in ("base", "sft", "reward", "ppo")}
    text.append("## The reward model and PPO\n")
    if logs["reward"] and "val_accuracy" in logs["reward"][-1]:
        results["reward_accuracy"] = logs["reward"][-1]["val_accuracy"]
        text.append(f"Held-out preference pairs ordered right: **{percent(results['reward_accuracy'])}**.\n")
    validations = [r for r in logs["ppo"] if "val_score" in r]
    if "ppo" in models and len(validations) >= 2:
        before, after = validations[0], validations[-1]
        se = (before["val_score_se"] ** 2 + after["val_score_se"] ** 2) ** 0.5
        results["ppo_score_gain_in_se"] = (after["val_score"] - before["val_score"]) / se if se else 0.0
        results["ppo_kl_below_15"] = float(after["val_kl_ref"] < 15)
        asked = [world.ask(rng, *fact) for fact in all_facts(known + unknown) * 4]
        sampled = answers(models["ppo"], tokenizer, asked, 1.0)
        results["ppo_well_formed"] = sum(text.strip() in world.FORMS for text in sampled) / len(sampled)
        text.append(f"Score of held-out prompts: {before['val_score']:.3f} ± {before['val_score_se']:.3f} before, "
                    f"**{after['val_score']:.3f} ± {after['val_score_se']:.3f}** after PPO, {results['ppo_score_gain_in_se']:.1f} standard errors up. "
                    f"KL to SFT {after['val_kl_ref']:.2f} nats a response; {percent(results['ppo_well_formed'])} of the sampled answers "
                    f"(temperature 1) are well-formed and ended.\n")
    text.append("## Curves\n\n![curves](curves.png)\n")
    draw_curves(logs, out / "curves.png")

    text.append("## The same questions to each stage\n")
    rows = []
    examples = [("known", known[0], "birthplace"), ("known, new wording", known[1], "job"), ("unknown", unknown[0], "pet"), ("private", known[2], world.PRIVATE)]
    for name, person, attribute in examples:
        question = world.say(world.questions(attribute, name.endswith("wording"))[0], person, attribute)
        said = [answers(model, tokenizer, [question])[0].replace("\n", " ⏎ ") for model in models.values()]
        truth = "(private)" if attribute == world.PRIVATE else person[attribute]
        rows.append([name, question, truth] + said)
    text.append(table(["who", "question", "truth"] + [STAGES[s] for s in models], rows))

    common.write_text(out / "report.json", json.dumps(results, indent=1))
    common.write_text(out / "report.md", "\n".join(text))
    join_report(out)
    print("\n".join(text))
    failed = [f"{key} {results.get(key, float('nan')):.3f} < {floor}" for key, floor in FLOORS.items() if not results.get(key, 0) >= floor]
    print(f"wrote {out / 'report.md'}; floors: {'all reached' if not failed else '; '.join(failed)}")
    if config.check and failed:
        common.die("below the floors: " + "; ".join(failed))


if __name__ == "__main__":
    main()
