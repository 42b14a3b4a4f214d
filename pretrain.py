"""Stage 1, pretraining: predict the next token of a stream of text. What the model knows, it learns here.

    python pretrain.py                                   # the default world, made by python -m data.world
    python pretrain.py --data data/shakespeare --out out/shakespeare.pt --n_layer 6 --n_embd 384
    torchrun --nproc_per_node=2 pretrain.py              # on 2 GPUs, the same batch split over them; so for every stage
    python pretrain.py --show                            # the stream with its borders, then stop

--data is a folder with train.bin, val.bin (token ids, uint16 or uint32) and tokenizer.tiktoken.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data.tokenizer
import loop
import parallel
import show
from model import GPT, GPTConfig


@dataclass
class Config:
    data: str = "data/world"  # folder with train.bin, val.bin, tokenizer.tiktoken
    out: str = "out/base.pt"  # checkpoint to write
    resume: str = ""  # go on with an interrupted run: from <out>.resume, or with "previous" from the state before
    steps: int = 3300  # optimizer steps
    batch_size: int = 16  # sequences a step
    accumulate: int = 1  # split a step's batch into this many parts, for GPUs that cannot hold it at once
    block_size: int = 128  # tokens a sequence in training
    context: int = 256  # longest sequence the model can be used with later
    n_layer: int = 4  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 4  # key/value heads; fewer than n_head: grouped-query attention
    n_embd: int = 192  # width
    qk_norm: bool = False  # RMSNorm on queries and keys (Qwen3)
    lr: float = 3e-3  # AdamW's peak learning rate: embedding and norms, or everything with --muon_lr 0
    muon_lr: float = 2e-3  # Muon's peak learning rate, for the blocks' matrices; 0: AdamW for all
    weight_decay: float = 0.1  # on matrices (GPT-3)
    warmup: int = 100  # steps to the peak
    eval_every: int = 250  # steps between validation losses
    save_every: int = 500  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the step: pays on CUDA, not on CPU
    seed: int = 0  # weights and batch order
    show: bool = False  # print windows of the first batch and exit; writes nothing


def load_stream(folder, name, tokenizer):
    """Token ids of <folder>/<name>.bin, memory-mapped: (N,)."""
    path = Path(folder) / f"{name}.bin"
    if not path.exists():
        common.die(f"{path}: no such file; `python -m data.world` or `python -m data.fetch` makes it")
    if path.stat().st_size == 0 or path.stat().st_size % tokenizer.id_type.itemsize:
        common.die(f"{path}: {path.stat().st_size} bytes are no whole number of {tokenizer.id_type} ids; make it again")
    stream = np.memmap(path, tokenizer.id_type, mode="r")
    if stream.max() >= tokenizer.vocab_size:
        common.die(f"{path}: holds id {stream.max()}, the tokenizer has {tokenizer.vocab_size}; both must come from one run")
    return stream


def window_starts(n_tokens, batch_size, block_size, step, seed):
    """Where the step's sequences begin: (B,). Each epoch cuts the stream at another offset and shuffles the pieces."""
    n_windows = (n_tokens - 1) // block_size - 1  # one less, so that an offset fits
    order = np.arange(step * batch_size, (step + 1) * batch_size)
    starts = np.empty(batch_size, np.int64)
    for epoch in np.unique(order // n_windows):
        rng = np.random.default_rng((seed, epoch))
        offset, permutation = rng.integers(block_size), rng.permutation(n_windows)
        here = order // n_windows == epoch
        starts[here] = offset + permutation[order[here] % n_windows] * block_size
    return starts


def read_windows(stream, starts, block_size, device):
    """tokens and targets, each (B, T); targets[:, t] is the token after tokens[:, t]."""
    windows = torch.from_numpy(np.stack([stream[s : s + block_size + 1] for s in starts]).astype(np.int64))  # (B, T+1)
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def next_token_loss(model, tokens, targets):
    """Mean cross-entropy in nats a token."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())  # (B, T, V) -> (B*T, V)


@torch.no_grad()
def validate(model, stream, block_size, device, max_windows):
    """Mean loss in nats a token over the split, from its start, each token predicted once."""
    starts = np.arange(0, len(stream) - block_size, block_size)[:max_windows]
    total = 0.0
    for i in range(0, len(starts), 64):
        tokens, targets = read_windows(stream, starts[i : i + 64], block_size, device)
        with common.autocast(device):
            total += next_token_loss(model, tokens, targets).item() * len(tokens)
    return total / len(starts)


@torch.no_grad()
def renew_unseen(model, stream):
    """Fresh embeddings, as widely spread as the trained ones, for ids that the text never holds: the chat tokens above all.

    Training only ever pushes them out of the softmax, all alike (cosine 0.9997 between <|user|> and <|assistant|>):
    SFT could hardly tell them apart, and people it never asked about were answered 6% right instead of 62%.
    """
    weight = model.embed.weight  # (padded vocabulary, C)
    counts = sum(np.bincount(stream[i : i + 10**7], minlength=len(weight)) for i in range(0, len(stream), 10**7))
    seen = torch.from_numpy(counts > 0).to(weight.device)  # (padded vocabulary,)
    weight[~seen] = torch.randn_like(weight[~seen]) * weight[seen].std()


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    tokenizer = data.tokenizer.load(Path(config.data) / "tokenizer.tiktoken")
    train = load_stream(config.data, "train", tokenizer)
    val = load_stream(config.data, "val", tokenizer)
    T = config.block_size
    if len(val) <= T or len(train) <= 2 * T:
        common.die(f"{config.data}: {len(train)} training and {len(val)} validation tokens are too few for --block_size {T}")
    n_parts = config.accumulate * parallel.size
    if config.batch_size % n_parts:
        processes = f" x {parallel.size} processes" * (parallel.size > 1)
        common.die(f"--accumulate {config.accumulate}{processes} does not divide --batch_size {config.batch_size}")
    if config.show:
        starts = window_starts(len(train), config.batch_size, T, 0, config.seed)
        return show.stream(read_windows(train, starts, T, device)[0], tokenizer)

    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "qk_norm")}
    try:
        context = 8 * math.ceil(max(T, config.context) / 8)  # later stages pad their batches to multiples of 8
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=context, **sizes)).to(device)
    except (ValueError, RuntimeError) as e:  # RuntimeError: no memory for so large a model
        common.die(str(e).splitlines()[0])
    if config.compile:
        model.compile()
    optimizers = common.make_optimizers(model, config.lr, config.muon_lr, config.weight_decay)
    print(f"{model.n_params():,} parameters, {config.batch_size * T:,} tokens a step, {len(train):,} tokens in {config.data}")

    def source(step):
        starts = window_starts(len(train), config.batch_size, T, step, config.seed)
        return f"{config.data}/train.bin, {T} tokens from each of {starts.tolist()}"

    log = loop.Log(config.out, source)
    parts = {"model": model} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    start, losses = time.time(), []
    for step in loop.train_steps(config, config.steps, parts, log):
        starts = window_starts(len(train), config.batch_size, T, step, config.seed)
        for part in np.split(parallel.mine(starts), config.accumulate):
            tokens, targets = read_windows(train, part, T, device)  # (B, T) each
            with common.autocast(device):
                loss = next_token_loss(model, tokens, targets) / n_parts
            loss.backward()
            losses.append(loss.detach())
        factor = common.lr_factor(step, config.steps, config.warmup)
        grad_norm = common.optimizer_step(model, optimizers, factor)

        if step == 0:
            print(f"initial loss {parallel.total(sum(losses)).item():.3f}, ln(vocabulary) = {math.log(tokenizer.vocab_size):.3f}")
        last = step + 1 == config.steps
        if last or (step + 1) % config.eval_every == 0:
            n_steps = len(losses) / config.accumulate  # since the last log line; a step's losses add up to its mean
            train_loss = parallel.total(torch.stack(losses).sum()).item() / n_steps
            speed = n_steps * config.batch_size * T / (time.time() - start)
            val_loss = validate(model, val, T, device, None if last else 256)
            log(step + 1, train_loss=train_loss, val_loss=val_loss, grad_norm=grad_norm.item(), tokens_per_s=round(speed))
            start, losses = time.time(), []
    renew_unseen(model, train)
    common.save_checkpoint(config.out, "base", model, tokenizer, config)


if __name__ == "__main__":
    main()
