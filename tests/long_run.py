"""An hour of PPO and 10,000 chat turns: do memory and the time of an iteration stay flat?

Not a part of the suites.

    python -m tests.long_run                                   # on what `make` built
    python -m tests.long_run --minutes 2 --turns 300
"""

import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.measure import table
from utils.cli import die, parse_config
from utils.files import read_jsonl

ROWS = 6  # of a table, of equal time: 10 minutes each in an hour


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that PPO starts from, and that chats
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "out/world/prompts.jsonl"  # prompts of PPO, questions of the chat
    minutes: float = 60.0  # of PPO
    turns: int = 10000  # of the chat
    batch_size: int = 128  # episodes a PPO iteration
    threshold: float = 1.02  # the last row's memory over the second's must stay below this


def resident(pid):
    """Resident memory of a process in MB; 0 when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(process, seconds):
    """[(seconds since the first sample, MB)] each half second, until the process or time ends."""
    samples, start = [], time.time()
    while process.poll() is None and time.time() - start < seconds:
        if megabytes := resident(process.pid):
            samples.append((time.time() - start, megabytes))
        time.sleep(0.5)
    return samples


def report(title, samples, iterations=None):
    """Prints a row for each sixth of the time.

    iterations: [(when it ended, seconds it took)]. Returns the largest memory of the last row over
    that of the second.
    """
    largest, rows = [], []
    for start, end in itertools.pairwise(np.linspace(0, samples[-1][0], ROWS + 1)):
        largest.append(max((mb for t, mb in samples if start <= t <= end), default=math.nan))
        row = {
            "minutes": f"{start / 60:.1f} to {end / 60:.1f}",
            "largest RSS, MB": f"{largest[-1]:.1f}",
        }
        if iterations:
            took = [seconds for t, seconds in iterations if start <= t <= end]
            median = f"{statistics.median(took):.3f}" if took else "–"
            row |= {"iterations": len(took), "s an iteration, median": median}
        rows.append(row)
    print(f"\n{title}\n\n{table(list(rows[0]), [list(row.values()) for row in rows])}")
    return largest[-1] / largest[1]


def run_ppo(config, folder):
    """PPO until the time is over, with a state every 20 iterations.

    The rate is low: the answers' length must not drift.
    """
    command = [sys.executable, "ppo.py", "--init", config.init, "--reward", config.reward]
    command += ["--data", config.data, "--batch_size", str(config.batch_size)]
    command += ["--out", str(folder / "ppo.pt"), "--steps", str(10**6), "--lr", "1e-6"]
    command += ["--log_every", "1", "--device", "cpu"]
    log = folder / "ppo.jsonl"
    with open(folder / "ppo.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while not log.exists() or log.read_text().count("\n") < 2:  # past the start
            if process.poll() is not None:
                die(f"ppo.py ended: {(folder / 'ppo.txt').read_text().splitlines()[-1]}")
            time.sleep(0.1)
        log_start = json.loads(log.read_text().splitlines()[1])["seconds"]
        samples = watch(process, 60 * config.minutes)
        process.send_signal(signal.SIGINT)
        process.wait()
    ends = [record["seconds"] - log_start for record in read_jsonl(log)[1:]]
    iterations = [(b, b - a) for a, b in itertools.pairwise(ends)]  # saving included
    title = f"PPO, {len(iterations)} iterations of {config.batch_size} episodes"
    return report(title, samples, iterations)


def run_chat(config, folder):
    """The prompts as questions, one after the other in one conversation that forgets its oldest."""
    questions = []
    for record in read_jsonl(config.data):
        questions.append(record["messages"][-1]["content"].replace("\n", " ") + "\n")
    asked, answers, notices = (folder / f"{name}.txt" for name in ("asked", "answers", "notices"))
    text = "".join(itertools.islice(itertools.cycle(questions), config.turns))
    asked.write_text(text, encoding="utf-8")
    command = [sys.executable, "chat.py", "--model", config.init, "--device", "cpu"]
    with open(asked) as stdin, open(answers, "w") as stdout, open(notices, "w") as stderr:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
        while process.poll() is None and not answers.stat().st_size:  # past the start
            time.sleep(0.1)
        samples = watch(process, float("inf"))
    n = answers.read_text(encoding="utf-8").count("\n")
    if process.returncode or n < config.turns:
        end = notices.read_text(encoding="utf-8")[-200:]
        die(f"chat.py ended with {process.returncode} after {n} lines: {end}")
    return report(f"Chat, {config.turns} turns", samples)


def main():
    config = parse_config(Config, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        growth = {"PPO": run_ppo(config, Path(folder)), "chat": run_chat(config, Path(folder))}
    print()
    for name, g in growth.items():
        print(f"{name}: memory of the last row over the second's {g:.4f}")
    if grown := [name for name, g in growth.items() if g > config.threshold]:
        die(f"memory of {' and '.join(grown)} grows by more than --threshold {config.threshold}")


if __name__ == "__main__":
    main()
