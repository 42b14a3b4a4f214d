"""Stage 2, supervised fine-tuning: the same next-token loss, on the assistant's answers only.

    python sft.py                       # the default world, from out/base.pt
    python sft.py --show                # print conversations and which tokens train, then stop
    python sft.py --init out/base.pt --data mine.jsonl --out out/mine.pt

--data holds one conversation a line:
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Indexing: targets[:, t] is the token after tokens[:, t]; mask[:, t] says whether it trains.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.examples import load_conversations
from model import GPT
from train import parallel, show
from train.batches import Batches, collate, hold_out, micro_batches, rows_at_once, split
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from train.device import autocast, compiled, setup
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import parse_config


@dataclass
class Config:
    init: str = "out/base.pt"  # checkpoint to start from
    data: str = "out/world/sft.jsonl"  # conversations, one a line
    out: str = "out/sft.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes; in a second one the model memorizes the people it is asked about
    batch_size: int = 12  # conversations per step
    micro_batch_size: int = 0  # conversations per forward pass, for small GPUs; 0: all of the batch
    lr: float = 2e-4  # peak learning rate; higher ones cost facts, lower ones learn no forms
    weight_decay: float = 0.0  # short runs need none
    warmup: int = 20  # steps to the peak
    val_fraction: float = 0.02  # of the conversations, held out from the end of the file
    eval_every: int = 10  # steps between validation losses
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # batch order
    show: bool = False  # print conversations of the first batch and exit


def inputs_and_targets(examples, pad, device):
    """Examples -> tokens, targets and mask, (B, T) each."""
    tokens, mask = collate(examples, pad, device)  # (B, T+1) each
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def masked_loss(logits, targets, mask):
    """-log p(target), the mean over the targets that train, in nats.

    logits (B, T, V), targets (B, T), mask (B, T)
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B*T,)
    return (losses * mask.flatten()).sum() / mask.sum()


@compiled
def answer_loss(model, tokens, targets, mask):
    return masked_loss(model(tokens), targets, mask)


@torch.no_grad()
def validate(model, examples, pad, device, size):
    """{"val_loss": mean loss over all the answers' tokens}, or {} without examples."""
    if not examples:
        return {}
    total, count = 0.0, 0
    for part in split(examples, size):
        tokens, targets, mask = inputs_and_targets(part, pad, device)  # (B, T) each
        with autocast(device):
            loss = answer_loss(model, tokens, targets, mask)
        total += loss.item() * mask.sum().item()
        count += mask.sum().item()
    return {"val_loss": total / count}


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)

    # model and data
    model, tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
    examples = load_conversations(config.data, tokenizer, model.config.block_size)
    train, val = hold_out(examples, config.val_fraction)
    prompt_lengths = [example.prompt_length for example in train]
    batches = Batches(train, config.batch_size, config.seed, config.data, prompt_lengths)
    if config.show:
        return show.conversations(*collate(batches[0], tokenizer.pad, device), tokenizer)

    # optimizers
    steps = config.steps or config.epochs * len(batches)
    optimizers = make_optimizers(model, config.lr, weight_decay=config.weight_decay)
    print(f"{model.n_params():,} parameters, {len(train):,} + {len(val)} conversations")

    run = Run(config, steps, [model], optimizers, batches)
    size = rows_at_once(config)
    for name, value in validate(model, val, tokenizer.pad, device, size).items():
        print(f"{name} {value:.3f} at step {run.first_step}")
    for step in run:
        # forward and backward
        batch = batches[step]
        n_trained = sum(sum(example.mask) for example in batch)  # targets of the whole step
        loss_sum = 0.0
        for micro in micro_batches(batch, config.micro_batch_size):
            tokens, targets, mask = inputs_and_targets(micro, tokenizer.pad, device)  # (B, T) each
            with autocast(device):
                loss = answer_loss(model, tokens, targets, mask)
            loss = loss * (mask.sum() / n_trained)  # the batch's mean, part by part
            loss.backward()
            loss_sum += loss.detach()

        # update
        grad_norm = optimizer_step(model, optimizers, lr_factor(step, steps, config.warmup))
        run.watch(grad_norm)

        # log
        if run.is_due(step, config.eval_every):
            run.log(
                step + 1,
                train_loss=parallel.all_reduce_sum(loss_sum).item(),
                **validate(model, val, tokenizer.pad, device, size),
                grad_norm=grad_norm.item(),
            )

    # checkpoint
    save_checkpoint(config.out, "sft", model, tokenizer, config)


if __name__ == "__main__":
    main()
