"""An hour of PPO and 10,000 chat turns: does memory stay flat, and the time of an iteration? Not a part of the suites.

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

import common
import evaluate

ROWS = 6  # of a table, of equal time: 10 minutes each in an hour


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that PPO starts from, and that chats
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "data/world/prompts.jsonl"  # prompts of PPO, questions of the chat
    minutes: float = 60.0  # of PPO
    turns: int = 10000  # of the chat
    batch_size: int = 128  # episodes a PPO iteration
    threshold: float = 1.02  # the last row's memory over the second's must stay below this


def resident(pid):
    """Resident memory of a process in MB; 0 when it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0.0)


def watch(process, seconds):
    """[(seconds since the first sample, MB)] each half second, until the process has ended or the time is over."""
    samples, start = [], time.time()
    while process.poll() is None and time.time() - start < seconds:
        if megabytes := resident(process.pid):
            samples.append((time.time() - start, megabytes))
        time.sleep(0.5)
    return samples


def report(title, samples, columns=lambda start, end: {}):
    """Prints a row for each sixth of the time; returns the largest memory of the last row over that of the second."""
    total, largest, rows = samples[-1][0], [], []
    for start, end in itertools.pairwise(np.linspace(0, total, ROWS + 1)):
        largest.append(max((mb for t, mb in samples if start <= t <= end), default=math.nan))
        rows.append({"minutes": f"{start / 60:.1f} to {end / 60:.1f}", "largest RSS, MB": f"{largest[-1]:.1f}"} | columns(start, end))
    print(f"\n{title}\n\n{evaluate.table(list(rows[0]), [list(row.values()) for row in rows])}")
    return largest[-1] / largest[1]


def run_ppo(config, folder):
    """PPO until the time is over, with a state every 20 iterations. The rate is low: the answers' length must not drift."""
    flags = f"--init {config.init} --reward {config.reward} --data {config.data} --batch_size {config.batch_size}"
    flags += f" --out {folder}/ppo.pt --steps {10**6} --lr 1e-6 --log_every 1 --device cpu"
    with open(folder / "ppo.txt", "w") as output:
        process = subprocess.Popen([sys.executable, "ppo.py", *flags.split()], stdout=output, stderr=output)
        while not (folder / "ppo.jsonl").exists() or not (folder / "ppo.jsonl").read_text().count("\n") > 1:  # past the start
            if process.poll() is not None:
                common.die(f"ppo.py ended: {(folder / 'ppo.txt').read_text().splitlines()[-1]}")
            time.sleep(0.1)
        log_start = json.loads((folder / "ppo.jsonl").read_text().splitlines()[1])["seconds"]
        samples = watch(process, 60 * config.minutes)
        process.send_signal(signal.SIGINT)
        process.wait()
    ends = [record["seconds"] - log_start for record in common.read_jsonl(folder / "ppo.jsonl", lambda r: None)[1:]]
    iterations = [(b, b - a) for a, b in itertools.pairwise(ends)]  # (when it ended, what it took), saving included

    def columns(start, end):
        took = [s for t, s in iterations if start <= t <= end]
        return {"iterations": len(took), "s an iteration, median": f"{statistics.median(took):.3f}" if took else "–"}

    return report(f"PPO, {len(iterations)} iterations of {config.batch_size} episodes", samples, columns)


def run_chat(config, folder):
    """The prompts as questions, one after the other in one conversation that forgets its oldest turns."""
    records = common.read_jsonl(config.data, lambda r: None)
    questions = [record["messages"][-1]["content"].replace("\n", " ") for record in records]
    (folder / "questions.txt").write_text("".join(q + "\n" for q in itertools.islice(itertools.cycle(questions), config.turns)), encoding="utf-8")
    with open(folder / "questions.txt") as asked, open(folder / "answers.txt", "w") as answers, open(folder / "notices.txt", "w") as notices:
        command = [sys.executable, "chat.py", "--model", config.init, "--device", "cpu"]
        process = subprocess.Popen(command, stdin=asked, stdout=answers, stderr=notices)
        while process.poll() is None and not (folder / "answers.txt").stat().st_size:  # past the start
            time.sleep(0.1)
        samples = watch(process, float("inf"))
    n = (folder / "answers.txt").read_text(encoding="utf-8").count("\n")
    if process.returncode or n < config.turns:
        common.die(f"chat.py ended with {process.returncode} after {n} lines: {(folder / 'notices.txt').read_text()[-200:]}")
    return report(f"Chat, {config.turns} turns", samples)


def main():
    config = common.parse_config(Config, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        growth = {"PPO": run_ppo(config, Path(folder)), "chat": run_chat(config, Path(folder))}
    print("\n" + ", ".join(f"{name}: memory of the last row over the second's {g:.4f}" for name, g in growth.items()))
    if grown := [name for name, g in growth.items() if g > config.threshold]:
        common.die(f"memory of {' and '.join(grown)} grows by more than --threshold {config.threshold}")


if __name__ == "__main__":
    main()
