"""Stage 3a, the reward model: one number for an answer, learned from pairs of which a labeller preferred one.

    python reward.py                                                # the default world, from out/sft.pt
    python reward.py --init out/sft.pt --data mine.jsonl --out out/reward.pt
    python reward.py --show                                         # pairs with the score after each token, then stop

--data holds {"messages": [… the prompt …], "chosen": "…", "rejected": "…"} a line.

Differs from InstructGPT's in one thing: the head also reads how likely the trunk finds the answer (see RewardModel).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import loop
import parallel
import show
from data import conversation
from model import GPT, GPTConfig, last_true, token_logprobs


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint whose weights become the trunk
    data: str = "data/world/preferences.jsonl"  # preference pairs, one a line
    out: str = "out/reward.pt"  # checkpoint to write
    resume: str = ""  # go on with an interrupted run: from <out>.resume, or with "previous" from the state before
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    epochs: int = 1  # passes over the pairs; reward models overfit after one (InstructGPT)
    batch_size: int = 32  # pairs a step
    lr: float = 3e-4  # peak learning rate
    warmup: int = 20  # steps to the peak
    val_share: float = 0.08  # share of the pairs, the file's last, held out for the accuracy; from 1 on: how many
    calibration: int = 512  # prompts whose SFT answers get mean score 0 and standard deviation 1
    max_new_tokens: int = 16  # longest of these answers
    eval_every: int = 50  # steps between accuracies
    save_every: int = 200  # steps between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the step: pays on CUDA, not on CPU
    seed: int = 0  # head, batch order and calibration answers
    show: bool = False  # print pairs of the first batch and exit; writes nothing


class RewardModel(nn.Module):
    """GPT trunk + scalar head: a score at each token; an answer's score is the one at its end token.

    The head reads the last hidden state, and the log-probability that the trunk itself gives the answer so far,
    weighed by a learned scalar. Why: a small model's hidden state does not tell whether a stated fact is true, even
    about people it knows (right above wrong in 50% of pairs), but its language model does (100%, and just so
    about people whom no pair showed it). The scalar starts where likelihood_fit puts it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))  # lm-human-preferences
        nn.init.zeros_(self.head.bias)
        self.likelihood_weight = nn.Parameter(torch.ones(1))

    def forward(self, tokens, mask):
        """tokens (B, T), mask (B, T) True on the answer's tokens -> scores (B, T) of the answer up to each token."""
        hidden = self.trunk.hidden(tokens)  # (B, T, C)
        likelihood = self.likelihood(hidden, tokens, mask)  # (B, T)
        return self.head(hidden).squeeze(-1).float() + self.likelihood_weight * likelihood

    def likelihood(self, hidden, tokens, mask):
        """log p(the answer up to and with token t | the prompt), by the trunk: (B, T) from its hidden states (B, T, C)."""
        mask = mask[:, 1:]  # (B, T-1): True where the next token is the answer's; only there are logits needed
        taken = token_logprobs(self.trunk.logits(hidden[:, :-1][mask]), tokens[:, 1:][mask])  # (N,)
        logprobs = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, taken)  # (B, T-1)
        return F.pad(logprobs.cumsum(1), (1, 0))

    def score(self, tokens, mask):
        """The scores (B,) at the last token of each answer."""
        return self(tokens, mask).gather(1, last_true(mask)[:, None]).squeeze(1)


def preference_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs: scores (B,) of the preferred and of the other answer.

    The negative log-likelihood of the Bradley-Terry model (arXiv 2203.02155, equation 1).
    """
    return -F.logsigmoid(chosen - rejected).mean()


def load_pairs(path, tokenizer, block_size):
    """[(chosen, rejected)], each (tokens, mask) with mask 1 on the answer.

    What does not fit in block_size goes from the prompt's beginning, then from the answer's end; pairs then alike are left out.
    """

    def problem(record):
        if wrong := conversation.check(record.get("messages")):
            return wrong
        if record["messages"][-1]["role"] != "user":
            return "messages must end in a user message, which chosen and rejected answer"
        if not isinstance(record.get("chosen"), str) or not isinstance(record.get("rejected"), str):
            return '"chosen" and "rejected" must be strings'

    records = common.read_jsonl(path, problem)
    pairs = []
    for record in records:
        prompt = conversation.render_prompt(record["messages"], tokenizer)
        answers = [tokenizer.encode(record[which]) + [tokenizer.end] for which in ("chosen", "rejected")]
        too_long = len(prompt) + max(map(len, answers)) - block_size
        prompt = prompt[min(max(too_long, 0), len(prompt) - 1) :]  # the same for both, and <|assistant|> stays
        pair = [((prompt + a)[:block_size], ([0] * len(prompt) + [1] * len(a))[:block_size]) for a in answers]
        if pair[0] != pair[1]:
            pairs.append(common.Row(record.line, *pair))
    if not pairs:
        common.die(f"{path}: no pair differs within {block_size} tokens")
    if len(pairs) < len(records):
        print(f"left out {len(records) - len(pairs)} pairs whose answers are the same within {block_size} tokens")
    return pairs


def collate(examples, pad, device):
    """[(tokens, mask)] -> tokens (B, T) and mask (B, T), padded on the right."""
    tokens = common.pad_rows([tokens for tokens, _ in examples], pad, device)
    mask = common.pad_rows([mask for _, mask in examples], 0, device).bool()
    return tokens, mask


def score_pairs(model, pairs, pad, device):
    """Scores (B,) of the chosen and of the rejected answers, all in one forward pass."""
    tokens, mask = collate([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], pad, device)  # (2B, T)
    with common.autocast(device):
        return model.score(tokens, mask).chunk(2)


@torch.no_grad()
def validate(model, pairs, pad, device):
    """The share of pairs whose chosen answer scores higher, and its standard error; nothing without pairs."""
    if not pairs:
        return {}
    right = 0
    for i in range(0, len(pairs), 64):
        chosen, rejected = score_pairs(model, pairs[i : i + 64], pad, device)
        right += (chosen > rejected).sum().item()
    accuracy = right / len(pairs)
    return dict(val_accuracy=accuracy, val_accuracy_se=math.sqrt(accuracy * (1 - accuracy) / len(pairs)))


@torch.no_grad()
def likelihood_fit(model, pairs, pad, device):
    """The w in [-1, 1] at which w log p(answer) alone explains the pairs best: the root of the preference loss's slope.

    0.6 in the default world. Where answers are long, likelihoods differ by tens of nats, mostly by length: for 1,000 polite
    and rude answers w is 0.002, and a weight of 1 starts at a loss of 11, too far for Adam's small steps on one scalar.
    """
    differences = []
    for i in range(0, len(pairs), 64):
        batch = pairs[i : i + 64]
        tokens, mask = collate([chosen for chosen, _ in batch] + [rejected for _, rejected in batch], pad, device)  # (2B, T)
        with common.autocast(device):
            likelihood = model.likelihood(model.trunk.hidden(tokens), tokens, mask)  # (2B, T)
        chosen, rejected = likelihood.gather(1, last_true(mask)[:, None]).squeeze(1).chunk(2)
        differences.append(chosen - rejected)
    d = torch.cat(differences).double()  # (N,)
    low, high = -1.0, 1.0
    for _ in range(40):  # bisection: the loss is convex in w, its slope is -mean(d sigmoid(-w d))
        w = (low + high) / 2
        low, high = (low, w) if (d * torch.sigmoid(-w * d)).mean() < 0 else (w, high)
    return w


@torch.no_grad()
def calibrate(model, sft, prompts, tokenizer, config):
    """Shifts and scales the scores to mean 0 and standard deviation 1 over SFT's own answers to the prompts.

    The shift is lm-human-preferences'; the scale lets PPO's beta mean the same for every reward model.
    """
    scores = []
    for i in range(0, len(prompts), 64):
        batch = prompts[i : i + 64]
        with common.autocast(sft.device):
            answers = sft.generate(batch, config.max_new_tokens, end_id=tokenizer.end)
            examples = [(p + a, [0] * len(p) + [1] * len(a)) for p, a in zip(batch, answers)]
            scores.append(model.score(*collate(examples, tokenizer.pad, sft.device)))
    scores = torch.cat(scores)  # (N,)
    if not scores.std() > 1e-3:  # what rounding alone makes of equal ones
        common.die(f"the {len(scores)} SFT answers of the calibration all score {scores[0]:.4g}, too alike to scale by; make them differ: "
                   "a larger --calibration, other prompts, an --init that does not always say the same")  # fmt: skip
    model.head.bias -= scores.mean()
    for parameter in (model.head.weight, model.head.bias, model.likelihood_weight):
        parameter /= scores.std()
    print(f"scores of {len(prompts)} SFT answers: mean {scores.mean():.2f}, std {scores.std():.2f}, now 0 and 1")


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    sft, tokenizer = common.load_checkpoint(config.init, ["base", "sft", "ppo"], GPT, device)
    model = RewardModel(sft.config).to(device)
    model.trunk.load_state_dict(sft.state_dict())
    if config.compile:
        model.trunk.hidden = torch.compile(model.trunk.hidden)
    pairs = load_pairs(config.data, tokenizer, model.config.block_size)
    train, val = common.hold_out(pairs, config.val_share)
    if len(train) < config.batch_size:
        common.die(f"{config.data}: {len(train)} pairs to train on are fewer than --batch_size {config.batch_size}")
    longest = model.config.block_size - config.max_new_tokens
    prompts = [tokens[: mask.index(1)] for (tokens, mask), _ in train if 1 in mask[: max(longest, 0)]][: config.calibration]
    if len(prompts) < 2:
        common.die(f"{len(prompts)} prompts for the calibration: at least 2 must leave room for --max_new_tokens {config.max_new_tokens}")
    batches = common.Batches([mask.count(0) for (_, mask), _ in train], config.batch_size, config.seed)
    model.likelihood_weight.data.fill_(likelihood_fit(model, train[:1024], tokenizer.pad, device))
    if config.show:
        answers = [answer for i in batches[0][:3] for answer in train[i]]  # chosen and rejected in turn
        return show.pairs(model, *collate(answers, tokenizer.pad, device), tokenizer)
    steps = config.steps or config.epochs * len(batches)
    optimizers = common.make_optimizers(model, config.lr, weight_decay=0.0, eps=1e-5)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {len(train):,} + {len(val)} pairs, {steps} steps of {config.batch_size}")
    initial = ", ".join(f"{k} {v:.3f}" for k, v in validate(model, val, tokenizer.pad, device).items())
    print(f"before training: likelihood weight {model.likelihood_weight.item():.3f}, {initial}")

    log = loop.Log(config.out, lambda step: f"{config.data}, lines {sorted(train[i].line for i in batches[step])}")
    parts = {"model": model} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    for step in loop.train_steps(config, steps, parts, log):
        rows = parallel.mine(batches[step])
        chosen, rejected = score_pairs(model, [train[i] for i in rows], tokenizer.pad, device)  # (B,) each
        loss = preference_loss(chosen, rejected) / parallel.size
        loss.backward()
        grad_norm = common.optimizer_step(model, optimizers, common.lr_factor(step, steps, config.warmup))

        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            margin = parallel.total((chosen - rejected).mean() / parallel.size).item()
            held_out = validate(model, val, tokenizer.pad, device)
            tokens, _ = collate([answer for i in batches[step] for answer in train[i]], tokenizer.pad, device)  # (2B, T)
            non_pad = (tokens != tokenizer.pad).float().mean().item()  # share of the batch
            log(step + 1, train_loss=parallel.total(loss).item(), **held_out, margin=margin, grad_norm=grad_norm.item(), non_pad=non_pad)
    torch.manual_seed(config.seed)
    calibrate(model, sft, prompts, tokenizer, config)
    common.save_checkpoint(config.out, "reward", model, tokenizer, config)


if __name__ == "__main__":
    main()
