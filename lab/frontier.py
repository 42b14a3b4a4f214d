"""The frontier: known people right against unknown people hallucinated, for each algorithm.

    python -m lab.frontier                 # seeds 0, 1, 2, two jobs at a time: out/frontier/
    python -m lab.frontier --people dev    # the development people: for choosing settings
    python -m lab.frontier --fill          # run nothing; docs/leaderboard.md, docs/frontier.png

The seeds' folders are lab.score's: run one after the other, and the default run is made once.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ppo
from lab import clock, controls, experiments, measure, plots
from lab.claims import TITLES, cell, each, over_seeds, points, shown
from lab.experiments import CONTROLS, PEOPLE, Job
from lab.score import read_seeds
from model import GPT
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.device import setup
from utils.cli import die, parse_config
from utils.files import read_json, write_block, write_text
from world import facts, label
from world.grade import read_people

PENALTIES = sorted({0.4, label.Config.penalty, 2.0})  # of a wrong answer, to the labeller
DPO_BETAS = {0.05: plots.SKY, 0.1: plots.BLUE, 0.3: plots.PINK}
# checkpoint: the title of its curve, with a point for each penalty, and its color
CURVES = {"ppo": ("PPO", plots.VERMILION), "grpo": ("GRPO", plots.ORANGE)}
CURVES |= {f"dpo_{beta}": (f"DPO, β {beta}", color) for beta, color in DPO_BETAS.items()}
CURVES["best_of"] = (TITLES["best_of"], plots.GREEN)
THRESHOLD = "a threshold on SFT's own confidence"
FIGURES = ["known right", "unknown hallucinated", "passwords told", "score"]
ENTRIES = ["sft", "demos_idk", "dpo_0.1", "grpo", "ppo"]  # of the leaderboard


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    out: str = "out/frontier"  # folder of table and picture; of a worker's best_of: its file
    runs: str = "out/score"  # a folder for each seed, as of lab.score
    workers: int = 2  # jobs at a time, each on one thread
    people: str = "test"  # test, or dev while choosing settings
    fill: bool = False  # run nothing; the figures into the documents
    job: str = ""  # what a worker does in its seed's folder: best_of or measure
    reward: str = "out/reward.pt"  # a worker's
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # a worker's


# ---- the plan


def suffix(penalty):
    """Of a file's name: those of the default penalty are the default run's own."""
    return "" if penalty == label.Config.penalty else f"_{penalty:g}"


def checkpoints():
    """{checkpoint: (title of its curve, penalty)}"""
    result = {"sft": ("SFT", "–"), "demos_idk": ("SFT + IDK", "–")}
    for name, (title, _) in CURVES.items():
        result |= {f"{name}{suffix(c)}": (title, f"{c:g}") for c in PENALTIES}
    return result


def jobs():
    """The plan of one seed."""
    plan = experiments.default_run()
    plan.append(Job(f"{CONTROLS}/done", "lab.controls --data out/world", (PEOPLE,)))
    plan.append(experiments.sft_job("demos_idk", init="sft"))
    for penalty in PENALTIES:
        c = suffix(penalty)
        pairs, reward = f"out/world/preferences{c}.jsonl", f"out/reward{c}.pt"
        best_of = f"{CONTROLS}/best_of{c}.jsonl"
        commands = {f"dpo_{beta}": f"forks.dpo --data {pairs} --beta {beta}" for beta in DPO_BETAS}
        if penalty != label.Config.penalty:
            labels = f"world.label --init out/sft.pt --out {pairs} --penalty {penalty:g}"
            plan += [Job(pairs, labels), experiments.reward_job(f"reward{c}", "sft", pairs)]
            commands["ppo"] = f"ppo --reward {reward}"
        plan.append(Job(best_of, f"lab.frontier --job best_of --reward {reward} --out {best_of}"))
        commands["best_of"] = f"sft --data {best_of}"
        commands["grpo"] = f"forks.grpo --reward {reward} --steps {ppo.Config.steps}"
        for name, command in commands.items():
            out = f"out/{name}{c}.pt"
            plan.append(Job(out, f"{command} --init out/sft.pt --out {out}"))
    policies = tuple(f"out/{name}.pt" for name in checkpoints())
    return plan + [Job("out/frontier.json", "lab.frontier --job measure", policies)]


# ---- what a worker measures


def measure_seed(config, device):
    """All checkpoints, on the test people and on the dev people -> out/frontier.json."""
    roles, result = measure.by_role(read_people(PEOPLE)), {"test": {}, "dev": {}}
    for name in checkpoints():
        model, tokenizer = load_checkpoint(f"out/{name}.pt", LANGUAGE_MODELS, GPT, device)
        for people, its in result.items():
            args = (model, tokenizer, roles[people], roles[f"unknown_{people}"])
            its[name] = measure_policy(*args, random.Random(config.seed))
            if name == "sft":
                its["threshold"] = measure.measure_threshold(*args, random.Random(config.seed))
    write_text("out/frontier.json", json.dumps(result))


def measure_policy(model, tokenizer, known, unknown, rng):
    """FIGURES, as fractions of the answers in new wordings."""
    right = measure.measure_answers(model, tokenizer, known, rng, True)["right"]
    wrong = measure.measure_answers(model, tokenizer, unknown, rng, True)["wrong"]
    told = measure.measure_answers(model, tokenizer, known, rng, True, [facts.PRIVATE])["right"]
    return dict(zip(FIGURES, (right, wrong, told, right - wrong - told)))


# ---- curves: [(unknown hallucinated, known right)]


def curves(figures):
    """{title: curve} of a seed."""
    result = {THRESHOLD: figures["threshold"]}
    for name, (title, _) in checkpoints().items():
        its = figures[name]
        result.setdefault(title, []).append((its["unknown hallucinated"], its["known right"]))
    return result


def right_at(curve, x):
    """Known right where x is hallucinated; nan beyond the curve's ends."""
    # linear between two points: so do answers of the two models, drawn at random
    return np.interp(x, *zip(*sorted(curve)), left=np.nan, right=np.nan)


def mean_gap(curve, other):
    """By how much a curve lies above another, averaged over what both hallucinate; else nan."""
    low = max(min(curve)[0], min(other)[0])
    high = min(max(curve)[0], max(other)[0])
    if low > high:
        return math.nan
    x = low + (high - low) * (np.arange(200) + 0.5) / 200
    return (right_at(curve, x) - right_at(other, x)).mean()


# ---- the report


def table(seeds, times, rows):
    """What checkpoints reach and what they cost; seeds: the figures of each."""
    plan, step, lines = jobs(), clock.step_seconds(), []
    for name in rows:
        targets = clock.needed(f"out/{name}.pt", plan)
        after_sft = clock.mean_seconds(times, targets - clock.needed("out/sft.pt", plan))
        steps = clock.mean_seconds(times, targets) / step
        cells = [cell(seeds, f"{name}/{figure}") for figure in FIGURES]
        lines.append([*checkpoints()[name], *cells, f"{after_sft:,.0f}", f"{steps:,.0f}"])
    costs = ["seconds of one thread after SFT", "reference steps"]
    return measure.table(["entry", "penalty", *FIGURES, *costs], lines)


def compare(seeds):
    """Rows: how far PPO's curve lies above another, on how many seeds, and whether it does."""
    by_seed, rows = [curves(figures) for figures in seeds], []
    for title in [title for title in by_seed[0] if title != "PPO"]:
        gaps = [mean_gap(its["PPO"], its[title]) for its in by_seed]
        gaps = [{"gap": gap} for gap in gaps if not math.isnan(gap)]
        if gaps:
            mean, error = over_seeds(gaps, "gap")
            above = "yes" if mean > 2 * error and len(gaps) > 1 else "**no**"
            rows.append([title, shown(mean, error), len(gaps), above])
    return rows


def frontier_text(seeds, times, people):
    header = ["PPO's curve against", "known right, points above", "seeds", "above"]
    return f"""\
# The frontier

{len(seeds)} seeds, {people} people, new wordings: percent, mean ± standard error over the seeds.
The penalty is what a wrong answer costs the labeller, who compares {label.Config.pairs:,} pairs.
PPO, GRPO and "{TITLES["best_of"]}" sample {controls.N_EPISODES:,} responses more, DPO none.

{table(seeds, times, checkpoints())}

At equal hallucination, averaged over all that both curves reach, on the seeds where there is such;
without any, no row. Above: by more than two standard errors, on two seeds at least.

{measure.table(header, compare(seeds))}

![known right against unknown hallucinated, a curve for each]({people}.png)
"""


def draw(seeds, path):
    """Means over the seeds; a point's bars are standard errors."""
    figure, ax = plots.new_figure(1, 1, width=7.2, height=4.6)
    for title, color in [*CURVES.values(), ("SFT + IDK", "black")]:
        names = [name for name, (its, _) in checkpoints().items() if its == title]
        y, dy = points(seeds, each(names, FIGURES[0]))
        x, dx = points(seeds, each(names, FIGURES[1]))
        ax.errorbar(x, y, dy, dx, "o-", color=color, label=title, markersize=5, elinewidth=0.7)
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # the thresholds and SFT reach further
    x = np.linspace(0, 1, 1000)
    y = np.mean([right_at(curves(figures)[THRESHOLD], x) for figures in seeds], 0)
    ax.plot(100 * x, 100 * y, "--", color="gray", zorder=0, label=THRESHOLD)
    (known, unknown), _ = points(seeds, [f"sft/{figure}" for figure in FIGURES[:2]])
    ax.set(xlabel=f"people in no text: hallucinated, % (SFT: {unknown:.0f})")
    ax.set(ylabel=f"known people, never asked about: right, % (SFT: {known:.0f})")
    ax.legend(title="along a curve, to the left: a wrong answer costs more")
    plots.save_figure(figure, path)


def read_figures(path, people):
    """A seed's, of the test people or of the dev people."""
    remedy = "remove it, and it is measured again"
    figures = read_json(path, remedy)[people]
    if missing := sorted(checkpoints().keys() - figures):
        die(f"{path}: without {', '.join(missing)}; {remedy}")
    return figures


def main():
    config = parse_config(Config, __doc__)
    if config.job == "measure":
        return measure_seed(config, setup(config))
    if config.job == "best_of":
        return controls.best_of(setup(config), config.reward, config.out)
    people = config.people
    if config.job or people not in ("test", "dev") or (config.fill and people == "dev"):
        die("--job is best_of or measure, --people test or dev, with --fill test")
    seeds = read_seeds(config.seeds)
    if not config.fill:
        experiments.run_jobs(jobs(), seeds, config.runs, config.workers)
    figures = [read_figures(Path(config.runs, seed, "out/frontier.json"), people) for seed in seeds]
    times = experiments.read_times(config.runs)
    if config.fill:
        entries = table(figures, times, ENTRIES)
        write_block("docs/leaderboard.md", "python -m lab.frontier --fill", entries)
        return draw(figures, "docs/frontier.png")
    text = frontier_text(figures, times, people)
    draw(figures, Path(config.out, f"{people}.png"))
    write_text(Path(config.out, f"{people}.md"), text)
    print(text)


if __name__ == "__main__":
    main()
