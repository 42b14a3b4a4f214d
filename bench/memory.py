"""How much memory a stage needs on a GPU, from its sizes, and what fits into which.

    python -m bench.memory       # writes the table into docs/gpu.md

Bytes a parameter: 4 for the weight, 4 for its gradient, 8 for AdamW's two moments (Muon has one),
2 for the copy in bfloat16 that autocast keeps through a step. The rest grows with the tokens of a
forward pass. tests/test_memory.py holds these functions against measured peaks.

width: bytes of a number in autocast, 2; or 4 where the run is in float32, as on a T4.
"""

from model import GPTConfig
from utils.files import write_block

DOCUMENT = "docs/gpu.md"
CARDS = (8, 16, 24, 80, 141)  # GB
T4 = 16  # GB; it has no bfloat16
SPARE = 1.5  # GB for CUDA's own context, kernels' workspaces and what fragments


def n_params(c):
    """Parameters of a GPT of this config, embedding included; norms are not worth counting."""
    C, D = c.n_embd, c.head_dim
    attention = C * D * (2 * c.n_head + 2 * c.n_kv_head)
    embeddings = c.vocab_size * C * (1 if c.tied else 2)
    return embeddings + c.n_layer * (attention + 3 * C * c.n_inner)


def training(n, width):
    """{part: bytes} of a network of n parameters that AdamW trains."""
    return frozen(n, width) | dict(gradients=4 * n, optimizer=8 * n)


def frozen(n, width):
    return dict(weights=4 * n, copies=2 * n if width == 2 else 0)


def activations(c, n_tokens, T, width=2, fused=False):
    """Bytes that are kept for the backward pass, of n_tokens in rows of T.

    Each block keeps, a token: the inputs of both norms in float32 (8 C); in autocast's precision
    the inputs of six linear layers and q, k, v (9 C; without autocast the norms' outputs are one
    tensor each, 6 C), the MLP's gate and products (4 n_inner), and the weights of attention (H T).
    A fused kernel keeps its output and a sum a head in their place. What torch.compile computes
    anew in the backward pass counts here: its need is less.
    """
    C, H = c.n_embd, c.n_head
    numbers = (9 if width == 2 else 6) * C + 4 * c.n_inner + (C if fused else H * T)
    a_block = 8 * C + width * numbers + 4 * H * fused
    return n_tokens * (c.n_layer * a_block + (4 + width) * C)  # and the last norm


def logits(c, n_tokens, width=2, compiled=False, networks=1):
    """Bytes of n_tokens' logits at their peak, when the loss's backward pass begins.

    Eager code holds float32 alone: log-probabilities, by each network, and two gradients of one.
    Compiled code holds logits by each network and one gradient, in autocast's precision.
    """
    a_token = width * (networks + 1) if compiled else 4 * (networks + 2)
    return n_tokens * c.vocab_size * a_token


def cache(c, n_tokens, width=2):
    """Bytes of keys and values of n_tokens."""
    return 2 * width * c.n_layer * c.n_kv_head * c.head_dim * n_tokens


def pretraining(c, rows, T, width=2, compiled=False):
    """{part: bytes} of a step of pretraining or SFT, rows: of a forward pass."""
    parts = training(n_params(c), width)
    parts["activations"] = activations(c, rows * T, T, width, fused=compiled)
    parts["logits"] = logits(c, rows * T, width, compiled)
    return parts


def ppo(c, rows, episodes, prompt, new_tokens, width=2, compiled=False):
    """{part: bytes} of a PPO iteration: policy, critic, and the frozen reference and reward model.

    rows: --micro_batch_size; episodes: --batch_size, all of which are sampled at once. Their cache
    is gone when the update begins, so that the larger of the two counts.
    """
    n, T = n_params(c), prompt + new_tokens
    both = activations(c, 2 * rows * T, T, width, fused=compiled)  # policy and critic
    both += logits(c, rows * new_tokens, width, compiled, networks=2)  # of the responses only
    parts = {name: 2 * size for name, size in training(n, width).items()}
    parts["weights"] += 2 * frozen(n, width)["weights"]
    parts["update or cache"] = max(both, cache(c, episodes * T, width))
    return parts


# ---- the table


def gpt(vocab_size, n_layer, n_head, n_embd, block_size):
    sizes = dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_head, n_embd=n_embd)
    return GPTConfig(vocab_size=vocab_size, block_size=block_size, **sizes)


# name: (config, T of pretraining)
MODELS = {
    "default, 2M": (gpt(2048, 4, 4, 192, 256), 128),
    "GPT-2, 124M": (gpt(50304, 12, 12, 768, 1024), 1024),
    "GPT-2 medium's shape, 350M": (gpt(50304, 24, 16, 1024, 1024), 1024),
    "GPT-2 large's shape, 770M": (gpt(50304, 36, 20, 1280, 1024), 1024),
}
EPISODES = dict(episodes=128, prompt=128, new_tokens=128)


def most_rows(stage, room, **settings):
    """The largest power of two up to 64 of rows in a forward pass that fits in room bytes, or 0."""
    fitting = 0
    for rows in (1, 2, 4, 8, 16, 32, 64):
        if sum(stage(rows=rows, **settings).values()) <= room:
            fitting = rows
    return fitting


def cell(gb, stage, **settings):
    """What a card of so many GB holds, compiled and (in brackets) not."""
    settings["width"] = 4 if gb == T4 else 2
    room = (gb - SPARE) * 1e9
    rows = [most_rows(stage, room, compiled=compiled, **settings) for compiled in (True, False)]
    return "{} ({})".format(*(n or "–" for n in rows))


def table():
    lines = ["| | " + " | ".join(f"{gb} GB" for gb in CARDS) + " |"]
    lines.append("| --- |" + " --- |" * len(CARDS))
    for name, (c, T) in MODELS.items():
        text = [cell(gb, pretraining, c=c, T=T) for gb in CARDS]
        lines.append(f"| {name}: pretraining, T {T} | {' | '.join(text)} |")
        rlhf = [cell(gb, ppo, c=c, **EPISODES) for gb in CARDS]
        lines.append(f"| {name}: PPO, 128 × (128 + 128) tokens | {' | '.join(rlhf)} |")
    return "\n".join(lines)


def main():
    write_block(DOCUMENT, "bench.memory", table())
    print(f"wrote the table of {DOCUMENT}")


if __name__ == "__main__":
    main()
