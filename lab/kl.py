"""Why the KL penalty: PPO long after its score is won, with every beta and with weak reward models.

    python -m lab.kl                     # seeds 0, 1, 2, two jobs at a time: out/kl/kl.md, kl.png
    python -m lab.kl --betas "0 0.05"    # fewer of them

The seeds' folders are those of lab.score, whose SFT checkpoints and reward models are used.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import ppo
from lab import plots
from lab.claims import over_seeds, shown
from lab.experiments import PAIRS, Job, default_run, reward_job, run_jobs
from lab.measure import table
from lab.score import read_seeds
from utils.cli import die, parse_config
from utils.files import read_jsonl, write_text

FEW = 500  # comparisons of the weak reward model
REWARDS = {
    "reward": "the default reward model",
    f"reward_{FEW}": f"a reward model of {FEW} pairs",
    "reward_plain": "a reward model with the plain head",
}


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    betas: str = "0 0.01 0.05 0.2 0.5"  # weights of the KL penalty
    steps: int = 200  # PPO's iterations
    out: str = "out/kl"  # folder of the table and the picture
    runs: str = "out/score"  # a folder for each seed, as of lab.score
    workers: int = 2  # jobs at a time, each on one thread


def runs(config):
    """{name: (reward model, beta)}; weak reward models meet no penalty and the default one."""
    try:
        pairs = {("reward", float(beta)) for beta in config.betas.split()}
    except ValueError:
        die(f'--betas "{config.betas}": give numbers, such as "0 0.05"')
    pairs |= {(reward, beta) for reward in REWARDS for beta in (0.0, ppo.Config.beta)}
    return {f"kl_{r}_{beta:g}_{config.steps}": (r, f"{beta:g}") for r, beta in sorted(pairs)}


def jobs(config):
    """The plan of one seed."""
    few = PAIRS.replace(".jsonl", f"_{FEW}.jsonl")
    plan = [job for job in default_run() if job.target != "out/ppo.pt"]
    plan.append(Job(few, f"world.label --init out/sft.pt --out {few} --pairs {FEW}"))
    plan.append(reward_job(f"reward_{FEW}", "sft", few))
    plain = reward_job("reward_plain", "sft", PAIRS)
    plan.append(plain._replace(command=f"{plain.command} --no-logprob_term"))
    for name, (reward, beta) in runs(config).items():
        flags = f"--reward out/{reward}.pt --beta {beta} --steps {config.steps}"
        command = f"lab.watched --init out/sft.pt --out out/{name}.pt {flags}"
        plan.append(Job(f"out/{name}.pt", command))
    return plan


# ---- what came out: {run: {iteration: figures}} of each seed


def read_curve(path):
    """{iteration: what was measured then}; learned and gold in deviations of SFT's answers."""
    records = {record["step"]: dict(record) for record in read_jsonl(path) if "gold" in record}
    first = records[0]
    for record in records.values():
        record["learned"] = record["val_score"] - first["val_score"]
        record["true"] = (record["gold"] - first["gold"]) / first["gold_sd"]
        record["root_kl"] = math.sqrt(max(record["val_kl_ref"], 0.0))
    return records


def series(seeds, name, key):
    """(iterations, means, standard errors) of a figure over a run."""
    steps = list(seeds[0][name])
    pairs = [over_seeds([seed[name][step] for seed in seeds], key) for step in steps]
    return steps, *map(list, zip(*pairs))


def overoptimized(seeds, name):
    """(iteration, learned, true) of a run's end: how much they rose since the true score's peak.

    Learned and true are (mean, standard error) over the seeds; the peak is that of the mean.
    """
    steps, means, _ = series(seeds, name, "true")
    peak, end = steps[means.index(max(means))], steps[-1]
    rises = []
    for key in ("learned", "true"):
        differences = [{"rise": s[name][end][key] - s[name][peak][key]} for s in seeds]
        rises.append(over_seeds(differences, "rise"))
    return peak, *rises


COLUMNS = {"learned": "learned score", "true": "true score", "val_kl_ref": "KL"}
COLUMNS |= {"val_entropy": "entropy", "phrasings": "phrasings"}
PERCENTS = {"malformed": "malformed", "asked_right": "people asked about: right"}
PERCENTS |= {"asked_hallucinated": "… hallucinated", "test_right": "test people: right"}
PERCENTS |= {"test_hallucinated": "… hallucinated", "forms_right": "forms: right"}
PERCENTS["forms_hallucinated"] = "… hallucinated where the text does not tell"


def kl_text(seeds, config):
    """kl.md"""
    rows, falls = [], []
    for name, (reward, beta) in runs(config).items():
        ends = [list(seed[name].values())[-1] for seed in seeds]
        cells = ["{:.2f} ± {:.2f}".format(*over_seeds(ends, key)) for key in COLUMNS]
        cells += [shown(*over_seeds(ends, key)) for key in PERCENTS]
        rows.append([REWARDS[reward], beta, *cells])
        peak, learned, true = overoptimized(seeds, name)
        occurs = learned[0] > 2 * learned[1] and true[0] < -2 * true[1]
        cells = ["{:+.2f} ± {:.2f}".format(*rise) for rise in (learned, true)]
        falls.append([REWARDS[reward], beta, peak, *cells, "yes" if occurs else "no"])
    header = ["reward", "β", *COLUMNS.values(), *PERCENTS.values()]
    columns = ["reward", "β", "true score's peak: iteration", "learned since", "true since"]
    return f"""\
# Why the KL penalty

PPO over {config.steps} iterations from the SFT checkpoint, {len(seeds)} seeds, mean ± standard
error. Scores: of PPO's held-out prompts, above SFT's and in standard deviations of SFT's answers;
the true one is the labeller's utility. KL in nats a response, entropy in nats a token, the rest in
percent.

{table(header, rows)}

Overoptimization: the learned score rose and the true one fell since the true one's peak, each by
more than two standard errors.

{table([*columns, "overoptimized"], falls)}

![learned and true score against the root of the KL; what each beta loses](kl.png)
"""


# ---- the picture

PARTS = {"asked": "people asked about", "test": "test people", "forms": "test people, forms"}
COLORS = [plots.VERMILION, plots.ORANGE, plots.GREEN, plots.SKY, plots.BLUE, plots.PINK]


def draw(seeds, config, path):
    """Means over the seeds; bars are standard errors."""
    figure, axes = plots.new_figure(2, 2, width=9, height=7.5)
    by_beta = {beta: name for name, (reward, beta) in runs(config).items() if reward == "reward"}
    weak = {f"{REWARDS[r]}, β {b}": n for n, (r, b) in runs(config).items() if r != "reward"}
    draw_scores(axes[0, 0], seeds, {f"β {beta}": name for beta, name in by_beta.items()})
    draw_scores(axes[0, 1], seeds, weak)
    over_steps, over_beta = axes[1]
    for (part, title), color in zip(PARTS.items(), COLORS[::2]):
        default = f"{ppo.Config.beta:g}"
        for beta, style, label in ("0", "o--", None), (default, "o-", title):
            steps, y, errors = series(seeds, by_beta[beta], f"{part}_right")
            bars(over_steps, steps, y, errors, color, style, label)
        for key, style, label in ("right", "o-", title), ("hallucinated", "o--", None):
            ends = [series(seeds, name, f"{part}_{key}") for name in by_beta.values()]
            y, errors = [means[-1] for _, means, _ in ends], [end[-1] for *_, end in ends]
            bars(over_beta, list(by_beta), y, errors, color, style, label)
    over_steps.set(xlabel="iteration", ylabel=f"right, %; line: β {default}, dashed: β 0")
    over_beta.set(xlabel="β", ylabel="at the end, %; line: right, dashed: hallucinated")
    for ax in axes.flat:
        ax.legend(fontsize=7)
    plots.save_figure(figure, path)


def draw_scores(ax, seeds, names):
    """Learned and true score of runs, {label: name}, against √KL."""
    for (label, name), color in zip(names.items(), COLORS):
        _, x, _ = series(seeds, name, "root_kl")
        for key, style in ("learned", "o--"), ("true", "o-"):
            _, y, _ = series(seeds, name, key)
            ax.plot(x, y, style, color=color, markersize=3, label=label if key == "true" else None)
    ax.set(xlabel="√KL to SFT", ylabel="score above SFT's; line: true, dashed: learned")


def bars(ax, x, y, errors, color, style, label):
    y, errors = ([100 * value for value in values] for values in (y, errors))
    ax.errorbar(x, y, errors, fmt=style, color=color, markersize=3, label=label)


def main():
    config = parse_config(Config, __doc__)
    names, out = read_seeds(config.seeds), Path(config.out)
    run_jobs(jobs(config), names, config.runs, config.workers)
    seeds = []
    for seed in names:
        folder = Path(config.runs, seed, "out")
        seeds.append({name: read_curve(folder / f"{name}.jsonl") for name in runs(config)})
    text = kl_text(seeds, config)
    draw(seeds, config, out / "kl.png")
    write_text(out / "kl.md", text)
    print(text)


if __name__ == "__main__":
    main()
