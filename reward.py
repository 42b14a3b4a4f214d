"""Stage 3a, the reward model: one number for an answer, learned from pairs of which a labeller preferred one.

    python reward.py                                                # the default world, from out/sft.pt
    python reward.py --init out/sft.pt --data mine.jsonl --out out/reward.pt

--data holds {"messages": [… the prompt …], "chosen": "…", "rejected": "…"} a line.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from data import conversation
from model import GPT, GPTConfig, token_logprobs


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint whose weights become the trunk
    data: str = "data/world/preferences.jsonl"  # preference pairs, one a line
    out: str = "out/reward.pt"  # checkpoint to write
    resume: bool = False  # continue an interrupted run from <out>.resume
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes over the pairs; reward models overfit after one (InstructGPT)
    batch_size: int = 32  # pairs a step
    lr: float = 3e-4  # peak learning rate
    warmup: int = 20  # steps to the peak
    val_share: float = 0.08  # share of the pairs held out for the accuracy
    eval_every: int = 100  # steps between accuracies
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the step: pays on CUDA, not on CPU
    seed: int = 0  # head and batch order


class RewardModel(nn.Module):
    """GPT trunk + scalar head."""

    def __init__(self, config: GPTConfig, recall=True):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        self.recall = recall
        self.gain = nn.Parameter(torch.ones(1)*float(recall))
        self.gain.requires_grad = recall

    def forward(self, tokens, mask):
        hidden = self.trunk.hidden(tokens)  # (B, T, C)
        scores = self.head(hidden).squeeze(-1).float()  # (B, T)
        if self.recall:
            logprobs = token_logprobs(self.trunk.logits(hidden[:, :-1]), tokens[:, 1:]) * mask[:, 1:]  # (B, T-1)
            scores = scores + self.gain * F.pad(logprobs.cumsum(1), (1, 0))  # (B, T)
        return scores

    def score(self, tokens, mask):
        last = mask.size(1) - 1 - mask.int().flip(1).argmax(1)  # (B,)
        return self.forward(tokens, mask).gather(1, last[:, None]).squeeze(1)  # (B,)


def preference_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs: scores (B,) of the preferred and of the other answer."""
    return -F.logsigmoid(chosen - rejected).mean()


def load_pairs(path, tokenizer, block_size):
    def problem(record):
        if not isinstance(record.get("chosen"), str) or not isinstance(record.get("rejected"), str):
            return 'needs "messages", "chosen" and "rejected"'
        if wrong := conversation.check(record.get("messages")):
            return wrong
        if record["messages"][-1]["role"] != "user":
            return "messages must end in a user message, which chosen and rejected answer"

    pairs = []
    for record in common.read_jsonl(path, problem):
        pair = []
        for answer in (record["chosen"], record["rejected"]):
            n_prompt = len(conversation.render_prompt(record["messages"], tokenizer))
            tokens, _ = conversation.render(record["messages"] + [{"role": "assistant", "content": answer}], tokenizer)
            pair.append((tokens[:block_size], ([0] * n_prompt + [1] * (len(tokens) - n_prompt))[:block_size]))
        if pair[0] != pair[1]:
            pairs.append(pair)
    return pairs


def collate(examples, pad, device):
    tokens = common.pad_rows([tokens for tokens, _ in examples], pad, device)
    mask = common.pad_rows([mask for _, mask in examples], 0, device).bool()
    return tokens, mask


def score_pairs(model, pairs, pad, device):
    tokens, mask = collate([c for c, _ in pairs] + [r for _, r in pairs], pad, device)  # (2B, T)
    with common.autocast(device):
        scores = model.score(tokens, mask)
    return scores.chunk(2)


@torch.no_grad()
def accuracy(model, pairs, pad, device):
    right = 0
    for i in range(0, len(pairs), 64):
        c, r = score_pairs(model, pairs[i : i + 64], pad, device)
        right += (c > r).sum().item()
    return right / len(pairs)


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    sft, tokenizer = common.load_checkpoint(config.init, ["base", "sft"], GPT, device)
    import os
    model = RewardModel(sft.config, recall=os.environ.get("RECALL", "1") == "1").to(device)
    model.trunk.load_state_dict(sft.state_dict())
    pairs = load_pairs(config.data, tokenizer, model.config.block_size)
    n_val = max(1, round(config.val_share * len(pairs)))
    val, train = pairs[:n_val], pairs[n_val:]
    batches = common.Batches([len(c[0]) for c, _ in train], config.batch_size, config.seed)
    steps = config.steps or config.epochs * len(batches)
    optimizers = common.make_optimizers(model, config.lr, weight_decay=0.0, eps=1e-5)
    print(f"{model.config}, {len(train):,} + {n_val} pairs, {steps} steps of {config.batch_size}")
    log = common.Log(config.out)
    parts = {"model": model} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    for step in common.train_steps(config, steps, parts, log):
        chosen, rejected = score_pairs(model, [train[i] for i in batches[step]], tokenizer.pad, device)  # (B,) each
        loss = preference_loss(chosen, rejected)
        loss.backward()
        grad_norm = common.optimizer_step(model, optimizers, common.lr_factor(step, steps, config.warmup))
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            log(step + 1, train_loss=loss.item(), val_accuracy=accuracy(model, val, tokenizer.pad, device), grad_norm=grad_norm.item(), gain=model.gain.item())
    common.save_checkpoint(config.out, "reward", model, tokenizer, config)


if __name__ == "__main__":
    main()
