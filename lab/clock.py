"""The leaderboard's clock: time in reference steps, so that machines compare.

    python -m lab.clock                    # what each seed of out/score took in them

A reference step is one of PyTorch's own modules, on one thread: it stays the same whatever is
changed in this project. An entry's time is the sum over its jobs, of one thread each.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.experiments import default_run, read_times
from train.device import autocast
from utils.cli import die, parse_config

VOCABULARY, WIDTH, BATCH, LENGTH = 2048, 256, 32, 128


@dataclass
class Config:
    runs: str = "out/score"  # folder of the runs, made by python -m lab.score
    seed: int = 0  # of the step's weights and tokens


def reference_step():
    """A function: one training step of a small transformer with fixed sizes."""
    embed = nn.Embedding(VOCABULARY, WIDTH)
    layer = nn.TransformerEncoderLayer(
        WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    body = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
    head = nn.Linear(WIDTH, VOCABULARY)
    parameters = [*embed.parameters(), *body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)  # (T, T)
    windows = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))  # (B, T+1)

    def step():
        with autocast(torch.device("cpu")):
            hidden = body(embed(windows[:, :-1]), causal, is_causal=True)  # (B, T, C)
            loss = F.cross_entropy(head(hidden).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_seconds(repetitions=15):
    """The median of a reference step on one thread, after two that warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    step, seconds = reference_step(), []
    for _ in range(2 + repetitions):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return statistics.median(seconds[2:])


def seconds_by_seed(times, targets):
    """{seed: seconds of these targets' jobs}, where all have run; of a job that ran twice the last.

    times: [{"seed", "target", "seconds"}]
    """
    latest = {(job["seed"], job["target"]): job["seconds"] for job in times}
    result = {}
    for seed in sorted({seed for seed, _ in latest}):
        if all((seed, target) in latest for target in targets):
            result[seed] = sum(latest[seed, target] for target in targets)
    return result


def main():
    config = parse_config(Config, __doc__)
    torch.manual_seed(config.seed)
    targets = [job.target for job in default_run()]
    by_seed = seconds_by_seed(read_times(config.runs), targets)
    if not by_seed:
        die(f"{config.runs}: no seed with all its jobs' times; `python -m lab.score` makes one")
    step = step_seconds()
    print(f"a reference step takes {step:.3f} s on one thread")
    for seed, seconds in by_seed.items():
        print(f"seed {seed}: {seconds:,} s of one thread, {seconds / step:,.0f} reference steps")


if __name__ == "__main__":
    main()
