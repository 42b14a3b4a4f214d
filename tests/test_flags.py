"""Every flag does something: a short run with another value of it ends differently, or is refused.

What a flag should do is tested elsewhere. Here no field of a config is forgotten: one that is in
neither table below fails.
"""

import contextlib
import dataclasses
import io
import json
import signal
import sys

import pytest
import tiny
import torch

import chat
import ppo
import pretrain
import reward
import sft
from forks import dpo, grpo
from train.checkpoint import save_checkpoint

STAGES = dict(pretrain=pretrain, sft=sft, reward=reward, ppo=ppo, dpo=dpo, grpo=grpo)

# Those that change no result, and the tests that watch what they change.
NO_RESULT = {
    "out": "where the result lies: every run here",
    "device": "the machine's: test_bad_input, a name that is none",
    "resume": "the same result after an interruption: test_stages",
    "save_every": "what is there to resume from: test_stages, after the second Ctrl-C",
    "compile": "the same numbers, faster: test_stages, test_attention",
    "micro_batch_size": "the same numbers, in less memory: test_micro_batches",
}

# Another value than that of tiny.stage_flags.
OTHER = {
    "data": "other",  # files of the same names with other content
    "init": "other",
    "reward": "other",
    "steps": 2,
    "batch_size": 4,
    "minibatch_size": 8,
    "epochs": 3,
    "seq_len": 6,
    "block_size": 64,
    "n_layer": 1,
    "n_head": 1,
    "n_kv_head": 2,
    "n_embd": 32,
    "qk_norm": False,
    "lr": 2e-2,
    "muon_lr": 1e-2,
    "weight_decay": 0.5,
    "warmup": 1,
    "val_fraction": 0.6,
    "val_size": 5,
    "logprob_term": False,
    "calibration_size": 9,
    "max_new_tokens": 3,
    "temperature": 0.5,
    "beta": 0.5,
    "kl_target": 1.0,
    "gamma": 0.5,
    "lam": 0.1,
    "clip": 0.01,
    "value_clip": 0.01,
    "value_coef": 2.0,
    "missing_eos_score": -9.0,
    "min_score": -12.0,
    "group_size": 2,
    "divide_by_std": True,
    "eval_every": 2,
    "log_every": 2,
    "seed": 4,
    "show": True,
}
# These change what is logged or kept beside the weights. All others change the weights.
ONLY_SHOWN = {"block_size", "val_size", "eval_every", "log_every", "show"}
TIMES = {"seconds", "tokens_per_s", "rollout_s", "update_s", "episodes_per_s"}

FIELDS = []
for name, module in STAGES.items():
    for field in dataclasses.fields(module.Config):
        if field.name not in NO_RESULT:
            FIELDS.append((name, field.name))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return tiny.stage_flags(tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with files of the same names as those of the flags, and other content."""
    folder = tmp_path_factory.mktemp("other")
    tiny.stage_flags(folder, seed=1)
    return folder


@dataclasses.dataclass
class Outcome:
    weights: dict
    model_config: dict
    log: list
    printed: str


def outcome(stage, flags):
    """What a run writes and prints, without its times; no weights where it wrote no checkpoint."""
    out = flags["out"]
    for path in (out, out.with_suffix(".jsonl")):
        path.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tiny.run(STAGES[stage], flags)
    if not out.exists():
        return Outcome({}, {}, [], printed.getvalue())
    content = torch.load(out, weights_only=True)
    log = []
    for line in out.with_suffix(".jsonl").open():
        record = json.loads(line)
        log.append({name: x for name, x in record.items() if name not in TIMES})
    return Outcome(content["weights"], content["model_config"], log, "")


@pytest.fixture(scope="module")
def default(flags):
    """Each stage's outcome with the flags as they are; the same twice, or nothing follows."""
    outcomes = {stage: outcome(stage, flags[stage]) for stage in STAGES}
    for stage, first in outcomes.items():
        again = outcome(stage, flags[stage])
        assert again.log == first.log and same_weights(again, first)
    return outcomes


def same_weights(one, two):
    if one.weights.keys() != two.weights.keys():
        return False
    return all(torch.equal(x, two.weights[name]) for name, x in one.weights.items())


@pytest.mark.parametrize(("stage", "name"), FIELDS)
def test_another_value_of_a_flag_gives_another_result(flags, other, default, stage, name):
    value = OTHER[name]
    if value == "other":
        before = flags[stage][name]
        value = other / before.name if before.is_file() else other
    its = outcome(stage, flags[stage] | {name: value})
    expected = default[stage]
    if name in ONLY_SHOWN:
        shown = its.log, its.printed, its.model_config
        assert shown != (expected.log, expected.printed, expected.model_config)
    else:
        assert not same_weights(its, expected)


def test_the_tables_name_fields_and_no_field_twice():
    fields = {name for _, name in FIELDS}
    assert fields == OTHER.keys()
    assert not fields & NO_RESULT.keys() and ONLY_SHOWN < fields


# ---- chat


CHAT = dict(
    model="b.pt",
    compare=("a.pt", "b.pt"),
    temperature=0.1,
    top_k=2,
    top_p=0.2,
    max_new_tokens=3,
    raw=True,
    seed=1,
)
CHAT_FIELDS = [f.name for f in dataclasses.fields(chat.Config) if f.name not in NO_RESULT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    for name in ("a.pt", "b.pt"):
        model = tiny.gpt(vocab_size=261, block_size=64)
        save_checkpoint(folder / name, "ppo", model, tiny.byte_tokenizer(), sft.Config())
    return folder


def said(folder, monkeypatch, capsys, **flags):
    """What chat answers to two piped lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nand then?\n")))
    argv = ["chat.py", "--device", "cpu", "--model", "a.pt"]
    for name, value in flags.items():
        argv.append(f"--{name}")
        argv += [] if value is True else value if isinstance(value, tuple) else [str(value)]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    chat.main()
    return capsys.readouterr().out


@pytest.fixture
def own_signals():
    """chat.py leaves Ctrl-C and closed pipes to the system where nobody types."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", CHAT_FIELDS)
def test_another_value_of_chats_flag_gives_another_answer(
    folder, monkeypatch, capsys, own_signals, name
):
    first = said(folder, monkeypatch, capsys)
    assert len(first) > 20 and said(folder, monkeypatch, capsys) == first
    assert said(folder, monkeypatch, capsys, **{name: CHAT[name]}) != first


def test_chats_top_k_0_samples_among_all_tokens(folder, monkeypatch, capsys, own_signals):
    flags = dict(temperature=1.0, top_p=1.0, seed=1)
    of_all = said(folder, monkeypatch, capsys, top_k=0, **flags)
    assert of_all == said(folder, monkeypatch, capsys, top_k=261, **flags)
    assert of_all != said(folder, monkeypatch, capsys, top_k=2, **flags)
