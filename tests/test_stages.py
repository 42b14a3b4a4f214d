"""Every stage from end to end on a tiny world.

What it writes, that it repeats itself exactly, that it resumes exactly.
"""

import functools
import json
import math
import os
import signal
import sys
from collections import Counter

import pytest
import torch
from tiny import run

import ppo
import pretrain
import reward
import sft
import train.device
from forks import dpo, grpo
from lab import report
from train.batches import Batches, hold_out
from train.checkpoint import read_torch, state_paths
from utils.files import read_jsonl, write_jsonl
from world import generate, label

STAGES = {"base": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo}


def records(path):
    """The log of the checkpoint at path."""
    return [json.loads(line) for line in path.with_suffix(".jsonl").open()]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def is_same(path, other):
    one, two = weights(path), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: its flags} for a chain of a few seconds, run once: what it writes lies at --out."""
    folder = tmp_path_factory.mktemp("chain")
    data, out = folder / "world", folder / "out"
    run(generate, dict(out=data, documents=400, vocab_size=500, prompts=200))
    sizes = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    flags = {
        "base": dict(data=data, **sizes, seq_len=32, batch_size=4, warmup=2, eval_every=4),
        "sft": dict(init=out / "base.pt", data=data / "sft.jsonl", batch_size=8, eval_every=4),
        "reward": dict(init=out / "sft.pt", data=data / "preferences.jsonl", batch_size=8),
        "ppo": dict(init=out / "sft.pt", reward=out / "reward.pt", data=data / "prompts.jsonl"),
    }
    flags["dpo"] = dict(init=out / "sft.pt", data=data / "preferences.jsonl", batch_size=8)
    flags["dpo"] |= dict(eval_every=4, lr=1e-3)
    flags["grpo"] = flags["ppo"] | dict(batch_size=8, group_size=4, minibatch_size=4, epochs=2)
    flags["grpo"] |= dict(val_size=8, log_every=4)
    flags["reward"] |= dict(eval_every=4, calibration_size=16)
    flags["ppo"] |= dict(batch_size=8, minibatch_size=4, epochs=2)
    flags["ppo"] |= dict(val_size=8, log_every=4, kl_target=1.0)
    for stage, module in STAGES.items():
        if stage == "reward":
            labels = dict(init=out / "sft.pt", data=data, out=data / "preferences.jsonl")
            run(label, labels | dict(pairs=300, device="cpu"))
        flags[stage] |= dict(steps=8, device="cpu", seed=3, save_every=3, out=out / f"{stage}.pt")
        run(module, flags[stage])
    return flags


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_batches_of_many_shapes_compile_nothing_after_the_first_steps(
    flags, tmp_path, monkeypatch, stage
):
    """Each graph is noted with the number of steps that were logged before it.

    Those after the last step are of the reward model's calibration, which samples answers.
    """
    log, before = tmp_path / "compiled.jsonl", []

    def backend(graph, inputs):
        before.append(log.read_text().count("\n") if log.exists() else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train.device, "compiling", False)  # so again after this test
    train.device.compiled_version.cache_clear()
    torch._dynamo.reset()
    every = "log_every" if stage == "ppo" else "eval_every"
    changes = {every: 1, "steps": 12, "compile": True, "out": log.with_suffix(".pt")}
    if stage == "ppo":  # long enough for some answers to end in the first steps
        changes["max_new_tokens"] = 64
    # without this it would continue uncompiled
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run(STAGES[stage], flags[stage] | changes)
    during = [n_logged for n_logged in before if n_logged < changes["steps"]]
    assert during and max(during) <= 4


def test_each_prompt_is_labelled_once_before_any_is_labelled_twice(flags):
    prompts, pairs = read_jsonl(flags["ppo"]["data"]), read_jsonl(flags["reward"]["data"])
    times = Counter(pair["messages"][0]["content"] for pair in pairs)
    # a question may stand there more than once
    written = Counter(prompt["messages"][0]["content"] for prompt in prompts)
    rounds = math.ceil(300 / len(prompts))
    assert len(pairs) > 100
    assert all(n <= rounds * written[question] for question, n in times.items())


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_writes_a_checkpoint_and_a_finite_log(flags, stage):
    path = flags[stage]["out"]
    content = torch.load(path, weights_only=True)
    assert content["stage"] == stage
    assert content["made_by"]["config"]["steps"] == 8
    log = records(path)
    assert log[-1]["step"] == 8
    assert all(math.isfinite(value) for record in log for value in record.values())
    assert not any(state.exists() for state in state_paths(path))


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_file(flags, stage, capsys):
    path = flags[stage]["out"]
    before = path.read_bytes()
    run(STAGES[stage], flags[stage])
    assert path.read_bytes() == before
    printed = capsys.readouterr().out
    assert "parameters" in printed and "device cpu" in printed


def test_the_initial_loss_is_that_of_guessing(flags, capsys):
    run(pretrain, flags["base"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("initial loss")]
    initial, log_vocabulary = float(line.split()[2].rstrip(",")), float(line.split()[-1])
    assert abs(initial - log_vocabulary) < 0.1


def test_another_seed_gives_another_file(flags, tmp_path):
    run(sft, flags["sft"] | dict(seed=4, out=tmp_path / "sft.pt"))
    one, other = weights(tmp_path / "sft.pt"), weights(flags["sft"]["out"])
    assert not torch.equal(one["embed.weight"], other["embed.weight"])


# ---- Ctrl-C and --resume


def press_ctrl_c(monkeypatch, module, last, times=1):
    """In the last-th step Ctrl-C is pressed, so many times."""
    real, calls = module.lr_factor, []

    def lr_factor(*args, **options):  # every stage passes here once a step
        calls.append(args)
        if len(calls) == last:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(module, "lr_factor", lr_factor)


LAST_STEPS = [("base", 2), ("sft", 4), ("reward", 5), ("ppo", 4), ("dpo", 5), ("grpo", 4)]


@pytest.mark.parametrize("stage, last", LAST_STEPS)
def test_an_interrupted_and_resumed_run_ends_bit_identical(
    flags, stage, last, tmp_path, monkeypatch
):
    module, uninterrupted = STAGES[stage], flags[stage]["out"]
    mine = flags[stage] | dict(out=tmp_path / f"{stage}.pt")
    press_ctrl_c(monkeypatch, module, last)
    with pytest.raises(SystemExit, match=f"stopped after step {last} of 8.*--resume"):
        run(module, mine)
    assert not mine["out"].exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(module, mine | dict(resume=True))
    assert is_same(mine["out"], uninterrupted)
    steps = [record["step"] for record in records(mine["out"])]
    assert steps == [record["step"] for record in records(uninterrupted)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_ctrl_c_gets_through_at_once_and_the_state_before_it_is_intact(
    flags, stage, tmp_path, monkeypatch
):
    module, mine = STAGES[stage], flags[stage] | dict(out=tmp_path / f"{stage}.pt")
    mine["out"].write_text("the result of an earlier run")
    press_ctrl_c(monkeypatch, module, 5, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(module, mine)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert mine["out"].read_text() == "the result of an earlier run"
    newest, previous = state_paths(mine["out"])
    assert read_torch(newest)["step"] == 3 and not previous.exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stage}.pt",
        f"{stage}.jsonl",
        f"{stage}.pt.resume",
    }
    run(module, mine | dict(resume=True))
    assert is_same(mine["out"], flags[stage]["out"])


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_left_to_a_handler_that_is_not_pythons_own(flags, stage, tmp_path, monkeypatch):
    """Such as a debugger's, which stops at the next line and leaves the run as it is."""
    caught = []

    def debugger(signum, frame):
        caught.append(signum)

    module, mine = STAGES[stage], flags[stage] | dict(out=tmp_path / f"{stage}.pt")
    press_ctrl_c(monkeypatch, module, 3)
    before = signal.signal(signal.SIGINT, debugger)
    try:
        run(module, mine)
        assert signal.getsignal(signal.SIGINT) is debugger
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]
    assert is_same(mine["out"], flags[stage]["out"])


def test_resuming_with_other_settings_is_refused(flags, tmp_path, monkeypatch):
    mine = flags["sft"] | dict(out=tmp_path / "sft.pt")
    press_ctrl_c(monkeypatch, sft, 1)
    with pytest.raises(SystemExit):
        run(sft, mine)
    with pytest.raises(SystemExit, match="another --lr"):
        run(sft, mine | dict(resume=True, lr=1.0))


# ---- Python functions as the reward


def test_a_python_function_can_be_the_reward(flags, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = flags["ppo"] | dict(reward="my_rewards:brevity", out=tmp_path / "ppo.pt", steps=2)
    run(ppo, mine)
    assert records(mine["out"])[0]["val_score"] < -1


def test_a_reward_function_that_asks_for_conversations_gets_them_whole(
    flags, tmp_path, monkeypatch
):
    """System message and earlier turns included; one that does not ask gets last messages only."""
    (tmp_path / "talkative.py").write_text(
        "got = []\n\n\n"
        "def with_them(prompts, responses, conversations):\n"
        "    got.append((prompts, responses, conversations))\n"
        "    return [0.5] * len(responses)\n\n\n"
        "def without_them(prompts, responses, **others):\n"
        "    got.append((prompts, responses, others))\n"
        "    return [0.5] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    written = []
    for i in range(24):
        turns = [
            dict(role="system", content=f"Be brief, {i}."),
            dict(role="user", content=f"Who is {i}?"),
            dict(role="assistant", content="A number."),
            dict(role="user", content=f"Which one is {i}?"),
        ]
        written.append(turns[i % 2 :] if i % 3 else turns[3:])  # with all, some, or one of them
    write_jsonl(tmp_path / "prompts.jsonl", [{"messages": messages} for messages in written])
    mine = flags["ppo"] | dict(data=tmp_path / "prompts.jsonl", out=tmp_path / "ppo.pt", steps=2)
    calls = {}
    for name in ("with_them", "without_them"):
        run(ppo, mine | dict(reward=f"talkative:{name}"))
        calls[name] = list(sys.modules["talkative"].got)
        sys.modules["talkative"].got.clear()

    seen = []
    for prompts, responses, conversations in calls["with_them"]:
        assert len(prompts) == len(responses) == len(conversations)
        assert prompts == [messages[-1]["content"] for messages in conversations]
        seen += conversations
    assert all(messages in written for messages in seen)
    assert {len(messages) for messages in seen} == {1, 3, 4}
    assert [(p, r) for p, r, _ in calls["with_them"]] == [
        (p, r) for p, r, _ in calls["without_them"]
    ]
    assert all(others == {} for _, _, others in calls["without_them"])


# ---- the report


def test_the_report_is_written_with_all_stages_and_with_some(flags, tmp_path, capsys):
    out, people = flags["base"]["out"].parent, tmp_path / "people.jsonl"
    everybody, few = read_jsonl(flags["base"]["data"] / "people.jsonl"), []
    for role in ("quiz", "rl", "test", "unknown_test"):
        few += [person for person in everybody if person["role"] == role][:8]
    write_jsonl(people, few)
    for stage in ("base", "sft", "reward", "ppo"):  # other tests ran them again, out of their order
        (out / f"{stage}.pt").touch()
    run(report, dict(out=out, data=people, device="cpu"))
    assert "| PPO:" in (out / "report.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "credit"))
    (tmp_path / "base.pt").write_bytes((out / "base.pt").read_bytes())
    run(report, dict(out=tmp_path, data=people, device="cpu"))
    assert "| PPO:" not in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit, match="beyond the limits: recall"):
        run(report, dict(out=tmp_path, data=people, device="cpu", check=True))


# ---- what is held out, what is trained on


@pytest.mark.parametrize(
    "fraction, size, n_val",
    [(0, 0, 0), (0.1, 0, 5), (0.101, 0, 6), (0.001, 0, 1), (0, 1, 1), (0, 7, 7)],
)
def test_the_last_records_are_held_out_a_fraction_or_a_number_of_them(fraction, size, n_val):
    train, val = hold_out(list(range(50)), fraction=fraction, size=size)
    assert train + val == list(range(50)) and len(val) == n_val


@pytest.mark.parametrize("wrong", [dict(fraction=-0.1), dict(fraction=1.0), dict(size=50)])
def test_holding_out_nothing_sensible_is_refused(wrong):
    (value,) = wrong.values()
    line = f"^error: {value} of 50 records cannot be held out; hold out fewer$"
    with pytest.raises(SystemExit, match=line):
        hold_out(list(range(50)), **wrong)


@pytest.mark.parametrize(
    "stage, flag, value",
    [
        ("sft", "val_fraction", 0.13),
        ("reward", "val_fraction", 0.13),
        ("dpo", "val_fraction", 0.13),
        ("ppo", "val_size", 8),
    ],
)
def test_nothing_is_learned_from_what_is_held_out_and_that_is_the_files_end(
    flags, stage, flag, value, tmp_path
):
    """The last 8 of 60: others in their place change no weight, another before them does."""
    lines = flags[stage]["data"].read_text().splitlines()[:60]
    swapped_last, swapped_first = lines[:52] + lines[:8], [lines[-1]] + lines[1:]
    outs = []
    for i, content in enumerate((lines, swapped_last, swapped_first)):
        data, out = tmp_path / f"{i}.jsonl", tmp_path / f"out{i}.pt"
        data.write_text("\n".join(content))
        run(STAGES[stage], flags[stage] | {"data": data, "out": out, flag: value, "steps": 7})
        outs.append(out)
    assert [is_same(out, outs[0]) for out in outs] == [True, True, False]


def test_batches_cover_each_row_once_an_epoch():
    batches = Batches(list(range(50)), 8, 0, "data.jsonl")
    first = sorted(row for step in range(len(batches)) for row in batches[step])
    assert len(first) == len(set(first)) == 48
    again = Batches(list(range(50)), 8, 0, "data.jsonl")
    assert again[7] == batches[7] and again[2] == batches[2]  # any order of asking
