"""Which rows a step gets, in which order and parts, and the tensors that they become."""

import itertools
from typing import NamedTuple

import pytest
import tiny
import torch

from data.examples import Example
from train import batches
from train.batches import Batches, collate, in_parts, micro_batches, pad_rows, split

SIZE = 4


class Row(NamedTuple):
    line: int


def rows_and_lengths(n):
    """n rows, and lengths from 0 to n - 1 in another order."""
    return [Row(line) for line in range(1, n + 1)], [7 * i % n for i in range(n)]


def epoch_of(n, seed=0, epoch=0):
    """The lengths in each batch of an epoch, [[…] of SIZE]."""
    rows, lengths = rows_and_lengths(n)
    all_batches = Batches(rows, SIZE, seed, "data.jsonl", lengths)
    steps = range(epoch * len(all_batches), (epoch + 1) * len(all_batches))
    return [[lengths[row.line - 1] for row in all_batches[step]] for step in steps]


def test_rows_of_like_length_stand_together_and_their_batches_in_any_order():
    """Up to 16 batches are sorted as a whole: a batch has neighbours in length."""
    found = epoch_of(64)
    assert sorted(map(sorted, found)) == [list(range(i, i + SIZE)) for i in range(0, 64, SIZE)]
    assert sorted(found) != found


def test_beyond_16_batches_only_those_of_a_chunk_are_sorted():
    """So batches differ between epochs, and still hold rows of like length."""
    first, second = epoch_of(400), epoch_of(400, epoch=1)
    for batch in first:
        assert max(batch) - min(batch) < 120
    ranges = sorted((min(batch), max(batch)) for batch in first)
    overlapping = sum(low < high for (_, high), (low, _) in itertools.pairwise(ranges))
    assert overlapping > 50  # one chunk's batches lie between another's
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    assert epoch_of(400, seed=1) != first


def test_an_incomplete_batch_is_left_out_and_another_one_each_epoch():
    left_out = set()
    for epoch in range(30):
        lengths = sum(epoch_of(11, epoch=epoch), [])
        assert len(lengths) == len(set(lengths)) == 8
        left_out |= set(range(11)) - set(lengths)
    assert left_out == set(range(11))


def test_without_lengths_rows_stand_in_random_order():
    rows, _ = rows_and_lengths(64)
    all_batches, lines = Batches(rows, SIZE, 0, "data.jsonl"), []
    for step in range(16):
        lines += [row.line for row in all_batches[step]]
    assert sorted(lines) == list(range(1, 65)) and lines != sorted(lines)


def test_the_source_of_a_step_names_its_lines():
    rows, lengths = rows_and_lengths(20)
    of = Batches(rows, SIZE, 0, "some/data.jsonl", lengths)
    lines = sorted(row.line for row in of[3])
    assert of.source(3) == f"some/data.jsonl, lines {lines}"


def test_as_many_rows_as_a_batch_are_enough_and_one_less_is_not():
    rows, _ = rows_and_lengths(SIZE)
    assert len(Batches(rows, SIZE, 0, "x")) == 1
    line = "^error: data.jsonl: 3 records to train on are fewer than --batch_size 4$"
    with pytest.raises(SystemExit, match=line):
        Batches(rows[1:], SIZE, 0, "data.jsonl")


def test_fewer_held_out_records_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(batches.parallel, "size", 3)
    with pytest.raises(SystemExit, match="2 held-out records cannot be split over 3 processes"):
        batches.hold_out(list(range(9)), size=2)
    assert batches.hold_out(list(range(9)), size=3)[1] == [6, 7, 8]
    assert batches.hold_out(list(range(9)))[1] == []


@pytest.mark.parametrize(
    "size, parts", [(0, [[1, 2, 3, 4, 5]]), (2, [[1, 2], [3, 4], [5]]), (9, [[1, 2, 3, 4, 5]])]
)
def test_parts_hold_all_rows_in_order(size, parts):
    assert split([1, 2, 3, 4, 5], size) == parts == micro_batches([1, 2, 3, 4, 5], size)


def test_in_parts_is_the_function_of_the_whole():
    tokens, mask = torch.arange(15).view(5, 3), torch.arange(15).view(5, 3) % 2 == 0

    def function(model, tokens, mask, factor):
        return (tokens * mask).sum(1) * factor + model

    for size in (0, 1, 2, 5, 8):
        assert torch.equal(
            in_parts(function, size, 7, tokens, mask, 10), function(7, tokens, mask, 10)
        )


def test_at_once_go_the_rows_of_a_forward_pass(monkeypatch):
    class Config(NamedTuple):
        batch_size: int = 12
        micro_batch_size: int = 0

    assert batches.rows_at_once(Config()) == 12
    assert batches.rows_at_once(Config(micro_batch_size=5)) == 5
    monkeypatch.setattr(batches.parallel, "size", 3)
    assert batches.rows_at_once(Config()) == 4


@pytest.mark.parametrize("longest, columns", [(1, 8), (8, 8), (9, 16), (17, 24)])
def test_rows_are_padded_on_the_right_to_a_multiple_of_8(longest, columns):
    padded = pad_rows([list(range(1, longest + 1)), [5]], 77, tiny.CPU)
    assert padded.tolist() == [
        [*range(1, longest + 1)] + [77] * (columns - longest),
        [5] + [77] * (columns - 1),
    ]


def test_examples_become_tokens_and_a_mask_that_is_false_on_the_pads():
    tokens, mask = collate([Example([3, 4, 5], [0, 1, 1], 1), Example([6], [1], 2)], 9, tiny.CPU)
    assert tokens.tolist() == [[3, 4, 5, 9, 9, 9, 9, 9], [6, 9, 9, 9, 9, 9, 9, 9]]
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
