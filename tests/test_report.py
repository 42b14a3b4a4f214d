"""The report where stages are missing, were run again, or have not ended: nothing of another run is in it."""

import os
import shutil

import pytest
import tiny
import torch

import common
import evaluate
import sft
from data import world
from model import GPT, GPTConfig
from tests.test_stages import run

CHAIN = ["base", "sft", "reward", "ppo"]
EPISODE = dict(prompt="<|user|>Who?<|end|><|assistant|>", score=1.5, tokens=["$A", "$b"], columns=dict(advantage=[-0.5, 2.0], value=[0.0, 1.0]))
LOGS = {  # figures that the report shows, and that are in no other log
    "base": [dict(step=1, train_loss=2.0, val_loss=2.5), dict(step=2, train_loss=1.0, val_loss=1.5)],
    "sft": [dict(step=1, train_loss=0.5, val_loss=0.6)],
    "reward": [dict(step=1, train_loss=0.7, val_accuracy=0.8764, val_accuracy_se=0.01)],
    "ppo": [dict(step=0, val_score=0.11, val_score_se=0.03, val_kl_ref=0.0), dict(step=5, score=1.0, score_se=0.1, kl_ref=2.0),
            dict(step=9, val_score=4.321, val_score_se=0.04, val_kl_ref=3.0)],
}  # fmt: skip
FIGURES = {"base": "bare question", "sft": "- After SFT", "reward": "87.6%", "ppo": "4.321"}  # what tells that a stage is in the report


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the checkpoints and logs of a chain that ran in order, of untrained models."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    for stage in CHAIN:
        made_by = dict(episodes=[EPISODE, EPISODE]) if stage == "ppo" else {}
        common.save_checkpoint(folder / f"{stage}.pt", stage, tiny.critic(model) if stage == "reward" else model, tokenizer, sft.Config(), **made_by)
        common.write_jsonl(folder / f"{stage}.jsonl", LOGS[stage])
    rng, people = world.random.Random(0), world.People(0)
    for role in ("quiz", "test", "unknown_test"):
        for _ in range(3):
            people.draw(rng, role)
    common.write_jsonl(folder / "people.jsonl", people.drawn)
    return folder


def copied(whole, folder, left_out=()):
    """The whole chain but for some files, each file a second newer than the one before it."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(["people.jsonl"] + [f"{stage}.{end}" for stage in CHAIN for end in ("jsonl", "pt")]):
        if name not in left_out:
            shutil.copy(whole / name, folder / name)
            os.utime(folder / name, (i, i))
    return folder


def report(folder):
    """The report's text without the lines about what is left out, and its pictures."""
    run(evaluate, dict(out=folder, data=folder / "people.jsonl", device="cpu"))
    text = (folder / "report.md").read_text()
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return "\n\n".join(p for p in text.split("\n\n") if not p.startswith("Without ")), pictures


@pytest.mark.parametrize("missing", [[f"{stage}.{end}"] for stage in CHAIN for end in ("pt", "jsonl")])
def test_without_a_file_only_what_it_tells_is_left_out(whole, tmp_path, missing):
    logs, left_out = evaluate.find_stages(copied(whole, tmp_path / "some", missing))
    stage, _, end = missing[0].partition(".")
    assert {s: log for s, log in logs.items() if log} == {s: LOGS[s] for s in CHAIN if s != stage}
    assert (stage in logs) == (end == "jsonl") and len(left_out) == 1 and f"{missing[0]} is missing" in left_out[0]


@pytest.mark.parametrize("again", CHAIN)
def test_what_came_before_a_stage_that_was_run_again_does_not_count(whole, tmp_path, again):
    folder = copied(whole, tmp_path / "all")
    for end in ("jsonl", "pt"):
        os.utime(folder / f"{again}.{end}", (100, 100))
    later = CHAIN[CHAIN.index(again) + 1 :]
    logs, left_out = evaluate.find_stages(folder)
    assert logs == {s: LOGS[s] for s in CHAIN if s not in later}
    assert [f"{s}.pt is older" in line for s, line in zip(later, left_out)] == [True] * len(later) == [True] * len(left_out)


@pytest.mark.parametrize("stage", CHAIN)
def test_the_log_of_a_run_that_has_not_ended_is_not_mixed_with_the_checkpoint_of_the_one_before(whole, tmp_path, stage):
    folder = copied(whole, tmp_path / "all")
    (folder / f"{stage}.jsonl").write_text("")  # as in the first seconds of a run
    logs, left_out = evaluate.find_stages(folder)
    assert logs == {s: LOGS[s] for s in CHAIN} | {stage: []}
    assert len(left_out) == 1 and "has not ended" in left_out[0]


def test_the_report_after_an_older_stage_was_run_again_is_that_of_a_chain_that_ended_there(whole, tmp_path):
    folder = copied(whole, tmp_path / "all")
    text, pictures = report(folder)
    assert all(figure in text for figure in FIGURES.values()) and pictures.keys() == {"curves.png", "credit.png"}
    os.utime(folder / "sft.pt", (100, 100))
    again, never = report(folder), report(copied(whole, tmp_path / "two", ["reward.pt", "reward.jsonl", "ppo.pt", "ppo.jsonl"]))
    assert again == never and again[1].keys() == {"curves.png"} and again[1]["curves.png"] != pictures["curves.png"]
    assert [stage for stage in CHAIN if FIGURES[stage] in again[0]] == ["base", "sft"]


@pytest.mark.parametrize("stages", [["base"], ["sft"], ["ppo"], ["base", "reward"], ["sft", "ppo"]], ids="-".join)
def test_any_stages_alone_make_a_report(whole, tmp_path, stages):
    others = [f"{stage}.{end}" for stage in CHAIN if stage not in stages for end in ("pt", "jsonl")]
    text, _ = report(copied(whole, tmp_path / "some", others))
    assert [stage for stage in CHAIN if FIGURES[stage] in text] == stages


def test_checkpoints_of_two_base_models_are_not_compared(whole, tmp_path):
    folder = copied(whole, tmp_path / "all")
    model, _ = common.load_checkpoint(folder / "sft.pt", ["sft"], GPT, tiny.CPU)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.ranks = dict(reversed(tokenizer.ranks.items()))
    common.save_checkpoint(folder / "ppo.pt", "ppo", model, tokenizer, sft.Config())
    with pytest.raises(SystemExit, match="tokenizers of base, sft, ppo differ"):
        report(folder)
