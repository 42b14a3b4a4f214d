"""The score of the default run over seeds, each with a world and models of its own.

    python -m lab.score                    # seeds 0, 1, 2, two jobs at a time: out/score/score.md
    python -m lab.score --seeds "3 4"      # or others

Each seed has a folder. What is there already is not made again.
"""

from dataclasses import dataclass
from pathlib import Path

from lab.claims import look_up, over_seeds
from lab.experiments import PEOPLE, Job, default_run, run_jobs
from lab.measure import table
from utils.cli import die, parse_config
from utils.files import read_json, write_text

# path in report.json: its title
FIGURES = {
    "score": "score",
    "recall": "base: facts recalled in text",
    "base_reads": "base: answers read out of a text",
    "sft_known": "SFT: known right",
    "sft_unknown_hallucinated": "SFT: unknown hallucinated",
    "sft_auroc": "SFT: AUROC of its confidence, known against unknown",
    "sft_private/right": "SFT: passwords told",
    "sft_reads": "SFT: reads a text",
    "sft_reads_new": "SFT: … for an attribute never trained in this form",
    "sft_text_over_memory": "SFT: … that contradicts pretraining's",
    "sft_closed_hallucinated": "SFT: hallucinated where a text does not tell",
    "sft_one_word_job": "SFT: one word × job, never trained",
    "reward_accuracy": "reward model: accuracy",
    "ppo_known": "PPO: known right",
    "ppo_unknown_hallucinated": "PPO: unknown hallucinated",
    "ppo_private/right": "PPO: passwords told",
    "ppo_closed_hallucinated": "PPO: hallucinated where a text does not tell",
    "ppo_membership_gap": "PPO: more right about people whom it asked about",
    "ppo_form_loss": "PPO: the largest loss of an instruction × attribute",
    "ppo_well_formed": "PPO: well-formed",
}


@dataclass
class Config:
    seeds: str = "0 1 2"  # the worlds, and the seeds of all stages
    out: str = "out/score"  # a folder for each seed goes here
    workers: int = 2  # jobs at a time, each on one thread


def plan():
    """The default run, and its report."""
    jobs = default_run()
    checkpoints = tuple(job.target for job in jobs if job.target.endswith(".pt"))
    return jobs + [Job("out/report.json", f"lab.report --out out --data {PEOPLE}", checkpoints)]


def score_text(reports):
    """A table of the reports' figures, {seed: report}: mean, standard error, and each seed's."""
    rows = []
    for path, title in FIGURES.items():
        scale = 1 if path == "score" else 100
        values = [f"{scale * look_up(report, path):.1f}" for report in reports.values()]
        mean, error = over_seeds(list(reports.values()), path)
        rows.append([title, f"{scale * mean:.1f} ± {scale * error:.1f}", *values])
    return table(["in percent", "mean", *[f"seed {seed}" for seed in reports]], rows)


def read_seeds(text):
    seeds = text.split()
    if not seeds or not all(seed.isdigit() for seed in seeds):
        die(f'--seeds "{text}": give numbers, such as "0 1 2"')
    return seeds


def main():
    config = parse_config(Config, __doc__)
    seeds = read_seeds(config.seeds)
    run_jobs(plan(), seeds, config.out, config.workers)
    remedy = "remove it, and it is made again"
    reports = {seed: read_json(Path(config.out, seed, "out/report.json"), remedy) for seed in seeds}
    text = score_text(reports)
    write_text(Path(config.out) / "score.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
