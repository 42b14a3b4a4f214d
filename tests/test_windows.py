"""The windows of the stream that pretraining reads: each token once per epoch, by (seed, step)."""

import random

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import pretrain

seq_lens = st.integers(1, 9)
seeds = st.integers(0, 1000)
n_extra_tokens = st.integers(0, 40)


END = 60_000  # an id that the streams hold only where a test puts it


def windows_of(stream, seq_len, batch_size=1, seed=0):
    return pretrain.Windows(stream, seq_len, batch_size, seed, "train.bin", END)


def stream_of(seq_len, n_extra):
    """The shortest stream and n_extra tokens more; token i has the id i."""
    return np.arange(2 * seq_len + n_extra, dtype=np.uint16)


@given(seq_len=seq_lens, n_extra=n_extra_tokens, seed=seeds)
def test_an_epoch_covers_the_stream_once(seq_len, n_extra, seed):
    """No token is a target twice; those never asked for are fewer than two windows, at the ends.

    A target is the token after its input, and no window reads beyond the stream.
    """
    stream = stream_of(seq_len, n_extra)
    windows = windows_of(stream, seq_len, seed=seed)
    for epoch in range(3):
        targets = []
        for step in range(epoch * windows.n_windows, (epoch + 1) * windows.n_windows):
            inputs, next_ones = pretrain.read_windows(stream, windows[step], seq_len, tiny.CPU)
            assert inputs.shape == next_ones.shape == (1, seq_len)
            assert (next_ones == inputs + 1).all()
            targets += next_ones[0].tolist()
        first = min(targets)
        assert sorted(targets) == list(range(first, first + len(targets)))
        assert 1 <= first <= seq_len
        assert len(stream) - 1 - len(targets) < 2 * seq_len


def test_each_epoch_begins_at_an_offset_and_in_an_order_of_its_own():
    """So over the epochs a window's border falls everywhere."""
    seq_len = 8
    windows = windows_of(stream_of(seq_len, 100), seq_len)
    n = windows.n_windows
    epochs = [[windows[epoch * n + i][0] for i in range(n)] for epoch in range(60)]
    offsets = [min(starts) for starts in epochs]
    assert set(offsets) == set(range(seq_len))
    orders = {tuple(start - min(starts) for start in starts) for starts in epochs}
    assert len(orders) == 60


@given(seq_len=seq_lens, n_extra=n_extra_tokens, batch_size=st.integers(1, 9), seed=seeds)
def test_a_step_reads_the_same_windows_whatever_was_asked_for_before(
    seq_len, n_extra, batch_size, seed
):
    """So a resumed run, and one with another --eval_every, reads on where it would have read."""
    stream = stream_of(seq_len, n_extra)
    in_order = windows_of(stream, seq_len, batch_size, seed)
    expected = [in_order[step].tolist() for step in range(12)]
    in_disorder = windows_of(stream, seq_len, batch_size, seed)
    steps = list(range(12)) * 2
    random.Random(seed).shuffle(steps)
    for step in steps:
        assert in_disorder[step].tolist() == expected[step]
        assert windows_of(stream, seq_len, batch_size, seed)[step].tolist() == expected[step]
        assert str(expected[step]) in in_disorder.source(step)


@given(seq_len=seq_lens, n_extra=n_extra_tokens, batch_size=st.integers(2, 9), seed=seeds)
def test_a_batch_may_span_epochs(seq_len, n_extra, batch_size, seed):
    """The sequences of all steps are one row, whatever the batch size, also above an epoch's."""
    stream = stream_of(seq_len, n_extra)
    one_by_one = windows_of(stream, seq_len, 1, seed)
    batches = windows_of(stream, seq_len, batch_size, seed)
    row = [start for step in range(12) for start in batches[step].tolist()]
    assert row == [one_by_one[i][0] for i in range(12 * batch_size)]
    assert batches[0].shape == (batch_size,)


def test_another_seed_reads_in_another_order():
    stream = stream_of(4, 200)
    first, second = (windows_of(stream, 4, 16, seed)[0].tolist() for seed in (0, 1))
    assert first != second


def test_a_stream_that_holds_no_window_at_some_offset_is_refused():
    """At offset 7 a window of 8 tokens and its last target end with the 16th token."""
    with pytest.raises(SystemExit, match="train.bin: 15 training tokens are too few"):
        windows_of(stream_of(8, -1), 8)
    windows = windows_of(stream_of(8, 0), 8)
    assert windows.n_windows == 1
    assert max(windows[step][0] for step in range(60)) == 7


def test_a_window_begins_at_the_end_token_before_its_document_if_that_is_near():
    """Documents of 3 and of 40 tokens, windows of 8: all but those deep in a long document move."""
    seq_len, lengths = 8, [3, 40, 3, 3, 3, 40] * 4
    stream = np.concatenate([[END] + [1] * length for length in lengths]).astype(np.uint16)
    plain = pretrain.Windows(stream, seq_len, 1, 0, "train.bin", END + 1)  # never moves
    windows = windows_of(stream, seq_len)
    ends = np.flatnonzero(stream == END)
    for step in range(windows.n_windows * 20):
        start, cut = windows[step][0], plain[step][0]
        before = ends[ends <= cut].max()  # the stream begins with one
        assert start == (before if cut - before < seq_len else cut)


def test_over_the_epochs_moved_windows_read_every_token_about_equally_often():
    rng = np.random.default_rng(0)
    seq_len, lengths = 16, rng.integers(1, 6, 400)
    stream = np.concatenate([[END] + [1] * length for length in lengths]).astype(np.uint16)
    windows, counts, n_epochs = windows_of(stream, seq_len), np.zeros(len(stream)), 400
    for step in range(windows.n_windows * n_epochs):
        start = windows[step][0]
        counts[start : start + seq_len] += 1
    inner = counts[2 * seq_len : -3 * seq_len] / n_epochs
    assert abs(inner.mean() - 1) < 0.02
    assert 0.6 < inner.min() and inner.max() < 1.4
