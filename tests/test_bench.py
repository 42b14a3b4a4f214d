"""The benchmark runs from end to end and reports every row. How fast anything is, no test asserts."""

import re
import sys

import numpy as np
import pytest
from tiny import byte_tokenizer

import common
from bench import run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """out/bench.md of the tiny sizes, with a text of 2000 characters and without TRL."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer()
    common.write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    ids = np.array(tokenizer.encode("To be, or not to be: " * 100), tokenizer.id_type)
    for name in ("train", "val"):
        ids.tofile(folder / f"{name}.bin")
    old, flags = sys.argv, ["--quick", "--device", "cpu", "--repetitions", "1", "--shakespeare", str(folder)]
    sys.argv = ["run.py", *flags, "--out", str(folder / "out.md")]
    try:
        run.main()
    finally:
        sys.argv = old
    assert (folder / "out-cpu.png").stat().st_size > 10_000
    return (folder / "out.md").read_text(encoding="utf-8")


def table(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def test_the_report_has_every_row_with_positive_figures_and_their_ratio(report):
    rows = table(report.split("###")[0])
    kinds = ("pretraining", "pretraining", "attention", "tiny Shakespeare", "generation", "generation", "generation")
    assert [row[0][: len(kind)] for row, kind in zip(rows, kinds, strict=True)] == list(kinds)
    for _, _, ours, theirs, ratio, _, _ in rows:
        ours, theirs, ratio = (float(re.match(r"[*]*([\d.,]+)", cell)[1].replace(",", "")) for cell in (ours, theirs, ratio))
        assert min(ours, theirs, ratio) > 0
        assert ratio == pytest.approx(theirs / ours, rel=0.1) or ratio == pytest.approx(ours / theirs, rel=0.1)


def test_what_is_left_out_is_named_with_the_flag_that_it_needs(report):
    assert "- PPO: left out, --trl_python is not given" in report


def test_every_growth_table_has_its_points_and_the_loss_keeps_one_float32_copy_of_the_logits(report):
    tables = re.split(r"^### ", report, flags=re.M)[1:]
    assert [t.split("\n")[0].split(" against ")[1] for t in tables] == [
        "width", "depth", "T", "vocabulary", "tokens in the cache, batch 32", "batch", "new tokens",
    ]  # fmt: skip
    for text in tables:
        rows = [list(map(float, row)) for row in table(text)]
        assert len(rows) == 2 and all(x > 0 for row in rows for x in row)
        if len(rows[0]) > 2:
            assert all(kept == 1 for _, _, _, kept, _ in rows)
