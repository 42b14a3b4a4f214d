"""Stage 1, pretraining: predict the next token of a text. What the model knows, it learns here.

    python pretrain.py                        # the default world, made by python -m world.generate
    python pretrain.py --show                 # print where tokens and documents end, then stop
    python pretrain.py --data out/shakespeare --out out/shakespeare.pt --n_layer 6 --n_embd 384
    torchrun --nproc_per_node=2 pretrain.py   # any stage on 2 GPUs, the batch split over them

--data is a folder with train.bin, val.bin (token ids) and tokenizer.tiktoken. If it holds a
probes.jsonl as well, the loss on what should follow its texts is logged:
    {"name": "recall", "text": "Ada Lovelace was born in", "answer": " London"}

Indexing: targets[:, t] is the token after tokens[:, t], and logits[:, t] predict it.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data.tokenizer
from data.examples import load_probes, load_stream
from model import GPT, GPTConfig, token_logprobs
from train import parallel, show
from train.batches import collate, micro_batches, rows_at_once, split
from train.checkpoint import save_checkpoint
from train.device import autocast, compiled, setup, to_device
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import die, parse_config


@dataclass
class Config:
    data: str = "out/world"  # folder with train.bin, val.bin, tokenizer.tiktoken
    out: str = "out/base.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 3300  # optimizer steps
    batch_size: int = 16  # sequences per step
    micro_batch_size: int = 0  # sequences per forward pass, for small GPUs; 0: all of the batch
    seq_len: int = 128  # tokens per training sequence
    block_size: int = 256  # the model's longest context, for the later stages; at least seq_len
    n_layer: int = 4  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 4  # key/value heads; fewer than n_head: grouped-query attention
    n_embd: int = 192  # width
    qk_norm: bool = True  # RMSNorm on queries and keys (Qwen3): facts are learned sooner
    lr: float = 3e-3  # AdamW's peak learning rate: embedding and norms, or all with --muon_lr 0
    muon_lr: float = 1e-3  # Muon's peak learning rate, for the blocks' matrices; 0: AdamW for all
    weight_decay: float = 0.1  # on matrices (GPT-3)
    warmup: int = 100  # steps to the peak
    eval_every: int = 250  # steps between validation losses
    save_every: int = 500  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # weights and batch order
    show: bool = False  # print windows of the first batch and exit


VAL_WINDOWS = 256  # of the validation losses on the way; the last one covers all of val.bin


# ---- batches


class Windows:
    """windows[step]: where the step's windows begin in the stream, (B,).

    An epoch cuts the stream into windows of seq_len tokens, from an offset of its own, and
    shuffles them. A window reads one token more, its last target. With seq_len 3 and offset 1:

        stream     0 1 2 3 4 5 6 7 8 9 10 11
        windows     [1 2 3]                     last target 4
                          [4 5 6]               last target 7
                                [7 8 9]         last target 10

    A window that would begin within a document begins at the separator before it instead, unless
    that is a window or more away. Cut off from its text, a question teaches guessing, not reading.
    """

    def __init__(self, stream, seq_len, batch_size, seed, path, separator):
        self.stream, self.separator = stream, separator
        self.n_windows = len(stream) // seq_len - 1  # so many fit at each offset below seq_len
        if self.n_windows < 1:
            die(f"{path}: {len(stream)} training tokens are too few for --seq_len {seq_len}")
        self.seq_len, self.batch_size, self.seed, self.path = seq_len, batch_size, seed, path
        self.epoch = None

    def __getitem__(self, step):
        first = step * self.batch_size
        return np.array([self.start(i) for i in range(first, first + self.batch_size)])

    def start(self, i):
        """Where the i-th window of the run begins."""
        epoch, i = divmod(i, self.n_windows)
        if epoch != self.epoch:  # once per epoch: permuting 1e9 tokens' windows takes 18 ms
            rng = np.random.default_rng((self.seed, epoch))
            self.offset = rng.integers(self.seq_len)
            self.order = rng.permutation(self.n_windows)
            self.epoch = epoch
        cut = self.offset + self.order[i] * self.seq_len
        first = max(cut + 1 - self.seq_len, 0)
        near = np.flatnonzero(self.stream[first : cut + 1] == self.separator)
        return first + near[-1] if len(near) else cut

    def source(self, step):
        """Where the step's text came from, for the line that says what made a loss NaN."""
        return f"{self.path}, {self.seq_len} tokens from each of {self[step].tolist()}"


def read_windows(stream, starts, seq_len, device):
    """tokens and targets, (B, T) each: targets[:, t] is the token after tokens[:, t]."""
    windows = np.stack([stream[start : start + seq_len + 1] for start in starts])  # (B, T+1)
    windows = to_device(torch.from_numpy(windows.astype(np.int64)), device)
    return windows[:, :-1], windows[:, 1:]


# ---- the loss


@compiled
def next_token_loss(model, tokens, targets):
    """-log p(target), the mean over all tokens, in nats."""
    logits = model(tokens)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model, stream, seq_len, device, size, max_windows=None):
    """Mean loss in nats per token over windows side by side from the stream's beginning on."""
    starts = np.arange(0, len(stream) - seq_len, seq_len)[:max_windows]
    total = 0.0
    for part in split(starts, size):
        tokens, targets = read_windows(stream, part, seq_len, device)
        with autocast(device):
            total += next_token_loss(model, tokens, targets).item() * len(tokens)
    return total / len(starts)


@torch.no_grad()
def probe_losses(model, probes, pad, device, size):
    """{"<name>_loss": -log p(answer) in nats, the mean over the name's examples}."""
    losses = {}
    for name, examples in probes.items():
        total = 0.0
        for part in split(examples, size):
            tokens, mask = collate(part, pad, device)  # (B, T+1) each
            with autocast(device):
                logits = model(tokens[:, :-1])  # (B, T, V)
            logprobs = token_logprobs(logits, tokens[:, 1:])  # (B, T)
            total -= (logprobs * mask[:, 1:]).sum().item()
        losses[f"{name}_loss"] = total / len(examples)
    return losses


# ---- the model's beginning and end


def model_length(config):
    """The model's longest context; later stages pad to multiples of 8."""
    return 8 * math.ceil(max(config.seq_len, config.block_size) / 8)


def make_model(config, tokenizer):
    sizes = ("n_layer", "n_head", "n_kv_head", "n_embd", "qk_norm")
    sizes = {name: getattr(config, name) for name in sizes}
    sizes["block_size"] = model_length(config)
    try:
        return GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    except (ValueError, RuntimeError) as e:  # RuntimeError: no memory for so large a model
        die(str(e).splitlines()[0])


@torch.no_grad()
def reinit_unseen_embeddings(model, stream):
    """Fresh embeddings for ids that the text never holds, above all the chat tokens.

    Training only pushes them out of the softmax, all the same way: <|user|> and <|assistant|>
    end at cosine 0.9997, and SFT cannot tell them apart. The fresh ones spread like the others,
    at half the size: they are output rows as well (tied), and larger ones would be sampled.
    """
    weight = model.embed.weight  # (padded vocabulary, C)
    counts = np.zeros(len(weight), np.int64)
    for i in range(0, len(stream), 10**7):
        counts += np.bincount(stream[i : i + 10**7], minlength=len(weight))
    seen = torch.from_numpy(counts > 0).to(weight.device)  # (padded vocabulary,)
    weight[~seen] = torch.randn_like(weight[~seen]) * weight[seen].std() / 2


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)
    T = config.seq_len

    # data
    tokenizer = data.tokenizer.load(Path(config.data) / "tokenizer.tiktoken")
    train = load_stream(config.data, "train", tokenizer, T)
    val = load_stream(config.data, "val", tokenizer, T)
    path = f"{config.data}/train.bin"
    windows = Windows(train, T, config.batch_size, config.seed, path, tokenizer.separator)
    probes = load_probes(config.data, tokenizer, model_length(config))
    if config.show:
        return show.stream(read_windows(train, windows[0], T, device)[0], tokenizer)

    # model and optimizers
    model = make_model(config, tokenizer).to(device)
    optimizers = make_optimizers(model, config.lr, config.muon_lr, config.weight_decay)
    print(f"{model.n_params():,} parameters, {len(train):,} tokens in {config.data}")

    size, guessing = rows_at_once(config), math.log(tokenizer.vocab_size)
    initial = validate(model, val, T, device, size, VAL_WINDOWS)
    print(f"initial loss {initial:.3f}, ln(vocabulary) = {guessing:.3f}")

    run = Run(config, config.steps, [model], optimizers, windows)
    for step in run:
        # forward and backward
        loss_sum = 0.0
        for starts in micro_batches(windows[step], config.micro_batch_size):
            tokens, targets = read_windows(train, starts, T, device)  # (B, T) each
            with autocast(device):
                loss = next_token_loss(model, tokens, targets)
            loss = loss * (len(starts) / config.batch_size)  # the batch's mean, part by part
            loss.backward()
            loss_sum += loss.detach()

        # update
        factor = lr_factor(step, config.steps, config.warmup)
        grad_norm = optimizer_step(model, optimizers, factor)
        run.watch(grad_norm)

        # log
        if run.is_due(step, config.eval_every):
            train_loss = parallel.all_reduce_sum(loss_sum).item()
            max_windows = None if step + 1 == config.steps else VAL_WINDOWS
            val_loss = validate(model, val, T, device, size, max_windows)
            metrics = dict(train_loss=train_loss, val_loss=val_loss, grad_norm=grad_norm.item())
            metrics |= probe_losses(model, probes, tokenizer.pad, device, size)
            n_tokens = (step + 1 - run.first_step) * config.batch_size * T
            run.log(step + 1, **metrics, tokens_per_s=round(n_tokens / run.seconds()))

    # checkpoint
    reinit_unseen_embeddings(model, train)
    save_checkpoint(config.out, "base", model, tokenizer, config)


if __name__ == "__main__":
    main()
