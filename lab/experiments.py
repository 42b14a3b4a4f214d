"""Every claim with its control, on several seeds: worlds, models and measurements of their own.

    python -m lab.experiments              # all jobs, two at a time, then out/experiments.md
    python -m lab.experiments --report     # only the tables, from what is measured so far

Each seed has a folder, out/experiments/<seed>, in which the stages run. A job is done when its file
is there, so an interrupted run goes on where it was; remove a file, and its job runs again. A
<file>.resume that is damaged ends the run; remove it, and that job starts afresh.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lab import claims, controls, measure
from lab.report import join_report
from model import GPT
from reward import RewardModel
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.device import setup
from utils.cli import die, parse_config
from utils.files import read_json, read_jsonl, write_text
from world.grade import read_people

ROOT = Path(__file__).resolve().parent.parent
PEOPLE, PAIRS = "out/world/people.jsonl", "out/world/preferences.jsonl"
CONTROLS = "out/world/controls"
DOSE_STEPS = 20 * controls.N_FACTS // 32  # 20 passes: converged
DOSE_FLAGS = "--val_fraction 0 --batch_size 32 --lr 5e-4 --eval_every 75"
HABIT_BETA = 0.1
# At twice this rate PPO abstains for good from what is right in 60%, before it has found out
# which guess is.
HABIT_FLAGS = f"--steps 40 --lr 1.5e-4 --beta {HABIT_BETA} --data out/world/habit_prompts.jsonl"


@dataclass
class Config:
    out: str = "out/experiments"  # a folder for each seed goes here
    seeds: int = 3  # how many
    workers: int = 2  # jobs at a time, each on one thread
    report: bool = False  # run nothing, write the tables
    job: str = ""  # what a worker does in its seed's folder: best_of or measure
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # a worker's


# ---- the plan


class Job(NamedTuple):
    target: str  # the file that it makes
    command: str  # after `python -m`
    after: tuple = ()  # files that it waits for beside those in its command


def sft_job(name, flags="", init="base"):
    data = f"{CONTROLS}/{name.removesuffix('_early')}.jsonl"
    command = f"sft --init out/{init}.pt --data {data} --out out/{name}.pt {flags}"
    return Job(f"out/{name}.pt", command, (f"{CONTROLS}/done",))


def reward_job(name, init, data, flags=""):
    command = f"reward --init out/{init}.pt --data {data} --out out/{name}.pt {flags}"
    return Job(f"out/{name}.pt", command)


def ppo_job(name, reward, flags="", init="sft"):
    command = f"ppo --init out/{init}.pt --reward {reward} --out out/{name}.pt {flags}"
    return Job(f"out/{name}.pt", command, ("out/reward.pt",))  # controls.margin reads it


def default_run():
    """The jobs that `make` does, but for the report."""
    return [
        Job(PEOPLE, "world.generate"),
        Job("out/base.pt", "pretrain --data out/world --out out/base.pt", (PEOPLE,)),
        Job("out/sft.pt", "sft --init out/base.pt --out out/sft.pt"),
        Job(PAIRS, f"world.label --init out/sft.pt --out {PAIRS}"),
        reward_job("reward", "sft", PAIRS),
        ppo_job("ppo", "out/reward.pt"),
    ]


def jobs():
    """The plan of one seed."""
    plan = default_run()
    plan.append(Job(f"{CONTROLS}/done", "lab.controls --data out/world", (PEOPLE,)))

    # claim 3: what SFT draws out with answers of other people, and with fewer conversations
    plan += [sft_job(name) for name in ["sft_shuffled"] + [f"sft_{n}" for n in controls.SIZES]]

    # claims 4 and 5b: as many samples spent in other ways, from one SFT checkpoint
    functions = {"ppo_true": "world.grade:true_reward", "ppo_margin": "lab.controls:margin"}
    for name, function in functions.items():
        plan.append(ppo_job(name, function))
        plan.append(ppo_job(f"{name}_positive", function, "--min_score 0"))
    best_of = f"{CONTROLS}/best_of.jsonl"
    plan.append(Job(best_of, "lab.experiments --job best_of", ("out/reward.pt",)))
    plan += [sft_job(name, init="sft") for name in ("demos", "demos_idk", "best_of")]

    # claim 5a: a fraction of SFT's facts is about people in no text
    for dose in controls.DOSES:
        for control in ["", "_removed", "_idk"] if dose else [""]:
            flags = f"{DOSE_FLAGS} --steps {DOSE_STEPS}"
            plan.append(sft_job(f"dose_{dose}{control}", flags))
        plan.append(sft_job(f"dose_{dose}_early", f"{DOSE_FLAGS} --steps {DOSE_STEPS // 10}"))

    # Claim 5c: abstention against the exactly known probability of being right. The reference
    # abstains in 3 of 10 cases, at random: PPO can only weigh what gets sampled. Labels are by
    # Bradley and Terry's model with the plain utilities.
    plan.append(sft_job("habit_ref", "--val_fraction 0", init="sft"))
    for c, function in controls.PENALTIES.items():
        pairs, learned = f"out/world/habit_pairs_{c}.jsonl", f"habit_reward_{c}"
        label = f"world.label --init out/habit_ref.pt --prompts habit_prompts.jsonl --out {pairs}"
        plan += [
            Job(pairs, f"{label} --pairs 6700 --penalty {c} --sharpness 1"),
            reward_job(learned, "habit_ref", pairs),
            ppo_job(f"habit_learned_{c}", f"out/{learned}.pt", HABIT_FLAGS, "habit_ref"),
            ppo_job(f"habit_true_{c}", f"world.grade:{function}", HABIT_FLAGS, "habit_ref"),
        ]

    checkpoints = tuple(job.target for job in plan if job.target.endswith(".pt"))
    return plan + [Job("out/figures.json", "lab.experiments --job measure", checkpoints)]


def contrasts():
    """[(case, control, the one flag in which their commands differ)] of the claims."""
    pairs = [("sft", "sft_shuffled", "data")]
    pairs += [("sft", f"sft_{n}", "data") for n in controls.SIZES]
    pairs += [("demos", "demos_idk", "data"), ("demos", "best_of", "data")]
    pairs += [("ppo", "ppo_true", "reward"), ("ppo", "ppo_margin", "reward")]
    pairs += [(name, f"{name}_positive", "min_score") for name in ("ppo_true", "ppo_margin")]
    for dose in controls.DOSES:
        pairs.append((f"dose_{dose}", f"dose_{dose}_early", "steps"))
        for control in ["_removed", "_idk"] if dose else []:
            pairs.append((f"dose_{dose}", f"dose_{dose}{control}", "data"))
    pairs += [("dose_0", f"dose_{dose}", "data") for dose in controls.DOSES if dose]
    for c in controls.PENALTIES:
        pairs.append((f"habit_true_{c}", f"habit_learned_{c}", "reward"))
    first, *others = controls.PENALTIES
    for c in others:
        pairs.append((f"habit_pairs_{first}", f"habit_pairs_{c}", "penalty"))
        pairs.append((f"habit_reward_{first}", f"habit_reward_{c}", "data"))
        pairs.append((f"habit_true_{first}", f"habit_true_{c}", "reward"))
    return pairs


# ---- running it


def needs(job, plan):
    """The targets of the plan that the job waits for."""
    words = set(job.command.split()) | set(job.after)
    return [other.target for other in plan if other.target in words and other is not job]


def write_plan(path, plan, seeds):
    """The plan as a makefile; jobs.mk says how a job is run.

    What is needed stands after |: that it is there counts, not when it was made.
    """
    lines = []
    for seed in seeds:
        for job in plan:
            target = f"{seed}/{job.target}"
            prerequisites = " ".join(f"{seed}/{need}" for need in needs(job, plan))
            lines.append(f"targets += {target}")
            lines.append(f"{target}: command = {job.command}")
            lines.append(f"{target}: | {prerequisites}")
        (path.parent / str(seed) / "logs").mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def run_jobs(plan, seeds, out, workers):
    """Makes the files that are missing. After a failure nothing new begins."""
    write_plan(Path(out) / "plan.mk", plan, seeds)
    make = shutil.which("make") or die("make: no such program; install it")
    environment = os.environ | dict(PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    environment |= dict(OMP_NUM_THREADS="1", MAKEFLAGS="")  # not those of a make that called this
    command = [make, "-s", f"-j{workers}", "-f", str(ROOT / "lab" / "jobs.mk")]
    # Ctrl-C reaches make and its jobs, too: they save their states, and this waits for them
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)
    run = subprocess.run(command, cwd=out, env=environment, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    if run.returncode == -signal.SIGINT:
        die("stopped; the same command goes on from here")
    if run.returncode:
        errors = run.stderr.decode(errors="replace")
        failures = [line for line in errors.splitlines() if not line.startswith("make")]
        die("; ".join(failures) or errors)


def read_times(out):
    """What each job done so far took: [{"seed", "target", "seconds"}]"""
    path = Path(out) / "times.jsonl"
    return read_jsonl(path, check_time) if path.exists() else []


def check_time(record):
    return None if "seconds" in record else "no time of a job; remove the line"


# ---- what a worker measures


def measure_seed(config, device):
    """All checkpoints of the seed -> out/figures.json."""
    roles = measure.by_role(read_people(PEOPLE))
    known, unknown, quizzed = roles["test"], roles["unknown_test"], roles["quiz"]
    result = {}
    for name in [Path(job.target).stem for job in jobs() if job.target.endswith(".pt")]:
        if "reward" in name:
            continue
        rng = random.Random(config.seed)
        torch.manual_seed(config.seed)
        model, tokenizer = load_checkpoint(f"out/{name}.pt", LANGUAGE_MODELS, GPT, device)
        if name.startswith("habit"):
            result[name] = {"answers": measure.measure_habits(model, tokenizer, unknown, rng)}
        else:
            result[name] = measure.measure_model(model, tokenizer, roles, config.seed)
        if name == "base":
            result[name] |= measure.measure_base(model, tokenizer, known, unknown, quizzed, rng)
        if name.startswith("sft") or name == "ppo":
            result[name] |= measure.measure_forms(model, tokenizer, known, unknown, rng)
        if name == "sft":
            result[name]["wordings"] = measure.measure_wordings(model, tokenizer, known)
            auroc = measure.measure_auroc(model, tokenizer, known, unknown, rng)
            result[name]["auroc"] = auroc
        if name == "ppo":
            asked_about = measure.measure_answers(model, tokenizer, roles["rl"], rng, True)
            result[name]["asked_about"] = asked_about
        if name == "habit_ref":
            result |= predict_habits(model, tokenizer, unknown[:50], rng, device)
    write_text("out/figures.json", json.dumps(result, indent=1))


def predict_habits(ref, tokenizer, people, rng, device):
    """What PPO's optimum answers, by each penalty and by the reward model that learned it."""
    predict = partial(measure.predicted_habits, ref, tokenizer, people, rng, beta=HABIT_BETA)
    result = {}
    for c in controls.PENALTIES:
        path = f"out/habit_reward_{c}.pt"
        reward_model, _ = load_checkpoint(path, ["reward"], RewardModel, device)
        true = partial(measure.expected_utility, c)
        learned = partial(measure.learned_score, reward_model)
        result[f"habit_true_{c}_predicted"] = predict(reward=true)
        result[f"habit_learned_{c}_predicted"] = predict(reward=learned)
    return result


# ---- all of it


def report(config):
    """out/experiments.md and .png from what is measured; report.md takes them over."""
    paths = [Path(config.out) / str(seed) / "out/figures.json" for seed in range(config.seeds)]
    remedy = "remove it, and it is measured again"
    seeds = [claims.derive(read_json(path, remedy)) for path in paths if path.exists()]
    if not seeds:
        die(f"{config.out}: no seed is measured yet; run without --report")
    text = claims.experiments_text(seeds, read_times(config.out))
    out = Path(config.out).parent
    claims.draw_claims(seeds, out / "experiments.png")
    write_text(out / "experiments.md", text)
    join_report(out)
    print(text)


def main():
    config = parse_config(Config, __doc__)
    if config.job:
        if config.job not in ("best_of", "measure"):
            die(f"--job {config.job}: use best_of, measure")
        device = setup(config)
        return controls.best_of(device) if config.job == "best_of" else measure_seed(config, device)
    if not config.report:
        run_jobs(jobs(), range(config.seeds), config.out, config.workers)
    report(config)


if __name__ == "__main__":
    main()
