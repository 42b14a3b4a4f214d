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

STAGES = {"base": "pretraining", "sft": "SFT", "reward": "reward model", "ppo": "PPO"}  # a chain: each begins with what those before it made
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
    """Token lists -> texts, in batches of like length; a text that ran into max_new_tokens ends in …"""
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
    openings = {frame.split("{np}")[0] for frame in world.FRAMES} | {plain.split("{x}")[0] for _, _, plain, _ in world.ATTRIBUTES.values()}
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
            alone, shots = template.replace("{shots}", ""), ""
            for solved in rng.sample(quizzed, 3) if "{shots}" in template else []:
                its = rng.choice(world.PUBLIC)
                shots += alone.replace("{q}", world.ask(rng, solved, its)) + " " * alone.endswith(":") + solved[its] + ".\n"
            texts.append(shots + alone.replace("{q}", world.ask(rng, person, attribute)))
        result[template] = shares(facts, continuations(model, tokenizer, texts, 8))["right"]
    return result


def measure_wordings(model, tokenizer, people):
    """Accuracy in the chat format for each wording of the questions, trained ones and held-out ones."""
    result = {}
    for held_out in (False, True):
        facts, per_wording = all_facts(people), []
        for k in range(len(world.questions(world.PUBLIC[0], held_out))):
            asked = [world.say(world.questions(a, held_out)[k], p, a) for p, a in facts]
            per_wording.append(shares(facts, answers(model, tokenizer, asked))["right"])
        result["new" if held_out else "trained"] = per_wording
    return result


def measure_answers(model, tokenizer, people, rng, held_out, attributes=world.PUBLIC):
    """Grades of the answers to questions in the chat format."""
    facts = all_facts(people, attributes)
    asked = [world.say(rng.choice(world.questions(a, held_out)), p, a) for p, a in facts]
    return shares(facts, answers(model, tokenizer, asked))


def measure_kinds(model, tokenizer, people, rng, kinds=("one word", "sentence", "text")):
    """{instruction × attribute: (share answered right and in the asked form, was it held out of SFT)}."""
    result = {}
    for kind in kinds:
        for attribute in world.PUBLIC:
            asked = [world.conversation(rng, kind, person, attribute)[0]["content"] for person in people]
            got = answers(model, tokenizer, asked)
            exact = sum(world.in_form(kind, person, attribute, text) for person, text in zip(people, got)) / len(people)
            result[f"{kind} × {attribute}"] = (exact, (kind, attribute) in world.HELD_OUT_KINDS)
    return result


# ---- all of it


def find_stages(out):
    """{stage: its log's records} of the stages in out/ that follow from each other, and a line about each of the others.

    Times tell, as they do for make: a checkpoint older than one before it in the chain is of an earlier run, and so is a
    log without its checkpoint; a log newer than its checkpoint is of a run that has not ended.
    """
    logs, left_out, newest = {}, [], 0
    for stage, title in STAGES.items():
        checkpoint, log = out / f"{stage}.pt", out / f"{stage}.jsonl"
        made, logged = (path.stat().st_mtime_ns if path.exists() else 0 for path in (checkpoint, log))
        if made < newest or not made:
            why = "older than a stage before it: of an earlier run, which `make` would repeat (after a mere copy, touch it)" if made else "missing"
            left_out.append(f"Without {title}: {checkpoint} is {why}.")
            continue
        newest, logs[stage] = made, []
        if 0 < logged <= made:
            wrong = "not a line of a run's log; remove it"
            logs[stage] = common.read_jsonl(log, lambda r: None if isinstance(r.get("step"), int) else wrong)
        else:
            left_out.append(f"Without curves of {title}: {log} is {'of a run that has not ended' if logged else 'missing'}.")
    return logs, left_out


def load_models(out, stages, device):
    """{stage: model} of the stages that answer questions, and their tokenizer."""
    models, tokenizers = {}, {}
    for stage in stages:
        if stage != "reward":
            models[stage], tokenizers[stage] = common.load_checkpoint(out / f"{stage}.pt", [stage], GPT, device)
    if not models:
        common.die(f"{out}: no base.pt, sft.pt or ppo.pt; `make` trains them")
    if len({t.dumps() for t in tokenizers.values()}) > 1:
        common.die(f"{out}: the tokenizers of {', '.join(models)} differ; the checkpoints must come from one base model")
    return models, tokenizers.popitem()[1]


def measure(models, logs, tokenizer, known, unknown, quizzed, rng):
    """Every figure of the report, as report.json holds them."""
    results = {"people": {"known": len(known), "unknown": len(unknown)}}
    if "base" in models:
        results["recall"] = measure_recall(models["base"], tokenizer, known, rng)["right"]
        results["recall_unknown"] = measure_recall(models["base"], tokenizer, unknown, rng)["right"]
        results["bare_questions"] = measure_bare_questions(models["base"], tokenizer, known, rng)
        results["formats"] = measure_formats(models["base"], tokenizer, known, quizzed, rng)
    if "sft" in models:
        results["wordings"] = measure_wordings(models["sft"], tokenizer, known)
    for stage, model in models.items():
        for name, people in ("known", known), ("unknown", unknown):
            for held_out in (False, True):
                wordings = "new wordings" if held_out else "trained wordings"
                results[f"{stage}_{name}, {wordings}"] = measure_answers(model, tokenizer, people, rng, held_out)
    if "sft" in models:
        results["sft_known_new_wordings"] = results["sft_known, new wordings"]["right"]
        results["kinds"] = measure_kinds(models["sft"], tokenizer, known, rng)
        results["reading"] = measure_kinds(models["sft"], tokenizer, unknown, rng, ["text"])  # only the text can tell
    for stage, model in models.items():
        results[f"{stage}_private"] = measure_answers(model, tokenizer, known, rng, True, [world.PRIVATE])
    accuracies = [r["val_accuracy"] for r in logs.get("reward", []) if "val_accuracy" in r]
    if accuracies:
        results["reward_accuracy"] = accuracies[-1]
    validations = [r for r in logs.get("ppo", []) if "val_score" in r]
    if len(validations) >= 2:
        results["ppo_validations"] = before, after = validations[0], validations[-1]
        se = (before["val_score_se"] ** 2 + after["val_score_se"] ** 2) ** 0.5
        results["ppo_score_gain_in_se"] = (after["val_score"] - before["val_score"]) / se if se else 0.0
        results["ppo_kl_below_15"] = float(after["val_kl_ref"] < 15)
    if "ppo" in models:
        asked = [world.ask(rng, *fact) for fact in all_facts(known + unknown) * 4]
        sampled = answers(models["ppo"], tokenizer, asked, 1.0)
        results["ppo_well_formed"] = sum(text.strip() in world.FORMS for text in sampled) / len(sampled)
    return results


# ---- the pictures; colours are Okabe's and Ito's, which the colour-blind can tell apart

BLUE, VERMILION = "#0072b2", "#d55e00"
PANELS = [  # stage, title, [(key in the log, name)], unit
    ("base", "pretraining: loss", [("train_loss", "training"), ("val_loss", "validation")], "nats a token"),
    ("sft", "SFT: loss", [("train_loss", "training"), ("val_loss", "validation")], "nats a token"),
    ("reward", "reward model: loss", [("train_loss", "training")], "nats a pair"),
    ("reward", "reward model: accuracy", [("val_accuracy", "held-out pairs")], "share ordered right"),
    ("ppo", "PPO: score", [("score", "rollouts"), ("val_score", "held-out prompts")], "SFT's standard deviations"),
    ("ppo", "PPO: KL to SFT", [("kl_ref", "rollouts"), ("val_kl_ref", "held-out prompts")], "nats a response"),
    ("ppo", "PPO: entropy", [("entropy", "rollouts"), ("val_entropy", "held-out prompts")], "nats a token"),
    ("ppo", "PPO: critic's loss", [("value_loss", "update")], "half squared score"),
    ("ppo", "PPO: clip fraction", [("clip_fraction", "update")], "share of tokens"),
]


def new_figure(rows, columns, height):
    """(figure, axes) 900 pixels wide, as wide as a README is shown."""
    import matplotlib.figure

    matplotlib.rcParams.update({"font.size": 8.5, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    figure = matplotlib.figure.Figure(figsize=(9, height), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure, path):
    with common.atomic(path) as f:
        figure.savefig(f, format="png")


def draw_curves(logs, path):
    """The stages' logs over their steps; bars are standard errors."""
    figure, axes = new_figure(3, 3, 7.5)
    for ax, (stage, title, lines, unit) in zip(axes.flat, PANELS):
        for (key, name), color, style in zip(lines, (BLUE, VERMILION), ("o-", "s--")):
            records = [r for r in logs.get(stage, []) if key in r]
            if records:
                steps, values = [r["step"] for r in records], [r[key] for r in records]
                errors = [r.get(f"{key}_se", 0) for r in records]
                ax.errorbar(steps, values, errors, fmt=style if len(steps) > 2 else "s", color=color, markersize=3, label=name)
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "optimizer step", ylabel=unit)
        if ax.has_data():
            ax.legend()
        else:
            ax.text(0.5, 0.5, "no finished run", ha="center", transform=ax.transAxes)
    save_figure(figure, path)


def draw_credit(episodes, path):
    """PPO's credit over the tokens of two answers, as ppo.py wrote them into its checkpoint."""
    figure, axes = new_figure(1, 2, 3.4)
    for ax, color, e in zip(axes, (VERMILION, BLUE), episodes):
        x = range(len(e["tokens"]))
        ax.bar(x, e["columns"]["advantage"], width=0.6, color=color, label="advantage of the token")
        ax.plot(x, e["columns"]["value"], "k.--", label="critic's value before it")
        ax.set_xticks(x, e["tokens"], rotation=30, parse_math=False)
        question = e["prompt"].split("<|user|>")[-1].split("<|end|>")[0]
        ax.set_title(f"{question}\nscore of the answer: {e['score']:.2f}", parse_math=False)
        ax.set(xlabel="token of the answer", ylabel="SFT's standard deviations")
        ax.legend()
    save_figure(figure, path)


# ---- the report


def percent(share):
    return f"{100 * share:.1f}%"


def table(header, rows):
    lines = [header, ["---"] * len(header)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def grade_row(name, s):
    return [name] + [percent(s[g]) for g in GRADES] + [s["n"]]


def same_questions(models, tokenizer, known, unknown, rng):
    """Answers of all stages side by side. The base model continues the question as text, the others answer it in a chat."""
    examples = [("known", known[0], "birthplace", "ask"), ("known, new wording", known[1], "job", "ask"), ("unknown", unknown[0], "pet", "ask"),
                ("private", known[2], world.PRIVATE, "ask"), ("unknown, with a text that tells", unknown[1], "job", "text")]  # fmt: skip
    rows = []
    for who, person, attribute, kind in examples:
        question = world.say(world.questions(attribute, "new" in who)[0], person, attribute)
        if kind != "ask":
            question = world.conversation(rng, kind, person, attribute)[0]["content"]
        said = [(continuations(m, tokenizer, [question + "\n"], 24) if stage == "base" else answers(m, tokenizer, [question]))[0]
                for stage, m in models.items()]  # fmt: skip
        truth = "(private)" if attribute == world.PRIVATE else person[attribute]
        rows.append([cell.strip().replace("\n", " ⏎ ").replace("|", "\\|") for cell in (who, question, truth, *said)])
    return table(["who", "question", "truth"] + [STAGES[s] for s in models], rows)


def write_report(results, left_out, samples, with_credit, config):
    """report.md's text: for each claim a sentence with its figures, and the tables behind it."""
    people = results["people"]
    asked = [stage for stage in STAGES if f"{stage}_private" in results]
    text = ["# What each stage did\n"]
    text.append(f"{people['known']} known people ({config.people}, in the pretraining text, in no later stage) and {people['unknown']} unknown "
                f"people (in no text at all); one run, seed {config.seed}. Standard error of a share p over n questions: √(p(1−p)/n). "
                "In the last table the base model continues the questions as text, the others answer in a chat.\n")
    text += [line + "\n" for line in left_out]
    if "base" in asked:
        bare, formats = results["bare_questions"], results["formats"]
        text.append("## 1. Pretraining stores knowledge, and the base model continues rather than answers\n")
        text.append(f"The base model completes **{percent(results['recall'])}** of the facts about known people right, in wordings held out of "
                    f"the text (control, unknown people: {percent(results['recall_unknown'])}). After a bare question, at temperature 1, "
                    f"it answers **{percent(bare['answers it'])}** of the time.\n")
        text.append(table(["after a bare question it …", "share"], [[kind, percent(v)] for kind, v in bare.items() if kind != "n"]))
    text.append("## 2. The base model is sensitive to the prompt, SFT is not\n")
    if "base" in asked:
        deviation = 100 * torch.tensor(list(formats.values())).std()
        text.append(f"The base model answers from **{percent(min(formats.values()))}** to **{percent(max(formats.values()))}** right over "
                    f"{len(formats)} prompt formats, standard deviation {deviation:.1f} points.\n")
        text.append(table(["format", "right"], [[repr(f)[1:-1].replace("|", "\\|"), percent(v)] for f, v in formats.items()]))
    if "sft" in asked:
        ranges = [f"from **{percent(min(v))}** to **{percent(max(v))}** over {len(v)} {name} ones" for name, v in results["wordings"].items()]
        text.append(f"The SFT model, asked about the same people in a chat, is right, by the question's wording, {' and '.join(ranges)}.\n")

    text.append("## 3. SFT draws the knowledge out; 5. RLHF makes the model tell the truth or abstain\n")
    text.append("Answers in the chat format, greedy. New wordings appear in no training data of any stage; with them:\n")
    for stage in asked:
        known, unknown = results[f"{stage}_known, new wordings"], results[f"{stage}_unknown, new wordings"]
        text.append(f"- After {STAGES[stage]}, **{percent(known['right'])}** right about known people; about unknown ones "
                    f"**{percent(unknown['wrong'])}** made up and {percent(unknown['idk'])} \"I do not know.\"")
    rows = [grade_row(f"{STAGES[s]}: {key.partition('_')[2]}", v) for s in asked for key, v in results.items() if key.startswith((f"{s}_known, ", f"{s}_unknown, "))]
    text.append("\n" + table(["", "right", "wrong (made up)", '"I do not know."', "refuses", "other", "n"], rows))
    if "sft" in asked:
        text.append("SFT on instruction × attribute, answered right in the very form asked for:\n")
        rows = [[k, percent(v), "**never**" if h else "yes"] for k, (v, h) in results["kinds"].items()]
        rows += [[f"{k}, about people in no other text", percent(v), "**never**" if h else "yes"] for k, (v, h) in results["reading"].items()]
        text.append(table(["instruction × attribute", "right", "in SFT"], rows))
    text.append("Claim 4, that negative feedback is the stronger one, needs controls: `make experiments`.\n")

    text.append("## 6. Values: a private attribute that the text leaked\n")
    told = [f"**{percent(results[f'{s}_private']['right'])}** after {STAGES[s]}" for s in asked]
    refused = [f"{percent(results[f'{s}_known, new wordings']['refusal'])}" for s in asked]
    text.append(f"Passwords told: {', '.join(told)}; harmless questions refused: {', '.join(refused)}.\n")
    rows = [grade_row(STAGES[s], results[f"{s}_private"]) for s in asked]
    text.append(table(["asked for a password", "right (leaked)", "wrong", '"I do not know."', "refuses", "other", "n"], rows))

    text.append("## The reward model and PPO\n")
    if "reward_accuracy" in results:
        text.append(f"Held-out preference pairs ordered right: **{percent(results['reward_accuracy'])}**.\n")
    if "ppo_score_gain_in_se" in results:
        before, after = results["ppo_validations"]
        text.append(f"Score of held-out prompts: {before['val_score']:.3f} ± {before['val_score_se']:.3f} before, "
                    f"**{after['val_score']:.3f} ± {after['val_score_se']:.3f}** after PPO, {results['ppo_score_gain_in_se']:.1f} standard errors up. "
                    f"KL to SFT {after['val_kl_ref']:.2f} nats a response; {percent(results['ppo_well_formed'])} of the sampled answers "
                    f"(temperature 1) are well-formed and ended.\n")
    text.append("![loss of the four stages; PPO's score, KL and entropy](curves.png)\n")
    if with_credit:
        text.append("Credit assignment after the last iteration, in the answers with the most blamed and the most credited token of their batch. "
                    "The score comes at the end; GAE carries it back to the word that earned it: a bar is how much better or worse than "
                    "the critic expected before that token.\n")
        text.append("![advantages over the tokens of two answers](credit.png)\n")
    text += ["## The same questions to each stage\n", samples]
    return "\n".join(text)


def join_report(out):
    """Puts what experiments.py found, where it ran, at the end of report.md."""
    own = (out / "report.md").read_text(encoding="utf-8").partition("# The experiments")[0] if (out / "report.md").exists() else ""
    if (out / "experiments.md").exists():
        common.write_text(out / "report.md", own + (out / "experiments.md").read_text(encoding="utf-8"))


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    out, rng = Path(config.out), random.Random(config.seed)
    people = world.read_people(config.data)
    role = {r: [p for p in people if p["role"] == r] for r in {p["role"] for p in people}}
    if config.people not in ("test", "dev"):
        common.die(f"--people {config.people}: use test or dev")
    known, unknown, quizzed = (role.get(r, []) for r in (config.people, f"unknown_{config.people}", "quiz"))
    if min(map(len, (known, unknown, quizzed))) < 3:
        common.die(f"{config.data}: too few people of the roles {config.people}, unknown_{config.people} and quiz; `python -m data.world` writes it")
    logs, left_out = find_stages(out)
    models, tokenizer = load_models(out, logs, device)
    results = measure(models, logs, tokenizer, known, unknown, quizzed, rng)
    samples = same_questions(models, tokenizer, known, unknown, rng)
    episodes = common.read_torch(out / "ppo.pt")["made_by"].get("episodes") if "ppo" in models else None

    draw_curves(logs, out / "curves.png")
    (out / "credit.png").unlink(missing_ok=True)  # else an older run's would stay where this one has none
    if episodes:
        draw_credit(episodes, out / "credit.png")
    report = write_report(results, left_out, samples, bool(episodes), config)
    common.write_text(out / "report.json", json.dumps(results, indent=1))
    common.write_text(out / "report.md", report)
    join_report(out)
    print(report)
    failed = [f"{key} {results.get(key, float('nan')):.3f} < {floor}" for key, floor in FLOORS.items() if not results.get(key, 0) >= floor]
    print(f"wrote {out / 'report.md'}; floors: {'all reached' if not failed else '; '.join(failed)}")
    if config.check and failed:
        common.die("below the floors: " + "; ".join(failed))


if __name__ == "__main__":
    main()
