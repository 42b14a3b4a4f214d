"""The report where stages are missing, ran again, or have not ended: no other run is in it."""

import os
import random
import shutil

import pytest
import tiny
import torch
from tiny import run

import sft
from lab import report as lab_report
from lab.report import find_stages
from model import GPT, GPTConfig
from train.checkpoint import load_checkpoint, save_checkpoint
from utils.files import write_jsonl
from world.generate import People

CHAIN = ["base", "sft", "reward", "ppo"]
EPISODE = dict(
    prompt="<|user|>Who?<|end|><|assistant|>",
    score=1.5,
    tokens=["$A", "$b"],
    columns=dict(advantage=[-0.5, 2.0], value=[0.0, 1.0]),
)
LOGS = {  # figures that the report shows, and that are in no other log
    "base": [
        dict(step=1, train_loss=2.0, val_loss=2.5),
        dict(step=2, train_loss=1.0, val_loss=1.5),
    ],
    "sft": [dict(step=1, train_loss=0.5, val_loss=0.6)],
    "reward": [dict(step=1, train_loss=0.7, val_accuracy=0.8764, val_accuracy_se=0.01)],
    "ppo": [
        dict(step=0, val_score=0.11, val_score_se=0.03, val_kl_ref=0.0),
        dict(step=5, score=1.0, score_se=0.1, kl_ref=2.0),
        dict(step=9, val_score=4.321, val_score_se=0.04, val_kl_ref=3.0),
    ],
}
# what tells that a stage is in the report
FIGURES = {"base": "bare question", "sft": "## 3. SFT draws", "reward": "87.6%", "ppo": "4.321"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the checkpoints and logs of a chain that ran in order, of untrained models."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    sizes = dict(block_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    policy = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    for stage in CHAIN:
        made_by = dict(episodes=[EPISODE, EPISODE]) if stage == "ppo" else {}
        model = tiny.critic(policy) if stage == "reward" else policy
        save_checkpoint(folder / f"{stage}.pt", stage, model, tokenizer, sft.Config(), **made_by)
        write_jsonl(folder / f"{stage}.jsonl", LOGS[stage])
    rng, people = random.Random(0), People(0)
    for role in ("quiz", "rl", "test", "unknown_test"):
        for _ in range(3):
            people.draw(rng, role)
    write_jsonl(folder / "people.jsonl", people.drawn)
    return folder


def copied(whole, folder, left_out=()):
    """The whole chain but for some files, each file a second newer than the one before it."""
    folder.mkdir(exist_ok=True)
    names = ["people.jsonl"] + [f"{stage}.{end}" for stage in CHAIN for end in ("jsonl", "pt")]
    for i, name in enumerate(names):
        if name not in left_out:
            shutil.copy(whole / name, folder / name)
            os.utime(folder / name, (i, i))
    return folder


def report(folder):
    """The report's text without the lines about what is left out, and its pictures."""
    run(lab_report, dict(out=folder, data=folder / "people.jsonl", device="cpu"))
    text = (folder / "report.md").read_text()
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    paragraphs = [p for p in text.split("\n\n") if not p.startswith("Without ")]
    return "\n\n".join(paragraphs), pictures


@pytest.mark.parametrize("end", ["pt", "jsonl"])
@pytest.mark.parametrize("stage", CHAIN)
def test_without_a_file_only_what_it_tells_is_left_out(whole, tmp_path, stage, end):
    missing = f"{stage}.{end}"
    logs, left_out = find_stages(copied(whole, tmp_path / "some", [missing]))
    assert {s: log for s, log in logs.items() if log} == {s: LOGS[s] for s in CHAIN if s != stage}
    assert (stage in logs) == (end == "jsonl")
    assert len(left_out) == 1 and f"{missing} is missing" in left_out[0]


@pytest.mark.parametrize("again", CHAIN)
def test_what_came_before_a_stage_that_was_run_again_does_not_count(whole, tmp_path, again):
    folder = copied(whole, tmp_path / "all")
    for end in ("jsonl", "pt"):
        os.utime(folder / f"{again}.{end}", (100, 100))
    later = CHAIN[CHAIN.index(again) + 1 :]
    logs, left_out = find_stages(folder)
    assert logs == {s: LOGS[s] for s in CHAIN if s not in later}
    assert len(left_out) == len(later)
    assert all(f"{s}.pt is older" in line for s, line in zip(later, left_out))


@pytest.mark.parametrize("stage", CHAIN)
def test_the_log_of_a_running_stage_is_not_mixed_with_an_earlier_checkpoint(whole, tmp_path, stage):
    folder = copied(whole, tmp_path / "all")
    (folder / f"{stage}.jsonl").write_text("")  # as in the first seconds of a run
    logs, left_out = find_stages(folder)
    assert logs == {s: LOGS[s] for s in CHAIN} | {stage: []}
    assert len(left_out) == 1 and "has not ended" in left_out[0]


def test_after_an_older_stage_ran_again_the_report_is_that_of_a_chain_that_ended_there(
    whole, tmp_path
):
    folder = copied(whole, tmp_path / "all")
    text, pictures = report(folder)
    assert all(figure in text for figure in FIGURES.values())
    assert pictures.keys() == {"curves.png", "credit.png"}
    os.utime(folder / "sft.pt", (100, 100))
    again = report(folder)
    later = ["reward.pt", "reward.jsonl", "ppo.pt", "ppo.jsonl"]
    assert again == report(copied(whole, tmp_path / "two", later))
    assert again[1].keys() == {"curves.png"}
    assert again[1]["curves.png"] != pictures["curves.png"]
    assert [stage for stage in CHAIN if FIGURES[stage] in again[0]] == ["base", "sft"]


@pytest.mark.parametrize(
    "stages", [["base"], ["sft"], ["ppo"], ["base", "reward"], ["sft", "ppo"]], ids="-".join
)
def test_any_stages_alone_make_a_report(whole, tmp_path, stages):
    others = [stage for stage in CHAIN if stage not in stages]
    files = [f"{stage}.{end}" for stage in others for end in ("pt", "jsonl")]
    text, _ = report(copied(whole, tmp_path / "some", files))
    assert [stage for stage in CHAIN if FIGURES[stage] in text] == stages


def test_checkpoints_of_two_base_models_are_not_compared(whole, tmp_path):
    folder = copied(whole, tmp_path / "all")
    model, _ = load_checkpoint(folder / "sft.pt", ["sft"], GPT, tiny.CPU)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.ranks = dict(reversed(tokenizer.ranks.items()))
    save_checkpoint(folder / "ppo.pt", "ppo", model, tokenizer, sft.Config())
    with pytest.raises(SystemExit, match="tokenizers of base, sft, ppo differ"):
        report(folder)


# ---- limits


def test_each_figure_has_its_limit_on_the_right_side():
    at_limit = lab_report.FLOORS | lab_report.CEILINGS
    assert lab_report.missed_limits(at_limit) == []
    for limits, beyond in (lab_report.FLOORS, -0.001), (lab_report.CEILINGS, 0.001):
        for name, limit in limits.items():
            [missed] = lab_report.missed_limits(at_limit | {name: limit + beyond})
            assert missed.startswith(f"{name} ")
            [missing] = lab_report.missed_limits({k: v for k, v in at_limit.items() if k != name})
            assert missing.startswith(f"{name} nan")
