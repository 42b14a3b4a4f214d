"""GRPO: PPO without a critic; the baseline is the mean score of a prompt's samples.

    python -m forks.grpo                # the default world, against out/reward.pt
    python -m forks.grpo --show         # print one prompt's responses and their advantages

What differs from ppo.py, whose files, rollout and policy loss it uses (arXiv 2402.03300):
    Each prompt is answered group_size times. All tokens of a response get the same advantage,
    score - beta log(pi / pi_ref) minus the group's mean of the same. It is not whitened, and
    there is no critic, no GAE, no value loss.
    --divide_by_std divides the score's part by the group's standard deviation, as in the paper. So
    the KL weight becomes beta * std, another one for each prompt (arXiv 2503.20783).
    The KL penalty is part of the advantage, by ppo.py's k1. The paper adds the estimator k3 to the
    loss; per token, its mean gradient is that of KL(ref || pi).
    The loss is a mean over the minibatch's tokens. The paper averages within each response first,
    which favours short right responses and long wrong ones (arXiv 2503.20783).
"""

import copy
import time
from dataclasses import dataclass

import torch

import ppo
from data.examples import load_prompts
from model import GPT
from train import parallel, show
from train.batches import Batches, hold_out, micro_batches, rows_at_once, split
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from train.device import autocast, compiled, setup, to_device
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import die, parse_config


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that becomes policy and reference
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "out/world/prompts.jsonl"  # prompts, one per line
    out: str = "out/grpo.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 80  # iterations of rollout and update
    batch_size: int = 128  # episodes per iteration
    group_size: int = 8  # episodes per prompt
    minibatch_size: int = 64  # episodes per optimizer step
    micro_batch_size: int = 0  # episodes per forward pass; 0: all of a rollout or minibatch
    epochs: int = 2  # passes over a rollout
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of sampling and of all log-probabilities
    lr: float = 2e-4  # peak, linear to 0
    beta: float = 0.2  # weight of the KL penalty
    divide_by_std: bool = False  # divide advantages by the group's standard deviation
    clip: float = 0.2  # the ratio is not pushed beyond 1 +- clip
    missing_eos_score: float = -3.0  # of a response without end; below those of usual ones
    min_score: float = -float("inf")  # floor of all scores
    val_size: int = 512  # prompts held out from the end of the file; at most a quarter
    log_every: int = 5  # iterations between log lines
    save_every: int = 20  # iterations between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # prompt order and sampling
    show: bool = False  # print episodes of the first two iterations and exit

    def __post_init__(self):
        if self.temperature < 1e-3:
            die(f"--temperature {self.temperature:g}: nothing is explored; give 0.001 or more")
        if self.batch_size % self.group_size or self.group_size < 2:
            sizes = f"--group_size {self.group_size} and --batch_size {self.batch_size}"
            die(f"{sizes}: the batch must hold whole groups of at least 2")


def group_advantages(x, group_size, divide_by_std=False):
    """x (B,) minus its group's mean, (B,); group_size neighbours are a group.

    A_i = x_i - mean(x); with divide_by_std (x_i - mean(x)) / (std(x) + 1e-4), std with n - 1
    """
    groups = x.view(-1, group_size)  # (prompts, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def compute_advantages(batch, config):
    """What each response earned, at all of its tokens: (B, T)."""
    kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)  # (B,): log pi / pi_ref, k1
    advantages = group_advantages(batch["scores"], config.group_size, config.divide_by_std)  # (B,)
    advantages = advantages - config.beta * group_advantages(kl, config.group_size)  # (B,)
    return advantages[:, None] * batch["mask"]


def no_critic(tokens, mask):
    """Values of 0 in the shape of tokens, where ppo.rollout asks a critic."""
    return torch.zeros(tokens.shape, device=tokens.device)


def rollout(policy, ref, score, prompts, tokenizer, config):
    """ppo.rollout with group_size responses to each prompt, neighbours in the batch."""
    prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
    return ppo.rollout(policy, ref, no_critic, score, prompts, tokenizer, config)


def update(policy, optimizers, batch, factor, config):
    """config.epochs passes of minibatch steps over the rollout. Returns the metrics' means."""
    losses, grad_norms = [], []
    for _ in range(config.epochs):
        order = to_device(torch.randperm(len(batch["mask"])), policy.device)  # (B,)
        for minibatch in split(order, config.minibatch_size):
            # forward and backward; the mean runs over the actions of the whole minibatch
            n_actions = batch["mask"][minibatch].sum()
            for rows in micro_batches(minibatch, config.micro_batch_size):
                micro = {name: x[rows] for name, x in batch.items()}  # (b, ..) each
                tokens, mask = micro["tokens"], micro["mask"]  # (b, T+1), (b, T)
                with autocast(policy.device):
                    logprobs = ppo.response_logprobs(policy, tokens, mask, config.temperature)
                loss = ppo.policy_loss(
                    logprobs, micro["logprobs"], micro["advantages"], mask, config.clip
                )
                loss = loss * (mask.sum() / n_actions)
                loss.backward()
                losses.append(loss.detach())
            grad_norms.append(optimizer_step(policy, optimizers, factor))
    loss = parallel.all_reduce_sum(torch.stack(losses).sum()) / len(grad_norms)
    return dict(policy_loss=loss.item(), grad_norm=torch.stack(grad_norms).mean().item())


def iteration(policy, ref, score, optimizers, prompts, step, tokenizer, config):
    """One step of training. Returns the rollout's batch and the metrics."""
    # rollout
    ppo.seed_draws(config, step)
    batch = rollout(policy, ref, score, prompts, tokenizer, config)
    metrics = ppo.rollout_metrics(batch)

    # advantages
    batch["advantages"] = compute_advantages(batch, config)  # (B, T)

    # update
    factor = lr_factor(step, config.steps, warmup=0)
    return batch, metrics | update(policy, optimizers, batch, factor, config)


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)

    # models: the policy, its frozen reference, reward model or function
    policy, tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    score, _ = ppo.load_score(config.reward, tokenizer, device, rows_at_once(config))
    policy.next_logits = compiled(policy.next_logits)  # for the rollouts
    adam = dict(weight_decay=0.0, betas=(0.9, 0.999), eps=1e-5)
    optimizers = make_optimizers(policy, config.lr, **adam)

    # data
    block_size = policy.config.block_size
    prompts = load_prompts(config.data, tokenizer, config.max_new_tokens, block_size)
    train, val = hold_out(prompts, size=min(config.val_size, len(prompts) // 4))
    n_prompts = config.batch_size // config.group_size
    batches = Batches(train, n_prompts, config.seed, config.data)
    print(f"{policy.n_params():,} parameters, {len(train):,} + {len(val)} prompts")

    if config.show:
        for step in range(2):
            args = (optimizers, batches[step], step, tokenizer, config)
            batch, _ = iteration(policy, ref, score, *args)
            show.group(step, batch, tokenizer, config.group_size)
        return

    # metrics before training: one response to each held-out prompt
    initial = {}
    if not config.resume:
        initial = ppo.validate(policy, ref, no_critic, score, val, tokenizer, config)
    run = Run(config, config.steps, [policy], optimizers, batches)
    if initial:
        run.log(0, **initial)
    for step in run:
        start = time.time()
        with run.sampling(step + 1):
            args = (optimizers, batches[step], step, tokenizer, config)
            _, metrics = iteration(policy, ref, score, *args)
        run.watch(metrics["grad_norm"])
        if run.is_due(step, config.log_every):
            speed = config.batch_size / (time.time() - start)
            run.log(step + 1, **metrics, episodes_per_s=speed)

    # metrics after training
    with run.sampling(config.steps):
        final = ppo.validate(policy, ref, no_critic, score, val, tokenizer, config)
    if final:
        run.log(config.steps, **final)
    save_checkpoint(config.out, "grpo", policy, tokenizer, config)


if __name__ == "__main__":
    main()
