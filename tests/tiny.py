"""Real parts in the smallest size, and a world of 40 responses, where an expectation is a sum."""

import itertools
import sys
from unittest import mock

import torch

import train.device
from data.examples import Prompt
from data.tokenizer import BYTES, Tokenizer
from model import GPT, GPTConfig
from reward import from_gpt
from train.batches import pad_rows

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
    return from_gpt(policy, logprob_term=True)


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
