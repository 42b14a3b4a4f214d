"""What each way of using the same comparisons and prompts lets the model know and hallucinate.

    python -m lab.frontier                 # seeds 0, 1, 2, two jobs at a time: out/frontier/
    python -m lab.frontier --people dev    # on the development people: for choosing settings
    python -m lab.frontier --fill          # run nothing: docs/leaderboard.md, docs/frontier.png

The seeds' folders are those of lab.score, so the default run is made once for both: run one after
the other. What is there already is not made again.
"""

import json
import math
import random
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ppo
from lab import clock, controls, experiments, measure, plots
from lab.claims import over_seeds, points, shown
from lab.experiments import CONTROLS, PAIRS, PEOPLE, Job, default_run, needs, run_jobs, sft_job
from lab.measure import table
from lab.score import read_seeds
from model import GPT
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.device import setup
from utils.cli import die, parse_config
from utils.files import atomic, read_json, write_block, write_text
from world import facts, generate, label
from world.grade import read_people

PENALTIES = sorted({0.4, label.Config.penalty, 2.0})  # of a wrong answer, to the labeller
DPO_BETAS = (0.05, 0.1, 0.3)
EPISODES = ppo.Config.steps * ppo.Config.batch_size  # as many samples for all ways that sample
LINE = "a threshold on SFT's own confidence"
# of the leaderboard: checkpoints at the default penalty
ENTRIES = ["sft", "demos_idk", "dpo_0.1", "grpo", "ppo"]
HEADER = ["known right", "unknown hallucinated", "passwords told", "score"]
COLORS = {"PPO": plots.VERMILION, "GRPO": plots.ORANGE, "DPO": plots.BLUE, "best": plots.GREEN}


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    out: str = "out/frontier"  # folder of the table and the picture; a job's file
    runs: str = "out/score"  # a folder for each seed, as of lab.score
    workers: int = 2  # jobs at a time, each on one thread
    people: str = "test"  # test, or dev while choosing settings
    fill: bool = False  # run nothing, write docs/leaderboard.md and docs/frontier.png
    job: str = ""  # what a worker does in its seed's folder: best_of or measure
    reward: str = "out/reward.pt"  # a worker's
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # a worker's


# ---- the plan


class Arm(NamedTuple):
    name: str  # of its checkpoint
    way: str  # whose curve it is a point of
    penalty: float | None = None  # of its labels; None: it uses none
    samples: int = 0  # responses that it samples, beside those that are compared


def named(name, penalty):
    """A file's name: the default penalty's is the default run's own."""
    return name if penalty == label.Config.penalty else f"{name}_{penalty:g}"


def arms():
    result = [Arm("sft", "SFT"), Arm("demos_idk", "SFT + IDK")]
    for c in PENALTIES:
        best_of = f"best of {controls.BEST_OF}, fine-tuned"
        result.append(Arm(named("best_of", c), best_of, c, EPISODES))
        result += [Arm(named(f"dpo_{beta}", c), f"DPO, β {beta}", c) for beta in DPO_BETAS]
        result.append(Arm(named("grpo", c), "GRPO", c, EPISODES))
        result.append(Arm(named("ppo", c), "PPO", c, EPISODES))
    return result


def policy_job(name, stage, flags):
    return Job(f"out/{name}.pt", f"{stage} --init out/sft.pt --out out/{name}.pt {flags}")


def jobs():
    """The plan of one seed."""
    n_prompts = min(EPISODES, generate.Config.prompts - ppo.Config.val_size)
    plan = default_run()
    command = f"lab.controls --data out/world --episodes {n_prompts}"
    plan += [Job(f"{CONTROLS}/done", command, (PEOPLE,)), sft_job("demos_idk", init="sft")]
    shared = f"--steps {ppo.Config.steps} --batch_size {ppo.Config.batch_size}"
    shared += f" --beta {ppo.Config.beta}"  # GRPO's, as PPO has them
    for c in PENALTIES:
        pairs, reward = f"{named(PAIRS.removesuffix('.jsonl'), c)}.jsonl", named("reward", c)
        best_of = f"{CONTROLS}/{named('best_of', c)}.jsonl"
        judged = f"--reward out/{reward}.pt"
        if c != label.Config.penalty:
            command = f"world.label --init out/sft.pt --out {pairs} --penalty {c:g}"
            plan += [Job(pairs, command), experiments.reward_job(reward, "sft", pairs)]
            plan.append(policy_job(named("ppo", c), "ppo", judged))
        plan.append(policy_job(named("grpo", c), "forks.grpo", f"{judged} {shared}"))
        for beta in DPO_BETAS:
            flags = f"--data {pairs} --beta {beta}"
            plan.append(policy_job(named(f"dpo_{beta}", c), "forks.dpo", flags))
        plan.append(Job(best_of, f"lab.frontier --job best_of {judged} --out {best_of}"))
        plan.append(policy_job(named("best_of", c), "sft", f"--data {best_of}"))
    checkpoints = tuple(f"out/{arm.name}.pt" for arm in arms())
    command = "lab.frontier --job measure --out out/frontier.json"
    return plan + [Job("out/frontier.json", command, checkpoints)]


# ---- what a worker measures


def measure_seed(config, device):
    """All arms, on the test people and on the dev people: {people: {arm: figures}}."""
    roles, result = measure.by_role(read_people(PEOPLE)), {"test": {}, "dev": {}}
    for arm in arms():
        path = f"out/{arm.name}.pt"
        model, tokenizer = load_checkpoint(path, LANGUAGE_MODELS, GPT, device)
        for people, its in result.items():
            groups = roles[people], roles[f"unknown_{people}"]
            its[arm.name] = measure_arm(model, tokenizer, *groups, random.Random(config.seed))
            if arm.name == "sft":
                its["line"] = measure_line(model, tokenizer, *groups, config.seed)
    write_text(config.out, json.dumps(result))


def measure_arm(model, tokenizer, known, unknown, rng):
    """Fractions of the answers, in new wordings: known right, unknown hallucinated, …"""
    right = measure.measure_answers(model, tokenizer, known, rng, True)["right"]
    wrong = measure.measure_answers(model, tokenizer, unknown, rng, True)["wrong"]
    private = measure.measure_answers(model, tokenizer, known, rng, True, [facts.PRIVATE])
    told = private["right"]
    return dict(known=right, unknown=wrong, told=told, score=right - wrong - told)


def measure_line(model, tokenizer, known, unknown, seed):
    """threshold_line of the SFT model: the greedy answer, given where the confidence allows it."""
    answered = []
    for people, grade in (known, "right"), (unknown, "wrong"):
        cases = measure.all_cases(people)
        asked = measure.ask(random.Random(seed), cases, held_out=True)  # the same questions twice
        texts = measure.answers(model, tokenizer, asked)
        hits = [measure.grade(*case, text) == grade for case, text in zip(cases, texts)]
        rng = random.Random(seed)
        confidence = measure.value_confidence(model, tokenizer, cases, rng).tolist()
        answered.append(list(zip(confidence, hits)))
    return threshold_line(*answered)


# ---- curves: [(unknown hallucinated, known right)]


def threshold_line(known, unknown):
    """The curve of answering only from a confidence on, for every threshold there is.

    known, unknown: [(confidence, whether the answer is right, or hallucinated)]
    """
    curve = [(0.0, 0.0)]
    for threshold in sorted({confidence for confidence, _ in known + unknown}, reverse=True):
        right = sum(hit for confidence, hit in known if confidence >= threshold)
        wrong = sum(hit for confidence, hit in unknown if confidence >= threshold)
        curve.append((wrong / len(unknown), right / len(known)))
    return curve


def right_at(curve, x):
    """Known right where x is hallucinated, linear between the points; beyond them nan."""
    return np.interp(x, *zip(*sorted(curve)), left=np.nan, right=np.nan)


def mean_gap(ours, other):
    """By how much the first curve lies above the other, at equal hallucination.

    The mean over all that both reach; nan where there is nothing. A point is a curve, too.
    """
    low, high = max(min(ours), min(other))[0], min(max(ours), max(other))[0]
    if low > high:
        return math.nan
    x = low + (high - low) * (np.arange(200) + 0.5) / 200
    return (right_at(ours, x) - right_at(other, x)).mean()


def curves(figures):
    """{way: curve} of a seed's figures; the points are in the order of the penalties."""
    result = {LINE: [tuple(point) for point in figures["line"]]}
    for arm in arms():
        its = figures[arm.name]
        result.setdefault(arm.way, []).append((its["unknown"], its["known"]))
    return result


# ---- the report


def chain(target, plan):
    """All targets that the making of this one takes, itself included."""
    needed = {target}
    for job in reversed(plan):  # what a job needs stands before it
        if job.target in needed:
            needed |= set(needs(job, plan))
    return needed


def cost(times, targets):
    """Seconds of one thread, the mean over the seeds whose jobs' times are there."""
    by_seed = clock.seconds_by_seed(times, targets)
    return statistics.mean(by_seed.values()) if by_seed else math.nan


def percents(arm, seeds):
    paths = ("known", "unknown", "told", "score")
    return [shown(*over_seeds(seeds, f"{arm.name}/{path}")) for path in paths]


def verdicts(seeds):
    """Rows: a way, how far PPO's curve lies above its own, on how many seeds, and whether."""
    rows, by_seed = [], [curves(figures) for figures in seeds]
    for way in [way for way in by_seed[0] if way != "PPO"]:
        gaps = [{"gap": mean_gap(one["PPO"], one[way])} for one in by_seed]
        gaps = [one for one in gaps if not math.isnan(one["gap"])]
        if gaps:
            mean, error = over_seeds(gaps, "gap")
            holds = "yes" if mean > 2 * error else "**no**"
            rows.append([way, shown(mean, error), len(gaps), holds])
        else:
            rows.append([way, "nowhere equal", 0, "–"])
    return rows


def frontier_text(seeds, times, people):
    """frontier.md; seeds: the figures of each."""
    plan, rows = jobs(), []
    for arm in arms():
        targets = chain(f"out/{arm.name}.pt", plan) - chain("out/sft.pt", plan)
        penalty = "–" if arm.penalty is None else f"{arm.penalty:g}"
        spent = [f"{cost(times, targets):,.0f}", f"{arm.samples:,}"]
        rows.append([arm.way, penalty, *percents(arm, seeds), *spent])
    header = ["way", "penalty", *HEADER, "seconds after SFT", "sampled responses"]
    columns = ["PPO's curve against", "known right, points above", "seeds", "above"]
    return f"""\
# The frontier

{len(seeds)} seeds, {people} people, new wordings: percent, mean ± standard error over the seeds.
The penalty is what a wrong answer costs the labeller. All ways but the first two have the same
{label.Config.pairs:,} comparisons with it, each with one sampled response; making them is in the
seconds, which are those of one thread.

{table(header, rows)}

At equal hallucination, the mean over all that both curves reach, linear between their points.
Above: by more than two standard errors.

{table(columns, verdicts(seeds))}

![known right against unknown hallucinated, a curve for each way](frontier.png)
"""


def fill(seeds, times, out):
    """The leaderboard's rows, and the picture."""
    plan, rows, step = jobs(), [], clock.step_seconds()
    for arm in [arm for name in ENTRIES for arm in arms() if arm.name == name]:
        steps = cost(times, chain(f"out/{arm.name}.pt", plan)) / step
        rows.append([arm.way, *percents(arm, seeds), f"{steps:,.0f}"])
    text = f"""\
{table(["entry", *HEADER, "reference steps"], rows)}

Mean ± standard error over {len(seeds)} seeds; a reference step took {step:.3f} s.

![known right against unknown hallucinated, a curve for each way](frontier.png)"""
    write_block("docs/leaderboard.md", "python -m lab.frontier --fill", text)
    with atomic("docs/frontier.png") as f:
        f.write((out / "frontier.png").read_bytes())


def draw(seeds, path):
    """Means over the seeds; a point's bars are standard errors."""
    figure, ax = plots.new_figure(1, 1, width=7.2, height=4.6)
    note, widest, lowest = partial(ax.annotate, textcoords="offset points"), 0.0, 100.0
    for way in [way for way in curves(seeds[0]) if way not in (LINE, "SFT")]:
        its = [arm for arm in arms() if arm.way == way]
        x, dx = points(seeds, [f"{arm.name}/unknown" for arm in its])
        y, dy = points(seeds, [f"{arm.name}/known" for arm in its])
        color = next((c for name, c in COLORS.items() if way.startswith(name)), "black")
        ax.errorbar(x, y, dy, dx, "o-", color=color, markersize=4, elinewidth=0.7)
        is_ppo = way == "PPO"
        note(way, max(zip(x, y)), (6, 3 if is_ppo else -9), color=color)
        for arm, *point in zip(its, x, y) if is_ppo else []:
            text = "a wrong answer costs " * (arm is its[0]) + f"{arm.penalty:g}"
            note(text, point, (-4, 5), color=color, ha="right")
        widest, lowest = max(widest, *x), min(lowest, *y)
    x = np.linspace(0, 1.4 * widest, 200)
    y = 100 * np.mean([right_at(curves(figures)[LINE], x / 100) for figures in seeds], 0)
    ax.plot(x, y, "--", color="gray", zorder=0)
    note(LINE, (x[80], y[80]), (8, -12), color="gray")
    (unknown, known), _ = points(seeds, ["sft/unknown", "sft/known"])
    ax.text(0.99, 0.02, f"SFT: {unknown:.0f}, {known:.0f} →", ha="right", transform=ax.transAxes)
    ax.set(xlim=(0, 1.4 * widest), xlabel="people in no text: hallucinated, %")
    ax.set(ylabel="known people, never asked about: right, %", ylim=(lowest - 8, 101))
    plots.save_figure(figure, path)


def read_figures(seeds, config):
    """The people's figures of each seed."""
    result, remedy = [], "remove it, and it is measured again"
    for seed in seeds:
        path = Path(config.runs, seed, "out/frontier.json")
        figures = read_json(path, remedy)
        if missing := [arm.name for arm in arms() if arm.name not in figures[config.people]]:
            die(f"{path}: without {', '.join(missing)}; {remedy}")
        result.append(figures[config.people])
    return result


def main():
    config = parse_config(Config, __doc__)
    if config.job:
        if config.job not in ("best_of", "measure"):
            die(f"--job {config.job}: use best_of, measure")
        device = setup(config)
        if config.job == "measure":
            return measure_seed(config, device)
        return controls.best_of(device, config.reward, EPISODES, config.out)
    if config.people not in ("test", "dev"):
        die(f"--people {config.people}: use test or dev")
    seeds, out = read_seeds(config.seeds), Path(config.out)
    if not config.fill:
        run_jobs(jobs(), seeds, config.runs, config.workers)
    figures, times = read_figures(seeds, config), experiments.read_times(config.runs)
    if config.fill:
        return fill(figures, times, out)
    text = frontier_text(figures, times, config.people)
    draw(figures, out / "frontier.png")
    write_text(out / "frontier.md", text)
    print(text)


if __name__ == "__main__":
    main()
