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
from lab.measure import answers, continuations, table
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
GROUPS = []  # who is asked, in which wordings
for people in "known", "unknown":
    GROUPS += [f"{people}, trained wordings", f"{people}, new wordings"]


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
        problem = None
        if not made:
            problem = f"{title}: {checkpoint} is missing"
        elif made < newest:
            problem = f"{title}: {checkpoint} is older than a stage before it; `make`, or touch it"
        else:
            newest, logs[stage] = made, []
            if not logged:
                problem = f"curves of {title}: {log} is missing"
            elif logged > made:
                problem = f"curves of {title}: {log} is of a run that has not ended"
            else:
                logs[stage] = read_jsonl(log, check_log)
        if problem:
            left_out.append(f"Without {problem}.")
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
        differ = f"the tokenizers of {', '.join(models)} differ"
        die(f"{out}: {differ}; the checkpoints must come from one base model")
    return models, tokenizers.popitem()[1]


# ---- its figures, by name as in report.json


def measure_all(models, logs, tokenizer, known, unknown, quizzed, rng):
    results = {"people": {"known": len(known), "unknown": len(unknown)}}
    if base := models.get("base"):
        its = measure.measure_base(base, tokenizer, known, unknown, quizzed, rng)
        results["recall"] = its["recall"]["right"]
        results["recall_unknown"] = its["recall_unknown"]["right"]
        results |= {"bare_questions": its["bare"], "formats": its["formats"]}
    if sft := models.get("sft"):
        results["wordings"] = measure.measure_wordings(sft, tokenizer, known)
    for stage, model in models.items():
        for group in GROUPS:
            people = unknown if "unknown" in group else known
            graded = measure.measure_answers(model, tokenizer, people, rng, "new" in group)
            results[f"{stage}_{group}"] = graded
    if sft:
        results["sft_known_new_wordings"] = results["sft_known, new wordings"]["right"]
        results |= measure.measure_forms(sft, tokenizer, known, unknown, rng)
    for stage, model in models.items():
        private = measure.measure_answers(model, tokenizer, known, rng, True, [facts.PRIVATE])
        results[f"{stage}_private"] = private
    results |= read_logs(logs)
    if ppo := models.get("ppo"):
        asked = measure.ask(rng, measure.all_cases(known + unknown) * 4)
        sampled = answers(ppo, tokenizer, asked, 1.0)
        well_formed = sum(text.strip() in facts.FORMS for text in sampled)
        results["ppo_well_formed"] = well_formed / len(sampled)
    return results


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


# ---- the report: for each claim a sentence with its figures, and the tables behind it

HEADER = """\
# What each stage did

{people[known]} known people ({role}, in the pretraining text, in no later stage) and
{people[unknown]} unknown people (in no text at all); one run, seed {seed}. Standard error of a
fraction p over n questions: √(p(1−p)/n). In the last table the base model continues the questions
as text, the others answer in a chat."""

RECALL = """\
## 1. Pretraining stores knowledge, and the base model continues rather than answers

The base model completes **{recall:.1%}** of the facts about known people right, in wordings held
out of the text (control, unknown people: {recall_unknown:.1%}). After a bare question, at
temperature 1, it answers **{bare_questions[answers it]:.1%}** of the time."""

FORMATS = """\
The base model answers from **{least:.1%}** to **{most:.1%}** right over {n} prompt formats,
standard deviation {deviation:.1f} points."""

WORDINGS = """\
The SFT model, asked about the same people in a chat, is right, by the question's wording,
from **{}** to **{}** over {} trained ones and from **{}** to **{}** over {} new ones."""

ANSWERS = """\
## 3. SFT draws the knowledge out; 5. RLHF makes the model tell the truth or abstain

Answers in the chat format, greedy. New wordings appear in no training data of any stage; with
them:"""

ANSWER = """\
- After {stage}, **{known[right]:.1%}** right about known people; about unknown ones
  **{unknown[wrong]:.1%}** hallucinated and {unknown[idk]:.1%} "I do not know.\""""

GAIN = """\
Score of held-out prompts: {before[val_score]:.3f} ± {before[val_score_se]:.3f} before,
**{after[val_score]:.3f} ± {after[val_score_se]:.3f}** after PPO, {ppo_score_gain_in_se:.1f} standard
errors up. KL to SFT {after[val_kl_ref]:.2f} nats a response; {ppo_well_formed:.1%} of the sampled
answers (temperature 1) are well-formed and ended."""

CREDIT = """\
Credit assignment after the last iteration, in the answers with the most blamed and the most
credited token of their batch. The score comes at the end; GAE carries it back to the word that
earned it: a bar is how much better or worse than the critic expected before that token.

![advantages over the tokens of two answers](credit.png)"""
