"""Two processes against one: the same losses, weights and files, written once; and no hang."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import run

import ppo
import pretrain
import reward
import sft
from forks import dpo, grpo
from train import parallel
from utils.files import write_jsonl, write_text

ROOT = Path(__file__).parent.parent
STAGES = {"base": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TIMES = {"seconds", "tokens_per_s", "rollout_s", "update_s", "episodes_per_s"}


def start(*command, **environment):
    environment = os.environ | dict(OMP_NUM_THREADS="1") | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*TORCHRUN, *map(str, command)], cwd=ROOT, env=environment, **pipes)


def start_in_float32(runs, **environment):
    """runs: {stage: flags}, one after the other."""
    runs = {STAGES[stage].__name__: flags for stage, flags in runs.items()}
    return start("tests/in_float32.py", json.dumps(runs, default=str), **environment)


def write_data(folder):
    """Files for all stages. Answers have 0 to 12 characters: shares of a batch are unequal."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_text(folder / "tokenizer.tiktoken", tiny.byte_tokenizer().dumps())
    text = b"the cat sat on the mat, and so did the dog. " * 60
    for name in ("train", "val"):
        np.frombuffer(text, np.uint8).astype(np.uint16).tofile(folder / f"{name}.bin")
    conversations, pairs, prompts = [], [], []
    for i, n in enumerate(rng.integers(0, 13, 100)):
        messages = [{"role": "user", "content": "say " + "abcd"[i % 4] * (1 + i % 7)}]
        a, b = ("".join(rng.choice(list("ab"), n)) for _ in range(2))
        conversations.append({"messages": [*messages, {"role": "assistant", "content": a}]})
        pairs.append({"messages": messages, "chosen": a + "b", "rejected": b + "a"})
        prompts.append({"messages": messages})
    write_jsonl(folder / "sft.jsonl", conversations)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", prompts)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: its flags}, each run once in one process, in float32, each batch as a whole."""
    folder = tmp_path_factory.mktemp("parallel")
    data, out = folder / "data", folder / "one"
    write_data(data)
    sizes = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, seq_len=16, block_size=64)
    flags = {
        "base": dict(data=data, **sizes, batch_size=8, warmup=2),
        "sft": dict(init=out / "base.pt", data=data / "sft.jsonl", batch_size=8, lr=1e-2),
        "reward": dict(init=out / "sft.pt", data=data / "pairs.jsonl", batch_size=8),
        "ppo": dict(init=out / "sft.pt", reward=out / "reward.pt", data=data / "prompts.jsonl"),
    }
    flags["reward"] |= dict(calibration_size=8)
    flags["ppo"] |= dict(batch_size=12, minibatch_size=8, val_size=7, kl_target=1.0, lr=1e-3)
    flags["ppo"]["beta"] = 0.05  # at others a clipped value may be so in one run only: another loss
    flags["dpo"] = dict(init=out / "sft.pt", data=data / "pairs.jsonl", batch_size=8, lr=1e-3)
    flags["grpo"] = flags["ppo"] | dict(group_size=4)
    del flags["grpo"]["kl_target"]
    with tiny.in_precision(torch.float32):
        for stage, module in STAGES.items():
            every = "log_every" if stage in ("ppo", "grpo") else "eval_every"
            flags[stage] |= {every: 1, "steps": 10, "device": "cpu", "seed": 3}
            flags[stage]["out"] = out / f"{stage}.pt"
            run(module, flags[stage])
    return flags


@pytest.fixture(scope="module", params=[0, 3])
def two(flags, request):
    """The folder of the same runs in two processes, each from what one process wrote.

    The second time in micro-batches of 3 of a process's 4 rows: one of 3, one of 1.
    """
    folder = flags["base"]["out"].parent.with_name(f"two{request.param}")
    runs = {}
    for stage in STAGES:
        changes = dict(out=folder / f"{stage}.pt", micro_batch_size=request.param)
        runs[stage] = flags[stage] | changes
    process = start_in_float32(runs)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    # the second process is silent
    assert printed.count("x 2 processes") == printed.count("wrote ") == len(STAGES), printed
    return folder


def records(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").open()]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def distance(one, other):
    """The largest difference between two models' weights."""
    return max((one[name] - other[name]).abs().max() for name in one)


def assert_logs_are_alike(one, other):
    assert len(one) == len(other) >= 10
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            assert abs(a[name] - b[name]) < (1e-5 if "loss" in name else 1e-4), (a["step"], name)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_and_one_log_the_same_metrics_and_end_at_the_same_weights(flags, two, stage):
    one, both = flags[stage]["out"], two / f"{stage}.pt"
    assert_logs_are_alike(records(one), records(both))
    assert distance(weights(one), weights(both)) < 2e-4  # Muon rounds to bfloat16
    first = flags[stage].get("init", two / "sft.pt")
    assert stage == "reward" or distance(weights(one), weights(first)) > 2e-3  # it did move


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_change_no_metric_and_no_weight_beyond_rounding(flags, stage, tmp_path):
    """3 rows of the step's 8 at a time: 3, 3 and 2."""
    mine = flags[stage] | dict(micro_batch_size=3, out=tmp_path / f"{stage}.pt")
    with tiny.in_precision(torch.float32):
        run(STAGES[stage], mine)
    assert_logs_are_alike(records(flags[stage]["out"]), records(mine["out"]))
    assert distance(weights(flags[stage]["out"]), weights(mine["out"])) < 2e-4


def test_each_file_is_written_once_and_nothing_else_is(two):
    names = [f"{stage}.{end}" for stage in STAGES for end in ("pt", "jsonl")]
    assert sorted(path.name for path in two.iterdir()) == sorted(names)


@pytest.fixture
def ppo_flags(flags, tmp_path, monkeypatch):
    """PPO with a reward that sends the second process the signal $SIGNAL in iteration 3."""
    (tmp_path / "rewards.py").write_text(
        "import os\n\ncalls = []\n\n\ndef length(prompts, responses):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4 and os.environ.get('RANK') == '1':\n"
        "        os.kill(os.getpid(), int(os.environ['SIGNAL']))\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = dict(reward="rewards:length", micro_batch_size=3, val_size=2, steps=5)
    return flags["ppo"] | changes | dict(out=tmp_path / "ppo.pt")


def test_an_interrupt_of_one_process_stops_all_after_the_same_step_and_one_process_can_continue(
    ppo_flags, tmp_path
):
    environment = dict(PYTHONPATH=str(tmp_path), SIGNAL=str(int(signal.SIGINT)))
    process = start_in_float32({"ppo": ppo_flags}, **environment)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and "stopped after step 3 of 5" in printed, printed
    assert not ppo_flags["out"].exists()
    assert [record["step"] for record in records(ppo_flags["out"])] == [0, 1, 2, 3]
    uninterrupted = ppo_flags | dict(out=tmp_path / "uninterrupted.pt")
    with tiny.in_precision(torch.float32):
        run(ppo, ppo_flags | dict(resume="newest"))
        run(ppo, uninterrupted)
    assert distance(weights(uninterrupted["out"]), weights(ppo_flags["out"])) < 2e-4
    assert [record["step"] for record in records(ppo_flags["out"])] == [0, 1, 2, 3, 4, 5, 5]


def test_a_process_that_dies_ends_the_run_with_an_error_and_without_a_checkpoint(
    ppo_flags, tmp_path
):
    environment = dict(PYTHONPATH=str(tmp_path), SIGNAL=str(int(signal.SIGKILL)))
    process = start_in_float32({"ppo": ppo_flags}, **environment)
    printed, _ = process.communicate(timeout=600)  # a hang would last as long
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in printed, printed
    assert not ppo_flags["out"].exists()


@pytest.mark.parametrize(
    "stage, flag, n",
    [("base", "batch_size", 8), ("sft", "batch_size", 8), ("ppo", "minibatch_size", 8)],
)
def test_a_batch_that_cannot_be_split_evenly_is_refused(flags, monkeypatch, stage, flag, n):
    monkeypatch.setattr(parallel, "size", 3)
    line = f"--{flag} {n}: cannot be split evenly over 3 processes"
    with pytest.raises(SystemExit, match=line):
        run(STAGES[stage], flags[stage])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_row_belongs_to_one_process_and_their_order_stays(monkeypatch, size):
    monkeypatch.setattr(parallel, "size", size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", rank)
        shares.append(parallel.shard(list(range(12))))
    assert sum(shares, []) == list(range(12))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
