"""The leaderboard's clock: time in reference steps, so that machines compare.

    python -m lab.clock                    # what each seed of out/score took in them

A reference step trains one of PyTorch's own modules on one thread, in the stages' precision: it
stays the same whatever model or optimizer an entry has. An entry's time is the sum over its jobs,
of one thread each.
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.experiments import default_run, needs, read_times
from train.device import autocast
from utils.cli import die, parse_config

VOCABULARY, WIDTH, BATCH, LENGTH = 2048, 256, 8, 128


@dataclass
class Config:
    runs: str = "out/score"  # folder of the runs, made by python -m lab.score
    seed: int = 0  # of the step's weights and tokens


class Reference(nn.Module):
    """A small transformer of fixed sizes. Of (B, T+1) tokens the loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        sizes = dict(nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0)
        layer = nn.TransformerEncoderLayer(WIDTH, batch_first=True, norm_first=True, **sizes)
        self.body = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)  # (T, T)

    def forward(self, tokens):
        hidden = self.body(self.embed(tokens[:, :-1]), self.causal, is_causal=True)  # (B, T, C)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def reference_step(model, optimizer, tokens):
    with autocast(torch.device("cpu")):
        loss = model(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def step_seconds(repetitions=15):
    """The median of a reference step on one thread, after two that warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))  # (B, T+1)
    times = []
    for _ in range(2 + repetitions):
        start = time.perf_counter()
        reference_step(model, optimizer, tokens)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return statistics.median(times[2:])


# ---- what jobs took


def needed(target, plan):
    """The targets that are made on the way to this one, itself included."""
    targets = {target}
    for job in reversed(plan):  # what a job needs stands before it
        if job.target in targets:
            targets |= set(needs(job, plan))
    return targets


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


def mean_seconds(times, targets):
    """Over the seeds whose jobs' times are all there; nan if none are."""
    by_seed = seconds_by_seed(times, targets)
    return statistics.mean(by_seed.values()) if by_seed else math.nan


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
