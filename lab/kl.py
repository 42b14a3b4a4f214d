"""Why the KL penalty: PPO long after its score is won, over beta, and against weak reward models.

    python -m lab.kl                     # seeds 0, 1, 2, two jobs at a time: out/kl/

The seeds' folders are those of lab.score, whose SFT checkpoints and reward models are used.
"""

from dataclasses import dataclass
from pathlib import Path

import ppo
from lab import plots
from lab.claims import line, over_seeds
from lab.experiments import PAIRS, Job, default_run, reward_job, run_jobs
from lab.measure import table
from lab.score import read_seeds
from utils.cli import parse_config
from utils.files import read_jsonl, write_text

WEAK = {"reward_few": "a reward model of 500 pairs", "reward_plain": "one with the plain head"}
PARTS = {"asked": "people asked about", "test": "test people", "forms": "forms"}
FIGURES = ["learned", "true", "KL", "entropy", "phrasings", "malformed"]
FIGURES += [f"{part} {grade}" for part in PARTS for grade in ("right", "hallucinated")]


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    betas: tuple = ("0", "0.05", "0.1", "0.2", "0.5")  # weights of the KL penalty
    steps: int = 200  # PPO's iterations
    out: str = "out/kl"  # folder of the table and the picture
    runs: str = "out/score"  # a folder for each seed, as of lab.score
    workers: int = 2  # jobs at a time, each on one thread


def runs(config):
    """{name: (reward model, beta)}; the weak reward models meet no penalty and the default one."""
    pairs = [("reward", beta) for beta in config.betas]
    pairs += [(reward, beta) for reward in WEAK for beta in ("0", f"{ppo.Config.beta:g}")]
    return {f"kl_{reward}_{beta}_{config.steps}": (reward, beta) for reward, beta in pairs}


def jobs(config):
    """The plan of one seed."""
    plan = [job for job in default_run() if job.target != "out/ppo.pt"]
    few = PAIRS.replace(".jsonl", "_few.jsonl")
    plan.append(Job(few, f"world.label --init out/sft.pt --out {few} --pairs 500"))
    plan.append(reward_job("reward_few", "sft", few))
    plan.append(reward_job("reward_plain", "sft", PAIRS, "--no-logprob_term"))
    for name, (reward, beta) in runs(config).items():
        flags = f"--reward out/{reward}.pt --beta {beta} --steps {config.steps}"
        command = f"lab.watched --init out/sft.pt --out out/{name}.pt {flags}"
        plan.append(Job(f"out/{name}.pt", command))
    return plan


def read_curve(path):
    """{iteration: what lab.watched measured then}, with both scores as gains over SFT's."""
    curve = {str(record["step"]): record for record in read_jsonl(path) if "gold" in record}
    for record in curve.values():
        record["learned"] = record["val_score"] - curve["0"]["val_score"]
        record["true"] = record["gold"] - curve["0"]["gold"]
        record["KL"], record["entropy"] = record["val_kl_ref"], record["val_entropy"]
        record["√KL"] = max(record["KL"], 0.0) ** 0.5  # an estimate, which can be below 0
    return curve


def series(seeds, name, key):
    """(means, standard errors) of a figure over a run."""
    return zip(*[over_seeds(seeds, f"{name}/{step}/{key}") for step in seeds[0][name]])


def kl_text(seeds, config):
    rows, falls = [], []
    for name, (reward, beta) in runs(config).items():
        end, row = f"{name}/{config.steps}", [WEAK.get(reward, "the default one"), beta]
        cells = ["{:.2f} ± {:.2f}".format(*over_seeds(seeds, f"{end}/{key}")) for key in FIGURES]
        rows.append(row + cells)
        peak = max(seeds[0][name], key=lambda step: over_seeds(seeds, f"{name}/{step}/true")[0])
        learned, learned_se = over_seeds(seeds, f"{end}/learned", f"{name}/{peak}/learned")
        true, true_se = over_seeds(seeds, f"{end}/true", f"{name}/{peak}/true")
        occurs = len(seeds) > 1 and learned > 2 * learned_se and true < -2 * true_se
        cells = [f"{learned:+.2f} ± {learned_se:.2f}", f"{true:+.2f} ± {true_se:.2f}"]
        falls.append([*row, peak, *cells, "yes" if occurs else "no"])
    columns = ["true score's peak: iteration", "learned since", "true since", "overoptimized"]
    return f"""\
# Why the KL penalty

{config.steps} iterations, {len(seeds)} seeds, mean ± standard error. Scores are gains over SFT on
held-out prompts, in SFT's standard deviations and in the labeller's utility (right 1, IDK 0, wrong
-1; without end {ppo.Config.missing_eos_score:g}). KL in nats a response, entropy in nats a token,
right phrasings in 8 samples, fractions: asked about by PPO, test people, instructions about them.

{table(["reward model", "β", *FIGURES], rows)}

![the same over the iterations, and the scores over the root of the KL](kl.png)

Overoptimized: since its peak the true score fell while the learned one rose, each by more than two
standard errors. The peak is the highest of several noisy means: a small fall can be chance.

{table(["reward model", "β", *columns], falls)}
"""


def draw(seeds, config, path):
    """Means over the seeds; bars are standard errors."""
    figure, axes = plots.new_figure(3, 5, width=15, height=8.5)
    *over_steps, over_kl, weak_over_kl, over_beta = axes.flat
    names = {f"kl_reward_{beta}_{config.steps}": f"β {beta}" for beta in config.betas}
    weak = {name: f"{WEAK[r]}, β {b}" for name, (r, b) in runs(config).items() if r in WEAK}
    for ax, key in zip(over_steps, FIGURES):
        for (name, label), color in zip(names.items(), plots.COLORS):
            x = [int(step) for step in seeds[0][name]]
            ax.errorbar(x, *series(seeds, name, key), fmt="o-", color=color, label=label)
        ax.set(title=key, xlabel="iteration")
    for ax, its in (over_kl, names), (weak_over_kl, weak):
        for (name, label), color in zip(its.items(), plots.COLORS):
            x, _ = series(seeds, name, "√KL")
            ax.errorbar(x, *series(seeds, name, "true"), fmt="o-", color=color, label=label)
            ax.errorbar(x, *series(seeds, name, "learned"), fmt="o--", color=color)
        ax.set(title="true score (dashed: learned)", xlabel="√KL")
    for (part, who), color in zip(PARTS.items(), plots.COLORS):
        for grade, style, label in ("right", "o-", who), ("hallucinated", "o--", None):
            ends = [f"{name}/{config.steps}/{part} {grade}" for name in names]
            line(over_beta, config.betas, seeds, label, ends, color, style)
    over_beta.set(title="end: right, % (dashed: hallucinated)")
    for ax in over_steps[0], over_kl, weak_over_kl, over_beta:
        ax.legend(fontsize=7)
    plots.save_figure(figure, path)


def main():
    config = parse_config(Config, __doc__)
    numbers = read_seeds(config.seeds)
    run_jobs(jobs(config), numbers, config.runs, config.workers)
    seeds = []
    for seed in numbers:
        logs = {name: Path(config.runs, seed, f"out/{name}.jsonl") for name in runs(config)}
        seeds.append({name: read_curve(log) for name, log in logs.items()})
    draw(seeds, config, Path(config.out, "kl.png"))
    text = kl_text(seeds, config)
    write_text(Path(config.out, "kl.md"), text)
    print(text)


if __name__ == "__main__":
    main()
