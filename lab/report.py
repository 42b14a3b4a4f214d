"""Measures what each stage did, on people that no stage was tuned on, and writes out/report.md.

python -m lab.report                   # the checkpoints in out/, those that are there
python -m lab.report --people dev      # on the development people: for choosing settings
python -m lab.report --check           # and exit with 1 where a figure is below its floor
"""

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from lab import measure, plots
from lab.measure import answers, continuations, percent, table
from model import GPT
from train.checkpoint import load_checkpoint, read_torch
from train.device import setup
from utils.cli import die, parse_config
from utils.files import read_jsonl, read_text, write_text
from world import facts, generate
from world.grade import read_people

# A chain: each begins with what those before it made.
STAGES = {"base": "pretraining", "sft": "SFT", "reward": "reward model", "ppo": "PPO"}
FLOORS = {  # what the default run must reach
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
    data: str = "out/world/people.jsonl"  # the world's people, and every fact about them
    people: str = "test"  # test, or dev while choosing settings
    check: bool = False  # exit with 1 below the floors of the default run
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # wordings and samples


# ---- what there is to report


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def check_log(record):
    if not isinstance(record.get("step"), int):
        return "not a line of a run's log; remove it"


def find_stages(out):
    """({stage: its log's records} of those that follow from each other, a line on each left out).

    Times tell, as they do for make: a checkpoint older than one before it in the chain is of an
    earlier run, and so is a log without its checkpoint; a log newer than its checkpoint is of a
    run that has not ended.
    """
    logs, left_out, newest = {}, [], 0
    for stage, title in STAGES.items():
        checkpoint, log = out / f"{stage}.pt", out / f"{stage}.jsonl"
        made, logged = modified(checkpoint), modified(log)
        if not made:
            left_out.append(f"Without {title}: {checkpoint} is missing.")
            continue
        if made < newest:
            left_out.append(
                f"Without {title}: {checkpoint} is older than a stage before it: of an earlier "
                "run, which `make` would repeat (after a mere copy, touch it)."
            )
            continue
        newest, logs[stage] = made, []
        if not logged:
            left_out.append(f"Without curves of {title}: {log} is missing.")
        elif logged > made:
            left_out.append(f"Without curves of {title}: {log} is of a run that has not ended.")
        else:
            logs[stage] = read_jsonl(log, check_log)
    return logs, left_out


def load_models(out, stages, device):
    """{stage: model} of the stages that answer questions, and their tokenizer."""
    models, tokenizers = {}, {}
    for stage in stages:
        if stage != "reward":
            path = out / f"{stage}.pt"
            models[stage], tokenizers[stage] = load_checkpoint(path, [stage], GPT, device)
    if not models:
        die(f"{out}: no base.pt, sft.pt or ppo.pt; `make` trains them")
    if len({tokenizer.dumps() for tokenizer in tokenizers.values()}) > 1:
        names = ", ".join(models)
        die(
            f"{out}: the tokenizers of {names} differ; "
            "the checkpoints must come from one base model"
        )
    return models, tokenizers.popitem()[1]


# ---- its figures, by name as in report.json


def measure_all(models, logs, tokenizer, known, unknown, quizzed, rng):
    results = {"people": {"known": len(known), "unknown": len(unknown)}}
    if "base" in models:
        results |= measure_base(models["base"], tokenizer, known, unknown, quizzed, rng)
    if "sft" in models:
        results["wordings"] = measure.measure_wordings(models["sft"], tokenizer, known)
    for stage, model in models.items():
        for name, people in ("known", known), ("unknown", unknown):
            for wordings in "trained wordings", "new wordings":
                new = wordings == "new wordings"
                graded = measure.measure_answers(model, tokenizer, people, rng, new)
                results[f"{stage}_{name}, {wordings}"] = graded
    if "sft" in models:
        sft = models["sft"]
        results["sft_known_new_wordings"] = results["sft_known, new wordings"]["right"]
        results["kinds"] = measure.measure_kinds(sft, tokenizer, known, rng)
        # of people in no other text, only the given one can tell
        results["reading"] = measure.measure_kinds(sft, tokenizer, unknown, rng, ["text"])
    for stage, model in models.items():
        private = measure.measure_answers(model, tokenizer, known, rng, True, [facts.PRIVATE])
        results[f"{stage}_private"] = private
    results |= read_logs(logs)
    if "ppo" in models:
        cases = measure.all_cases(known + unknown) * 4
        asked = [facts.ask(rng, *case) for case in cases]
        sampled = answers(models["ppo"], tokenizer, asked, 1.0)
        well_formed = sum(text.strip() in facts.FORMS for text in sampled)
        results["ppo_well_formed"] = well_formed / len(sampled)
    return results


def measure_base(model, tokenizer, known, unknown, quizzed, rng):
    return {
        "recall": measure.measure_recall(model, tokenizer, known, rng)["right"],
        "recall_unknown": measure.measure_recall(model, tokenizer, unknown, rng)["right"],
        "bare_questions": measure.measure_bare_questions(model, tokenizer, known, rng),
        "formats": measure.measure_formats(model, tokenizer, known, quizzed, rng),
    }


def read_logs(logs):
    """The reward model's accuracy, and what PPO gained."""
    results = {}
    accuracies = [r["val_accuracy"] for r in logs.get("reward", []) if "val_accuracy" in r]
    if accuracies:
        results["reward_accuracy"] = accuracies[-1]
    validations = [record for record in logs.get("ppo", []) if "val_score" in record]
    if len(validations) >= 2:
        before, after = validations[0], validations[-1]
        gain = after["val_score"] - before["val_score"]
        se = (before["val_score_se"] ** 2 + after["val_score_se"] ** 2) ** 0.5
        results["ppo_validations"] = before, after
        results["ppo_score_gain_in_se"] = gain / se if se else 0.0
        results["ppo_kl_below_15"] = float(after["val_kl_ref"] < 15)
    return results


# ---- the report's sections: for each claim a sentence with its figures, and the tables behind it


def header(results, left_out, config):
    people = results["people"]
    return [
        "# What each stage did\n",
        f"{people['known']} known people ({config.people}, in the pretraining text, in no later "
        f"stage) and {people['unknown']} unknown people (in no text at all); one run, seed "
        f"{config.seed}. Standard error of a fraction p over n questions: √(p(1−p)/n). In the last "
        "table the base model continues the questions as text, the others answer in a chat.\n",
        *[line + "\n" for line in left_out],
    ]


def recall_section(results):
    bare = results["bare_questions"]
    rows = [[kind, percent(bare[kind])] for kind in measure.BARE_KINDS]
    return [
        "## 1. Pretraining stores knowledge, and the base model continues rather than answers\n",
        f"The base model completes **{percent(results['recall'])}** of the facts about known "
        "people right, in wordings held out of the text (control, unknown people: "
        f"{percent(results['recall_unknown'])}). After a bare question, at temperature 1, it "
        f"answers **{percent(bare['answers it'])}** of the time.\n",
        table(["after a bare question it …", "fraction"], rows),
    ]


def formats_section(results):
    formats = results["formats"]
    least, most = min(formats.values()), max(formats.values())
    deviation = 100 * statistics.stdev(formats.values())
    rows = []
    for template, right in formats.items():
        rows.append([repr(template)[1:-1].replace("|", "\\|"), percent(right)])
    return [
        f"The base model answers from **{percent(least)}** to **{percent(most)}** right over "
        f"{len(formats)} prompt formats, standard deviation {deviation:.1f} points.\n",
        table(["format", "right"], rows),
    ]


def wordings_section(results):
    ranges = []
    for name, right in results["wordings"].items():
        least, most = percent(min(right)), percent(max(right))
        ranges.append(f"from **{least}** to **{most}** over {len(right)} {name} ones")
    return [
        "The SFT model, asked about the same people in a chat, is right, by the question's "
        f"wording, {' and '.join(ranges)}.\n"
    ]


def grades_table(title, right, wrong, rows):
    """rows: {name: {grade: fraction} and n}"""
    head = [title, right, wrong, '"I do not know."', "refuses", "other", "n"]
    cells = []
    for name, graded in rows.items():
        percentages = [percent(graded[grade]) for grade in measure.GRADES]
        cells.append([name, *percentages, graded["n"]])
    return table(head, cells)


def answers_section(results, stages):
    text = [
        "## 3. SFT draws the knowledge out; 5. RLHF makes the model tell the truth or abstain\n",
        "Answers in the chat format, greedy. New wordings appear in no training data of any stage; "
        "with them:\n",
    ]
    rows = {}
    for stage in stages:
        known = results[f"{stage}_known, new wordings"]
        unknown = results[f"{stage}_unknown, new wordings"]
        text.append(
            f"- After {STAGES[stage]}, **{percent(known['right'])}** right about known people; "
            f"about unknown ones **{percent(unknown['wrong'])}** hallucinated and "
            f'{percent(unknown["idk"])} "I do not know."'
        )
        for people in "known", "unknown":
            for wordings in "trained wordings", "new wordings":
                name = f"{people}, {wordings}"
                rows[f"{STAGES[stage]}: {name}"] = results[f"{stage}_{name}"]
    return text + ["\n" + grades_table("", "right", "wrong (hallucinated)", rows)]


def kinds_section(results):
    rows = []
    for key, note in ("kinds", ""), ("reading", ", about people in no other text"):
        for kind, (right, held_out) in results[key].items():
            rows.append([kind + note, percent(right), "**never**" if held_out else "yes"])
    return [
        "SFT on instruction × attribute, answered right in the very form asked for:\n",
        table(["instruction × attribute", "right", "in SFT"], rows),
    ]


def values_section(results, stages):
    told, refused, rows = [], [], {}
    for stage in stages:
        private = results[f"{stage}_private"]
        told.append(f"**{percent(private['right'])}** after {STAGES[stage]}")
        refused.append(percent(results[f"{stage}_known, new wordings"]["refusal"]))
        rows[STAGES[stage]] = private
    return [
        "## 6. Values: a private attribute that the text leaked\n",
        f"Passwords told: {', '.join(told)}; harmless questions refused: {', '.join(refused)}.\n",
        grades_table("asked for a password", "right (leaked)", "wrong", rows),
    ]


def training_section(results, with_credit):
    text = ["## The reward model and PPO\n"]
    if "reward_accuracy" in results:
        accuracy = percent(results["reward_accuracy"])
        text.append(f"Held-out preference pairs ordered right: **{accuracy}**.\n")
    if "ppo_score_gain_in_se" in results:
        before, after = results["ppo_validations"]
        text.append(
            f"Score of held-out prompts: {before['val_score']:.3f} ± {before['val_score_se']:.3f} "
            f"before, **{after['val_score']:.3f} ± {after['val_score_se']:.3f}** after PPO, "
            f"{results['ppo_score_gain_in_se']:.1f} standard errors up. KL to SFT "
            f"{after['val_kl_ref']:.2f} nats a response; {percent(results['ppo_well_formed'])} of "
            "the sampled answers (temperature 1) are well-formed and ended.\n"
        )
    text.append("![loss of the four stages; PPO's score, KL and entropy](curves.png)\n")
    if with_credit:
        text.append(
            "Credit assignment after the last iteration, in the answers with the most blamed and "
            "the most credited token of their batch. The score comes at the end; GAE carries it "
            "back to the word that earned it: a bar is how much better or worse than the critic "
            "expected before that token.\n"
        )
        text.append("![advantages over the tokens of two answers](credit.png)\n")
    return text


def samples_section(models, tokenizer, known, unknown, rng):
    """Answers of all stages side by side."""
    examples = [  # who, person, attribute, instruction
        ("known", known[0], "birthplace", "ask"),
        ("known, new wording", known[1], "job", "ask"),
        ("unknown", unknown[0], "pet", "ask"),
        ("private", known[2], facts.PRIVATE, "ask"),
        ("unknown, with a text that tells", unknown[1], "job", "text"),
    ]
    rows = []
    for who, person, attribute, kind in examples:
        question = facts.say(facts.questions(attribute, "new" in who)[0], person, attribute)
        if kind != "ask":
            question = generate.conversation(rng, kind, person, attribute)[0]["content"]
        row = [who, question, "(private)" if attribute == facts.PRIVATE else person[attribute]]
        for stage, model in models.items():
            if stage == "base":  # it continues the question as text
                row += continuations(model, tokenizer, [question + "\n"], 24)
            else:
                row += answers(model, tokenizer, [question])
        rows.append([cell.strip().replace("\n", " ⏎ ").replace("|", "\\|") for cell in row])
    titles = [STAGES[stage] for stage in models]
    return [
        "## The same questions to each stage\n",
        table(["who", "question", "truth", *titles], rows),
    ]


def report_text(results, left_out, samples, with_credit, config):
    stages = [stage for stage in STAGES if f"{stage}_private" in results]
    text = header(results, left_out, config)
    if "base" in stages:
        text += recall_section(results)
    text.append("## 2. The base model is sensitive to the prompt, SFT is not\n")
    if "base" in stages:
        text += formats_section(results)
    if "sft" in stages:
        text += wordings_section(results)
    text += answers_section(results, stages)
    if "sft" in stages:
        text += kinds_section(results)
    text.append(
        "Claim 4, that negative feedback is the stronger one, needs controls: `make experiments`.\n"
    )
    text += values_section(results, stages)
    text += training_section(results, with_credit)
    return "\n".join(text + samples)


def join_report(out):
    """Puts what the experiments found, where they ran, at the end of report.md."""
    report, experiments = out / "report.md", out / "experiments.md"
    if experiments.exists():
        own = read_text(report).partition("# The experiments")[0] if report.exists() else ""
        write_text(report, own + read_text(experiments))


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)
    out, rng = Path(config.out), random.Random(config.seed)

    # people
    if config.people not in ("test", "dev"):
        die(f"--people {config.people}: use test or dev")
    roles = measure.by_role(read_people(config.data))
    names = (config.people, f"unknown_{config.people}", "quiz")
    known, unknown, quizzed = (roles.get(name, []) for name in names)
    if min(map(len, (known, unknown, quizzed))) < 3:
        die(
            f"{config.data}: too few people of the roles {names[0]}, {names[1]} and quiz; "
            "`python -m world.generate` writes it"
        )

    # measure
    logs, left_out = find_stages(out)
    models, tokenizer = load_models(out, logs, device)
    results = measure_all(models, logs, tokenizer, known, unknown, quizzed, rng)
    samples = samples_section(models, tokenizer, known, unknown, rng)

    # pictures
    plots.draw_curves(logs, out / "curves.png")
    made_by = read_torch(out / "ppo.pt")["made_by"] if "ppo" in models else {}
    episodes = made_by.get("episodes")
    (out / "credit.png").unlink(missing_ok=True)  # one of an older run
    if episodes:
        plots.draw_credit(episodes, out / "credit.png")

    # text
    report = report_text(results, left_out, samples, bool(episodes), config)
    write_text(out / "report.json", json.dumps(results, indent=1))
    write_text(out / "report.md", report)
    join_report(out)
    print(report)

    # floors
    failed = []
    for key, floor in FLOORS.items():
        if not results.get(key, 0) >= floor:
            failed.append(f"{key} {results.get(key, float('nan')):.3f} < {floor}")
    print(f"wrote {out / 'report.md'}; floors: {'; '.join(failed) or 'all reached'}")
    if config.check and failed:
        die("below the floors: " + "; ".join(failed))


if __name__ == "__main__":
    main()
