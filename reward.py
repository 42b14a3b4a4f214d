"""Stage 3a, the reward model: one number for an answer, learned from which of two was preferred.

    python reward.py                    # the default world, from out/sft.pt
    python reward.py --show             # print pairs with the score after each token, then stop
    python reward.py --init out/sft.pt --data mine.jsonl --out out/reward.pt

--data holds one comparison a line:
    {"messages": [… the prompt …], "chosen": "…", "rejected": "…"}

Main differences from InstructGPT's (arXiv 2203.02155):
    The score has one more term, the answer's log-probability. --no-logprob_term leaves it out.
    Afterwards scores get mean 0 and standard deviation 1 over the SFT model's own answers; there
    they are only shifted, to mean 0 over the labellers' demonstrations.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.examples import Example, load_pairs
from model import GPT, GPTConfig, last_true, scatter, token_logprobs
from train import parallel, show
from train.batches import Batches, collate, hold_out, micro_batches, rows_at_once, split
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from train.device import autocast, compiled, setup
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import die, parse_config


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint whose weights become the trunk
    data: str = "out/world/preferences.jsonl"  # preference pairs, one a line
    out: str = "out/reward.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes over the pairs; reward models overfit after one (InstructGPT)
    batch_size: int = 32  # pairs per step
    micro_batch_size: int = 0  # pairs per forward pass, for small GPUs; 0: all of the batch
    logprob_term: bool = True  # add the answer's log-probability to the score
    lr: float = 1e-4  # peak learning rate; higher ones cost the trunk facts
    warmup: int = 20  # steps to the peak
    val_fraction: float = 0.08  # of the pairs, held out from the end of the file
    calibration_size: int = 512  # prompts whose SFT answers get mean score 0 and deviation 1
    max_new_tokens: int = 16  # longest of these answers, as in ppo.py
    eval_every: int = 50  # steps between accuracies
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # head, batch order and calibration answers
    show: bool = False  # print pairs of the first batch and exit


# ---- the model


@dataclass
class RewardConfig(GPTConfig):
    logprob_term: bool = True


class RewardModel(nn.Module):
    """A GPT trunk and a scalar head: a score at each token. An answer's score is its last token's.

    That is InstructGPT's reward model. With logprob_term the score is

        head(hidden) + logprob_weight * log p(answer | prompt)

    with p the trunk's own language model, which is trained along, and one learned weight. A small
    model's hidden state does not tell a true fact from a false one: on pairs that differ in one
    fact, accuracy is 50% with the head alone and 99 to 100% with the term, also for people in no
    training pair. In PPO the term also favours answers that SFT finds likely.
    """

    config_class = RewardConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        # as in lm-human-preferences
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        if config.logprob_term:
            self.logprob_weight = nn.Parameter(torch.zeros(1))

    @compiled
    def forward(self, tokens, mask):
        """The scores (B, T) of the answer up to each token.

        tokens (B, T); mask (B, T), True on the answer's tokens
        """
        hidden = self.trunk.hidden(tokens)  # (B, T, C)
        scores = self.head(hidden).squeeze(-1).float()  # (B, T)
        if self.config.logprob_term:
            scores = scores + self.logprob_weight * self.answer_logprobs(hidden, tokens, mask)
        return scores

    def answer_logprobs(self, hidden, tokens, mask):
        """log p(the answer up to and including token t | the prompt), by the trunk: (B, T)."""
        is_next = mask[:, 1:]  # (B, T-1): True where the next token is the answer's
        places = is_next.nonzero(as_tuple=True)  # rows and columns, (N,) each
        logits = self.trunk.logits(hidden[:, :-1][places])  # (N, V), needed only there
        logprobs = token_logprobs(logits, tokens[:, 1:][places])  # (N,)
        logprobs = scatter(logprobs, places, is_next)  # (B, T-1)
        return F.pad(logprobs.cumsum(1), (1, 0))  # (B, T)

    def score(self, tokens, mask):
        """The score (B,) at the last token of each answer."""
        scores = self(tokens, mask)  # (B, T)
        return scores.gather(1, last_true(mask)[:, None]).squeeze(1)


def from_gpt(gpt, logprob_term):
    """A reward model whose trunk is a copy of the GPT."""
    config = RewardConfig(**dataclasses.asdict(gpt.config), logprob_term=logprob_term)
    model = RewardModel(config).to(gpt.device)
    model.trunk.load_state_dict(gpt.state_dict())
    return model


# ---- the loss


def preference_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs; scores (B,) of both answers.

    The negative log-likelihood of the Bradley-Terry model (arXiv 2203.02155, equation 1).
    """
    return -F.logsigmoid(chosen - rejected).mean()


def collate_pairs(pairs, pad, device):
    """tokens and mask, (2B, T) each: first all chosen answers, then all rejected ones."""
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(answers, pad, device)


def score_pairs(model, pairs, pad, device):
    """The scores (B,) of the chosen and of the rejected answers, all in one forward pass."""
    tokens, mask = collate_pairs(pairs, pad, device)  # (2B, T) each
    with autocast(device):
        return model.score(tokens, mask).chunk(2)


@torch.no_grad()
def validate(model, pairs, pad, device, size):
    """The fraction of pairs whose chosen answer scores higher, with its standard error."""
    if not pairs:
        return {}
    n_right = 0
    for part in split(pairs, size):
        chosen, rejected = score_pairs(model, part, pad, device)  # (B,) each
        n_right += (chosen > rejected).sum().item()
    accuracy = n_right / len(pairs)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / len(pairs))
    return dict(val_accuracy=accuracy, val_accuracy_se=standard_error)


# ---- before and after training


@torch.no_grad()
def logprob_spread(model, pairs, pad, device, size):
    """By how many nats two answers of a pair differ in log-probability, the root mean square.

    8 in the default world. Long answers differ by tens, mostly by length.
    """
    total = 0.0
    for batch in split(pairs, size):
        tokens, mask = collate_pairs(batch, pad, device)  # (2B, T) each
        with autocast(device):
            logprobs = model.answer_logprobs(model.trunk.hidden(tokens), tokens, mask)  # (2B, T)
        chosen, rejected = logprobs[:, -1].chunk(2)  # of whole answers, (B,) each
        total += (chosen - rejected).square().sum().item()
    return math.sqrt(total / len(pairs))


@torch.no_grad()
def calibrate(model, sft, prompts, tokenizer, config):
    """Shifts and scales the scores to mean 0 and standard deviation 1 over SFT's own answers.

    As in lm-human-preferences (arXiv 1909.08593): so beta means about the same for every reward
    model. Not quite, for the deviation also holds how much the prompts' mean scores differ.
    """
    examples, scores = [], []
    for batch in split(prompts, 64):
        with autocast(sft.device):
            answers = sft.generate(batch, config.max_new_tokens, end_id=tokenizer.end)
        for prompt, answer in zip(batch, answers):
            mask = [0] * len(prompt) + [1] * len(answer)
            examples.append(Example(prompt + answer, mask, line=0))
    for part in split(examples, 2 * rows_at_once(config)):  # a step's pairs have two each
        with autocast(sft.device):
            scores.append(model.score(*collate(part, tokenizer.pad, sft.device)))
    scores = torch.cat(scores)  # (N,)
    mean, std = scores.mean(), scores.std()
    if not std > 1e-3:  # equal scores differ by rounding
        die(
            f"the {len(scores)} SFT answers of the calibration all score {scores[0]:.4g}, "
            "too alike to scale by; make them differ: a larger --calibration_size, other prompts, "
            "an --init that does not always say the same"
        )
    model.head.bias -= mean
    model.head.weight /= std
    model.head.bias /= std
    if model.config.logprob_term:
        model.logprob_weight /= std
    print(f"scores of {len(scores)} SFT answers: mean {mean:.2f}, std {std:.2f}, now 0 and 1")


def calibration_prompts(pairs, config, block_size):
    """The ids of the first prompts that leave room for an answer."""
    longest = block_size - config.max_new_tokens
    prompts = [pair.prompt for pair in pairs if len(pair.prompt) <= longest]
    prompts = prompts[: config.calibration_size]
    if len(prompts) < 2:
        room = f"leave room for --max_new_tokens {config.max_new_tokens}"
        die(f"{len(prompts)} prompts for the calibration: at least 2 must {room}")
    return prompts


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)

    # model: the SFT model's trunk, a new head
    sft, tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
    model = from_gpt(sft, config.logprob_term)

    # data
    pairs = load_pairs(config.data, tokenizer, model.config.block_size)
    train, val = hold_out(pairs, config.val_fraction)
    prompts = calibration_prompts(train, config, model.config.block_size)
    prompt_lengths = [pair.chosen.prompt_length for pair in train]
    batches = Batches(train, config.batch_size, config.seed, config.data, prompt_lengths)
    size = rows_at_once(config)
    if config.show:
        return show.pairs(model, batches[0][:3], tokenizer, device)

    # optimizers
    steps = config.steps or config.epochs * len(batches)
    own_lr = {}
    if config.logprob_term:
        # Adam moves a weight by about lr a step; this one alone has to move scores: by 1000 lr
        spread = logprob_spread(model, train[:1024], tokenizer.pad, device, size)
        own_lr["logprob_weight"] = 1000 * config.lr / max(1.0, spread)  # of NaN: 1.0
    optimizers = make_optimizers(model, config.lr, weight_decay=0.0, eps=1e-5, own_lr=own_lr)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {len(train):,} + {len(val)} pairs, {steps} steps")

    run = Run(config, steps, [model], optimizers, batches)
    for name, value in validate(model, val, tokenizer.pad, device, size).items():
        print(f"{name} {value:.3f} at step {run.first_step}")
    for step in run:
        # forward and backward
        batch = batches[step]
        loss_sum, margin_sum = 0.0, 0.0
        for micro in micro_batches(batch, config.micro_batch_size):
            chosen, rejected = score_pairs(model, micro, tokenizer.pad, device)  # (B,) each
            weight = len(micro) / config.batch_size  # the batch's mean, part by part
            loss = preference_loss(chosen, rejected) * weight
            loss.backward()
            loss_sum += loss.detach()
            margin_sum += (chosen - rejected).detach().mean() * weight

        # update
        grad_norm = optimizer_step(model, optimizers, lr_factor(step, steps, config.warmup))
        run.watch(grad_norm)

        # log
        if run.is_due(step, config.eval_every):
            run.log(
                step + 1,
                train_loss=parallel.all_reduce_sum(loss_sum).item(),
                **validate(model, val, tokenizer.pad, device, size),
                margin=parallel.all_reduce_sum(margin_sum).item(),
                grad_norm=grad_norm.item(),
            )

    # calibration and checkpoint
    torch.manual_seed(config.seed)
    calibrate(model, sft, prompts, tokenizer, config)
    save_checkpoint(config.out, "reward", model, tokenizer, config)


if __name__ == "__main__":
    main()
