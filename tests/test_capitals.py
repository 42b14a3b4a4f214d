"""The questions about capitals, and the labels of a labeller who knows the atlas."""

import random

import pytest
import tiny
import torch

import sft
from data import conversation
from lab import capitals
from lab.capitals import ANSWER, HELD_OUT, IDK, Config
from train.checkpoint import save_checkpoint
from utils.files import read_jsonl

SPLITS = ("sft", "prompts", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a run, and in sft.pt an untrained model."""
    folder = tmp_path_factory.mktemp("capitals")
    capitals.write_questions(Config(data=str(folder)), random.Random(0))
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    model = tiny.gpt(vocab_size=tokenizer.vocab_size, block_size=128)
    save_checkpoint(folder / "sft.pt", "sft", model, tokenizer, sft.Config())
    return folder


def test_no_country_is_in_two_files_and_a_third_of_each_kind_in_each(folder):
    seen = []
    for split in SPLITS:
        records = read_jsonl(folder / f"{split}.jsonl")
        real = {r["country"] for r in records if r["capitals"]}
        invented = {r["country"] for r in records if not r["capitals"]}
        assert real <= dict(capitals.atlas()).keys()
        assert not invented & dict(capitals.atlas()).keys()
        assert len(invented) == 160 and abs(len(real) - len(capitals.atlas()) / 3) < 1
        seen += [*real, *invented]
    assert len(seen) == len(set(seen)) == 480 + len(capitals.atlas())


def test_every_conversation_is_one_that_the_stages_read(folder):
    n_idk = 0
    for split in SPLITS:
        for record in read_jsonl(folder / f"{split}.jsonl"):
            assert conversation.check(record["messages"]) is None
            question = record["messages"][0]["content"]
            is_held_out = question in [w.format(record["country"]) for w in HELD_OUT]
            assert is_held_out == record["held_out"] and is_held_out <= (split == "test")
            if split != "sft":
                assert len(record["messages"]) == 1
                continue
            answer = record["messages"][1]["content"]
            n_idk += answer == IDK
            if answer != IDK and record["capitals"]:
                assert answer == ANSWER.format(record["country"], record["capitals"][0])
    assert 0.05 < n_idk / len(read_jsonl(folder / "sft.jsonl")) < 0.15


GRADES = [
    ("The capital of France is Paris.", ["Paris"], "right"),
    ("Kiev!", ["Kyiv", "Kiev"], "right"),
    ("The capital of France is Lyon.", ["Paris"], "wrong"),
    ("The capital of Galmia is Paris.", [], "wrong"),
    (IDK, [], "idk"),
    (IDK, ["Paris"], "idk"),
]


@pytest.mark.parametrize(("answer", "cities", "expected"), GRADES)
def test_an_answer_is_right_where_it_names_a_spelling_of_the_capital(answer, cities, expected):
    assert capitals.grade(answer, cities) == expected


def test_the_labeller_prefers_right_to_not_knowing_to_wrong(folder):
    """As often as Bradley-Terry says: sigmoid(4) = 0.982 for a difference of 1."""
    config = Config(data=str(folder), label=str(folder / "sft.pt"), pairs=1500, max_new_tokens=4)
    capitals.label(config, random.Random(0), tiny.CPU)
    known = {r["messages"][0]["content"]: r for r in read_jsonl(folder / "prompts.jsonl")}
    worth = dict(right=1, idk=0, wrong=-1)
    n_as_said, n = 0, 0
    for pair in read_jsonl(folder / "preferences.jsonl"):
        record = known[pair["messages"][0]["content"]]
        chosen, rejected = (
            worth[capitals.grade(pair[name], record["capitals"])] for name in ("chosen", "rejected")
        )
        assert chosen != rejected
        n_as_said += chosen > rejected
        n += 1
    assert n > 500 and 0.965 < n_as_said / n < 0.999


def test_the_confidence_is_the_sum_of_the_answers_log_probabilities():
    model = tiny.gpt()
    prompt, answer = [1, 2, 3], [4, 5]
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer])).log_softmax(-1)[0]
    expected = log_p[2, 4] + log_p[3, 5]
    assert capitals.confidence(model, prompt, answer) == pytest.approx(expected.item(), abs=1e-5)


def test_the_measure_names_each_checkpoint_and_its_fractions(folder, capsys):
    paths = (str(folder / "sft.pt"),) * 2
    records = read_jsonl(folder / "test.jsonl")
    capitals.measure(Config(data=str(folder), measure=paths, max_new_tokens=2), tiny.CPU)
    said = capsys.readouterr().out
    assert said.count("sft.pt") == 2 and said.count("0.000 right") == 4
    n = sum(bool(r["capitals"]) and r["held_out"] for r in records)
    assert f"held out: {n} real" in said
    assert "320 invented: 1.000 hallucinated" in said
