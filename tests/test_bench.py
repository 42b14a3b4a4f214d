"""The benchmark runs from end to end and reports every row. No test asserts how fast it is."""

import re
import sys

import numpy as np
import pytest
from tiny import byte_tokenizer

from bench import run
from utils.files import write_text


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """out/bench.md of the tiny sizes, with a text of 2000 characters and without TRL."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer()
    write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    ids = np.array(tokenizer.encode("To be, or not to be: " * 100), tokenizer.id_type)
    for name in ("train", "val"):
        ids.tofile(folder / f"{name}.bin")
    flags = ["--quick", "--device", "cpu", "--repetitions", "1"]
    paths = ["--shakespeare", str(folder), "--out", str(folder / "out.md")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *flags, *paths])
        run.main()
    assert (folder / "out-cpu.png").stat().st_size > 10_000
    return (folder / "out.md").read_text(encoding="utf-8")


def table(text):
    """The cells of a table's rows, without its head."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def number(cell):
    return float(re.match(r"[*]*([\d.,]+)", cell)[1].replace(",", ""))


KINDS = ["pretraining", "pretraining", "attention", "tiny Shakespeare"] + ["generation"] * 3


def test_the_report_has_every_row_with_positive_figures_and_their_ratio(report):
    rows = table(report.split("###")[0])
    assert [row[0][: len(kind)] for row, kind in zip(rows, KINDS, strict=True)] == KINDS
    for _, _, ours, theirs, ratio, _, _ in rows:
        ours, theirs, ratio = number(ours), number(theirs), number(ratio)
        assert min(ours, theirs, ratio) > 0
        ratios = theirs / ours, ours / theirs  # of seconds, of tokens a second
        assert any(ratio == pytest.approx(x, rel=0.1) for x in ratios)


def test_what_is_left_out_is_named_with_the_flag_that_it_needs(report):
    assert "- PPO: left out, --trl_python is not given" in report


AXES = ["n_embd", "n_layer", "T", "vocab_size", "cache", "batch", "new_tokens"]


def test_growth_tables_have_their_points_and_the_loss_keeps_one_float32_copy_of_logits(report):
    tables = re.split(r"^### ", report, flags=re.M)[1:]
    assert [text.split("\n")[0].split(" against ")[1] for text in tables] == AXES
    for text in tables:
        rows = [list(map(number, row)) for row in table(text)]
        assert len(rows) == 2 and all(x > 0 for row in rows for x in row)
        if len(rows[0]) > 2:
            assert all(kept == 1 for _, _, _, kept, _ in rows)
