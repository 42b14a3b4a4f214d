"""Two processes against one: the same losses, the same weights, the same files, written once; and no hang."""

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
from test_stages import run

import common
import parallel
import ppo
import pretrain
import reward
import sft

ROOT = Path(__file__).parent.parent
STAGES = {"base": pretrain, "sft": sft, "reward": reward, "ppo": ppo}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*command, **environment):
    environment = os.environ | dict(OMP_NUM_THREADS="1") | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*TORCHRUN, *map(str, command)], cwd=ROOT, env=environment, **pipes)


def start_in_float32(runs, **environment):
    """runs: {stage: flags}, one after the other."""
    runs = {STAGES[stage].__name__: flags for stage, flags in runs.items()}
    return start("tests/in_float32.py", json.dumps(runs, default=str), **environment)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: its flags}, each run once in one process, in float32. Answers have 0 to 12 characters: shares are unequal."""
    folder = tmp_path_factory.mktemp("parallel")
    data, out = folder / "data", folder / "one"
    data.mkdir()
    rng = np.random.default_rng(0)
    common.write_text(data / "tokenizer.tiktoken", tiny.byte_tokenizer().dumps())
    for name in ("train", "val"):
        np.frombuffer(b"the cat sat on the mat, and so did the dog. " * 60, np.uint8).astype(np.uint16).tofile(data / f"{name}.bin")
    prompts = [[{"role": "user", "content": "say " + "abcd"[i % 4] * (1 + i % 7)}] for i in range(100)]
    drawn = [["".join(rng.choice(list("ab"), n)) for _ in range(2)] for n in rng.integers(0, 13, 100)]
    records = {
        "sft": [{"messages": [*p, {"role": "assistant", "content": a}]} for p, (a, _) in zip(prompts, drawn)],
        "pairs": [{"messages": p, "chosen": a + "b", "rejected": b + "a"} for p, (a, b) in zip(prompts, drawn)],
        "prompts": [{"messages": p} for p in prompts],
    }
    for name in records:
        common.write_jsonl(data / f"{name}.jsonl", records[name])
    sizes = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=16, context=64)
    flags = {
        "base": dict(data=data, **sizes, batch_size=8, accumulate=2, warmup=2, eval_every=1),
        "sft": dict(init=out / "base.pt", data=data / "sft.jsonl", batch_size=8, eval_every=1, lr=1e-2),
        "reward": dict(init=out / "sft.pt", data=data / "pairs.jsonl", batch_size=8, eval_every=1, calibration=8),
        "ppo": dict(init=out / "sft.pt", reward=out / "reward.pt", data=data / "prompts.jsonl", batch_size=12, minibatch_size=8,
                    micro_batch_size=3, val_prompts=7, log_every=1, kl_target=1.0, lr=1e-3),
    }  # fmt: skip
    with tiny.in_precision(torch.float32):
        for stage, module in STAGES.items():
            flags[stage] |= dict(device="cpu", seed=3, steps=10, out=out / f"{stage}.pt")
            run(module, flags[stage])
    return flags


@pytest.fixture(scope="module")
def two(flags):
    """The folder of the same four runs in two processes, each from the files that one process wrote."""
    folder = flags["base"]["out"].parent.with_name("two")
    process = start_in_float32({stage: flags[stage] | dict(out=folder / f"{stage}.pt") for stage in STAGES})
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert printed.count("x 2 processes") == printed.count("wrote ") == 4, printed  # the second process is silent
    return folder


def records(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").open()]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_and_one_log_the_same_figures_and_end_at_the_same_weights(flags, two, stage):
    log_of_one, log_of_two = records(flags[stage]["out"]), records(two / f"{stage}.pt")
    assert len(log_of_one) == len(log_of_two) >= 10
    for one, both in zip(log_of_one, log_of_two):
        assert one.keys() == both.keys()
        for name in one.keys() - {"seconds", "tokens_per_s", "generate_s", "score_s", "update_s", "episodes_per_s"}:
            assert abs(one[name] - both[name]) < (1e-5 if "loss" in name else 1e-4), (one["step"], name)
    one, both, first = (weights(path) for path in (flags[stage]["out"], two / f"{stage}.pt", flags[stage].get("init", two / "sft.pt")))
    assert all((one[name] - both[name]).abs().max() < 2e-4 for name in one)  # Muon rounds to bfloat16
    assert stage == "reward" or any((one[name] - first[name]).abs().max() > 2e-3 for name in one)  # it did move


def test_each_file_is_written_once_and_nothing_else_is(two):
    assert sorted(path.name for path in two.iterdir()) == sorted(f"{stage}.{end}" for stage in STAGES for end in ("pt", "jsonl"))


@pytest.fixture
def ppo_flags(flags, tmp_path, monkeypatch):
    """Flags of PPO with a reward that sends the second process the signal $SIGNAL in iteration 3."""
    (tmp_path / "rewards.py").write_text(
        "import os\n\ncalls = []\n\n\ndef length(prompts, responses):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4 and os.environ.get('RANK') == '1':\n"
        "        os.kill(os.getpid(), int(os.environ['SIGNAL']))\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return flags["ppo"] | dict(reward="rewards:length", val_prompts=2, steps=5, out=tmp_path / "ppo.pt")


def test_an_interrupt_of_one_process_stops_all_after_the_same_step_and_one_process_can_go_on(ppo_flags, tmp_path):
    process = start_in_float32({"ppo": ppo_flags}, PYTHONPATH=str(tmp_path), SIGNAL=str(int(signal.SIGINT)))
    printed, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and "stopped after step 3 of 5" in printed, printed
    assert not ppo_flags["out"].exists() and [r["step"] for r in records(ppo_flags["out"])] == [0, 1, 2, 3]
    uninterrupted = ppo_flags | dict(out=tmp_path / "uninterrupted.pt")
    with tiny.in_precision(torch.float32):
        run(ppo, ppo_flags | dict(resume="newest"))
        run(ppo, uninterrupted)
    one, both = weights(uninterrupted["out"]), weights(ppo_flags["out"])
    assert all((one[name] - both[name]).abs().max() < 2e-4 for name in one)
    assert [r["step"] for r in records(ppo_flags["out"])] == [0, 1, 2, 3, 4, 5, 5]


def test_a_process_that_dies_ends_the_run_with_an_error_and_without_a_checkpoint(ppo_flags, tmp_path):
    process = start_in_float32({"ppo": ppo_flags}, PYTHONPATH=str(tmp_path), SIGNAL=str(int(signal.SIGKILL)))
    printed, _ = process.communicate(timeout=600)  # a hang would last as long
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in printed, printed
    assert not ppo_flags["out"].exists()


@pytest.mark.parametrize("stage, flag, n", [("base", "batch_size", 8), ("sft", "batch_size", 8), ("ppo", "minibatch_size", 8)])
def test_a_batch_that_cannot_be_split_evenly_is_refused(flags, monkeypatch, stage, flag, n):
    monkeypatch.setattr(parallel, "size", 3)
    with pytest.raises(SystemExit, match=f"--{flag} {n}: cannot be split evenly over 3 processes"):
        run(STAGES[stage], flags[stage])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_row_belongs_to_one_process_and_their_order_stays(monkeypatch, size):
    monkeypatch.setattr(parallel, "size", size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", rank)
        shares.append(parallel.mine(list(range(12))))
    assert sum(shares, []) == list(range(12)) and max(map(len, shares)) - min(map(len, shares)) <= 1
