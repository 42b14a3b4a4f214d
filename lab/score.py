"""The score of the default run over seeds, each with a world and models of its own.

    python -m lab.score                    # seeds 0, 1, 2, two jobs at a time: out/score/score.md
    python -m lab.score --seeds "3 4"      # or others

An entry of docs/leaderboard.md is this figure, after a change to what its rules allow. Each seed
has a folder; what is there already is not made again.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from lab.experiments import Job, default_run, run_jobs
from lab.measure import table
from utils.cli import die, parse_config
from utils.files import read_json, write_text

REPORT = "lab.report --out out --data out/world/people.jsonl"
FIGURES = [
    "score",
    "recall",
    "base_reads",
    "sft_known",
    "sft_unknown_hallucinated",
    "sft_reads",
    "sft_reads_new",
    "sft_text_over_memory",
    "sft_one_word_job",
    "sft_closed_hallucinated",
    "sft_auroc",
    "reward_accuracy",
    "ppo_known",
    "ppo_unknown_hallucinated",
    "ppo_closed_hallucinated",
    "ppo_membership_gap",
    "ppo_form_loss",
    "ppo_well_formed",
]


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    out: str = "out/score"  # a folder for each seed goes here
    workers: int = 2  # jobs at a time, each on one thread


def plan():
    """The default run, and its report."""
    jobs = default_run()
    checkpoints = tuple(job.target for job in jobs if job.target.endswith(".pt"))
    return jobs + [Job("out/report.json", REPORT, checkpoints)]


def score_text(reports):
    """A table of the reports' figures: mean, standard error, and each seed's."""
    rows = []
    for name in FIGURES:
        scale = 1 if name == "score" else 100
        values = [scale * report[name] for report in reports.values()]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        mean = f"{statistics.mean(values):.1f} ± {error:.1f}"
        rows.append([name, mean, *[f"{value:.1f}" for value in values]])
    return table(["figure, in percent", "mean", *[f"seed {seed}" for seed in reports]], rows)


def main():
    config = parse_config(Config, __doc__)
    seeds = config.seeds.split()
    if not seeds or not all(seed.isdigit() for seed in seeds):
        die(f'--seeds "{config.seeds}": give numbers, such as "0 1 2"')
    run_jobs(plan(), seeds, config.out, config.workers)
    remedy = "remove it, and it is made again"
    reports = {seed: read_json(Path(config.out, seed, "out/report.json"), remedy) for seed in seeds}
    text = score_text(reports)
    write_text(Path(config.out) / "score.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
