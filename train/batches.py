"""Which rows a step trains on, a pure function of (seed, step), and how they become a tensor."""

import math

import numpy as np
import torch

from train import parallel
from train.device import to_device
from utils.cli import die


def hold_out(rows, fraction=0.0, size=0):
    """(train, val): val is the last fraction of the rows, rounded up, or the last size of them."""
    n_train = len(rows) - (size or math.ceil(fraction * len(rows)))
    if not 0 < n_train <= len(rows):
        die(f"{size or fraction} of {len(rows)} records cannot be held out; hold out fewer")
    if 0 < size < parallel.size:
        die(f"{size} held-out records cannot be split over {parallel.size} processes")
    return rows[:n_train], rows[n_train:]


class Batches:
    """batches[step]: the rows of a step, those of like length together so that pads are few.

    rows have a .line, their line in the file path. An epoch is shuffled, sorted by lengths within
    chunks of 16 batches, then its batches are shuffled. An incomplete last batch is left out.

    Lengths are those of the prompts. Sorted by the answers' lengths, a batch would hold one kind
    of answer, and the last batches would tip the balance between the kinds: 65% of held-out pairs
    ordered right by a reward model, instead of 70%.
    """

    def __init__(self, rows, batch_size, seed, path, lengths=None):
        if len(rows) < batch_size:
            die(f"{path}: {len(rows)} records to train on are fewer than --batch_size {batch_size}")
        self.rows, self.batch_size, self.seed, self.path = rows, batch_size, seed, path
        self.lengths = np.zeros(len(rows), int) if lengths is None else np.asarray(lengths)
        self.epoch = None

    def __len__(self):
        """Batches per epoch."""
        return len(self.rows) // self.batch_size

    def __getitem__(self, step):
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.shuffle(epoch)
        return [self.rows[row] for row in self.order[i]]

    def shuffle(self, epoch):
        """The epoch's indices of rows: (batches, batch_size)."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.rows))[: len(self) * self.batch_size]
        chunk = 16 * self.batch_size
        for start in range(0, len(order), chunk):
            rows = order[start : start + chunk]
            order[start : start + chunk] = rows[np.argsort(self.lengths[rows], kind="stable")]
        return rng.permutation(order.reshape(-1, self.batch_size))

    def source(self, step):
        """Where the step's rows came from, for the line that says what made a loss NaN."""
        return f"{self.path}, lines {sorted(row.line for row in self[step])}"


def split(rows, size):
    """The rows in parts of `size`, the last one maybe shorter; 0: in one part."""
    size = size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def micro_batches(rows, size):
    """This process's share of a step's rows, in parts of `size` rows; 0: in one part."""
    return split(parallel.shard(rows), size)


def in_parts(function, size, model, tokens, mask, *more):
    """function(model, tokens, mask, *more), for parts of `size` rows: (B, ..)."""
    parts = zip(split(tokens, size), split(mask, size))
    return torch.cat([function(model, *part, *more) for part in parts])


def rows_at_once(config):
    """The rows in a forward pass of a step; validation takes no more, or would need more memory."""
    return config.micro_batch_size or config.batch_size // parallel.size


def pad_rows(rows, pad, device):
    """Lists of ids -> (B, T), padded on the right to a multiple of 8, so that few shapes occur."""
    T = 8 * math.ceil(max(map(len, rows)) / 8)
    return to_device(torch.tensor([list(row) + [pad] * (T - len(row)) for row in rows]), device)


def collate(examples, pad, device):
    """Examples -> tokens (B, T) and mask (B, T), True on the answers, padded on the right."""
    tokens = pad_rows([example.tokens for example in examples], pad, device)
    mask = pad_rows([example.mask for example in examples], 0, device).bool()
    return tokens, mask
