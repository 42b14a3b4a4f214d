"""Stage 2, supervised fine-tuning: the same next-token loss, on the assistant's answers only.

    python sft.py                                                   # the default world, from out/base.pt
    python sft.py --init out/base.pt --data mine.jsonl --out out/mine.pt
    python sft.py --show                                            # conversations and what of them trains, then stop

--data holds {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} a line.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import loop
import parallel
import show
from data import conversation
from model import GPT


@dataclass
class Config:
    init: str = "out/base.pt"  # checkpoint to start from
    data: str = "data/world/sft.jsonl"  # conversations, one a line
    out: str = "out/sft.pt"  # checkpoint to write
    resume: str = ""  # go on with an interrupted run: from <out>.resume, or with "previous" from the state before
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes; a second one teaches who was asked about, and the rest are taken for unknown
    batch_size: int = 24  # conversations a step
    lr: float = 3e-4  # peak learning rate, a tenth of pretraining's; at 5e-4 runs differ widely
    weight_decay: float = 0.0  # short runs need none
    warmup: int = 20  # steps to the peak
    val_share: float = 0.02  # share of the conversations, the file's last, held out for the validation loss; from 1 on: how many
    eval_every: int = 10  # steps between validation losses
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the step: pays on CUDA, not on CPU
    seed: int = 0  # batch order
    show: bool = False  # print conversations of the first batch and exit; writes nothing


def load_examples(path, tokenizer, block_size):
    """[(tokens, mask)] of the conversations, cut at block_size; one whose answer does not fit at all is left out."""

    def problem(record):
        messages = record.get("messages")
        if wrong := conversation.check(messages):
            return wrong
        if messages[-1]["role"] != "assistant":
            return "the conversation must end in an assistant message"

    examples = []
    for record in common.read_jsonl(path, problem):
        tokens, mask = conversation.render(record["messages"], tokenizer)
        examples.append(common.Row(record.line, tokens[:block_size], mask[:block_size]))
    kept = [e for e in examples if any(e[1])]
    if not kept:
        common.die(f"{path}: no answer begins within {block_size} tokens; use a model with a longer --context")
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} conversations whose answer begins beyond {block_size} tokens")
    return kept


def collate(examples, pad, device):
    """[(tokens, mask)] -> tokens, targets (B, T) and mask (B, T): True where the target trains.

    targets[:, t] is the token after tokens[:, t], and mask[:, t] belongs to that target.
    """
    tokens = common.pad_rows([tokens for tokens, _ in examples], pad, device)  # (B, T+1)
    mask = common.pad_rows([mask for _, mask in examples], 0, device).bool()  # (B, T+1)
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def masked_loss(logits, targets, mask):
    """Mean cross-entropy over the targets that train: logits (B, T, V), targets and mask (B, T)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B*T,)
    return (losses * mask.flatten()).sum() / mask.sum()


@torch.no_grad()
def validate(model, examples, pad, device):
    """Mean loss over the answers' tokens."""
    total, count = 0.0, 0
    for i in range(0, len(examples), 64):
        tokens, targets, mask = collate(examples[i : i + 64], pad, device)
        with common.autocast(device):
            total += masked_loss(model(tokens), targets, mask).item() * mask.sum().item()
        count += mask.sum().item()
    return total / count


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    model, tokenizer = common.load_checkpoint(config.init, ["base", "sft", "ppo"], GPT, device)
    if config.compile:
        model.compile()
    examples = load_examples(config.data, tokenizer, model.config.block_size)
    train, val = common.hold_out(examples, config.val_share)
    if len(train) < config.batch_size:
        common.die(f"{config.data}: {len(train)} conversations to train on are fewer than --batch_size {config.batch_size}")
    batches = common.Batches([mask.count(0) for _, mask in train], config.batch_size, config.seed)
    if config.show:
        return show.conversations(*collate([train[i] for i in batches[0]], tokenizer.pad, device), tokenizer)
    steps = config.steps or config.epochs * len(batches)
    optimizers = common.make_optimizers(model, config.lr, weight_decay=config.weight_decay)
    print(f"{model.n_params():,} parameters, {len(train):,} + {len(val)} conversations, {steps} steps of {config.batch_size}")
    if val:
        print(f"initial validation loss {validate(model, val, tokenizer.pad, device):.3f}")

    log = loop.Log(config.out, lambda step: f"{config.data}, lines {sorted(train[i].line for i in batches[step])}")
    parts = {"model": model} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    for step in loop.train_steps(config, steps, parts, log):
        tokens, targets, mask = collate([train[i] for i in batches[step]], tokenizer.pad, device)  # (B, T) each
        with common.autocast(device):
            mine = parallel.mine(mask)
            share = mine.sum() / mask.sum()  # of the tokens that train
            loss = masked_loss(model(parallel.mine(tokens)), parallel.mine(targets), mine) * share
        loss.backward()
        grad_norm = common.optimizer_step(model, optimizers, common.lr_factor(step, steps, config.warmup))

        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            val_loss = {"val_loss": validate(model, val, tokenizer.pad, device)} if val else {}
            shares = dict(trained=mask.float().mean().item(), non_pad=(tokens != tokenizer.pad).float().mean().item())  # of the batch
            log(step + 1, train_loss=parallel.total(loss).item(), **val_loss, grad_norm=grad_norm.item(), **shares)
    common.save_checkpoint(config.out, "sft", model, tokenizer, config)


if __name__ == "__main__":
    main()
