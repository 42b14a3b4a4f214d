"""DPO: the policy learns from the comparisons themselves (arXiv 2305.18290).

    python -m forks.dpo                 # the default world, from out/sft.pt
    python -m forks.dpo --show          # print pairs with the reward up to each token

What differs from reward.py, whose files it reads, and from ppo.py, whose place it takes:
    The policy is its own reward model: its reward of a response is beta log(pi / pi_ref). With
    Bradley-Terry labels on pairs that cover the responses, its optimum is ppo.py's for the
    labeller's r, pi_ref exp(r / beta). reward.py divides that r by its standard deviation, so the
    same trade-off is beta * std there: here beta counts in the labeller's units.
    No scalar head, no critic, no sampling: the responses are those of the file.
    beta is the KL penalty's weight, but no KL is measured or penalized on the policy's own samples.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.examples import load_pairs
from model import GPT
from ppo import response_logprobs
from reward import collate_pairs, preference_loss
from train import parallel, show
from train.batches import Batches, hold_out, micro_batches, rows_at_once, split
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from train.device import autocast, setup
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import parse_config


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that becomes policy and reference
    data: str = "out/world/preferences.jsonl"  # preference pairs, one per line
    out: str = "out/dpo.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes over the pairs
    batch_size: int = 32  # pairs per step
    micro_batch_size: int = 0  # pairs per forward pass, for small GPUs; 0: all of the batch
    beta: float = 0.1  # weight of the implicit KL penalty
    lr: float = 3e-5  # peak learning rate
    warmup: int = 20  # steps to the peak
    val_fraction: float = 0.08  # of the pairs, held out from the end of the file
    eval_every: int = 50  # steps between accuracies
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # batch order
    show: bool = False  # print pairs of the first batch and exit


def dpo_loss(logprobs, ref_logprobs, beta):
    """-log sigmoid(r_chosen - r_rejected), the mean over pairs (arXiv 2305.18290, equation 7).

    r = beta log(pi / pi_ref): reward.py's loss, with the policy as the reward model.
    logprobs, ref_logprobs (2B,): of whole responses, first all chosen, then all rejected
    """
    chosen, rejected = (beta * (logprobs - ref_logprobs)).chunk(2)  # (B,) each
    return preference_loss(chosen, rejected)


def response_sums(model, tokens, mask):
    """log pi of the response up to each token: (B, T). tokens, mask (B, T), as in reward.py"""
    with autocast(model.device):
        logprobs = response_logprobs(model, tokens, mask[:, 1:], temperature=1.0)  # (B, T-1)
    return F.pad(logprobs.cumsum(1), (1, 0))


def pair_logprobs(policy, ref, pairs, pad, device):
    """log pi and log pi_ref of the responses, (2B,) each: first all chosen, then all rejected."""
    tokens, mask = collate_pairs(pairs, pad, device)  # (2B, T) each
    with torch.no_grad():
        ref_logprobs = response_sums(ref, tokens, mask)[:, -1]  # (2B,)
    return response_sums(policy, tokens, mask)[:, -1], ref_logprobs


@torch.no_grad()
def validate(policy, ref, pairs, beta, pad, device, size):
    """Loss, and the fraction of pairs whose chosen response has the higher implicit reward."""
    if not pairs:
        return {}
    losses, n_right = 0.0, 0
    for batch in split(pairs, size):
        logprobs, ref_logprobs = pair_logprobs(policy, ref, batch, pad, device)  # (2B,) each
        losses += dpo_loss(logprobs, ref_logprobs, beta).item() * len(batch)
        chosen, rejected = (logprobs - ref_logprobs).chunk(2)  # (B,) each
        n_right += (chosen > rejected).sum().item()
    accuracy = n_right / len(pairs)
    error = math.sqrt(accuracy * (1 - accuracy) / len(pairs))
    return dict(val_loss=losses / len(pairs), val_accuracy=accuracy, val_accuracy_se=error)


def show_pairs(policy, ref, pairs, beta, tokenizer, device):
    """The pairs, with the implicit reward so far after each token."""

    def running_rewards(tokens, mask):
        return beta * (response_sums(policy, tokens, mask) - response_sums(ref, tokens, mask))

    show.pairs(running_rewards, pairs, tokenizer, device)


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)

    # models: the policy and its frozen reference
    policy, tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    beta, pad = config.beta, tokenizer.pad

    # data
    pairs = load_pairs(config.data, tokenizer, policy.config.block_size)
    train, val = hold_out(pairs, config.val_fraction)
    prompt_lengths = [pair.chosen.prompt_length for pair in train]
    batches = Batches(train, config.batch_size, config.seed, config.data, prompt_lengths)

    steps = config.steps or config.epochs * len(batches)
    optimizers = make_optimizers(policy, config.lr, weight_decay=0.0)
    print(f"{policy.n_params():,} parameters, {len(train):,} + {len(val)} pairs, {steps} steps")

    run = range(1) if config.show else Run(config, steps, [policy], optimizers, batches)
    for step in run:
        # forward and backward
        loss_sum = 0.0
        for micro in micro_batches(batches[step], config.micro_batch_size):
            logprobs, ref_logprobs = pair_logprobs(policy, ref, micro, pad, device)  # (2B,) each
            loss = dpo_loss(logprobs, ref_logprobs, beta)
            loss = loss * (len(micro) / config.batch_size)  # the batch's mean, part by part
            loss.backward()
            loss_sum += loss.detach()

        # update
        grad_norm = optimizer_step(policy, optimizers, lr_factor(step, steps, config.warmup))
        if config.show:  # after one step on the batch: before it all rewards are 0
            return show_pairs(policy, ref, batches[0][:3], beta, tokenizer, device)
        run.watch(grad_norm)

        # log
        if run.is_due(step, config.eval_every):
            run.log(
                step + 1,
                train_loss=parallel.all_reduce_sum(loss_sum).item(),
                **validate(policy, ref, val, beta, pad, device, rows_at_once(config)),
                grad_norm=grad_norm.item(),
            )

    # checkpoint
    save_checkpoint(config.out, "dpo", policy, tokenizer, config)


if __name__ == "__main__":
    main()
