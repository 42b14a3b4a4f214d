"""Every stage from end to end on a tiny world: what it writes, that it repeats itself exactly, that it resumes exactly."""

import functools
import json
import math
import os
import signal
import sys
from collections import Counter

import pytest
import torch

import common
import evaluate
import ppo
import pretrain
import reward
import sft
from data import label, world

STAGES = {"base": pretrain, "sft": sft, "reward": reward, "ppo": ppo}


def run(module, flags):
    """The module's main with {flag: value} as its command line."""
    argv = [f"{module.__name__}.py"]
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    old, sys.argv = sys.argv, argv
    try:
        module.main()
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: its flags} for a chain of a few seconds, run once: checkpoints and logs lie at --out."""
    folder = tmp_path_factory.mktemp("chain")
    data, out = folder / "world", folder / "out"
    run(world, dict(out=data, documents=400, vocab_size=500, prompts=200))
    common_flags = dict(device="cpu", seed=3, save_every=3)
    flags = {
        "base": dict(data=data, steps=8, batch_size=4, block_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, warmup=2, eval_every=4),
        "sft": dict(init=out / "base.pt", data=data / "sft.jsonl", steps=8, batch_size=8, eval_every=4),
        "reward": dict(init=out / "sft.pt", data=data / "preferences.jsonl", steps=8, batch_size=8, eval_every=4, calibration=16),
        "ppo": dict(init=out / "sft.pt", reward=out / "reward.pt", data=data / "prompts.jsonl", steps=8, batch_size=8, minibatch_size=4,
                    epochs=2, val_prompts=8, log_every=4, kl_target=1.0),
    }  # fmt: skip
    for stage, module in STAGES.items():
        if stage == "reward":
            run(label, dict(init=out / "sft.pt", data=data, out=data / "preferences.jsonl", pairs=300, device="cpu"))
        flags[stage] |= common_flags | dict(out=out / f"{stage}.pt")
        run(module, flags[stage])
    return flags


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_batches_of_many_shapes_compile_nothing_after_the_first_steps(flags, tmp_path, monkeypatch, stage):
    """Each graph is noted with the number of steps that were logged before it."""
    log, before = tmp_path / "compiled.jsonl", []

    def backend(graph, inputs):
        before.append(log.read_text().count("\n") if log.exists() else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    every = "log_every" if stage == "ppo" else "eval_every"
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # it would go on uncompiled
        run(STAGES[stage], flags[stage] | {every: 1, "steps": 12, "compile": True, "out": log.with_suffix(".pt")})
    assert before and max(before) <= 4


def test_each_prompt_is_labelled_once_before_any_is_labelled_twice(flags):
    prompts = common.read_jsonl(flags["ppo"]["data"], lambda r: None)
    pairs = common.read_jsonl(flags["reward"]["data"], lambda r: None)
    times = Counter(pair["messages"][0]["content"] for pair in pairs)
    written = Counter(prompt["messages"][0]["content"] for prompt in prompts)  # a question may stand there more than once
    assert len(pairs) > 100 and all(n <= math.ceil(300 / len(prompts)) * written[question] for question, n in times.items())


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_writes_a_checkpoint_and_a_finite_log(flags, stage):
    path = flags[stage]["out"]
    content = torch.load(path, weights_only=True)
    assert content["stage"] == stage
    assert content["made_by"]["config"]["steps"] == 8
    records = [json.loads(line) for line in path.with_suffix(".jsonl").open()]
    assert records[-1]["step"] == 8
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert not path.with_name(path.name + ".resume").exists()


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
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("initial loss"))
    initial, log_vocabulary = float(line.split()[2].rstrip(",")), float(line.split()[-1])
    assert abs(initial - log_vocabulary) < 0.1


def test_another_seed_gives_another_file(flags, tmp_path):
    run(sft, flags["sft"] | dict(seed=4, out=tmp_path / "sft.pt"))
    weights = [torch.load(p, weights_only=True)["weights"]["embed.weight"] for p in (tmp_path / "sft.pt", flags["sft"]["out"])]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("stage, last", [("base", 2), ("sft", 4), ("reward", 5), ("ppo", 4)])
def test_an_interrupted_and_resumed_run_ends_bit_identical(flags, stage, last, tmp_path, monkeypatch):
    module, uninterrupted = STAGES[stage], torch.load(flags[stage]["out"], weights_only=True)["weights"]
    mine = flags[stage] | dict(out=tmp_path / f"{stage}.pt")
    real, calls = common.lr_factor, []

    def interrupting(*args):  # stands where every stage passes once a step
        calls.append(args)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(common, "lr_factor", interrupting)
    with pytest.raises(SystemExit, match=f"stopped after step {last} of 8.*--resume"):
        run(module, mine)
    assert not mine["out"].exists()
    run(module, mine | dict(resume=True))
    resumed = torch.load(mine["out"], weights_only=True)["weights"]
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    steps = [json.loads(line)["step"] for line in mine["out"].with_suffix(".jsonl").open()]
    assert steps == [json.loads(line)["step"] for line in flags[stage]["out"].with_suffix(".jsonl").open()]


def test_resuming_with_other_settings_is_refused(flags, tmp_path, monkeypatch):
    mine = flags["sft"] | dict(out=tmp_path / "sft.pt")
    monkeypatch.setattr(common, "lr_factor", lambda *args: os.kill(os.getpid(), signal.SIGINT) or 1.0)
    with pytest.raises(SystemExit):
        run(sft, mine)
    with pytest.raises(SystemExit, match="another --lr"):
        run(sft, mine | dict(resume=True, lr=1.0))


def test_a_python_function_can_be_the_reward(flags, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def brevity(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    run(ppo, flags["ppo"] | dict(reward="my_rewards:brevity", out=tmp_path / "ppo.pt", steps=2))
    records = [json.loads(line) for line in (tmp_path / "ppo.jsonl").open()]
    assert records[0]["val_score"] < -1


def test_the_report_is_written_with_all_stages_and_with_some(flags, tmp_path, capsys):
    out, people = flags["base"]["out"].parent, tmp_path / "people.jsonl"
    everybody = common.read_jsonl(flags["base"]["data"] / "people.jsonl", lambda p: None)
    few = [p for role in ("quiz", "test", "unknown_test") for p in [p for p in everybody if p["role"] == role][:8]]
    common.write_jsonl(people, few)
    for stage in STAGES:  # other tests ran them again, out of their order
        (out / f"{stage}.pt").touch()
    run(evaluate, dict(out=out, data=people, device="cpu"))
    report = (out / "report.md").read_text()
    assert "| PPO:" in report and all((out / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "credit"))
    (tmp_path / "base.pt").write_bytes((out / "base.pt").read_bytes())
    run(evaluate, dict(out=tmp_path, data=people, device="cpu"))
    assert "| PPO:" not in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit, match="below the floors"):
        run(evaluate, dict(out=tmp_path, data=people, device="cpu", check=True))


@pytest.mark.parametrize("share, n_val", [(0, 0), (0.1, 5), (0.101, 6), (0.001, 1), (1, 1), (7, 7)])
def test_the_last_records_are_held_out_a_share_or_a_number_of_them(share, n_val):
    train, val = common.hold_out(list(range(50)), share)
    assert train + val == list(range(50)) and len(val) == n_val


@pytest.mark.parametrize("share", [-0.1, 50])
def test_holding_out_nothing_sensible_is_refused(share):
    with pytest.raises(SystemExit, match=f"{share} cannot be held out of 50 records"):
        common.hold_out(list(range(50)), share)


@pytest.mark.parametrize("stage, flag", [("sft", "val_share"), ("reward", "val_share"), ("ppo", "val_prompts")])
def test_nothing_is_learned_from_what_is_held_out_and_that_is_the_files_end(flags, stage, flag, tmp_path):
    """Other records at the file's end change no weight, another record before them does."""
    lines = flags[stage]["data"].read_text().splitlines()[:60]
    swapped_last, swapped_first = lines[:52] + lines[:8], [lines[-1]] + lines[1:]
    weights = []
    for i, content in enumerate((lines, swapped_last, swapped_first)):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(content))
        run(STAGES[stage], flags[stage] | {"data": tmp_path / f"{i}.jsonl", "out": tmp_path / f"out{i}.pt", flag: 8, "steps": 7})
        weights.append(torch.load(tmp_path / f"out{i}.pt", weights_only=True)["weights"])
    same = [all(torch.equal(w[name], weights[0][name]) for name in w) for w in weights]
    assert same == [True, True, False]


def test_common_batches_cover_each_row_once_an_epoch():
    batches = common.Batches(list(range(50)), 8, seed=0)
    first = sorted(i for step in range(len(batches)) for i in batches[step])
    assert len(first) == len(set(first)) == 48
    again = common.Batches(list(range(50)), 8, seed=0)
    assert (again[7] == batches[7]).all() and (again[2] == batches[2]).all()  # any order of asking
