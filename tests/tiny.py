"""Real parts in the smallest size, and a world of 40 responses, where an expectation is a sum."""

import itertools
import sys
from unittest import mock

import numpy as np
import torch

import sft
import train.device
from data.examples import Prompt
from data.tokenizer import BYTES, Tokenizer
from model import GPT, GPTConfig
from reward import from_gpt
from train.batches import pad_rows
from train.checkpoint import save_checkpoint
from utils.files import write_jsonl, write_text

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=11,
    block_size=32,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=16,
    n_inner=16,
)


def gpt(**sizes):
    """A GPT with larger weights than at initialization, where logits are alike and bugs hide."""
    model = GPT(GPTConfig(**SIZES | sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # a tied embedding of the others' size would mostly predict the last token again
            parameter.data *= 5 if name == "embed.weight" else 14
    return model


def critic(policy):
    """A RewardModel on a copy of the policy's trunk, with both terms of the score."""
    model = from_gpt(policy, logprob_term=True)
    torch.nn.init.ones_(model.logprob_weight)
    return model


def prompts(rows):
    """Prompts of these token lists; their text is the list's number."""
    return [
        Prompt(tokens, [{"role": "user", "content": f"prompt {i}"}], line=i + 1)
        for i, tokens in enumerate(rows)
    ]


def in_precision(dtype):
    """A context in which the stages compute in dtype, whatever this machine's choice would be."""
    is_bfloat16 = {torch.float32: False, torch.bfloat16: True}[dtype]
    return mock.patch.object(train.device, "computes_in_bfloat16", lambda device: is_bfloat16)


def byte_tokenizer():
    """The 256 bytes and the special tokens: 261 ids, no merges."""
    return Tokenizer({bytes([b]): i for i, b in enumerate(BYTES)})


def pads_on_the_left(rows):
    """tokens (B, T) and n_pad (B,) of token lists of unequal length."""
    T = max(map(len, rows))
    n_pad = [T - len(row) for row in rows]
    tokens = [[0] * n + row for n, row in zip(n_pad, rows)]
    return torch.tensor(tokens), torch.tensor(n_pad)


def run(module, flags):
    """The module's main with {flag: value} as its command line."""
    argv = [f"{module.__name__}.py"]
    for name, value in flags.items():
        if value is True or value is False:
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    with mock.patch.object(sys, "argv", argv):
        module.main()


def stage_flags(folder, seed=0):
    """{stage: flags of a run of three steps}, and in the folder all that the stages read.

    The text holds every id. SFT has taught its model to end most answers, so that they differ in
    length; the reward model is an untrained one on other weights.
    """
    torch.manual_seed(seed)
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(seed)
    write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    for name, size in (("train", 3000), ("val", 603)):
        ids = np.resize(rng.permutation(tokenizer.vocab_size), size)
        ids[rng.random(size) < 0.2] = tokenizer.end
        ids.astype(tokenizer.id_type).tofile(folder / f"{name}.bin")
    demonstrations, pairs, prompts = [], [], []
    for i in range(96):
        question = {"role": "user", "content": f"{'abc'[i % 3] * (i % 5)}{100 * seed + i}?"}
        answer = {"role": "assistant", "content": "ny"[i % 2] * (1 + i % 4)}
        demonstrations.append({"messages": [question, answer]})
        answers = ["y" * (1 + i % 3), "n" * (1 + i % 2)]
        chosen, rejected = reversed(answers) if rng.random() < 0.25 else answers
        pairs.append({"messages": [question], "chosen": chosen, "rejected": rejected})
        prompts.append({"messages": [question]})
    write_jsonl(folder / "conversations.jsonl", demonstrations)
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", prompts)
    files = {name: folder / f"{name}.pt" for name in ("base", "sft", "reward")}
    base, other = gpt(vocab_size=261, block_size=64), gpt(vocab_size=261, block_size=64)
    save_checkpoint(files["base"], "base", base, tokenizer, sft.Config())
    save_checkpoint(files["reward"], "reward", critic(other), tokenizer, sft.Config())

    common = dict(device="cpu", seed=3, out=folder / "out.pt")
    batches = common | dict(batch_size=8, warmup=2, lr=1e-2, eval_every=1)
    taught = batches | dict(init=files["base"], data=folder / "conversations.jsonl")
    taught |= dict(val_fraction=0.7)  # an epoch of the rest has three batches
    run(sft, taught | dict(out=files["sft"], steps=60, val_fraction=0.0, eval_every=60))
    compared = batches | dict(init=files["sft"], data=folder / "preferences.jsonl")
    compared |= dict(val_fraction=0.7)
    sizes = dict(seq_len=8, block_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    sampled = common | dict(init=files["sft"], data=folder / "prompts.jsonl", steps=3, lr=1e-2)
    sampled |= dict(reward=files["reward"], batch_size=8, minibatch_size=4, max_new_tokens=4)
    sampled |= dict(val_size=9, log_every=1)
    return {
        "pretrain": batches | sizes | dict(data=folder, steps=3),
        "sft": taught,
        "reward": compared | dict(max_new_tokens=6, calibration_size=16),
        "ppo": sampled,
        "dpo": compared,
        "grpo": sampled | dict(group_size=4),
    }


# ---- ids 0, 1, 2 and the end token 3, at most three tokens

END = 3
MAX_NEW_TOKENS = 3
RESPONSES = []
for n in range(MAX_NEW_TOKENS):  # 1 + 3 + 9 responses that end
    RESPONSES += [[*body, END] for body in itertools.product(range(END), repeat=n)]
RESPONSES += [list(body) for body in itertools.product(range(END), repeat=MAX_NEW_TOKENS)]  # 27


class EnumerableTokenizer:
    end, pad = END, 0

    def decode(self, ids):
        return " ".join(map(str, ids))


def enumerate_responses(prompt):
    """Every response in ppo's index frame: tokens (40, T+1), mask (40, T)."""
    rows = [prompt + response for response in RESPONSES]
    masks = [[0] * len(prompt) + [1] * len(response) for response in RESPONSES]
    tokens = pad_rows(rows, EnumerableTokenizer.pad, CPU)
    return tokens, pad_rows(masks, 0, CPU)[:, 1:].bool()


@torch.no_grad()
def exact_logprobs(model, prompt, temperature):
    """log pi(response | prompt) of all 40, (40,), float64.

    By the chain rule, each token from a forward pass of its own.
    """
    totals = []
    for response in RESPONSES:
        total = 0.0
        for i, token in enumerate(response):
            tokens = torch.tensor([prompt + response[:i]])
            logits = model(tokens)[0, -1].double() / temperature  # (V,)
            total += logits.log_softmax(0)[token].item()
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)
